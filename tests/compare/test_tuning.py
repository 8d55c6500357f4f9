"""Tuning: which points are tried on which seeds, and which point the table's cells take."""

import pytest
from small_compare import ONE, result, run, started

from aesl_trl import files
from aesl_trl.compare.cells import Cell
from aesl_trl.compare.config import RATES, grid_points, read_config
from aesl_trl.compare.tuning import _beyond, choose, planned


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


def test_the_next_rates_beyond_an_edge():
    """1, 3, 10 goes on with 30 and 100, below as above; the other values of a point stay."""
    for first, edge, wanted in ((0, "lowest", [3e-6, 1e-6]), (-1, "highest", [3e-3, 1e-2])):
        points = grid_points(RATES)
        point = points[first]
        for rate in wanted:
            found, point = _beyond(point, points)
            assert (found, dict(point.values)) == (edge, {"learning_rate": rate})
            points.append(point)
    assert _beyond(points[2], points) == (None, None)
    two = grid_points([{"learning_rate": rate, "t_scaling": 1.0} for rate in (0.1, 0.2)] + [{"learning_rate": 0.05}])
    assert str(_beyond(two[1], two)[1]) == "learning_rate=0.4,t_scaling=1.0"
    assert _beyond(two[2], two) == (None, None)  # the only rate beside its other values
    texts = grid_points({"learning_rate": ["1e-5", "1e-4"]})  # as YAML reads numbers without a dot
    assert str(_beyond(texts[0], texts)[1]) == "learning_rate=1e-06"


def test_tuned_on_a_base_of_its_own_beyond_the_grid_and_then_rl_twice(project, fakes):
    """The fake RL is better the higher the rate: it is raised twice, and the page says that it is still at an edge.

    The table has the other base, one cold start and two RL runs from it.
    """
    tune = {"seeds": [7], "grid": {"learning_rate": [0.1, 0.2]}, "base": "spare", "extend": 2}
    bases = {"main": {"model": "base"}, "spare": {"model": "other"}}
    changes = {"seeds": [0], "methods": ONE, "tune": tune, "bases": bases}
    path = project(**changes, rl_runs=2)
    assert run(path) == 0
    order = started(fakes)
    assert [folder for name, folder in order if name == "grpo"] == [
        *(f"tune/spare/nll_last@learning_rate={rate}/seed-7" for rate in (0.1, 0.2, 0.4, 0.8)),
        "main/nll_last/seed-0",
        "main/nll_last/seed-0-rl-2",
    ]
    assert [folder for name, folder in order if name == "sft"][4:] == ["main/sft/nll@learning_rate=0.8/seed-0"]
    found = result(fakes)
    (line,) = found["tuning"]["rows"]
    assert (line["chosen"], line["edge"]) == ("learning_rate=0.8", "highest")
    assert line["added"] == ["learning_rate=0.4", "learning_rate=0.8"]
    (row,) = found["rows"]
    # 0.4 + 0.8 + entropy 0.07 after RL, and 0.02 more in the second run; the unit is the start
    assert row["bases"]["main"]["mean"] == pytest.approx(1.28) and row["after"]["pass@1"]["n"] == 1
    assert row["rl_noise"] == {"sd": pytest.approx(0.02 / 2**0.5), "df": 1} and row["runs"] == [2]
    text = (fakes / "compare.md").read_text()
    assert "on seeds 7 of base spare" in text and "chosen, highest rate tried" in text
    assert "Every row's grid had the same number of points" in text and "were added for nll/last (2)." in text
    assert "**The best still lies at an edge** for nll/last" in text and "| RL's own sd | RL runs |" in text
    # finished cells are not run again; an RL run more is one more RL from the same cold start
    assert run(path) == 0 and started(fakes) == order
    assert run(project(**changes, rl_runs=3)) == 0
    assert started(fakes)[len(order) :] == [
        (name, "main/nll_last/seed-0-rl-3") for name in ("handoff", "grpo", "eval", "report")
    ]


def test_a_cold_start_that_fails_leaves_the_other_points(project, fakes):
    """Its second selection is never started, and must not keep the row from the best of the others."""
    tune = {"seeds": [7], "grid": {"learning_rate": [0.1, 0.3]}}
    methods = {"nll": {"sft": {"cold_start_loss": "nll"}, "selections": ["turning_point", "last"]}}
    path = project(seeds=[0], methods=methods, tune=tune)
    (fakes / "fail_sft").write_text("nll@learning_rate=0.3")
    assert run(path) == 1
    lines = result(fakes)["tuning"]["rows"]
    assert [(line["row"], line["chosen"]) for line in lines] == [
        ("nll/turning_point", "learning_rate=0.1"),
        ("nll/last", "learning_rate=0.1"),
    ]
    assert {cell["point"] for cell in result(fakes)["cells"]} == {"learning_rate=0.1"}


@pytest.mark.parametrize("seeds", [[7, 8], [7, 8, 9, 10, 11]])
def test_choosing_reads_each_result_once_and_asks_no_cell_for_its_inputs(project, monkeypatch, seeds):
    tune = {"seeds": seeds, "grid": {"learning_rate": [0.1, 0.2, 0.3, 0.4]}, "keep": 2, "extend": 1}
    config = read_config(project(seeds=[0], methods=ONE, tune=tune))
    for _ in range(len(seeds) + 1):  # a round is known once the one before has ended; the last is beyond the edge
        for cell in planned(config):
            rate = dict(cell.point.values)["learning_rate"]
            figures = {name: {"pass@1": rate} for name in ("start", "final")}
            files.write_json(cell.home / files.EVALUATION, {"models": figures})
            files.write_json(cell.home / files.CHAIN, {"stages": dict.fromkeys(("grpo", "eval"), {"status": "done"})})
    read, real = [], Cell.evaluation

    def counted(cell):
        read.append(cell.home)
        return real(cell)

    monkeypatch.setattr(Cell, "evaluation", counted)
    monkeypatch.setattr(Cell, "is_done", lambda cell: pytest.fail("the inputs of a cell were hashed"))
    chosen, (line,) = choose(config)
    assert str(chosen["nll/last"]) == line["added"][0]  # the highest rate, beyond the grid
    assert len(read) == len(set(read)) == 4 + 2 * (len(seeds) - 1) + len(seeds)
