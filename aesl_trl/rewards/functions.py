"""Load reward functions by name, and score samples as GRPOTrainer would.

TRL's rewards that read completions run in child processes (grading.py). A function of the user's own is trusted code
and runs in this process; each of its mistakes becomes one line.
"""

import asyncio
import functools
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

from ..arguments import import_function, load_function
from ..errors import InputError, is_by_signal, nearest
from . import gym
from .grading import (
    GRADERS,
    GYM_GRADERS,
    MATH_GRADERS,
    SHARED_GRADERS,
    SHARED_GYM_GRADERS,
    Answer,
    Grade,
    Graders,
    check_grading,
)
from .maths import math_reward


KNOWN_REWARDS = (*GRADERS, *GYM_GRADERS, "get_soft_overlong_punishment")
OURS = {"math_reward": math_reward, "gym_reward": gym.gym_reward, "gym_score": gym.gym_score}
# Keywords that GRPOTrainer passes to every reward function, besides the dataset's columns.
TRL_KEYWORDS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
NOT_PASSED_ON = ("prompt", "completion", "completion_ids")
# A user's function that takes longer counts as hung. Other processes would not wait longer either (`ddp_timeout`).
HANG_S = 1800.0

logger = logging.getLogger(__name__)


def load_reward_funcs(names: Iterable[str | Callable] | None, base_dir: str | Path | None = None) -> list[Callable]:
    """Return the reward functions that `names` stand for, in that order and [`guarded`].

    A name is `math_reward` ([`~aesl_trl.rewards.maths.math_reward`]), `gym_reward` or `gym_score`
    ([`~aesl_trl.rewards.gym`]), one of TRL's own (`accuracy_reward`, `reasoning_accuracy_reward`,
    `think_format_reward`, `get_soft_overlong_punishment` with the values of TRL's script: 1280 and 256 tokens), a
    dotted import path, or `path/file.py:function`, relative to `base_dir` (default: the current folder). A function
    stands for itself.

    Raises:
        InputError: an unknown name, a name of no function, or two functions that TRL would log under one name.
    """
    place = Path(base_dir or os.getcwd())
    functions = [guarded(_load(name, place) if isinstance(name, str) else name) for name in names or ()]
    labels = [reward_name(function) for function in functions]
    for label in labels:
        if labels.count(label) > 1:
            raise InputError(
                f"reward_funcs: two functions are called {label!r}, and TRL logs rewards by that name; rename one"
            )
    return functions


def reward_name(function: Callable) -> str:
    """Return the name under which TRL logs `function`."""
    function = _unwrapped(function)
    return getattr(function, "__name__", type(function).__name__)


def source_of(function: Callable) -> str | None:
    """Return the file that a reward function, or a callable's class, is written in; None without Python source."""
    function = inspect.unwrap(_unwrapped(inspect.unwrap(function)))
    try:
        return inspect.getsourcefile(function if inspect.isroutine(function) else type(function))
    except TypeError:  # built in
        return None


def _unwrapped(function: Callable) -> Callable:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _load(name: str, base_dir: Path) -> Callable:
    from trl import rewards

    if name == "get_soft_overlong_punishment":  # counts tokens and reads no text, so it needs no child
        return rewards.get_soft_overlong_punishment(max_completion_len=1280, soft_punish_cache=256)
    if name in KNOWN_REWARDS:
        return OURS.get(name) or getattr(rewards, name)
    if ".py:" in name:
        return load_function(name, base_dir, field="reward_funcs")
    if "." in name:
        return import_function(name, base_dir, field="reward_funcs", known=KNOWN_REWARDS)
    raise InputError(
        f"reward_funcs: unknown reward {name!r}{nearest(name, KNOWN_REWARDS)}; valid are {', '.join(KNOWN_REWARDS)}, "
        "a dotted import path, or path/file.py:function"
    )


def check_columns(
    reward_funcs: Iterable[Callable], columns: Iterable[str], *, where: str, absent: Iterable[str] = ()
) -> None:
    """Refuse a reward function whose arguments do not fit what will be passed, before any model loads.

    Args:
        columns: the dataset's columns; `prompt`, `completion` and `completion_ids` are not passed on.
        where: a name for the rows, for the message.
        absent: keywords of [`TRL_KEYWORDS`] that the caller cannot give.

    Raises:
        InputError: an argument that nothing fills, or a column that the function would refuse.
    """
    columns = [column for column in columns if column not in NOT_PASSED_ON]
    given = {*columns, *TRL_KEYWORDS} - set(absent)
    for function in reward_funcs:
        parameters = inspect.signature(function).parameters.values()
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        named = {parameter.name: parameter.default for parameter in parameters if parameter.kind in kinds}
        lacking = [name for name, default in named.items() if default is inspect.Parameter.empty and name not in given]
        if lacking:
            raise InputError(
                f"{where}: reward {reward_name(function)!r} needs {lacking[0]!r}{nearest(lacking[0], columns)}; "
                f"columns: {', '.join(columns) or 'none'}"
            )
        refused = sorted(given - set(named))
        if refused and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            raise InputError(
                f"{where}: reward {reward_name(function)!r} must take **kwargs: TRL passes {refused[0]!r}"
            )


