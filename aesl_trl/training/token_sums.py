"""Sums over a batch's trained tokens, and the figures that are logged from them."""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..losses.definition import prefix_sums
from ..losses.precision import at_home, in_float64
from ..losses.scoring import TokenScores


LOW_WEIGHT = 0.1  # a token below this weight counts as released
POSITION_BINS = 24  # bin i holds the positions 2**(i-1) < p <= 2**i of the trained tokens: up to 8M tokens


@dataclass(frozen=True)
class TokenSums:
    """Raw float64 sums over trained tokens: those of batches and ranks add up, and [`figures`] divides once.

    The last three are by position in the sequence, `POSITION_BINS` each; the others are scalars. A token's
    prefix is the trained tokens of its sequence up to and with it.
    """

    tokens: Tensor
    nll: Tensor
    weight: Tensor
    low_weights: Tensor  # tokens
    entropy: Tensor
    top1: Tensor  # tokens
    temperature: Tensor
    eos_tokens: Tensor
    eos_weight: Tensor
    eos_prob: Tensor
    weighted_nll: Tensor  # each token's nll times its weight
    prefix_nll: Tensor  # each token's nll times the mean nll of its prefix, nats^2
    weight_P: Tensor
    temperature_P: Tensor
    tokens_P: Tensor

    @classmethod
    def of_batch(cls, scores: TokenScores, eos_ids: list[int]) -> "TokenSums":
        """Sum over the trained tokens of a batch on this rank."""
        mask, labels = at_home(scores.label_mask), at_home(scores.labels)
        weights, log_probs = in_float64(scores.weights), in_float64(scores.log_probs.detach())
        temperatures = torch.zeros_like(weights) if scores.temperatures is None else in_float64(scores.temperatures)
        eos = mask & torch.isin(labels, torch.tensor(eos_ids, device=mask.device, dtype=torch.long))
        # 1-based position among the trained tokens of its sequence -> bin ceil(log2(position))
        sequence_ids = None if scores.sequence_ids is None else at_home(scores.sequence_ids)
        positions = prefix_sums(mask, sequence_ids).clamp(min=1)
        bins = positions[mask].log2().ceil().long().clamp(max=POSITION_BINS - 1)
        sums = (
            mask.sum(),
            -log_probs.sum(),
            weights.sum(),
            (mask & (weights < LOW_WEIGHT)).sum(),
            in_float64(scores.entropy).sum(),
            in_float64(scores.is_top1).sum(),
            temperatures.sum(),
            eos.sum(),
            weights[eos].sum(),
            log_probs[eos].exp().sum(),
            -(weights * log_probs).sum(),
            (log_probs * prefix_sums(log_probs, sequence_ids) / positions).sum(),
            *(
                values.new_zeros(POSITION_BINS).scatter_add_(0, bins, values)
                for values in (weights[mask], temperatures[mask], torch.ones_like(weights[mask]))
            ),
        )
        return cls(*(value.double() for value in sums))

    @classmethod
    def of_vector(cls, vector: Tensor) -> "TokenSums":
        """Read the sums that [`to_vector`] wrote; a sum that an older version did not keep is NaN."""
        scalars, by_position = vector[: -3 * POSITION_BINS], vector[-3 * POSITION_BINS :]
        unknown = scalars.new_full((len(fields(cls)) - 3 - len(scalars),), torch.nan)
        return cls(*scalars, *unknown, *by_position.split(POSITION_BINS))

    def to_vector(self) -> Tensor:
        """Return all sums in one vector, for a gather and for a checkpoint."""
        return torch.cat([value.reshape(-1) for value in vars(self).values()])

    def over_ranks(self, accelerator) -> "TokenSums":
        """Return the sums over all ranks, on the CPU; one gather serves all of them."""
        return TokenSums.of_vector(accelerator.gather(self.to_vector().unsqueeze(0)).sum(0).cpu())

    def __add__(self, other: "TokenSums") -> "TokenSums":
        return TokenSums(*(value + getattr(other, name) for name, value in vars(self).items()))

    @property
    def nll_learnt(self) -> float:
        """The nll of what is learnt, nats: the mean over tokens of their prefix's mean nll, each by its own nll.

        It is 0 where every token's nll is 0, and NaN without tokens.
        """
        return 0.0 if self.tokens and self.nll == 0 else (self.prefix_nll / self.nll).item()

    def figures(self, with_temperature: bool) -> dict[str, float]:
        """Return the means that are logged. `weight_effective` counts each token by its nll: it is loss / nll."""
        means = {}
        if self.tokens:
            means = {"nll": self.nll, "weight_mean": self.weight, "weight_low_share": self.low_weights}
            means |= {"temperature_mean": self.temperature} if with_temperature else {}
            means = {name: value / self.tokens for name, value in means.items()}
        if self.eos_tokens:
            means |= {"weight_eos": self.eos_weight / self.eos_tokens, "prob_eos": self.eos_prob / self.eos_tokens}
        found = {name: value.item() for name, value in means.items()}
        of_loss = {"weight_effective": (self.weighted_nll / self.nll).item(), "nll_learnt": self.nll_learnt}
        return found | {name: value for name, value in of_loss.items() if not math.isnan(value)}

    def by_position(self, with_temperature: bool) -> dict[str, list]:
        """Return the line of positions.jsonl, up to the last position that has a token."""
        counts = self.tokens_P.tolist()
        last = max((i for i, count in enumerate(counts) if count), default=-1) + 1

        def means(sums_P: Tensor, known: bool = True) -> list[float | None]:
            pairs = zip(sums_P.tolist()[:last], counts, strict=False)
            return [value / count if count and known else None for value, count in pairs]

        return {
            "position": [2**i for i in range(last)],
            "weight": means(self.weight_P),
            "temperature": means(self.temperature_P, with_temperature),
            "count": [int(count) for count in counts[:last]],
        }
