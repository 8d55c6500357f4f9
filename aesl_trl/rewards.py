"""Reward functions by name, and samples scored as GRPOTrainer would score them.

The rewards that run math-verify are graded in a child process with a hard deadline: a completion such as
`5^(5^(5^(5^5)))` keeps sympy inside one long multiplication, where neither an alarm nor a thread can stop it, and the
whole training would wait.
"""

import asyncio
import importlib
import importlib.util
import inspect
import json
import math
import numbers
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from .data import load_function
from .errors import InputError, exit_on_input_error, nearest


GRADED_IN_CHILD = ("accuracy_reward", "reasoning_accuracy_reward")
TRL_REWARDS = (*GRADED_IN_CHILD, "think_format_reward", "get_soft_overlong_punishment")
# What GRPOTrainer passes to every reward function, besides the dataset's columns.
TRL_KEYWORDS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
NOT_PASSED_ON = ("prompt", "completion", "completion_ids")


def load_reward_funcs(names: Iterable[str] | None, base_dir: str | Path | None = None) -> list[Callable]:
    """The reward functions that `names` mean, in that order.

    A name is one of TRL's own (`accuracy_reward`, `reasoning_accuracy_reward`, `think_format_reward`,
    `get_soft_overlong_punishment` with the values of TRL's script: 1280 and 256 tokens), a dotted import path, or
    `path/file.py:function`, relative to `base_dir` (default: the current folder).

    Raises:
        InputError: a name that means nothing, is not callable, or two functions that TRL would log under one name.
    """
    functions = [_load(name, Path(base_dir or os.getcwd())) for name in names or ()]
    labels = [reward_name(function) for function in functions]
    for label in labels:
        if labels.count(label) > 1:
            raise InputError(
                f"reward_funcs: two functions are called {label!r}, and TRL logs rewards by that name; rename one"
            )
    return functions


def reward_name(function: Callable) -> str:
    """The name under which TRL logs `function`."""
    return getattr(function, "__name__", type(function).__name__)


def _load(name: str, base_dir: Path) -> Callable:
    if name in TRL_REWARDS:
        return _trl_reward(name)
    if ".py:" in name:
        return load_function(name, base_dir, field="reward_funcs")
    if "." in name:
        return _from_module(name, base_dir)
    raise InputError(
        f"reward_funcs: unknown reward {name!r}{nearest(name, TRL_REWARDS)}; valid are {', '.join(TRL_REWARDS)}, "
        "a dotted import path, or path/file.py:function"
    )


def _trl_reward(name: str) -> Callable:
    from trl import rewards

    if name == "get_soft_overlong_punishment":
        return rewards.get_soft_overlong_punishment(max_completion_len=1280, soft_punish_cache=256)
    if name in GRADED_IN_CHILD:
        if importlib.util.find_spec("math_verify") is None:
            raise InputError(f"reward_funcs: {name} needs math-verify; install aesl-trl[math] or math-verify")
        return GradedReward(name)
    return getattr(rewards, name)


def _from_module(name: str, base_dir: Path) -> Callable:
    module, _, function = name.rpartition(".")
    for folder in (str(base_dir), os.getcwd()):  # TRL's script does so for the current folder
        if folder not in sys.path:
            sys.path.insert(0, folder)
    try:
        return _callable(importlib.import_module(module), function, where=module)
    except ModuleNotFoundError as error:
        raise InputError(f"reward_funcs: cannot import {name!r}: {error}{nearest(name, TRL_REWARDS)}") from None


def _callable(module: Any, name: str, *, where: str) -> Callable:
    function = getattr(module, name, None)
    if callable(function):
        return function
    options = [key for key, value in vars(module).items() if inspect.isfunction(value)]
    problem = "has no" if function is None else f"holds a {type(function).__name__}, not a function, as"
    raise InputError(f"reward_funcs: {where} {problem} {name!r}{nearest(name, options)}")


def check_columns(
    reward_funcs: Iterable[Callable], columns: Iterable[str], *, where: str, absent: Iterable[str] = ()
) -> None:
    """Refuse a reward function whose arguments do not fit what will be passed, before any model loads.

    Args:
        columns: the dataset's columns; `prompt`, `completion` and `completion_ids` are not passed on.
        where: what the rows are, for the message.
        absent: keywords of [`TRL_KEYWORDS`] that the caller cannot give.

    Raises:
        InputError: an argument that nothing fills, or a column that the function would refuse.
    """
    columns = [column for column in columns if column not in NOT_PASSED_ON]
    given = {*columns, *TRL_KEYWORDS} - set(absent)
    for function in reward_funcs:
        parameters = inspect.signature(function).parameters.values()
        named = {parameter.name: parameter for parameter in parameters if parameter.kind in _BY_NAME}
        for name in (
            name for name, parameter in named.items() if parameter.default is parameter.empty and name not in given
        ):
            have = ", ".join(columns) or "none"
            raise InputError(
                f"{where}: reward {reward_name(function)!r} needs {name!r}{nearest(name, columns)}; columns: {have}"
            )
        refused = sorted(given - set(named))
        if refused and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            raise InputError(
                f"{where}: reward {reward_name(function)!r} must take **kwargs: TRL passes {refused[0]!r}"
            )


