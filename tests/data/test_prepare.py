"""`aesl data`: what is kept, what is dropped and why, that nothing is in two files, and one line for what is wrong."""

import json
import re
from pathlib import Path

import preloaded
import pytest
import yaml
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from small_problems import (
    RATES,
    answer_of,
    asked,
    contents_of,
    demonstration,
    dropped_in,
    gsm8k_row,
    openr1_row,
    openr1_rows,
    problem_text,
    problems_in,
    write_rows,
)
from tiny_models import build_model, build_tokenizer

from aesl_trl.data import prepare
from aesl_trl.data.config import DataArguments
from aesl_trl.data.decontaminate import BenchmarkIndex
from aesl_trl.data.problems import Drops, Problem, normalise, problem_id
from aesl_trl.data.rows import load_rows
from aesl_trl.errors import InputError
from aesl_trl.files import read_json, read_jsonl
from aesl_trl.training.grpo import check_rows


ROWS = Path(__file__).parents[1] / "fixtures"


# ---- What the files hold


def test_files_are_disjoint_nested_and_complete(run):
    out = run(subsets=[4, 20])
    sft, rl, held_out = (problems_in(out / name) for name in ("sft_20.jsonl", "rl.jsonl", "held_out.jsonl"))
    assert (len(sft), len(rl), len(held_out)) == (20, 32, 8)
    assert sorted(sft + rl + held_out) == sorted(problem_text(number) for number in range(60))
    assert problems_in(out / "sft.jsonl") == sft[:12] and problems_in(out / "sft_4.jsonl") == sft[:4]
    assert dropped_in(out) == []


def test_rows_are_those_of_the_source(run):
    out = run()
    numbers = {problem_text(number): number for number in range(60)}
    for name in ("sft.jsonl", "rl.jsonl", "held_out.jsonl"):
        for row in read_jsonl(out / name):
            number = numbers[row["prompt"][-1]["content"]]
            assert row["prompt"] == openr1_row(number)["prompt"]
            assert row["solution"] == f"${answer_of(number)}$"
            assert row["id"] == problem_id(problem_text(number))
            completion = [{"role": "assistant", "content": demonstration(number)}]
            assert row.get("completion") == (completion if name == "sft.jsonl" else None)


def test_parquet_and_jsonl_give_the_same(run, tmp_path):
    one = contents_of(run())
    Dataset.from_list(openr1_rows()).to_parquet(str(tmp_path / "rows.parquet"))
    other = contents_of(run(dataset_name="rows.parquet", output_dir="parquet"))
    assert {name: one[name] for name in one if name != "data.json"} == {
        name: other[name] for name in other if name != "data.json"
    }
    left, right = (json.loads(each["data.json"]) for each in (one, other))
    assert left["source"]["content"] == right["source"]["content"] and left["files"] == right["files"]


def test_gsm8k(run):
    out = run([gsm8k_row(number) for number in range(60)], verify=True)
    row = read_jsonl(out / "sft.jsonl")[0]
    number = [problem_text(number) for number in range(60)].index(row["prompt"][0]["content"])
    a, b, lost, end = 3 * number + 2, 5 * number + 7, number % 7, answer_of(number)
    steps = f"There are {a}+{b}={a + b}.\nLess {lost} that is {end}."
    text = f"{steps}\n\nThe final answer is $\\boxed{{{end}}}$."
    assert row["completion"] == [{"role": "assistant", "content": text}]
    assert row["solution"] == f"${end}$" and len(row["prompt"]) == 1
    assert len(problems_in(out / "rl.jsonl")) == 40


@pytest.mark.parametrize("name", ["openr1_math_rows.jsonl", "gsm8k_rows.jsonl"])
def test_rows_of_each_schema(name, run):
    out = run(dataset_name=str(ROWS / name), num_demonstrations=1, num_held_out=1, verify=True)
    assert [len(problems_in(out / file)) for file in ("sft.jsonl", "rl.jsonl", "held_out.jsonl")] == [1, 1, 1]


def test_own_system_prompt_and_template(run):
    out = run(system_prompt="", prompt_template="{problem}\nUse \\boxed{}.")
    assert read_jsonl(out / "rl.jsonl")[0]["prompt"][0]["role"] == "user"
    assert all(text.endswith("end?\nUse \\boxed{}.") for text in problems_in(out / "held_out.jsonl"))
    out = run(system_prompt="Be brief.", output_dir="other")
    assert read_jsonl(out / "sft.jsonl")[0]["prompt"][0] == {"role": "system", "content": "Be brief."}


