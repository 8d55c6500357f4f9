"""compare: which cells there are, what each is run by, and that none is run twice, whatever ends the comparison."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small_compare
import yaml
from small_compare import compare_project, started

from aesl_trl import files
from aesl_trl.chain import chain as chains
from aesl_trl.chain.fingerprints import walk
from aesl_trl.chain.old_fingerprints import old_fingerprint
from aesl_trl.compare import cells as compare_cells
from aesl_trl.compare import compare
from aesl_trl.compare.cells import Cell
from aesl_trl.compare.config import Point, read_config
from aesl_trl.compare.plan import FIGURES, check, hours, plan
from aesl_trl.compare.plots import colours, result_panels, step_lines
from aesl_trl.compare.tuning import planned
from aesl_trl.compare.workers import split_devices
from aesl_trl.diversity.figures import Group, measure
from aesl_trl.errors import InputError
from aesl_trl.report.parts import LIGHT


ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes/skills-tiny"
OUTPUTS = ("compare.json", "compare.md", "compare_results.png", "compare_diversity.png")


@pytest.fixture
def project(tmp_path):
    return compare_project(tmp_path)


def evaluation_of_another_run(home: Path) -> None:
    """What a kill leaves between RL that was repeated and its evaluation."""
    chain = files.read_json(home / files.CHAIN)
    for stage in ("eval", "report"):
        chain["stages"].pop(stage)
    files.write_json(home / files.CHAIN, chain)


@pytest.fixture
def fakes(monkeypatch, tmp_path):
    """Cells are chains of fake stages, here and in the processes that are started."""
    (tmp_path / "runs").mkdir()
    monkeypatch.setenv("FAKE_ROOT", str(tmp_path / "runs"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # else torch is asked, which takes seconds to import
    monkeypatch.setattr(compare, "CHAIN", [sys.executable, small_compare.__file__])
    monkeypatch.setattr(compare, "check_in_child", lambda command, argv: None)
    monkeypatch.setattr(chains, "check_in_child", lambda command, argv: None)
    small_compare.install()
    yield tmp_path / "runs"
    small_compare.uninstall()


ONE = {"nll": {"sft": {"cold_start_loss": "nll"}, "selections": ["last"]}}


def run(path, *flags) -> int:
    try:
        compare.main(["--config", str(path), *flags])
    except SystemExit as leaving:
        return leaving.code
    return 0


def result(root: Path) -> dict:
    return files.read_json(root / "compare.json")


# ---- The config


def test_rows_and_selections(project, tmp_path):
    config = read_config(project(rl_from_steps=[10, 40]))
    assert [row["row"] for row in compare_cells.rows(config)] == [
        "base",
        *("nll/turning_point", "nll/last", "nll/step-10", "nll/step-40"),
        *("aesl/step-10", "aesl/step-40"),
    ]
    # without steps, the rule that the loss has by default
    gem = {"sft": {"cold_start_loss": "gem"}}
    config = read_config(project(methods={"gem": gem, "aesl": {"sft": {"cold_start_loss": "aesl"}}}, reference=[]))
    assert (config.selections("gem"), config.selections("aesl")) == (["turning_point"], ["last"])
    # the loss may be that of the template's config
    assert read_config(project(methods={"own": {"sft": {}}}, reference=[])).selections("own") == ["last"]
    (tmp_path / "sft.yaml").write_text("cold_start_loss: nll\n")
    assert read_config(project(methods={"own": {"sft": {}}}, reference=[])).selections("own") == ["turning_point"]


def test_settings_choose_their_methods(project):
    settings = {"all": None, "few": {"sft": {"max_steps": 5}, "methods": ["nll"]}}
    rows = compare_cells.rows(read_config(project(settings=settings)))
    assert [row["row"] for row in rows if row["setting"] == "few"] == ["few/nll/turning_point", "few/nll/last"]
    assert sum(row["setting"] == "all" for row in rows) == 4


def test_grids(project):
    lists = {"learning_rate": [0.1, 0.2], "weight_decay": [0.0, 0.1]}
    points = [{"learning_rate": 0.1, "t_scaling": scale} for scale in (1.0, 2.0, 3.0, 4.0)]
    methods = {"nll": {"sft": {"cold_start_loss": "nll"}}, "aesl": {"sft": {}, "grid": points}, "base": {"sft": None}}
    config = read_config(project(methods=methods, reference=[], tune={"seeds": [7], "grid": lists}))
    assert [str(point) for point in config.points("nll")] == [
        f"learning_rate={rate},weight_decay={decay}" for rate in (0.1, 0.2) for decay in (0.0, 0.1)
    ]
    assert str(config.points("aesl")[1]) == "learning_rate=0.1,t_scaling=2.0"
    assert config.points("base") == []


TUNE = {"seeds": [7], "grid": {"learning_rate": [0.1, 0.2]}}
AESL = {"cold_start_loss": "aesl"}


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"method": {}}, ["unknown key 'method'", "'methods'"]),
        ({"methods": ...}, ["compare.yaml: methods is missing"]),
        ({"methods": {}}, ["methods is empty"]),
        ({"methods": {"nll": {}}}, ["methods.nll: sft is missing"]),
        ({"methods": {"nll": {"sft": {}, "selection": ["last"]}}}, ["methods.nll", "'selection'", "'selections'"]),
        ({"methods": {"nll": {"sft": {}, "selections": ["lst"]}}}, ["selections: 'lst' is not one of", "'last'"]),
        ({"methods": {"nll": {"sft": {}, "selections": ["last", "last"]}}}, ["the same selection twice"]),
        ({"methods": {"nll": {"sft": {}, "selections": []}}}, ["neither selections nor rl_from_steps"]),
        ({"methods": {"base": {"sft": None, "selections": ["last"]}}}, ["selections need a cold start"]),
        ({"methods": {"nll": {"sft": {"seed": 3}}}}, ["methods.nll.sft: seed is set for each cell"]),
        ({"methods": {"nll": {"sft": {"dataset_name": "rws.jsonl"}}}}, ["methods.nll.sft", "'rows.jsonl'"]),
        ({"methods": {"a/b": {"sft": {}}}}, ["'a/b' names a folder"]),
        ({"methods": {"sft": {"sft": {}}}}, ["'sft' names a folder", "not tune or sft"]),
        (
            {"methods": {"a": {"sft": {}, "selections": ["last"]}, "a_last": {"sft": None}}},
            ["a_last and a would both write to the folder a_last"],
        ),
        ({"settings": {"base": {}}}, ["would both write to the folder base"]),
        ({"settings": {"few": {"stf": {}}}}, ["settings.few: unknown key 'stf'", "'sft'"]),
        ({"settings": {"few": {"methods": ["nl"]}}}, ["settings.few.methods: no method 'nl'", "'nll'"]),
        ({"seeds": []}, ["seeds must be different whole numbers"]),
        ({"seeds": [1, 1]}, ["seeds must be different whole numbers"]),
        ({"seeds": ["1"]}, ["seeds must be a list of int"]),
        ({"reference": ["nll"]}, ["reference: no row 'nll'", "nll/last"]),
        ({"rl_from_steps": [0]}, ["rl_from_steps must be steps from 1 on"]),
        ({"chain": {}}, ["chain.grpo is missing"]),
        ({"chain": {"grpo": {"config": "grpo.yaml"}}}, ["chain.eval is missing"]),
        (
            {"chain": {"grpo": {"config": "grpo.yaml"}, "eval": {"config": "eval.yaml"}}},
            ["chain.sft is missing"],
        ),
        (
            {"chain": {"grpo": {"config": "grop.yaml"}, "eval": {}, "sft": {}}},
            ["chain.grpo.config: grop.yaml", "'grpo.yaml'"],
        ),
        ({"chain": {"seed": 3}}, ["chain: seed is set for each cell"]),
        ({"chain": {"gpro": {}}}, ["chain: unknown key 'gpro'", "'grpo'"]),
        ({"tune": {**TUNE, "seeds": [1]}}, ["share 1: tune on seeds that the table does not use"]),
        ({"tune": {**TUNE, "keep": 3}}, ["tune.keep must lie from 1 to 2, the points of the grid, got 3"]),
        ({"tune": {**TUNE, "grid": {"learning_rate": 0.1}}}, ["tune.grid must hold lists of values"]),
        ({"tune": {**TUNE, "grid": {"learning_rate": [0.1, 0.1]}}}, ["the same point twice"]),
        ({"tune": {**TUNE, "grid": {"dataset_name": ["a/b"]}}}, ["dataset_name=a/b names a folder"]),
        ({"tune": {**TUNE, "grid": [{"seed": 3}]}}, ["tune.grid: seed must have plain values"]),
        (
            {
                "tune": TUNE,
                "reference": [],
                "methods": {"aesl": {"sft": AESL, "grid": {"t_scaling": [1.0, 2.0, 3.0]}}},
            },
            ["methods.aesl.grid has 3 points, tune.grid 2: every method gets the same budget"],
        ),
        (
            {"reference": [], "methods": {"aesl": {"sft": AESL, "grid": {"t_scaling": [1.0]}}}},
            ["needs a section tune"],
        ),
        (
            {"tune": TUNE, "reference": [], "methods": {"base": {"sft": None, "grid": {"t_scaling": [1.0]}}}},
            ["nothing to tune"],
        ),
        ({"estimate": {"sft_s": 3}}, ["estimate: rl_s is missing"]),
        ({"output_dir": "sft.yaml"}, ["output_dir", "is a file"]),
    ],
)
def test_refused_configs(project, changes, parts):
    with pytest.raises(InputError) as error:
        read_config(project(**changes))
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    "flags, part",
    [
        (["--workers", "0"], "--workers is 0, but must be at least 1"),
        (["--methods", "nl"], "has no nl; did you mean 'nll'"),
        (["--seeds", "5"], "has no 5"),
        (["--sedes", "5"], "--sedes"),
    ],
)
def test_refused_flags(project, flags, part):
    with pytest.raises(InputError) as error:
        compare.main(["--config", str(project()), *flags])
    assert part in str(error.value)


# ---- What a cell is run by


def test_the_files_of_a_cell(project, tmp_path):
    settings = {"few": {"sft": {"max_steps": 5}, "grpo": {"max_steps": 7}}}
    methods = {"nll": {"sft": {"cold_start_loss": "nll", "dataset_name": "rows.jsonl"}, "selections": ["last"]}}
    config = read_config(project(settings=settings, methods=methods))
    found = Cell(config, "few", "nll", "last", 1, Point((("learning_rate", 0.2),))).configs()
    found = {str(path.relative_to(tmp_path)): values for path, values in found.items()}
    home = "runs/few/nll_last/seed-1/chain.yaml"
    assert list(found) == ["runs/few/sft/nll@learning_rate=0.2.yaml", "runs/few/grpo.yaml", home]
    assert found["runs/few/sft/nll@learning_rate=0.2.yaml"] == {
        "dataset_name": "../../../rows.jsonl",
        "diversity_steps": 10,
        "learning_rate": 0.2,
        "cold_start_loss": "nll",
        "max_steps": 5,
    }
    assert found["runs/few/grpo.yaml"] == {"model_name_or_path": "../../base", "max_steps": 7}
    chain = found[home]
    assert chain["seed"] == 1 and chain["output_dir"] == "." and chain["selection"] == {"rule": "last"}
    assert chain["sft"] == {
        "config": "../../sft/nll@learning_rate=0.2.yaml",
        "accelerate_config": "../../../../cpu.yaml",
        "output_dir": "../../sft/nll@learning_rate=0.2/seed-1",
    }
    assert chain["grpo"]["config"] == "../../grpo.yaml"
    assert chain["eval"]["config"] == "../../../../eval.yaml"


def test_direct_rl_has_no_cold_start_and_a_step_is_a_selection(project):
    config = read_config(project(rl_from_steps=[30]))
    *_, base = Cell(config, "", "base", None, 0).configs().values()
    assert not {"sft", "selection", "handoff"} & base.keys()
    assert base["ignore_readiness"] is True and base["probe"] is None
    *_, step = Cell(config, "", "nll", "step-30", 0).configs().values()
    assert step["selection"] == {"step": 30}


def test_selections_share_a_cold_start(project):
    config = read_config(project())
    grouped = compare_cells.groups(compare_cells.table_cells(config, {}))
    assert [[cell.label for cell in group] for group in grouped[:3]] == [
        ["base, seed 0"],
        ["nll/turning_point, seed 0", "nll/last, seed 0"],
        ["aesl/last, seed 0"],
    ]
    assert len(grouped) == 6


@pytest.mark.parametrize(
    "devices, workers, shares",
    [
        ([], 2, [None, None]),
        (["0", "1"], 1, [None]),
        (["0", "1"], 2, ["0", "1"]),
        (["4", "5", "6", "7"], 2, ["4,5", "6,7"]),
        (["0", "1", "2"], 2, ["0", "1"]),
        (["3"], 3, ["3", "3", "3"]),
        (["0", "1"], 3, ["0", "1", "0"]),
    ],
)
def test_devices_of_each_worker(devices, workers, shares):
    assert split_devices(devices, workers) == shares


# ---- Running


def test_a_comparison_from_end_to_end(project, fakes, capfd, monkeypatch):
    """Every cell once, at the figures that its loss, step and seed lead to; the same files again from the folders."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    path = project(seeds=[0, 3])
    assert run(path, "--workers", "2") == 0
    order = started(fakes)
    assert len(order) == len(set(order)) and [name for name, _ in order].count("sft") == 4
    devices = {json.loads(line)[2] for line in (fakes / "order.txt").read_text().splitlines()}
    assert devices == {"2", "5"}
    found = result(fakes)
    assert [row["row"] for row in found["rows"]] == ["base", "nll/turning_point", "nll/last", "aesl/last"]
    assert [row["steps"] for row in found["rows"]] == [[None, None], [20, 20], [80, 80], [80, 80]]
    # fake stages: quality 80 / 200 + learning rate, noise 0.00 and 0.01, and RL adds the start's entropy
    nll = found["rows"][2]
    assert (nll["before"]["pass@1"]["mean"], nll["after"]["pass@1"]["mean"]) == pytest.approx((0.505, 0.575))
    aesl = found["rows"][3]["differences"]["nll/last"]["after"]["pass@1"]
    assert aesl["mean"] == pytest.approx(0.05) and aesl["seeds"] == [0, 3]
    facts = found["cells"][0]["provenance"]
    assert facts["command"] == [f"aesl compare --config {path} --workers 2"] and "cores" in facts["hardware"][0]
    assert found["missing"] == [] and not any(cell["outdated"] for cell in found["cells"])
    assert "| nll/turning_point | 2 | 20 |" in capfd.readouterr().out
    kept = {name: (fakes / name).read_bytes() for name in OUTPUTS}
    for name in OUTPUTS:
        (fakes / name).unlink()
    assert run(path, "--table_only") == 0
    assert {name: (fakes / name).read_bytes() for name in OUTPUTS} == kept
    # finished cells are not run again
    assert run(path) == 0 and started(fakes) == order
    # a seed more: its cells alone
    assert run(project(seeds=[0, 3, 4], methods=ONE)) == 0
    assert {folder for _, folder in started(fakes)[len(order) :]} == {"sft/nll/seed-4", "nll_last/seed-4"}


