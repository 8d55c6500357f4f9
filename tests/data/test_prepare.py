"""`aesl data`: what is kept, what is dropped and why, that nothing is in two files, and one line for what is wrong."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from small_problems import (
    answer_of,
    asked,
    demonstration,
    gsm8k_row,
    openr1_row,
    openr1_rows,
    problem_text,
)
from tiny_models import build_model, build_tokenizer

from aesl_trl.data import output as prepare_output
from aesl_trl.data import pass_rates, prepare, problems
from aesl_trl.data import rows as data
from aesl_trl.data.config import DataArguments, difficulty_of
from aesl_trl.data.decontaminate import BenchmarkIndex, normalise
from aesl_trl.data.problems import Drops, Problem, problem_id
from aesl_trl.diversity.figures import Group
from aesl_trl.errors import InputError
from aesl_trl.files import read_json, read_jsonl
from aesl_trl.sampling import offline as transformers_engine
from aesl_trl.sampling import offline as vllm_engine
from aesl_trl.training.grpo import check_rows


ROOT = Path(__file__).parents[2]
ROWS = ROOT / "tests" / "fixtures"
SIZES = {"num_demonstrations": 12, "num_held_out": 8}
GRADED = {"verify": True}  # grading is the slow part, and left out where it is not the subject


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def run(tmp_path, tiny_model_dir):
    """Runs the command on rows, given or 60 of OpenR1's schema; returns the folder. Keywords are settings."""

    def prepared(rows=None, *flags, **settings) -> Path:
        write(tmp_path / "rows.jsonl", openr1_rows() if rows is None else rows)
        values = {"dataset_name": "rows.jsonl", "model_name_or_path": tiny_model_dir, "output_dir": "out", **SIZES}
        values |= {"verify": False} | settings
        config = tmp_path / "data.yaml"
        config.write_text(yaml.safe_dump({key: value for key, value in values.items() if value != "unset"}))
        prepare.main(["--config", str(config), *flags])
        return tmp_path / values["output_dir"]

    return prepared


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(path) -> list[str]:
    """The problems of a file, in order."""
    return [row["prompt"][-1]["content"] for row in read_jsonl(path)]


def dropped(folder) -> list[tuple]:
    return [(row["row"], row["of"], row["reason"]) for row in read_jsonl(folder / "dropped.jsonl")]


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.json*"))}


# ---- What the files hold


def test_files_are_disjoint_nested_and_complete(run):
    out = run(subsets=[4, 20])
    sft, rl, held_out = (texts(out / name) for name in ("sft_20.jsonl", "rl.jsonl", "held_out.jsonl"))
    assert (len(sft), len(rl), len(held_out)) == (20, 32, 8)
    assert sorted(sft + rl + held_out) == sorted(problem_text(number) for number in range(60))
    assert texts(out / "sft.jsonl") == sft[:12] and texts(out / "sft_4.jsonl") == sft[:4]
    assert dropped(out) == []


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
    one = contents(run())
    Dataset.from_list(openr1_rows()).to_parquet(str(tmp_path / "rows.parquet"))
    other = contents(run(dataset_name="rows.parquet", output_dir="parquet"))
    assert {name: one[name] for name in one if name != "data.json"} == {
        name: other[name] for name in other if name != "data.json"
    }
    left, right = (json.loads(each["data.json"]) for each in (one, other))
    assert left["source"]["content"] == right["source"]["content"] and left["files"] == right["files"]


def test_data_json_describes_it(run, tmp_path):
    bench = write(tmp_path / "bench.jsonl", [{"problem": problem_text(3)}, {"problem": "Something else altogether?"}])
    rows = openr1_rows()
    rows[7] = openr1_row(7, **asked(problem_text(5)))
    described = read_json(run(rows, decontaminate=["bench.jsonl"]) / "data.json")
    assert described["source"] | {"content": None} == {
        "dataset_name": str(tmp_path / "rows.jsonl"),
        "split": "train",
        "rows": 60,
        "schema": "openr1",
        "content": None,
    }
    assert {name: file["rows"] for name, file in described["files"].items()} == {
        "sft.jsonl": 12,
        "rl.jsonl": 38,
        "held_out.jsonl": 8,
        "dropped.jsonl": 2,
    }
    assert described["dropped"] == {"duplicate": 1, "in_benchmark": 1}
    assert described["benchmarks"] == {bench: {"problems": 2, "rows": 1}}
    assert described["settings"]["seed"] == 0 and described["versions"]["datasets"]


