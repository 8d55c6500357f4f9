"""The turning point on series worked by hand, on flat noise, and under mirroring, shifting and scaling."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aesl_trl.errors import InputError
from aesl_trl.turning_point import MINIMUM, find_turning_point, unimodal_fit


STEPS = [0, 10, 20, 40, 60, 100, 200, 800]
ENTROPY = [0.21, 0.25, 0.32, 0.25, 0.20, 0.12, 0.10, 0.07]  # own samples of an nll cold start, nats per token
FLAT_LENGTHS = [8, 12, 20, 40]
SERIES = st.lists(st.one_of(st.none(), st.floats(-5, 5, width=32)), min_size=0, max_size=25)


def flat_series(generator, length, correlation):
    """Standard Gaussian noise in which neighbours correlate by `correlation`."""
    values = list(generator.standard_normal(length))
    for place in range(1, length):
        values[place] = correlation * values[place - 1] + math.sqrt(1 - correlation**2) * values[place]
    return values


def share_found(series, **options):
    found = [find_turning_point(range(len(values)), values, **options).step is not None for values in series]
    return np.mean(found)


def test_clean_peak_with_its_evidence():
    found = find_turning_point(STEPS, ENTROPY)
    evidence = found.evidence
    assert found.step == evidence["peak_step"] == 20
    assert "step 20" in found.reason and "undetermined" not in found.reason
    assert (evidence["steps"], evidence["values"], evidence["missing"]) == (STEPS, ENTROPY, [])
    assert (evidence["start"], evidence["peak"], evidence["end"], evidence["later"]) == (0.21, 0.32, 0.07, 5)
    assert evidence["rise"] == pytest.approx(0.11)
    assert evidence["fall"] == pytest.approx(0.25)
    # the fit follows every value, so nothing is left over: the second differences but the peak's own, -0.14
    bends = [0.03, 0.02, -0.03, 0.06, -0.01]
    assert evidence["noise"] == pytest.approx(0.2 * math.sqrt(sum(bend**2 for bend in bends) / 5 / 6))
    assert evidence["threshold"] == 17.2
    assert evidence["needed"] == pytest.approx(17.2 * evidence["noise"])


def test_growing_series_is_confirmed_by_patience_later_values():
    # with patience 3 the peak at place 2 needs places 3, 4, 5; with patience 5 also 6, 7
    first = {
        patience: next(n for n in range(1, 9) if find_turning_point(STEPS[:n], ENTROPY[:n], patience=patience).step)
        for patience in (3, 4, 5)
    }
    assert first == {3: 6, 4: 7, 5: 8}
    assert find_turning_point(STEPS, ENTROPY, patience=6).step is None


def test_noisy_peak_is_found():
    generator = np.random.default_rng(0)
    found = [find_turning_point(STEPS, ENTROPY + 0.01 * generator.standard_normal(8)).step for _ in range(200)]
    assert found.count(20) >= 190
    assert set(found) <= {20, None}


def test_noisy_peak_of_a_long_series_is_found_near_the_truth():
    generator = np.random.default_rng(1)
    truth = np.interp(np.linspace(0, 7, 36), range(8), ENTROPY)  # the peak is at place 10
    found = [find_turning_point(range(36), truth + 0.02 * generator.standard_normal(36)).step for _ in range(200)]
    near = [step for step in found if step is not None and abs(step - 10) <= 2]
    assert len(near) >= 190


@pytest.mark.parametrize("correlation", [0.0, 0.5])
@pytest.mark.parametrize("length", FLAT_LENGTHS)
def test_flat_noise_is_undetermined(length, correlation):
    generator = np.random.default_rng(length)
    series = [flat_series(generator, length, correlation) for _ in range(1000)]
    assert share_found([[0.3 + 0.02 * value for value in values] for values in series]) <= 0.05


@pytest.mark.parametrize("patience", [1, 2, 5])
def test_flat_noise_is_undetermined_at_any_patience(patience):
    generator = np.random.default_rng(patience)
    assert share_found([flat_series(generator, 10, 0.0) for _ in range(1000)], patience=patience) <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("length", [6, 7, 8, 9, 10, 13, 18, 28, 40, 80, 150])
def test_thresholds_hold_what_they_promise(length):
    generator = np.random.default_rng(length)
    series = [flat_series(generator, length, 0.5) for _ in range(4000)]
    assert 0.015 <= share_found(series) <= 0.045  # 3%, give or take


@pytest.mark.parametrize("slope", [-2.0, -1.0, -0.3, 0.3, 1.0, 2.0])
@pytest.mark.parametrize("length", [8, 24])
def test_noisy_slope_is_undetermined(length, slope):
    generator = np.random.default_rng(7)
    series = [slope * np.arange(length) + generator.standard_normal(length) for _ in range(500)]
    assert share_found(series) <= 0.05


def test_dip_then_peak():
    values = [0.21, 0.20, 0.18, 0.22, 0.27, 0.33, 0.28, 0.22, 0.16, 0.12, 0.09, 0.07]
    found = find_turning_point(range(12), values)
    assert found.step == 5
    assert found.evidence["start"] == pytest.approx((0.21 + 0.20 + 0.18) / 3)  # the dip is pooled with the start


def test_peak_below_the_start_is_only_a_fall():
    found = find_turning_point(range(8), [0.40, 0.25, 0.28, 0.31, 0.25, 0.18, 0.12, 0.08])
    assert found.step is None
    assert "only fell" in found.reason


def test_monotone_rise_is_still_rising():
    found = find_turning_point(STEPS, sorted(ENTROPY))
    assert found.step is None
    assert "still rising" in found.reason and "step 800" in found.reason


def test_peak_with_too_few_later_values_is_still_rising():
    found = find_turning_point(range(8), [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.25, 0.2])
    assert found.step is None
    assert "still rising" in found.reason and "only 2 values" in found.reason
    assert find_turning_point(range(9), [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.25, 0.2, 0.15]).step == 5


def test_monotone_fall_is_undetermined_and_says_so():
    found = find_turning_point(STEPS, sorted(ENTROPY, reverse=True))
    assert found.step is None
    assert "only fell from the first measurement, step 0" in found.reason
    assert found.evidence["peak_step"] == 0


def test_plateau_after_a_rise_has_no_fall():
    found = find_turning_point(range(10), [0.1, 0.15, 0.2, 0.25, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3])
    assert found.step is None
    assert "no fall" in found.reason


def test_plateau_on_top_is_its_first_step():
    assert find_turning_point(range(9), [0.1, 0.2, 0.3, 0.3, 0.3, 0.2, 0.1, 0.05, 0.0]).step == 2


def test_rise_within_noise():
    found = find_turning_point(range(10), [0.30, 0.31, 0.29, 0.32, 0.30, 0.24, 0.18, 0.11, 0.06, 0.01])
    assert found.step is None
    assert "within noise" in found.reason


@pytest.mark.parametrize("value", [0.0, 0.1, -3.0])
def test_constant_series_is_flat(value):
    found = find_turning_point(range(12), [value] * 12)
    assert found.step is None
    assert "flat" in found.reason


def test_rounding_is_no_peak():
    shape = [0, 1, 2, 3, 4, 5, 4, 3, 2, 1, 0]
    assert find_turning_point(range(11), [1 + 1e-3 * height for height in shape]).step == 5
    assert "flat" in find_turning_point(range(11), [1 + 1e-15 * height for height in shape]).reason


def test_gaps_are_left_out():
    steps = [0, 5, 10, 20, 30, 40, 60, 100, 150, 200, 800]
    values = [0.21, None, 0.25, 0.32, math.nan, 0.25, 0.20, 0.12, math.inf, 0.10, 0.07]
    found = find_turning_point(steps, values)
    assert found.step == 20
    assert found.evidence["missing"] == [5, 30, 150]
    assert found.evidence["values"] == ENTROPY


def test_gap_at_the_peak_names_a_measured_step():
    assert find_turning_point(STEPS, [0.21, 0.29, None, 0.27, 0.20, 0.12, 0.08, 0.05]).step == 10


@pytest.mark.parametrize("values", [[], [None] * 9, ENTROPY[: MINIMUM - 1]])
def test_too_few_values(values):
    found = find_turning_point(range(len(values)), values)
    assert found.step is None
    assert f"at least {MINIMUM}" in found.reason


@settings(deadline=None)
@given(SERIES, st.integers(1, 5))
def test_min_mirrors_max(values, patience):
    steps = range(0, 10 * len(values), 10)
    negated = [None if value is None else -value for value in values]
    up = find_turning_point(steps, values, patience=patience)
    down = find_turning_point(steps, negated, mode="min", patience=patience)
    assert up.step == down.step
    same = {"patience", "steps", "missing", "peak_step", "rise", "fall", "later", "noise", "threshold", "needed"}
    assert {key: up.evidence.get(key) for key in same} == {key: down.evidence.get(key) for key in same}
    assert [-value for value in up.evidence.get("fit", [])] == down.evidence.get("fit", [])


def test_min_finds_the_valley_of_self_bleu():
    found = find_turning_point(STEPS, [1 - value for value in ENTROPY], mode="min")
    assert found.step == 20
    assert "lowest, 0.68" in found.reason


@settings(deadline=None)
@given(st.integers(-6, 6), st.booleans())
def test_unit_of_the_values_plays_no_part(exponent, mirrored):
    sign, mode = (-1, "min") if mirrored else (1, "max")
    assert find_turning_point(STEPS, [sign * 2.0**exponent * value for value in ENTROPY], mode=mode).step == 20


@settings(deadline=None)
@given(SERIES, st.integers(1, 4))
def test_a_step_found_is_measured_and_confirmed(values, patience):
    steps = [3 * place for place in range(len(values))]
    found = find_turning_point(steps, values, patience=patience)
    if found.step is not None:
        known = found.evidence["values"]
        place = found.evidence["steps"].index(found.step)
        assert 0 < place < len(known) - patience
        assert min(found.evidence["rise"], found.evidence["fall"]) > found.evidence["needed"]


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=6))
def test_unimodal_fit_is_the_nearest_unimodal_curve(values):
    fit = unimodal_fit(values)
    top = fit.index(max(fit))
    assert fit[: top + 1] == sorted(fit[: top + 1]) and fit[top:] == sorted(fit[top:], reverse=True)
    error = sum((value - level) ** 2 for value, level in zip(values, fit, strict=True))
    assert error == pytest.approx(least_error(values), abs=1e-9)


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_unimodal_fit_passes_through_its_peak(values):
    fit = unimodal_fit(values)
    assert {value for value, level in zip(values, fit, strict=True) if level == max(fit)} == {max(fit)}


def least_error(values):
    """Smallest squared error over all cuts into blocks of equal level whose means rise and then fall."""
    best = math.inf
    for cuts in range(2 ** (len(values) - 1)):
        blocks, start = [], 0
        for end in range(1, len(values) + 1):
            if end == len(values) or cuts >> (end - 1) & 1:
                blocks.append(values[start:end])
                start = end
        means = [sum(block) / len(block) for block in blocks]
        top = means.index(max(means))
        if means[: top + 1] == sorted(means[: top + 1]) and means[top:] == sorted(means[top:], reverse=True):
            errors = [(value - mean) ** 2 for block, mean in zip(blocks, means, strict=True) for value in block]
            best = min(best, sum(errors))
    return best


@pytest.mark.parametrize(
    ("steps", "values", "options", "said"),
    [
        ([0, 1], [0.1], {}, "2 steps but 1 values"),
        ([0, 2, 2], [0.1] * 3, {}, "2 follows 2"),
        ([0, 2, 1], [0.1] * 3, {}, "1 follows 2"),
        ([0], [0.1], {"mode": "maxx"}, "did you mean 'max'"),
        ([0], [0.1], {"patience": 0}, "patience"),
        ([0], [0.1], {"patience": 1.5}, "patience"),
        ([0], [0.1], {"patience": True}, "patience"),
    ],
)
def test_refuses_in_one_line(steps, values, options, said):
    with pytest.raises(InputError, match=said) as error:
        find_turning_point(steps, values, **options)
    assert "\n" not in str(error.value)


def test_selection_is_frozen():
    with pytest.raises(AttributeError):
        find_turning_point(STEPS, ENTROPY).step = 3
