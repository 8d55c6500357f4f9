"""Cells: the rows of the table, the files that a cell is run by, and the cold starts that cells share."""

import yaml

from aesl_trl.compare.cells import Cell, groups, rows, table_cells
from aesl_trl.compare.config import Point, read_config


def test_rows_and_selections(project):
    config = read_config(project(rl_from_steps=[10, 40]))
    assert [row["row"] for row in rows(config)] == [
        "base",
        *("nll/turning_point", "nll/last", "nll/step-10", "nll/step-40"),
        *("aesl/last", "aesl/step-10", "aesl/step-40"),
    ]
    methods = {loss: {"sft": {"cold_start_loss": loss}} for loss in ("gem", "aesl")}  # that name no selection
    config = read_config(project(methods=methods, reference=[]))
    assert config.selections("gem") == config.selections("aesl") == ["turning_point"]
    assert read_config(project(methods=methods, reference=[], rl_from_steps=[10])).selections("gem") == ["step-10"]


def test_settings_choose_their_methods(project):
    settings = {"all": None, "few": {"sft": {"max_steps": 5}, "methods": ["nll"]}}
    found = rows(read_config(project(settings=settings)))
    assert [row["row"] for row in found if row["setting"] == "few"] == ["few/nll/turning_point", "few/nll/last"]
    assert sum(row["setting"] == "all" for row in found) == 4


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


def test_averages_are_measured_with_what_the_cold_start_was_changed_by(project, tmp_path):
    (tmp_path / "mix.yaml").write_text("diversity_steps: 5\nlearning_rate: 0.3\n")
    methods = {"nll": {"sft": {"cold_start_loss": "nll"}, "selections": ["mix", "last"]}}
    settings = {"few": {"sft": {"max_steps": 5}}}
    path = project(methods=methods, settings=settings, reference=[])
    values = yaml.safe_load(path.read_text())
    values["chain"]["mix"] = {"config": "mix.yaml", "weights": [0.5]}
    path.write_text(yaml.safe_dump(values))
    config = read_config(path)
    cell = Cell(config, "few", "nll", "mix", 1, Point((("learning_rate", 0.2),)))
    found = {path.name: values for path, values in cell.configs().items() if path.parent == cell.home}
    assert found["mix.yaml"] == {
        "diversity_steps": 5,
        "learning_rate": 0.2,
        "cold_start_loss": "nll",
        "max_steps": 5,
    }
    assert found["chain.yaml"]["mix"] == {"config": "mix.yaml", "weights": [0.5]}
    assert "mix" not in [*Cell(config, "few", "nll", "last", 1).configs().values()][-1]


def test_direct_rl_has_no_cold_start_and_a_step_is_a_selection(project):
    config = read_config(project(rl_from_steps=[30]))
    *_, base = Cell(config, "", "base", None, 0).configs().values()
    assert not {"sft", "selection", "handoff"} & base.keys()
    assert base["ignore_readiness"] is True and base["probe"] is None
    *_, step = Cell(config, "", "nll", "step-30", 0).configs().values()
    assert step["selection"] == {"step": 30}


def test_bases_and_rl_runs(project, tmp_path):
    """A base is a folder level and a model; RL runs share the cold start, and only RL's seed differs."""
    bases = {
        "small": {"model": "base"},
        "large": {"model": "other", "sft": {"learning_rate": 0.5}, "eval": {"samples": 2}},
    }
    plain = read_config(project(rl_runs=2))
    config = read_config(project(rl_runs=2, bases=bases, settings={"few": {"sft": {"max_steps": 5}}}))
    cells = table_cells(config, {})
    assert len(cells) == 2 * 2 * 4 * 2 and len({cell.home for cell in cells}) == len(cells)
    assert len(groups(cells)) == 2 * 2 * (2 + 2)  # two RL runs of the base, and two cold starts
    first, second = (Cell(config, "few", "nll", "last", 1, base="large", run=run) for run in (0, 1))
    assert second.label == "few/nll/last, base large, seed 1, RL run 2"
    found, again = first.configs(), second.configs()
    names = [str(path.relative_to(tmp_path / "runs/large/few")) for path in again]
    assert names == ["sft/nll.yaml", "grpo.yaml", "eval.yaml", "nll_last/seed-1-rl-2/chain.yaml"]
    *shared, chain = again.values()
    assert shared == list(found.values())[:-1]
    sft, grpo, evaluation = shared
    assert sft["model_name_or_path"] == "../../../../other" and (sft["learning_rate"], sft["max_steps"]) == (0.5, 5)
    assert grpo["model_name_or_path"] == "../../../other" and evaluation["num_samples"] == 2
    assert (chain["seed"], chain["grpo"].pop("seed")) == (1, 10001)
    *_, chain_of_first = found.values()
    assert {**chain, "report": {}} == {**chain_of_first, "report": {}}
    # without bases, and in the first RL run, all is as ever
    one = Cell(plain, "", "nll", "last", 1)
    assert one.home == tmp_path / "runs/nll_last/seed-1" and one.label == "nll/last, seed 1"
    assert "seed" not in one.configs()[one.home / "chain.yaml"]["grpo"]


def test_selections_share_a_cold_start(project):
    config = read_config(project())
    grouped = groups(table_cells(config, {}))
    assert [[cell.label for cell in group] for group in grouped[:3]] == [
        ["base, seed 0"],
        ["nll/turning_point, seed 0", "nll/last, seed 0"],
        ["aesl/last, seed 0"],
    ]
    assert len(grouped) == 6
