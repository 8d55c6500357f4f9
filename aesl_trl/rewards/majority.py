"""maj@k: how often the majority of k samples is right, from answers that math-verify extracted and compared.

A sample votes with the answer that its reward (`by`: math_reward or accuracy_reward) finds in its completion.
Two votes are for the same answer when their normalised texts are equal, or when math-verify finds one equal to the
other. All votes that are graded right are for one answer, the gold one. When k samples tie, maj@k counts the share of
the tied answers that are right, as a fair draw among them would. A sample without an answer does not vote.

Completions and extracted answers are untrusted: both are parsed in child processes only (grading.py).
"""

import math
import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

from .grading import EXTRACT, Answer, Grade


CANONICAL = re.compile(r"-?[1-9]\d{0,30}|0")  # whole numbers: two of them are equal only if their texts are
MAX_CHARS = 10_000  # a longer extracted text counts as no answer
GradeAnswers = Callable[[list[Answer]], list[Grade]]  # such as GradedReward.grade


class Votes(NamedTuple):
    """The samples of one problem: how many are right, how many gave each wrong answer, how many gave none."""

    right: int
    wrong: tuple[int, ...]
    silent: int

    @property
    def total(self) -> int:
        return self.right + sum(self.wrong) + self.silent


def extract(texts: list[str], grade: GradeAnswers, by: str = "math_reward") -> list[str | None]:
    """Return the answer that the reward `by` reads in each text, None where it finds none or breaks."""
    different = list(dict.fromkeys(texts))
    grades = zip(different, grade([Answer(EXTRACT[by], text, None) for text in different]), strict=True)
    answers = {text: None if found.failure else found.reward for text, found in grades}
    return [None if len(answers[text] or "") > MAX_CHARS else answers[text] for text in texts]


def count_votes(
    answers: list[list[str | None]], right: list[list[bool]], grade: GradeAnswers, by: str = "math_reward"
) -> list[Votes]:
    """Count the votes of each problem; `answers` and `right` hold a list per problem with an entry per sample.

    Each wrong answer is compared with the first text of every different answer found before it, by the reward `by`,
    for all problems side by side. Where a comparison fails, the two answers count as different.
    """
    wrong = [
        Counter(text for text, is_right in zip(*pair, strict=True) if text is not None and not is_right)
        for pair in zip(answers, right, strict=True)
    ]
    merged = _merge([list(counts) for counts in wrong], grade, by)
    votes = []
    for texts, flags, counts, names in zip(answers, right, wrong, merged, strict=True):
        sizes = Counter()
        for text, number in counts.items():
            sizes[names[text]] += number
        silent = sum(text is None and not is_right for text, is_right in zip(texts, flags, strict=True))
        votes.append(Votes(sum(flags), tuple(sizes.values()), silent))
    return votes


def _merge(texts: list[list[str]], grade: GradeAnswers, by: str) -> list[dict[str, str]]:
    """Map, for each problem, every text to the first text that is the same answer."""
    names: list[dict[str, str]] = [{} for _ in texts]
    for turn in range(max(map(len, texts), default=0)):
        pairs = [
            (problem, known, items[turn])
            for problem, items in enumerate(texts)
            if turn < len(items)
            for known in dict.fromkeys(names[problem].values())
            if not (CANONICAL.fullmatch(known) and CANONICAL.fullmatch(items[turn]))
        ]
        grades = grade([Answer(by, rf"\boxed{{{new}}}", rf"\boxed{{{known}}}") for _, known, new in pairs])
        same = {}
        for (problem, known, _), found in zip(pairs, grades, strict=True):
            if found.reward == 1.0:
                same.setdefault(problem, known)
        for problem, items in enumerate(texts):
            if turn < len(items):
                names[problem][items[turn]] = same.get(problem, items[turn])
    return names


def maj_at_k(votes: Votes, k: int) -> tuple[float, float]:
    """Return (maj@k, share of tied subsets): how often the majority of `k` of the samples is right, and is tied.

    Both are means over all subsets of k samples, so they have no bias, as pass@k has none. They are computed in whole
    numbers up to the last division. A subset without any vote counts as wrong and not tied.
    """
    if not 1 <= k <= votes.total:
        raise ValueError(f"k must lie between 1 and {votes.total}, got {k}")
    won, tied = Fraction(0), 0
    for top in range(1, min(k, max((votes.right, *votes.wrong), default=0)) + 1):
        others = _ways(votes, k, top)
        for level, ways_k in enumerate(others):
            for right in range(min(votes.right, top, k) + 1):
                ways = math.comb(votes.right, right) * ways_k[k - right]
                at_top = level + (right == top)
                won += Fraction(ways, at_top) if right == top else 0
                tied += ways if at_top > 1 else 0
    subsets = math.comb(votes.total, k)
    return float(won / subsets), tied / subsets


def _ways(votes: Votes, k: int, top: int) -> list[list[int]]:
    """Count ways[j][m] to choose m wrong or silent samples so that j answers have `top` votes and none has more."""
    ways = [[0] * (k + 1) for _ in range(k // top + 1)]
    ways[0][: votes.silent + 1] = [math.comb(votes.silent, m) for m in range(min(votes.silent, k) + 1)]
    for count in votes.wrong:
        after = [[0] * (k + 1) for _ in ways]
        for j, row in enumerate(ways):
            for m, number in enumerate(row):
                if number:
                    for taken in range(min(count, top, k - m) + 1):
                        level = j + (taken == top)
                        after[level][m + taken] += number * math.comb(count, taken)
        ways = after
    return ways
