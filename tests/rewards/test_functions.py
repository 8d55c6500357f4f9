"""Rewards by name, and samples scored as GRPOTrainer scores them."""

import asyncio
import copy
import functools
import importlib.util
import inspect
import math
import os
import pickle
import subprocess
import sys
import threading
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import trl.rewards
from trl.trainer import grpo_trainer
from trl.trainer.utils import get_callable_name, is_async_callable

from aesl_trl.diversity.figures import Group
from aesl_trl.errors import InputError
from aesl_trl.rewards import grading, maths
from aesl_trl.rewards.functions import (
    GradedFormat,
    GradedReward,
    check_columns,
    guarded,
    load_reward_funcs,
    reward_name,
    score_groups,
)
from aesl_trl.rewards.grading import Graders


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
        ("broken.right", "broken cannot be imported: ZeroDivisionError"),
        ("broken.py:right", "broken.py cannot be imported: ZeroDivisionError"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(tmp_path, monkeypatch, name, message):
    (tmp_path / "broken.py").write_text("1 / 0\n")
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


def calculate_rewards(functions, rows, texts, async_loop=None):
    """GRPOTrainer's own method on `texts` for each row, as conversations where the prompts are."""
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", is_main_process=True),
        reward_funcs=functions,
        reward_processing_classes=[None] * len(functions),
        reward_func_names=[get_callable_name(function) for function in functions],
        state=SimpleNamespace(global_step=0),
        environments=None,
        async_loop=async_loop,
        _log_completion_extra=print,
        _log_metric=print,
        args=SimpleNamespace(report_to=[]),
        model=SimpleNamespace(training=True),
    )
    inputs = [row for row in rows for _ in texts]
    prompts = [row["prompt"] for row in inputs]
    completions = [text for _ in rows for text in texts]
    if not isinstance(prompts[0], str):
        completions = messages(*completions)
    return grpo_trainer.GRPOTrainer._calculate_rewards(trainer, inputs, prompts, completions, [[0]] * len(inputs))


