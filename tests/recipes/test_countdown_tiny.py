"""The second task: honest splits, an exact reward, solutions in two forms, and a builder that makes what it says."""

import random
import shutil
import subprocess
import sys
from pathlib import Path

import build_countdown_tiny_base as builder
import countdown_by_form as by_form
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from recorded_results import cells_of, rows_with_intervals, seeds_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from aesl_trl.compare.table import correlations
from aesl_trl.files import read_json


ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "countdown-tiny"
RESULTS = RECIPE / "results"

task = builder.task
GENERATORS = [task.demonstrations, task.eval_demonstrations, task.rl_problems, task.held_out]


def problems(rows):
    return {(*sorted(row["numbers"]), row["target"]) for row in rows}


def reward(completion, numbers=(3, 5, 7, 2), target=20):
    return task.countdown_reward(None, [completion], [list(numbers)], [target])[0]


# ---- Data


@pytest.mark.parametrize("generator", GENERATORS)
def test_a_seed_fixes_the_rows_and_another_changes_them(generator):
    assert generator(3) == generator(3) != generator(4)
    assert len(problems(generator(0))) == len(generator(0))


def test_no_problem_serves_two_uses_whatever_the_seeds():
    found = [set().union(*(problems(generator(seed)) for seed in range(3))) for generator in GENERATORS]
    base = task.chains("base", 0)
    found.append({(*sorted(row[1]), row[3][-1]) for row in (next(base) for _ in range(5000))})
    assert len(set().union(*found)) == sum(map(len, found))
    assert sorted(residue for use in task.USES.values() for residue in use) == list(range(7))


def test_demonstrations_are_right_and_only_add_and_subtract():
    rows = task.demonstrations(0)
    texts = [row["completion"][0]["content"] for row in rows]
    assert task.countdown_reward(None, texts, [r["numbers"] for r in rows], [r["target"] for r in rows]) == [1.0] * 200
    assert not any("times" in text or "over" in text for text in texts)
    assert all(text.count(task.IS) == 3 for text in texts)


def test_problems_show_no_answer():
    assert all(set(row) == {"prompt", "numbers", "target"} for row in task.rl_problems(0, num=20))
    (message,) = task.held_out(0, num=1)[0]["prompt"]
    assert message["content"].split()[4] == task.MAKE and message["role"] == "user"


@pytest.mark.parametrize(
    ("name", "a", "b", "result"),
    [("plus", 60, 40, None), ("plus", 60, 39, 99), ("minus", 3, 4, None), ("minus", 4, 4, 0), ("times", 11, 9, 99)]
    + [("times", 25, 4, None), ("over", 12, 4, 3), ("over", 12, 5, None), ("over", 0, 5, 0), ("over", 5, 0, None)],
)
def test_operations_stay_whole_and_below_a_hundred(name, a, b, result):
    assert task.OPERATIONS[name](a, b) == result


# ---- Reward


@given(st.integers(0, 10**6))
def test_both_forms_of_a_solution_are_right(seed):
    numbers, names, results = task.random_chain(random.Random(seed), tuple(task.OPERATIONS))
    steps = task.in_steps(numbers, names, results)
    assert task.is_right(task.at_once(numbers, names), numbers[::-1], results[-1])
    assert task.is_right(steps, numbers, results[-1])
    assert not task.is_right(steps, numbers, results[-1] + 1)
    assert not task.is_right(steps, [*numbers[1:], numbers[0] % 9 + 1], results[-1])


@pytest.mark.parametrize(
    ("completion", "wanted"),
    [
        ("three times five plus seven minus two", 1.0),
        ([{"role": "assistant", "content": "three times five plus seven minus two"}], 1.0),
        ("three times five is fifteen then fifteen plus seven is twentytwo then twentytwo minus two is twenty", 1.0),
        # a wrong intermediate result, one that is not carried on, a number twice, one too few, not ended, nothing
        (
            "three times five is sixteen then sixteen plus seven is twentythree then twentythree minus two is twenty",
            0.0,
        ),
        ("three times five is fifteen then ten plus seven is seventeen then seventeen minus two is twenty", 0.0),
        ("five times five minus five", 0.0),
        ("three times five plus seven", 0.0),
        ("three times five plus seven minus", 0.0),
        ("three times five is fifteen then", 0.0),
        ("twenty", 0.0),
        ("", 0.0),
        ([], 0.0),
        (None, 0.0),
    ],
)
def test_reward(completion, wanted):
    assert reward(completion) == wanted


