"""Prove a handoff: equal log-probs, the run's own samples found likely, and samples that stop."""

import copy

import torch

from ..errors import InputError
from .source import Source
from .tokens import CONVERSATION, Stops, left_pad, row_prompt_ids, tokenizer_of


# Largest difference in log-prob (nats) between a folder and its exact copy.
COPY_LIMIT = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
# A merge rounds each weight once, so its difference grows with the logits and is measured against the adapter's own
# effect: (mean difference that always passes, allowed share of that effect). On a random Qwen2 (width 512, 8 layers,
# logits up to 15, adapter worth 0.79 nats a token) a right merge differs on average by 0.10 nats in bfloat16 and by
# 9e-6 in float32, at most by 0.41 and 3.4e-5.
MERGE_LIMIT = {torch.float32: (1e-5, 0.01), torch.bfloat16: (0.05, 0.3), torch.float16: (0.05, 0.3)}
# A model's log-likelihood of its own samples is, on average, minus its entropy. Beyond this difference in nats, the
# samples are another model's.
OWN_SAMPLES_LIMIT = 1.0
MAX_PROMPTS, SAMPLES_PER_PROMPT, MAX_SCORED, MAX_LENGTH = 8, 4, 16, 2048


def recorded(row: dict) -> list[list[int]] | list[str]:
    """Return the samples of a prompt: the tokens that were drawn, or the texts that are not blank in an older file.

    A text is not what was drawn: special tokens are missing in it, and its tokens may have been others.
    """
    return row.get("token_ids") or [text for text in row["completions"] if text.strip()]


def encode(processing_class, samples: list[dict], num_embeddings: int) -> list[tuple[list[int], int]]:
    """Return texts to score as (token ids, number of prompt tokens): the run's samples, else a short text."""
    pairs = [(row, completion) for row in samples for completion in recorded(row)]
    pairs = pairs[:: max(1, len(pairs) // MAX_SCORED)][:MAX_SCORED]
    if not pairs:
        chat = ({"prompt": CONVERSATION[:1]}, CONVERSATION[1]["content"])
        pairs = [chat if processing_class.chat_template else ({"prompt": "Count: "}, "one two three four")]
    texts = []
    for row, completion in pairs:
        before = row_prompt_ids(processing_class, row)
        ids = completion
        if isinstance(completion, str):
            ids = tokenizer_of(processing_class)(completion, add_special_tokens=False)["input_ids"]
        elif not all(isinstance(index, int) and 0 <= index < num_embeddings for index in ids):
            raise InputError(f"the run's samples hold a token that is none of the model's {num_embeddings}")
        ids = before + ids
        texts.append((ids[:MAX_LENGTH], max(1, len(before))))
    return [text for text in texts if len(text[0]) > text[1]]


@torch.no_grad()
def log_probs(model, texts: list[tuple[list[int], int]]) -> list[torch.Tensor]:
    """Return the log-probs (nats, float32) of each text's tokens after its prompt; texts are scored unpadded."""
    scores = []
    for ids, num_prompt in texts:
        ids_1L = torch.tensor([ids], device=model.device)
        logits_LV = model(input_ids=ids_1L).logits[0, num_prompt - 1 : -1].float()
        scores.append(logits_LV.log_softmax(-1).gather(-1, ids_1L[0, num_prompt:, None])[:, 0].cpu())
    return scores


def compare(one: list[torch.Tensor], other: list[torch.Tensor]) -> dict[str, float]:
    """Return the largest and mean absolute difference of log-probs, in nats; nan where a log-prob is not finite."""
    difference = (torch.cat(one) - torch.cat(other)).abs()
    return {"max": difference.max().item(), "mean": difference.mean().item()}


def check_differences(differences: dict[str, float], effect: float | None, mode: str, dtype: torch.dtype) -> None:
    """Refuse log-probs too far from the source's; `effect` is the adapter's own, in nats a token."""
    limit = COPY_LIMIT.get(dtype, max(COPY_LIMIT.values()))
    if differences["max"] <= limit:
        return
    name = str(dtype).removeprefix("torch.")
    if mode != "merge":
        raise InputError(
            f"log-probs of handoff and source differ by {differences['max']:.3g} nats; {name} allows {limit:g}"
        )
    floor, share = MERGE_LIMIT.get(dtype, MERGE_LIMIT[torch.bfloat16])
    allowed = max(floor, share * effect)
    if not differences["mean"] <= allowed:  # also when it is nan
        raise InputError(
            f"merged in {name}, the model differs from its parts by {differences['mean']:.3g} nats a token; the "
            f"adapter is worth {effect:.3g}, which allows {allowed:.3g}: use --mode continue, or a base in float32"
        )


def check_own_samples(scores: list[torch.Tensor], source: Source) -> dict | None:
    """Compare the model's log-likelihood of the run's samples with the entropy recorded when they were drawn.

    The two agree on average for the model that gave the samples. Another base of the same shape loads without
    complaint, and is refused here.
    """
    rows = [row for row in source.samples if row["comparable"] and row.get("entropy")]
    if not any(map(recorded, rows)):
        return None  # nothing of empty samples was scored
    pairs = [pair for row in rows for pair in zip(row["entropy"], row["num_tokens"], strict=True)]
    pairs = [(value, tokens) for value, tokens in pairs if value is not None]
    total = sum(tokens for _, tokens in pairs)
    if not total:
        return None
    entropy = sum(value * tokens for value, tokens in pairs) / total
    nll = -torch.cat(scores).mean().item()
    if not nll <= entropy + OWN_SAMPLES_LIMIT:
        subject = f"base {source.base}" if source.base else f"model {source.weights}"
        raise InputError(
            f"{subject} is not the one that gave the samples of {source.candidate}: it finds them at {nll:.3g} nats a "
            f"token, and their recorded entropy is {entropy:.3g}"
        )
    return {"nll": nll, "entropy": entropy}


@torch.no_grad()
def check_stops(model, processing_class, source: Source, stops: Stops) -> dict:
    """Sample from the run's prompts with the files as written, and refuse a model none of whose samples stops."""
    tokenizer = tokenizer_of(processing_class)
    rows = source.samples[:MAX_PROMPTS]
    prompts = [row_prompt_ids(processing_class, row) for row in rows]
    if not prompts:
        return {"num": 0, "stopped": 0, "max_new_tokens": source.max_new_tokens}
    ids_NP, mask_NP = left_pad(prompts, stops.pad, model.device)
    config = copy.deepcopy(model.generation_config)  # its eos, which is on disk, is the one under test
    config.update(do_sample=True, temperature=1.0, top_p=1.0, top_k=0)
    config.update(max_new_tokens=source.max_new_tokens, num_return_sequences=SAMPLES_PER_PROMPT)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(0)
        ids_SL = model.generate(input_ids=ids_NP, attention_mask=mask_NP, generation_config=config)
    eos = torch.tensor(stops.eos, device=ids_SL.device)
    stopped = int(torch.isin(ids_SL[:, ids_NP.size(1) :], eos).any(dim=1).sum())
    if not stopped:
        tokens = ", ".join(f"{index} ({tokenizer.convert_ids_to_tokens(index)})" for index in stops.eos)
        raise InputError(
            f"none of {len(ids_SL)} samples stopped within {source.max_new_tokens} tokens; eos is {tokens}: was "
            "the end of a completion trained (TRL's SFT adds eos), and is max_new_tokens long enough?"
        )
    return {"num": len(ids_SL), "stopped": stopped, "max_new_tokens": source.max_new_tokens}
