"""Rewards by name, and samples scored as GRPOTrainer scores them."""

import math
import sys
import time
from types import SimpleNamespace

import pytest

from aesl_trl.diversity import Group
from aesl_trl.errors import InputError
from aesl_trl.rewards import GradedReward, check_columns, load_reward_funcs, score_groups


def group(prompt, completions):
    num = len(completions)
    return Group(
        prompt=prompt, completions=completions, num_tokens=[1] * num, truncated=[False] * num, entropy=[0.0] * num
    )


def has_answer(completions, answer, **kwargs):
    return [float(text == gold) for text, gold in zip(completions, answer, strict=True)]


ROWS = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "2+2=", "answer": "4"}]
GROUPS = [group("1+1=", ["2", "3"]), group("2+2=", ["2", "4"])]


# ---- Loading


def test_functions_come_from_a_file_a_module_and_trl(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text("def right(completions, **kwargs):\n    return [1.0] * len(completions)\n")
    monkeypatch.chdir(tmp_path)
    names = ["own.py:right", "trl.rewards.think_format_reward", "get_soft_overlong_punishment"]
    functions = load_reward_funcs(names, base_dir=tmp_path)
    assert [function.__name__ for function in functions] == [
        "right",
        "think_format_reward",
        "soft_overlong_punishment_reward",
    ]
    assert functions[0](completions=["a", "b"]) == [1.0, 1.0]
    # 1280 and 256 as in TRL's script: 1152 tokens are halfway into the penalty's range.
    assert functions[2](completion_ids=[[0] * 1152]) == [-0.5]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("acuracy_reward", "did you mean 'accuracy_reward'"),
        ("trl.rewards.think_format_rewrd", "did you mean 'think_format_reward'"),
        ("no_such_module.reward", "cannot import 'no_such_module.reward'"),
        ("missing.py:right", "missing.py does not exist"),
        ("own.py:rigth", "did you mean 'right'"),
        ("own.THRESHOLD", "not a function"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(tmp_path, monkeypatch, name, message):
    (tmp_path / "own.py").write_text("THRESHOLD = 1\ndef right(completions, **kwargs):\n    return [1.0]\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own", raising=False)
    with pytest.raises(InputError, match=message):
        load_reward_funcs([name], base_dir=tmp_path)


def test_two_functions_of_one_name_are_refused(tmp_path):
    for name in ("one.py", "two.py"):
        (tmp_path / name).write_text("def right(completions, **kwargs):\n    return [1.0]\n")
    with pytest.raises(InputError, match="two functions are called 'right'"):
        load_reward_funcs(["one.py:right", "two.py:right"], base_dir=tmp_path)


# ---- Columns


def test_a_column_that_a_function_needs_must_be_there():
    check_columns([has_answer], ["prompt", "answer"], where="rows")
    with pytest.raises(InputError, match="needs 'answer'; did you mean 'answers'"):
        check_columns([has_answer], ["prompt", "answers"], where="rows")


def test_a_function_must_take_what_trl_passes():
    def narrow(completions):
        return [0.0] * len(completions)

    with pytest.raises(InputError, match=r"'narrow' must take \*\*kwargs"):
        check_columns([narrow], ["prompt"], where="rows")


# ---- Scoring


def test_each_sample_gets_one_reward_per_function():
    def length(completions, **kwargs):
        return [len(text) for text in completions]

    scored = score_groups(GROUPS, ROWS, [has_answer, length])
    assert [group.rewards for group in scored] == [[[1.0, 1.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 1.0]]]
    assert [group.completions for group in scored] == [group.completions for group in GROUPS]
    assert GROUPS[0].rewards is None


def test_scores_are_those_of_grpo_trainer(monkeypatch):
    """The same functions, called by GRPOTrainer's own method, see the same arguments and give the same numbers."""
    import torch
    from trl.trainer import grpo_trainer

    seen = []

    def recorder(prompts, completions, answer, trainer_state, log_extra, log_metric, **kwargs):
        seen.append(
            (prompts, completions, answer, trainer_state.global_step, callable(log_extra), callable(log_metric))
        )
        return [None if gold == "2" else 1.0 for gold in answer]

    def right(completions, answer, **kwargs):
        return [float(text[0]["content"] == gold) for text, gold in zip(completions, answer, strict=True)]

    rows = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]
    ours = score_groups([group(row["prompt"], ["2", "4"]) for row in rows], rows, [recorder, right])
    monkeypatch.setattr(grpo_trainer, "gather", lambda tensor: tensor)
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", is_main_process=True),
        reward_funcs=[recorder, right],
        reward_processing_classes=[None, None],
        reward_func_names=["recorder", "right"],
        state=SimpleNamespace(global_step=0),
        environments=None,
        _log_completion_extra=print,
        _log_metric=print,
        args=SimpleNamespace(report_to=[]),
        model=SimpleNamespace(training=True),
    )
    inputs = [row for row in rows for _ in range(2)]
    completions = [[{"role": "assistant", "content": text}] for _ in rows for text in ("2", "4")]
    theirs = grpo_trainer.GRPOTrainer._calculate_rewards(
        trainer, inputs, [row["prompt"] for row in inputs], completions, [[0]] * 4
    )
    assert seen[0] == seen[1]
    flat = torch.tensor([sample for group in ours for sample in group.rewards])
    torch.testing.assert_close(flat, theirs, equal_nan=True)
    assert math.isnan(ours[0].rewards[0][0]) and ours[1].rewards == [[1.0, 0.0], [1.0, 1.0]]


