"""Samples scored by the model that drew them: exact entropy and log-probabilities at temperature 1.

For engines that return no more than the log-probabilities of the sampled tokens, at the temperature of the sampling.
The fused head computes them without logits; scoring takes one forward pass a batch, where sampling took one a token.
"""

import torch

from ..losses.rules import nll_rule
from .draws import Draw


@torch.no_grad()
def rescore(
    model, prompts: list[list[int]], drawn: list[Draw], *, batch_size: int, num_batches: int, pad_id: int, device
) -> list[Draw]:
    """`drawn` with `entropy`, `neg_log_prob` and, of samples that ended by themselves, `eos_prob`.

    Args:
        model: takes `token_rule` ([`~aesl_trl.losses.scoring.add_fused_head`]). A sharded model with its
            wrapper, whose forward gathers weights: then `num_batches` has to be the same on every rank.
        prompts: token ids before each sample.
        batch_size: samples a forward pass.
        num_batches: forward passes, at least as many as the samples need; the last one is repeated for the rest.
        pad_id: any token; padding is masked.

    Returns:
        As many draws, in order. Where a sample ended, its `eos_prob` is that of the token it ended with.
    """
    scored, rule = [], nll_rule()
    for number in range(num_batches):
        start = min(number * batch_size, (len(drawn) - 1) // batch_size * batch_size)
        batch = slice(start, start + batch_size)
        inputs = _padded(prompts[batch], drawn[batch], pad_id, device)
        scores = model(**inputs, use_cache=False, token_rule=rule).scores
        if number * batch_size < len(drawn):
            scored += _with_scores(drawn[batch], scores)
    return scored


def _padded(prompts: list[list[int]], drawn: list[Draw], pad_id: int, device) -> dict[str, torch.Tensor]:
    """Padded on the right; labels are the sampled tokens alone."""
    rows = [(prompt, sample.ids) for prompt, sample in zip(prompts, drawn, strict=True)]
    width = max(len(prompt) + len(ids) for prompt, ids in rows)

    def padded(values: list[int], fill: int) -> list[int]:
        return values + [fill] * (width - len(values))

    columns = {
        "input_ids": [padded(prompt + ids, pad_id) for prompt, ids in rows],
        "attention_mask": [padded([1] * (len(prompt) + len(ids)), 0) for prompt, ids in rows],
        "labels": [padded([-100] * len(prompt) + ids, -100) for prompt, ids in rows],
    }
    return {name: torch.tensor(column, device=device) for name, column in columns.items()}


def _with_scores(drawn: list[Draw], scores) -> list[Draw]:
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
