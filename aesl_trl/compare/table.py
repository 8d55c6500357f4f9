"""The statistics of a comparison: finished cells -> means, intervals, differences, p values, rank correlations.

Nothing here reads files or imports torch. The unit is the start: a seed, or a base and a seed where there are several
base models. A seed changes demonstrations, their order, RL's problems and all sampling. Problems inside a start are
averaged, and so are the RL runs from it. Intervals over starts are Student's t at 95 %,

    mean ± t(0.975, n - 1) * s / sqrt(n)        s: standard deviation with n - 1 in its denominator

two-sided, as narrow as few starts allow. Those of shares are taken on the scale of log-odds and stay inside [0, 1].
"""

import math
import re
import statistics
from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import PurePath
from typing import Any

from ..diversity.intervals import (
    LEVEL,
    holm,
    permutation_p,
    share_interval,
    spearman,
    spearman_interval,
    t_probability,
    t_quantile,
)
from ..errors import InputError, nearest


MAX_SEEDS = 1000  # beyond it a difference counts as one that no number of seeds would decide
SIGNAL = "groups_mixed"
OF_VALUE = re.compile(r"pass@1\[.+\]")  # with count_by, on the problems of one value
MAX_VALUES = 4  # in the tables; compare.json has the figures of more
TIMES = ("before", "after")  # RL
# The figures that are shares, in [0, 1]; the others are nats, counts and rewards
SHARES = re.compile(r"(pass|avg|maj)@.*|groups_.*|self_bleu|distinct_\d|unique|truncated|eos_prob|no_answer")


def summary(values: Sequence[float], *, is_share: bool = False) -> dict[str, Any]:
    """Return mean, ends of the interval (low, high), sd and n of one value a start.

    Below two starts low, high and sd are None, and without a start the mean too. The interval of a share is that of
    [`share_interval`].
    """
    n = len(values)
    mean = statistics.fmean(values) if n else None
    if n < 2:
        return {"mean": mean, "low": None, "high": None, "sd": None, "n": n}
    sd = statistics.stdev(values)
    error = sd / math.sqrt(n)
    half = t_quantile(n - 1) * error
    low, high = share_interval(mean, error, n - 1) if is_share else (mean - half, mean + half)
    return {"mean": mean, "low": low, "high": high, "sd": sd, "n": n}


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


def paired(values: dict[Hashable, float], reference: dict[Hashable, float]) -> dict[str, Any]:
    """Return the [`summary`] of `values - reference` over the starts that both have, and whether it excludes zero.

    Starts are paired because they share base, demonstrations and RL's problems: what these do to both drops out. `p`
    is that of the paired t test, below 0.05 where the interval excludes zero. `decided`, `p` and `seeds_to_decide` are
    None below two starts. `p` is None as well where every difference is zero: these are the same runs.
    """
    starts = sorted(values.keys() & reference.keys())
    found = summary([values[start] - reference[start] for start in starts])
    mean, sd = found["mean"], found["sd"]
    known = sd is not None
    decided = (found["low"] > 0 or found["high"] < 0) if known else None
    needed = seeds_to_decide(mean, sd) if known else None
    p = None
    if known and (mean or sd):
        t = math.inf if sd == 0 else abs(mean) / (sd / math.sqrt(len(starts)))
        p = max(0.0, 1 - t_probability(t, len(starts) - 1))
    return {**found, "seeds": starts, "decided": decided, "p": p, "seeds_to_decide": needed}


def starts_of(cells: Sequence[dict]) -> list[dict]:
    """Return one record a row and start, its figures the means over the RL runs from it, with their number `runs`."""
    by_start: dict[tuple, list[dict]] = {}
    for cell in cells:
        by_start.setdefault((cell["row"], cell.get("base", ""), cell["seed"]), []).append(cell)
    return [
        {
            **{**of[0], "runs": len(of), "folders": [_source(cell) for cell in of]},
            **{when: _means([cell[when] for cell in of]) for when in TIMES},
        }
        for of in by_start.values()
    ]


def _source(cell: dict) -> str:
    """Return the folder in which the cell's RL was run, as [`~aesl_trl.compare.cells.source`] finds it."""
    home = PurePath(cell["folder"])
    return str(home if cell["same_as"] is None else home.parent.parent / cell["same_as"] / home.name)


