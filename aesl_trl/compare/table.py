"""The statistics of a comparison: finished cells -> means, intervals, paired differences, rank correlations.

Nothing here reads files or imports torch. The unit is the seed: a seed changes demonstrations, their order, RL's
problems and all sampling, and problems inside a seed are averaged. Intervals over seeds are Student's t at 95 %,

    mean ± t(0.975, n - 1) * s / sqrt(n)        s: standard deviation with n - 1 in its denominator

two-sided, as narrow as few seeds allow, not clipped to [0, 1], and not adjusted for the number of rows compared.
"""

import math
import statistics
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..diversity.intervals import LEVEL, spearman, spearman_interval, t_quantile
from ..errors import InputError, nearest


MAX_SEEDS = 1000  # beyond it a difference counts as one that no number of seeds would decide
SIGNAL = "groups_mixed"


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Return mean, ends of the interval (low, high), sd and n of one value a seed.

    Below two seeds low, high and sd are None, and without a seed the mean too.
    """
    n = len(values)
    mean = statistics.fmean(values) if n else None
    if n < 2:
        return {"mean": mean, "low": None, "high": None, "sd": None, "n": n}
    sd = statistics.stdev(values)
    half = t_quantile(n - 1) * sd / math.sqrt(n)
    return {"mean": mean, "low": mean - half, "high": mean + half, "sd": sd, "n": n}


def seeds_to_decide(mean: float, sd: float) -> int | None:
    """Return the smallest n at which the t interval of the paired difference would exclude zero,

        t(0.975, n - 1) * sd / sqrt(n) < |mean|

    if mean and standard deviation stayed as they are now. At that n about half of all repetitions find a difference of
    this size. So n is the least that makes sense, and no plan with 80 % power. The result is None where the difference
    is zero, or where it would take more than [`MAX_SEEDS`] seeds.
    """

    def decides(n: int) -> bool:
        return t_quantile(n - 1) * sd / math.sqrt(n) < abs(mean)

    n = bisect_left(range(2, MAX_SEEDS + 1), True, key=decides) + 2  # the left side falls with n
    return n if n <= MAX_SEEDS else None


def paired(values: dict[int, float], reference: dict[int, float]) -> dict[str, Any]:
    """Return the [`summary`] of `values - reference` over the seeds that both have, and whether it excludes zero.

    Seeds are paired because they share demonstrations and RL's problems: what a seed does to both drops out.
    `decided` and `seeds_to_decide` are None below two seeds.
    """
    seeds = sorted(values.keys() & reference.keys())
    found = summary([values[seed] - reference[seed] for seed in seeds])
    known = found["sd"] is not None
    decided = (found["low"] > 0 or found["high"] < 0) if known else None
    needed = seeds_to_decide(found["mean"], found["sd"]) if known else None
    return {**found, "seeds": seeds, "decided": decided, "seeds_to_decide": needed}


def figure_names(cells: Iterable[dict]) -> tuple[str, ...]:
    """Return pass@1, the largest pass@k of every cell, entropy, self-BLEU and the share of groups with signal."""
    known = [set(cell[when]) for cell in cells for when in ("before", "after")]
    shared = set.intersection(*known) if known else set()
    powers = [name for name in shared if name.startswith("pass@") and name[5:].isdigit()]
    largest = max(powers, key=lambda name: int(name[5:]), default="pass@1")
    return tuple(dict.fromkeys(("pass@1", largest, "entropy", "self_bleu", SIGNAL)))


def table(cells: Sequence[dict], rows: Sequence[dict], *, reference: Sequence[str], metric: str) -> dict[str, Any]:
    """Return the part of compare.json that holds the statistics.

    Args:
        cells: records of the finished cells ([`~aesl_trl.compare.cells.Cell.record`]).
        rows: the rows in order, each with `row`, `setting`, `method`, `selection`, and `name` (without its setting).
        reference: names of the rows to which we take paired differences, each inside its own setting.
        metric: the figure after RL that counts. Its correlation with itself before RL tells what it is worth to choose
            the start with the best score.

    Raises:
        InputError: no cell has the figure `metric`.
    """
    options = {name for cell in cells for name in cell["after"]}
    if cells and metric not in options:
        raise InputError(f"metric: no finished cell has {metric!r}{nearest(metric, options)}")
    figures = tuple(dict.fromkeys((*figure_names(cells), metric)))
    by_row = {row["row"]: [cell for cell in cells if cell["row"] == row["row"]] for row in rows}
    return {
        "metric": metric,
        "level": LEVEL,
        "figures": list(figures),
        "rows": [_row(row, rows, by_row, figures, reference) for row in rows],
        "correlations": correlations(cells, figures, metric),
    }


def _row(row: dict, rows: Sequence[dict], by_row: dict[str, list[dict]], figures, reference) -> dict[str, Any]:
    mine = by_row[row["row"]]
    others = {other["name"]: other["row"] for other in rows if other["setting"] == row["setting"]}
    found = {**row, "seeds": [cell["seed"] for cell in mine], "steps": [cell["step"] for cell in mine]}
    for when in ("before", "after"):
        found[when] = {name: summary(list(_by_seed(mine, when, name).values())) for name in figures}
    found["differences"] = {}
    for name in reference:
        if name in others and name != row["name"]:
            theirs = by_row[others[name]]
            found["differences"][name] = {
                when: {key: paired(_by_seed(mine, when, key), _by_seed(theirs, when, key)) for key in figures}
                for when in ("before", "after")
            }
    return found


def _by_seed(cells: Sequence[dict], when: str, name: str) -> dict[int, float]:
    values = {cell["seed"]: cell[when].get(name) for cell in cells}
    return {seed: value for seed, value in values.items() if value is not None}


def correlations(cells: Sequence[dict], names: Sequence[str], metric: str) -> list[dict[str, Any]]:
    """Return the rank correlation, over runs, of each figure before RL with `metric` after it, and its interval."""
    found, cells = [], distinct_runs(cells)
    for name in names:
        by_row: dict[str, list[tuple[float, float]]] = {}
        for cell in cells:
            point = (cell["before"].get(name), cell["after"].get(metric))
            if None not in point:
                by_row.setdefault(cell["row"], []).append(point)
        points = [point for row in by_row.values() for point in row]
        rho = spearman(*zip(*points, strict=True)) if points else math.nan
        low, high = spearman_interval(list(by_row.values()))
        found.append({"figure": name, "rho": rho, "low": low, "high": high, "cells": len(points), "rows": len(by_row)})
    return found


def distinct_runs(cells: Sequence[dict]) -> list[dict]:
    """Return the cells without those that are the same run: a selection that came to the step of an earlier cell."""
    found: dict[Any, dict] = {}
    for cell in cells:
        start = cell["step"] if cell["selection"] is not None else None
        key = (cell["setting"], cell["method"], cell.get("point"), cell["seed"], start)
        found.setdefault(key, cell)
    return list(found.values())


def tuned(
    cells: Sequence[dict], points: Sequence[str], seeds: Sequence[int], key: Callable[[dict], float | None]
) -> tuple[str | None, list[dict[str, Any]]]:
    """Return the point with the highest mean of `key` over the tuning seeds, and each point's figures.

    A point of which a seed failed cannot win: its other seeds would flatter it. Of equal means the first in the grid
    wins. The point is None where every point lacks a seed.
    """
    found = []
    for point in points:
        values = {cell["seed"]: key(cell) for cell in cells if cell["point"] == point}
        known = [values[seed] for seed in seeds if values.get(seed) is not None]
        found.append({"point": point, "values": known, "mean": statistics.fmean(known) if known else None})
    whole = [item for item in found if len(item["values"]) == len(seeds)]
    best = max(whole, key=lambda item: item["mean"], default=None)
    return (best["point"] if best else None), found
