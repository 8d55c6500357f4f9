"""Intervals against exact resampling, printed tables, numbers by hand and a second way to the same value."""

import itertools
import math
import random
import statistics
import tracemalloc

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aesl_trl.diversity.intervals import (
    _below_less_above,
    bootstrap_interval,
    holm,
    is_number,
    paired_interval,
    permutation_p,
    ranks,
    ratio_intervals,
    share_interval,
    spearman,
    spearman_interval,
    t_probability,
    t_quantile,
    with_interval,
)
from aesl_trl.errors import InputError


def test_what_is_a_known_number():
    assert [is_number(value) for value in (None, math.nan, math.inf, -math.inf, 0, 0.5, True)] == [
        *(False, False, False, False),
        *(True, True, True),
    ]


@pytest.mark.parametrize(
    ("value", "ends", "text"),
    [
        (0.956, [0.9449, 0.97], "0.96 [0.94, 0.97]"),
        (0.956, None, "0.96"),
        (0.956, [None, 0.97], "0.96"),
        (0.956, [math.nan, math.nan], "0.96"),
        (None, [0.9, 1.0], "-"),
        (math.nan, None, "-"),
    ],
)
def test_a_figure_with_its_interval(value, ends, text):
    assert with_interval(value, ends) == text


def test_a_figure_with_more_digits():
    assert with_interval(0.5, (0.25, 1), digits=3) == "0.500 [0.250, 1.000]"


# ---- Bootstrap over prompts


def test_bootstrap_interval_is_seeded_and_leaves_the_global_state_alone():
    values = [0.0, 1.0, 1.0, 0.5, 0.25, 0.0]
    np.random.seed(3)
    random.seed(3)
    first = np.random.random(), random.random()
    np.random.seed(3)
    random.seed(3)
    interval = bootstrap_interval(values, seed=1)
    assert (np.random.random(), random.random()) == first
    assert interval == bootstrap_interval(values, seed=1)
    assert interval != bootstrap_interval(values, seed=2)
    assert interval[0] < np.mean(values) < interval[1]


def test_bootstrap_interval_matches_the_exact_resampling_distribution():
    # two problems, 0 and 1: the resampled mean is 0, 0.5, 1 with chances 1/4, 1/2, 1/4
    assert bootstrap_interval([0, 1], level=0.4) == (0.5, 0.5)
    assert bootstrap_interval([0, 1], level=0.6) == (0.0, 1.0)


def test_bootstrap_interval_covers():
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        low, high = bootstrap_interval(generator.random(60) < 0.4, resamples=300, seed=seed)
        covered += low <= 0.4 <= high
    assert 180 <= covered <= 199  # nominal 190; the percentile interval runs a little narrow


def test_bootstrap_interval_of_gaps_and_nothing():
    assert all(math.isnan(end) for end in bootstrap_interval([]))
    assert all(math.isnan(end) for end in bootstrap_interval([None, math.nan]))
    assert bootstrap_interval([0.5, None, 0.5, math.nan]) == (0.5, 0.5)


@pytest.mark.parametrize("bad", [{"level": 0}, {"level": 1}, {"resamples": 0}])
def test_bootstrap_interval_refuses(bad):
    with pytest.raises(InputError):
        bootstrap_interval([1.0], **bad)


def correlated_steps(generator, problems=40):
    """Two steps on the same problems, whose difficulty they share; the true change is 0.1."""
    difficulty = generator.normal(0.5, 0.2, problems)
    return difficulty + generator.normal(0, 0.05, problems), difficulty + 0.1 + generator.normal(0, 0.05, problems)


def test_paired_interval_covers_and_is_narrower_than_the_unpaired():
    generator, covered = np.random.default_rng(0), 0
    for seed in range(300):
        before, after = correlated_steps(generator)
        difference, low, high = paired_interval(before, after, resamples=400, seed=seed)
        covered += low <= 0.1 <= high
        assert difference == pytest.approx(np.mean(after) - np.mean(before))
        unpaired = [bootstrap_interval(values, resamples=400, seed=seed) for values in (before, after)]
        # the difference of independent means: widths add up as squares
        assert high - low < 0.5 * math.hypot(*(end - start for start, end in unpaired))
    assert 0.91 <= covered / 300 <= 0.98