def _start(cell: dict) -> Any:
    """Return what RL started from: a step or an average; None without a cold start."""
    return None if cell["selection"] is None else cell.get("start", cell["step"])


def _means(figures: Sequence[dict[str, float | None]]) -> dict[str, float]:
    known = {name: [each[name] for each in figures if each.get(name) is not None] for name in figures[0]}
    return {name: statistics.fmean(values) for name, values in known.items() if values}


def rl_noise(cells: Sequence[dict], name: str) -> dict[str, Any]:
    """Return the sd of RL runs from one start, pooled over the starts of a row, and its degrees of freedom.

    It is RL's own chance: the runs share the model that they start from, and differ in RL's seed. A selection may
    measure anew: runs for which it came to another step are apart. None without a start that has two runs.
    """
    by_start: dict[tuple, list[float]] = {}
    for cell in cells:
        if cell["after"].get(name) is not None:
            place = (cell.get("base", ""), cell["seed"], _start(cell))
            by_start.setdefault(place, []).append(cell["after"][name])
    repeated = [values for values in by_start.values() if len(values) > 1]
    df = sum(len(values) - 1 for values in repeated)
    squares = sum(statistics.variance(values) * (len(values) - 1) for values in repeated)
    return {"sd": math.sqrt(squares / df) if df else None, "df": df}


def counted(cells: Sequence[dict]) -> str | None:
    """Return the column whose values the evaluations of all cells count as solved; None where they count problems."""
    columns = {cell.get("count_by") if "solved_of" in cell["after"] else None for cell in cells}
    return columns.pop() if len(columns) == 1 else None


def solved(cells: Sequence[dict], by: str | None = None) -> dict[str, Any] | None:
    """Return, over all runs, the problems with every sample `right` after RL, those `mixed`, and how many are graded.

    Where the whole table counts the values of a column, `by`, these stand in place of the problems.
    None where a run does not say how many problems it was evaluated on (benchmarks, and records of older versions).
    """
    if cells and by is not None:
        right, of = (sum(round(cell["after"][name]) for cell in cells) for name in ("solved", "solved_of"))
        return {"right": right, "mixed": 0, "of": of, "by": by}
    if not cells or not all(cell.get("problems") and "groups_all_right" in cell["after"] for cell in cells):
        return None
    graded = [cell["problems"] - cell["after"].get("problems_not_graded", 0) for cell in cells]
    right, mixed = (
        sum(round(cell["after"][name] * of) for cell, of in zip(cells, graded, strict=True))
        for name in ("groups_all_right", SIGNAL)
    )
    return {"right": right, "mixed": mixed, "of": sum(graded), "by": None}


def figure_names(cells: Iterable[dict]) -> tuple[str, ...]:
    """Return pass@1, the largest pass@k of every cell, entropy, self-BLEU and the share of mixed groups.

    Where the evaluations count by a column of few values (`MAX_VALUES`), pass@1 of each of them comes last.
    """
    known = [set(cell[when]) for cell in cells for when in TIMES]
    shared = set.intersection(*known) if known else set()
    powers = [name for name in shared if name.startswith("pass@") and name[5:].isdigit()]
    largest = max(powers, key=lambda name: int(name[5:]), default="pass@1")
    of_values = sorted(filter(OF_VALUE.fullmatch, shared))
    of_values = of_values if len(of_values) <= MAX_VALUES else []
    return tuple(dict.fromkeys(("pass@1", largest, "entropy", "self_bleu", SIGNAL, *of_values)))


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
    starts = starts_of(cells)
    figures = tuple(dict.fromkeys((*figure_names(starts), metric)))
    by_row, cells_of = _by_row(starts, rows), _by_row(cells, rows)
    in_setting: dict[str, dict[str, str]] = {}  # its rows by name
    for row in rows:
        in_setting.setdefault(row["setting"], {})[row["name"]] = row["row"]
    found = [_row(row, in_setting[row["setting"]], by_row, figures, reference, metric) for row in rows]
    by = counted(cells)
    for row in found:
        mine = cells_of[row["row"]]
        row |= {"rl_noise": rl_noise(mine, metric), "solved": solved(mine, by)}
    for name in reference:
        others = [row for row in found if name in row["differences"]]
        _adjust([(_folders(by_row[row["row"]]), row["differences"][name]["after"][metric]) for row in others])
    return {
        "metric": metric,
        "level": LEVEL,
        "figures": list(figures),
        "rows": found,
        "correlations": correlations(starts, figures, metric),
    }