@pytest.mark.parametrize(
    ("result", "message"),
    [([1.0], "returned 1 rewards for 4 completions"), (["good"] * 4, "returned 'good' for completion 0")],
)
def test_a_function_that_returns_something_else_is_refused(result, message):
    def wrong(completions, **kwargs):
        return result

    with pytest.raises(InputError, match=message):
        score_groups(GROUPS, ROWS, [wrong])


def test_a_function_that_needs_token_ids_cannot_score_saved_text():
    functions = load_reward_funcs(["get_soft_overlong_punishment"])
    with pytest.raises(InputError, match="needs 'completion_ids'"):
        score_groups(GROUPS, ROWS, functions)


def test_async_functions_and_scalars_of_torch_are_taken():
    import torch

    async def later(completions, **kwargs):
        return torch.arange(len(completions))

    assert [group.rewards for group in score_groups(GROUPS, ROWS, [later])] == [[[0.0], [1.0]], [[2.0], [3.0]]]


def test_rows_and_groups_must_pair_up():
    with pytest.raises(InputError, match="2 groups of samples for 1 rows"):
        score_groups(GROUPS, ROWS[:1], [has_answer])


# ---- Grading in a child


@pytest.mark.slow
def test_an_answer_that_hangs_the_parser_costs_its_deadline_and_no_more():
    """A tower of powers keeps sympy busy for more than 25 s; the answers around it are graded as by TRL itself."""
    from trl.rewards import accuracy_reward

    (reward,) = load_reward_funcs(["accuracy_reward"])
    reward.deadline_s = 3.0
    texts, gold = [r"\boxed{\frac{1}{2}}", r"\boxed{0.5}", r"\boxed{3}"], [r"$\frac{1}{2}$"] * 3
    truth = accuracy_reward([[{"role": "assistant", "content": text}] for text in texts], gold)
    assert truth == [1.0, 1.0, 0.0]
    tower = r"\boxed{5^{5^{5^{5^{5}}}}}"
    start = time.monotonic()
    scores = reward(completions=[texts[0], tower, *texts[1:]], solution=["$2$", "$2$", *gold[1:]])
    assert scores == [0.0, 0.0, 1.0, 0.0]
    assert reward(completions=texts, solution=gold) == truth
    assert 3 <= time.monotonic() - start < 60  # the deadline did bite


@pytest.mark.slow
def test_an_unreadable_solution_gives_none_as_in_trl():
    messages = [[{"role": "assistant", "content": r"\boxed{1}"}]]
    assert GradedReward("accuracy_reward")(completions=messages, solution=["no maths here"]) == [None]