def test_paired_interval_drops_problems_missing_on_one_side():
    before, after = [0.0, None, 0.5, 0.25, math.nan], [0.5, 1.0, None, 0.25, math.nan]
    assert paired_interval(before, after) == paired_interval([0.0, 0.25], [0.5, 0.25])
    assert paired_interval(before, after)[0] == 0.25
    assert all(math.isnan(value) for value in paired_interval([None, 1.0], [1.0, None]))
    assert paired_interval([True, False], [1.0, 1.0], level=0.4) == (0.5, 0.5, 0.5)


def test_paired_interval_refuses_other_problems():
    with pytest.raises(InputError, match="before has 2 problems, after 1"):
        paired_interval([0.0, 1.0], [1.0])


def test_ratio_intervals_share_problems_and_leave_out_what_has_no_denominator():
    numerators, denominators = np.array([[1.0, 0.0], [0.0, 3.0]]), np.array([[1.0, 0.0], [9.0, 4.0]])
    (low, high), (only, same) = ratio_intervals(numerators, denominators, level=0.6)
    assert (low, high) == (0.0, 1.0)
    assert only == same == 0.75  # drawn in three of four resamples, and then always this
    nothing = ratio_intervals(np.zeros((3, 1)), np.zeros((3, 1)))
    assert all(math.isnan(end) for end in nothing[0])


def test_ratio_intervals_do_not_depend_on_the_size_of_blocks():
    problems = 1500  # two blocks for 1,000 resamples
    values = np.random.default_rng(0).random((problems, 1))
    generator = np.random.default_rng(7)
    means = [values[generator.integers(problems, size=problems)].mean() for _ in range(1000)]
    expected = np.quantile(means, [0.025, 0.975])
    found = ratio_intervals(values, np.ones_like(values), resamples=1000, seed=7)[0]
    assert found == pytest.approx(tuple(expected), abs=1e-12)


# ---- Student's t


@pytest.mark.parametrize(
    "df, level, printed",
    [
        (1, 0.95, 12.706),
        (2, 0.95, 4.303),
        (3, 0.95, 3.182),
        (4, 0.95, 2.776),
        (5, 0.95, 2.571),
        (9, 0.95, 2.262),
        (10, 0.90, 1.812),
        (10, 0.99, 3.169),
        (30, 0.95, 2.042),
        (120, 0.95, 1.980),
        (999, 0.95, 1.962),
        (1, 0.50, 1.000),
    ],
)
def test_quantiles_are_those_of_the_printed_tables(df, level, printed):
    assert t_quantile(df, level) == pytest.approx(printed, abs=0.0005)


@pytest.mark.parametrize("df", [1, 2, 3, 4, 5, 6, 7, 29, 100, 999])
@pytest.mark.parametrize("t", [0.0, 0.1, 1.0, 2.5, 12.0])
def test_probability_is_the_regularised_beta_function(df, t):
    truth = 1 - mpmath.betainc(mpmath.mpf(df) / 2, 0.5, 0, df / (df + mpmath.mpf(t) ** 2), regularized=True)
    assert t_probability(t, df) == pytest.approx(float(truth), abs=1e-13)


@settings(deadline=None)
@given(st.integers(1, 400), st.floats(0.01, 0.999))
def test_quantile_inverts_the_probability(df, level):
    assert t_probability(t_quantile(df, level), df) == pytest.approx(level, abs=1e-10)


@pytest.mark.parametrize("df, level", [(0, 0.95), (-1, 0.95), (3, 0.0), (3, 1.0), (3, 1.5)])
def test_quantile_refuses(df, level):
    with pytest.raises(InputError, match="df >= 1 and 0 < level < 1"):
        t_quantile(df, level)


@pytest.mark.parametrize("normal", [2.0, 3.0, 4.0])
@pytest.mark.parametrize("df", [15, 63, 1000])
def test_quantile_leaves_the_tails_of_a_normal_one(df, normal):
    middles = (np.arange(20000) + 0.5) / 20000  # midpoint rule
    quantile = t_quantile(df, math.erf(normal / math.sqrt(2)))
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    inside = quantile * scale * np.mean((1 + (quantile * middles) ** 2 / df) ** (-(df + 1) / 2))
    assert 0.5 - inside == pytest.approx(math.erfc(normal / math.sqrt(2)) / 2, rel=1e-4)


