"""Completions from the model under training: prompts in, groups of samples out, the training left as it was.

Random states, train mode, gradient checkpointing and the tokenizer's padding side are restored, also when the draw
fails. All samples of a prompt are drawn on one process; the draw depends on the seed and the prompt's index, not on
what the training has drawn. The engines that draw are generate.py and vllm_synced.py.
"""

import random
from contextlib import contextmanager

import numpy as np
import torch
from accelerate.utils import gather_object

from ..diversity.figures import Group
from .draws import Draw, share
from .generate import GenerateEngine, free_memory


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
    engine=None,
) -> list[Group]:
    """Sample `samples` completions of each row's prompt.

    Args:
        model: the model, wrapped or not; with an `accelerator` it is unwrapped as TRL does (ZeRO-3 and FSDP2 gather
            their weights).
        rows: dicts with a `"prompt"`, a string or a list of messages.
        samples: completions of each prompt.
        temperature: positive; what is recorded of the distribution is that of the model at temperature 1.
        max_new_tokens: length at which a sample is cut off.
        batch_size: completions generated at once on each process; smaller ones are tried when memory runs out.
        seed: of the draw, which is the same for each call with the same weights, batch size and number of processes.
        accelerator: splits the prompts over its processes; the result, in the order of `rows`, is on each of them.
        gradient_checkpointing_kwargs: with which gradient checkpointing is turned on again, where it was on.
        engine: what draws, by default a [`~aesl_trl.sampling.generate.GenerateEngine`] of `batch_size`.

    Returns:
        One [`~aesl_trl.diversity.figures.Group`] a row, without rewards.

    Raises:
        SamplingFailed: nothing could be drawn; on every process alike.
        InputError: FSDP1, or what an engine refuses.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    engine = engine or GenerateEngine(batch_size)
    request = share(
        [_prompt_ids(processing_class, tokenizer, row["prompt"]) for row in rows],
        accelerator,
        samples=samples,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=seed,
        gradient_checkpointing_kwargs=gradient_checkpointing_kwargs,
    )
    with preserved_random_state(), _evaluation(model, tokenizer):
        try:
            drawn = engine.draw(model, tokenizer, request)
        finally:
            free_memory()
    groups = [
        (index, _group(rows[index]["prompt"], drawn[place * samples : (place + 1) * samples], tokenizer))
        for place, index in enumerate(request.indices)
    ]
    if accelerator is not None and accelerator.num_processes > 1:
        groups = gather_object(groups)
    return [group for _, group in sorted(groups, key=lambda item: item[0])]


def _group(prompt, drawn: list[Draw], tokenizer) -> Group:
    return Group(
        prompt=prompt,
        completions=[tokenizer.decode(sample.ids, skip_special_tokens=True) for sample in drawn],
        num_tokens=[len(sample.ids) for sample in drawn],
        truncated=[not sample.stopped for sample in drawn],
        entropy=[sample.entropy for sample in drawn],
        rewards=None,
        neg_log_prob=[sample.neg_log_prob for sample in drawn],
        eos_prob=[sample.eos_prob for sample in drawn],
    )
