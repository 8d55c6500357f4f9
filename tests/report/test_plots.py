"""Curves."""

import math
import random
from types import SimpleNamespace

import pytest
from counted_work import bytecodes
from matplotlib.figure import Figure

from aesl_trl.report import plots
from aesl_trl.report.plots import MAX_POINTS, Curve, running_mean, thinned
from aesl_trl.report.runs import Arm


def test_running_mean_skips_gaps_and_leaves_short_series_alone():
    short = [1.0, math.nan]
    assert running_mean(short) is short
    assert running_mean([2.0] * 30 + [math.nan] + [2.0] * 30) == [2.0] * 61


def test_running_mean_is_the_mean_of_each_window():
    rng = random.Random(0)
    values = [math.nan if rng.random() < 0.3 else rng.gauss(0, 1) for _ in range(400)]
    values[100:160] = [math.nan] * 60
    half = 400 // 30
    for place, found in enumerate(running_mean(values)):
        window = [v for v in values[max(0, place - half) : place + half + 1] if math.isfinite(v)]
        assert found == pytest.approx(sum(window) / len(window), abs=1e-12) if window else math.isnan(found)


def test_a_thinned_curve_keeps_its_spikes_its_ends_and_its_gaps():
    steps, values = list(range(1, 100_001)), [0.5] * 100_000
    values[31_234], values[77_777] = 9.0, -9.0
    values[50_000:60_000] = [math.nan] * 10_000
    few, kept = thinned(steps, values)
    assert len(few) == len(kept) <= MAX_POINTS and few == sorted(set(few))
    assert (few[0], few[-1]) == (1, 100_000)
    by_step = dict(zip(few, kept, strict=True))
    assert by_step[31_235] == 9.0 and by_step[77_778] == -9.0
    assert sum(map(math.isnan, kept)) > 50
    assert thinned(steps[:50], values[:50]) == (steps[:50], values[:50])


def test_curves_are_alike_when_their_gaps_are():
    def arm(*pairs) -> Arm:
        return Arm("a", False, [SimpleNamespace(log=[{"step": step, "x": value} for step, value in pairs])])

    like = [arm((1, 0.5), (2, None)), arm((1, 0.5), (2, float("nan")))]
    others = [arm((1, 0.5), (2, 0.6)), arm((1, 0.5), (3, None)), arm((1, 0.5)), arm((1, -0.0)), arm((1, 0.0))]
    found = [curve.arms for curve in plots.curves([*like, *others], "log", "x")]
    assert found == [like, *([other] for other in others[:3]), others[3:]]


def test_the_work_for_curves_grows_with_the_arms_and_no_faster():
    def work(count: int):
        logs = [[{"step": step, "x": step + number} for step in range(4)] for number in range(count)]
        arms = [Arm("a", False, [SimpleNamespace(log=log)]) for log in logs]
        return lambda: plots.curves(arms, "log", "x")

    assert bytecodes(work(60)) < 2.1 * bytecodes(work(30))


def test_a_shared_curve_has_the_words_that_its_names_begin_with():
    def label(*names):
        return Curve([Arm(name, False, []) for name in names], []).label

    assert label("nll last", "nll turning point") == "nll"
    assert label("aesl last", "nll last") == "aesl last, nll last"


def test_outcomes_are_stacked_at_the_steps_that_have_all_three():
    """A row of an edited series may lack one of them."""
    rows = [{"step": step, "groups_all_wrong": 0.5, "groups_mixed": 0.3, "groups_all_right": 0.2} for step in (0, 10)]
    rows.append({"step": 20, "groups_mixed": 0.3, "groups_all_right": 0.2})
    run = SimpleNamespace(diversity=rows, selection={})
    (panel,) = plots.outcome_panels([Arm("aesl", False, [run], "aesl")], None)
    ax = Figure().add_subplot()
    panel.draw(ax)
    assert len(ax.collections) == 3 and ax.get_xlim()[1] == 10
