"""Time and memory of the LM head and its loss, forward and backward: this package, its peers and the floor.

    python scripts/bench/head.py [--shape small ...] [--tokens 2048] [--repeats 5] [--head both] [--no-rivals]
    python scripts/bench/head.py --errors

Every label is trained, hidden states always get a gradient. Before anything is timed, the losses and the gradients of
the hidden states must agree, the nll methods with each other and the AESL methods with each other. A method that
disagrees is not timed; its row says by how much. The methods then take turns, so that noise of a shared machine hits
all alike; a ratio is the median of the ratios within a turn. On CPU the time is this process's CPU time: with one
thread (OMP_NUM_THREADS=1) it is what an idle machine would take. Memory is the peak of forward and backward beyond the
inputs, gradients included: on GPU the allocator's, on CPU the rise of the resident memory in a fresh process.

TRL's head computes the log-probabilities, entropy and top-1 flags that its SFTTrainer logs, as ours always does; the
other peers compute the loss alone. The bare products are the floor of a head in one pass: three of them (two for a
frozen head) over tiles of as many rows as ours, and nothing else. The rivals' losses (DFT, GEM, PSFT, EAFT) and two
ablations of AESL run in our head; PSFT without the forward pass of its old policy.

`--errors` compares the AESL weights by the dtype of the logits' tile with the float64 definition on the same bf16
operands.

The operands resemble a language model's (see `make_problem`), so that low temperatures and kernels that skip small
probabilities meet here what they meet in training.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import record
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from aesl_trl.losses.definition import aesl_loss, aesl_weights
from aesl_trl.losses.head import HeadOutput, HeadSettings, _add_product, _product, _tile_rows, fused_head
from aesl_trl.losses.rules import (
    TokenRule,
    aesl_rule,
    dft_rule,
    eaft_rule,
    gem_rule,
    linear_rule,
    nll_rule,
    psft_rule,
    threshold_rule,
)


SHAPES = {  # name -> (hidden size, vocabulary)
    "Qwen2.5-0.5B": (896, 151936),
    "Qwen2.5-7B": (3584, 152064),
    "Llama-3.1-8B": (4096, 128256),
    "small": (512, 32768),
    "tiny": (64, 1000),
}
GPU_SHAPES = ["Qwen2.5-0.5B", "Qwen2.5-7B", "Llama-3.1-8B"]
ERROR_TOKENS = 1024  # the float64 definition holds several copies of the logits
TILE_ROWS = {"few": (1024, 2048, 4096), "all": (512, 1024, 1536, 2048, 3072, 4096)}  # what --tune tries on a GPU
TRL_OUTPUTS = ("log_probs", "entropy", "is_top1")  # what SFTTrainer asks for
DEFAULT_TRL = "TRL nll, default tiles"
RIVALS = {  # name -> rule
    "AESL, weight linear": linear_rule(),
    "AESL, weight threshold": threshold_rule(),
    "DFT": dft_rule(),
    "GEM": gem_rule(),
    "PSFT": psft_rule(),
    "EAFT": eaft_rule(),
}
# Relative difference of the loss and of the hidden states' gradient, as vectors: logits are near 20, which float32
# rounds and sums with an error of about 1e-5, while bf16 rounds it by up to 1/16, and its probability by as much
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


class Problem(NamedTuple):
    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H], requires a gradient where the head is trained
    labels: Tensor  # [N]
    autocast: bool  # products in bf16 of float32 operands

    @property
    def products(self) -> torch.dtype:
        return torch.bfloat16 if self.autocast else self.hidden.dtype

    @property
    def on_cpu(self) -> bool:
        return self.hidden.device.type == "cpu"

    def context(self):
        return torch.autocast(self.hidden.device.type, torch.bfloat16) if self.autocast else nullcontext()

    def first(self, tokens: int) -> "Problem":
        return self._replace(hidden=self.hidden[:tokens].detach().requires_grad_(), labels=self.labels[:tokens])


class Method(NamedTuple):
    name: str
    family: str | None  # whose losses and gradients must agree
    run: Callable[[Problem], Tensor | None]  # forward and backward; returns the loss
    is_peer: bool = False  # another package's: it may be missing or refuse the device


def make_problem(args: argparse.Namespace, shape: str, tokens: int, trained: bool) -> Problem:
    """Operands like a language model's, the same on each call.

    The bulk of a token's logits has a standard deviation of 2, four candidates rise to 24, and the label is drawn from
    the softmax: the mean nll is about 1, and a third of the labels has a probability above 0.9.
    """
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
    labels = [(part @ weight.t()).float().softmax(1).multinomial(1).squeeze(1) for part in hidden.split(256)]
    return Problem(hidden.requires_grad_(), weight.requires_grad_(trained), torch.cat(labels), args.autocast)


def bare_products(problem: Problem, with_sweep: bool = False) -> None:
    """Run the products alone, or also one read and one write of each tile: what a head of small width cannot avoid."""
    # As in the fused head: a CPU has no product of half-precision operands with a float32 result
    dtype = torch.float32 if problem.on_cpu else problem.products
    hidden, weight = problem.hidden.detach().to(dtype), problem.weight.detach().to(dtype)
    trained, vocab = problem.weight.requires_grad, weight.size(0)
    rows = _tile_rows(problem.weight, trained, vocab * (4 + 2 * (dtype.itemsize < 4)), problem.on_cpu)
    tile = hidden.new_empty(min(rows, len(hidden)), vocab)
    grad_hidden = torch.empty_like(hidden, dtype=torch.float32)
    grad_weight = torch.zeros_like(weight, dtype=torch.float32) if trained else None
    for part, out in zip(hidden.split(rows), grad_hidden.split(rows), strict=True):
        logits = tile[: len(part)]
        _product(part, weight.t(), out=logits)
        if with_sweep:
            logits.mul_(0.5)
        _product(logits, weight, out=out)
        if trained:
            _add_product(grad_weight, logits.t(), part)


def with_backward(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`forward(problem, ...)` under the problem's autocast, and its backward pass; returns the loss."""

    def run(problem: Problem, *arguments) -> Tensor:
        with problem.context():
            loss = forward(problem, *arguments)
        loss.backward()
        return loss.detach()

    return run


