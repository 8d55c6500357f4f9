"""How cost grows: CPU time and peak memory over the size of the work, with the exponent that a power law gives them.

    python scripts/bench/growth.py [--only TOPIC ...] [--quick] [--json FILE]

Each curve of CURVES runs made-up work at a few sizes (growth_work.py). The time is CPU seconds of this process and of
its children, since a shared machine takes turns; a size that takes less than a second is run three times, and the
median counts. The memory is how far the resident memory rises above what was there before the work.

The exponent is the slope of a straight line through the logarithms of the upper half of the sizes, at least three of
them, by least squares: 2 where twice the size costs four times as much. Beside it stands the bound, the exponent that
the work itself needs.
A constant part (starting, drawing a page) lowers the exponent of small sizes. An exponent above its bound, by more
than the noise of a shared machine, is a fault of ours. Costs that are too small to be told from noise are not judged.

The topics run one after the other, each in a fresh process. What is used for the first time is paid before.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import growth_work as work
import psutil
import record


SLACK = 0.2  # above its bound an exponent may lie by the noise of a shared machine
REPEATED_BELOW_S, REPEATS = 1.0, 3
LEAST_S, LEAST_BYTES = 0.05, 2**20  # below these a cost is noise


@dataclass(frozen=True)
class Curve:
    """One kind of work over one size. `start` takes a size and a folder, and returns the work."""

    what: str
    size: str
    sizes: tuple[int, ...]
    quick: tuple[int, ...]
    start: Callable[[int, Path], work.Work]
    bound: float = 1.0
    why: str = ""  # the bound is not 1


def _in_cells(start: Callable[[Path], work.Work]) -> Callable[[int, Path], work.Work]:
    """Take as many methods as make up the cells; the curves of one size share a folder."""
    return lambda cells, folder: start(
        work.comparison(cells // work.METHOD_CELLS, folder.parent / f"comparison-{cells}")
    )


CELLS, FEW_CELLS = (120, 250, 500, 1000), (20, 40)
CURVES: dict[str, list[Curve]] = {
    "head": [
        Curve(
            "head, forward and backward",
            "tokens",
            (1024, 4096, 16384, 65536),
            (1024, 2048, 4096),
            lambda n, _: work.head(n, 2048, 64),
        ),
        Curve(
            "head, forward and backward",
            "vocabulary",
            (32768, 65536, 131072, 262144),
            (4096, 8192, 16384),
            lambda n, _: work.head(work.TILE, n, 64),
        ),
        Curve(
            "head, forward and backward",
            "hidden size",
            (256, 512, 1024, 2048, 4096),
            (64, 128, 256),
            lambda n, _: work.head(work.TILE, 8192, n),
        ),
    ],
    "measurement": [
        Curve(
            "measurement",
            "prompts",
            (8, 32, 128, 512),
            (4, 8, 16),
            lambda n, folder: work.measurement(n, 4, 16, folder),
        ),
        Curve(
            "measurement",
            "samples",
            (4, 16, 64, 256),
            (4, 8, 16),
            lambda n, folder: work.measurement(8, n, 16, folder),
        ),
        Curve(
            "measurement",
            "tokens a sample",
            (16, 64, 256, 1024),
            (8, 16, 32),
            lambda n, folder: work.measurement(4, 4, n, folder),
            2.0,
            "each token attends to all before it",
        ),
        Curve(
            "figures of given samples", "prompts", (8, 32, 128, 512), (4, 8, 16), lambda n, _: work.figures(n, 8, 50)
        ),
        Curve(
            "figures of given samples", "samples", (4, 16, 64, 256), (4, 8, 16), lambda n, _: work.figures(8, n, 50)
        ),
        Curve(
            "figures of given samples",
            "words a sample",
            (50, 200, 800, 3200),
            (8, 16, 32),
            lambda n, _: work.figures(8, 8, n),
        ),
    ],
    "data": [
        Curve("aesl data", "rows", (1500, 6000, 24000, 46000), (200, 400), work.data),
        Curve(
            "finding benchmarks by share",
            "benchmark problems",
            (500, 1000, 2000, 4000),
            (50, 100, 200),
            lambda n, _: work.decontamination(n),
        ),
    ],
    "report": [
        Curve("aesl report", "runs", (1, 8, 40, 200), (1, 2), work.report_of_runs),
        Curve("aesl report", "seeds of a run", (1, 8, 40, 200), (1, 2), work.report_of_seeds),
        Curve("aesl report", "lines of a log", (100, 1000, 10000, 100000), (100, 200), work.report_of_lines),
    ],
    "compare": [
        Curve("aesl compare, the plan", "cells", CELLS, FEW_CELLS, _in_cells(work.compare_plan)),
        Curve("aesl compare, nothing left to run", "cells", CELLS, FEW_CELLS, _in_cells(work.compare_resume)),
        Curve("aesl compare, the table", "cells", CELLS, FEW_CELLS, _in_cells(work.compare_table)),
        Curve(
            "a comparison's statistics",
            "rows",
            (100, 200, 400, 800),
            (5, 10, 20),
            lambda n, _: work.statistics(n),
            1.17,
            "n log n: rows are ranked",
        ),
    ],
    "selection": [
        Curve("aesl select", "measurements", (100, 500, 2000, 10000), (20, 40, 80), work.selection),
        Curve(
            "asking after every measurement",
            "measurements",
            (100, 200, 400, 800),
            (10, 20, 40),
            lambda n, _: work.asking(n),
            2.0,
            "each time the whole series is fitted",
        ),
    ],
}


# ---- The exponent


def num_fitted(sizes: list[int]) -> int:
    """Return how many of the largest sizes an exponent is fitted to: the upper half, and at least three."""
    return min(len(sizes), max(3, math.ceil(len(sizes) / 2)))


def exponent(sizes: list[int], costs: list[float], least: float) -> float | None:
    """Return the slope of log(cost) over log(size) at the largest sizes, by least squares.

    The exponent is None where one of these costs is below `least`.
    """
    first = len(sizes) - num_fitted(sizes)
    if min(costs[first:]) < least:
        return None
    return statistics.linear_regression(
        *([math.log(each) for each in values[first:]] for values in (sizes, costs))
    ).slope


# ---- One topic, in a process of its own


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its children, those that have ended and those at work."""
    ended, children = os.times(), psutil.Process().children(recursive=True)
    at_work = [child.cpu_times() for child in children if child.is_running()]
    living = sum(times.user + times.system for times in at_work)
    return time.process_time() + ended.children_user + ended.children_system + living