def test_counts_are_printed(run, capsys):
    run([openr1_row(0), *openr1_rows()])
    out = capsys.readouterr().out
    assert "61 rows" in out and "dropped: duplicate 1\n" in out
    assert "compared with no benchmark" in out
    assert "written: sft.jsonl 12, rl.jsonl 40, held_out.jsonl 8" in out


def test_gsm8k(run):
    out = run([gsm8k_row(number) for number in range(60)], **GRADED)
    row = read_jsonl(out / "sft.jsonl")[0]
    number = [problem_text(number) for number in range(60)].index(row["prompt"][0]["content"])
    a, b, lost, end = 3 * number + 2, 5 * number + 7, number % 7, answer_of(number)
    steps = f"There are {a}+{b}={a + b}.\nLess {lost} that is {end}."
    text = f"{steps}\n\nThe final answer is $\\boxed{{{end}}}$."
    assert row["completion"] == [{"role": "assistant", "content": text}]
    assert row["solution"] == f"${end}$" and len(row["prompt"]) == 1
    assert len(texts(out / "rl.jsonl")) == 40


@pytest.mark.parametrize("name", ["openr1_math_rows.jsonl", "gsm8k_rows.jsonl"])
def test_rows_of_each_schema(name, run):
    out = run(dataset_name=str(ROWS / name), num_demonstrations=1, num_held_out=1, **GRADED)
    assert [len(texts(out / file)) for file in ("sft.jsonl", "rl.jsonl", "held_out.jsonl")] == [1, 1, 1]


def test_own_system_prompt_and_template(run):
    out = run(system_prompt="", prompt_template="{problem}\nUse \\boxed{}.")
    assert read_jsonl(out / "rl.jsonl")[0]["prompt"][0]["role"] == "user"
    assert all(text.endswith("end?\nUse \\boxed{}.") for text in texts(out / "held_out.jsonl"))
    out = run(system_prompt="Be brief.", output_dir="other")
    assert read_jsonl(out / "sft.jsonl")[0]["prompt"][0] == {"role": "system", "content": "Be brief."}


