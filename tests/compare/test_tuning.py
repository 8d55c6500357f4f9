"""Tuning: which points are tried on which seeds, and which point the table's cells take."""

import pytest
from small_compare import ONE, result, run, started

from aesl_trl.compare.config import read_config
from aesl_trl.compare.tuning import planned


def test_tuning_takes_the_best_point_on_seeds_of_its_own(project, fakes):
    """The fake RL is better the higher the learning rate: 0.3 must win, and the table must be run with it alone."""
    tune = {"seeds": [7], "grid": {"learning_rate": [0.1, 0.3]}}
    path = project(seeds=[0], methods={**ONE, "base": {"sft": None}}, tune=tune)
    assert run(path) == 0
    folders = [folder for name, folder in started(fakes) if name == "grpo"]
    assert folders == [
        "tune/nll_last@learning_rate=0.1/seed-7",
        "tune/nll_last@learning_rate=0.3/seed-7",
        "nll_last/seed-0",
        "base/seed-0",
    ]
    (line,) = result(fakes)["tuning"]["rows"]
    assert line["chosen"] == "learning_rate=0.3" and [len(point["values"]) for point in line["points"]] == [1, 1]
    nll = next(cell for cell in result(fakes)["cells"] if cell["method"] == "nll")
    assert nll["point"] == "learning_rate=0.3" and nll["before"]["pass@1"] == pytest.approx(0.4 + 0.3)
    assert "| nll/last | learning_rate=0.3 |" in (fakes / "compare.md").read_text()


def test_the_best_points_go_on_to_the_next_seed(project, fakes):
    tune = {"seeds": [7, 8, 9], "grid": {"learning_rate": [0.4, 0.1, 0.3, 0.2]}, "keep": 2}
    path = project(seeds=[0], methods={**ONE, "base": {"sft": None}}, tune=tune)
    config = read_config(path)
    # before anything has run the plan counts as many as will go on
    assert [cell.seed for cell in planned(config)] == [7] * 4 + [8] * 2 + [9] * 2
    (fakes / "fail_grpo").write_text("nll_last@learning_rate=0.4/seed-8")
    assert run(path) == 1
    trained = [folder.split("=")[1] for name, folder in started(fakes) if name == "grpo" and folder.startswith("tune")]
    # 0.4 was ahead on seed 7; where its seed 8 fails it is out, and 0.3, which is whole, goes on alone
    assert trained == [
        "0.4/seed-7",
        "0.1/seed-7",
        "0.3/seed-7",
        "0.2/seed-7",
        "0.4/seed-8",
        "0.3/seed-8",
        "0.3/seed-9",
    ]
    (line,) = result(fakes)["tuning"]["rows"]
    assert (line["chosen"], line["finished"], line["cells"]) == ("learning_rate=0.3", 6, 7)
    assert [len(point["values"]) for point in line["points"]] == [1, 1, 3, 1]
    assert "the best 2 of each went on to the next seed" in (fakes / "compare.md").read_text()
    (fakes / "fail_grpo").unlink()
    assert run(path) == 0
    assert result(fakes)["tuning"]["rows"][0]["chosen"] == "learning_rate=0.4"
