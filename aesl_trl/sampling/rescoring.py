"""Scores samples with the model that drew them: exact entropy and log-probabilities at temperature 1.

vLLM returns the log-probabilities of the sampled tokens alone, at the temperature of the sampling. The fused head
computes the others without logits; scoring takes one forward pass a batch, where sampling took one a token.
"""

import torch

from ..losses.rules import nll_rule
from .draws import Draw


@torch.no_grad()
def rescore(
    model, prompts: list[list[int]], drawn: list[Draw], *, batch_size: int, num_batches: int, pad_id: int, device
) -> list[Draw]:
    """Return the draws, in order, with `entropy`, `neg_log_prob` and, where a sample stopped, `eos_prob`.

    `eos_prob` is then the probability of the token that the sample stopped with.

    Args:
        model: takes `token_rule` ([`~aesl_trl.losses.scoring.add_fused_head`]). Give a sharded model with its wrapper,
            whose forward gathers weights: then `num_batches` has to be the same on every rank.
        prompts: token ids before each sample.
        batch_size: samples a forward pass.
        num_batches: forward passes, at least as many as the samples need; the last one is repeated for the rest.
        pad_id: any token; padding is masked.
    """
    scored, rule = [], nll_rule()
    for number in range(num_batches):
        start = min(number * batch_size, (len(drawn) - 1) // batch_size * batch_size)
        batch = slice(start, start + batch_size)
        inputs = _right_padded(prompts[batch], drawn[batch], pad_id, device)
        scores = model(**inputs, use_cache=False, token_rule=rule).scores
        if number * batch_size < len(drawn):
            scored += _with_scores(drawn[batch], scores)
    return scored


def _right_padded(prompts: list[list[int]], drawn: list[Draw], pad_id: int, device) -> dict[str, torch.Tensor]:
    """Return a model's inputs, padded on the right; the labels are the sampled tokens alone."""
    rows = [(prompt, sample.ids) for prompt, sample in zip(prompts, drawn, strict=True)]
    columns = {
        "input_ids": ([prompt + ids for prompt, ids in rows], pad_id),
        "attention_mask": ([[1] * len(prompt + ids) for prompt, ids in rows], 0),
        "labels": ([[-100] * len(prompt) + ids for prompt, ids in rows], -100),
    }
    width = max(len(prompt + ids) for prompt, ids in rows)
    return {
        name: torch.tensor([values + [fill] * (width - len(values)) for values in column], device=device)
        for name, (column, fill) in columns.items()
    }


def _with_scores(drawn: list[Draw], scores) -> list[Draw]:
    """Put the means of `scores` over each sample's tokens into the draws."""
    mask = scores.label_mask
    counts = mask.sum(1)
    entropy = (scores.entropy.float() * mask).sum(1) / counts
    neg_log_prob = -(scores.log_probs.float() * mask).sum(1) / counts
    positions = torch.arange(mask.size(1), device=mask.device)
    last = (positions * mask).argmax(1, keepdim=True)
    ends = scores.log_probs.gather(1, last).squeeze(1).exp()
    values = zip(drawn, entropy.tolist(), neg_log_prob.tolist(), ends.tolist(), strict=True)
    return [
        sample._replace(entropy=nats, neg_log_prob=nll, eos_prob=end if sample.stopped else None)
        for sample, nats, nll, end in values
    ]