def test_changed_inputs_are_refused_or_run_again(project, fakes, tmp_path):
    path = project(methods=ONE, seeds=[0])
    run(path)
    before = started(fakes)
    (tmp_path / "eval.yaml").write_text("samples: 4\n")
    run(path, "--table_only")
    assert result(fakes)["cells"][0]["outdated"] is True
    assert "Run from other configs" in (fakes / "compare.md").read_text()
    assert run(path) == 0
    assert [name for name, _ in started(fakes)[len(before) :]] == ["eval", "report"]
    assert result(fakes)["cells"][0]["outdated"] is False
    evaluation_of_another_run(fakes / "nll_last/seed-0")
    with pytest.raises(InputError, match="holds no finished cell"):
        run(path, "--table_only")
    before = started(fakes)
    assert run(path) == 0
    assert [name for name, _ in started(fakes)[len(before) :]] == ["eval", "report"]
    (tmp_path / "rows.jsonl").write_text('{"text": "b"}\n')
    with pytest.raises(InputError, match="sft/nll/seed-0 was trained from other inputs"):
        run(path)


def test_other_spellings_and_old_records_run_no_cell_again(project, fakes, tmp_path):
    path = project(methods=ONE, seeds=[0])
    assert run(path) == 0
    before, home = started(fakes), fakes / "nll_last/seed-0"
    (tmp_path / "sft.yaml").write_text(
        "# why\nlearning_rate: 1.0e-1\ndiversity_steps: 10\ndataset_name: ./rows.jsonl\n"
    )
    run(path, "--table_only")
    assert result(fakes)["cells"][0]["outdated"] is False
    assert run(path) == 0 and started(fakes) == before
    # as the version before recorded it
    chain, previous = compare_cells.chain_of(home), None
    for stage, _ in walk(chain):
        previous = old_fingerprint(stage, stage.folder if stage.name == "sft" else chain.run, previous)
        facts = chain.recorded(stage.name)
        chain.note(stage.name, **{key: facts[key] for key in facts.keys() - {"settings"}} | {"inputs": previous})
    run(path, "--table_only")
    assert result(fakes)["cells"][0]["outdated"] is False
    assert run(path) == 0 and started(fakes) == before
    renewed = [*files.read_json(home / files.CHAIN)["stages"].values(), files.read_json(chain.sft_dir / files.STAGE)]
    assert all("settings" in stage and stage["inputs"] != previous for stage in renewed)