def test_trainers_take_them(run, tmp_path):
    """SFT trains a step on sft.jsonl, and GRPO's own checks and reward pass rl.jsonl."""
    from small_runs import trainer_for

    from aesl_trl.rewards.functions import load_reward_funcs

    out = run()
    tokenizer = build_tokenizer()
    rows = data.load_rows(str(out / "sft.jsonl"))
    model = build_model(tokenizer, max_position_embeddings=1024)
    trainer = trainer_for(tokenizer, tmp_path / "sft", model, rows, max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1
    check_rows(data.load_rows(str(out / "rl.jsonl")), load_reward_funcs(["accuracy_reward"]), name="rl")


# ---- The order


def test_seed_decides_the_order(run):
    one, again, other = (run(output_dir=name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert texts(one / "sft.jsonl") == texts(again / "sft.jsonl") != texts(other / "sft.jsonl")


def test_a_dropped_row_moves_no_other(run):
    """Order of the source and absence of other rows change nothing but the rows at the borders."""
    whole = run(output_dir="whole")
    first = texts(whole / "sft.jsonl")[0]
    rows = [row for row in reversed(openr1_rows()) if row["prompt"][1]["content"] != first]
    less = run(rows, output_dir="less")
    assert texts(less / "sft.jsonl") == [*texts(whole / "sft.jsonl")[1:], texts(whole / "rl.jsonl")[0]]
    assert texts(less / "held_out.jsonl") == texts(whole / "held_out.jsonl")


def settings(**changes) -> DataArguments:
    return DataArguments(**changes)


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
        args = settings(num_demonstrations=size, num_held_out=num_held_out)
        demonstrations, rl, held_out = prepare.split(kept, args, serve_all, drops)
        parts = [{normalise(p.text) for p in part} for part in ([p for p, _ in demonstrations], rl, held_out)]
        assert sum(map(len, parts)) == len(set.union(*parts)) == len(kept)
        assert before is None or (demonstrations[: len(before[0])], held_out) == before
        before = demonstrations, held_out


@given(st.lists(st.booleans(), min_size=1, max_size=300), st.integers(1, 100))
def test_demonstrations_that_cannot_serve_stay_for_rl(serves, num):
    read = [Problem(row, str(row), str(row), "$1$") for row in range(len(serves))]
    drops = Drops()
    judge = lambda batch: [("text", "" if serves[p.row] else "too_long", "") for p in batch]  # noqa: E731
    taken = prepare.take(read, num, judge, drops)
    good = [row for row, serving in enumerate(serves) if serving]
    assert [problem.row for problem, _ in taken] == good[:num]
    last = good[num - 1] if len(good) >= num else len(serves)
    assert [row["row"] for row in drops.rows] == [row for row in range(last) if not serves[row]]


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
    assert dropped(out) == [(place, "all", reason)]
    assert read_json(out / "data.json")["dropped"] == {reason: 1}
    assert sum(len(texts(out / name)) for name in ("sft.jsonl", "rl.jsonl", "held_out.jsonl")) == 59


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
    usual = texts(run(max_length=1000) / "sft.jsonl")
    rows = openr1_rows()
    place = [problem_text(number) for number in range(60)].index(usual[0])
    answer = {"reward_model": {"ground_truth": str(answer_of(1)), "style": "rule"}}
    rows[place] |= changes | (answer if reason != "wrong" else {})
    out = run(rows, output_dir="other", max_length=1000, verify=reason == "wrong")
    assert dropped(out) == [(place, "sft", reason)]
    assert texts(out / "sft.jsonl")[:11] == usual[1:] and texts(out / "rl.jsonl")[0] == usual[0]


def test_solutions_are_read_as_math():
    """Without delimiters math-verify reads the 2 of 2 sqrt 3, and an interval not at all."""
    assert problems.delimited("2\\sqrt{3}") == "$2\\sqrt{3}$"
    assert problems.delimited("$2$") == "$2$" and problems.delimited("\\boxed{2}") == "\\boxed{2}"
    assert problems.delimited("\\$18.90") == "$\\$18.90$"
    assert problems.right_answer("$2\\sqrt{3}$") == "The final answer is \\boxed{2\\sqrt{3}}"
    assert problems.right_answer("$2$ and $3$") == "The final answer is $2$ and $3$"


def test_ground_truths_of_many_forms_are_gradable(run):
    rows = openr1_rows()
    answers = [
        "\\frac{1}{2}",
        "2\\sqrt{3}",
        "(1, 2]",
        "x=4",
        "A",
        "50\\%",
        "-3",
        "1.5",
        "\\$18.90",
        "x^2+1",
        "\\text{no}",
    ]
    for row, answer in zip(rows, answers, strict=False):
        row["reward_model"]["ground_truth"] = answer
    out = run(rows, **GRADED)
    assert {reason for _, _, reason in dropped(out)} <= {"wrong"}  # the demonstrations answer another question
    kept = {row["solution"] for name in ("sft.jsonl", "rl.jsonl", "held_out.jsonl") for row in read_jsonl(out / name)}
    assert {f"${answer}$" for answer in answers} <= kept


def test_verify_off_keeps_them(run):
    rows = openr1_rows()
    rows[40]["reward_model"] = {"ground_truth": "\\ldots", "style": "rule"}
    assert dropped(run(rows)) == []


# ---- Difficulty


RATES = {problem_text(number): (number % 5) / 4 for number in range(60)}


def check_difficulties(out, size=20):
    pool = read_jsonl(out / f"sft_{size}.jsonl")
    assert all(row["pass_rate"] == RATES[row["prompt"][-1]["content"]] for row in pool)
    by_name = {
        "hard": [row for row in pool if row["pass_rate"] <= 0.25],
        "medium": [row for row in pool if row["pass_rate"] == 0.5],
        "easy": [row for row in pool if row["pass_rate"] >= 0.75],
    }
    for name, rows in by_name.items():
        assert rows and read_jsonl(out / f"sft_{name}.jsonl") == rows
    counts = {name: len(rows) for name, rows in by_name.items()} | {"unknown": 0}
    assert read_json(out / "data.json")["difficulty"] == counts


def test_difficulty_from_a_file(run, tmp_path):
    write(tmp_path / "rates.jsonl", [{"problem": text, "pass_rate": rate} for text, rate in RATES.items()])
    check_difficulties(run(pass_rate_file="rates.jsonl", subsets=[20]))
    write(tmp_path / "ids.jsonl", [{"id": problem_id(text), "pass_rate": rate} for text, rate in RATES.items()])
    check_difficulties(run(pass_rate_file="ids.jsonl", subsets=[20], output_dir="ids"))


def test_difficulty_from_a_column(run):
    rows = [row | {"rate": RATES[row["prompt"][1]["content"]]} for row in openr1_rows()]
    check_difficulties(run(rows, pass_rate_column="rate", subsets=[20]))


def test_difficulty_size_and_unknown_rates(run, tmp_path):
    known = list(RATES.items())[:50]
    write(tmp_path / "rates.jsonl", [{"problem": text, "pass_rate": rate} for text, rate in known])
    out = run(pass_rate_file="rates.jsonl", subsets=[30], difficulty_size=2)
    assert [len(texts(out / f"sft_{name}.jsonl")) for name in ("hard", "medium", "easy")] == [2, 2, 2]
    assert sum(read_json(out / "data.json")["difficulty"].values()) == 30
    assert read_json(out / "data.json")["difficulty"]["unknown"] > 0


@pytest.mark.parametrize(
    ("rate", "name"),
    [(0.0, "hard"), (0.25, "hard"), (0.26, "medium"), (0.75, "easy"), (1.0, "easy"), (None, "unknown")],
)
def test_bounds_belong_to_hard_and_easy(rate, name):
    assert difficulty_of(rate, [0.25, 0.75]) == name


REWARD = """
def starts_low(completions, solution, **kwargs):
    return [float(text[0]["content"][:1] < "a") for text in completions]
"""
SAMPLED = {
    "pass_rate_samples": 4,
    "max_new_tokens": 3,
    "use_cpu": True,
    "reward_funcs": ["own.py:starts_low"],
    "num_demonstrations": 10,
}


@pytest.fixture
def sampled(run, tmp_path, monkeypatch):
    """Runs with pass rates of the untrained model, three problems a chunk; also counts the problems it samples."""
    (tmp_path / "own.py").write_text(REWARD)
    monkeypatch.setitem(pass_rates.CHUNK, "transformers", 3)
    drawn, real = [], transformers_engine.sample_groups

    def counting(model, tokenizer, rows, **kwargs):
        drawn.append(len(rows))
        if counting.fails_after == len(drawn):
            raise KeyboardInterrupt
        return real(model, tokenizer, rows, **kwargs)

    counting.fails_after = None
    monkeypatch.setattr(transformers_engine, "sample_groups", counting)

    def call(*flags, **settings):
        drawn.clear()
        return run(None, *flags, **(SAMPLED | settings)), sum(drawn)

    call.sampler = counting
    return call


def rates(folder) -> dict:
    return {line["id"]: line["pass_rate"] for line in read_jsonl(folder / "pass_rates.jsonl")}


def test_pass_rates_are_the_models(sampled):
    out, num = sampled()
    assert num == 10 and len(rates(out)) == 10
    assert set(rates(out).values()) <= {0, 0.25, 0.5, 0.75, 1} and len(set(rates(out).values())) > 1
    assert {row["id"]: row["pass_rate"] for row in read_jsonl(out / "sft.jsonl")} == rates(out)
    line = read_jsonl(out / "pass_rates.jsonl")[0]
    assert line["graded"] == 4 and line["right"] == 4 * line["pass_rate"] and 0 <= line["truncated"] <= 4


def test_pass_rates_on_disk_are_not_sampled_again(sampled):
    out, _ = sampled()
    before = contents(out)
    assert sampled("--num_demonstrations", "14", "--overwrite") == (out, 4)
    assert contents(out)["pass_rates.jsonl"].startswith(before["pass_rates.jsonl"])
    # another temperature or prompt draws anew, and all stay
    assert sampled("--temperature", "2.0", "--overwrite") == (out, 10)
    assert sampled("--system_prompt", "Be brief.", "--overwrite") == (out, 10)
    assert sampled("--overwrite") == (out, 0)
    assert len(read_jsonl(out / "pass_rates.jsonl")) == 34


def test_vllm_samples_in_large_chunks_of_problems(run, tmp_path, monkeypatch):
    """Its cache needs room for a prompt and an answer, not for the model's whole context."""
    (tmp_path / "own.py").write_text(REWARD)
    drawn = []

    class Engine:
        def __init__(self, path, args):
            assert args.max_model_len == 1024 + SAMPLED["max_new_tokens"] and args.max_new_tokens == 3

        def draw(self, rows, piece):
            drawn.append((len(rows), piece.num, piece.samples))
            return [Group(row["prompt"], ["Z", "a", "z", "z"], [1] * 4, [False] * 4, [None] * 4) for row in rows]

        def close(self):
            drawn.append("closed")

    monkeypatch.setattr(vllm_engine, "OfflineVLLM", Engine)
    monkeypatch.setattr(prepare, "choose_engine", lambda asked, _: ("vllm", asked))
    monkeypatch.setitem(pass_rates.CHUNK, "vllm", 6)
    out = run(None, **SAMPLED)
    assert drawn == [(6, 6, 4), (4, 4, 4), "closed"]
    assert set(rates(out).values()) == {0.25}


def test_vllm_that_cannot_run_is_refused(run, tmp_path):
    (tmp_path / "own.py").write_text(REWARD)
    with pytest.raises(InputError, match="backend: vllm cannot be used"):
        run(None, **SAMPLED, backend="vllm")


def test_sampling_that_was_cut_off_goes_on(sampled, tmp_path):
    undisturbed, _ = sampled(output_dir="undisturbed")
    sampled.sampler.fails_after = 3
    with pytest.raises(KeyboardInterrupt):
        sampled()
    assert len(rates(tmp_path / "out")) == 6 and not (tmp_path / "out" / "data.json").exists()
    sampled.sampler.fails_after = None
    out, num = sampled()
    assert num == 4 and rates(out) == rates(undisturbed)
    assert (out / "sft.jsonl").read_bytes() == (undisturbed / "sft.jsonl").read_bytes()


# ---- What another run left


def test_the_same_again_changes_nothing(run, capsys):
    out = run()
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.json*")}
    run()
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.json*")} == before
    assert "unchanged" in capsys.readouterr().out


def test_other_settings_are_refused_and_overwrite_replaces(run):
    out = run(subsets=[4])
    before = contents(out)
    with pytest.raises(InputError, match=r"holds the output of other settings \(seed 0, now 1\): --overwrite"):
        run(seed=1, subsets=[4])
    assert contents(out) == before
    run(None, "--overwrite", seed=1)
    assert not (out / "sft_4.jsonl").exists()
    assert contents(out) != before and read_json(out / "data.json")["settings"]["seed"] == 1
    assert not list(out.glob(".new-*"))


def test_other_data_under_the_same_settings_is_refused(run):
    out = run()
    before = contents(out)
    with pytest.raises(InputError, match=r"sft.jsonl would change although the settings are the same"):
        run(openr1_rows()[20:])
    assert contents(out) == before
    run(openr1_rows()[20:], "--overwrite")
    assert contents(out) != before


def test_files_without_data_json_are_refused(run, tmp_path):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out" / "mine.jsonl", [{"a": 1}])
    with pytest.raises(InputError, match="holds mine.jsonl without data.json"):
        run()
    out = run(None, "--overwrite")
    assert (out / "mine.jsonl").exists() and (out / "data.json").exists()


@pytest.mark.parametrize(
    "content", ["[]", '{"files": {"../mine.jsonl": {}}}', '{"stage": "data", "files": {"../mine.jsonl": {}}}']
)
def test_somebody_elses_data_json_is_replaced_only_when_told(content, run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "data.json").write_text(content)
    write(tmp_path / "mine.jsonl", [{"a": 1}])
    with pytest.raises(InputError, match="holds the output of other settings"):
        run()
    assert (tmp_path / "out" / "data.json").read_text() == content
    out = run(None, "--overwrite")
    assert read_json(out / "data.json")["stage"] == "data" and (tmp_path / "mine.jsonl").exists()


def test_a_failed_write_leaves_the_old_output(run, monkeypatch):
    out = run()
    before = contents(out)

    def full(path, rows):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare_output, "write_jsonl", full)
    with pytest.raises(OSError, match="No space"):
        run(None, "--overwrite", seed=1)
    assert contents(out) == before


def test_a_second_run_in_the_folder_is_kept_out(run, tmp_path):
    with prepare_output.locked(str(tmp_path / "out")), pytest.raises(InputError, match="another aesl data is at work"):
        run()


# ---- What cannot be used


def gone(column):
    return [{key: value for key, value in row.items() if key != column} for row in openr1_rows()]


BAD = [
    ({"dataset_name": "unset"}, None, "dataset_name is missing"),
    ({"output_dir": "unset"}, None, "output_dir is missing"),
    ({"model_name_or_path": "unset"}, None, "model_name_or_path is missing"),
    ({"num_demonstration": 3}, None, "unknown key 'num_demonstration'; did you mean 'num_demonstrations'"),
    ({"num_held_out": 0}, None, "num_held_out must be positive, got 0"),
    ({"subsets": [4, 4]}, None, r"subsets must be different positive sizes, got \[4, 4\]"),
    ({"subsets": [0]}, None, "subsets must be different positive sizes"),
    ({"ngram": 0}, None, "ngram must be positive"),
    ({"ngram_share": 1.0}, None, r"ngram_share must be in \[0, 1\)"),
    ({"prompt_template": "Solve it."}, None, "prompt_template must hold {problem}"),
    ({"difficulty_bounds": [0.8, 0.2]}, None, "difficulty_bounds must be two rising pass rates"),
    ({"difficulty_size": 3}, None, "difficulty_size needs pass rates"),
    ({"pass_rate_column": "a", "pass_rate_samples": 2}, None, "both give pass rates"),
    ({"pass_rate_samples": -1}, None, "pass_rate_samples must be 0"),
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
]


if importlib.util.find_spec("aesl_trl.data.benchmarks"):  # the table of `aesl eval`
    BAD += [
        (
            {"decontaminate": ["AIME42"]},
            None,
            "decontaminate: AIME42 is neither a file nor one of .*; did you mean 'AIME",
        ),
        (
            {"decontaminate": ["AIME24"]},
            None,
            "decontaminate: AIME24: .* cannot be loaded",
        ),  # offline, as every test runs
    ]


@pytest.mark.parametrize(("changes", "rows", "message"), BAD, ids=[message[:40] for _, _, message in BAD])
def test_what_cannot_be_used_is_one_line(changes, rows, message, run, tmp_path):
    name = problem_text(1)
    write(tmp_path / "twice.jsonl", [{"problem": name, "pass_rate": 1.0}, {"problem": name, "pass_rate": 0.5}])
    write(tmp_path / "high.jsonl", [{"problem": name, "pass_rate": 8}])
    write(tmp_path / "other.jsonl", [{"problem": "other", "pass_rate": 1.0}])
    write(tmp_path / "all.jsonl", [{"problem": text, "pass_rate": rate} for text, rate in RATES.items()])
    with pytest.raises(InputError) as error:
        run(rows, **changes)
    assert re.search(message, str(error.value)), error.value
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").glob("*.json*"))


def saved_tokenizer(folder, template, tiny_model_dir) -> str:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text((Path(tiny_model_dir) / "config.json").read_text())
    return str(folder)


USUAL = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ TEXT }}<|im_end|>\n{% endfor %}"
GENERATION = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('no system role') }}", "refuses a prompt: no system role"),
        (
            USUAL.replace("TEXT", "m['content'].split('</think>')[-1]") + GENERATION,
            "drops a part of the demonstration",
        ),
        (
            USUAL.replace("TEXT", "m['content']") + GENERATION.replace("nt\n", "nt\n<think>\n\n"),
            "writes another prompt",
        ),
    ],
)
def test_templates_that_would_spoil_the_data(template, message, run, tmp_path, tiny_model_dir):
    (tmp_path / "model").mkdir()
    model = saved_tokenizer(tmp_path / "model", template, tiny_model_dir)
    with pytest.raises(InputError, match=message) as error:
        run(model_name_or_path=model)
    assert "\n" not in str(error.value)


