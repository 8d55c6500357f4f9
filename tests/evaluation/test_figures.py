"""From graded samples to the figures of evaluation.json."""

import math

import pytest

from aesl_trl.diversity.figures import Group
from aesl_trl.evaluation import figures


def test_intervals_are_over_problems():
    """Two problems, one always right and one never: the mean of two resampled problems is 0, 1/2 or 1."""
    groups = [Group("p", ["a"] * 4, [1] * 4, [False] * 4, [0.0] * 4, [[reward]] * 4) for reward in (1.0, 0.0)]
    found = figures.figures_with_intervals(groups, 1.0)
    assert found["pass@1"] == 0.5 and found["pass@1_interval"] == [0.0, 1.0]
    assert found["pass@4_interval"] == [0.0, 1.0]
    # an answer that the reward does not apply to counts for nothing
    groups[0].rewards[0] = [math.nan]
    assert figures.figures_with_intervals(groups, 1.0)["pass@1"] == 0.5


def test_what_problems_ask_for_is_counted_as_solved():
    """Of A 3 of 4 samples are right, of B exactly half, of C fewer; of D none could be graded."""

    rewards = [[1.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.0, 1.0], [None, math.nan]]
    groups = [
        Group("p", ["a"] * len(of), [1] * len(of), [False] * len(of), [0.0] * len(of), [[each] for each in of])
        for of in rewards
    ]
    found = figures.figures_by_value(groups, list("AABCD"), 1.0)
    intervals = {name: found.pop(name) for name in list(found) if name.endswith("_interval")}
    shares = {"pass@1[A]": 0.75, "pass@1[B]": 0.5, "pass@1[C]": pytest.approx(1 / 3)}
    assert found == {"solved": 2, "solved_of": 4, **shares}
    assert intervals["pass@1[A]_interval"] == [0.5, 1.0] and intervals["pass@1[B]_interval"] == [0.5, 0.5]


def test_a_mean_over_benchmarks_holds_the_numbers_that_all_of_them_have():
    first = {"m": {"avg@8": 0.25, "avg@8_interval": [0.0, 0.5], "maj@8": 1.0, "entropy_estimator": "exact"}}
    second = {"m": {"avg@8": 0.75, "avg@8_interval": [0.5, 1.0], "entropy_estimator": "exact"}}
    assert figures.mean_over([first, second]) == {"m": {"avg@8": 0.5}}


@pytest.mark.parametrize("on_benchmarks", [False, True])
def test_a_model_is_summed_up_in_one_line(on_benchmarks):
    found = {"pass@1": 0.5, "pass@8": 0.75, "entropy": 1.25, "pass@1_interval": [0.25, 0.625], "avg@8": 0.5}
    found |= {"maj@1": 0.5, "maj@1_tied": 0.0, "maj@8": 1.0, "maj@8_tied": 0.0} if on_benchmarks else {}
    result = {"models": {"start": found}}
    result |= {"benchmarks": {"AIME24": {"models": {"start": found}}}} if on_benchmarks else {}
    (line,) = figures.summary_lines(result)
    assert line.startswith("start, AIME24: " if on_benchmarks else "start: ")
    shown = "pass@1 0.500, pass@8 0.750, avg@8 0.500, " + "maj@8 1.000, " * on_benchmarks + "entropy 1.250"
    assert line.endswith(f"{shown} (pass@1 between 0.250 and 0.625)")
