"""The page of a comparison: what it says of recorded ones, of any version."""

from pathlib import Path

import pytest

from aesl_trl.compare.page import page
from aesl_trl.compare.table import table
from aesl_trl.files import read_json, to_json


RECIPES = Path(__file__).parents[2] / "recipes"
RECORDED = sorted(RECIPES.rglob("results/**/compare.json"))
(MAIN,) = (path for path in RECORDED if path.parent.name == "main" and "skills-tiny" in path.parts)


def recomputed(path: Path) -> dict:
    found = read_json(path)
    rows = [{key: row[key] for key in ("row", "name", "setting", "method", "selection")} for row in found["rows"]]
    return to_json(found | table(found["cells"], rows, reference=found["reference"], metric=found["metric"]))


def lines(text: str) -> list[list[str]]:
    found = (line.strip("|").split("|") for line in text.splitlines() if line.startswith("| "))
    return [[cell.strip() for cell in cells] for cells in found]


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: str(path.parent.relative_to(RECIPES)))
def test_a_comparison_of_an_earlier_version_keeps_its_figures(path):
    """Every figure that its own page had is still there, in the same order; only columns are added."""
    then, now = lines(path.with_suffix(".md").read_text()), lines(page(read_json(path), []))
    assert len(then) == len(now)
    for old, new in zip(then, now, strict=True):
        rest = iter(new)
        assert all(cell in rest for cell in old), (old, new)


def test_the_recorded_comparison_with_all_that_is_known_now():
    """Five seeds decide nothing once the seven contrasts to the turning point are counted."""
    found = recomputed(MAIN)
    differences = {row["row"]: row["differences"].get("nll/turning_point") for row in found["rows"]}
    of = {name: each["after"]["pass@1"] for name, each in differences.items() if each}
    ways = {name: round(each["permutation_p"] * 252, 6) for name, each in of.items()}
    assert [ways[name] for name in ("aesl/last", "dft/last", "base", "nll/last", "eaft/last")] == [2, 2, 4, 8, 10]
    adjusted = {name: round(each["permutation_p_holm"], 3) for name, each in of.items()}
    assert adjusted["aesl/last"] == adjusted["dft/last"] == 0.056  # 7 * 2 / 252: two rows of nll are the same runs
    assert adjusted["nll/last"] == adjusted["nll/best_eval"] == 0.127  # 4 * 8 / 252
    assert {name for name in of if of[name]["decided"]} == {"base", "aesl/last", "dft/last", "eaft/last"}
    assert not any(each["p_holm"] < 0.05 for each in of.values())
    figures = [row[when] for row in found["rows"] for when in ("before", "after")]
    shares = [each for of_row in figures for name, each in of_row.items() if name != "entropy"]
    assert all(0 <= each["low"] <= each["mean"] <= each["high"] <= 1 for each in shares)
    text = page(found, [])
    assert "| aesl/last | -0.120 [-0.208, -0.033] | 0.071 | 5 | yes | no | 0.008 | 0.056 | 4 |" in text
    assert "RL runs" not in text and "by base model" not in text


def test_what_was_not_run_is_counted_where_it_is_much():
    few = read_json(MAIN) | {"missing": ["nll/last, seed 0", "base, seed 1"]}
    assert "not in the tables: nll/last, seed 0; base, seed 1." in page(few, [])
    failed = "aesl/last, base base-0, seed 1 (stage grpo failed with exit code 3)"
    many = [failed, *(f"{row}, base base-0, seed {seed}" for seed in range(9) for row in ("base", "nll/last"))]
    assert f"not in the tables: {failed}; base x 9; nll/last x 9." in page(few | {"missing": many}, [])