def measured(start: Callable[[], work.Work]) -> tuple[float, int]:
    """Return the CPU seconds of one run of the work, and the bytes by which the resident memory rose."""
    task = start()
    with record.resident_rise() as rise:
        began = cpu_seconds()
        task()
        seconds = cpu_seconds() - began
    return seconds, max(0, rise[0])


def run_curve(curve: Curve, sizes: tuple[int, ...], folder: Path) -> dict:
    """Return the curve's seconds and bytes by size, after a run of the smallest that is not counted."""
    points: list[dict] = []
    measured(partial(curve.start, sizes[0], folder / "before"))
    for size in sizes:
        runs = [measured(partial(curve.start, size, folder / f"{size}-0"))]
        while runs[0][0] < REPEATED_BELOW_S and len(runs) < REPEATS:
            runs.append(measured(partial(curve.start, size, folder / f"{size}-{len(runs)}")))
        seconds, peaks = zip(*runs, strict=True)
        points.append({"size": size, "seconds": list(seconds), "peak_bytes": max(peaks)})
        print(f"{curve.what}, {size} {curve.size}: {statistics.median(seconds):.2f} s", file=sys.stderr, flush=True)
    return {"what": curve.what, "size": curve.size, "bound": curve.bound, "why": curve.why, "points": points}


def run_topic(topic: str, quick: bool) -> list[dict]:
    """Run the curves of a topic here. What the commands print goes to stderr."""
    with tempfile.TemporaryDirectory() as place, redirect_stdout(sys.stderr):
        os.environ["HF_DATASETS_CACHE"] = f"{place}/datasets"
        return [
            run_curve(curve, curve.quick if quick else curve.sizes, Path(place) / str(number))
            for number, curve in enumerate(CURVES[topic])
        ]


# ---- What it says


def judged(curve: dict) -> dict:
    """Return a curve with its exponents of time and memory."""
    sizes = [point["size"] for point in curve["points"]]
    seconds = [statistics.median(point["seconds"]) for point in curve["points"]]
    peaks = [point["peak_bytes"] for point in curve["points"]]
    found = {
        "time_exponent": exponent(sizes, seconds, LEAST_S),
        "memory_exponent": exponent(sizes, peaks, LEAST_BYTES),
    }
    return curve | found


