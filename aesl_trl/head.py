"""The fused LM head: hidden states -> loss and its gradients, without the logits.

    L = sum_t -w_t log softmax(z_t)[s_t],   z_t = softcap(logit_scale * (W h_t + b))

Where the weight w_t of a token needs nothing of later tokens, it is known once the token's own logits are, so one pass
over the tokens in order serves forward and backward. A tile holds the logits of n tokens over the whole vocabulary:

    G1  logits = H W^T + b        tile [n, V]
    K1  one read of the tile: log-probability of the label, entropy, whether the label is the most likely token
    S   prefix sums of the log-probabilities, carried from tile to tile; the rule's temperatures T
    K2  one read: rest = 1 - softmax(z / T)[label]; one write: G = (softmax(z) - onehot), times the scale and the
        derivative of the soft cap
    G2  dH = w * (G W)            the weights go on rows of dH and H, never on the tile
    G3  dW += G^T (w * H)         in float32: bf16 sums lose digits with each tile; left out when the head is frozen

Three matrix products (two for a frozen head), where recomputing the tile in the backward pass takes four (three). The
tile passes are Triton kernels on GPU (head_triton.py) and the functions below elsewhere; the scan is torch's cumsum,
five launches over n numbers. A rule that is not causal costs a pass for its statistics first: four products.

Shapes: N trained tokens of the batch in order, n of them in a tile, V vocabulary, H hidden size. Not here: masks, rows
and documents (scoring.py), and the definition that this is tested against (losses.py).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers.utils import is_triton_available

from .rules import TokenRule, TokenStats


if is_triton_available():
    from . import head_triton
else:  # Triton ships on Linux only; elsewhere a GPU runs the torch passes below
    head_triton = None

CPU_TILE_ROWS = 256
CPU_SWEEP_ENTRIES = 2**19  # a sweep's block of float32 logits, 2 MB, stays in the cache of a core
GPU_TILE_BYTES = 2**28  # what TRL's own tile takes: 4096 tokens x 32768 vocabulary entries in bf16
GPU_MIN_ROWS = {True: 1024, False: 256}  # fewer would stream W, and where it is trained dW, more than they compute


class LogitTransform(NamedTuple):
    """What an architecture does to `W h + b`: multiply by `scale`, then `softcap * tanh(x / softcap)`."""

    scale: float = 1.0
    softcap: float | None = None


class HeadOutput(NamedTuple):
    """Scores of N trained tokens, each `[N]`. Only `loss_sum` carries gradients."""

    loss_sum: Tensor  # scalar: -sum(weights * log_probs), nats
    log_probs: Tensor  # of the labels, nats
    entropy: Tensor  # of softmax(logits), nats
    is_top1: Tensor  # bool: whether the label is the most likely token, the first one of equals
    weights: Tensor
    temperatures: Tensor | None  # None where the rule has none


def fused_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    sequence_ids: Tensor,
    rule: TokenRule,
    transform: LogitTransform = LogitTransform(),  # noqa: B008 (an immutable NamedTuple)
    *,
    tile_dtype: torch.dtype | None = None,
    tile_rows: int | None = None,
) -> HeadOutput:
    """Score the labels and, where gradients are on, build the gradients of `loss_sum` in the same pass.

    Equals, with `z = softcap(scale * (hidden @ weight.T + bias))` in memory,

        log_probs = z.log_softmax(-1).gather(-1, labels)
        loss_sum = -(rule's weights, detached * log_probs).sum()

    The products run in the dtype of autocast where it is on and else in that of `hidden`; sums are float32, or float64
    for float64 inputs.

    Args:
        hidden: `[N, H]`.
        weight, bias: `[V, H]`, `[V]` or `None`. Cast once if their dtype is not that of the products.
        labels: `[N]` in `[0, V)`.
        sequence_ids: `[N]`, constant over a sequence and changing at its border.
        tile_dtype: dtype of the logits' tile, by default float32 (float64 for float64 inputs): a low temperature
            amplifies the rounding of bf16 logits.
        tile_rows: n, by default by device and budget.
    """
    if rule.temperatures is not None and not rule.causal:
        raise ValueError("a rule that is not causal cannot have temperatures")
    with_grad = torch.is_grad_enabled()
    needs_grad = [with_grad and value is not None and value.requires_grad for value in (hidden, weight, bias)]
    outputs = _FusedHead.apply(
        hidden, weight, bias, labels, sequence_ids, rule, transform, tile_dtype, tile_rows, needs_grad
    )
    return HeadOutput(*outputs)


class _FusedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, sequence_ids, rule, transform, tile_dtype, tile_rows, needs_grad):
        # ctx.needs_input_grad stays true under no_grad: the caller says what is wanted
        run = _Run(hidden, weight, bias, labels, sequence_ids, rule, transform, tile_dtype, tile_rows, needs_grad)
        with torch.autocast(hidden.device.type, enabled=False):
            run()
        # Attributes, not save_for_backward: activation offloading would send them to the CPU and back
        ctx.gradients = run.gradients
        ctx.dtypes = [None if value is None else value.dtype for value in (hidden, weight, bias)]
        tokens = run.tokens
        loss_sum = -(tokens.weights.double() * tokens.log_probs.double()).sum().to(tokens.log_probs.dtype)
        outputs = (loss_sum, tokens.log_probs, tokens.entropy, tokens.is_top1, tokens.weights, tokens.temperatures)
        ctx.mark_non_differentiable(*(value for value in outputs[1:] if value is not None))
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, *_):
        if ctx.gradients is None:
            raise RuntimeError("the fused head's gradients were already used: it cannot go backward twice")
        gradients, ctx.gradients = ctx.gradients, None  # freed here, not after the whole backbone's backward
        # The scale (1 / num_items, times the loss scale of fp16) comes last, in float32: 1 / num_items on the rows
        # would be subnormal in fp16
        scaled = [
            None if value is None else _scaled(value, grad_loss, dtype)
            for value, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None, None, None, None, None, None


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`gradient * factor` in `dtype`, in one sweep and without a copy where the dtype stays."""
    out = gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, factor.to(gradient.dtype), out=out)


