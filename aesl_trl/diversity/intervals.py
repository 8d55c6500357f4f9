"""Intervals and tests: bootstrap over prompts, Student's t over seeds, permutations, rank correlations."""

import itertools
import math
from collections.abc import Sequence
from functools import cache

import numpy as np

from ..errors import InputError


LEVEL = 0.95  # share of the repetitions in which an interval is to hold the true value
MIN_CLUSTERS = 3  # fewer clusters than this, resampled, give no interval
EXACT = 200_000  # so many ways to hand values out are all tried; of more, `permutation_p` draws some
TIE = 1e-9  # relative; sums of the same values in another order differ by less


def is_number(value: float | None) -> bool:
    """Return whether a figure is known: not None (which JSON has for NaN), not NaN and not infinite."""
    return not isinstance(value, str | list | dict | None) and bool(abs(value) < math.inf)


def with_interval(value: float | None, ends: Sequence[float | None] | None, digits: int = 2) -> str:
    """Return a figure and its interval as text, "0.96 [0.95, 0.97]"; "-" stands for an unknown figure.

    The brackets are left out where an end is not known.
    """
    if not is_number(value):
        return "-"
    known = ends is not None and all(map(is_number, ends))
    brackets = f" [{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]" if known else ""
    return f"{value:.{digits}f}{brackets}"