_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def score_groups(groups: list, rows: list[dict], reward_funcs: list[Callable], *, trainer_state: Any = None) -> list:
    """`groups` with `rewards` filled: for each group, each sample, one float per function (nan where a function gave
    None, as in TRL).

    Args:
        groups: [`~aesl_trl.diversity.Group`]s; `groups[i]` was sampled from `rows[i]`.
        rows: the dataset's rows; their columns reach the functions repeated, one entry per completion.
        trainer_state: what a function that follows the training's progress reads; a fresh state by default.

    The functions get all completions in one call each, by keyword: `prompts`, `completions` (a list of one assistant
    message where the prompt is a list of messages, else text), the columns, `trainer_state`, and `log_extra` and
    `log_metric` that drop what they are given. `completion_ids` is absent: saved samples are text.

    Raises:
        InputError: groups and rows of different length, a function that needs what is not there, that returns another
            number of rewards than completions, or something that is no number.
    """
    if len(groups) != len(rows):
        raise InputError(
            f"{len(groups)} groups of samples for {len(rows)} rows: each needs the row that it was sampled from"
        )
    if not groups or not reward_funcs:
        return [replace(group, rewards=[[] for _ in group.completions]) for group in groups]
    columns = [key for key in rows[0] if key not in NOT_PASSED_ON]
    check_columns(reward_funcs, columns, where="scoring samples", absent=("completion_ids",))
    pairs = [(group, row, text) for group, row in zip(groups, rows, strict=True) for text in group.completions]
    keywords = {key: [row[key] for _, row, _ in pairs] for key in columns}
    keywords["prompts"] = [row["prompt"] for _, row, _ in pairs]
    keywords["completions"] = [_as_completion(row["prompt"], text) for _, row, text in pairs]
    keywords |= {"trainer_state": trainer_state or _fresh_state(), "log_extra": _drop, "log_metric": _drop}
    scores = [_call(function, keywords) for function in reward_funcs]
    per_sample = iter(zip(*scores, strict=True))
    return [replace(group, rewards=[list(next(per_sample)) for _ in group.completions]) for group in groups]


def _as_completion(prompt: str | list, text: str) -> str | list[dict]:
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _fresh_state() -> Any:
    from transformers import TrainerState

    return TrainerState()


def _drop(*_args, **_kwargs) -> None:
    """Stands where GRPOTrainer would add a column or a figure to its own log."""


def _call(function: Callable, keywords: dict) -> list[float]:
    result = function(**keywords)
    result = list(asyncio.run(result) if inspect.isawaitable(result) else result)
    num = len(keywords["completions"])
    if len(result) != num:
        raise InputError(f"reward {reward_name(function)!r} returned {len(result)} rewards for {num} completions")
    return [_as_float(value, function, index) for index, value in enumerate(result)]


def _as_float(value: Any, function: Callable, index: int) -> float:
    if value is None:
        return math.nan
    if hasattr(value, "item"):  # a scalar of numpy or torch
        value = value.item()
    if not isinstance(value, numbers.Real):
        raise InputError(
            f"reward {reward_name(function)!r} returned {value!r} for completion {index}: a number or None is needed"
        )
    return float(value)


class GradedReward:
    """TRL's reward `name`, computed in a child process that is killed when one completion takes longer than
    `deadline_s` seconds.

    A completion that outlasts the deadline gets 0.0, as an answer that cannot be read. Completions may be text or
    messages. TRL's `log_extra` columns are not filled.
    """

    def __init__(self, name: str, deadline_s: float = 10.0):
        self.__name__ = name
        self.deadline_s = deadline_s
        self._child = None

    def __call__(self, completions: list, solution: list[str], **kwargs) -> list[float | None]:
        texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
        return [self._grade(text, answer) for text, answer in zip(texts, solution, strict=True)]

    def __getstate__(self) -> dict:
        return {**vars(self), "_child": None}

    def _grade(self, completion: str, solution: str) -> float | None:
        if self._child is None:
            self._child = _start_child(self.__name__)
        timer = threading.Timer(self.deadline_s, self._child.kill)
        timer.start()
        try:
            self._child.stdin.write(json.dumps([completion, solution]) + "\n")
            self._child.stdin.flush()
            answer = self._child.stdout.readline()
        finally:
            timer.cancel()
        if answer:
            return json.loads(answer)
        code = self._child.wait()
        self._child = None
        if code >= 0:  # not killed: it failed by itself, and its traceback is on stderr
            raise RuntimeError(f"grading {self.__name__} failed with exit code {code}")
        return 0.0


def _start_child(name: str) -> subprocess.Popen:
    package = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    child = subprocess.Popen(
        [sys.executable, "-m", "aesl_trl.rewards", name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": path},
    )
    if not child.stdout.readline():  # written once its imports are done, which no deadline should count
        raise RuntimeError(f"the process that grades {name} did not start (exit code {child.wait()})")
    return child


def main(argv: list[str] | None = None) -> None:
    """The grading child: reads `[completion, solution]` as JSON lines, answers each with a reward or null."""
    (name,) = sys.argv[1:] if argv is None else argv
    from trl import rewards

    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a parser prints must not pass for an answer
    function = getattr(rewards, name)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        completion, solution = json.loads(line)
        (reward,) = function(completions=[[{"role": "assistant", "content": completion}]], solution=[solution])
        print(json.dumps(reward), file=answers, flush=True)


if __name__ == "__main__":
    exit_on_input_error("aesl rewards", main)
