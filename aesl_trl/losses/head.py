"""The fused LM head: hidden states -> loss and its gradients, without the logits.

    L = sum_t -w_t log softmax(z_t)[s_t],   z_t = softcap(logit_scale * (W h_t + b))

Where the weight w_t of a token needs nothing of later tokens, it is known once the token's own logits are. So one pass
over the tokens in order serves forward and backward. A tile holds the logits of n tokens over the whole vocabulary:

    G1  logits = H W^T + b        tile [n, V]
    K1  one read of the tile: log-probability of the label, entropy, whether the label is the most likely token
    S   prefix sums of the log-probabilities, carried from tile to tile; the rule's temperatures T
    K2  one read: rest = 1 - softmax(z / T)[label]; one write: G = (softmax(z) - onehot), times the scale and the
        derivative of the soft cap
    G2  dH = w * (G W)            the weights go on rows of dH and H, never on the tile
    G3  dW += G^T (w * H)         in float32: bf16 sums lose digits with each tile; left out when the head is frozen

These are three matrix products (two for a frozen head), where recomputing the tile in the backward pass takes four
(three). K1 and K2 are Triton kernels on GPU (head_triton.py) and torch elsewhere (head_torch.py); S is torch's cumsum,
five launches over n numbers. A rule that is not causal costs a pass for its statistics first: four products. A rule
that reads the tile itself may put another gradient in the place of softmax(z) - onehot, in torch on every device.

Shapes: N trained tokens of the batch in order, n of them in a tile, V vocabulary, H hidden size. Masks, rows and
documents are the business of scoring.py; definition.py is the truth that this file is tested against.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.utils import is_triton_available, logging

from . import head_torch
from .precision import at_home, in_float64, on_device
from .rules import TokenRule, TokenStats


if is_triton_available():
    from . import head_triton
else:  # Triton ships on Linux only; elsewhere a GPU runs the torch passes
    head_triton = None

logger = logging.get_logger(__name__)

CPU_TILE_ROWS = 256
CPU_SWEEP_ENTRIES = 2**19  # a sweep's block of float32 logits, 2 MB, stays in the cache of a core
GPU_TILE_BYTES = 2**28  # the size of TRL's own tile: 4096 tokens x 32768 vocabulary entries in bf16
GPU_MIN_ROWS = {True: 1024, False: 256}  # fewer would stream W, and where it is trained dW, more than they compute


class LogitTransform(NamedTuple):
    """The steps of an architecture after `W h + b`: multiply by `scale`, then `softcap * tanh(x / softcap)`."""

    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class HeadSettings:
    """How the head makes logits, and how it holds them."""

    transform: LogitTransform = LogitTransform()  # of the architecture
    # None: float32 (float64 for float64 inputs), since a low temperature amplifies the rounding of bf16 logits
    tile_dtype: torch.dtype | None = None
    tile_rows: int | None = None  # n; None: by device and budget


class HeadOutput(NamedTuple):
    """Scores of N trained tokens, each `[N]`. Only `loss_sum` carries gradients."""

    loss_sum: Tensor  # scalar: -sum(weights * log_probs), nats, or the sum of the rule's own losses
    log_probs: Tensor  # of the labels, nats
    entropy: Tensor  # of softmax(logits), nats
    is_top1: Tensor  # bool: whether the label is the most likely token, the first of equally likely ones
    weights: Tensor
    temperatures: Tensor | None  # None where the rule has none


def fused_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    sequence_ids: Tensor,
    rule: TokenRule,
    settings: HeadSettings = HeadSettings(),  # noqa: B008 (frozen)
    *,
    old_log_probs: Tensor | None = None,
) -> HeadOutput:
    """Score the labels and, where gradients are on, build the gradients of `loss_sum` in the same pass.

    The result equals, with `z = softcap(scale * (hidden @ weight.T + bias))` in memory,

        log_probs = z.log_softmax(-1).gather(-1, labels)
        loss_sum = -(rule's weights, detached * log_probs).sum()

    unless the rule brings a value or a gradient of its own ([`~rules.TokenRule`]). The products run in the dtype of
    autocast where it is on and else in that of `hidden`; sums are float32, or float64 for float64 inputs.

    Args:
        hidden: `[N, H]`.
        weight, bias: `[V, H]`, `[V]` or `None`. They are cast once if their dtype is not that of the products.
        labels: `[N]` in `[0, V)`.
        sequence_ids: `[N]`, constant over a sequence and changing at its border.
        old_log_probs: `[N]` or `None`, for a rule that compares with an old policy.
    """
    if not rule.causal and (rule.temperatures is not None or rule.tile is not None):
        raise ValueError("a rule that is not causal cannot have temperatures or read the tile")
    # Inside of an autograd function ctx.needs_input_grad stays true under no_grad, so we look here
    with_grad = torch.is_grad_enabled()
    needs_grad = [with_grad and value is not None and value.requires_grad for value in (hidden, weight, bias)]
    task = _Task(labels, sequence_ids, old_log_probs, rule, settings, needs_grad)
    return HeadOutput(*_FusedHead.apply(hidden, weight, bias, task))


class _Task(NamedTuple):
    """The arguments of the head beside the three tensors that may need gradients."""

    labels: Tensor
    sequence_ids: Tensor
    old_log_probs: Tensor | None
    rule: TokenRule
    settings: HeadSettings
    needs_grad: list[bool]  # of hidden, weight and bias


class _FusedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, task: _Task):
        run = _Run(hidden, weight, bias, task)
        with torch.autocast(hidden.device.type, enabled=False):
            run()
        # Attributes, not save_for_backward: activation offloading would send them to the CPU and back
        ctx.gradients = run.gradients
        ctx.dtypes = [None if value is None else value.dtype for value in (hidden, weight, bias)]
        tokens, losses = run.tokens, task.rule.losses
        if losses is None:
            loss_sum = -(in_float64(tokens.weights) * in_float64(tokens.log_probs)).sum()
        else:
            loss_sum = in_float64(losses(tokens.stats(slice(0, tokens.labels.numel())))).sum()
        loss_sum = on_device(loss_sum, hidden.device).to(tokens.log_probs.dtype)
        outputs = (loss_sum, tokens.log_probs, tokens.entropy, tokens.is_top1, tokens.weights, tokens.temperatures)
        ctx.mark_non_differentiable(*(value for value in outputs[1:] if value is not None))
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss: Tensor, *_):
        if ctx.gradients is None:
            raise RuntimeError("the fused head's gradients were already used: it cannot go backward twice")
        gradients, ctx.gradients = ctx.gradients, None  # freed here, not after the whole backbone's backward
        # The scale (1 / num_items, times the loss scale of fp16) comes last, in float32: 1 / num_items on the rows
        # would be subnormal in fp16. It takes one sweep, without a copy where the dtype stays
        for place, (gradient, dtype) in enumerate(zip(gradients, ctx.dtypes, strict=True)):
            if gradient is not None:
                out = gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
                gradients[place] = torch.mul(gradient, grad_loss.to(gradient.dtype), out=out)
        return *gradients, None


class _Tokens:
    """Per-token vectors `[N]`, filled tile by tile."""

    def __init__(self, task: _Task, dtype: torch.dtype):
        count, device, rule = task.labels.numel(), task.labels.device, task.rule
        self.labels = task.labels
        self.old_log_probs = None if task.old_log_probs is None else task.old_log_probs.to(dtype)
        self.log_probs, self.entropy, self.max, self.log_sum_exp, self.weights = torch.empty(
            5, count, dtype=dtype, device=device
        )
        self.is_top1 = torch.empty(count, dtype=torch.bool, device=device)
        self.temperatures = self.rest = None
        if rule.temperatures is not None:
            self.temperatures, self.rest = torch.empty(2, count, dtype=dtype, device=device)
        self.statistic = None if rule.tile is None else torch.empty(count, dtype=dtype, device=device)
        sequence_ids = at_home(task.sequence_ids)
        starts = torch.ones(count, dtype=torch.bool, device=sequence_ids.device)
        starts[1:] = sequence_ids[1:] != sequence_ids[:-1]
        positions = torch.arange(count, device=sequence_ids.device)
        self.sequences = (starts.cumsum(0) - 1).to(device)
        self.first = positions.where(starts, 0).cummax(0).values if count else positions
        self.counts = on_device(in_float64(positions - self.first + 1), device)
        # The sum of the log-probabilities of all earlier tokens
        self.before = sequence_ids.new_zeros(count + 1, dtype=torch.float64)

    def stats(self, part: slice) -> TokenStats:
        through = self.before[part.start + 1 : part.stop + 1]
        return TokenStats(
            log_probs=self.log_probs[part],
            entropy=self.entropy[part],
            is_top1=self.is_top1[part],
            sequences=self.sequences[part],
            prefix_sums=on_device(through - self.before[self.first[part]], self.log_probs.device),
            prefix_counts=self.counts[part],
            rest=None if self.rest is None else self.rest[part],
            statistic=None if self.statistic is None else self.statistic[part],
            old_log_probs=None if self.old_log_probs is None else self.old_log_probs[part],
        )

    def scan(self, part: slice) -> None:
        torch.cumsum(in_float64(self.log_probs[part]), 0, out=self.before[part.start + 1 : part.stop + 1])
        self.before[part.start + 1 : part.stop + 1] += self.before[part.start]


class _Run:
    """One pass over all tiles, which fills `tokens` and `gradients`."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, task: _Task):
        on_cpu, device = hidden.device.type == "cpu", hidden.device
        products = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else hidden.dtype
        sums = torch.promote_types(products, torch.float32)  # float32; float64 for float64
        tile_dtype = task.settings.tile_dtype or sums
        # A CPU has no product of half-precision operands with a float32 result: round the operands, then widen them
        operands = tile_dtype if on_cpu else products
        self.hidden = hidden
        self.cast = lambda value: value.to(products).to(operands)
        self.weight = self.cast(weight)
        self.bias = None if bias is None else bias.to(products).to(tile_dtype)
        self.rule, self.transform = task.rule, task.settings.transform
        self.tokens = _Tokens(task, sums)
        self.gradients = [
            value.new_zeros(value.shape, dtype=sums) if needed else None
            for value, needed in zip((hidden, weight, bias), task.needs_grad, strict=True)
        ]
        self.with_grad = any(task.needs_grad)
        self.passes = _passes(task.rule, device)
        count, vocab = hidden.size(0), weight.size(0)
        separate = self.with_grad and operands != tile_dtype
        row_bytes = vocab * (tile_dtype.itemsize + 2 * separate)
        rows = task.settings.tile_rows or _tile_rows(weight, task.needs_grad[1], row_bytes, on_cpu)
        rows = min(rows, max(1, count))
        self.parts = [slice(start, min(start + rows, count)) for start in range(0, count, rows)]
        sweep_rows = max(1, CPU_SWEEP_ENTRIES // vocab) if on_cpu and self.passes is not head_triton else rows
        self.sweep_rows = min(sweep_rows, rows)
        self.tile = torch.empty(rows, vocab, dtype=tile_dtype, device=device)
        # The gradient overwrites the logits where it has their dtype
        self.tile_gradient = torch.empty(rows, vocab, dtype=operands, device=device) if separate else self.tile

    def __call__(self) -> None:
        tokens, rule = self.tokens, self.rule
        if not rule.causal:
            for part in self.parts:
                logits = self._project(part)  # G1
                for block, rows in self._blocks(part):
                    self.passes.statistics(logits[rows], tokens, block, self.transform)  # K1
                tokens.scan(part)  # S
            everything = slice(0, tokens.labels.numel())
            tokens.weights.copy_(rule.weights(tokens.stats(everything)))
            if not self.with_grad:
                return
        for part in self.parts:
            logits = self._project(part)  # G1
            for block, rows in self._blocks(part):
                if rule.causal:
                    self.passes.statistics(logits[rows], tokens, block, self.transform)  # K1
                    tokens.scan(block)  # S
                if rule.temperatures is not None:
                    tokens.temperatures[block] = rule.temperatures(tokens.stats(block))
                if self.with_grad or rule.temperatures is not None or rule.tile is not None:
                    gradient = self.tile_gradient[rows] if self.with_grad else None
                    self.passes.rest_and_gradient(logits[rows], gradient, tokens, block, self.transform)  # K2
            if rule.causal:
                tokens.weights[part] = rule.weights(tokens.stats(part))
            if self.with_grad:
                self._accumulate(part)  # G2, G3

    def _blocks(self, part: slice) -> Iterator[tuple[slice, slice]]:
        """Give the tokens that one sweep reads, block by block: their place among all tokens, and in the tile."""
        for start in range(part.start, part.stop, self.sweep_rows):
            stop = min(start + self.sweep_rows, part.stop)
            yield slice(start, stop), slice(start - part.start, stop - part.start)

    def _project(self, part: slice) -> Tensor:
        tile = self.tile[: part.stop - part.start]
        _product(self.cast(self.hidden[part]), self.weight.t(), out=tile)
        return tile if self.bias is None else tile.add_(self.bias)

    def _accumulate(self, part: slice) -> None:
        gradient, weights = self.tile_gradient[: part.stop - part.start], self.tokens.weights[part].unsqueeze(1)
        grad_hidden, grad_weight, grad_bias = self.gradients
        if grad_hidden is not None:
            _product(gradient, self.weight, out=grad_hidden[part])
            grad_hidden[part] *= weights
        if grad_weight is not None:
            weighted = (self.cast(self.hidden[part]).to(weights.dtype) * weights).to(gradient.dtype)
            _add_product(grad_weight, gradient.t(), weighted)
        if grad_bias is not None:
            _add_product(grad_bias.unsqueeze(1), gradient.t(), weights.to(gradient.dtype))


def _tile_rows(weight: Tensor, trained: bool, row_bytes: int, on_cpu: bool) -> int:
    """Return the number of rows of a tile.

    On GPU the forward pass may hold as much as the backward pass will: dW in the weight's own dtype, made from the
    float32 sum at the end of the backward pass, is not there yet.
    """
    if on_cpu:
        return CPU_TILE_ROWS
    later = weight.nbytes if trained and weight.dtype.itemsize < 4 else 0
    rows = (GPU_TILE_BYTES + later) // row_bytes
    return max(GPU_MIN_ROWS[trained], rows // 128 * 128)


def _product(a: Tensor, b: Tensor, *, out: Tensor) -> None:
    """Compute `out = a @ b`, summed and kept in the dtype of `out`."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif out.device.type == "cuda":
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Compute `total += a @ b`, without rounding the product to the dtype of its operands first."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.device.type == "cuda":
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _passes(rule: TokenRule, device: torch.device):
    """Return the kernels where they can run, else torch, wrapped where the rule reads the tile."""
    on_gpu = head_triton is not None and head_triton.runs_on(device)
    passes = head_triton if on_gpu else head_torch
    if rule.tile is None:
        return passes
    if on_gpu:
        logger.warning_once(
            "aesl_trl: this loss reads all logits of a token, in torch beside the Triton kernels: slower"
        )
    return head_torch.TilePasses(rule.tile, passes)
