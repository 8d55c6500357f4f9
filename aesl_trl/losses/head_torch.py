"""The fused head's two tile passes in torch, as head_triton.py has them; and the passes of a rule that reads the tile.

Both passes take a tile `[n, V]` of products and fill vectors of n numbers; head.py shows where they stand. Arithmetic
is float32, or float64 for a float64 tile.
"""

import torch
from torch import Tensor


def statistics(tile: Tensor, tokens, part: slice, transform) -> None:
    """Run K1: fill the statistics of `part` from its products `[n, V]`."""
    logits, labels = _transformed(tile, transform), tokens.labels[part].unsqueeze(1)
    largest = logits.amax(1, keepdim=True)
    probs = logits.softmax(1)  # faster than exp and a sum
    log_sum_exp = -probs.amax(1, keepdim=True).log()  # of the logits less the largest
    gold = logits.gather(1, labels)
    tokens.max[part], tokens.log_sum_exp[part] = largest.squeeze(1), log_sum_exp.squeeze(1)
    tokens.log_probs[part] = (gold - largest - log_sum_exp).squeeze(1)
    tokens.entropy[part] = log_sum_exp.squeeze(1) - torch.linalg.vecdot(probs, logits - largest)
    # Whether argmax would return the label, without its slow sweep unless there is a tie
    others = logits.scatter(1, labels, -torch.inf).amax(1, keepdim=True)
    is_top1 = gold >= others
    if bool((gold == others).any()):
        is_top1 &= logits.argmax(1, keepdim=True) == labels
    tokens.is_top1[part] = is_top1.squeeze(1)


def rest_and_gradient(tile: Tensor, gradient: Tensor | None, tokens, part: slice, transform) -> None:
    """Run K2: fill `rest` where there are temperatures, and write the gradient of the `[n, V]` products of G1.

    `gradient` may be the tile itself.
    """
    logits, labels = _transformed(tile, transform), tokens.labels[part].unsqueeze(1)
    if tokens.temperatures is not None:
        # The largest logit is subtracted first: the difference is small and exact, and cannot overflow when divided.
        # Summed without the label, 1 - softmax keeps every digit as the label's probability nears 1
        shifted = (logits - tokens.max[part].unsqueeze(1)).div_(tokens.temperatures[part].unsqueeze(1))
        tokens.rest[part] = shifted.softmax(1).scatter_(1, labels, 0.0).sum(1)
    if gradient is None:
        return
    difference = logits.softmax(1)
    difference.scatter_add_(1, labels, difference.new_full(labels.shape, -1.0))
    _write_gradient(gradient, difference, logits, transform)


class TilePasses:
    """The passes of `kernels` (this module or head_triton), with a rule's `tile` function before K2."""

    def __init__(self, read_tile, kernels):
        self.read_tile, self.kernels = read_tile, kernels
        self.statistics = kernels.statistics

    def rest_and_gradient(self, tile: Tensor, gradient: Tensor | None, tokens, part: slice, transform) -> None:
        """Run K2, and fill the rule's statistic. A gradient that the rule brings takes the place of the usual one."""
        logits = _transformed(tile, transform)
        tokens.statistic[part], by_logits = self.read_tile(logits, tokens.labels[part])
        usual = gradient if by_logits is None else None
        if usual is not None or tokens.temperatures is not None:
            self.kernels.rest_and_gradient(tile, usual, tokens, part, transform)
        if gradient is not None and by_logits is not None:
            _write_gradient(gradient, by_logits, logits, transform)


def _write_gradient(gradient: Tensor, by_logits: Tensor, logits: Tensor, transform) -> None:
    """Write the gradient by the products of G1, given the gradient by the logits, which is overwritten."""
    if transform.softcap is not None:
        by_logits *= 1 - (logits / transform.softcap) ** 2
    if transform.scale != 1.0:
        by_logits *= transform.scale
    gradient.copy_(by_logits)


def _transformed(tile: Tensor, transform) -> Tensor:
    """Return the model's logits for products of G1, in float32 or float64."""
    logits = tile.to(torch.promote_types(tile.dtype, torch.float32))
    if transform.scale != 1.0:
        logits = logits * transform.scale
    return logits if transform.softcap is None else transform.softcap * torch.tanh(logits / transform.softcap)
