"""Reward functions by name, and samples scored as GRPOTrainer would score them.

TRL's rewards that read completions are graded in child processes (grading.py). A function of the user's own is code
and runs here; what it does wrong becomes one line.
"""

import asyncio
import functools
import importlib
import importlib.util
import inspect
import logging
import math
import numbers
import os
import reprlib
import sys
import textwrap
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from ..arguments import load_function
from ..errors import InputError, nearest
from .grading import GRADERS, MATH_GRADERS, SHARED_GRADERS, Answer, Graders


TRL_REWARDS = (*GRADERS, "get_soft_overlong_punishment")
# What GRPOTrainer passes to every reward function, besides the dataset's columns.
TRL_KEYWORDS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
NOT_PASSED_ON = ("prompt", "completion", "completion_ids")
# A function of the user's own that takes longer hangs. As `ddp_timeout`: other processes would not wait longer.
HANG_S = 1800.0

logger = logging.getLogger(__name__)


def load_reward_funcs(names: Iterable[str] | None, base_dir: str | Path | None = None) -> list[Callable]:
    """The reward functions that `names` mean, in that order.

    A name is one of TRL's own (`accuracy_reward`, `reasoning_accuracy_reward`, `think_format_reward`,
    `get_soft_overlong_punishment` with the values of TRL's script: 1280 and 256 tokens), a dotted import path, or
    `path/file.py:function`, relative to `base_dir` (default: the current folder).

    The functions are [`guarded`].

    Raises:
        InputError: a name that means nothing, is not callable, or two functions that TRL would log under one name.
    """
    functions = [guarded(_load(name, Path(base_dir or os.getcwd()))) for name in names or ()]
    labels = [reward_name(function) for function in functions]
    for label in labels:
        if labels.count(label) > 1:
            raise InputError(
                f"reward_funcs: two functions are called {label!r}, and TRL logs rewards by that name; rename one"
            )
    return functions


def reward_name(function: Callable) -> str:
    """The name under which TRL logs `function`."""
    while isinstance(function, functools.partial):
        function = function.func
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

    if name == "get_soft_overlong_punishment":  # it counts tokens and reads no text: no child is needed
        return rewards.get_soft_overlong_punishment(max_completion_len=1280, soft_punish_cache=256)
    return getattr(rewards, name)


def _from_module(name: str, base_dir: Path) -> Callable:
    module, _, function = name.rpartition(".")
    for folder in (str(base_dir), os.getcwd()):  # TRL's script does so for the current folder
        if folder not in sys.path:
            sys.path.insert(0, folder)
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise InputError(f"reward_funcs: cannot import {name!r}: {error}{nearest(name, TRL_REWARDS)}") from None
    except Exception as error:
        raise InputError(f"reward_funcs: {module} cannot be imported: {type(error).__name__}: {error}") from error
    return _callable(found, function, where=module)


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
        groups: [`~aesl_trl.diversity.figures.Group`]s; `groups[i]` was sampled from `rows[i]`.
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
    result = guarded(function)(**keywords)
    result = asyncio.run(result) if inspect.isawaitable(result) else result
    return [math.nan if value is None else value for value in result]


# ---- TRL's rewards, in child processes


class GradedReward:
    """TRL's reward `name`, one of those that compare with a solution, computed in child processes.

    A completion that takes longer than `deadline_s` seconds, that breaks the grader or is too long to be parsed gets
    0.0, as an answer that cannot be read; `failures` counts them by reason, a warning tells, and TRL logs their share
    as `<name>/not_graded`. Completions may be text or messages. TRL's `log_extra` columns are not filled.

    Args:
        graders: the child processes; by default those that all rewards of this process share.
    """

    def __init__(self, name: str, deadline_s: float = 10.0, graders: Graders = SHARED_GRADERS):
        self.__name__ = name
        self.deadline_s = deadline_s
        self.graders = graders
        self.failures = Counter()

    def __call__(self, completions: list, solution: list[str | None], **kwargs) -> list[float | None]:
        for index, text in enumerate(solution):
            if not isinstance(text, str | None):
                raise InputError(
                    f"reward {self.__name__!r} got the solution {reprlib.repr(text)} for completion {index}: the "
                    "column solution must hold text"
                )
        answers = [Answer(self.__name__, _text(item), gold) for item, gold in zip(completions, solution, strict=True)]
        grades = self.graders.grade(answers, self.deadline_s)
        self._report(Counter(grade.failure for grade in grades if grade.failure), len(grades), **kwargs)
        return [grade.reward for grade in grades]

    def _report(self, failures: Counter, num: int, log_metric: Callable = _drop, **kwargs) -> None:
        self.failures += failures
        if failures:
            reasons = ", ".join(f"{reason} {count}" for reason, count in failures.most_common())
            logger.warning(f"{self.__name__}: {failures.total()} of {num} answers not graded, scored 0.0: {reasons}")
        log_metric(f"{self.__name__}/not_graded", failures.total() / max(num, 1))