def test_trainers_take_them(run, tmp_path):
    """SFT trains a step on sft.jsonl, and GRPO's own checks and reward pass rl.jsonl."""
    from small_runs import trainer_for

    from aesl_trl.rewards.functions import load_reward_funcs

    out = run()
    tokenizer = build_tokenizer()
    rows = load_rows(str(out / "sft.jsonl"))
    model = build_model(tokenizer, max_position_embeddings=1024)
    trainer = trainer_for(tokenizer, tmp_path / "sft", model, rows, max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1
    check_rows(load_rows(str(out / "rl.jsonl")), reward_funcs=load_reward_funcs(["accuracy_reward"]), field="rl")


# ---- The order


def test_seed_decides_the_order(run):
    one, again, other = (run(output_dir=name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert problems_in(one / "sft.jsonl") == problems_in(again / "sft.jsonl") != problems_in(other / "sft.jsonl")


def test_a_dropped_row_moves_no_other(run):
    """Order of the source and absence of other rows change nothing but the rows at the borders."""
    whole = run(output_dir="whole")
    first = problems_in(whole / "sft.jsonl")[0]
    rows = [row for row in reversed(openr1_rows()) if row["prompt"][1]["content"] != first]
    less = run(rows, output_dir="less")
    assert problems_in(less / "sft.jsonl") == [
        *problems_in(whole / "sft.jsonl")[1:],
        problems_in(whole / "rl.jsonl")[0],
    ]
    assert problems_in(less / "held_out.jsonl") == problems_in(whole / "held_out.jsonl")


def serve_all(batch):
    return [("text", "", "") for _ in batch]


TEXT = st.lists(st.sampled_from(["a", "b", "Find", "$x$", "x", "+", "-", "1"]), min_size=1, max_size=5).map(" ".join)


@given(st.lists(TEXT, min_size=4, max_size=30), st.integers(0, 3), st.data())
def test_splits_are_disjoint_and_nested_for_any_sizes(found, seed, draw):
    """Texts repeat and differ in layout alone, so that duplicates would cross the splits."""
    drops = Drops()
    read = [Problem(row, problem_id(text), text, "$1$") for row, text in enumerate(found)]
    kept = prepare.in_order(prepare.without_duplicates(read, drops), seed)
    assert len({normalise(problem.text) for problem in kept}) == len(kept)
    assert len(kept) + len(drops.rows) == len(found)
    small, large = sorted(draw.draw(st.tuples(st.integers(1, 30), st.integers(1, 30))))
    num_held_out = draw.draw(st.integers(1, len(kept)))
    before = None
    for size in (small, large):
        args = DataArguments(num_demonstrations=size, num_held_out=num_held_out)
        demonstrations, rl, held_out = prepare.split(kept, args, serve_all, drops)
        parts = [{normalise(p.text) for p in part} for part in ([p for p, _ in demonstrations], rl, held_out)]
        assert sum(map(len, parts)) == len(set.union(*parts)) == len(kept)
        assert before is None or (demonstrations[: len(before[0])], held_out) == before
        before = demonstrations, held_out


# ---- What is dropped


WRONG = demonstration(1).replace(f"\\boxed{{{answer_of(1)}}}", "\\boxed{7}")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (asked(problem_text(2).replace("$", " $ ").upper()), "duplicate"),
        (asked(""), "no_problem"),
        ({"prompt": openr1_row(1)["prompt"] + openr1_row(1)["target"] + openr1_row(2)["prompt"][1:]}, "no_problem"),
        ({"prompt": []}, "no_problem"),
        ({"reward_model": {"ground_truth": " ", "style": "rule"}}, "no_solution"),
        ({"reward_model": None}, "no_solution"),
        (asked(problem_text(1) + " It rains." * 200), "prompt_too_long"),
        (asked("How?") | {"reward_model": {"ground_truth": "\\ldots", "style": "rule"}}, "not_gradable"),
    ],
)
def test_a_row_that_nothing_can_use(changes, reason, run):
    rows = openr1_rows()
    place = 40  # after the row that it repeats
    rows[place] = openr1_row(1) | changes
    out = run(rows, max_prompt_length=1000, verify=reason == "not_gradable")
    # row 1 itself is still there, and only the planted row went
    assert dropped_in(out) == [(place, "all", reason)]
    assert read_json(out / "data.json")["dropped"] == {reason: 1}
    assert sum(len(problems_in(out / name)) for name in ("sft.jsonl", "rl.jsonl", "held_out.jsonl")) == 59


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"target": []}, "no_demonstration"),
        ({"target": [{"content": "", "role": "assistant"}]}, "no_demonstration"),
        ({"target": openr1_row(1)["prompt"]}, "no_demonstration"),
        ({"target": [{"content": WRONG, "role": "assistant"}]}, "wrong"),
        ({"target": [{"content": "Hm. " * 300 + demonstration(1), "role": "assistant"}]}, "too_long"),
    ],
)
def test_a_row_that_only_rl_can_use(changes, reason, run):
    """The first in order would be a demonstration; it goes to RL, and the next ones move up."""
    usual = problems_in(run(max_length=1000) / "sft.jsonl")
    rows = openr1_rows()
    place = [problem_text(number) for number in range(60)].index(usual[0])
    answer = {"reward_model": {"ground_truth": str(answer_of(1)), "style": "rule"}}
    rows[place] |= changes | (answer if reason != "wrong" else {})
    out = run(rows, output_dir="other", max_length=1000, verify=reason == "wrong")
    assert dropped_in(out) == [(place, "sft", reason)]
    assert problems_in(out / "sft.jsonl")[:11] == usual[1:] and problems_in(out / "rl.jsonl")[0] == usual[0]


