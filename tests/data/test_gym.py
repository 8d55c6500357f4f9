"""Rows of reasoning-gym's tasks, from a stand-in of the gym (slow: from the gym itself)."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest
from gym_tasks import use_stand_in
from hypothesis import given, settings
from hypothesis import strategies as st

from aesl_trl.data import gym
from aesl_trl.data.gym import PREFIX, SPLITS, Task, gym_rows, read_name, split_of
from aesl_trl.data.rows import load_rows
from aesl_trl.errors import InputError
from aesl_trl.rewards.gym import scorer


has_gym = importlib.util.find_spec("reasoning_gym") is not None
needs_gym = pytest.mark.skipif(not has_gym, reason="reasoning-gym is not installed")


@pytest.fixture(autouse=True)
def fresh_scorers():
    yield
    scorer.cache_clear()  # a name may be a task of the stand-in and of the gym


def here(name: str, split: str, field: str) -> list[list[dict]]:
    """Make the rows in this process, in less time than a child needs to start."""
    return [gym._rows(task, split, field)[0] for task in read_name(name, field)]


@pytest.fixture
def stand_in(monkeypatch):
    use_stand_in(monkeypatch)
    monkeypatch.setattr(gym, "_in_child", here)


@pytest.fixture
def in_child(monkeypatch):
    use_stand_in(monkeypatch)


def test_a_row_has_what_training_and_its_reward_need(in_child):
    row = load_rows(f"{PREFIX}worked_sums(size=3, low=10, high=99)")[0]
    entry = json.loads(row["metadata"])["entry"]
    a, b = entry["metadata"]["terms"]
    assert row["prompt"][0]["content"] == (f"{a} + {b} =\nGive the final answer on the last line, after ####.")
    assert row["completion"] == [{"role": "assistant", "content": f"{a} plus {b}\n#### {a + b}"}]
    assert (row["solution"], row["task"]) == (str(a + b), "worked_sums")
    assert json.loads(row["metadata"]) == {
        "task": "worked_sums",
        "settings": {"low": 10, "high": 99},
        "answer_after": "####",
        "entry": {"question": f"{a} + {b} =", "answer": str(a + b), "metadata": entry["metadata"]},
    }


@pytest.mark.parametrize(
    ("mark", "end"),
    [("####", "#### 7"), ("boxed", r"The final answer is \boxed{7}."), ("<answer>", "<answer>7</answer>")],
)
def test_a_demonstration_gives_its_answer_where_the_reward_looks(stand_in, mark, end):
    row = next(
        row
        for row in gym_rows(f"{PREFIX}worked_sums(high=7, size=15, answer_after={mark!r})")
        if row["solution"] == "7"
    )
    assert row["completion"][0]["content"].endswith(f"\n{end}")


def test_a_mix_is_even_and_has_demonstrations_only_where_all_tasks_have_them(stand_in):
    rows = gym_rows(f"{PREFIX}worked_sums(size=30) + sums(size=10)", "train[:8]")
    assert "completion" not in rows.column_names
    assert rows["task"].count("sums") == 2 and len(rows) == 8


@given(seeds=st.tuples(st.integers(0, 3), st.integers(0, 3)), high=st.integers(20, 60))
@settings(max_examples=4, deadline=None, derandomize=True)
def test_no_question_is_in_two_splits(seeds, high):
    """Whatever the seeds and settings; each split has questions of its own, and about its share of them."""
    with pytest.MonkeyPatch.context() as patch:
        use_stand_in(patch)
        patch.setattr(gym, "_in_child", here)
        questions = {
            (split, seed): {
                row["prompt"][0]["content"]
                for row in gym_rows(f"{PREFIX}sums(high={high}, seed={seed}, size=5)", split)
            }
            for split in SPLITS
            for seed in seeds
        }
    for (split, _), one in questions.items():
        assert len(one) == 5
        for (other_split, _), other in questions.items():
            assert split == other_split or not one & other
    counts = [split_of(f"{a} + {b} =") for a in range(100) for b in range(100)]
    assert all(abs(counts.count(name) / 100 - share) < 2 for name, share in SPLITS.items())  # 4 standard deviations


def test_other_seeds_draw_other_items_and_the_same_seed_the_same(stand_in):
    first, again, other = (
        gym_rows(f"{PREFIX}sums(size=50, high=1000000, seed={seed})")["solution"] for seed in (0, 0, 1)
    )
    assert first == again
    assert not set(first) & set(other)


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("sum", "train", "no task of reasoning-gym; did you mean 'sums'?"),
        ("composite", "train", "is no task"),
        ("sums(hihg=3)", "train", "no setting 'hihg'; did you mean 'high'?"),
        ("sums(low=3, high=1)", "train", "refuses its settings: low must be <= high"),
        ("sums(low='a')", "train", "refuses its settings"),
        ("sums(3)", "train", "cannot be read; write tasks and settings as in"),
        ("sums + ", "train", "cannot be read"),
        ("sums(high=__import__('os'))", "train", "cannot be read"),
        ("sums(**{'high': 3})", "train", "cannot be read"),
        ("(" * 500, "train", "cannot be read"),
        ("sums(size=0)", "train", "size must be a whole number from 1 to 1000000, got 0"),
        ("sums(seed=-1)", "train", "seed must be a whole number from 0 to 4000, got -1"),
        ("sums(answer_after='box')", "train", "got 'box'; did you mean 'boxed'?"),
        ("sums(size=9)", "tset", "no split 'tset'; did you mean 'test'?"),
        ("sums(size=9)", "test[:x]", "write it as test[:100]"),
        ("pairs(size=9)", "train", "cannot be rows, as their own answers do not earn the reward"),
        ("sums(low={1, 2})", "train", "cannot be read"),
    ],
)
def test_a_wrong_name_is_one_line(stand_in, name, split, message):
    with pytest.raises(InputError) as error:
        load_rows(PREFIX + name, split=split, field="dataset_name")
    assert message in str(error.value) and str(error.value).startswith("dataset_name: ")
    assert "\n" not in str(error.value)


def test_a_task_that_is_too_small_says_how_many_questions_it_has(in_child):
    """Sums of two numbers below 3: nine questions in all."""
    questions = [f"{a} + {b} =" for a in range(3) for b in range(3)]
    here = sum(split_of(question) == "train" for question in questions)
    with pytest.raises(InputError, match=rf"has {here} different questions in train \(9 in all\).*set size={here},"):
        gym_rows(f"{PREFIX}sums(high=2, size=50)")
    assert len(gym_rows(f"{PREFIX}sums(high=2, size={here})")) == here


def test_items_that_no_answer_can_earn_are_left_out_and_counted(in_child, capsys):
    rows = gym_rows(f"{PREFIX}odd_items(size=40)")
    assert len(rows) == 40 and all(int(gold) % 5 for gold in rows["solution"])
    left_out = re.search(r"odd_items: (\d+) items were left out", capsys.readouterr().out)
    assert 1 <= int(left_out[1]) <= 25


def test_rows_do_not_depend_on_the_process(in_child):
    """Some tasks draw from a set of strings; ranks and resumed runs have to see the same rows."""
    assert gym_rows(f"{PREFIX}words(size=5)")["solution"] == gym_rows(f"{PREFIX}words(size=5)")["solution"]
    command = "from reasoning_gym import create_dataset; print(create_dataset('words', seed=0)[0]['answer'])"
    seen = {
        subprocess.run(
            [sys.executable, "-c", command], capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": seed}
        ).stdout
        for seed in "012"
    }
    assert len(seen) > 1  # without a fixed hash seed they do


def test_held_out_rows_have_a_split_of_their_own(stand_in):
    name = f"{PREFIX}sums(size=30)"
    train, held_out = load_rows(name), load_rows(name, field="eval_dataset_name")
    assert {split_of(row["prompt"][0]["content"].partition("\n")[0]) for row in train} == {"train"}
    assert {split_of(row["prompt"][0]["content"].partition("\n")[0]) for row in held_out} == {"validation"}


def test_without_the_gym_one_line_names_the_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs the package reasoning-gym: pip install reasoning-gym"):
        gym_rows(f"{PREFIX}sums")


def test_names_are_read_with_their_settings(stand_in):
    assert read_name(f"{PREFIX} sums(low=1,\n size=5) + chain_sum + worked_sums(seed=3, answer_after='<answer>')") == [
        Task("sums", {"low": 1}, size=5),
        Task("chain_sum", {}),
        Task("worked_sums", {}, seed=3, answer_after="<answer>"),
    ]


# ---- The gym itself


@needs_gym
@pytest.mark.slow
def test_the_gym_s_tasks_become_rows(monkeypatch):
    """All tasks, but for those whose scorers do not take JSON; two that hold odd items at a size that meets them."""
    from reasoning_gym.factory import DATASETS

    monkeypatch.setattr(gym, "_in_child", here)
    refused = {}
    for name in sorted(set(DATASETS) - {"composite", "knight_swap"}):  # 1.5 s an item
        try:
            size = 300 if name in ("gsm_symbolic", "string_manipulation", "prime_factorization") else 3
            rows = gym_rows(f"{PREFIX}{name}(size={size})", "train")
            assert len(rows) == size and set(rows["task"]) == {name}
        except InputError as error:
            refused[name] = str(error)
    assert set(refused) <= {"arc_agi", "rearc"}, refused


@needs_gym
@pytest.mark.slow
def test_the_gym_s_own_settings_and_worked_solutions():
    (row,) = gym_rows(f"{PREFIX}gsm_symbolic(size=1, answer_after='boxed')", "test")
    assert row["completion"][0]["content"].endswith(rf"The final answer is \boxed{{{row['solution']}}}.")
    with pytest.raises(InputError, match="max_terms must be >= min_terms"):
        gym_rows(f"{PREFIX}chain_sum(max_terms=1)")
