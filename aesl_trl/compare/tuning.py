"""Which points of a grid are tried on which tuning seed, and which of them wins.

Every point of a row is tried on the first of `tune.seeds`. With `tune.keep` only that many of the best points go on to
the next seed, and so on (successive halving, arXiv 1502.07943): the seeds are spent where the choice is close. Every
grid has the same number of points. The cells' folders say which of them are finished.

Where the best point of a row has the lowest or the highest of the learning rates that were tried beside its other
values, a rate beyond is tried on every tuning seed, at most `tune.extend` times.
"""

import math
from collections.abc import Iterator
from typing import Any

from .cells import Cell, failure, has_ended, rows
from .config import RATE, CompareConfig, Point
from .table import tuned


class Results(dict[Cell, dict[str, Any]]):
    """What the finished cells' evaluations say, each read once for one decision, however often it is asked for.

    The next decision takes new ones: a cell whose config has changed is run again in between.
    """

    def of(self, cell: Cell) -> dict[str, Any] | None:
        """Return the point, the seed and the figures after RL of a cell; None before its end."""
        if cell not in self and has_ended(cell.home):
            self[cell] = {"point": str(cell.point), "seed": cell.seed, "after": cell.evaluation()["after"]}
        return self.get(cell)


def rounds(config: CompareConfig) -> Iterator[list[Cell]]:
    """Yield the cells of one round after the other. A round is known once the round before it has ended."""
    if config.tune is None:
        return
    if config.tune.keep is None:
        yield _seed_by_seed([_of_grid(config, row, Results()) for row in rows(config)])
    else:
        for number in range(len(config.tune.seeds)):
            results = Results()
            known = [_known(config, row, results) for row in rows(config)]
            yield [cell for by_seed in known for cells in by_seed[number : number + 1] for cell in cells]
    for _ in range(config.tune.extend):
        results = Results()
        yield [cell for row in rows(config) for cell in _added(config, row, results)]


def planned(config: CompareConfig) -> list[Cell]:
    """Return every tuning cell, those of added points last.

    A row whose best is not known yet counts as one whose grid is extended as often as it may be.
    """
    if config.tune is None:
        return []
    results = Results()
    added = [cell for row in rows(config) for cell in _added(config, row, results, assume=True)]
    return _seed_by_seed([_of_grid(config, row, results) for row in rows(config)]) + added


def choose(config: CompareConfig) -> tuple[dict[str, Point], list[dict[str, Any]]]:
    """Return the point of each row whose tuning cells have all finished or failed, and the tuning's table.

    `edge` in a line says that the chosen point has the "lowest" or "highest" of the learning rates tried beside its
    other values: a better one may lie beyond.
    """
    chosen, lines, results = {}, [], Results()
    for row in rows(config) if config.tune else []:
        grid, added = config.points(row["method"]), _added(config, row, results)
        cells = [*_seed_by_seed([_of_grid(config, row, results)]), *added]
        if not cells:
            continue
        points = {str(point): point for point in [*grid, *(cell.point for cell in added)]}
        best, figures, finished = _judged(config, cells, list(points), config.tune.seeds, results)
        line = {"row": row["row"], "chosen": best, "finished": finished, "cells": len(cells), "points": figures}
        line |= {"edge": None, "added": list(points)[len(grid) :]}
        if best is not None:
            chosen[row["row"]] = points[best]
            line["edge"], _ = _beyond(points[best], list(points.values()))
        lines.append(line)
    return chosen, lines


def _seed_by_seed(all_rows: list[list[list[Cell]]]) -> list[Cell]:
    """Return the cells of all rows, given by row and seed, in the order of the seeds."""
    return [cell for of_one_seed in zip(*all_rows, strict=True) for cells in of_one_seed for cell in cells]


