"""Where the diversity of a model's own samples peaks before it falls.

During a cold start diversity first rises, while the demonstrated pattern joins the old ones, and then falls, when it
replaces them. The turning point between the two is the best start for reinforcement learning (Li et al., "Getting
Your LLMs Ready for Reinforcement Learning with Lightweight SFT", ICLR 2026). Their rule for finding it is not public;
this one is ours.

The method is a test against a flat series. The values are fitted by the curve that first only rises and then only
falls and is nearest in least squares (no smoothing width to choose). The fit gives the rise from the first level to
the peak, the fall from the peak to the last level, and the noise. A peak counts when the smaller of rise and fall
exceeds `threshold * noise`.

Left out: which metric to follow and what to do when there is no turning point (selection.py).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .errors import InputError, nearest


MINIMUM = 6  # with fewer values a random order is too often a rise and a fall

# Multiple of the noise that `min(rise, fall)` of a flat series exceeds in 3% of cases, by the number of values, from
# 20,000 simulated Gaussian series with a correlation of 0.5 between neighbours, patience 3. White noise exceeds it
# less often. A short series needs more because its fit follows the noise and leaves little of it over.
THRESHOLD_COUNTS = (6, 7, 8, 9, 10, 12, 14, 16, 20, 24, 32, 40, 64, 100)
THRESHOLDS = (21.2, 19.0, 17.2, 14.6, 13.0, 10.7, 8.9, 8.3, 7.4, 6.5, 5.9, 5.6, 5.1, 4.9)

ROUGHNESS_SHARE = 0.2  # of the second differences in the noise: keeps it above zero where the fit follows every value


@dataclass(frozen=True)
class Selection:
    """A step, or None where none is justified, with the reason in words and the numbers behind it."""

    step: int | None
    reason: str
    evidence: dict = field(default_factory=dict)


def find_turning_point(
    steps: Sequence[int], values: Sequence[float | None], *, mode: str = "max", patience: int = 3
) -> Selection:
    """The step at which `values` peak before they fall, or undetermined.

    A series that is still growing may be asked after each measurement: a step is returned only once `patience` later
    values confirm the fall, and the first call that returns one is the moment to stop. Asking often errs more often
    than asking once: of flat series, 7% with white noise (23% where neighbours correlate by 0.5) name a step at some
    time within 40 values, against 1% (3%) for one call at the end.

    Undetermined, step None, are
    - fewer than 6 values;
    - a series that only falls. Its highest value is the first, usually the model before training, but no turning point
      was seen: measure more often early on, or this cold start only narrows the model;
    - a series that still rises, or whose peak has fewer than `patience` later values;
    - a rise or a fall within noise. A dip before the peak is read as noise and asks for a clearer peak.

    Args:
        steps: optimiser steps, strictly increasing.
        values: one a step; None, NaN and infinity are gaps, left out. Spacing between steps plays no part.
        mode: "max" when high is diverse (entropy), "min" when low is diverse (self-BLEU), the exact mirror.
        patience: values that have to follow the peak, at least 1.

    Returns:
        A [`Selection`]. Its evidence: `mode`, `patience`, `steps` and `values` as used, `missing` (steps of gaps),
        and once there are enough values `fit`, `peak_step`, `peak` (its value), `start`, `end`, `rise`, `fall` (both
        in the direction of diversity), `later` (values after the peak), `noise`, `threshold` and `needed` (their
        product), in the values' unit.

    Raises:
        InputError: lengths differ, steps do not increase, unknown `mode`, `patience` below 1.
    """
    _check(steps, values, mode, patience)
    known = [(int(step), float(value)) for step, value in zip(steps, values, strict=True) if _is_number(value)]
    evidence = {
        "mode": mode,
        "patience": patience,
        "steps": [step for step, _ in known],
        "values": [value for _, value in known],
        "missing": [int(step) for step, value in zip(steps, values, strict=True) if not _is_number(value)],
    }
    if len(known) < MINIMUM:
        reason = f"undetermined: {len(known)} measurements, at least {MINIMUM} are needed"
        return Selection(None, reason, evidence)
    sign = 1.0 if mode == "max" else -1.0
    evidence |= _shape([sign * value for value in evidence["values"]], sign, evidence["steps"])
    return _decide(evidence)


def _check(steps, values, mode, patience) -> None:
    if mode not in ("max", "min"):
        raise InputError(f"mode must be 'max' or 'min', got {mode!r}{nearest(mode, ('max', 'min'))}")
    if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
        raise InputError(f"patience must be a whole number of at least 1, got {patience!r}")
    if len(steps) != len(values):
        raise InputError(f"{len(steps)} steps but {len(values)} values")
    for before, after in zip(steps, steps[1:], strict=False):
        if not before < after:
            raise InputError(f"steps must increase, but {after} follows {before}")


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _shape(heights: list[float], sign: float, steps: list[int]) -> dict:
    """Peak, rise, fall and noise of `heights`, of which high is diverse; times `sign` they are the caller's values."""
    fit = unimodal_fit(heights)
    top = max(fit)
    peak = fit.index(top)  # a measured value or the first of equal ones: nothing is pooled at the top
    noise = _noise(heights, fit, peak)
    threshold = float(np.interp(len(heights), THRESHOLD_COUNTS, THRESHOLDS))
    return {
        "fit": [sign * level for level in fit],
        "peak_step": steps[peak],
        "peak": sign * top,
        "start": sign * fit[0],
        "end": sign * fit[-1],
        "rise": top - fit[0],
        "fall": top - fit[-1],
        "later": len(heights) - 1 - peak,
        "noise": noise,
        "threshold": threshold,
        "needed": threshold * noise,
    }