@with_backward
def one_pass(problem: Problem, rule: TokenRule, tile_dtype: torch.dtype, tile_rows: int | None = None) -> Tensor:
    return fused_scores(problem, rule, tile_dtype, tile_rows).loss_sum


def fused_scores(
    problem: Problem, rule: TokenRule, tile_dtype: torch.dtype, tile_rows: int | None = None
) -> HeadOutput:
    hidden, weight, labels, _ = problem
    settings = HeadSettings(tile_dtype=tile_dtype, tile_rows=tile_rows)
    return fused_head(hidden, weight, None, labels, torch.zeros_like(labels), rule, settings)


def trl_nll(problem: Problem, tiles: tuple[int, int] | None = None) -> Tensor:
    """As `add_fused_lm_head` calls it; `tiles` are (tokens, vocabulary entries), by default TRL's own."""
    from trl.kernels import chunked_logprob
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    rows, columns = tiles or (chunked_logprob.TOKEN_CHUNK_SIZE, _CHUNKED_LOGPROB_CHUNK_SIZE)

    def forward(problem: Problem) -> Tensor:
        hidden, weight, labels, _ = problem
        head = chunked_logprob.ChunkedLogProbFunction
        return -head.apply(hidden, weight, None, labels, 1.0, columns, None, 1.0, TRL_OUTPUTS)[0].sum()

    with patch.object(chunked_logprob, "TOKEN_CHUNK_SIZE", rows):
        return with_backward(forward)(problem)


@with_backward
def full_nll(problem: Problem) -> Tensor:
    """As transformers computes it."""
    logits = linear(problem.hidden, problem.weight)
    return cross_entropy(logits.float(), problem.labels, reduction="sum")


@with_backward
def full_aesl(problem: Problem) -> Tensor:
    logits = linear(problem.hidden, problem.weight)
    return aesl_loss(logits.unsqueeze(0), problem.labels.unsqueeze(0), num_items=1)


@with_backward
def liger_nll(problem: Problem) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    _refuse_cpu(problem)
    # dW is summed in float32, as everywhere here; Liger's own default is the weight's dtype
    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)
    return loss(problem.weight, problem.hidden, problem.labels)


@with_backward
def cut_cross_entropy_nll(problem: Problem) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    _refuse_cpu(problem)
    hidden, weight = problem.hidden.to(problem.products), problem.weight.to(problem.products)  # it ignores autocast
    return linear_cross_entropy(hidden, weight, problem.labels, reduction="sum", impl="cce")


def _refuse_cpu(problem: Problem) -> None:
    if problem.on_cpu:
        raise RuntimeError("it needs a GPU")


