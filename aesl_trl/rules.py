"""Per-token rules: what makes one loss another, as small functions of a token's statistics.

The fused head computes the statistics and all the gradients; a rule only says how much each token weighs:
`L = -sum_t weights_t * log_probs_t / num_items`, with the weight a constant in the backward pass. Further losses are
one function and one row of `TOKEN_RULES`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from torch import Tensor

from .losses import aesl_temperatures


@dataclass
class TokenStats:
    """What a rule may look at: statistics of `n` consecutive trained tokens, each `[n]` and without gradient."""

    log_probs: Tensor  # of the labels, nats
    entropy: Tensor  # of softmax(logits), nats
    is_top1: Tensor  # bool: whether the label is the most likely token
    sequences: Tensor  # int64: which sequence each token belongs to, counted from 0 over the batch
    prefix_sums: Tensor  # float64: log_probs summed over the sequence up to and with the token
    prefix_counts: Tensor  # float64: tokens of the sequence up to and with the token
    rest: Tensor | None = None  # 1 - softmax(logits / T)[label]; only weights() of a rule with temperatures sees it


class TokenRule(NamedTuple):
    """How a loss weighs its tokens.

    Args:
        weights: `TokenStats` of `n` tokens -> `[n]`.
        temperatures: `TokenStats` of `n` tokens -> `[n]`, positive: where `TokenStats.rest` is taken. `None`: the rule
            does not look at it, and the sweep for it is left out.
        causal: whether both functions need nothing of later tokens. Then the gradients are built in one pass over
            three matrix products; otherwise all statistics come first, in a pass of their own (four products), and
            `temperatures` must be `None`.
    """

    weights: Callable[[TokenStats], Tensor]
    temperatures: Callable[[TokenStats], Tensor] | None = None
    causal: bool = True


def nll_rule() -> TokenRule:
    """Plain negative log-likelihood: every weight is 1."""
    return TokenRule(weights=lambda stats: stats.log_probs.new_ones(stats.log_probs.shape))


def aesl_rule(*, t_scaling: float = 3.0, min_temperature: float = 1e-2, prefix_mode: str = "inclusive") -> TokenRule:
    """AESL (paper, Eq. 4); the arguments are those of [`~losses.aesl_weights`]."""
    temperature = partial(
        aesl_temperatures, t_scaling=t_scaling, min_temperature=min_temperature, prefix_mode=prefix_mode
    )
    return TokenRule(
        weights=lambda stats: stats.rest,
        temperatures=lambda stats: temperature(stats.log_probs, stats.prefix_sums, stats.prefix_counts),
    )


# cold_start_loss -> its rule under an AESLSFTConfig
TOKEN_RULES = {
    "aesl": lambda args: aesl_rule(
        t_scaling=args.t_scaling, min_temperature=args.min_temperature, prefix_mode=args.prefix_mode
    ),
    "nll": lambda args: nll_rule(),
}
