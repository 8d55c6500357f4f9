r"""maj@k: the answer that most of k samples gave, from answers that math-verify extracted and compared.

A sample votes with the answer that math-verify finds in its completion, the same that the grader sees. Two votes are
for the same answer when their normalised texts are equal, or when math-verify finds one equal to the other. Those
that are graded right are one answer, the gold one. A tie counts as won in the share of its winners that are right,
which is what a fair draw among them would give. A sample without an answer votes for nothing.

Completions and extracted answers are untrusted: both are parsed in child processes only (grading.py).
"""

import math
import re
from collections import Counter
from fractions import Fraction
from typing import NamedTuple

from .grading import EXTRACT, Answer, Graders


COMPARE = "accuracy_reward"  # compares two answers, each in a box
CANONICAL = re.compile(r"-?[1-9]\d{0,30}|0")  # two different such texts are two numbers
MAX_CHARS = 10_000  # of an extracted answer; a longer one is no answer


class Votes(NamedTuple):
    """Of one problem: samples that are right, those of each wrong answer, and those without an answer."""

    right: int
    wrong: tuple[int, ...]
    silent: int

    @property
    def total(self) -> int:
        return self.right + sum(self.wrong) + self.silent


def extract(texts: list[str], graders: Graders, deadline_s: float) -> list[str | None]:
    """The answer in each text; None where there is none, or where looking for it failed."""
    different = list(dict.fromkeys(texts))
    grades = graders.grade([Answer(EXTRACT, text, None) for text in different], deadline_s)
    answers = {
        text: grade.reward if not grade.failure and len(grade.reward or "") <= MAX_CHARS else None
        for text, grade in zip(different, grades, strict=True)
    }
    return [answers[text] for text in texts]


def count_votes(
    answers: list[list[str | None]], right: list[list[bool]], graders: Graders, deadline_s: float
) -> list[Votes]:
    """The votes of each problem, `answers` and `right` a list a problem with an entry a sample.

    Wrong answers are compared with one sample of each answer found so far, in the order in which they were drawn, all
    problems side by side. A comparison that fails finds them different.
    """
    wrong = [
        Counter(text for text, is_right in zip(*pair, strict=True) if text is not None and not is_right)
        for pair in zip(answers, right, strict=True)
    ]
    merged = _merge([list(counts) for counts in wrong], graders, deadline_s)
    votes = []
    for texts, flags, counts, names in zip(answers, right, wrong, merged, strict=True):
        sizes = Counter()
        for text, number in counts.items():
            sizes[names[text]] += number
        silent = sum(text is None and not is_right for text, is_right in zip(texts, flags, strict=True))
        votes.append(Votes(sum(flags), tuple(sizes.values()), silent))
    return votes


def _merge(texts: list[list[str]], graders: Graders, deadline_s: float) -> list[dict[str, str]]:
    """For each problem: every text -> the first text that is the same answer."""
    names: list[dict[str, str]] = [{} for _ in texts]
    for turn in range(max(map(len, texts), default=0)):
        pairs = [
            (problem, known, items[turn])
            for problem, items in enumerate(texts)
            if turn < len(items)
            for known in dict.fromkeys(names[problem].values())
            if not (CANONICAL.fullmatch(known) and CANONICAL.fullmatch(items[turn]))
        ]
        asked = [Answer(COMPARE, _boxed(new), _boxed(known)) for _, known, new in pairs]
        grades = graders.grade(asked, deadline_s)
        same = {}
        for (problem, known, _), grade in zip(pairs, grades, strict=True):
            if grade.reward == 1.0:
                same.setdefault(problem, known)
        for problem, items in enumerate(texts):
            if turn < len(items):
                names[problem][items[turn]] = same.get(problem, items[turn])
    return names


def _boxed(text: str) -> str:
    return f"\\boxed{{{text}}}"


def maj_at_k(votes: Votes, k: int) -> tuple[float, float]:
    """Chance that the majority of `k` of the samples is right, and that it is tied.

    The mean over all k-subsets, without bias as in pass@k (diversity/passk.py), in whole numbers up to the last
    division. A subset without any vote is wrong and not tied.

    Returns:
        (maj@k, share of tied subsets), each in [0, 1].
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
    """[j][m]: ways to choose m samples, none right, so that j wrong answers have `top` votes and none has more."""
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