def test_verify_off_keeps_them(run):
    rows = openr1_rows()
    rows[40]["reward_model"] = {"ground_truth": "\\ldots", "style": "rule"}
    assert dropped_in(run(rows)) == []


def test_problems_of_a_benchmark_are_nowhere(run, tmp_path):
    """Also those that stand inside a longer text."""
    inside = [problem_text(number) for number in range(0, 12)]
    write_rows(tmp_path / "bench.jsonl", [{"problem": text} for text in inside])
    rows = openr1_rows()
    rows[30] = openr1_row(30, **asked("First an easy one. " + problem_text(5) + " Say why."))
    out = run(rows, decontaminate=["bench.jsonl"])
    index = BenchmarkIndex({"bench": inside})
    for name in ("sft.jsonl", "rl.jsonl", "held_out.jsonl"):
        assert all(index.find(text) is None for text in problems_in(out / name))
    assert read_json(out / "data.json")["dropped"] == {"in_benchmark": 13}


# ---- What cannot be used


def gone(column):
    return [{key: value for key, value in row.items() if key != column} for row in openr1_rows()]


BAD = [
    ({"dataset_name": "unset"}, None, "dataset_name is missing"),
    ({"output_dir": "unset"}, None, "output_dir is missing"),
    ({"model_name_or_path": "unset"}, None, "model_name_or_path is missing"),
    ({"num_demonstration": 3}, None, "unknown key 'num_demonstration'; did you mean 'num_demonstrations'"),
    ({"num_held_out": 0}, None, "num_held_out is 0, but must be at least 1"),
    ({"subsets": [4, 4]}, None, r"subsets must be different positive sizes, got \[4, 4\]"),
    ({"subsets": [0]}, None, "subsets must be different positive sizes"),
    ({"ngram": 0}, None, "ngram is 0, but must be at least 1"),
    ({"ngram_share": 1.0}, None, "ngram_share is 1.0, but must be at least 0 and below 1"),
    ({"prompt_template": "Solve it."}, None, "prompt_template must hold {problem}"),
    ({"difficulty_bounds": [0.8, 0.2]}, None, "difficulty_bounds must be two rising pass rates"),
    ({"difficulty_size": 3}, None, "difficulty_size needs pass rates"),
    ({"pass_rate_column": "a", "pass_rate_samples": 2}, None, "both give pass rates"),
    ({"pass_rate_samples": -1}, None, "pass_rate_samples is -1, but must be at least 0"),
    ({"pass_rate_column": "ability_"}, None, "no column 'ability_'; did you mean 'ability'"),
    ({"pass_rate_column": "ability"}, None, r"row 0 \(from 0\): a pass rate lies between 0 and 1, got 'math'"),
    ({"pass_rate_file": "rates.jsonl"}, None, "pass_rate_file: rates.jsonl does not exist"),
    ({"pass_rate_file": "rows.jsonl"}, None, "needs the columns pass_rate and id or problem, its columns are data_s"),
    ({"pass_rate_file": "twice.jsonl"}, None, "row 1 .* has the pass rate 0.5 here and 1.0 above"),
    ({"pass_rate_file": "high.jsonl"}, None, "a pass rate lies between 0 and 1, got 8"),
    ({"pass_rate_file": "other.jsonl"}, None, "no pass rate is known for any of the 12 demonstrations"),
    ({"decontaminate": ["bench.jsonl"]}, None, "decontaminate: bench.jsonl does not exist"),
    ({"reward_funcs": ["accuracy"]}, None, "unknown reward 'accuracy'; did you mean 'accuracy_reward'"),
    (
        {},
        gone("target"),
        "needs the columns prompt, target and reward_model .* its columns are data_source, prompt, ab",
    ),
    ({}, gone("prompt"), r"or question and answer \(GSM8K\), its columns are"),
    ({}, [{"question": "q", "anser": "a"}], "its columns are question, anser; did you mean 'answer'"),
    ({}, [openr1_row(1, prompt="text")], "prompt must be a list of messages, it is a str"),
    ({}, [openr1_row(1, reward_model={"style": "rule"})], "reward_model must hold ground_truth, it holds style"),
    ({}, [openr1_row(1, **asked(""))] * 2, r"no problem is left of 2 rows \(no_problem 2\)"),
    ({"max_prompt_length": 5}, None, r"no problem is left of 60 rows \(prompt_too_long 60\)"),
    ({"num_demonstrations": 52}, None, "60 problems are left of 60 rows .none dropped., and 61 are needed"),
    ({"subsets": [100]}, None, "and 109 are needed for the largest subset"),
    ({"num_rl": 41}, None, "and 61 are needed"),
    ({"max_length": 300}, None, r"0 demonstrations are left \(too_long 52\), and 12 are asked for"),
    ({"difficulty_size": 9, "pass_rate_file": "all.jsonl"}, None, "difficulty_size is 9, but hard has 1 of"),
    ({"decontaminate": ["AIME42"]}, None, "decontaminate: AIME42 is neither a file nor one of .*; did you mean 'AIME"),
    ({"decontaminate": ["AIME24"]}, None, "decontaminate: AIME24: .* cannot be loaded"),  # offline, as every test runs
]


