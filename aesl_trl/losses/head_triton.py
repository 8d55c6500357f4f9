"""The fused head's two tile passes as Triton kernels: one program a row, the vocabulary in blocks.

Their arguments are those of head_torch.py. Arithmetic is float64 for a float64 tile, else float32.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Launch(NamedTuple):
    """How a kernel is launched: what each of its programs reads at once, with how many warps, how far ahead."""

    block: int  # vocabulary entries
    warps: int
    stages: int  # blocks in flight: the next ones are loaded while one is computed


# By kernel. No GPU has measured these: `python scripts/bench/head.py --tune` times others beside them
LAUNCHES = {"statistics": Launch(2048, 8, 1), "rest_and_gradient": Launch(2048, 8, 1)}


def runs_on(device: torch.device) -> bool:
    return device.type in ("cuda", "xpu")


@triton.jit
def _transformed(products, scale, softcap, HAS_SOFTCAP: tl.constexpr, FLOAT: tl.constexpr):
    """Return the model's logits for one block of the tile."""
    logits = products.to(FLOAT) * tl.cast(scale, FLOAT)
    if HAS_SOFTCAP:
        cap = tl.cast(softcap, FLOAT)
        logits = cap * (2 * tl.sigmoid(2 * logits / cap) - 1)  # tanh
    return logits


@triton.jit
def _statistics_kernel(
    tile_ptr,
    tile_stride,
    labels_ptr,
    max_ptr,
    log_sum_exp_ptr,
    log_probs_ptr,
    entropy_ptr,
    is_top1_ptr,
    vocab,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    FLOAT: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    row_ptr = tile_ptr + row * tile_stride
    largest = tl.full((), -1e30, FLOAT)  # finite, so that the first rescaling is exp(-1e30) = 0 and not a NaN
    sums = tl.zeros((BLOCK,), FLOAT)  # of exp(z - largest), a sum for each lane, reduced once at the end
    weighted = tl.zeros((BLOCK,), FLOAT)  # of exp(z - largest) * (z - largest)
    before_label = tl.full((BLOCK,), float("-inf"), FLOAT)  # argmax returns the first of equals
    for start in tl.range(0, vocab, BLOCK, num_stages=STAGES):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < vocab
        logits = _transformed(tl.load(row_ptr + offsets, mask=inside, other=0.0), scale, softcap, HAS_SOFTCAP, FLOAT)
        logits = tl.where(inside, logits, float("-inf"))
        before_label = tl.maximum(before_label, tl.where(offsets < label, logits, float("-inf")))
        higher = tl.maximum(largest, tl.max(logits, axis=0))
        shift = largest - higher
        shifted = logits - higher
        exp = tl.exp(shifted)
        rescale = tl.exp(shift)
        weighted = rescale * (weighted + shift * sums) + exp * tl.where(inside, shifted, 0.0)
        sums = rescale * sums + exp
        largest = higher
    sum_exp = tl.sum(sums, axis=0)
    log_sum_exp = tl.log(sum_exp)
    gold = _transformed(tl.load(row_ptr + label), scale, softcap, HAS_SOFTCAP, FLOAT)
    tl.store(max_ptr + row, largest)
    tl.store(log_sum_exp_ptr + row, log_sum_exp)
    tl.store(log_probs_ptr + row, gold - largest - log_sum_exp)
    tl.store(entropy_ptr + row, log_sum_exp - tl.sum(weighted, axis=0) / sum_exp)
    tl.store(is_top1_ptr + row, (gold >= largest) & (gold > tl.max(before_label, axis=0)))


@triton.jit
def _rest_and_gradient_kernel(
    tile_ptr,
    tile_stride,
    gradient_ptr,
    gradient_stride,
    labels_ptr,
    max_ptr,
    log_sum_exp_ptr,
    temperatures_ptr,
    rest_ptr,
    vocab,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    FLOAT: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    largest = tl.load(max_ptr + row)
    log_sum_exp = tl.load(log_sum_exp_ptr + row)
    row_ptr = tile_ptr + row * tile_stride
    if HAS_TEMPERATURE:
        inverse = 1 / tl.load(temperatures_ptr + row)
        rest = tl.zeros((BLOCK,), FLOAT)  # of exp((z - largest) / T) over the tokens other than the label
        gold = tl.zeros((BLOCK,), FLOAT)  # the label's own, in its lane
    for start in tl.range(0, vocab, BLOCK, num_stages=STAGES):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < vocab
        logits = _transformed(tl.load(row_ptr + offsets, mask=inside, other=0.0), scale, softcap, HAS_SOFTCAP, FLOAT)
        shifted = logits - largest
        is_label = offsets == label
        if HAS_TEMPERATURE:
            tempered = tl.where(inside, tl.exp(shifted * inverse), 0.0)
            rest += tl.where(is_label, 0.0, tempered)
            gold += tl.where(is_label, tempered, 0.0)
        if HAS_GRADIENT:
            gradient = tl.exp(shifted - log_sum_exp) - tl.where(is_label, 1.0, 0.0)
            if HAS_SOFTCAP:
                tanh = logits / tl.cast(softcap, FLOAT)
                gradient *= 1 - tanh * tanh
            gradient *= tl.cast(scale, FLOAT)
            pointers = gradient_ptr + row * gradient_stride + offsets
            tl.store(pointers, gradient.to(gradient_ptr.dtype.element_ty), mask=inside)
    if HAS_TEMPERATURE:
        # Summed without the label, 1 - softmax keeps every digit as the label's probability nears 1
        rest_sum = tl.sum(rest, axis=0)
        tl.store(rest_ptr + row, rest_sum / (rest_sum + tl.sum(gold, axis=0)))


def _constants(kernel: str, tile: Tensor, transform) -> dict:
    launch = LAUNCHES[kernel]
    return {
        "vocab": tile.size(1),
        "scale": transform.scale,
        "softcap": transform.softcap or 1.0,
        "HAS_SOFTCAP": transform.softcap is not None,
        "FLOAT": tl.float64 if tile.dtype == torch.float64 else tl.float32,
        "BLOCK": launch.block,
        "STAGES": launch.stages,
        "num_warps": launch.warps,
    }


def statistics(tile: Tensor, tokens, part: slice, transform) -> None:
    """Run K1: fill the statistics of `part` from its products `[n, V]`."""
    _statistics_kernel[(tile.size(0),)](
        tile,
        tile.stride(0),
        tokens.labels[part],
        tokens.max[part],
        tokens.log_sum_exp[part],
        tokens.log_probs[part],
        tokens.entropy[part],
        tokens.is_top1[part],
        **_constants("statistics", tile, transform),
    )


def rest_and_gradient(tile: Tensor, gradient: Tensor | None, tokens, part: slice, transform) -> None:
    """Run K2: fill `rest` where there are temperatures, and write the gradient, which may be the tile itself."""
    has_temperature = tokens.temperatures is not None
    written = tile if gradient is None else gradient
    _rest_and_gradient_kernel[(tile.size(0),)](
        tile,
        tile.stride(0),
        written,
        written.stride(0),
        tokens.labels[part],
        tokens.max[part],
        tokens.log_sum_exp[part],
        tokens.temperatures[part] if has_temperature else tokens.max[part],
        tokens.rest[part] if has_temperature else tokens.max[part],
        HAS_TEMPERATURE=has_temperature,
        HAS_GRADIENT=gradient is not None,
        **_constants("rest_and_gradient", tile, transform),
    )
