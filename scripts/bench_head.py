"""Time and memory of the LM head and its loss, forward and backward: this package, its peers and the floor.

    python scripts/bench_head.py [--shape small ...] [--tokens 2048] [--repeats 5] [--head both] [--json FILE]
    python scripts/bench_head.py --errors

Every label is trained, hidden states always get a gradient. Before anything is timed, the losses and the gradients of
the hidden states must agree, the nll methods with each other and the AESL methods with each other, or there is no
table. The methods then take turns, so that noise of a shared machine hits all alike; a ratio is the median of the
ratios within a turn. Memory is the peak of forward and backward beyond the inputs, gradients included: on GPU the
allocator's, on CPU the resident memory of a fresh process for each method.

TRL's head computes the log-probabilities, entropy and top-1 flags that its SFTTrainer logs, as ours always does; the
other peers compute the loss alone. The bare products are the floor of a head in one pass: three (two for a frozen
head) over tiles of as many rows as ours, and nothing else.

`--errors` compares the AESL weights by the dtype of the logits' tile with the float64 definition on the same bf16
operands.

The operands resemble a language model's (bulk of the logits of std 2, four candidates up to 24, labels drawn from the
softmax): low temperatures and kernels that skip small probabilities meet what they would meet in training.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from aesl_trl.head import _add_product, _product, _tile_rows, fused_head
from aesl_trl.losses import aesl_loss, aesl_weights
from aesl_trl.rules import aesl_rule, nll_rule


SHAPES = {  # name -> (hidden size, vocabulary)
    "Qwen2.5-0.5B": (896, 151936),
    "Qwen2.5-7B": (3584, 152064),
    "Llama-3.1-8B": (4096, 128256),
    "small": (512, 32768),
    "tiny": (64, 1000),
}
DEFAULT_SHAPES = {"cuda": ["Qwen2.5-0.5B", "Qwen2.5-7B", "Llama-3.1-8B"], "cpu": ["small"]}
DEFAULT_TOKENS = {"cuda": 8192, "cpu": 2048}
ERROR_TOKENS = 1024  # the float64 definition holds several copies of the logits
TRL_OUTPUTS = ("log_probs", "entropy", "is_top1")  # what SFTTrainer asks for
# Token and vocabulary chunks tried in search of TRL's best, in a pre-run of at most so many tokens
TRL_TILES = {"cuda": ((1024, 2048, 4096, 8192), (8192, 16384, 32768, 65536, 262144)), "cpu": ((128, 256, 512), (8192, 32768))}
SEARCH_TOKENS = {"cuda": 8192, "cpu": 512}
# Of the loss and of the hidden states' gradient (as vectors), relative: float32 loses 1e-7 on each logit, near 20, and
# some over the product; bf16 rounds a logit near 20 by up to 1/16, and its probability by as much
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
BEST_TRL, DEFAULT_TRL = "TRL nll, best tiles", "TRL nll, default tiles"


class Problem(NamedTuple):
    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    labels: Tensor  # [N]
    autocast: bool  # float32 weights, bf16 products

    @property
    def trained(self) -> bool:
        return self.weight.requires_grad

    @property
    def products(self) -> torch.dtype:
        return torch.bfloat16 if self.autocast else self.hidden.dtype

    def context(self):
        return torch.autocast(self.hidden.device.type, torch.bfloat16) if self.autocast else nullcontext()


class Method(NamedTuple):
    name: str
    family: str | None  # whose losses and gradients must agree
    run: Callable[[Problem], Tensor | None]  # forward and backward, returns the loss
    is_peer: bool = False  # another package's, which may be missing or refuse the device


def make_problem(args, shape: str, tokens: int, trained: bool) -> Problem:
    """Operands like a language model's, the same on each call with the same arguments."""
    hidden_size, vocab = SHAPES[shape]
    torch.manual_seed(0)
    with torch.device(args.device):
        weight = torch.randn(vocab, hidden_size) / hidden_size**0.5
        hidden = 2 * torch.randn(tokens, hidden_size)
        top = torch.empty(tokens, 1).uniform_(15, 24)
        for _ in range(4):
            height = top - torch.empty(tokens, 1).exponential_(1 / 3)
            hidden += height * weight[torch.randint(vocab, (tokens,))]
    dtype = getattr(torch, args.dtype)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    draws = [(part @ weight.t()).float().softmax(1).multinomial(1).squeeze(1) for part in hidden.split(256)]
    return Problem(hidden.requires_grad_(), weight.requires_grad_(trained), torch.cat(draws), args.autocast)