class _Tokens:
    """Per-token vectors `[N]`, filled tile by tile."""

    def __init__(self, labels: Tensor, sequence_ids: Tensor, dtype: torch.dtype, with_temperatures: bool):
        count, device = labels.numel(), labels.device
        self.labels = labels
        self.log_probs, self.entropy, self.max, self.log_sum_exp, self.weights = torch.empty(
            5, count, dtype=dtype, device=device
        )
        self.is_top1 = torch.empty(count, dtype=torch.bool, device=device)
        self.temperatures, self.rest = (
            torch.empty(2, count, dtype=dtype, device=device) if with_temperatures else (None, None)
        )
        starts = torch.ones(count, dtype=torch.bool, device=device)
        starts[1:] = sequence_ids[1:] != sequence_ids[:-1]
        positions = torch.arange(count, device=device)
        self.sequences = starts.cumsum(0) - 1
        self.first = positions.where(starts, 0).cummax(0).values if count else positions
        self.counts = (positions - self.first + 1).double()
        # Log-probabilities summed over all tokens before each one. In float64: a float32 sum over 32k packed tokens
        # is off by about 2e-3
        self.before = torch.zeros(count + 1, dtype=torch.float64, device=device)

    def stats(self, part: slice) -> TokenStats:
        through = self.before[part.start + 1 : part.stop + 1]
        return TokenStats(
            log_probs=self.log_probs[part],
            entropy=self.entropy[part],
            is_top1=self.is_top1[part],
            sequences=self.sequences[part],
            prefix_sums=through - self.before[self.first[part]],
            prefix_counts=self.counts[part],
            rest=None if self.rest is None else self.rest[part],
        )

    def scan(self, part: slice) -> None:
        torch.cumsum(self.log_probs[part], 0, dtype=torch.float64, out=self.before[part.start + 1 : part.stop + 1])
        self.before[part.start + 1 : part.stop + 1] += self.before[part.start]