@pytest.mark.parametrize(("changes", "rows", "message"), BAD, ids=[message[:40] for _, _, message in BAD])
def test_what_cannot_be_used_is_one_line(changes, rows, message, run, tmp_path):
    name = problem_text(1)
    write_rows(tmp_path / "twice.jsonl", [{"problem": name, "pass_rate": 1.0}, {"problem": name, "pass_rate": 0.5}])
    write_rows(tmp_path / "high.jsonl", [{"problem": name, "pass_rate": 8}])
    write_rows(tmp_path / "other.jsonl", [{"problem": "other", "pass_rate": 1.0}])
    write_rows(tmp_path / "all.jsonl", [{"problem": text, "pass_rate": rate} for text, rate in RATES.items()])
    with pytest.raises(InputError) as error:
        run(rows, **changes)
    assert re.search(message, str(error.value)), error.value
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").glob("*.json*"))


def test_models_that_do_not_exist(run):
    with pytest.raises(InputError, match="no-such-org/no-such-model"):
        run(model_name_or_path="no-such-org/no-such-model")


# ---- The command


def aesl(*argv):
    return preloaded.run(["-m", "aesl_trl.cli", "data", *argv], timeout=240)


def test_the_command(tmp_path, tiny_model_dir):
    Dataset.from_list(openr1_rows()).to_parquet(str(tmp_path / "rows.parquet"))
    config = tmp_path / "data.yaml"
    values = {
        "dataset_name": "rows.parquet",
        "model_name_or_path": tiny_model_dir,
        "output_dir": "out",
        "num_demonstrations": 12,
        "num_held_out": 8,
    }
    config.write_text(yaml.safe_dump(values))
    done = aesl("--config", str(config), "--subsets", "4", "6")
    assert done.returncode == 0, done.stderr
    assert "written: sft.jsonl 12, sft_4.jsonl 4, sft_6.jsonl 6, rl.jsonl 40, held_out.jsonl 8" in done.stdout
    assert len(problems_in(tmp_path / "out" / "sft_6.jsonl")) == 6
    refused = aesl("--config", str(config))
    assert refused.returncode == 2 and refused.stdout == ""
    assert [line for line in refused.stderr.splitlines() if line.startswith("aesl data: ")] == [
        f"aesl data: {tmp_path}/out holds the output of other settings (subsets [4, 6], now None): --overwrite "
        "replaces it, or name another output_dir"
    ]
