"""Scores samples with the model that drew them: exact entropy and log-probabilities at temperature 1.

vLLM returns the log-probabilities of the sampled tokens alone, at the temperature of the sampling. The fused head
computes the others without logits; scoring takes one forward pass a batch, where sampling took one a token.
"""

import torch
from torch.nn.utils.rnn import pad_sequence

from ..losses.rules import nll_rule
from .draws import Draw


@torch.no_grad()
def rescore(
    model, prompts: list[list[int]], drawn: list[Draw], *, batch_size: int, num_batches: int, pad_id: int, device
) -> list[Draw]:
    """Return the draws, in order, with `entropy`, `neg_log_prob` and, where a sample stopped, `eos_prob`.

    `eos_prob` is then the probability of the token that the sample stopped with.

    `model` takes `token_rule` ([`~aesl_trl.losses.scoring.add_fused_head`]). Give a sharded model with its wrapper,
    whose forward gathers weights. Then `num_batches`, at least as many as the samples need, has to be the same on
    every rank: the last batch is repeated for the rest. `pad_id` is any token, since padding is masked.
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

    def padded(rows: list[list[int]], fill: int) -> torch.Tensor:
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=fill).to(device)

    pairs = [(prompt, sample.ids) for prompt, sample in zip(prompts, drawn, strict=True)]
    return {
        "input_ids": padded([prompt + ids for prompt, ids in pairs], pad_id),
        "attention_mask": padded([[1] * len(prompt + ids) for prompt, ids in pairs], 0),
        "labels": padded([[-100] * len(prompt) + ids for prompt, ids in pairs], -100),
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