def messages(*texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr(grpo_trainer, "gather", lambda tensor: tensor)


def test_scores_are_those_of_grpo_trainer():
    """The same functions, called by GRPOTrainer's own method, see the same arguments and give the same numbers."""
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
    theirs = calculate_rewards([recorder, right], rows, ["2", "4"])
    assert seen[0] == seen[1]
    flat = torch.tensor([sample for group in ours for sample in group.rewards])
    torch.testing.assert_close(flat, theirs, equal_nan=True)
    assert math.isnan(ours[0].rewards[0][0]) and ours[1].rewards == [[1.0, 0.0], [1.0, 1.0]]


def test_a_function_that_needs_token_ids_cannot_score_saved_text():
    functions = load_reward_funcs(["get_soft_overlong_punishment"])
    with pytest.raises(InputError, match="needs 'completion_ids'"):
        score_groups(GROUPS, ROWS, functions)


def test_a_function_that_needs_token_ids_scores_samples_that_keep_them():
    functions = load_reward_funcs(["get_soft_overlong_punishment"])
    kept = [replace(group, token_ids=[[1] * 1152, [1]]) for group in GROUPS]
    assert [group.rewards for group in score_groups(kept, ROWS, functions)] == [[[-0.5], [0.0]]] * 2


def test_async_functions_and_scalars_of_torch_are_taken():
    async def later(completions, **kwargs):
        return torch.arange(len(completions))

    assert [group.rewards for group in score_groups(GROUPS, ROWS, [later])] == [[[0.0], [1.0]], [[2.0], [3.0]]]


def test_rows_and_groups_must_pair_up():
    with pytest.raises(InputError, match="2 groups of samples for 1 rows"):
        score_groups(GROUPS, ROWS[:1], [has_answer])


# ---- TRL's rewards, graded in children


@pytest.fixture(scope="module")
def graders():
    graders = Graders(1)
    yield graders
    grading._kill(graders._children)


@pytest.mark.parametrize("name", grading.GRADERS)
@pytest.mark.parametrize("spelling", ["{}", "{module}.{}"])
def test_every_reward_of_trl_that_reads_completions_is_graded_in_a_child(name, spelling):
    module = maths if name == "math_reward" else trl.rewards
    (reward,) = load_reward_funcs([spelling.format(name, module=module.__name__)])
    assert isinstance(reward, GradedReward) and reward.graders is grading.SHARED_GRADERS
    assert (reward.__name__, reward.deadline_s) == (name, 10.0)
    own = inspect.signature(reward).parameters
    theirs = inspect.signature(getattr(module, name)).parameters
    required = [key for key, value in theirs.items() if value.default is value.empty]
    assert [key for key, value in own.items() if value.default is value.empty] == required


def test_trl_s_own_function_given_as_an_object_is_graded_in_a_child(monkeypatch):
    graded = []
    monkeypatch.setattr(GradedReward, "__call__", lambda self, completions, **_: graded.append(self) or [0.0] * 4)
    score_groups(GROUPS, [{**row, "solution": "$2$"} for row in ROWS], [trl.rewards.accuracy_reward])
    assert [reward.__name__ for reward in graded] == ["accuracy_reward"]


def test_a_function_stands_for_itself_beside_names():
    def length(completions, **kwargs):
        return [float(len(text)) for text in completions]

    functions = load_reward_funcs(["think_format_reward", length])
    assert [reward_name(function) for function in functions] == ["think_format_reward", "length"]
    assert isinstance(functions[0], GradedReward) and functions[1](completions=["ab"]) == [2.0]


def test_rewards_by_name_without_math_verify(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "math_verify" else find(name))
    load_reward_funcs(["think_format_reward"])
    with pytest.raises(InputError, match="accuracy_reward needs math-verify: pip install math-verify"):
        load_reward_funcs(["accuracy_reward"])


def test_an_answer_without_a_verdict_gets_zero_and_is_counted(graders, caplog):
    """A tower of powers keeps sympy busy for more than 25 s; the answers around it are graded as by TRL itself."""
    reward = GradedReward("accuracy_reward", deadline_s=2.0, graders=graders)
    texts, gold = [r"\boxed{\frac{1}{2}}", r"\boxed{0.5}", r"\boxed{3}"], [r"$\frac{1}{2}$"] * 3
    truth = trl.rewards.accuracy_reward(messages(*texts), gold)
    assert truth == [1.0, 1.0, 0.0]
    logged = []
    tower, endless = r"\boxed{5^{5^{5^{5^{5}}}}}", "9" * 2_000_000
    given = messages(texts[0], tower, *texts[1:], endless)
    solutions = ["$2$", "$2$", *gold[1:], "$2$"]
    scores = reward(completions=given, solution=solutions, log_metric=lambda *row: logged.append(row))
    assert scores == [0.0, 0.0, 1.0, 0.0, 0.0]
    assert reward(completions=texts, solution=gold, trainer_state=None) == truth
    assert reward.failures == {"timeout": 1, "too long": 1} == reward.take_failures()
    assert reward.take_failures() == {}
    assert logged == [("accuracy_reward/not_graded", 0.4)]
    (line,) = caplog.messages
    assert line == "accuracy_reward: 2 of 5 answers not graded, scored 0.0: timeout 1, too long 1"


def test_a_solution_decides_as_in_trl(graders):
    reward = GradedReward("accuracy_reward", graders=graders)
    solutions = ["$1$", "no maths here", None]
    assert reward(completions=messages(*[r"\boxed{1}"] * 3), solution=solutions) == [1.0, None, None]
    with pytest.raises(InputError, match="got the solution 1 for completion 1: the column solution must hold text"):
        reward(completions=messages("1", "1"), solution=["1", 1])


def test_completions_that_are_no_text(graders):
    """A tool call has no content, an image's content is a list; a column solution is nothing to a format."""
    form = "<think>\na\n</think>\nb"
    given = [form, *messages(form, None, [{"type": "image"}])]
    reward = GradedFormat("think_format_reward", graders=graders)
    assert reward(completions=given, solution=[1, 2, 3, 4]) == [1.0, 1.0, 0.0, 0.0]


def test_a_graded_reward_can_be_copied(graders):
    reward = GradedReward("accuracy_reward", deadline_s=3.0, graders=graders)
    copied = pickle.loads(pickle.dumps(reward))
    assert (copied.__name__, copied.deadline_s) == ("accuracy_reward", 3.0)
    assert copy.deepcopy(load_reward_funcs(["accuracy_reward"])[0]).graders is grading.SHARED_GRADERS


# ---- The user's own functions


def raising(completions, **kwargs):
    raise KeyError("unit\nprice")


async def raising_later(completions, **kwargs):
    await asyncio.sleep(0)
    raise KeyError("unit\nprice")


RAISED = r"raised KeyError at .*test_functions.py:{}: 'unit\\nprice'; correct it, or let it return None"
BAD_RESULTS = {
    "shorter": ([1.0], "returned 1 rewards for 4 completions"),
    "longer": ([1.0] * 5, "returned 5 rewards for 4 completions"),
    "none at all": (None, "returned None: a list with one reward per completion is needed"),
    "a number": (1.0, "returned 1.0: a list"),
    "text": (["good"] * 4, "returned 'good' for completion 0: a finite number is needed, or None"),
    "nan": ([1.0, None, math.nan, 1.0], "returned nan for completion 2"),
    "inf": ([1.0, 1.0, 1.0, math.inf], "returned inf for completion 3"),
    "nan of torch": (torch.tensor([0.0, math.nan, 0.0, 0.0]), "returned nan for completion 1"),
    "rows": (torch.zeros(4, 2), r"returned tensor\(\[0., 0.\]\) for completion 0"),
    "complex": ([1j] * 4, "returned 1j for completion 0"),
}


def returning(result, is_async):
    def reward(completions, **kwargs):
        return result

    async def later(completions, **kwargs):
        return result

    later.__name__ = "reward"
    return later if is_async else reward


def by_score_groups(function):
    return score_groups(GROUPS, ROWS, [function])


def by_grpo_trainer(function):
    """What TRL does with a function that `load_reward_funcs` returned."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        return calculate_rewards([guarded(function)], ROWS, ["2", "3"], async_loop=loop)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.mark.parametrize("caller", [by_score_groups, by_grpo_trainer])
@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("case", BAD_RESULTS)
def test_a_function_that_returns_something_else_is_refused(caller, is_async, case):
    result, message = BAD_RESULTS[case]
    with pytest.raises(InputError, match=f"reward 'reward' {message}") as caught:
        caller(returning(result, is_async))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("caller", [by_score_groups, by_grpo_trainer])
@pytest.mark.parametrize("function", [raising, raising_later])
def test_a_function_that_raises_is_named_with_its_line(caller, function):
    line = next(n for n, text in enumerate(inspect.getsource(function).splitlines()) if "raise Key" in text)
    where = function.__code__.co_firstlineno + line
    with pytest.raises(InputError, match=f"reward '{function.__name__}' " + RAISED.format(where)) as caught:
        caller(function)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value.__cause__, KeyError) and caught.value.__cause__.__traceback__


@pytest.mark.parametrize("caller", [by_score_groups, by_grpo_trainer])
def test_an_input_error_of_the_function_keeps_its_text(caller):
    def refusing(completions, **kwargs):
        raise InputError("the judge has no key: set JUDGE_KEY")

    with pytest.raises(InputError, match="^the judge has no key: set JUDGE_KEY$"):
        caller(refusing)


def test_a_call_that_does_not_fit_the_function_names_it():
    with pytest.raises(InputError, match=r"^reward 'has_answer' raised TypeError: .*'answer'; correct it"):
        guarded(has_answer)(completions=["a"])


def test_trl_sees_the_function_itself():
    """Name, arguments and kind decide how GRPOTrainer logs and calls a reward."""

    class Judge:
        async def __call__(self, completions, answer, **kwargs):
            return [1.0] * len(completions)

    partial = functools.partial(has_answer, answer=["2"])
    for function in (has_answer, raising_later, Judge(), partial):
        guard = guarded(function)
        assert get_callable_name(guard) == reward_name(guard) == get_callable_name(function)
        assert is_async_callable(guard) == is_async_callable(function)
        assert inspect.signature(guard) == inspect.signature(function)
        assert guarded(guard) is guard


def test_numbers_of_any_kind_and_none_are_taken():
    values = [True, 2, Fraction(1, 2), None, np.float32(0.25), torch.tensor(-1), np.int64(3)]
    rewards = guarded(returning(values, False))(completions=[""] * 7)
    assert rewards == [1.0, 2.0, 0.5, None, 0.25, -1.0, 3.0]
    assert {type(reward) for reward in rewards} == {float, type(None)}


@pytest.mark.parametrize(
    ("name", "where"),
    [("stuck", " at {}:5"), ("stuck_later", " at {}:9"), ("waiting", "")],
    ids=lambda value: value[:11],
)
def test_a_function_that_hangs_ends_the_process_with_one_line(tmp_path, name, where):
    own = tmp_path / "own.py"
    own.write_text(
        "import time\nimport asyncio\n\ndef stuck(completions, **kwargs):\n    time.sleep(60)\n\n\n"
        "async def stuck_later(completions, **kwargs):\n    time.sleep(60)\n\n\n"
        "async def waiting(completions, **kwargs):\n    await asyncio.sleep(60)\n"
    )
    script = f"""
import asyncio, inspect
from aesl_trl.arguments import load_function
from aesl_trl.rewards.functions import guarded
guard = guarded(load_function("own.py:{name}", field="reward_funcs"), hang_s=0.2)
print("before", flush=True)
result = guard(completions=["a"])
asyncio.run(result)
print("after")
"""
    package = str(Path(grading.__file__).parents[2])
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": package},
    )
    assert (result.returncode, result.stdout) == (2, "before\n"), result.stderr
    line = (
        f"aesl_trl: reward {name!r} has not returned for 0.2 s{where.format(own)}; give what it waits for a time limit"
    )
    assert result.stderr.splitlines() == [line]


def test_a_function_that_returns_stops_its_watchdog():
    before = threading.active_count()
    guarded(has_answer, hang_s=30.0)(completions=["a"], answer=["a"])
    with pytest.raises(InputError):
        guarded(raising, hang_s=30.0)(completions=["a"])
    end = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.01)
    assert threading.active_count() == before


def leaving(completions, **kwargs):
    raise SystemExit(0)


@pytest.mark.parametrize("caller", [by_score_groups, by_grpo_trainer])
def test_a_function_that_calls_exit_is_an_error(caller):
    """sys.exit(0) would pass for the end of the training."""
    with pytest.raises(InputError, match="reward 'leaving' raised SystemExit at .*test_functions.py:.*: 0; corr"):
        caller(leaving)


@pytest.mark.parametrize("code", [130, 143])
def test_a_signal_inside_of_a_function_ends_the_training_by_its_own_code(code):
    def interrupted(completions, **kwargs):
        raise SystemExit(code)  # as the handler of a signal does, wherever the process is

    with pytest.raises(SystemExit) as left:
        by_score_groups(interrupted)
    assert left.value.code == code


@pytest.mark.parametrize("caller", [by_score_groups, by_grpo_trainer])
def test_a_function_cannot_take_completions_from_the_next(caller):
    seen = []

    def emptying(completions, **kwargs):
        rewards = [0.0 for _ in completions]
        completions.clear()
        kwargs["prompts"].reverse()
        return rewards

    def popping(completions, **kwargs):
        return [float(len(completions.pop())) for _ in range(len(completions) - 1)]

    def counting(completions, prompts, **kwargs):
        seen.append((len(completions), prompts[0]))
        return [1.0 for _ in completions]

    rewards = score_groups(GROUPS, ROWS, [emptying, counting])
    assert [row for group in rewards for row in group.rewards] == [[0.0, 1.0]] * 4
    assert seen == [(4, ROWS[0]["prompt"])]
    with pytest.raises(InputError, match="reward 'popping' returned 3 rewards for 4 completions"):
        caller(popping)
