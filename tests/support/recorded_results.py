"""For the tests of recorded comparisons: their cells, and a row as a results README shows it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aesl_trl.files import read_json


def cells_of(comparison: Path) -> dict[tuple[str, int], dict[str, Any]]:
    return {(cell["row"], cell["seed"]): cell for cell in read_json(comparison / "compare.json")["cells"]}


def seeds_of(comparison: Path) -> dict[str, str]:
    """Return for each row its pass@1 after RL, the mean and every seed, as in `0.30 | 0.31 0.29`."""
    found: dict[str, list[float]] = {}
    for (row, _), cell in cells_of(comparison).items():
        found.setdefault(row, []).append(cell["after"]["pass@1"])
    shown = {row: " ".join(f"{value:.2f}" for value in values) for row, values in found.items()}
    return {row: f"{sum(values) / len(values):.2f} | {shown[row]}" for row, values in found.items()}


def rows_with_intervals(comparison: Path) -> Iterator[str]:
    """Yield each row of a table with intervals, as in `**0.30** [0.28, 0.32] | 0.31 0.29`."""
    seeds = seeds_of(comparison)
    for row in read_json(comparison / "compare.json")["rows"]:
        after, (mean, values) = row["after"]["pass@1"], seeds[row["row"]].split(" | ")
        yield f"**{mean}** [{after['low']:.2f}, {after['high']:.2f}] | {values} |"
