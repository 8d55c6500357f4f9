"""Sums over a batch's trained tokens, and the figures that are logged from them."""

import torch

from ..losses.definition import prefix_sums
from ..losses.scoring import TokenScores


LOW_WEIGHT = 0.1  # a token below this weight counts as released


POSITION_BINS = 24  # bin i holds the positions 2**(i-1) < p <= 2**i of the trained tokens: up to 8M tokens


def _batch_sums(scores: TokenScores, eos_ids: list[int]) -> torch.Tensor:
    """Everything that is logged of a batch as raw float64 sums in one vector, so that one gather serves all ranks.

    tokens, nll, weight, low weights, entropy, top-1, temperature, eos tokens, eos weight, eos probability; then by
    position the sums of weight, temperature and tokens, `POSITION_BINS` each.
    """
    mask = scores.label_mask
    weights, log_probs = scores.weights.double(), scores.log_probs.detach().double()
    temperatures = torch.zeros_like(weights) if scores.temperatures is None else scores.temperatures.double()
    eos = mask & torch.isin(scores.labels.to(mask.device), torch.tensor(eos_ids, device=mask.device, dtype=torch.long))
    totals = [
        mask.sum(),
        -log_probs.sum(),
        weights.sum(),
        (mask & (weights < LOW_WEIGHT)).sum(),
        scores.entropy.double().sum(),
        scores.is_top1.double().sum(),
        temperatures.sum(),
        eos.sum(),
        weights[eos].sum(),
        log_probs[eos].exp().sum(),
    ]
    # 1-based position among the trained tokens of its sequence -> bin ceil(log2(position))
    positions = prefix_sums(mask, scores.sequence_ids)[mask].clamp(min=1)
    bins = positions.log2().ceil().long().clamp(max=POSITION_BINS - 1)
    by_position = [
        torch.zeros(POSITION_BINS, dtype=torch.float64, device=mask.device).scatter_add_(0, bins, values)
        for values in (weights[mask], temperatures[mask], torch.ones_like(weights[mask]))
    ]
    return torch.cat([torch.stack([total.double() for total in totals]), *by_position])


def _figures(sums: list[float], with_temperature: bool) -> tuple[dict[str, float], dict[str, list]]:
    """The one division: sums -> logged figures, and the line of positions.jsonl."""
    tokens, nll, weight, low, _, _, temperature, eos, eos_weight, eos_prob = sums[:10]
    figures = {}
    if tokens:
        figures = {"nll": nll / tokens, "weight_mean": weight / tokens, "weight_low_share": low / tokens}
        if with_temperature:
            figures["temperature_mean"] = temperature / tokens
    if eos:
        figures |= {"weight_eos": eos_weight / eos, "prob_eos": eos_prob / eos}
    weights, temperatures, counts = (sums[10 + i * POSITION_BINS : 10 + (i + 1) * POSITION_BINS] for i in range(3))
    last = max((i for i, count in enumerate(counts) if count), default=-1) + 1
    positions = {
        "position": [2**i for i in range(last)],
        "weight": [w / n if n else None for w, n in zip(weights[:last], counts[:last], strict=True)],
        "temperature": [
            t / n if n and with_temperature else None for t, n in zip(temperatures[:last], counts[:last], strict=True)
        ],
        "count": [int(count) for count in counts[:last]],
    }
    return figures, positions
