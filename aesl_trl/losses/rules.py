"""Per-token rules: what makes one loss another, as small functions of a token's statistics.

The fused head computes the statistics and all the gradients; a rule only says how much each token weighs:
`L = -sum_t weights_t * log_probs_t / num_items`, with the weight a constant in the backward pass. Two further fields
serve other losses: `losses` gives a value that is not the weighted nll, and `tile` sees the logits.

A further loss is one function and one row of `TOKEN_RULES` (docs/losses.md has an example). The definitions on plain
logits, against which the rules are tested, are in definition.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .definition import EAFT_ENTROPY, GEM_SLOPE, PSFT_LOG_RATIO, aesl_temperatures, top_k_entropy


@dataclass
class TokenStats:
    """The statistics that a rule may look at, of `n` consecutive trained tokens, each `[n]` and without gradient."""

    log_probs: Tensor  # of the labels, nats
    entropy: Tensor  # of softmax(logits), nats
    is_top1: Tensor  # bool: whether the label is the most likely token
    sequences: Tensor  # int64: the sequence that each token belongs to, counted from 0 over the batch
    # Both float64 (on Apple's GPUs float32, rounded from float64 sums), over the sequence up to and with the token
    prefix_sums: Tensor  # of log_probs
    prefix_counts: Tensor  # tokens
    rest: Tensor | None = None  # 1 - softmax(logits / T)[label]; only weights() of a rule with temperatures sees it
    statistic: Tensor | None = None  # the statistic that the rule's `tile` returned; weights() and losses() see it
    # of the labels under pi_old, nats. None where the model is its own old policy (in the first step after a refresh,
    # and in evaluation) and under a rule that does not set `old_policy`
    old_log_probs: Tensor | None = None


class TokenRule(NamedTuple):
    """How a loss weighs its tokens.

    Args:
        weights: `TokenStats` of `n` tokens -> `[n]`: minus the derivative of the token's loss by its log-probability.
        temperatures: `TokenStats` of `n` tokens -> `[n]`, positive: the temperatures of `TokenStats.rest`. With `None`
            the rule does not look at `rest`, and the sweep for it is left out.
        causal: whether both functions need nothing of later tokens. Then the gradients are built in one pass over
            three matrix products. Otherwise all statistics come first, in a pass of their own (four products), and
            `temperatures` and `tile` must be `None`.
        losses: `TokenStats` of all tokens -> `[n]`: the value of each token's loss, by default
            `-weights * log_probs`. It does not change the gradient.
        tile: logits `[n, V]` (float32 or float64, not to be written to) and labels `[n]` -> a statistic `[n]`, which
            becomes `TokenStats.statistic`, and `None` or a gradient by the logits `[n, V]`, which takes the place of
            `softmax(logits) - onehot` (the weights still multiply it). It runs in torch on every device.
        old_policy: whether the rule reads `TokenStats.old_log_probs`; the trainer then keeps them (old_policy.py).
    """

    weights: Callable[[TokenStats], Tensor]
    temperatures: Callable[[TokenStats], Tensor] | None = None
    causal: bool = True
    losses: Callable[[TokenStats], Tensor] | None = None
    tile: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]] | None = None
    old_policy: bool = False


def _ones(stats: TokenStats) -> Tensor:
    return torch.ones_like(stats.log_probs)


def nll_rule() -> TokenRule:
    """Make the rule of plain negative log-likelihood: every weight is 1."""
    return TokenRule(weights=_ones)


def aesl_rule(*, t_scaling: float = 3.0, min_temperature: float = 1e-2, prefix_mode: str = "inclusive") -> TokenRule:
    """Make the rule of AESL (paper, Eq. 4); the arguments are those of [`~definition.aesl_scores`]."""
    settings = {"t_scaling": t_scaling, "min_temperature": min_temperature, "prefix_mode": prefix_mode}
    return TokenRule(
        weights=lambda stats: stats.rest,
        temperatures=lambda stats: aesl_temperatures(
            stats.log_probs, stats.prefix_sums, stats.prefix_counts, **settings
        ),
    )


def linear_rule() -> TokenRule:
    """Make the rule of AESL without prefix and temperature: the weight is 1 - q ([`~definition.simple_weights`])."""
    return TokenRule(weights=lambda stats: -torch.expm1(stats.log_probs))


def threshold_rule(*, threshold: float = 0.5) -> TokenRule:
    """Make the rule that trains only tokens with q < threshold, by nll ([`~definition.simple_weights`])."""
    return TokenRule(weights=lambda stats: (stats.log_probs < math.log(threshold)).to(stats.log_probs.dtype))


def dft_rule() -> TokenRule:
    """Make the rule of Dynamic Fine-Tuning ([`~definition.dft_loss`]): the weight is q."""
    return TokenRule(weights=lambda stats: stats.log_probs.exp())


def gem_rule(*, beta: float = 0.7, h: str = "linear") -> TokenRule:
    """Make the rule of GEM ([`~definition.gem_loss`]).

    The gradient by the logits is r h - onehot sum(r h) with r = softmax(z / beta).
    """

    def tile(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        labels = labels.unsqueeze(1)
        above_gold = logits - logits.gather(1, labels)
        target, total = (logits / beta).softmax(1), logits.new_ones(labels.shape)
        if h == "sigmoid":
            target *= torch.sigmoid(GEM_SLOPE * above_gold)
            total = target.sum(1, keepdim=True)
        return torch.linalg.vecdot(target, above_gold), target.scatter_add_(1, labels, -total)

    return TokenRule(weights=_ones, losses=lambda stats: stats.statistic, tile=tile)


def psft_rule(*, clip_high: float = 0.28) -> TokenRule:
    """Make the rule of Proximal SFT ([`~definition.psft_loss`]): the weight is pi / pi_old, 0 beyond 1 + clip_high."""

    def log_ratios(stats: TokenStats) -> Tensor:
        return stats.log_probs - (stats.log_probs if stats.old_log_probs is None else stats.old_log_probs)

    def weights(stats: TokenStats) -> Tensor:
        inside = (log_ratios(stats) >= -PSFT_LOG_RATIO) & (log_ratios(stats) <= math.log1p(clip_high))
        return log_ratios(stats).exp().where(inside, 0.0)

    def losses(stats: TokenStats) -> Tensor:
        return -log_ratios(stats).clamp(-PSFT_LOG_RATIO, math.log1p(clip_high)).exp()

    return TokenRule(weights=weights, losses=losses, old_policy=True)


def eaft_rule(*, alpha: float = 1.0, top_k: int = 20) -> TokenRule:
    """Make the rule of EAFT ([`~definition.eaft_loss`]): the weight is (top-k entropy / 3)^alpha."""
    return TokenRule(
        weights=lambda stats: (stats.statistic / EAFT_ENTROPY) ** alpha,
        tile=lambda logits, labels: (top_k_entropy(logits, top_k), None),
    )


def rule_from_logits(token_losses: Callable[[Tensor, Tensor], Tensor]) -> TokenRule:
    """Make a rule of any loss of a token's own logits; autograd finds its gradient, a tile at a time.

    Args:
        token_losses: maps logits `[n, V]` and labels `[n]` to losses `[n]`, differentiably. The loss of a token must
            not depend on other rows.
    """

    def tile(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            logits = logits.detach().requires_grad_()
            losses = token_losses(logits, labels)
            (gradient,) = torch.autograd.grad(losses.sum(), logits)
        return losses.detach(), gradient

    return TokenRule(weights=_ones, losses=lambda stats: stats.statistic, tile=tile)


class Loss(NamedTuple):
    """A row of `TOKEN_RULES`, whose keys are the values of `cold_start_loss`.

    Args:
        rule: maps an AESLSFTConfig to the loss's rule under it.
        fields: the fields of the config that this loss reads; under any other loss they must keep their defaults.
        reads_prefix: whether the loss needs the borders between documents, which `wrapped` packing loses.
    """

    rule: Callable[..., TokenRule]
    fields: tuple[str, ...] = ()
    reads_prefix: bool = False


def _aesl(args) -> TokenRule:
    if args.aesl_weight == "linear":
        return linear_rule()
    if args.aesl_weight == "threshold":
        return threshold_rule(threshold=args.weight_threshold)
    return aesl_rule(t_scaling=args.t_scaling, min_temperature=args.min_temperature, prefix_mode=args.prefix_mode)


TOKEN_RULES = {
    "aesl": Loss(
        _aesl, ("t_scaling", "min_temperature", "prefix_mode", "aesl_weight", "weight_threshold"), reads_prefix=True
    ),
    "nll": Loss(lambda args: nll_rule()),
    "dft": Loss(lambda args: dft_rule()),
    "gem": Loss(lambda args: gem_rule(beta=args.gem_beta, h=args.gem_h), ("gem_beta", "gem_h")),
    "psft": Loss(lambda args: psft_rule(clip_high=args.psft_clip_high), ("psft_clip_high", "psft_refresh_steps")),
    "eaft": Loss(lambda args: eaft_rule(alpha=args.eaft_alpha, top_k=args.eaft_top_k), ("eaft_alpha", "eaft_top_k")),
}