def test_a_failed_cell_costs_only_itself_and_is_tried_again(project, fakes, capfd):
    path = project(methods={"nll": {"sft": {"cold_start_loss": "nll"}, "selections": ["turning_point", "last"]}})
    (fakes / "fail_grpo").write_text("nll_turning_point/seed-1")
    assert run(path) == 1
    out = capfd.readouterr()
    assert "nll/turning_point, seed 1 ended with exit code 3: not in the table" in out.err
    assert result(fakes)["missing"] == ["nll/turning_point, seed 1 (stage grpo failed with exit code 3)"]
    assert result(fakes)["rows"][0]["seeds"] == [0] and result(fakes)["rows"][1]["seeds"] == [0, 1]
    (fakes / "fail_grpo").unlink()
    before = started(fakes)
    assert run(path) == 0
    assert [name for name, _ in started(fakes)[len(before) :]] == ["grpo", "eval", "report"]


def test_a_cold_start_that_fails_is_not_tried_for_each_selection(project, fakes):
    path = project(
        seeds=[0], methods={"nll": {"sft": {"cold_start_loss": "nll"}, "selections": ["last", "best_eval"]}}
    )
    (fakes / "fail_sft").write_text("nll")
    with pytest.raises(InputError, match="holds no finished cell"):
        run(path)
    assert started(fakes) == [("sft", "sft/nll/seed-0")]