def test_a_template_may_trim_an_answer(run, tmp_path, tiny_model_dir):
    (tmp_path / "model").mkdir()
    template = USUAL.replace("TEXT", "m['content'] | trim") + GENERATION
    out = run(model_name_or_path=saved_tokenizer(tmp_path / "model", template, tiny_model_dir))
    assert len(texts(out / "sft.jsonl")) == 12


def test_models_that_do_not_exist(run):
    with pytest.raises(InputError, match="no-such-org/no-such-model"):
        run(model_name_or_path="no-such-org/no-such-model")


def test_problems_of_a_benchmark_are_nowhere(run, tmp_path):
    """Also those that stand inside a longer text."""
    inside = [problem_text(number) for number in range(0, 12)]
    write(tmp_path / "bench.jsonl", [{"problem": text} for text in inside])
    rows = openr1_rows()
    rows[30] = openr1_row(30, **asked("First an easy one. " + problem_text(5) + " Say why."))
    out = run(rows, decontaminate=["bench.jsonl"])
    index = BenchmarkIndex({"bench": inside})
    for name in ("sft.jsonl", "rl.jsonl", "held_out.jsonl"):
        assert all(index.find(text) is None for text in texts(out / name))
    assert read_json(out / "data.json")["dropped"] == {"in_benchmark": 13}