# ---- Shares, permutations, many comparisons at once


def test_share_interval_by_hand():
    # logit(0.9) = 2.19722; half = 2.77645 * 0.02 / 0.09 = 0.61699; 1 / (1 + exp(-1.58023)), 1 / (1 + exp(-2.81421))
    assert share_interval(0.9, 0.02, 4) == pytest.approx((0.82924, 0.94344), abs=1e-5)
    assert share_interval(1.0, 0.0, 4) == (1.0, 1.0) and share_interval(0.0, 0.0, 4) == (0.0, 0.0)


@settings(deadline=None)
@given(st.integers(0, 1000).map(lambda number: number / 1000), st.floats(0, 0.5), st.integers(1, 30))
def test_share_interval_lies_inside_and_is_that_of_the_complement(mean, error, df):
    low, high = share_interval(mean, error, df)
    assert 0 <= low <= mean <= high <= 1
    assert share_interval(1 - mean, error, df) == pytest.approx((1 - high, 1 - low), abs=1e-6)


def test_share_interval_covers():
    """Five shares near 1: the interval holds the mean more often than the plain t interval does, in about 95 %."""
    rows = np.random.default_rng(0).beta(9, 1, size=(4000, 5))
    means, errors = rows.mean(axis=1), rows.std(axis=1, ddof=1) / math.sqrt(5)
    ends = np.array([share_interval(mean, error, 4) for mean, error in zip(means, errors, strict=True)])
    covered = np.mean((ends[:, 0] < 0.9) & (ends[:, 1] > 0.9))
    plain = np.mean(np.abs(means - 0.9) < t_quantile(4) * errors)
    assert plain < covered and covered == pytest.approx(0.95, abs=0.02)


def test_permutation_by_hand():
    # of the six ways to choose two of 1 2 3 4, only {1, 2} and {3, 4} are as far apart as the observed {3, 4}
    assert permutation_p([([3, 4], [1, 2])]) == pytest.approx(2 / 6)
    assert permutation_p([([1, 4], [2, 3])]) == 1.0
    assert permutation_p([([6, 7, 8, 9, 10], [1, 2, 3, 4, 5])]) == pytest.approx(2 / 252)
    # two bases with the same effect: 6 * 6 ways, of which two are the observed one and its mirror image
    assert permutation_p([([3, 4], [1, 2]), ([30, 31], [28, 29])]) == pytest.approx(2 / 36)
    assert permutation_p([([3, 4], [1, 2]), ([9], [])]) == pytest.approx(2 / 6)
    assert permutation_p([([], [1.0])]) is None


values = st.lists(st.integers(-3, 3).map(lambda number: number / 10), min_size=1, max_size=5)


@settings(deadline=None, max_examples=50)
@given(values, values)
def test_permutation_is_an_enumeration_with_ties(ours, theirs):
    """Tenths tie often, and their sums differ in the last digits."""

    def difference(chosen):
        rest = [pool[index] for index in range(len(pool)) if index not in chosen]
        return abs(statistics.fmean(pool[index] for index in chosen) - statistics.fmean(rest))

    pool = ours + theirs
    observed = difference(range(len(ours)))
    ways = list(itertools.combinations(range(len(pool)), len(ours)))
    found = sum(difference(way) > observed - 1e-7 for way in ways) / len(ways)
    assert permutation_p([(ours, theirs)]) == pytest.approx(found)


def test_drawn_permutations_are_seeded_and_near_the_exact_p():
    rng = np.random.default_rng(1)
    ours, theirs = rng.normal(0.7, 1, 14).tolist(), rng.normal(0, 1, 14).tolist()  # 40 million ways
    found = permutation_p([(ours, theirs)])
    assert found == permutation_p([(ours, theirs)]) != permutation_p([(ours, theirs)], seed=1)
    # Welch's t, which for normal values is near the permutation distribution
    error = math.sqrt((statistics.variance(ours) + statistics.variance(theirs)) / 14)
    t = abs(statistics.fmean(ours) - statistics.fmean(theirs)) / error
    assert found == pytest.approx(1 - t_probability(t, 26), abs=0.01)
    far = permutation_p([([value + 100 for value in ours], theirs)], draws=999)
    assert far == 1 / 1000