def _decide(evidence: dict) -> Selection:
    step, needed, later, patience = (evidence[key] for key in ("peak_step", "needed", "later", "patience"))
    rises, falls = evidence["rise"] > needed, evidence["fall"] > needed
    best = "highest" if evidence["mode"] == "max" else "lowest"
    sizes = f"rise {evidence['rise']:.3g}, fall {evidence['fall']:.3g}, needed {needed:.3g}"
    if rises and falls and later >= patience:
        return Selection(step, f"peak of diversity at step {step} ({best}, {evidence['peak']:.4g}; {sizes})", evidence)
    if not rises and not falls:
        why = f"flat within noise ({sizes})"
    elif evidence["rise"] == 0:
        why = f"diversity only fell from the first measurement, step {evidence['steps'][0]} ({sizes})"
    elif not rises:
        why = f"the rise to step {step} is within noise ({sizes})"
    elif later < patience:
        why = f"still rising: {best} at step {step}, only {later} values after it, patience asks for {patience}"
    else:
        why = f"no fall beyond noise after step {step} ({sizes})"
    return Selection(None, f"undetermined: {why}", evidence)


def unimodal_fit(values: Sequence[float]) -> list[float]:
    """The least-squares fit to `values` that does not fall up to some place and does not rise after it.

    The errors of the best rising fit to every beginning and of the best falling fit to every end come out of one
    sweep each, so the place costs no more than the fit.
    """
    rising = _sweep(values)[1]
    falling = _sweep(values[::-1])[1][::-1] + [0.0]
    place = min(range(len(values)), key=lambda last: rising[last] + falling[last + 1])
    return _sweep(values[: place + 1])[0] + _sweep(values[place + 1 :][::-1])[0][::-1]


def _sweep(values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Non-decreasing least-squares fit by pooling neighbours that fall; its squared error at each beginning."""
    blocks, errors, error = [], [], 0.0  # blocks of (mean, count)
    for value in values:
        mean, count = value, 1
        while blocks and blocks[-1][0] >= mean:
            before, size = blocks.pop()
            error += (before - mean) ** 2 * size * count / (size + count)
            mean, count = (before * size + mean * count) / (size + count), size + count
        blocks.append((mean, count))
        errors.append(error)
    return [mean for mean, count in blocks for _ in range(count)], errors


def _noise(heights: list[float], fit: list[float], peak: int) -> float:
    """Scale of the noise in one value: what the fit leaves over, and a share of the roughness away from the peak.

    Below the true standard deviation in short series, where the fit follows the noise: the thresholds allow for it.
    Second differences are blind to a slope; divided by the root of 6 they have the spread of one value. The one
    centred on the peak measures the peak itself.
    """
    residual = np.subtract(heights, fit)
    bends = [bend for place, bend in enumerate(np.diff(heights, 2), start=1) if place != peak]
    roughness = math.sqrt(np.mean(np.square(bends)) / 6)
    rounding = 1e-9 * max(abs(height) for height in heights)  # equal values that differ in the last digit are flat
    return max(math.hypot(math.sqrt(np.mean(residual**2)), ROUGHNESS_SHARE * roughness), rounding)
