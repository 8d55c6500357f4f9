"""What a token weighs: AESL and its rivals by definition, and the fused head that computes them.

`definition` is each loss on plain logits, in plain torch; `rules` is the weight of a token from its statistics, one
function a loss; `head` computes both in one pass over the vocabulary.
"""

from .definition import aesl_loss, aesl_weights, dft_loss, eaft_loss, gem_loss, gold_log_probs, nll_loss, psft_loss
from .rules import TOKEN_RULES, Loss, TokenRule, TokenStats, rule_from_logits


__all__ = [
    "TOKEN_RULES",
    "Loss",
    "TokenRule",
    "TokenStats",
    "aesl_loss",
    "aesl_weights",
    "dft_loss",
    "eaft_loss",
    "gem_loss",
    "gold_log_probs",
    "nll_loss",
    "psft_loss",
    "rule_from_logits",
]