def score_groups(groups: list, rows: list[dict], reward_funcs: list[Callable], *, trainer_state: Any = None) -> list:
    """Return `groups` with `rewards` filled: for each group, each sample, one float per function.

    A function that gives None for a sample gives nan here, as in TRL. The functions get all completions in one call
    each, by keyword: `prompts`, `completions` (a list of one assistant message where the prompt is a list of messages,
    else text), the columns, `trainer_state`, and `log_extra` and `log_metric` that drop what they are given.
    `completion_ids` is absent where the groups do not hold them.

    Args:
        groups: [`~aesl_trl.diversity.figures.Group`]s; `groups[i]` was sampled from `rows[i]`.
        rows: the dataset's rows; their columns reach the functions repeated, one entry per completion.
        trainer_state: for a function that follows the training's progress; a fresh state by default.

    Raises:
        InputError: groups and rows of different length, a function that needs an absent argument, that returns another
            number of rewards than completions, or something that is not a number.
    """
    if len(groups) != len(rows):
        raise InputError(
            f"{len(groups)} groups of samples for {len(rows)} rows: each needs the row that it was sampled from"
        )
    if not groups or not reward_funcs:
        return [replace(group, rewards=[[] for _ in group.completions]) for group in groups]
    from transformers import TrainerState

    columns = [key for key in rows[0] if key not in NOT_PASSED_ON]
    has_ids = all(group.token_ids is not None for group in groups)
    check_columns(reward_funcs, columns, where="scoring samples", absent=() if has_ids else ("completion_ids",))
    pairs = [(row, text) for group, row in zip(groups, rows, strict=True) for text in group.completions]
    keywords = {key: [row[key] for row, _ in pairs] for key in columns}
    keywords["prompts"] = [row["prompt"] for row, _ in pairs]
    if has_ids:
        keywords["completion_ids"] = [ids for group in groups for ids in group.token_ids]
    keywords["completions"] = [
        text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}] for row, text in pairs
    ]
    keywords |= {"trainer_state": trainer_state or TrainerState(), "log_extra": _drop, "log_metric": _drop}
    scores = []
    for function in reward_funcs:
        values = guarded(function)(**keywords)
        values = asyncio.run(values) if inspect.isawaitable(values) else values
        scores.append([math.nan if value is None else value for value in values])
    per_sample = iter(zip(*scores, strict=True))
    return [replace(group, rewards=[list(next(per_sample)) for _ in group.completions]) for group in groups]


def _drop(*_args, **_kwargs) -> None:
    """Stand where GRPOTrainer would add a column or a figure to its own log."""


# ---- TRL's rewards, in child processes


class GradedReward:
    """`math_reward`, or TRL's reward `name` of those that compare with a solution, computed in child processes.

    A completion that takes longer than `deadline_s` seconds, that breaks the grader or is too long to be parsed gets
    0.0, as an answer that cannot be read does. Such failures are counted by reason, logged as a warning, and TRL logs
    their share as `<name>/not_graded`. Completions may be text or messages. TRL's `log_extra` columns are not filled.

    Args:
        graders: the child processes; by default those that all rewards of this process share.
    """

    def __init__(self, name: str, deadline_s: float = 10.0, graders: Graders = SHARED_GRADERS):
        self.__name__ = name
        self.golds = "solution"  # the column that it reads
        self.deadline_s = deadline_s
        self.graders = graders
        self.failures = Counter()

    def __call__(self, completions: list, solution: list[str | None], **kwargs) -> list[float | None]:
        for index, text in enumerate(solution):
            if not isinstance(text, str | None):
                raise InputError(
                    f"reward {self.__name__!r} got the {self.golds} {reprlib.repr(text)} for completion {index}: the "
                    f"column {self.golds} must hold text"
                )
        answers = [Answer(self.__name__, _text(item), gold) for item, gold in zip(completions, solution, strict=True)]
        grades = self.grade(answers)
        failures = Counter(grade.failure for grade in grades if grade.failure)
        self.failures += failures
        if failures:
            reasons = ", ".join(f"{reason} {count}" for reason, count in failures.most_common())
            lost = f"{failures.total()} of {len(grades)} answers not graded, scored 0.0"
            logger.warning(f"{self.__name__}: {lost}: {reasons}")
        kwargs.get("log_metric", _drop)(f"{self.__name__}/not_graded", failures.total() / max(len(grades), 1))
        return [grade.reward for grade in grades]

    def grade(self, answers: Iterable[Answer]) -> list[Grade]:
        """Return one grade per answer, in their order; an answer may name another grader than this reward's."""
        return self.graders.grade(answers, self.deadline_s)

    def take_failures(self) -> dict[str, int]:
        """Return how many completions could not be graded since the last call, by reason."""
        failures, self.failures = self.failures, Counter()
        return dict(failures)