def table_of(curves: list[dict]) -> dict:
    """Return the table: for each curve its sizes, exponents and bound. Seconds and bytes are among the raw values."""
    rows = []
    for curve in curves:
        sizes = [point["size"] for point in curve["points"]]
        bound = f"{curve['bound']:g}" + (f" ({curve['why']})" if curve["why"] else "")
        span = f"{sizes[0]:,} to {sizes[-1]:,}"
        peak = curve["points"][-1]["peak_bytes"] / 2**20
        exponents = curve["time_exponent"], curve["memory_exponent"]
        found = [None if value is None else f"{value:.2f}" for value in exponents]
        within = None if exponents[0] is None else "yes" if exponents[0] <= curve["bound"] + SLACK else "no"
        rows.append([curve["what"], curve["size"], span, found[0], bound, within, found[1], f"{peak:.0f}"])
    columns = ["work", "over", "sizes", "time ~ size^", "bound", "within", "memory ~ size^", "peak MiB, largest"]
    return record.table("How cost grows, on a CPU", columns, rows, curves)


def draw(curves: list[dict], path: Path) -> None:
    """Draw the curves, logarithmic: CPU time to that of the smallest size; dashed is the bound's slope from there."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = 4
    rows = math.ceil(len(curves) / columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(3.1 * columns, 2.5 * rows), squeeze=False)
    for ax, curve in zip(axes.flat, curves, strict=False):
        sizes = [point["size"] for point in curve["points"]]
        seconds = [statistics.median(point["seconds"]) for point in curve["points"]]
        ratios = [each / seconds[0] for each in seconds]
        ax.loglog(sizes, [(size / sizes[0]) ** curve["bound"] for size in sizes], "--", color="#9aa4af", linewidth=1)
        ax.loglog(sizes, ratios, "o-", color="#0067a5", markersize=4)
        found = "" if curve["time_exponent"] is None else f"{curve['time_exponent']:.2f}, bound {curve['bound']:g}"
        ax.set_title(f"{curve['what']}\n{found}", fontsize=8, loc="left")
        ax.set_xlabel(curve["size"], fontsize=8)
        ax.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=7)
        ax.set_xticks([], minor=True)
        ax.set_yticks([1, ratios[-1]], ["1", f"{ratios[-1]:.3g}"], fontsize=7)
        ax.set_yticks([], minor=True)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes.flat[len(curves) :]:
        ax.set_visible(False)
    for ax in axes[:, 0]:
        ax.set_ylabel("CPU time to the smallest", fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def bench(args: argparse.Namespace) -> dict:
    """Run the topics, draw the curves beside the record, and return the table."""
    found = {topic: list(map(judged, in_own_process(topic, args.quick))) for topic in args.only or CURVES}
    curves = with_recorded(found, args.json)
    if args.json:
        draw(curves, args.json.with_suffix(".png"))
    return table_of(curves)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CURVES), metavar="TOPIC", help=f"of {', '.join(CURVES)}")
    parser.add_argument("--quick", action="store_true", help="small sizes: about a minute")
    beside = "record every value, and draw FILE's .png; topics that are not run stay as recorded"
    parser.add_argument("--json", type=Path, metavar="FILE", help=beside)
    parser.add_argument("--in_here", choices=list(CURVES), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.in_here:
        print(json.dumps(run_topic(args.in_here, args.quick)))
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # of the topics' processes, and what the record says
    record.write(args.json, "growth", [record.show(bench(args))])


def with_recorded(found: dict[str, list[dict]], path: Path | None) -> list[dict]:
    """Return the curves of all topics in order: those just `found`, and of other topics those recorded in `path`.

    Recorded curves are judged again, so that one rule gives all exponents of the table.
    """
    recorded = json.loads(path.read_text(encoding="utf-8"))["tables"][0]["raw"] if path and path.is_file() else []
    of_topic = {
        topic: found.get(topic) or [judged(each) for each in recorded if each["topic"] == topic] for topic in CURVES
    }
    return [curve | {"topic": topic} for topic, curves in of_topic.items() for curve in curves]


def in_own_process(topic: str, quick: bool) -> list[dict]:
    """Return a topic's curves from a process with one thread and an allocator that gives freed memory back."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "MALLOC_MMAP_THRESHOLD_": str(2**20),
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    command = [sys.executable, __file__, "--in_here", topic, *(["--quick"] if quick else [])]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(result.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