def _by_row(items: Sequence[dict], rows: Sequence[dict]) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {row["row"]: [] for row in rows}
    for item in items:
        found.setdefault(item["row"], []).append(item)
    return found


def _row(
    row: dict, others: dict[str, str], by_row: dict[str, list[dict]], figures, reference, metric
) -> dict[str, Any]:
    """Return a row's statistics; `others` are the rows of its setting by name."""
    mine = by_row[row["row"]]
    found = {**row, **{f"{key}s": [start[key] for start in mine] for key in ("seed", "step")}}
    found["runs"] = [start["runs"] for start in mine]
    for when in TIMES:
        found[when] = {
            name: summary(list(_by_start(mine, when, name).values()), is_share=bool(SHARES.fullmatch(name)))
            for name in figures
        }
    of_base = _by_base(mine, metric)
    found["bases"] = {
        base: summary(values, is_share=bool(SHARES.fullmatch(metric))) for base, values in of_base.items()
    }
    found["differences"] = {}
    for name in reference:
        if name in others and name != row["name"]:
            theirs = by_row[others[name]]
            found["differences"][name] = {
                when: {key: paired(_by_start(mine, when, key), _by_start(theirs, when, key)) for key in figures}
                for when in TIMES
            }
            difference = found["differences"][name]["after"][metric]
            ours, of_reference = (
                _by_base([start for start in side if _key(start) in difference["seeds"]], metric)
                for side in (mine, theirs)
            )
            is_other = _folders(mine) != _folders(theirs)
            strata = [(values, of_reference[base]) for base, values in ours.items()]
            difference["permutation_p"] = permutation_p(strata) if is_other else None
    return found


def _folders(starts: Sequence[dict]) -> frozenset[str]:
    """Return the folders in which the runs of a row lie: rows with the same ones are the same runs."""
    return frozenset(folder for start in starts for folder in start["folders"])


def _adjust(contrasts: Sequence[tuple[Hashable, dict[str, Any]]]) -> None:
    """Add Holm's adjusted p values to the differences to one reference, which are one family.

    Each comes with what its row's runs are known by. Rows that are the same runs count once, and a row that is the
    reference's runs has no p and does not count.
    """
    for key in ("p", "permutation_p"):
        family = {runs: each[key] for runs, each in contrasts if each[key] is not None}
        adjusted = dict(zip(family, holm(list(family.values())), strict=True))
        for runs, each in contrasts:
            each[f"{key}_holm"] = adjusted.get(runs)


def _by_start(starts: Sequence[dict], when: str, name: str) -> dict[Hashable, float]:
    """Return a figure by seed, or by base and seed where there are several bases."""
    return {_key(start): start[when][name] for start in starts if start[when].get(name) is not None}


def _key(start: dict) -> Hashable:
    return (start["base"], start["seed"]) if start.get("base") else start["seed"]


def _by_base(starts: Sequence[dict], metric: str) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for start in starts:
        if start["after"].get(metric) is not None:
            found.setdefault(start.get("base", ""), []).append(start["after"][metric])
    return found


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
        place = (cell.get("base"), cell["setting"], cell["method"], cell.get("point"))
        found.setdefault((*place, cell["seed"], cell.get("run"), _start(cell)), cell)
    return list(found.values())


def tuned(
    cells: Sequence[dict], points: Sequence[str], seeds: Sequence[int], key: Callable[[dict], float | None]
) -> tuple[str | None, list[dict[str, Any]]]:
    """Return the point with the highest mean of `key` over the tuning seeds, and each point's figures.

    A point of which a seed failed cannot win: its other seeds would flatter it. Of equal means the first in the grid
    wins. The point is None where every point lacks a seed.
    """
    by_point: dict[str, dict[int, float | None]] = {point: {} for point in points}
    for cell in cells:
        by_point.setdefault(cell["point"], {})[cell["seed"]] = key(cell)
    found = []
    for point in points:
        values = by_point[point]
        known = [values[seed] for seed in seeds if values.get(seed) is not None]
        found.append({"point": point, "values": known, "mean": statistics.fmean(known) if known else None})
    whole = [item for item in found if len(item["values"]) == len(seeds)]
    best = max(whole, key=lambda item: item["mean"], default=None)
    return (best["point"] if best else None), found