class GradedFormat(GradedReward):
    """As [`GradedReward`], for a reward that needs no solution."""

    def __call__(self, completions: list, **kwargs) -> list[float | None]:
        return super().__call__(completions, **{**kwargs, "solution": [None] * len(completions)})


def _text(completion: str | list[dict]) -> str:
    """As TRL's rewards read it: the first message; what is no text (a tool call) cannot be read."""
    content = completion if isinstance(completion, str) else completion[0]["content"]
    return content if isinstance(content, str) else ""


# ---- The user's own functions


def guarded(function: Callable, *, hang_s: float = HANG_S) -> Callable:
    """`function` with TRL's graders replaced by [`GradedReward`], and any other one checked at each call.

    An exception, another number of rewards than completions, and a reward that is neither a finite number nor None
    raise an InputError that names the function. A function that has not returned after `hang_s` seconds cannot be
    stopped from within its process: one line says where it is, and the process leaves with exit code 2.
    """
    if isinstance(function, GradedReward) or hasattr(function, "_guards"):
        return function
    name = reward_name(function)
    if name in GRADERS and str(getattr(function, "__module__", None)).startswith("trl.rewards"):
        return _graded(name)
    if _is_async(function):

        @functools.wraps(function)
        async def guard(*args, **kwargs) -> list[float | None]:
            with _one_line(name, hang_s):
                return _checked(await function(*args, **kwargs), name, kwargs)
    else:

        @functools.wraps(function)
        def guard(*args, **kwargs) -> list[float | None]:
            with _one_line(name, hang_s):
                return _checked(function(*args, **kwargs), name, kwargs)

    guard.__name__, guard._guards = name, True
    return guard


def _graded(name: str) -> GradedReward:
    if name in MATH_GRADERS and importlib.util.find_spec("math_verify") is None:
        raise InputError(f"reward_funcs: {name} needs math-verify; install aesl-trl[math] or math-verify")
    return GradedReward(name) if name in MATH_GRADERS else GradedFormat(name)


def _is_async(function: Callable) -> bool:
    """As TRL decides it."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(function.__call__)


@contextmanager
def _one_line(name: str, hang_s: float) -> Iterator[None]:
    """What a reward function raises as an InputError; leave the process when it hangs."""
    watchdog = threading.Timer(hang_s, _leave, [name, hang_s, threading.get_ident()])
    watchdog.daemon = True
    watchdog.start()
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        where, text = _in_function(traceback.extract_tb(error.__traceback__)), textwrap.shorten(str(error), 300)
        raise InputError(
            f"reward {name!r} raised {type(error).__name__}{where}: {text}; correct it, or let it return None for a "
            "completion that it cannot judge"
        ) from error
    finally:
        watchdog.cancel()


def _leave(name: str, hang_s: float, thread: int) -> None:
    where = _in_function(traceback.extract_stack(sys._current_frames()[thread]))
    print(
        f"aesl_trl: reward {name!r} has not returned for {hang_s:g} s{where}; give what it waits for a time limit",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)  # nothing gentler ends a thread inside C code


def _in_function(frames: list[traceback.FrameSummary]) -> str:
    """` at file:line`, the line of the function that a guard called; empty where the guard called none."""
    inner = list(takewhile(lambda frame: frame.filename != __file__, reversed(frames)))
    return f" at {inner[-1].filename}:{inner[-1].lineno}" if 0 < len(inner) < len(frames) else ""


def _checked(result: Any, name: str, keywords: dict) -> list[float | None]:
    try:
        values = list(result)
    except TypeError:
        raise InputError(
            f"reward {name!r} returned {reprlib.repr(result)}: a list with one reward per completion is needed"
        ) from None
    num = len(keywords.get("completions", values))
    if len(values) != num:
        raise InputError(
            f"reward {name!r} returned {len(values)} rewards for {num} completions: one per completion is needed"
        )
    return [_checked_value(value, name, index) for index, value in enumerate(values)]


def _checked_value(value: Any, name: str, index: int) -> float | None:
    if value is None:
        return None
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:  # a scalar of numpy or torch
        value = value.item()
    if isinstance(value, numbers.Real) and math.isfinite(value):
        return float(value)
    raise InputError(
        f"reward {name!r} returned {reprlib.repr(value)} for completion {index}: a finite number is needed, or None "
        "where it does not apply"
    )