# ---- Base


def test_every_word_is_one_token_and_prompts_are_not_trained():
    tokenizer = builder.build_tokenizer()
    assert all(len(tokenizer(f" {word}")["input_ids"]) == 1 for word in task.WORDS)
    ids, labels = next(builder.batches(tokenizer, 0.5, rows=8, seed=0))
    for row, label in zip(ids.tolist(), labels.tolist(), strict=True):
        text = tokenizer.decode([token for token in label if token != -100])
        assert text.endswith(builder.END) and builder.ASSISTANT not in text
        shown = tokenizer.decode(row).split(builder.ASSISTANT)[0].removeprefix(builder.USER).split()
        numbers, target = [task.VALUE_OF[word] for word in shown[:4]], task.VALUE_OF[shown[5]]
        assert task.is_right(text.removesuffix(builder.END), numbers, target)


def test_the_template_writes_what_the_base_was_trained_on():
    tokenizer = builder.build_tokenizer()
    row = task.demonstrations(0, num=1)[0]
    prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
    text = row["prompt"][0]["content"]
    assert prompt == f"{builder.USER} {text}{builder.ASSISTANT}"
    assert whole == f"{prompt} {row['completion'][0]['content']}{builder.END}"


def test_a_few_steps_learn_and_save(tmp_path):
    builder.build(tmp_path, equal_steps=1, skewed_steps=1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    batches = builder.batches(builder.build_tokenizer(), builder.EQUAL, rows=16, seed=0)
    first, later = (builder.train(model, batches, steps=steps, warmup=2, decay=2) for steps in (1, 12))
    assert later < first - 0.5


def test_the_shipped_base_solves_some_and_seldom_in_steps():
    tokenizer = AutoTokenizer.from_pretrained(RECIPE / "base")
    assert tokenizer.get_vocab() == builder.build_tokenizer().get_vocab()
    model = AutoModelForCausalLM.from_pretrained(RECIPE / "base")
    assert 2e6 < model.num_parameters() < 3e6
    rows = [row for row in task.held_out(0, num=96) for _ in range(8)]
    texts = [builder.USER + " " + row["prompt"][0]["content"] + builder.ASSISTANT for row in rows]
    prompts = tokenizer(texts, padding=True, return_tensors="pt")
    torch.manual_seed(0)
    samples = model.generate(**prompts, max_new_tokens=20, do_sample=True, temperature=1.0, top_k=0)
    texts = tokenizer.batch_decode(samples[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    rewards = task.countdown_reward(None, texts, [r["numbers"] for r in rows], [r["target"] for r in rows])
    in_steps = sum(task.IS in text for text in texts) / len(texts)
    assert 0.12 < sum(rewards) / len(rewards) < 0.25  # 0.19 over 384 problems; a standard error here is 0.02
    assert 0.005 < in_steps < 0.05  # trained at 0.02


# ---- What samples say of the form of answers


@pytest.mark.parametrize(
    ("numbers", "target", "suffice"), [([3, 5, 7, 2], 13, True), ([3, 5, 7, 2], 17, True), ([9, 9, 9, 9], 81, False)]
)
def test_whether_plus_and_minus_suffice(numbers, target, suffice):
    assert by_form.plus_and_minus_suffice(numbers, target) is suffice


def test_forms_are_counted_by_hand():
    """Four problems, each answered rightly in steps, and at once without two of its numbers."""
    problems = task.held_out(num=4)
    golds = [row["completion"][0]["content"] for row in task._rows("held_out", 0, 4)]
    groups = [
        {"prompt": problem["prompt"], "completions": [gold, "five times five"]}
        for problem, gold in zip(problems, golds, strict=True)
    ]
    found = by_form.by_form(groups)
    hard = [any(name in gold.split() for name in ("times", "over")) for gold in golds]
    assert found["in_steps"] == found["true"] == 0.5
    assert found["times_over"] == (sum(hard) + 4) / 8
    assert found["plus_minus_problems"] == found["other_problems"] == 0.5


# ---- The comparison


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_comparison_runs_and_its_samples_are_read(tmp_path):
    """The recipe's own files with sizes overridden: base and nll through all stages, then the table of forms."""
    folder = tmp_path / "recipes" / "countdown-tiny"
    shutil.copytree(RECIPE, folder, ignore=shutil.ignore_patterns("results"))
    shutil.copytree(RECIPE.parent / "accelerate_configs", folder.parent / "accelerate_configs")
    few = {"max_steps": 4, "diversity_steps": 2, "diversity_num_prompts": 8, "eval_steps": 2, "save_steps": 2}
    for path, changes in (
        ("sft/config_nll.yaml", few),
        ("grpo/config.yaml", {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 16}),
        ("eval.yaml", {"num_prompts": 16}),
    ):
        values = yaml.safe_load((folder / path).read_text()) | changes
        (folder / path).write_text("# One CPU core\n" + yaml.safe_dump(values))
    config = yaml.safe_load((folder / "compare.yaml").read_text())
    config.pop("tune")
    (folder / "compare.yaml").write_text("# One CPU core\n" + yaml.safe_dump(config, sort_keys=False))

    compare = [sys.executable, "-m", "aesl_trl.cli", "compare", "--config", folder / "compare.yaml"]
    subprocess.run([*compare, "--methods", "base", "nll", "--seeds", "0"], check=True)
    runs, output = tmp_path / "runs" / "countdown-tiny" / "compare", tmp_path / "by_form.json"
    script = [sys.executable, ROOT / "scripts" / "countdown_by_form.py", runs, "--output", output]
    table = subprocess.run(script, check=True, capture_output=True, text=True).stdout
    rows = {"base", "nll/turning_point", "nll/best_eval", "nll/last"}
    assert {line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:]} == rows
    for cell in read_json(output):
        assert cell["before"]["in_steps"] < 0.3 and all(0 <= value <= 1 for value in cell["after"].values())


# ---- What was recorded


@pytest.mark.parametrize(("comparison", "count"), [("main", 45), ("ablations", 21)])
def test_recorded_forms_are_those_of_the_recorded_comparison(comparison, count):
    """pass@1 is the mean over both kinds of problem, each with its own number of problems."""
    cells, forms = cells_of(RESULTS / comparison), read_json(RESULTS / comparison / "by_form.json")
    suffice = [by_form.plus_and_minus_suffice(row["numbers"], row["target"]) for row in task.held_out(num=384)]
    easy = sum(suffice) / len(suffice)
    assert len(forms) == len(cells) == count
    for form in forms:
        whole = cells[form["row"], form["seed"]]
        for when in ("before", "after"):
            mean = easy * form[when]["plus_minus_problems"] + (1 - easy) * form[when]["other_problems"]
            assert mean == pytest.approx(whole[when]["pass@1"], abs=1e-4)
            assert form[when]["true"] >= whole[when]["pass@1"] - 1e-4  # what is right is true


def test_the_results_readme_says_what_was_recorded():
    text = (RESULTS / "README.md").read_text()
    for shown in rows_with_intervals(RESULTS / "main"):
        assert shown in text, shown
    assert by_form.table(read_json(RESULTS / "main" / "by_form.json")) in text
    cells = [cell for cell in cells_of(RESULTS / "main").values() if cell["row"] != "base"]
    for found in correlations(cells, ["entropy", "self_bleu", "groups_mixed"], "pass@1"):
        assert f"{found['rho']:.2f}" == "-0.03" and found["cells"] == 40
    assert "(rank correlation -0.03 each, 40 runs)" in text


@pytest.mark.parametrize("comparison", ["main", "ablations"])
def test_the_results_readme_says_every_difference_to_the_last_step(comparison):
    text = (RESULTS / "README.md").read_text()
    for row in read_json(RESULTS / comparison / "compare.json")["rows"]:
        if found := row["differences"].get("nll/last"):
            found = found["after"]["pass@1"]
            assert f"| {found['mean']:.2f} [{found['low']:.2f}, {found['high']:.2f}] |" in text, row["row"]


def test_every_start_is_above_direct_rl_at_every_seed_as_the_results_say():
    for comparison, setting in (("main", ""), ("ablations", "rl_320/")):
        after = {key: cell["after"]["pass@1"] for key, cell in cells_of(RESULTS / comparison).items()}
        starts = [key for key in after if key[0].startswith(setting) and key[0] != f"{setting}base"]
        assert starts
        for row, seed in starts:
            assert after[row, seed] > after[f"{setting}base", seed]


def test_the_results_readme_says_what_each_ablation_ended_at():
    section = (RESULTS / "README.md").read_text().split("## Ablations")[1].split("\n## ")[0].replace("*", "")
    seeds = seeds_of(RESULTS / "ablations")
    assert len(seeds) == 7
    for shown in seeds.values():
        assert f"| {shown} |" in section, shown