def _of_grid(config: CompareConfig, row: dict[str, Any], results: Results) -> list[list[Cell]]:
    """Return the row's cells of each tuning seed, without added points.

    Where survivors are not known yet, the first `keep` points stand for them.
    """
    known, first = _known(config, row, results), config.points(row["method"])[: config.tune.keep]
    return [*known, *(_cells(config, row, seed, first) for seed in config.tune.seeds[len(known) :])]


def _added(config: CompareConfig, row: dict[str, Any], results: Results, assume: bool = False) -> list[Cell]:
    """Return the cells of the points added to a row's grid: one beyond the edge at which the best so far lies.

    None is added while a cell is at work, unless we `assume` that the best lies at an edge.
    """
    points, added = config.points(row["method"]), []
    cells = _seed_by_seed([_of_grid(config, row, results)])
    for _ in range(config.tune.extend if points else 0):
        names = [str(point) for point in points]
        best, _, _ = _judged(config, [*cells, *added], names, config.tune.seeds, results)
        tried = [point for point in points if str(point) == best or (best is None and assume)]
        beyond = next((point for _, point in (_beyond(point, points) for point in tried) if point), None)
        if beyond is None:
            break
        points.append(beyond)
        added += [cell for seed in config.tune.seeds for cell in _cells(config, row, seed, [beyond])]
    return added


def _beyond(point: Point, points: list[Point]) -> tuple[str | None, Point | None]:
    """Return the edge at which a point lies, "lowest" or "highest", and the point beyond it; None twice elsewhere.

    The edge is that of the learning rates tried beside the point's other values. The step beyond is that between
    the next two rates, so that 1, 3, 10 goes on with 30, 100.
    """
    values = dict(point.values)
    others = [dict(other.values) for other in points]
    rates = {float(other[RATE]) for other in others if RATE in other and {**values, RATE: other[RATE]} == other}
    if len(rates) < 2 or RATE not in values or float(values[RATE]) not in (min(rates), max(rates)):
        return None, None
    rate = float(values[RATE])
    inwards = sorted(rates, key=lambda other: abs(math.log(other / rate)))
    near, far = inwards[:2] if len(rates) == 2 else inwards[1:3]
    edge, beyond = "lowest" if rate < far else "highest", float(f"{rate * near / far:.2g}")
    return edge, Point(tuple({**values, RATE: beyond}.items()))


def _cells(config: CompareConfig, row: dict[str, Any], seed: int, points: list[Point]) -> list[Cell]:
    place = (row["setting"], row["method"], row["selection"])
    return [Cell(config, *place, seed, point, tuning=True, base=config.tune.base or "") for point in points]


def _known(config: CompareConfig, row: dict[str, Any], results: Results) -> list[list[Cell]]:
    """Return the row's cells of each tuning seed, up to the first seed whose points are still open."""
    points, keep, seeds = config.points(row["method"]), config.tune.keep, config.tune.seeds
    found: list[list[Cell]] = []
    for number, seed in enumerate(seeds):
        if number and keep is not None:
            before = [cell for cells in found for cell in cells]
            names = [str(point) for point in points]
            best, figures, _ = _judged(config, before, names, seeds[:number], results)
            if best is None:
                break
            whole = [item for item in figures if len(item["values"]) == number]
            going_on = {item["point"] for item in sorted(whole, key=lambda item: -item["mean"])[:keep]}
            points = [point for point in points if str(point) in going_on]
        found.append(_cells(config, row, seed, points))
    return found


def _judged(config: CompareConfig, cells: list[Cell], points: list[str], seeds: list[int], results: Results) -> tuple:
    """Return the best point (None while a cell is at work), each point's figures, and the number of finished cells."""
    records = [(cell, results.of(cell)) for cell in cells]
    found = [item for _, item in records if item]
    at_work = any(not item and not failure(cell) for cell, item in records)
    best, figures = tuned(found, points, seeds, lambda item: item["after"].get(config.tune.by))
    return (None if at_work else best), figures, len(found)
