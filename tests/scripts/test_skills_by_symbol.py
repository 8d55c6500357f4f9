"""Coverage by symbol separates the recorded starts of skills-tiny, where entropy and mixed groups do not."""

from pathlib import Path
from statistics import fmean

import pytest
import skills_by_symbol

from aesl_trl.files import read_json


RESULTS = Path(skills_by_symbol.__file__).parents[1] / "recipes/skills-tiny/results"


@pytest.fixture(scope="module")
def recorded() -> list[dict]:
    (path,) = RESULTS.glob("**/main/by_symbol.json")
    return read_json(path)


@pytest.mark.parametrize(
    ("row", "fell", "lost"),
    [("base", 0.0, 0.0), ("nll/turning_point", 0.20, 0.17), ("nll/last", 0.41, 0.35), ("aesl/last", 0.42, 0.36)],
)
def test_of_the_recorded_starts(recorded, row, fell, lost):
    """`fell` is how far the chance of a symbol fell, before what two samplings of the base differ by is considered."""
    bases = {cell["seed"]: cell for cell in recorded if cell["row"] == "base"}
    mine = [cell for cell in recorded if cell["row"] == row]
    assert len(mine) == 5
    falls = [
        max(0.0, (1 - cell["before"][symbol]) ** 8 - (1 - rate) ** 8)
        for cell in mine
        for symbol, rate in bases[cell["seed"]]["before"].items()
    ]
    assert fmean(falls) == pytest.approx(fell, abs=0.006)
    assert fmean(skills_by_symbol.coverage(cell, bases[cell["seed"]])[0] for cell in mine) == pytest.approx(
        lost, abs=0.006
    )


def test_the_table_has_it(recorded):
    (line,) = [
        line for line in skills_by_symbol.table(recorded).splitlines() if line.startswith("| nll/turning_point ")
    ]
    assert line.endswith("| none none none none none | 0.17 / 0.28 |")
    assert "| - |" in skills_by_symbol.table([cell for cell in recorded if cell["row"] != "base"])
