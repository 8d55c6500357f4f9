"""Where the diversity of a model's own samples peaks before it falls.

During a cold start diversity first rises, while the demonstrated pattern joins the old ones, and then falls, when it
replaces them. The turning point lies between the two, and Li et al. start reinforcement learning there ("Getting Your
LLMs Ready for Reinforcement Learning with Lightweight SFT", ICLR 2026). Their rule for finding it is not public; this
one is ours.

The method is a test against a flat series, made to be asked after every measurement. The values are fitted by the
curve that first only rises and then only falls and is nearest in least squares (no smoothing width to choose). The
fit gives the rise from the first level to the peak and the fall from the peak to the last level. A peak counts when
both exceed what noise makes of a flat series. Two noises are known:
- what the fit leaves over, with the roughness of the values: it holds all noise, of sampling and of training, but a
  short series follows its noise and hides it, so that few values need a large multiple;
- the standard error of the rise and of the fall over prompts, where every measurement used the same prompts and their
  values are given: it is known from the second value on, and blind to what training does to all prompts alike.
With per-prompt values a smaller multiple of the first is enough in short series, and the second is added to it.

A series whose peak is its first value, and whose fall counts by the same test, has no turning point but a verdict of
its own: it only falls.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import InputError, nearest
from .intervals import is_number, t_quantile


MINIMUM = 6  # values, without per-prompt values: with fewer a random order is too often a rise and a fall
MINIMUM_BY_PROMPT = 4  # values, with per-prompt values
MINIMUM_PROMPTS = 16  # complete prompts: with fewer the standard error is too rough

# Multiple of the residual noise that `min(rise, fall)` has to exceed, by the number of values. Asked after each value
# with patience 3, a flat Gaussian series whose neighbours correlate by 0.5 exceeds it within 40 values with chance 5%,
# spent in proportion to 1 / n^2; from there on the threshold stays. Rounded from
# scripts/simulate_turning_point.py --calibrate 20000.
THRESHOLD_COUNTS = (6, 7, 8, 9, 10, 12, 14, 16, 20, 24, 32, 40)
THRESHOLDS = (38.0, 32.0, 31.0, 29.5, 26.5, 20.0, 16.2, 13.6, 12.0, 10.2, 9.0, 8.2)

# With per-prompt values `hypot(STANDARD_ERRORS * error, MULTIPLE * noise)` is enough, where that is less: in short
# series, whose residuals say too little by themselves. Both were found by simulation (docs/turning_point.md).
STANDARD_ERRORS = 3.0
MULTIPLE = 20.0

TURNED, ONLY_FALLS, UNDETERMINED = "turning point", "only falls", "undetermined"  # verdicts

ROUGHNESS_SHARE = 0.2  # of the second differences in the noise: keeps it above zero where the fit follows every value


@dataclass(frozen=True)
class Selection:
    """A step, or None where no step is justified, with the reason in words and the numbers behind it."""

    step: int | None
    reason: str
    evidence: dict = field(default_factory=dict)


def find_turning_point(
    steps: Sequence[int],
    values: Sequence[float | None],
    *,
    mode: str = "max",
    patience: int = 3,
    by_prompt: Sequence[Sequence[float | None] | None] | None = None,
) -> Selection:
    """Return the step at which `values` peak before they fall, or an undetermined selection.

    The rule may be asked after each measurement of a series that still grows: it names a step only once `patience`
    later values confirm the fall, and the first call that names one is the moment to stop. On a run whose diversity
    does not change, it is wrong in 1 of 20 within 40 measurements; docs/turning_point.md has the error rates.

    The verdict is "only falls", and the step None, where the peak is the first value, usually the model before
    training, and the fall from it exceeds noise and has `patience` values, as that from any peak: measure more often
    early on, or this cold start only narrows the model. Asked once, at most 1 in 50 flat series get this verdict.

    The verdict is "undetermined", and the step None, where
    - there are fewer than 6 values (4 with `by_prompt`);
    - the series still rises, or its peak has fewer than `patience` later values;
    - the rise or the fall is within noise. A dip before the peak is read as noise and asks for a clearer peak.

    Args:
        steps: optimiser steps, strictly increasing.
        values: one value for each step; None, NaN and infinity are gaps and left out. The spacing between steps does
            not matter.
        mode: "max" when high is diverse (entropy); "min" when low is diverse (self-BLEU), the exact mirror.
        patience: number of values that have to follow the peak, at least 1.
        by_prompt: for each step the metric of each prompt, in the same order at every step; None where unknown. A
            prompt counts when it is known at every step used. All of it is left out, and the evidence says why, where
            a measured step has none, the numbers of prompts differ, or fewer than 16 prompts are complete.

    Returns:
        A [`Selection`]. Its evidence: `verdict` (one of the above, or "turning point"), `mode`, `patience`, `steps`
        and `values` as used, `missing` (steps of gaps), `prompts` (complete ones behind the standard errors, 0
        without), `unpaired` (why `by_prompt` was left out, only then), and once there are enough values `fit`,
        `peak_step`, `peak` (its value), `start`, `end`, `rise`, `fall` (both in the direction of diversity), `later`
        (values after the peak), `noise` (of one value, from the residuals), `rise_error`, `fall_error` (standard
        errors over prompts, 0 without), `threshold` (multiple of `noise` without prompts), `needed_rise`,
        `needed_fall` and `needed` (the larger of the two), in the values' unit.

    Raises:
        InputError: lengths differ, steps do not increase, `mode` is unknown, `patience` is below 1, or `by_prompt`
            holds something other than numbers.
    """
    if mode not in ("max", "min"):
        raise InputError(f"mode must be 'max' or 'min', got {mode!r}{nearest(mode, ('max', 'min'))}")
    if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
        raise InputError(f"patience must be a whole number of at least 1, got {patience!r}")
    if len(steps) != len(values):
        raise InputError(f"{len(steps)} steps but {len(values)} values")
    if by_prompt is not None and len(steps) != len(by_prompt):
        raise InputError(f"{len(steps)} steps but {len(by_prompt)} lists of per-prompt values (by_prompt)")
    for before, after in zip(steps, steps[1:], strict=False):
        if not before < after:
            raise InputError(f"steps must increase, but {after} follows {before}")
    places = [place for place, value in enumerate(values) if is_number(value)]
    evidence = {
        "verdict": UNDETERMINED,
        "mode": mode,
        "patience": patience,
        "steps": [int(steps[place]) for place in places],
        "values": [float(values[place]) for place in places],
        "missing": [int(step) for step, value in zip(steps, values, strict=True) if not is_number(value)],
    }
    prompts, unpaired = _paired(by_prompt, places, evidence["steps"])
    evidence |= {"prompts": 0 if prompts is None else prompts.shape[1]} | ({"unpaired": unpaired} if unpaired else {})
    least = MINIMUM if prompts is None else MINIMUM_BY_PROMPT
    if len(places) < least:
        return Selection(None, f"{UNDETERMINED}: {len(places)} measurements, at least {least} are needed", evidence)
    evidence |= _shape(evidence["values"], prompts, 1.0 if mode == "max" else -1.0, evidence["steps"])
    return _decide(evidence)


def _paired(by_prompt, places: list[int], steps: list[int]) -> tuple[np.ndarray | None, str | None]:
    """Return the values of the complete prompts, [step, prompt], or None; and why given values were left out."""
    rows = [by_prompt[place] for place in places] if by_prompt is not None else []
    if all(row is None for row in rows):
        return None, None
    for step, row in zip(steps, rows, strict=True):
        if row is None:
            return None, f"step {step} has no per-prompt values"
        if len(row) != len(rows[0]):
            return None, f"step {step} has {len(row)} prompts, step {steps[0]} has {len(rows[0])}"
    try:
        table = np.array(rows, dtype=float)  # None becomes nan
    except (TypeError, ValueError):
        raise InputError("by_prompt holds something other than lists of numbers and None") from None
    table = table[:, np.isfinite(table).all(axis=0)]
    if table.shape[1] < MINIMUM_PROMPTS:
        return None, f"{table.shape[1]} prompts are complete, at least {MINIMUM_PROMPTS} are needed"
    return table, None


def _shape(values: list[float], prompts: np.ndarray | None, sign: float, steps: list[int]) -> dict:
    """Return peak, rise, fall and noise of `values`, and how large rise and fall have to be."""
    heights = [sign * value for value in values]  # high is diverse
    fit = unimodal_fit(heights)
    top = max(fit)
    peak = fit.index(top)  # a measured value, or the first of equal values: nothing is pooled at the top
    noise = _noise(heights, fit, peak)
    threshold = float(np.interp(len(fit), THRESHOLD_COUNTS, THRESHOLDS))
    levels = {
        "rise": [place for place in range(peak) if fit[place] == fit[0]],
        "fall": [place for place in range(peak + 1, len(fit)) if fit[place] == fit[-1]],
    }
    errors, needed = dict.fromkeys(levels, 0.0), dict.fromkeys(levels, threshold * noise)
    if prompts is not None:
        # Few prompts know their own spread less well: Student's quantile at the level of the normal one
        quantile = t_quantile(prompts.shape[1] - 1, math.erf(STANDARD_ERRORS / math.sqrt(2)))
        by_noise = threshold * noise if len(fit) >= MINIMUM else math.inf
        for name, level in levels.items():
            if level:  # else there is no rise, or no fall, to judge
                # Each prompt is its own control: whatever measurements share (hard prompts, the sampling seed) cancels
                differences = prompts[peak] - prompts[level].mean(axis=0)
                errors[name] = float(differences.std(ddof=1) / math.sqrt(len(differences)))
            needed[name] = min(by_noise, math.hypot(quantile * errors[name], MULTIPLE * noise))
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
        "rise_error": errors["rise"],
        "needed_rise": needed["rise"],
        "fall_error": errors["fall"],
        "needed_fall": needed["fall"],
        "threshold": threshold,
        "needed": max(needed.values()),
    }


def _decide(evidence: dict) -> Selection:
    step, later, patience = (evidence[key] for key in ("peak_step", "later", "patience"))
    rises, falls = (evidence[size] > evidence[f"needed_{size}"] for size in ("rise", "fall"))
    best = "highest" if evidence["mode"] == "max" else "lowest"
    sizes = ", ".join(
        f"{size} {evidence[size]:.3g} (needed {evidence[f'needed_{size}']:.3g})" for size in ("rise", "fall")
    )
    from_first = evidence["rise"] == 0  # the peak is the first value
    if falls and later >= patience and (rises or from_first):
        if from_first:
            why = f"{ONLY_FALLS}: diversity is {best} at the first measurement, step {step} ({sizes})"
            return Selection(None, why, evidence | {"verdict": ONLY_FALLS})
        why = f"peak of diversity at step {step} ({best}, {evidence['peak']:.4g}; {sizes})"
        return Selection(step, why, evidence | {"verdict": TURNED})
    if from_first and evidence["fall"] > evidence["noise"]:
        doubt = f"for {later} values, patience asks for {patience}" if falls else "within noise"
        why = f"diversity only fell from the first measurement, step {step}, {doubt} ({sizes})"
    elif not rises and not falls:
        why = f"flat within noise ({sizes})"
    elif not rises:
        why = f"the rise to step {step} is within noise ({sizes})"
    elif later < patience:
        why = f"still rising: {best} at step {step}, only {later} values after it, patience asks for {patience}"
    else:
        why = f"no fall beyond noise after step {step} ({sizes})"
    return Selection(None, f"{UNDETERMINED}: {why}", evidence)


def unimodal_fit(values: Sequence[float]) -> list[float]:
    """Return the least-squares fit to `values` that does not fall up to some place and does not rise after it.

    One sweep each gives the errors of the best rising fit to every beginning and of the best falling fit to every
    end, so finding the place costs no more than the fit.
    """
    rising = _sweep(values)[1]
    falling = _sweep(values[::-1])[1][::-1] + [0.0]
    place = min(range(len(values)), key=lambda last: rising[last] + falling[last + 1])
    return _sweep(values[: place + 1])[0] + _sweep(values[place + 1 :][::-1])[0][::-1]


def _sweep(values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Pool neighbours that fall. Return the non-decreasing least-squares fit, and its error at each beginning."""
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
    """Return the scale of the noise in one value: what the fit leaves over, and a share of the roughness.

    In short series it is below the true standard deviation, since the fit follows the noise: the thresholds allow for
    that. Second differences are blind to a slope; divided by the root of 6 they have the spread of one value. The
    difference centred on the peak measures the peak itself and is left out.
    """
    residual = np.subtract(heights, fit)
    bends = [bend for place, bend in enumerate(np.diff(heights, 2), start=1) if place != peak]
    roughness = math.sqrt(np.mean(np.square(bends)) / 6)
    rounding = 1e-9 * max(abs(height) for height in heights)  # equal values that differ in the last digit are flat
    return max(math.hypot(math.sqrt(np.mean(residual**2)), ROUGHNESS_SHARE * roughness), rounding)
