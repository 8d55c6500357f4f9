"""Curves."""

import math

from aesl_trl.report.plots import running_mean


def test_running_mean_skips_gaps_and_leaves_short_series_alone():
    short = [1.0, math.nan]
    assert running_mean(short) is short
    assert running_mean([2.0] * 30 + [math.nan] + [2.0] * 30) == [2.0] * 61
