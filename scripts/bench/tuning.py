"""Time the two kernels of the head by launch: block, warps and stages. `head.py --tune` calls this.

Each kernel reads a tile of float32 logits `[n, V]` as in training; the second one also writes the gradient in bf16. A
launch counts only if it gives what the launch in use gives. The table shows each time as a share of that launch's.
`few` takes one launch of each block and number of warps, `all` tries more stages too.

What the candidates are chosen by, for an H200 (132 multiprocessors, 4.8 TB/s): at a latency of about 1 us a
multiprocessor needs some 36 KB under way all the time. Registers decide how many programs share it. Compiled for
Hopper with one stage, the statistics take 48 registers a thread where a thread has 8 entries of a block, and 96 to 110
where it has 16; the second kernel takes 32 to 40, and 56 to 64. Rows come in waves: 1,024 are one wave of 8 programs a
multiprocessor, and one and a half of 5. With one stage nothing is under way while a block is summed; each further one
keeps a block more on the way, in shared memory.
"""

import statistics
import time
from types import SimpleNamespace
from typing import Any

import record
import torch
from torch import Tensor
from triton.runtime.errors import TritonError

from aesl_trl.losses import head_triton
from aesl_trl.losses.head import LogitTransform
from aesl_trl.losses.head_triton import LAUNCHES, Launch


SHAPES = ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (4096, 16), (8192, 16))  # block, warps
GPU_CANDIDATES = {
    "few": [Launch(block, warps, 2) for block, warps in SHAPES],
    "all": [Launch(block, warps, stages) for block, warps in SHAPES for stages in (1, 2, 3)],
}
CPU_CANDIDATES = [Launch(128, 4, 1), Launch(128, 4, 2)]  # interpreted, to show that the script runs
TIMES, LAUNCHES_A_TIME = {"cuda": 5, "cpu": 1}, {"cuda": 10, "cpu": 1}
# Norm of the difference to that of the truth. The launches sum float32 in other orders, which moves it by about 1e-6;
# of so few bf16 entries does the last bit turn that their norm moves by some 1e-4
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-4}


def make_arguments(rows: int, vocab: int, device: str) -> tuple[Tensor, Tensor, Any]:
    """Return a tile of logits, room for its gradient, and vectors as the head keeps them for the tile's tokens."""
    torch.manual_seed(0)
    with torch.device(device):
        tile = 2 * torch.randn(rows, vocab)
        names = ("max", "log_sum_exp", "log_probs", "entropy", "rest")
        vectors = {name: torch.zeros(rows) for name in names}
        vectors |= {"is_top1": torch.zeros(rows, dtype=torch.bool), "temperatures": torch.full((rows,), 0.7)}
        tokens = SimpleNamespace(labels=torch.randint(vocab, (rows,)), **vectors)
        return tile, torch.empty(rows, vocab, dtype=torch.bfloat16), tokens


def run(kernel: str, launch: Launch, tile: Tensor, gradient: Tensor, tokens) -> None:
    """Run a kernel once with a launch."""
    before, LAUNCHES[kernel] = LAUNCHES[kernel], launch
    everything, transform = slice(0, len(tile)), LogitTransform()
    try:
        if kernel == "statistics":
            head_triton.statistics(tile, tokens, everything, transform)
        else:
            head_triton.rest_and_gradient(tile, gradient, tokens, everything, transform)
    finally:
        LAUNCHES[kernel] = before


def filled(kernel: str, gradient: Tensor, tokens) -> dict[str, Tensor]:
    """Return what a kernel has filled, by name, as a copy."""
    if kernel == "statistics":
        return {name: getattr(tokens, name).clone() for name in ("max", "log_sum_exp", "log_probs", "entropy")}
    # The labels' entries are near -1 and all others near 0: in one norm they would hide an error of the others
    labels = tokens.labels.unsqueeze(1)
    others = gradient.scatter(1, labels, 0)
    return {"rest": tokens.rest.clone(), "labels' gradient": gradient.gather(1, labels), "others' gradient": others}


def seconds_of(kernel: str, launch: Launch, *arguments) -> list[float]:
    """Return the seconds of a launch, several times."""
    device, found = arguments[0].device.type, []
    for _ in range(TIMES[device]):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(LAUNCHES_A_TIME[device]):
            run(kernel, launch, *arguments)
        synchronize(device)
        found.append((time.perf_counter() - start) / LAUNCHES_A_TIME[device])
    return found


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def refuse_other_numbers(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, truth in expected.items():
        error = ((found[name].float() - truth.float()).norm() / truth.float().norm()).item()
        if not error <= TOLERANCE[truth.dtype]:  # NaN disagrees too
            raise ValueError(f"{name}: {error:.1e} off the launch in use")


def tune(rows: int, vocab: int, device: str, candidates: str = "few") -> tuple[dict[str, Launch], dict]:
    """Return the fastest launch of each kernel, and the table of all of them."""
    _, gradient, tokens = arguments = make_arguments(rows, vocab, device)
    launches = GPU_CANDIDATES[candidates] if device == "cuda" else CPU_CANDIDATES
    seconds, refusals = {kernel: {} for kernel in LAUNCHES}, {}
    for kernel, in_use in LAUNCHES.items():  # the statistics come first: the second kernel reads them
        run(kernel, in_use, *arguments)
        expected = filled(kernel, gradient, tokens)
        for launch in dict.fromkeys((in_use, *launches)):
            try:
                run(kernel, launch, *arguments)
                refuse_other_numbers(filled(kernel, gradient, tokens), expected)
            except (TritonError, ValueError) as error:  # too large for this GPU, or wrong there
                refusals[f"{kernel} {name_of(launch)}"] = str(error).strip().splitlines()[0]
                continue
            seconds[kernel][launch] = seconds_of(kernel, launch, *arguments)
        run(kernel, in_use, *arguments)  # the last candidate may have been wrong
    medians = {
        kernel: {launch: statistics.median(own) for launch, own in of.items()} for kernel, of in seconds.items()
    }
    best = {kernel: min(of, key=of.get) for kernel, of in medians.items()}
    title = f"Launches of the kernels, {rows} rows x {vocab}; {describe(best)}"
    rows = share_rows(medians) + [[f"{name}: {reason}", None, None] for name, reason in refusals.items()]
    return best, record.table(title, ["block x warps x stages", *LAUNCHES], rows, raw(seconds, refusals))


def describe(launches: dict[str, Launch]) -> str:
    return "best: " + ", ".join(f"{kernel} {name_of(launch)}" for kernel, launch in launches.items())


def name_of(launch: Launch) -> str:
    return " x ".join(map(str, launch))


def share_rows(medians: dict[str, dict[Launch, float]]) -> list[list]:
    """Return a row for each launch: its time to that of the launch in use, by kernel; None where it does not run."""
    launches = dict.fromkeys(launch for of in medians.values() for launch in of)
    shares = {
        kernel: {launch: own / of[LAUNCHES[kernel]] for launch, own in of.items()} for kernel, of in medians.items()
    }
    return [[name_of(launch), *(shares[kernel].get(launch) for kernel in LAUNCHES)] for launch in launches]


def raw(seconds: dict[str, dict[Launch, list[float]]], refusals: dict[str, str]) -> dict:
    times = {kernel: {name_of(launch): own for launch, own in of.items()} for kernel, of in seconds.items()}
    return {"launch_seconds": times, "refusals": refusals}