class GradedGym(GradedReward):
    """As [`GradedReward`], for rewards of reasoning-gym's tasks, whose rows hold `metadata` in place of a solution."""

    def __init__(self, name: str, deadline_s: float = 10.0, graders: Graders = SHARED_GYM_GRADERS):
        super().__init__(name, deadline_s, graders)
        self.golds = "metadata"

    def __call__(self, completions: list, metadata: list[str], **kwargs) -> list[float | None]:
        return super().__call__(completions, **{**kwargs, "solution": metadata})


class GradedFormat(GradedReward):
    """As [`GradedReward`], for a reward that needs no solution."""

    def __call__(self, completions: list, **kwargs) -> list[float | None]:
        return super().__call__(completions, **{**kwargs, "solution": [None] * len(completions)})


def _text(completion: str | list[dict]) -> str:
    """Read the first message, as TRL's rewards do; content that is not text (a tool call) reads as empty."""
    content = completion if isinstance(completion, str) else completion[0]["content"]
    return content if isinstance(content, str) else ""


# ---- The user's own functions


def guarded(function: Callable, *, hang_s: float = HANG_S) -> Callable:
    """Return a [`GradedReward`] for one of TRL's graders, and for any other function one that checks each call of it.

    An exception, another number of rewards than completions, and a reward that is neither a finite number nor None
    raise an InputError that names the function. A function that has not returned after `hang_s` seconds cannot be
    stopped from within its process: one line says where it is, and the process ends with exit code 2.
    """
    if isinstance(function, GradedReward) or hasattr(function, "_guards"):
        return function
    name = reward_name(function)
    is_trls = name in GRADERS and str(getattr(function, "__module__", None)).startswith("trl.rewards")
    if is_trls or function is OURS.get(name):
        package = "math-verify" if name in MATH_GRADERS else "reasoning-gym" if name in GYM_GRADERS else None
        if package and importlib.util.find_spec(package.replace("-", "_")) is None:
            raise InputError(f"reward_funcs: {name} needs {package}: pip install {package}")
        check_grading(f"reward_funcs: {name}")
        return (GradedReward if name in MATH_GRADERS else GradedGym if package else GradedFormat)(name)
    inner = _unwrapped(function)
    if inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(inner.__call__):  # as TRL decides it

        @functools.wraps(function)
        async def guard(*args, **kwargs) -> list[float | None]:
            with _one_line(name, hang_s):
                return _checked(await function(*args, **_copies(kwargs)), name, kwargs)
    else:

        @functools.wraps(function)
        def guard(*args, **kwargs) -> list[float | None]:
            with _one_line(name, hang_s):
                return _checked(function(*args, **_copies(kwargs)), name, kwargs)

    guard.__name__, guard._guards = name, True
    return guard


def _copies(keywords: dict) -> dict:
    """Return the keywords with lists of the function's own: what it takes out is still there for the next function."""
    return {name: list(value) if isinstance(value, list) else value for name, value in keywords.items()}


@contextmanager
def _one_line(name: str, hang_s: float) -> Iterator[None]:
    """Turn an exception of a reward function into an InputError; end the process when the function hangs."""
    watchdog = threading.Timer(hang_s, _end_process, [name, hang_s, threading.get_ident()])
    watchdog.daemon = True
    watchdog.start()
    try:
        yield
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # sys.exit(0) would pass for the end of the training
        if is_by_signal(error):
            raise
        where, text = _in_function(traceback.extract_tb(error.__traceback__)), textwrap.shorten(str(error), 300)
        raise InputError(
            f"reward {name!r} raised {type(error).__name__}{where}: {text}; correct it, or let it return None for a "
            "completion that it cannot judge"
        ) from error
    finally:
        watchdog.cancel()


def _end_process(name: str, hang_s: float, thread: int) -> None:
    where = _in_function(traceback.extract_stack(sys._current_frames()[thread]))
    print(
        f"aesl_trl: reward {name!r} has not returned for {hang_s:g} s{where}; give what it waits for a time limit",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)  # nothing gentler ends a thread inside C code


def _in_function(frames: list[traceback.FrameSummary]) -> str:
    """Return ` at file:line`, where the function that a guard called stands; empty if the guard called none."""
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
    for index, value in enumerate(values):
        if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:  # a scalar of numpy or torch
            value = value.item()
        if value is not None and not (isinstance(value, numbers.Real) and math.isfinite(value)):
            raise InputError(
                f"reward {name!r} returned {reprlib.repr(value)} for completion {index}: a finite number is needed, "
                "or None where it does not apply"
            )
        values[index] = None if value is None else float(value)
    return values
