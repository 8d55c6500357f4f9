"""Intervals: bootstrap over prompts, Student's t over seeds, rank correlations."""

import math
from collections.abc import Sequence
from functools import cache

import numpy as np

from ..errors import InputError


def is_number(value: float | None) -> bool:
    """Whether a figure is known: neither None, which JSON has for NaN, nor NaN or infinite."""
    return value is not None and math.isfinite(value)


def bootstrap_interval(
    values: Sequence[float], *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over problems.

    Problems are resampled, not samples: those of one problem share its difficulty. Equal values give an interval of
    width zero, which says that the resamples agree, not that the mean is known.

    Args:
        values: one figure a problem, such as its pass@k; NaN and None are left out.
        level: share of the resampled means inside the interval, in (0, 1).
        resamples: means drawn.
        seed: of a generator of its own; the global random state is left alone.

    Returns:
        (low, high); NaN twice without values.
    """
    known = np.array([value for value in values if _is_known(value)], dtype=float)[:, None]
    return ratio_intervals(known, np.ones_like(known), level=level, resamples=resamples, seed=seed)[0]


def paired_interval(
    before: Sequence[float | None],
    after: Sequence[float | None],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """How much the mean over problems changed from `before` to `after`, with a percentile bootstrap interval.

    The differences of each problem are resampled. How hard a problem is moves both of its values and drops out, so
    that the interval is narrower than the two means' own intervals suggest; it may exclude zero where those overlap.

    Args:
        before, after: one figure a problem, the same problems in the same order; a problem that is NaN or None on one
            side is left out on both.
        level, resamples, seed: as in [`bootstrap_interval`].

    Returns:
        (difference, low, high); NaN three times without a common problem.

    Raises:
        InputError: lists of different length.
    """
    if len(before) != len(after):
        raise InputError(f"before has {len(before)} problems, after {len(after)}: they must be the same ones")
    pairs = [pair for pair in zip(before, after, strict=True) if all(map(_is_known, pair))]
    differences = [float(late) - float(early) for early, late in pairs]
    low, high = bootstrap_interval(differences, level=level, resamples=resamples, seed=seed)
    return (math.fsum(differences) / len(differences) if differences else math.nan), low, high


def ratio_intervals(
    numerators: np.ndarray, denominators: np.ndarray, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> list[tuple[float, float]]:
    """Percentile bootstrap intervals of `numerators.sum(0) / denominators.sum(0)`, problems resampled.

    All figures share the resampled problems. A resample without a denominator is left out.

    Args:
        numerators, denominators: [problem, figure], finite.
        level, resamples, seed: as in [`bootstrap_interval`].

    Returns:
        (low, high) of each figure; NaN twice where no resample has it.
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
    rows = max(1, 2**20 // problems)  # of resamples at once: memory
    for start in range(0, resamples, rows):
        weights = _resampled_counts(generator, min(rows, resamples - start), problems)
        with np.errstate(divide="ignore", invalid="ignore"):
            blocks.append((weights @ numerators) / (weights @ denominators))
    tails = [(1 - level) / 2, (1 + level) / 2]
    known = [values[np.isfinite(values)] for values in np.concatenate(blocks).T]
    return [tuple(np.quantile(values, tails).tolist()) if values.size else (math.nan, math.nan) for values in known]


def _resampled_counts(generator: np.random.Generator, resamples: int, problems: int) -> np.ndarray:
    """How often each problem is in each resample [resample, problem]."""
    drawn = generator.integers(problems, size=(resamples, problems))
    drawn += problems * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * problems).reshape(resamples, problems).astype(float)


def _is_known(value: float | None) -> bool:
    return value is not None and not math.isnan(value)


LEVEL = 0.95


MIN_CLUSTERS = 3  # fewer rows than this, resampled, give no interval


def t_probability(t: float, df: int) -> float:
    """P(|T| <= t) of Student's t with a whole number of degrees of freedom, in closed form.

    Abramowitz and Stegun, 26.7.3 and 26.7.4: a finite sum of powers of cos(theta), theta = atan(t / sqrt(df)).
    """
    theta = math.atan2(t, math.sqrt(df))
    sine, cosine = math.sin(theta), math.cos(theta)
    first = 1 + df % 2  # of the factors: 2/3, 4/5, ... for odd df, 1/2, 3/4, ... for even
    term = cosine if df % 2 else 1.0
    total = term if df > 1 else 0.0
    for number in range(first, df - 2, 2):
        term *= cosine * cosine * number / (number + 1)
        total += term
    return 2 / math.pi * (theta + sine * total) if df % 2 else sine * total


@cache
def t_quantile(df: int, level: float = LEVEL) -> float:
    """The t that |T| stays below with probability `level`: 12.706 for df 1 at 0.95, 2.776 for 4.

    Raises:
        InputError: `df` below 1 or `level` outside (0, 1).
    """
    if df < 1 or not 0 < level < 1:
        raise InputError(f"Student's t needs df >= 1 and 0 < level < 1, got df {df} and level {level}")
    low, high = 0.0, 1.0
    while t_probability(high, df) < level:
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if t_probability(middle, df) < level else (low, middle)
    return (low + high) / 2


def ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 1, ties sharing the mean of theirs."""
    _, place, counts = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rank correlation in [-1, 1]; NaN where one side is constant or has fewer than two values."""
    if len(x) < 2 or min(x) == max(x) or min(y) == max(y):
        return math.nan
    return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


def spearman_interval(
    clusters: Sequence[Sequence[tuple[float, float]]], *, level: float = LEVEL, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of Spearman's correlation, clusters resampled whole.

    A cluster holds the cells of one row: its seeds start alike, and resampled one by one they would count as so many
    starts. Resamples in which a side is constant are left out; NaN twice below [`MIN_CLUSTERS`] clusters.
    """
    if len(clusters) < MIN_CLUSTERS:
        return math.nan, math.nan
    generator, found = np.random.default_rng(seed), []
    for _ in range(resamples):
        drawn = generator.integers(len(clusters), size=len(clusters))
        x, y = zip(*(point for index in drawn for point in clusters[index]), strict=True)
        found.append(spearman(x, y))
    known = np.array(found)[np.isfinite(found)]
    if not known.size:
        return math.nan, math.nan
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
