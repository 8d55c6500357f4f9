"""Completions from the model under training: prompts in, groups of samples out, the training left as it was.

Random states, train mode, gradient checkpointing and the tokenizer's padding side are restored. All samples of a
prompt are drawn on one process; the draw depends on the seed and the prompt's index, not on what the training has
drawn.
"""

import random
from contextlib import contextmanager

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from trl.models.utils import unwrap_model_for_generation

from .diversity import Group
from .stops import stop_ids


class EntropyRecorder(LogitsProcessor):
    """Keeps the entropy of each next-token distribution, in nats.

    At temperature 1: custom processors run before the one of the temperature. Logits that are not finite have the
    entropy nan and are sampled as if all were equal: a draw from nan raises on CPU and kills the process on CUDA.
    """

    def __init__(self):
        self.steps: list[Tensor] = []  # one [B] a generated position

    def __call__(self, input_ids, scores):
        log_probs = scores.float().log_softmax(-1)  # nan where a logit is nan or +inf, or all are -inf
        is_broken = log_probs.isnan().any(-1)
        entropy = -(log_probs.exp() * log_probs).nan_to_num(0.0).sum(-1)
        self.steps.append(entropy.masked_fill(is_broken, torch.nan))
        return scores.masked_fill(is_broken.unsqueeze(-1), 0.0)


@contextmanager
def preserved_random_state():
    """Python's, NumPy's and torch's random states (CPU and accelerator) after the block are those before it."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def _evaluation(model, tokenizer):
    """Eval mode and left padding inside, the former state of every module outside."""
    training = {module: module.training for module in model.modules()}
    padding_side = tokenizer.padding_side
    tokenizer.padding_side = "left"
    model.eval()
    try:
        yield
    finally:
        tokenizer.padding_side = padding_side
        for module, mode in training.items():
            module.training = mode


def _prompt_ids(processing_class, tokenizer, prompt) -> list[int]:
    """As TRL does: text with the tokenizer's special tokens, messages with those of the template alone."""
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    text = processing_class.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _generate(model, tokenizer, prompts: list[list[int]], generation_config: GenerationConfig) -> list[dict]:
    """One sample for each prompt: its completion, tokens, mean entropy, and whether it was cut off."""
    inputs = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(model.device)
    recorder = EntropyRecorder()
    sequences = model.generate(
        **inputs, generation_config=generation_config, logits_processor=LogitsProcessorList([recorder])
    )
    completions = sequences[:, inputs["input_ids"].size(1) :]
    is_stop = torch.isin(completions, torch.tensor(generation_config.eos_token_id, device=completions.device))
    lengths = torch.where(is_stop.any(1), is_stop.int().argmax(1) + 1, completions.size(1))
    entropies = torch.stack(recorder.steps[: completions.size(1)], 1)  # [B, T]
    kept = torch.arange(completions.size(1), device=lengths.device) < lengths.unsqueeze(1)
    entropy = (entropies * kept).sum(1) / lengths
    return [
        {
            "completion": tokenizer.decode(ids[:length], skip_special_tokens=True),
            "num_tokens": length,
            "truncated": not stopped,
            "entropy": value,
        }
        for ids, length, stopped, value in zip(
            completions.tolist(), lengths.tolist(), is_stop.any(1).tolist(), entropy.tolist(), strict=True
        )
    ]


@torch.no_grad()
def sample_groups(
    model,
    processing_class,
    rows: list[dict],
    *,
    samples: int,
    temperature: float,
    max_new_tokens: int,
    batch_size: int = 64,
    seed: int = 0,
    accelerator=None,
    gradient_checkpointing_kwargs: dict | None = None,
) -> list[Group]:
    """Sample `samples` completions of each row's prompt with `model.generate`.

    Args:
        model: the model, wrapped or not; with an `accelerator` it is unwrapped as TRL does (ZeRO-3 and FSDP gather
            their weights).
        rows: dicts with a `"prompt"`, a string or a list of messages.
        samples: completions of each prompt.
        temperature: positive; the entropy that is recorded is that of the model at temperature 1 on these samples.
        max_new_tokens: length at which a sample is cut off.
        batch_size: completions generated at once on each process.
        seed: of the draw, which is the same for each call with the same weights and number of processes.
        accelerator: splits the prompts over its processes; the result, in the order of `rows`, is on each of them.
        gradient_checkpointing_kwargs: with which gradient checkpointing is turned on again, where it was on.

    Returns:
        One [`~aesl_trl.diversity.Group`] a row, without rewards.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator is not None else (0, 1)
    mine = list(range(rank, len(rows), world))
    prompts = [_prompt_ids(processing_class, tokenizer, rows[index]["prompt"]) for index in mine]
    prompts = [prompt for prompt in prompts for _ in range(samples)]
    unwrapping = _unwrapped(model, accelerator, gradient_checkpointing_kwargs)
    with preserved_random_state(), _evaluation(model, tokenizer), unwrapping as unwrapped:
        torch.manual_seed(seed * 1_000_003 + rank)
        generation_config = GenerationConfig(
            do_sample=True,
            temperature=temperature,
            # Said in full, as GRPOTrainer does: what is None here would come from the model's own generation config
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            max_new_tokens=max_new_tokens,
            eos_token_id=stop_ids(tokenizer, unwrapped),
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
        drawn = []
        for start in range(0, len(prompts), batch_size):
            drawn += _generate(unwrapped, tokenizer, prompts[start : start + batch_size], generation_config)
    groups = [
        (index, _group(rows[index]["prompt"], drawn[place * samples : (place + 1) * samples]))
        for place, index in enumerate(mine)
    ]
    if world > 1:
        groups = gather_object(groups)
    return [group for _, group in sorted(groups, key=lambda item: item[0])]


def _group(prompt, drawn: list[dict]) -> Group:
    return Group(
        prompt=prompt,
        completions=[sample["completion"] for sample in drawn],
        num_tokens=[sample["num_tokens"] for sample in drawn],
        truncated=[sample["truncated"] for sample in drawn],
        entropy=[sample["entropy"] for sample in drawn],
        rewards=None,
    )


@contextmanager
def _unwrapped(model, accelerator, gradient_checkpointing_kwargs):
    if accelerator is None:
        yield model
        return
    with unwrap_model_for_generation(model, accelerator) as unwrapped:
        yield unwrapped
    # TRL turns checkpointing on again with defaults; it takes the arguments itself from 1.16 on
    if gradient_checkpointing_kwargs and unwrapped.is_gradient_checkpointing:
        unwrapped.gradient_checkpointing_enable(gradient_checkpointing_kwargs)
