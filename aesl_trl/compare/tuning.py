"""Which points of a grid are tried on which tuning seed, and which of them wins.

Every point of a row is tried on the first of `tune.seeds`. With `tune.keep` only that many of the best points go on to
the next seed, and so on (successive halving, arXiv 1502.07943): the seeds are spent where the choice is close. Every
method tries the same number of points on every seed. The cells' folders say which of them are finished.
"""

from collections.abc import Iterator
from typing import Any

from .cells import Cell, failure, rows
from .config import CompareConfig, Point
from .table import tuned


def rounds(config: CompareConfig) -> Iterator[list[Cell]]:
    """Yield the cells of one round after the other. A round is known once the round before it has ended."""
    if config.tune is None:
        return
    if config.tune.keep is None:
        yield planned(config)
        return
    for number in range(len(config.tune.seeds)):
        known = [_known(config, row) for row in rows(config)]
        yield [cell for by_seed in known for cells in by_seed[number : number + 1] for cell in cells]


def planned(config: CompareConfig) -> list[Cell]:
    """Return every tuning cell. Where a round's survivors are not known yet, use the first `keep` points."""
    if config.tune is None:
        return []
    all_rows = []
    for row in rows(config):
        known, first = _known(config, row), config.points(row["method"])[: config.tune.keep]
        open_seeds = config.tune.seeds[len(known) :]
        all_rows.append([*known, *(_cells(config, row, seed, first) for seed in open_seeds)])
    return [cell for of_one_seed in zip(*all_rows, strict=True) for cells in of_one_seed for cell in cells]


def choose(config: CompareConfig) -> tuple[dict[str, Point], list[dict[str, Any]]]:
    """Return the point of each row whose tuning cells have all finished or failed, and the tuning's table."""
    chosen, lines = {}, []
    by_row: dict[str, list[Cell]] = {}
    for cell in planned(config):
        by_row.setdefault(cell.row, []).append(cell)
    for row, cells in by_row.items():
        points = {str(point): point for point in config.points(cells[0].method)}
        best, figures, finished = _judged(config, cells, list(points), config.tune.seeds)
        lines.append({"row": row, "chosen": best, "finished": finished, "cells": len(cells), "points": figures})
        if best is not None:
            chosen[row] = points[best]
    return chosen, lines


def _cells(config: CompareConfig, row: dict[str, Any], seed: int, points: list[Point]) -> list[Cell]:
    place = (row["setting"], row["method"], row["selection"])
    return [Cell(config, *place, seed, point, tuning=True) for point in points]


def _known(config: CompareConfig, row: dict[str, Any]) -> list[list[Cell]]:
    """Return the row's cells of each tuning seed, up to the first seed whose points are still open."""
    points, keep, seeds = config.points(row["method"]), config.tune.keep, config.tune.seeds
    found: list[list[Cell]] = []
    for number, seed in enumerate(seeds):
        if number and keep is not None:
            before = [cell for cells in found for cell in cells]
            best, figures, _ = _judged(config, before, [str(point) for point in points], seeds[:number])
            if best is None:
                break
            whole = [item for item in figures if len(item["values"]) == number]
            going_on = {item["point"] for item in sorted(whole, key=lambda item: -item["mean"])[:keep]}
            points = [point for point in points if str(point) in going_on]
        found.append(_cells(config, row, seed, points))
    return found


def _judged(config: CompareConfig, cells: list[Cell], points: list[str], seeds: list[int]) -> tuple:
    """Return the best point (None while a cell is at work), each point's figures, and the number of finished cells."""
    found = [item for cell in cells if (item := cell.record())]
    failed = [cell for cell in cells if failure(cell.home)]
    best, figures = tuned(found, points, seeds, lambda item: item["after"].get(config.tune.by))
    return (best if len(found) + len(failed) >= len(cells) else None), figures, len(found)