def test_selections_that_come_to_one_step_are_one_run(project, fakes):
    path = project(
        seeds=[0], methods={"nll": {"sft": {"cold_start_loss": "nll"}, "selections": ["last", "best_eval"]}}
    )
    assert run(path) == 0
    assert [folder for name, folder in started(fakes) if name == "grpo"] == ["nll_last/seed-0"]
    last, best = result(fakes)["cells"]
    assert (last["same_as"], best["same_as"], best["step"], best["applied"]) == (None, "nll_last", 80, "best_eval")
    assert best["after"] == last["after"]
    assert "2 cells are finished, 1 of them runs of their own" in (fakes / "compare.md").read_text()
    before = started(fakes)
    assert run(path) == 0 and started(fakes) == before


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


def test_rl_from_steps(project, fakes):
    methods = {"nll": {"sft": {"cold_start_loss": "nll"}, "selections": []}, "base": {"sft": None}}
    path = project(seeds=[0], methods=methods, reference=[], rl_from_steps=[10, 40, 80])
    assert run(path) == 0
    found = result(fakes)
    assert [row["steps"] for row in found["rows"]] == [[10], [40], [80], [None]]
    assert [step for step, _ in step_lines(found)["", "nll"]] == [0, 10, 40, 80]
    assert (fakes / "compare_steps.png").read_bytes()[1:4] == b"PNG"
    assert not (fakes / "compare_results.png").exists()  # the base alone, which the steps show
    assert [name for name, _ in started(fakes)].count("sft") == 1


