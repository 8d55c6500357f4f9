"""The recipe of a real model: answers in three forms, and splits that share no question."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import yaml
from gym_tasks import use_stand_in
from recipe_task import RECIPES, recipe_task

from aesl_trl.chain import chain
from aesl_trl.errors import InputError
from aesl_trl.files import read_json
from aesl_trl.recipes.check import check_config
from aesl_trl.recipes.recipes import find_configs
from aesl_trl.rewards.gym import gym_reward


RECIPE = RECIPES / "SmolLM2-135M-Instruct"
task = recipe_task(RECIPE.name)
needs_gym = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed"
)


def row(family, solution, **facts):
    return {"task": family, "solution": solution, "metadata": json.dumps({"entry": {"metadata": facts}})}


SUM = row("chain_sum", "7", expression="4 + 5 - 2")
SHORT_SUM = row("chain_sum", "-5", expression="4 - 9")
PRODUCT = row("products", "162", expression="9 * 9 * 2")
LEGS = row("leg_counting", "26", animals={"crab": 2, "beetle": 1})


@pytest.mark.parametrize(
    ("problem", "line"),
    [
        (SUM, "4 + 5 - 2 = 9 - 2 = 7\n#### 7"),
        (SHORT_SUM, "4 - 9 = -5\n#### -5"),
        (PRODUCT, "9 * 9 * 2 = 81 * 2 = 162\n#### 162"),
        (LEGS, "2 * 10 + 1 * 6 = 26\n#### 26"),
    ],
)
def test_a_short_answer_holds_its_results_in_one_line(problem, line):
    assert task.in_one_line(problem) == line
    assert task.at_once(problem) == line.splitlines()[-1]


@pytest.mark.parametrize(
    ("problem", "text"),
    [
        (
            SUM,
            "4 + 5 = 9, so after the number 5 we have 9.\n9 - 2 = 7, so after the number 2 we have 7.\n"
            "Check: 7 + 2 = 9, and 9 - 5 = 4, the number that we began with.\n#### 7",
        ),
        (
            SHORT_SUM,
            "4 - 9 = -5, so after the number 9 we have -5.\n"
            "Check: -5 + 9 = 4, the number that we began with.\n#### -5",
        ),
        (
            PRODUCT,
            "9 * 9 = 81, so after the number 9 we have 81.\n81 * 2 = 162, so after the number 2 we have 162.\n"
            "Check: in the other order 2 * 9 = 18, and 18 * 9 = 162, the same result.\n#### 162",
        ),
        (
            LEGS,
            "One crab has 10 legs: 2 * 10 = 20.\nOne beetle has 6 legs: 1 * 6 = 6.\nTogether: 20 + 6 = 26 legs.\n"
            "Check: 26 - 6 = 20, the legs of the crab.\n#### 26",
        ),
    ],
)
def test_a_long_answer_has_each_result_on_a_line_and_a_check(problem, text):
    assert task.in_long_form(problem) == text


def test_the_readme_says_what_the_gate_found_and_the_present_settings_pass_it():
    attempts = read_json(RECIPE / "results/stage_0.json")
    readme = (RECIPE / "README.md").read_text(encoding="utf-8")
    for number, attempt in enumerate(attempts, 1):
        found = " | ".join(f"{row['pass@1']:.2f}, {row['pass@16']:.2f}" for row in attempt["gate"])
        (line,) = [line for line in readme.splitlines() if line.startswith(f"| {number}") and found in line]
        assert line.endswith("| passes |") == all(row["passes"] for row in attempt["gate"])
    assert (attempts[-1]["settings"], attempts[-1]["rows"]) == (task.TASKS, task.SIZES["base"])
    assert all(row["passes"] for row in attempts[-1]["gate"])


def test_the_configs_have_the_rates_that_were_chosen():
    rates = read_json(RECIPE / "results/rates.json")
    for name in ("config_nll", "config_aesl", "config_aesl_auto"):
        config = yaml.safe_load((RECIPE / f"sft/{name}.yaml").read_text())
        assert config["learning_rate"] == float(rates["sft"]["chosen"])
    config = yaml.safe_load((RECIPE / "grpo/config.yaml").read_text())
    assert config["learning_rate"] == float(rates["rl"]["chosen"])


@pytest.mark.slow
@needs_gym
def test_the_splits_share_no_question_and_all_answers_earn_the_reward():
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    assert task.LEGS_OF == ANIMALS
    questions = lambda rows: {each["prompt"][0]["content"] for each in rows}  # noqa: E731
    splits = [task.stage_0(0), task.rl_problems(0), task.held_out(0), task.test_problems(0)]
    assert [len(questions(rows)) for rows in splits] == [1600, 3000, 288, 256]
    assert len(set.union(*map(questions, splits))) == sum(map(len, splits))
    shown = task.demonstrations(0)
    assert len(questions(shown)) == 300 and questions(shown) <= questions(splits[1])
    assert questions(task.eval_demonstrations(0)) <= questions(splits[2])
    assert {each["task"] for each in shown} == set(task.DEMONSTRATED)
    for rows in (splits[0], shown, task.demonstrations(1)):
        assert set(gym_reward([each["completion"] for each in rows], [each["metadata"] for each in rows])) == {1.0}
    short = [each["completion"][0]["content"].startswith("####") for each in splits[0]]
    assert 0.4 < sum(short) / len(short) < 0.6
    assert task.stage_0(1) != splits[0]


@pytest.mark.parametrize("path", find_configs([RECIPE]), ids=lambda path: path.relative_to(RECIPE).as_posix())
def test_a_config_needs_neither_weights_nor_the_gym(path, monkeypatch):
    use_stand_in(monkeypatch)
    assert not check_config(path).problems


def test_missing_weights_name_the_script_that_builds_them(tmp_path):
    recipe = shutil.copytree(RECIPE, tmp_path / "recipes" / RECIPE.name)  # whose runs are not there
    shutil.copytree(RECIPES / "accelerate_configs", tmp_path / "recipes" / "accelerate_configs")
    with pytest.raises(InputError, match="does not exist.*; first make it: python scripts/build_smollm2_base.py"):
        chain.main(["--config", str(recipe / "chain.yaml"), "--dry_run"])


ARMS = {"nll": "nll", "aesl_3": "AESL, `t_scaling` 3", "aesl_auto": "AESL, `t_scaling: auto`"}


def premise_lines(folder: Path) -> list[str]:
    """Return the lines of a set's table: each arm's last step, and the base, at every seed that was recorded."""
    cells = [read_json(path) for path in sorted(folder.glob("*-seed-*.json"))]
    columns = ("entropy", "self_bleu", "pass@1", "pass@8", "coverage_lost", "truncated")
    lines = []

    def add(name: str, rows: list[dict]) -> None:
        values = [", ".join(f"{row[key]:.2f}" for row in rows if key in row) or "-" for key in columns]
        effective = ", ".join(f"{row['weight_effective']:.2f}" for row in rows if "weight_effective" in row) or "-"
        lines.append(f"| {' | '.join([name, effective, *values])} |")

    add("the base", [cell["measured"][0] for cell in cells if cell["arm"] == "nll"])
    for arm, name in ((arm, name) for arm, name in ARMS.items() if any(cell["arm"] == arm for cell in cells)):
        add(name, [{**cell["logged"][-1], **cell["measured"][-1]} for cell in cells if cell["arm"] == arm])
    return lines


@pytest.mark.parametrize("page", ["recipes/SmolLM2-135M-Instruct/README.md", "docs/results.md"])
def test_the_pages_show_the_recorded_premises(page):
    lines = (RECIPES.parent / page).read_text(encoding="utf-8").splitlines()
    for folder in sorted((RECIPE / "results/premises").iterdir()):
        missing = [line for line in premise_lines(folder) if line not in lines]
        assert not missing


STARTS = {"base": "the base", "nll/last": "nll", "aesl_3/last": "AESL, `t_scaling` 3"}


@pytest.mark.parametrize("page", ["recipes/SmolLM2-135M-Instruct/README.md", "docs/results.md"])
def test_the_pages_show_the_recorded_comparison(page):
    lines = (RECIPES.parent / page).read_text(encoding="utf-8").splitlines()
    result = read_json(RECIPE / "results/compare_short/compare.json")
    assert {row["name"] for row in result["rows"]} == set(STARTS)
    for row in result["rows"]:
        names = ("pass@1", "pass@4", "pass@1[leg_counting]", "entropy", "groups_mixed")
        values = [", ".join(f"{row[when][name]['mean']:.2f}" for when in ("before", "after")) for name in names]
        assert f"| {' | '.join([STARTS[row['name']], *values])} |" in lines
