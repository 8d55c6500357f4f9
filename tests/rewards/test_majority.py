"""maj@k against all subsets, and answers that are the same although their texts differ."""

from fractions import Fraction
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aesl_trl.rewards.functions import GradedReward
from aesl_trl.rewards.grading import Grade, Graders
from aesl_trl.rewards.majority import MAX_CHARS, Votes, count_votes, extract, maj_at_k


def by_enumeration(votes: Votes, k: int) -> tuple[Fraction, Fraction]:
    """The definition: every k-subset votes, a tie is shared."""
    samples = ["right"] * votes.right + [""] * votes.silent
    samples += [f"wrong {i}" for i, number in enumerate(votes.wrong) for _ in range(number)]
    won = tied = subsets = 0
    for chosen in combinations(range(len(samples)), k):
        counts = {}
        for index in chosen:
            if samples[index]:
                counts[samples[index]] = counts.get(samples[index], 0) + 1
        top = [name for name, count in counts.items() if count == max(counts.values())]
        won += Fraction("right" in top, max(len(top), 1))
        tied += len(top) > 1
        subsets += 1
    return won / subsets, Fraction(tied, subsets)


@given(
    st.integers(0, 4),
    st.lists(st.integers(1, 3), max_size=3),
    st.integers(0, 2),
    st.data(),
)
def test_maj_is_the_mean_over_all_subsets(right, wrong, silent, data):
    votes = Votes(right, tuple(wrong), silent)
    if votes.total == 0:
        return
    k = data.draw(st.integers(1, votes.total))
    won, tied = by_enumeration(votes, k)
    assert maj_at_k(votes, k) == (float(won), float(tied))


@pytest.mark.parametrize(
    ("votes", "k", "expected"),
    [
        (Votes(3, (1, 1), 3), 8, (1.0, 0.0)),  # silence does not vote
        (Votes(2, (2,), 4), 8, (0.5, 1.0)),  # a tie is half won
        (Votes(1, (1, 1), 5), 8, (1 / 3, 1.0)),
        (Votes(0, (), 4), 4, (0.0, 0.0)),  # nobody answered
        (Votes(0, (2, 2), 0), 4, (0.0, 1.0)),  # tied, and all wrong
        (Votes(3, (5,), 0), 1, (3 / 8, 0.0)),  # maj@1 is pass@1
    ],
)
def test_what_a_vote_comes_to(votes, k, expected):
    assert maj_at_k(votes, k) == expected


@pytest.mark.parametrize("k", [0, 5])
def test_k_is_at_most_the_samples(k):
    with pytest.raises(ValueError, match="between 1 and 4"):
        maj_at_k(Votes(1, (2,), 1), k)


def test_many_samples_do_not_take_long():
    """The worst of 64 samples: all different. Chance that the right one is among 32, divided among 32 that tie."""
    won, tied = maj_at_k(Votes(1, (1,) * 63, 0), 32)
    assert won == pytest.approx(1 / 64, rel=1e-12) and tied == 1.0


# ---- Votes


def test_equal_answers_are_one_vote():
    pytest.importorskip("math_verify")
    graders, asked = Graders(size=1), []

    def grade(given):
        asked.extend(given)
        return graders.grade(given, 10.0)

    answers = [[r"\frac{1}{2}", "0.5", "7", None, "8", r"\frac{2}{4}"], ["1", "2", "3", "3", None, "4"]]
    right = [[False] * 6, [False, False, True, True, False, False]]
    assert count_votes(answers, right, grade) == [Votes(0, (3, 1, 1), 1), Votes(2, (1, 1, 1), 1)]
    # Whole numbers need no comparison, and what is right needs none
    assert {r"\boxed{7}", r"\boxed{8}"} & {a.completion for a in asked if a.solution == r"\boxed{7}"} == set()
    assert all(r"\boxed{3}" not in (answer.completion, answer.solution) for answer in asked)


def test_a_comparison_that_fails_finds_two_answers():
    def broken(answers):
        return [Grade(0.0, "timeout") for _ in answers]

    assert count_votes([["x", "y", "x"]], [[False] * 3], broken) == [Votes(0, (2, 1), 0)]


def test_answers_are_extracted_in_the_child_process():
    pytest.importorskip("math_verify")
    long = "1+" * (MAX_CHARS // 2) + "1"
    texts = [r"so \boxed{\frac{1}{2}}", "no answer", r"so \boxed{\frac{1}{2}}", rf"\boxed{{{long}}}", "x" * 1_000_001]
    reward = GradedReward("math_reward", graders=Graders(size=1))
    assert extract(texts, reward.grade) == [r"\frac{1}{2}", None, r"\frac{1}{2}", None, None]
    other = [r"\boxed{3}. Wait ... \boxed{4}", r"\boxed{1} and \boxed{2}", "The answer is 72.", r"\boxed{\frac12}"]
    assert extract(other, reward.grade) == ["4", "1, 2", "72", r"\frac{1}{2}"]
    assert extract(other, reward.grade, "accuracy_reward")[2:] == [None, r"\frac12"]
    assert reward.take_failures() == {}  # an answer that cannot be extracted is no completion that was not graded
