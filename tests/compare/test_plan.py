"""The plan: the hours that are left, and mistakes in configs that are found before anything starts."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from small_compare import ONE, TUNE, run

from aesl_trl import files
from aesl_trl.compare import plan as plans
from aesl_trl.compare.cells import table_cells
from aesl_trl.compare.config import read_config
from aesl_trl.compare.plan import FIGURES, check, hours, plan
from aesl_trl.compare.tuning import planned
from aesl_trl.diversity.figures import Group, measure
from aesl_trl.errors import InputError
from aesl_trl.estimates.hours import Span
from aesl_trl.values import load_yaml


RECIPE = Path(__file__).parents[2] / "recipes/skills-tiny"


def test_hours_as_estimated_and_as_measured(project, fakes):
    estimate = {"sft_s": 60, "rl_s": 120}
    path = project(estimate=estimate)
    config = read_config(path)
    cells = table_cells(config, {})
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


def test_hours_that_are_expected_until_a_cell_has_finished(project, tmp_path):
    path = project()
    config = read_config(path)
    cells = table_cells(config, {})
    expected = {(cell.method, ""): (60.0, 120.0) for cell in cells} | {("nll", ""): (20.0, 120.0)}
    # 8 cells of 120 s, 2 cold starts of 60 s, and 2 of nll, which takes a third of that
    assert hours(config, cells, 1, expected=expected).process_h == pytest.approx((8 * 120 + 2 * 60 + 2 * 20) / 3600)
    said = plan(config, path, cells, 1)
    assert "state it as estimate" in said and "(not estimated: " in said and "names no hardware" in said


def test_a_method_that_trains_for_longer_is_estimated_for_longer(project, monkeypatch):
    """Each method is asked for once in each setting, by its own config."""
    monkeypatch.setattr("aesl_trl.chain.hours.chain_hours", by_steps)
    config = read_config(project(methods={**ONE, "long": {"sft": {"max_steps": 70}, "selections": ["last"]}}))
    assert plans.estimated(config, Path("compare.yaml"))["fast"] == {
        ("nll", ""): (0.0, 5.0),
        ("long", ""): (70.0, 5.0),
    }


def by_steps(chain, path):
    steps = load_yaml(chain.config.sft.config).get("max_steps", 0)
    return {"sft": SimpleNamespace(seconds=Span(steps, steps)), "grpo": SimpleNamespace(seconds=Span(5.0, 9.0))}


def test_what_a_method_takes_is_worked_out_once_however_many_cells_there_are(project, monkeypatch):
    asked, real = [], plans._expected

    def counted(config, measured, cell, expected):
        asked.append(cell.method)
        return real(config, measured, cell, expected)

    monkeypatch.setattr(plans, "_expected", counted)
    config = read_config(project(seeds=[0, 1, 2, 3], estimate={"sft_s": 60, "rl_s": 120}))
    assert hours(config, table_cells(config, {}), 1).cells == 16
    assert sorted(asked) == ["aesl", "base", "nll"]


def test_rows_whose_point_is_open_count_a_cold_start_each(project):
    estimate = {"sft_s": 60, "rl_s": 120}
    config = read_config(project(estimate=estimate, tune={"seeds": [7], "grid": {"learning_rate": [0.1, 0.2]}}))
    cells = table_cells(config, {})
    found = hours(config, cells, 1, {"nll/turning_point", "nll/last"})
    # 8 cells; 4 cold starts of nll, which would be 2 if both rows had the same point, and 2 of AESL
    assert (found.cells, found.cold_starts) == (8, 6)


def test_the_plan_counts_bases_rl_runs_and_points_that_may_be_added(project):
    tune = {"seeds": [7, 8], "base": "spare", "keep": 1}
    bases = {name: {"model": model} for name, model in (("a", "base"), ("b", "other"), ("spare", "base"))}
    estimate = {"sft_s": 60, "rl_s": 120}
    path = project(methods=ONE, bases=bases, rl_runs=3, tune=tune, estimate=estimate)
    config = read_config(path)
    tuning, cells = planned(config), table_cells(config, {})
    # five rates on the first seed, one on the second, two more on both: each its own cold start
    assert [cell.base for cell in tuning] == ["spare"] * (5 + 1 + 2 * 2)
    assert len({cell.home for cell in tuning}) == 10
    found = hours(config, [*tuning, *cells], 1, {"nll/last"})
    assert found.cells == 10 + 2 * 2 * 3
    # RL runs share their start
    assert found.cold_starts == 10 + 2 * 2
    assert found.process_h == pytest.approx((22 * 120 + 14 * 60) / 3600)
    text = plan(config, path, [*tuning, *cells], 1, {"nll/last"})
    assert "tuning: nll/last x 10" in text and "table: nll/last x 12" in text


@pytest.mark.parametrize(
    "name", ["compare_steps", *(pytest.param(f"compare{name}", marks=pytest.mark.slow) for name in ("_ablations", ""))]
)
def test_the_recipes_are_accepted(name, tmp_path):
    path = RECIPE / f"{name}.yaml"
    check(read_config(path, output_dir=str(tmp_path / "runs")), path)


@pytest.mark.parametrize("count_by", [{}, {"count_by": "symbol"}])
def test_a_metric_of_one_value_needs_count_by(project, tmp_path, count_by):
    values = yaml.safe_load((RECIPE / "eval.yaml").read_text())
    values.pop("count_by", None)
    target = tmp_path / "eval_by.yaml"
    values["dataset_name"] = str(RECIPE / values["dataset_name"])
    values["reward_funcs"] = [str(RECIPE / name) for name in values["reward_funcs"]]
    target.write_text(yaml.safe_dump({**values, **count_by}))
    chain = {"grpo": {"config": str(RECIPE / "grpo/config.yaml")}, "eval": {"config": str(target)}}
    chain |= {"sft": {"config": str(RECIPE / "sft/config_nll.yaml")}}
    path = project(chain=chain, methods=ONE, reference=[], metric="pass@1[a]")
    if count_by:
        check(read_config(path), path)
    else:
        with pytest.raises(InputError, match="the evaluation has no figure"):
            check(read_config(path), path)


def test_the_plan_knows_the_figures_that_an_evaluation_has():
    group = Group("", ["a", "b"], [1, 1], [False, False], [0.0, 0.0], rewards=[[0.0], [1.0]])
    assert {*FIGURES, "pass@1", "pass@2"} == set(measure([group]))


CHECKED = [
    ({"metric": "pas@1"}, ["metric: the evaluation has no figure 'pas@1'", "'pass@1'"]),
    ({"metric": "pass@16"}, ["metric: the evaluation has no figure 'pass@16'", "'pass@1'"]),
    ({"metric": "pass@1[]"}, ["metric: the evaluation has no figure 'pass@1[]'", "'pass@1'"]),
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