def our_name(loss: str, tile_dtype: torch.dtype = torch.float32) -> str:
    return f"{loss} in one pass, tile {_short(tile_dtype)}"


class Tuned(NamedTuple):
    """What `--tune` found to be the fastest for our head."""

    launches: dict  # of each kernel
    tile_rows: int


def tuned_aesl(problem: Problem, tuned: Tuned) -> Tensor:
    from aesl_trl.losses import head_triton  # on Linux alone

    with patch.dict(head_triton.LAUNCHES, tuned.launches):
        return one_pass(problem, aesl_rule(), torch.float32, tuned.tile_rows)


def methods_for(
    products: torch.dtype, tiles: tuple[int, int] | None, with_rivals: bool, tuned: Tuned | None = None
) -> list[Method]:
    """Return the methods in the order of the table; `tiles` are TRL's best, `None` where it does not run."""

    def ours(loss: str, rule: TokenRule, dtype: torch.dtype = torch.float32) -> Method:
        return Method(our_name(loss, dtype), loss.lower(), lambda problem: one_pass(problem, rule, dtype))

    best = [Method(best_name(tiles), "nll", partial(trl_nll, tiles=tiles), True)] if tiles else []
    return [
        Method("bare products", None, bare_products),
        Method("bare products, one read and write", None, partial(bare_products, with_sweep=True)),
        *(ours("AESL", aesl_rule(), dtype) for dtype in dict.fromkeys((torch.float32, products))),
        *([Method("AESL in one pass, tuned", "aesl", partial(tuned_aesl, tuned=tuned))] if tuned else []),
        ours("nll", nll_rule()),
        *(ours(loss, rule) for loss, rule in (RIVALS if with_rivals else {}).items()),
        *best,
        Method(DEFAULT_TRL, "nll", trl_nll, True),
        Method("full-logits nll", "nll", full_nll),
        Method("full-logits AESL, the definition", "aesl", full_aesl),
        Method("Liger nll", "nll", liger_nll, True),
        Method("cut-cross-entropy nll", "nll", cut_cross_entropy_nll, True),
    ]


def best_name(tiles: tuple[int, int]) -> str:
    return f"TRL nll, best tiles ({tiles[0]} x {tiles[1]})"


def best_tiles(problem: Problem) -> tuple[int, int] | None:
    """TRL's fastest tiles (tokens, vocabulary entries), the better of two runs each; `None` where it does not run."""
    if problem.on_cpu:
        problem, token_chunks, vocab_chunks = problem.first(1024), (128, 256, 512), (2048, 4096, 8192)
    else:
        token_chunks, vocab_chunks = (1024, 2048, 4096, 8192), (8192, 16384, 32768, 65536, problem.weight.size(0))
    times = {(rows, columns): [] for rows in token_chunks for columns in vocab_chunks}
    try:
        trl_nll(problem)
    except Exception:  # verify() tells why
        return None
    for _ in range(2):
        for tiles, seconds in times.items():
            seconds.append(measure(partial(trl_nll, tiles=tiles), problem)[0])
    return min(times, key=lambda tiles: min(times[tiles]))


def tune(args: argparse.Namespace, shape: str, head: str) -> tuple[Tuned, list[dict]]:
    """Return the fastest launches of the kernels and rows of a tile, and the tables of what was tried."""
    from tuning import tune as tune_launches  # it wants Triton, which is for Linux alone

    problem, vocab = make_problem(args, shape, args.tokens, head == "full"), SHAPES[shape][1]
    in_use = _tile_rows(problem.weight, head == "full", vocab * 6, problem.on_cpu)
    rows = min(len(problem.hidden), 8 if problem.on_cpu else in_use)  # interpreted on CPU
    launches, table = tune_launches(rows, vocab, problem.hidden.device.type, args.tune)
    seconds, peaks, others = {}, {}, (16, 32) if problem.on_cpu else TILE_ROWS[args.tune]
    for tile_rows in sorted({in_use, *others}):
        runs = [measure(partial(tuned_aesl, tuned=Tuned(launches, tile_rows)), problem) for _ in range(3)]
        seconds[tile_rows] = [time_s for time_s, _ in runs[1:]]  # the first one warms up
        peaks[tile_rows] = max(peak for _, peak in runs)
    medians = {tile_rows: statistics.median(own) for tile_rows, own in seconds.items()}
    memory = {tile_rows: peak / 2**20 if peak else None for tile_rows, peak in peaks.items()}
    cells = [[str(tile_rows), own / medians[in_use], memory[tile_rows]] for tile_rows, own in medians.items()]
    title = f"Rows of a tile, {head} head, {shape}; {in_use} are in use"
    of_rows = record.table(title, ["rows", "time to that in use", "peak MiB"], cells, {"rows_seconds": seconds})
    return Tuned(launches, min(medians, key=medians.get)), [table, of_rows]