def test_a_panel_holds_rows_of_one_setting_and_no_more_than_it_has_room_for():
    def row(setting, method, selection="last"):
        name = f"{method}/{selection}"
        after = {"pass@1": {"mean": 0.5, "low": None, "high": None}}
        found = {"row": f"{setting}/{name}", "name": name, "setting": setting, "method": method}
        return {**found, "selection": selection, "before": after, "after": after, "differences": {}}

    rows = [row("few", f"m{number}") for number in range(11)] + [row("many", "m0"), row("many", "m0", "step-10")]
    panels = result_panels({"rows": rows, "metric": "pass@1", "reference": [], "cells": []})
    assert [panel.title.split(":")[0] for panel in panels] == ["few", "few", "many"]
    found = colours({"rows": rows[:2] + [row("", "aesl"), row("", "nll"), {**row("", "base"), "selection": None}]})
    assert (found["aesl"], found["nll"], found["base"]) == (LIGHT["aesl"], LIGHT["nll"], LIGHT["base"])
    assert len(set(found.values())) == 5  # a method of another name takes none of theirs


# ---- Interrupted


def comparison(path, *flags):
    """The comparison as a process of its own, which its stages can kill."""
    command = [sys.executable, small_compare.__file__, "--compare", "--config", str(path), *flags]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=250)