class _Run:
    """One pass over all tiles; `tokens` and `gradients` hold what comes of it."""

    def __init__(self, hidden, weight, bias, labels, sequence_ids, rule, transform, tile_dtype, tile_rows, needs_grad):
        on_cpu, device = hidden.device.type == "cpu", hidden.device
        products = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else hidden.dtype
        sums = torch.promote_types(products, torch.float32)  # float32; float64 for float64
        tile_dtype = tile_dtype or sums
        # A CPU has no product of half-precision operands with a float32 result: round the operands, then widen them
        operands = tile_dtype if on_cpu else products
        self.hidden = hidden
        self.cast = lambda value: value.to(products).to(operands)
        self.weight = self.cast(weight)
        self.bias = None if bias is None else bias.to(products).to(tile_dtype)
        self.rule, self.transform = rule, transform
        self.tokens = _Tokens(labels, sequence_ids, sums, rule.temperatures is not None)
        self.gradients = [
            value.new_zeros(value.shape, dtype=sums) if needed else None
            for value, needed in zip((hidden, weight, bias), needs_grad, strict=True)
        ]
        self.with_grad = any(needs_grad)
        self.passes = head_triton if head_triton is not None and head_triton.runs_on(device) else _TorchPasses
        count, vocab = hidden.size(0), weight.size(0)
        separate = self.with_grad and operands != tile_dtype
        rows = tile_rows or _tile_rows(weight, needs_grad[1], vocab * (tile_dtype.itemsize + 2 * separate), on_cpu)
        rows = min(rows, max(1, count))
        self.parts = [slice(start, min(start + rows, count)) for start in range(0, count, rows)]
        sweep_rows = max(1, CPU_SWEEP_ENTRIES // vocab) if on_cpu and self.passes is _TorchPasses else rows
        self.sweep_rows = min(sweep_rows, rows)
        self.tile = torch.empty(rows, vocab, dtype=tile_dtype, device=device)
        # The gradient overwrites the logits where it has their dtype
        self.tile_gradient = torch.empty(rows, vocab, dtype=operands, device=device) if separate else self.tile

    def __call__(self) -> None:
        tokens, rule = self.tokens, self.rule
        if not rule.causal:
            for part in self.parts:
                logits = self._project(part)
                for block, rows in self._blocks(part):
                    self.passes.statistics(logits[rows], tokens, block, self.transform)
                tokens.scan(part)
            everything = slice(0, tokens.labels.numel())
            tokens.weights.copy_(rule.weights(tokens.stats(everything)))
            if not self.with_grad:
                return
        for part in self.parts:
            logits = self._project(part)
            for block, rows in self._blocks(part):
                if rule.causal:
                    self.passes.statistics(logits[rows], tokens, block, self.transform)
                    tokens.scan(block)
                if rule.temperatures is not None:
                    tokens.temperatures[block] = rule.temperatures(tokens.stats(block))
                if self.with_grad or rule.temperatures is not None:
                    gradient = self.tile_gradient[rows] if self.with_grad else None
                    self.passes.rest_and_gradient(logits[rows], gradient, tokens, block, self.transform)
            if rule.causal:
                tokens.weights[part] = rule.weights(tokens.stats(part))
            if self.with_grad:
                self._accumulate(part)

    def _blocks(self, part: slice):
        """Consecutive tokens that one sweep reads: (their place among all tokens, their rows in the tile)."""
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
    """Rows of a tile. On GPU the forward pass may hold what the backward pass will: dW in the weight's own dtype, made
    from the float32 sum at its end, is not there yet."""
    if on_cpu:
        return CPU_TILE_ROWS
    later = weight.nbytes if trained and weight.dtype.itemsize < 4 else 0
    rows = (GPU_TILE_BYTES + later) // row_bytes
    return max(GPU_MIN_ROWS[trained], rows // 128 * 128)


def _product(a: Tensor, b: Tensor, *, out: Tensor) -> None:
    """`out = a @ b`, summed and kept in the dtype of `out`."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif out.device.type == "cuda":
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b`, without rounding the product to the dtype of its operands first."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.device.type == "cuda":
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


class _TorchPasses:
    """The tile passes in torch. `head_triton` has the same two functions."""

    @staticmethod
    def statistics(tile: Tensor, tokens: _Tokens, part: slice, transform: LogitTransform) -> None:
        """K1: fill the statistics of `part` from its logits `[n, V]`."""
        logits, labels = _transformed(tile, transform), tokens.labels[part].unsqueeze(1)
        largest = logits.amax(1, keepdim=True)
        probs = logits.softmax(1)  # faster than exp and a sum
        log_sum_exp = -probs.amax(1, keepdim=True).log()  # of the logits less their largest one
        gold = logits.gather(1, labels)
        tokens.max[part], tokens.log_sum_exp[part] = largest.squeeze(1), log_sum_exp.squeeze(1)
        tokens.log_probs[part] = (gold - largest - log_sum_exp).squeeze(1)
        tokens.entropy[part] = log_sum_exp.squeeze(1) - torch.linalg.vecdot(probs, logits - largest)
        tokens.is_top1[part] = _is_first_largest(logits, gold, largest, labels)

    @staticmethod
    def rest_and_gradient(
        tile: Tensor, gradient: Tensor | None, tokens: _Tokens, part: slice, transform: LogitTransform
    ) -> None:
        """K2: fill `rest` where there are temperatures, and write the gradient of the `[n, V]` products of G1."""
        logits, labels = _transformed(tile, transform), tokens.labels[part].unsqueeze(1)
        if tokens.temperatures is not None:
            # Less the largest logit first: the difference is small and exact, and cannot overflow when divided.
            # Summed without the label, 1 - softmax keeps every digit as the label's probability nears 1
            shifted = (logits - tokens.max[part].unsqueeze(1)).div_(tokens.temperatures[part].unsqueeze(1))
            tokens.rest[part] = shifted.softmax(1).scatter_(1, labels, 0.0).sum(1)
        if gradient is None:
            return
        difference = logits.softmax(1)
        difference.scatter_add_(1, labels, difference.new_full(labels.shape, -1.0))
        if transform.softcap is not None:
            difference *= 1 - (logits / transform.softcap) ** 2
        if transform.scale != 1.0:
            difference *= transform.scale
        gradient.copy_(difference)


def _transformed(tile: Tensor, transform: LogitTransform) -> Tensor:
    """The model's logits from the products of G1, in float32 or float64."""
    logits = tile.to(torch.promote_types(tile.dtype, torch.float32))
    if transform.scale != 1.0:
        logits = logits * transform.scale
    return logits if transform.softcap is None else transform.softcap * torch.tanh(logits / transform.softcap)


def _is_first_largest(logits: Tensor, gold: Tensor, largest: Tensor, labels: Tensor) -> Tensor:
    """Whether argmax would return the label, `[n]`, without its slow sweep unless there is a tie."""
    others = logits.scatter(1, labels, -torch.inf).amax(1, keepdim=True)
    is_top1 = gold >= others
    if bool((gold == others).any()):
        is_top1 &= logits.argmax(1, keepdim=True) == labels
    return is_top1.squeeze(1)