def verify(methods: list[Method], problem: Problem) -> tuple[dict[str, str], dict[str, float]]:
    """Run each method once. Return by name why some are not timed, and how far off their family those are that are."""
    first, refusals, errors = {}, {}, {}
    for method in methods:
        clear(problem)
        try:
            loss = method.run(problem)
        except Exception as error:
            if not method.is_peer and not isinstance(error, torch.OutOfMemoryError):
                raise
            reason = str(error).strip() or type(error).__name__
            refusals[method.name] = f"not available: {reason.splitlines()[0]}"
            continue
        if method.family is not None:
            found = {"loss": loss.double(), "gradient": problem.hidden.grad.double()}
            expected = first.setdefault(method.family, found)
            for name, truth in expected.items():
                error = ((found[name] - truth).norm() / truth.norm()).item()
                if not error <= TOLERANCE[problem.products]:  # NaN disagrees too
                    refusals[method.name] = f"{name} is {error:.1e} off the first {method.family} method's"
                    errors[method.name] = error
    return refusals, errors


def clear(problem: Problem) -> None:
    problem.hidden.grad = problem.weight.grad = None


def measure(run: Callable[[Problem], Tensor | None], problem: Problem) -> tuple[float, int]:
    """Return the seconds of one forward and backward, and on GPU the bytes of its peak beyond what was there."""
    clear(problem)
    if problem.on_cpu:
        start = time.process_time()
        run(problem)
        return time.process_time() - start, 0
    torch.cuda.reset_peak_memory_stats()
    before, start, end = torch.cuda.memory_allocated(), *(torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run(problem)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000, torch.cuda.max_memory_allocated() - before


def print_peaks(args: argparse.Namespace) -> None:
    """In a fresh process on CPU: print the rise of the resident memory of each named method, in bytes."""
    shape, head, tiles, *names = args.peaks_of
    problem = make_problem(args, shape, args.tokens, head == "full")
    peaks = {}
    for method in methods_for(problem.products, json.loads(tiles), args.rivals):
        if method.name not in names:
            continue
        method.run(problem.first(16))  # loads the libraries' code
        clear(problem)
        before = record.reset_peak()
        method.run(problem)
        peaks[method.name] = record.resident_bytes("VmHWM") - before
        clear(problem)
    print(json.dumps(peaks))


def bench(args: argparse.Namespace, shape: str, head: str, tuned: Tuned | None, keep: Callable[[dict], None]) -> dict:
    """Return one table: each method's ratios and memory, or why it did not run. `keep` gets the table after a turn."""
    problem = make_problem(args, shape, args.tokens, head == "full")
    tiles = best_tiles(problem)
    methods = methods_for(problem.products, tiles, args.rivals, tuned)
    refusals, errors = verify(methods, problem)
    runs = {method.name: method.run for method in methods if method.name not in refusals}
    seconds, peaks = {name: [] for name in runs}, dict.fromkeys(runs, 0)
    raw = {"seconds": seconds, "peak_bytes": peaks, "refusals": refusals, "errors": errors}
    raw["tolerance"] = TOLERANCE[problem.products]
    hidden_size, vocab = SHAPES[shape]
    operands = f"{_short(problem.hidden.dtype)}{' under autocast' if args.autocast else ''}"
    title = (
        f"{head.capitalize()} head, {shape} (hidden size {hidden_size}, vocabulary {vocab}), {args.tokens} tokens, "
        f"{operands}, tiles of the peers in {_short(problem.products)}"
    )
    table_of = partial(make_table, title, raw, best_name(tiles) if tiles else None, problem.on_cpu)
    for _ in range(args.repeats):
        for name, run in runs.items():
            time_s, peak = measure(run, problem)
            seconds[name].append(time_s)
            peaks[name] = max(peaks[name], peak)
        keep(table_of())
    if problem.on_cpu and args.peaks:
        peaks |= record.in_fresh_process("--peaks-of", shape, head, json.dumps(tiles), *runs)
    return table_of()


def make_table(title: str, raw: dict, best: str | None, on_cpu: bool) -> dict:
    """Return the table of the ratios. A CPU's milliseconds say nothing of another's and stay among the raw values."""
    seconds = raw["seconds"]
    peers = {"to TRL, best tiles": best, "to TRL, default tiles": DEFAULT_TRL, "to our nll": our_name("nll")}
    peers = {column: peer for column, peer in peers.items() if peer in seconds}
    milliseconds = [] if on_cpu else ["ms"]
    rows = []
    for name, own in seconds.items():
        times = [1000 * statistics.median(own)] if milliseconds else []
        ratios = [record.ratio(own, seconds[peer]) for peer in peers.values()]
        peak = raw["peak_bytes"][name]
        rows.append([name, *times, *ratios, peak / 2**20 if peak else None])
    columns = ["forward and backward", *milliseconds, *peers, "peak MiB"]
    rows += [[f"{name}: {reason}", *[None] * (len(columns) - 1)] for name, reason in raw["refusals"].items()]
    return record.table(title, columns, rows, raw)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@torch.no_grad()
def errors(args: argparse.Namespace, shape: str) -> dict:
    """Return the table of |weight - float64 definition| by temperature and by dtype of the tile."""
    problem = make_problem(args, shape, min(args.tokens, ERROR_TOKENS), trained=False)
    logits, labels = problem.hidden.double() @ problem.weight.double().t(), problem.labels
    probs = logits.softmax(1).gather(1, labels.unsqueeze(1))
    title = (
        f"AESL weights, bf16 operands, {shape}, {len(labels)} tokens; "
        f"logits: standard deviation {logits.std():.1f}, largest {logits.max():.0f}; "
        f"labels: mean nll {-probs.log().mean():.2f}, {(probs > 0.9).double().mean():.0%} above probability 0.9"
    )
    rows = []
    fixed = {f"fixed at {t}": {"t_scaling": t, "prefix_mode": "none"} for t in (0.1, 0.3, 1.0, 3.0)}
    for name, setting in {**fixed, "of the inclusive prefix": {}}.items():
        truth = aesl_weights(logits.unsqueeze(0), labels.unsqueeze(0), **setting).squeeze(0)
        for dtype in (torch.float32, torch.bfloat16):
            off = (fused_scores(problem, aesl_rule(**setting), dtype).weights - truth).abs()
            figures = (off.median(), off.quantile(0.99), off.max(), truth.mean())
            rows.append([name, _short(dtype), *(figure.item() for figure in figures)])
    return record.table(title, ["temperature", "tile", "median", "99 %", "max", "mean weight"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), help="default: three models' on GPU, small on CPU")
    parser.add_argument("--tokens", type=int, help="default: 8192 on GPU, 2048 on CPU")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on GPU, float32 on CPU")
    parser.add_argument("--autocast", action="store_true", help="float32 operands under bf16 autocast")
    parser.add_argument("--head", choices=["full", "frozen", "both"], default="both")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--errors", action="store_true", help="the error of the AESL weights by tile dtype instead")
    parser.add_argument(
        "--tune",
        nargs="?",
        const="few",
        choices=["few", "all"],
        help="first find our fastest launches of kernels, rows of a tile",
    )
    parser.add_argument("--rivals", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--peaks", action=argparse.BooleanOptionalAction, default=True, help="on CPU: measure memory")
    parser.add_argument("--json", type=Path, metavar="FILE", help="record every time of every table")
    parser.add_argument("--peaks-of", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    on_cpu = args.device == "cpu"
    args.tokens = args.tokens or (2048 if on_cpu else 8192)
    args.dtype = args.dtype or ("float32" if on_cpu or args.autocast else "bfloat16")
    if args.autocast and args.dtype != "float32":
        parser.error("--autocast is for float32 operands")
    if args.peaks_of:
        print_peaks(args)
        return
    tables = []

    def keep(table: dict) -> None:  # a run that is ended keeps what it has
        record.write(args.json, "head", [*tables, table])

    for shape in args.shape or (["small"] if on_cpu else GPU_SHAPES):
        if args.errors:
            args.dtype = "bfloat16"
            tables.append(record.show(errors(args, shape)))
        else:
            for head in ("full", "frozen") if args.head == "both" else (args.head,):
                tuned, tried = tune(args, shape, head) if args.tune else (None, [])
                tables += map(record.show, tried)
                tables.append(record.show(bench(args, shape, head, tuned, keep)))
        record.write(args.json, "head", tables)


if __name__ == "__main__":
    main()
