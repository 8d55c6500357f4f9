"""Grade gold answers against themselves before a run: some are written so that no answer can earn their reward.

TRL's `accuracy_reward` gives nothing, silently, where it cannot read a gold: of MATH-500's bare column that is 108 of
500. RL would draw and grade samples that teach nothing, and an evaluation would count them as wrong.
"""

import math
import os
import textwrap
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from typing import Any

from ..errors import InputError, tell
from .functions import GradedReward
from .grading import Answer
from .maths import right_answers


CHECKED = ("math_reward", "accuracy_reward")  # they compare with the column `solution`
MOST = 512  # golds of a dataset, spread evenly over its rows; of a stream the first


def check_golds(reward_funcs: Iterable[Any], rows: Any, *, where: str) -> None:
    """Say which share of the golds of `rows` no answer can earn, for each of [`CHECKED`] among `reward_funcs`.

    Of several processes the first one does it. Rows without a gold count where nothing else rewards them.

    Args:
        rows: a list, a dataset or a stream; without a column `solution` nothing is checked.
        where: a name for the rows, for the messages.

    Raises:
        InputError: no answer can earn more than half of the golds, or a gold is no text.
    """
    reward_funcs = list(reward_funcs)
    checked = [each for each in reward_funcs if is_checked(each)]
    if not checked or os.environ.get("RANK", "0") != "0":
        return
    rows = rows.select_columns(["solution"]) if hasattr(rows, "select_columns") else rows
    step = -(-len(rows) // MOST) or 1 if hasattr(rows, "__len__") else 1
    numbered = [(number * step, row.get("solution")) for number, row in enumerate(islice(rows, 0, MOST * step, step))]
    for number, gold in numbered:
        if not isinstance(gold, str | None):
            raise InputError(f"{where}, row {number} (from 0): solution must hold text, got {gold!r}")
    golds = [gold for _, gold in numbered if gold is not None or len(reward_funcs) == 1]
    for reward in checked:
        say_lost(reward, lost_golds(reward, golds), len(golds), where=where)


def is_checked(reward: Any) -> bool:
    """Return whether `reward` is one of [`CHECKED`], and no function of the user's own by such a name."""
    return isinstance(reward, GradedReward) and reward.__name__ in CHECKED


def lost_golds(reward: GradedReward, golds: list[str | None]) -> list[str | None]:
    """Return the golds that do not earn 1.0 where they, or their last formula, are given as the answer."""

    def grade(different: list[str], answers: list[str]) -> list[float]:
        grades = reward.grade(list(map(partial(Answer, reward.__name__), answers, different)))
        return [math.nan if grade.reward is None else grade.reward for grade in grades]

    rewards = rewards_of_golds(list(filter(None, golds)), grade, right=1.0)
    return [gold for gold in golds if not rewards.get(gold, math.nan) >= 1.0]


def rewards_of_golds(
    golds: Iterable[str], grade: Callable[[list[str], list[str]], list[float]], right: float
) -> dict[str, float]:
    """Return the reward that each gold earns as the answer to itself.

    A gold that earns less than `right` is tried again by its last formula alone, as the answer of a solution in prose.

    Args:
        grade: takes golds and an answer to each, and returns the rewards, nan where the reward does not apply.
    """
    whole = {gold: right_answers(gold)[0] for gold in golds}
    rewards = dict(zip(whole, grade(list(whole), list(whole.values())), strict=True))
    last = {gold: right_answers(gold)[1] for gold in whole if not rewards[gold] >= right}
    last = {gold: answer for gold, answer in last.items() if answer != whole[gold]}
    return rewards | dict(zip(last, grade(list(last), list(last.values())), strict=True))


def say_lost(reward: Any, lost: list[str | None], num: int, *, where: str) -> None:
    """Say how many of `num` golds no answer can earn, with three examples; refuse more than half."""
    if not num or not is_checked(reward):
        return
    name = reward.__name__
    line = f"{where}: {len(lost)} of {num} golds ({len(lost) / num:.1%}) cannot be earned with {name}"
    if not lost:
        tell(line)
        return
    examples = (textwrap.shorten(gold, 60, placeholder="...") if gold else "(empty)" for gold in dict.fromkeys(lost))
    line += f", whatever the answer, such as {'; '.join(islice(examples, 3))}"
    line += "; math_reward reads more notations" if name != "math_reward" else ""
    if len(lost) > num / 2:
        raise InputError(f"{line}: write them so that math-verify can read them, or take another reward")
    warnings.warn(line, stacklevel=3)