def bare_products(problem: Problem) -> None:
    dtype = torch.float32 if problem.hidden.device.type == "cpu" else problem.products
    hidden, weight = problem.hidden.detach().to(dtype), problem.weight.detach().to(dtype)
    vocab, half = weight.size(0), dtype.itemsize < 4
    rows = _tile_rows(problem.weight, problem.trained, vocab * (4 + 2 * half), hidden.device.type == "cpu")
    tile = hidden.new_empty(min(rows, len(hidden)), vocab)
    grad_hidden = torch.empty_like(hidden, dtype=torch.float32)
    grad_weight = torch.zeros_like(weight, dtype=torch.float32) if problem.trained else None
    for part, out in zip(hidden.split(rows), grad_hidden.split(rows), strict=True):
        _product(part, weight.t(), out=tile[: len(part)])
        _product(tile[: len(part)], weight, out=out)
        if problem.trained:
            _add_product(grad_weight, tile[: len(part)].t(), part)


def one_pass(problem: Problem, rule, tile_dtype: torch.dtype) -> Tensor:
    one_sequence = torch.zeros_like(problem.labels)
    with problem.context():
        scores = fused_head(
            problem.hidden, problem.weight, None, problem.labels, one_sequence, rule, tile_dtype=tile_dtype
        )
    return _backward(scores.loss_sum)


def full_logits(problem: Problem, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    with problem.context():
        logits = torch.nn.functional.linear(problem.hidden, problem.weight)
        return _backward(loss(logits, problem.labels))


def full_nll(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")


def full_aesl(logits: Tensor, labels: Tensor) -> Tensor:
    return aesl_loss(logits.unsqueeze(0), labels.unsqueeze(0), num_items=1)


def trl_nll(problem: Problem, tiles: tuple[int, int] | None) -> Tensor:
    """As `add_fused_lm_head` calls it; `tiles` are (tokens, vocabulary entries), `None` for TRL's own."""
    from trl.kernels import chunked_logprob
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    rows, columns = tiles or (chunked_logprob.TOKEN_CHUNK_SIZE, _CHUNKED_LOGPROB_CHUNK_SIZE)
    with patch.object(chunked_logprob, "TOKEN_CHUNK_SIZE", rows):
        with problem.context():
            log_probs, *_ = chunked_logprob.ChunkedLogProbFunction.apply(
                problem.hidden, problem.weight, None, problem.labels, 1.0, columns, None, 1.0, TRL_OUTPUTS
            )
        return _backward(-log_probs.sum())


def liger_nll(problem: Problem) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    _needs_gpu(problem)
    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)
    with problem.context():
        return _backward(loss(problem.weight, problem.hidden, problem.labels))


def cut_cross_entropy_nll(problem: Problem) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    _needs_gpu(problem)
    hidden, weight = problem.hidden.to(problem.products), problem.weight.to(problem.products)  # autocast skips it
    return _backward(linear_cross_entropy(hidden, weight, problem.labels, reduction="sum", impl="cce"))


def _needs_gpu(problem: Problem) -> None:
    if problem.hidden.device.type == "cpu":
        raise RuntimeError("needs a GPU")


def _backward(loss: Tensor) -> Tensor:
    loss.backward()
    return loss.detach()


def methods_for(products: torch.dtype, tiles: tuple[int, int] | None) -> list[Method]:
    """`tiles`: TRL's best, `None` where it does not run."""
    dtypes = list(dict.fromkeys((torch.float32, products)))
    aesl = [Method(f"AESL in one pass, tile {_name(d)}", "aesl", partial(one_pass, rule=aesl_rule(), tile_dtype=d)) for d in dtypes]
    best = Method(f"{BEST_TRL} ({tiles[0]} x {tiles[1]})", "nll", partial(trl_nll, tiles=tiles), True) if tiles else None
    return [
        Method("bare products", None, bare_products),
        *aesl,
        Method("nll in one pass, tile float32", "nll", partial(one_pass, rule=nll_rule(), tile_dtype=torch.float32)),
        *([best] if best else []),
        Method(DEFAULT_TRL, "nll", partial(trl_nll, tiles=None), True),
        Method("full-logits nll", "nll", partial(full_logits, loss=full_nll)),
        Method("full-logits AESL (the definition)", "aesl", partial(full_logits, loss=full_aesl)),
        Method("Liger nll", "nll", liger_nll, True),
        Method("cut-cross-entropy nll", "nll", cut_cross_entropy_nll, True),
    ]


def verify(methods: list[Method], problem: Problem) -> dict[str, str]:
    """Run each method once, exit where one disagrees with the first of its family; why others do not run, by name."""
    references, missing = {}, {}
    for method in methods:
        _clear(problem)
        try:
            loss = method.run(problem)
        except Exception as error:
            if not method.is_peer and not isinstance(error, torch.OutOfMemoryError):
                raise
            missing[method.name] = f"not available: {str(error).splitlines()[0]}"
            continue
        if method.family is None:
            continue
        found = (loss.double().reshape(1), problem.hidden.grad)
        for name, value, truth in zip(("loss", "gradient"), found, references.setdefault(method.family, found), strict=True):
            error = ((value - truth).norm() / truth.norm()).item()
            if not error <= TOLERANCE[problem.products]:
                raise SystemExit(f"{method.name}: {name} is off by {error:.1e} of the first {method.family} method's")
    return missing