def bootstrap_interval(
    values: Sequence[float | None], *, level: float = LEVEL, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean over problems.

    Problems are resampled, not samples: the samples of a problem share its difficulty. Equal values give an interval
    of width zero, which says that the resamples agree, not that the mean is known.

    Args:
        values: one figure a problem, such as its pass@k. Unknown figures (NaN, None) are left out.
        level: share of the resampled means inside the interval, in (0, 1).
        resamples: number of means drawn.
        seed: seed of a generator of its own; the global random state is left alone.

    Returns:
        (low, high); NaN twice without values.
    """
    known = np.array([value for value in values if is_number(value)], dtype=float)[:, None]
    return ratio_intervals(known, np.ones_like(known), level=level, resamples=resamples, seed=seed)[0]


def paired_interval(
    before: Sequence[float | None],
    after: Sequence[float | None],
    *,
    level: float = LEVEL,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Return how much the mean over problems changed from `before` to `after`, with a percentile bootstrap interval.

    The differences of the problems are resampled. A problem's difficulty moves both of its values and drops out. The
    interval is therefore narrower than those of the two means suggest, and may exclude zero where those overlap.

    Args:
        before, after: one figure a problem, the same problems in the same order. A problem that is unknown on one side
            is left out on both.
        level, resamples, seed: as in [`bootstrap_interval`].

    Returns:
        (difference, low, high); NaN three times without a common problem.

    Raises:
        InputError: the lists differ in length.
    """
    if len(before) != len(after):
        raise InputError(f"before has {len(before)} problems, after {len(after)}: they must be the same ones")
    pairs = [pair for pair in zip(before, after, strict=True) if all(map(is_number, pair))]
    differences = [float(late) - float(early) for early, late in pairs]
    low, high = bootstrap_interval(differences, level=level, resamples=resamples, seed=seed)
    return (math.fsum(differences) / len(differences) if differences else math.nan), low, high


def ratio_intervals(
    numerators: np.ndarray, denominators: np.ndarray, *, level: float = LEVEL, resamples: int = 2000, seed: int = 0
) -> list[tuple[float, float]]:
    """Return the percentile bootstrap intervals of `numerators.sum(0) / denominators.sum(0)`, problems resampled.

    The arrays are [problem, figure] and finite; the settings are those of [`bootstrap_interval`]. All figures share
    the resampled problems. A resample without a denominator is left out; without any, both ends are NaN.
    """
    if not 0 < level < 1:
        raise InputError(f"level must lie between 0 and 1, got {level}")
    if resamples < 1:
        raise InputError(f"resamples must be at least 1, got {resamples}")
    problems, figures = numerators.shape
    if problems == 0:
        return [(math.nan, math.nan)] * figures
    generator = np.random.default_rng(seed)
    blocks = []
    rows = max(1, 2**20 // problems)  # resamples at once, so that memory stays bounded
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        counts = _counts(generator.integers(problems, size=(size, problems)), problems)
        with np.errstate(divide="ignore", invalid="ignore"):
            blocks.append((counts @ numerators) / (counts @ denominators))
    return [_percentiles(values, level) for values in np.concatenate(blocks).T]


def _counts(drawn: np.ndarray, items: int) -> np.ndarray:
    """Return how often each of the `items` is in each resample, [resample, item], given the numbers of those drawn."""
    size = len(drawn)
    places = drawn + items * np.arange(size)[:, None]
    return np.bincount(places.ravel(), minlength=size * items).reshape(size, items).astype(float)


def _below_less_above(counts: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return for each point how many points of its resample lie below it less those above it, [resample, point].

    That is twice the point's rank less the mean rank. One sort serves all resamples.
    """
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    equal = np.add.reduceat(counts[:, order], starts, axis=1)  # points of each different value
    upto = np.cumsum(equal, axis=1)
    found = 2 * upto - equal - upto[:, -1:]  # with `upto - equal` below and `last - upto` above
    return found[:, np.unique(values, return_inverse=True)[1]]


def _percentiles(values: np.ndarray, level: float) -> tuple[float, float]:
    """Return the ends between which the share `level` of the known values lies; NaN twice without any."""
    known = values[np.isfinite(values)]
    if not known.size:
        return math.nan, math.nan
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def t_probability(t: float, df: int) -> float:
    """Return P(|T| <= t) of Student's t with a whole number of degrees of freedom, in closed form.

    The sum of powers of cos(theta), theta = atan(t / sqrt(df)), is that of Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    theta = math.atan2(t, math.sqrt(df))
    sine, cosine = math.sin(theta), math.cos(theta)
    first = 1 + df % 2  # the factors are 2/3, 4/5, ... for odd df and 1/2, 3/4, ... for even df
    term = cosine if df % 2 else 1.0
    total = term if df > 1 else 0.0
    for number in range(first, df - 2, 2):
        term *= cosine * cosine * number / (number + 1)
        total += term
    return 2 / math.pi * (theta + sine * total) if df % 2 else sine * total


@cache
def t_quantile(df: int, level: float = LEVEL) -> float:
    """Return the t that |T| stays below with probability `level`: 12.706 for df 1 at 0.95, 2.776 for df 4."""
    if df < 1 or not 0 < level < 1:
        raise InputError(f"Student's t needs df >= 1 and 0 < level < 1, got df {df} and level {level}")
    low, high = 0.0, 1.0
    while t_probability(high, df) < level:
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if t_probability(middle, df) < level else (low, middle)
    return (low + high) / 2


def share_interval(mean: float, error: float, df: int, *, level: float = LEVEL) -> tuple[float, float]:
    """Return the t interval of a mean of shares, taken on the scale of log-odds: it lies inside [0, 1].

        logit(mean) ± t(level, df) * error / (mean (1 - mean))

    mapped back (delta method; as the "logit" intervals of proportions in the R package survey). Far from 0 and 1 it is
    the plain t interval, near them its longer side points inwards. `error` is the mean's standard error. A mean of 0
    or 1, which only equal values have, is returned twice.
    """
    if not 0 < mean < 1:
        return mean, mean
    middle = math.log(mean / (1 - mean))
    half = t_quantile(df, level) * error / (mean * (1 - mean))
    low, high = ((1 + math.tanh((middle + side) / 2)) / 2 for side in (-half, half))
    return min(low, mean), max(high, mean)  # rounding may put an end past the mean where the error is 0


def permutation_p(
    strata: Sequence[tuple[Sequence[float], Sequence[float]]], *, draws: int = 20_000, seed: int = 0
) -> float | None:
    """Return the two-sided p of a difference of means under permutation, in (0, 1]; no distribution is assumed.

    The values of both sides are handed out anew, each stratum's among itself. p is the share of the ways to do so in
    which the sum on our side lies at least as far from its expectation as the observed one. All ways are tried where
    they are [`EXACT`] or fewer: five values against five have 252, and p is at least 2/252. Else `draws` of them are
    drawn from a generator of their own, and p is (1 + found) / (1 + draws) (Phipson and Smyth, arXiv 1603.05766).

    Args:
        strata: (our values, those of the reference), such as a pair for each base model. A stratum without one of its
            sides is left out: it says nothing of the difference.

    Returns:
        None without a stratum.
    """
    pools = [(np.array([*ours, *theirs], dtype=float), len(ours)) for ours, theirs in strata if ours and theirs]
    if not pools:
        return None
    is_exact = math.prod(math.comb(len(pool), size) for pool, size in pools) <= EXACT
    generator = np.random.default_rng(seed)
    sums, observed = np.zeros(1), 0.0  # on our side, less their expectation
    for pool, size in pools:
        pool = pool - pool.mean()
        observed += pool[:size].sum()
        if is_exact:
            chosen = np.array(list(itertools.combinations(range(len(pool)), size)))
            sums = np.add.outer(sums, pool[chosen].sum(axis=1)).ravel()
        else:
            drawn = generator.permuted(np.tile(pool, (draws, 1)), axis=1)
            sums = sums + drawn[:, :size].sum(axis=1)
    slack = TIE * sum(np.abs(pool - pool.mean()).sum() for pool, _ in pools)
    found = int((np.abs(sums) >= abs(observed) - slack).sum())
    return found / len(sums) if is_exact else (1 + found) / (1 + draws)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p values adjusted for their number by Holm's step-down method (Scand. J. Statist. 6, 1979).

    The smallest of n is multiplied by n, the next by n - 1, and so on; none falls below a smaller one's, none exceeds
    1. An adjusted p below 0.05 keeps the chance of any false decision in the family below 0.05, however the values
    depend on each other.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def ranks(values: Sequence[float]) -> np.ndarray:
    """Return the ranks of the values from 1; equal values share the mean of their ranks."""
    _, place, counts = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Return Spearman's rank correlation, in [-1, 1]; NaN where a side is constant or has fewer than two values."""
    if len(x) < 2 or min(x) == max(x) or min(y) == max(y):
        return math.nan
    return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


def spearman_interval(
    clusters: Sequence[Sequence[tuple[float, float]]], *, level: float = LEVEL, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of Spearman's correlation, clusters resampled whole.

    A cluster holds the points of one row, such as its seeds: they start alike, and resampled one by one they would
    count as independent. Resamples in which a side is constant are left out. Both ends are NaN with fewer than
    [`MIN_CLUSTERS`] clusters.
    """
    if len(clusters) < MIN_CLUSTERS:
        return math.nan, math.nan
    of_cluster = np.repeat(np.arange(len(clusters)), [len(points) for points in clusters])
    drawn = np.random.default_rng(seed).integers(len(clusters), size=(resamples, len(clusters)))
    # How often each point is in each resample, [resample, point]
    counts = _counts(drawn, len(clusters))[:, of_cluster]
    sides = np.array([point for points in clusters for point in points], dtype=float).T
    x, y = (_below_less_above(counts, side) for side in sides)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = (counts * x * y).sum(axis=1) / np.sqrt((counts * x * x).sum(axis=1) * (counts * y * y).sum(axis=1))
    return _percentiles(found, level)