@pytest.mark.parametrize(
    "number, code", [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_ends_the_cell_and_then_the_comparison(project, fakes, number, code):
    path = project(seeds=[0], methods=ONE)
    (fakes / "kill_grpo").write_text(str(int(number)))
    done = comparison(path)
    assert done.returncode == code, done.stderr
    assert f"stopped by {number.name}; run it again to go on" in done.stdout
    assert started(fakes)[-1][0] == "grpo"
    assert comparison(path).returncode == 0
    assert [name for name, _ in started(fakes)] == ["sft", "handoff", "grpo", "grpo", "eval", "report"]


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux's /proc")
def test_a_killed_comparison_goes_on_to_the_same_result(project, fakes, tmp_path):
    """Killed with SIGKILL while RL is at work, which goes on: the next run ends it, and repeats no finished stage."""
    path = project(methods=ONE)
    (fakes / "kill_grpo").write_text(str(int(signal.SIGKILL)))
    assert comparison(path).returncode == -signal.SIGKILL
    before = started(fakes)
    assert before[-1] == ("grpo", "nll_last/seed-0")
    done = comparison(path)
    assert done.returncode == 0, done.stderr
    assert "ended 1 processes that a killed comparison had left at work" in done.stdout
    assert started(fakes)[len(before)][0] == "grpo" and started(fakes).count(("sft", "sft/nll/seed-0")) == 1
    killed = result(fakes)
    for item in fakes.iterdir():
        shutil.rmtree(item) if item.is_dir() else item.unlink()
    assert comparison(path).returncode == 0
    undisturbed = result(fakes)
    assert killed["rows"] == undisturbed["rows"] and killed["correlations"] == undisturbed["correlations"]


def test_a_second_comparison_in_the_folder_is_refused(project, fakes):
    path = project(seeds=[0], methods=ONE)
    with compare.lock(fakes / ".compare.lock", ""):
        with pytest.raises(InputError, match="another comparison is at work in"):
            run(path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_real_comparison_killed_in_the_middle(tmp_path):
    """Two methods, two seeds, the tiny base: SIGKILL in the midst of RL, and the figures of an undisturbed cell."""
    path = real_comparison(tmp_path)
    command = [sys.executable, "-m", "aesl_trl.cli", "compare", "--config", str(path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 900
    while not (tmp_path / "runs/aesl_last/seed-0/grpo/checkpoint-2/manifest.json").exists():
        assert time.monotonic() < deadline and killed.poll() is None, killed.communicate()[0]
        time.sleep(0.1)
    killed.kill()
    killed.communicate()
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nll/last, seed 0: starts" not in done.stdout
    log = (tmp_path / "runs/aesl_last/seed-0/cell.log").read_text()
    assert "sft is done with the same inputs: skipped" in log and "goes on from" in log
    found = files.read_json(tmp_path / "runs/compare.json")
    assert [len(row["seeds"]) for row in found["rows"]] == [2, 2] and found["missing"] == []
    flags = ["--output_dir", str(tmp_path / "again"), "--methods", "aesl", "--seeds", "0"]
    assert subprocess.run([*command, *flags], env=env).returncode == 0
    again = files.read_json(tmp_path / "again/compare.json")["cells"]
    resumed = [cell for cell in found["cells"] if (cell["method"], cell["seed"]) == ("aesl", 0)]
    assert [(cell["before"], cell["after"]) for cell in again] == [(c["before"], c["after"]) for c in resumed]


def real_comparison(folder: Path) -> Path:
    """skills-tiny with a few steps of everything."""
    few = {"max_steps": 4, "diversity_steps": 2, "eval_steps": 2, "diversity_num_prompts": 8, "save_steps": 2}
    few |= {"max_candidates": 5}
    chain = {stage: {"config": str(RECIPE / stage / name)} for stage, name in (("sft", "config_nll.yaml"),)}
    chain |= {"grpo": {"config": str(RECIPE / "grpo/config.yaml")}, "eval": {"config": str(RECIPE / "eval.yaml")}}
    values = {
        "output_dir": "runs",
        "seeds": [0, 1],
        "reference": ["nll/last"],
        "chain": chain,
        "settings": {
            "": {
                "sft": few,
                "grpo": {"max_steps": 4, "save_steps": 1, "save_total_limit": 4, "per_device_train_batch_size": 16},
                "eval": {"num_prompts": 16, "samples": 2},
            }
        },
        "methods": {loss: {"sft": {"cold_start_loss": loss}, "selections": ["last"]} for loss in ("nll", "aesl")},
    }
    (folder / "compare.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return folder / "compare.yaml"


# ---- Plan


def test_hours_as_estimated_and_as_measured(project, fakes):
    estimate = {"sft_s": 60, "rl_s": 120}
    path = project(estimate=estimate)
    config = read_config(path)
    cells = compare_cells.table_cells(config, {})
    found = hours(config, cells, 2)
    # 8 cells of 120 s and 4 cold starts of 60 s; two workers
    assert (found.cells, found.cold_starts) == (8, 4)
    assert found.process_h == pytest.approx((8 * 120 + 4 * 60) / 3600)
    assert found.wall_h == pytest.approx((8 * 120 + 4 * 60) / 7200)
    assert hours(config, cells, 50).wall_h == pytest.approx((60 + 2 * 120) / 3600)  # the longest group
    assert "0.33 process-hours, 0.17 hours with 2 workers (as the section estimate says)" in plan(
        config, path, cells, 2
    )
    assert hours(read_config(project()), cells, 1).process_h is None
    assert run(path, "--methods", "nll", "--seeds", "0") == 0
    for cell in cells[1:3]:
        record = cell.home / files.CHAIN
        chain = files.read_json(record)
        for stage in chain["stages"].values():
            stage["seconds"] = 10.0
        files.write_json(record, chain)
    found = hours(config, cells, 1)
    assert (found.cells, found.cold_starts, found.source) == (6, 3, "medians of 2 finished cells")
    # select, handoff, grpo, eval and report
    assert found.process_h == pytest.approx((6 * 50 + 3 * 10) / 3600)


@pytest.mark.parametrize(
    "name", ["compare_steps", *(pytest.param(f"compare{name}", marks=pytest.mark.slow) for name in ("_ablations", ""))]
)
def test_the_recipes_are_accepted(name, tmp_path):
    path = RECIPE / f"{name}.yaml"
    check(read_config(path, output_dir=str(tmp_path / "runs")), path)


def test_the_plan_knows_the_figures_that_an_evaluation_has():
    group = Group("", ["a", "b"], [1, 1], [False, False], [0.0, 0.0], rewards=[[0.0], [1.0]])
    assert {*FIGURES, "pass@1", "pass@2"} == set(measure([group]))


def test_rows_whose_point_is_open_count_a_cold_start_each(project):
    estimate = {"sft_s": 60, "rl_s": 120}
    config = read_config(project(estimate=estimate, tune={"seeds": [7], "grid": {"learning_rate": [0.1, 0.2]}}))
    cells = compare_cells.table_cells(config, {})
    found = hours(config, cells, 1, {"nll/turning_point", "nll/last"})
    # 8 cells; 4 cold starts of nll, which would be 2 if both rows had the same point, and 2 of AESL
    assert (found.cells, found.cold_starts) == (8, 6)


CHECKED = [
    ({"metric": "pas@1"}, ["metric: the evaluation has no figure 'pas@1'", "'pass@1'"]),
    ({"metric": "pass@16"}, ["metric: the evaluation has no figure 'pass@16'", "'pass@1'"]),
    ({"tune": {**TUNE, "by": "entrpy"}}, ["tune.by", "'entropy'"]),
    ({"methods": {"nll": {"sft": {"cold_start_los": "nll"}}}}, ["config_nll.yaml as compare.yaml changes it for nll"]),
    ({"methods": {"nll": {"sft": {"cold_start_loss": "nl"}}}}, ["cold_start_loss must be one of", "'nll'"]),
    ({"settings": {"few": {"grpo": {"max_stps": 3}}}}, ["grpo/config.yaml as compare.yaml changes it", "'max_steps'"]),
    ({"rl_from_steps": [15]}, ["rl_from_steps: step 15 is never saved, candidates are every 10 steps"]),
    ({"rl_from_steps": [500]}, ["rl_from_steps: step 500 is beyond max_steps 400"]),
    ({"chain": {"handoff": {"mode": "merg"}}}, ["compare.yaml: chain: handoff", "merge"]),
    (
        {"rl_from_steps": [10], "settings": {"few": {"sft": {"max_candidates": 5}}}},
        ["keeps 5 of 40 candidates; set max_candidates: 40"],
    ),
]


@pytest.mark.parametrize("changes, parts", CHECKED)
def test_a_mistake_is_found_before_anything_starts(project, tmp_path, changes, parts):
    """With the real configs of skills-tiny, as their stages read them."""
    chain = {stage: {"config": str(RECIPE / stage / "config.yaml")} for stage in ("grpo",)}
    chain |= {"sft": {"config": str(RECIPE / "sft/config_nll.yaml")}, "eval": {"config": str(RECIPE / "eval.yaml")}}
    more = {"chain": {**chain, **changes.pop("chain", {})}, "methods": ONE, "reference": []}
    path = project(**{**more, **changes})
    with pytest.raises(InputError) as error:
        check(read_config(path), path)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)
    assert not (tmp_path / "runs").exists()
