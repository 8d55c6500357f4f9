"""What proves a handoff: log-probs as the source's, the run's samples found likely, and samples that stop.

Models come loaded, and nothing is written (handoff.py does both).
"""

import copy

import torch

from ..errors import InputError
from .source import Source
from .tokens import CONVERSATION, Stops, left_pad, prompt_ids


# Largest difference in log-prob (nats) between a folder and its exact copy.
COPY_LIMIT = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
# A merge rounds once per weight, so its difference grows with the logits: on a random Qwen2 (width 512, 8 layers,
# logits up to 15, adapter worth 0.79 nats a token) a right merge differs by 0.10 nats on average in bfloat16 (at most
# 0.41) and 9e-6 in float32 (3.4e-5). It is therefore measured against the adapter's own effect: (mean difference that
# always passes, allowed share of that effect).
MERGE_LIMIT = {torch.float32: (1e-5, 0.01), torch.bfloat16: (0.05, 0.3), torch.float16: (0.05, 0.3)}
# A model's log-likelihood of its own samples is, on average, minus its entropy: beyond this many nats it is another
# model's samples.
OWN_SAMPLES_LIMIT = 1.0
MAX_PROMPTS, SAMPLES_PER_PROMPT, MAX_SCORED, MAX_LENGTH = 8, 4, 16, 2048


def encode(tokenizer, samples: list[dict]) -> list[tuple[list[int], int]]:
    """Token ids to score and how many of them are prompt: the run's samples, else a short conversation or sentence."""
    pairs = [(row["prompt"], text) for row in samples for text in row["completions"] if text.strip()][
        :: _stride(samples)
    ][:MAX_SCORED]
    if not pairs:
        pairs = [
            (CONVERSATION[:1], CONVERSATION[1]["content"])
            if tokenizer.chat_template
            else ("Count: ", "one two three four")
        ]
    texts = []
    for prompt, completion in pairs:
        before = prompt_ids(tokenizer, prompt)
        ids = before + tokenizer(completion, add_special_tokens=False)["input_ids"]
        texts.append((ids[:MAX_LENGTH], max(1, len(before))))
    return [text for text in texts if len(text[0]) > text[1]]


def _stride(samples: list[dict]) -> int:
    return max(1, sum(len(row["completions"]) for row in samples) // MAX_SCORED)


@torch.no_grad()
def log_probs(model, texts: list[tuple[list[int], int]]) -> list[torch.Tensor]:
    """Log-probs (nats, float32) of each text's tokens after its prompt; one by one, so that padding plays no part."""
    scores = []
    for ids, num_prompt in texts:
        ids_1L = torch.tensor([ids], device=model.device)
        logits_LV = model(input_ids=ids_1L).logits[0, num_prompt - 1 : -1].float()
        scores.append(logits_LV.log_softmax(-1).gather(-1, ids_1L[0, num_prompt:, None])[:, 0].cpu())
    return scores


def compare(one: list[torch.Tensor], other: list[torch.Tensor]) -> dict[str, float]:
    """Largest and mean absolute difference of two lists of log-probs, in nats; nan where either is not finite."""
    difference = (torch.cat(one) - torch.cat(other)).abs()
    return {"max": difference.max().item(), "mean": difference.mean().item()}


# ---- Checks on what was read back


def check_differences(differences: dict[str, float], effect: float | None, mode: str, dtype: torch.dtype) -> None:
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
    """Compare the model's log-likelihood of the run's samples with the entropy that was recorded when it gave them.

    The two agree on average for the model that gave the samples. Another base of the same shape loads without
    complaint and fails here.
    """
    rows = [row for row in source.samples if row["comparable"] and row.get("entropy")]
    if not any(text.strip() for row in rows for text in row["completions"]):
        return None  # of empty samples nothing was scored
    values = [
        (value, tokens)
        for row in rows
        for value, tokens in zip(row["entropy"], row["num_tokens"], strict=True)
        if value is not None
    ]
    total = sum(tokens for _, tokens in values)
    if not total:
        return None
    entropy = sum(value * tokens for value, tokens in values) / total
    nll = -torch.cat(scores).mean().item()
    if not nll <= entropy + OWN_SAMPLES_LIMIT:
        what = f"base {source.base}" if source.base else f"model {source.folder}"
        raise InputError(
            f"{what} is not the one that gave the samples of step {source.step}: it finds them at {nll:.3g} nats a "
            f"token, and {entropy:.3g} were recorded"
        )
    return {"nll": nll, "entropy": entropy}


def check_stops(model, tokenizer, source: Source, stops: Stops) -> dict:
    """Sample from the run's prompts with the files as written; at least one sample must end by eos."""
    prompts = [prompt_ids(tokenizer, row["prompt"]) for row in source.samples[:MAX_PROMPTS]]
    stopped = count_stopped(model, prompts, source.max_new_tokens, stops) if prompts else 0
    samples = {"num": len(prompts) * SAMPLES_PER_PROMPT, "stopped": stopped, "max_new_tokens": source.max_new_tokens}
    if prompts and not stopped:
        tokens = ", ".join(f"{index} ({tokenizer.convert_ids_to_tokens(index)})" for index in stops.eos)
        raise InputError(
            f"none of {samples['num']} samples stopped within {source.max_new_tokens} tokens; eos is {tokens}: was "
            "the end of a completion trained (TRL's SFT adds eos), and is max_new_tokens long enough?"
        )
    return samples


@torch.no_grad()
def count_stopped(model, prompts: list[list[int]], max_new_tokens: int, stops: Stops) -> int:
    """How many of `SAMPLES_PER_PROMPT` samples of each prompt end by eos: the one on disk, for none is passed."""
    ids_NP, mask_NP = left_pad(prompts, stops.pad, model.device)
    config = copy.deepcopy(model.generation_config)
    config.update(do_sample=True, temperature=1.0, top_p=1.0, top_k=0)
    config.update(max_new_tokens=max_new_tokens, num_return_sequences=SAMPLES_PER_PROMPT)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(0)
        ids_SL = model.generate(input_ids=ids_NP, attention_mask=mask_NP, generation_config=config)
    completions = ids_SL[:, ids_NP.size(1) :]
    return int(torch.isin(completions, torch.tensor(stops.eos, device=completions.device)).any(dim=1).sum())