def test_permutation_p_is_small_as_often_as_it_says():
    """Without an effect p <= 0.05 in at most 5 % of 1000 tables of 4 against 4: 2/70 is 0.029."""
    rows = np.random.default_rng(2).normal(size=(1000, 8))
    found = [permutation_p([(row[:4].tolist(), row[4:].tolist())]) for row in rows]
    assert np.mean(np.array(found) <= 0.05) <= 0.05


def test_holm_by_hand():
    # 0.01 * 4, 0.02 * 3, 0.03 * 2 = 0.06 (not below its neighbour's 0.06), 0.9
    assert holm([0.02, 0.9, 0.01, 0.03]) == pytest.approx([0.06, 0.9, 0.04, 0.06])
    assert holm([0.4, 0.5, 0.6]) == [1.0, 1.0, 1.0] and holm([0.03]) == [0.03] and holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_lies_between_the_plain_p_and_bonferronis(p_values):
    n = len(p_values)
    for plain, adjusted in zip(p_values, holm(p_values), strict=True):
        assert plain <= adjusted <= min(1, n * plain) or adjusted == pytest.approx(plain)


# ---- Rank correlation


def test_ranks_share_ties():
    assert ranks([10, 20, 10, 30]).tolist() == [1.5, 3, 1.5, 4]


def test_spearman_by_hand():
    # d = 1 0 -1 1 -1, 1 - 6 * 4 / (5 * 24) = 0.8
    assert spearman([1, 2, 3, 4, 5], [2, 2.5, 2.2, 9, 7]) == pytest.approx(1 - 6 * sum([0, 1, 1, 1, 1]) / 120)
    assert spearman([1, 2, 3], [1, 8, 27]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # with ties: ranks 1 2.5 2.5 4 and 1 2 3 4, Pearson 4.5 / sqrt(4.5 * 5)
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))


@pytest.mark.parametrize("x, y", [([], []), ([1], [1]), ([1, 1], [1, 2]), ([1, 2], [3, 3])])
def test_spearman_is_unknown_without_spread(x, y):
    assert math.isnan(spearman(x, y))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-50, 50), st.integers(-50, 50)), min_size=3, max_size=20))
def test_spearman_is_that_of_pandas(points):
    import pandas

    x, y = zip(*points, strict=True)
    ours, theirs = spearman(x, y), pandas.DataFrame({"x": x, "y": y}).corr(method="spearman").loc["x", "y"]
    assert ours == pytest.approx(theirs, nan_ok=True)


def test_interval_resamples_rows_whole():
    """Ten cells of each of four rows whose order alone carries the correlation: seeds must not narrow it."""
    centres = [(0, 0), (1, 1), (2, 3), (3, 2)]
    many = [[(x + seed / 100, y + seed / 100) for seed in range(10)] for x, y in centres]
    few = [[centre] for centre in centres]
    wide, wider = spearman_interval(many), spearman_interval(few)
    assert wide[0] < 0.6 < wide[1]
    assert wide == spearman_interval(many)  # a seed of its own
    assert wider[0] <= wide[0]
    assert all(math.isnan(end) for end in spearman_interval(many[:2]))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=9), st.integers(0, 2**32 - 1))
def test_points_below_less_points_above_against_a_double_loop(values, seed):
    counts = np.random.default_rng(seed).integers(3, size=(4, len(values))).astype(float)
    truth = [
        [sum(n * ((other < own) - (other > own)) for n, other in zip(row, values, strict=True)) for own in values]
        for row in counts
    ]
    assert _below_less_above(counts, np.array(values, dtype=float)).tolist() == truth


def test_the_memory_of_a_rank_correlations_interval_grows_with_the_clusters_and_no_faster():
    def peak(count: int) -> int:
        clusters = [[(number % 7, number % 5)] for number in range(count)]
        tracemalloc.start()
        spearman_interval(clusters)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(200) < 2.3 * peak(100)