# ---- The recipes


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("recipes/*/data*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_recipes_are_read(path):
    from aesl_trl.arguments import parse

    benchmarks = pytest.importorskip("aesl_trl.data.benchmarks")
    (args,) = parse(prepare.ARGUMENT_TYPES, ["--config", str(path)], prog="aesl data")
    assert args.num_demonstrations in (1000, 3000) and set(args.decontaminate) <= benchmarks.BENCHMARKS.keys()
    assert args.prompt_template == benchmarks.PROMPT  # evaluation asks as training does


# ---- The command


def aesl(*argv):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "aesl_trl.cli", "data", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)


def test_the_command(tmp_path, tiny_model_dir):
    Dataset.from_list(openr1_rows()).to_parquet(str(tmp_path / "rows.parquet"))
    config = tmp_path / "data.yaml"
    values = {"dataset_name": "rows.parquet", "model_name_or_path": tiny_model_dir, "output_dir": "out", **SIZES}
    config.write_text(yaml.safe_dump(values))
    done = aesl("--config", str(config), "--subsets", "4", "6")
    assert done.returncode == 0, done.stderr
    assert "written: sft.jsonl 12, sft_4.jsonl 4, sft_6.jsonl 6, rl.jsonl 40, held_out.jsonl 8" in done.stdout
    assert len(texts(tmp_path / "out" / "sft_6.jsonl")) == 6
    refused = aesl("--config", str(config))
    assert refused.returncode == 2 and refused.stdout == ""
    assert [line for line in refused.stderr.splitlines() if line.startswith("aesl data: ")] == [
        f"aesl data: {tmp_path}/out holds the output of other settings (subsets [4, 6], now None): --overwrite "
        "replaces it, or name another output_dir"
    ]
