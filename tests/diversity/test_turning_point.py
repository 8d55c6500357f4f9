"""The turning point on series worked by hand, on flat noise, and under mirroring, shifting and scaling."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aesl_trl.diversity.intervals import t_quantile
from aesl_trl.diversity.turning_point import (
    MINIMUM,
    MINIMUM_PROMPTS,
    MULTIPLE,
    STANDARD_ERRORS,
    THRESHOLD_COUNTS,
    THRESHOLDS,
    find_turning_point,
    unimodal_fit,
)
from aesl_trl.errors import InputError


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
    assert evidence["threshold"] == dict(zip(THRESHOLD_COUNTS, THRESHOLDS, strict=True))[8]
    assert evidence["needed"] == pytest.approx(evidence["threshold"] * evidence["noise"])
    assert evidence["needed_rise"] == evidence["needed_fall"] == evidence["needed"]
    assert (evidence["prompts"], evidence["rise_error"], evidence["fall_error"]) == (0, 0, 0)


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
    found = [find_turning_point(STEPS, ENTROPY + 0.003 * generator.standard_normal(8)).step for _ in range(200)]
    assert found.count(20) >= 190
    assert set(found) <= {20, None}


def test_noisy_peak_of_a_long_series_is_found_near_the_truth():
    generator = np.random.default_rng(1)
    truth = np.interp(np.linspace(0, 7, 36), range(8), ENTROPY)  # the peak is at place 10
    found = [find_turning_point(range(36), truth + 0.015 * generator.standard_normal(36)).step for _ in range(200)]
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


def stops(values, prompts=None, **options):
    """Whether a run that asks after every measurement stops at some time."""
    calls = range(1, len(values) + 1)
    given = [None if prompts is None else prompts[:count] for count in calls]
    return any(
        find_turning_point(range(count), values[:count], by_prompt=now, **options).step is not None
        for count, now in zip(calls, given, strict=True)
    )


def flat_prompts(generator, training, length=40, number=64):
    """Per-prompt values [step, prompt] whose means have standard error 1, and noise that all prompts share."""
    shared = training * np.array(flat_series(generator, length, 0.5))
    return shared[:, None] + math.sqrt(number) * generator.standard_normal((length, number))


def test_asked_after_every_value_flat_noise_rarely_stops():
    generator = np.random.default_rng(11)
    found = sum(stops(flat_series(generator, 40, 0.5)) for _ in range(200))
    assert found <= 0.05 * 200 + 3 * math.sqrt(200 * 0.05 * 0.95)


@pytest.mark.parametrize("training", [0, 2])
def test_asked_after_every_value_flat_prompts_rarely_stop(training):
    generator = np.random.default_rng(12)
    runs = [flat_prompts(generator, training) for _ in range(100)]
    found = sum(stops(prompts.mean(axis=1).tolist(), list(prompts)) for prompts in runs)
    assert found <= 0.05 * 100 + 3 * math.sqrt(100 * 0.05 * 0.95)


@pytest.mark.slow
def test_thresholds_spend_what_they_promise():
    generator = np.random.default_rng(13)
    found = [stops(flat_series(generator, 40, 0.5)) for _ in range(4000)]
    assert 0.038 <= np.mean(found) <= 0.062  # 5%, give or take


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


def test_monotone_fall_only_falls():
    found = find_turning_point(STEPS, sorted(ENTROPY, reverse=True))
    assert (found.step, found.evidence["verdict"]) == (None, "only falls")
    assert found.reason.startswith("only falls: diversity is highest at the first measurement, step 0 (rise 0 ")
    assert found.evidence["peak_step"] == 0


def test_a_fall_needs_as_many_later_values_as_one_from_a_peak():
    found = find_turning_point(STEPS, sorted(ENTROPY, reverse=True), patience=8)
    assert found.evidence["verdict"] == "undetermined"
    assert "only fell from the first measurement, step 0, for 7 values, patience asks for 8" in found.reason


def test_a_fall_within_noise_is_undetermined():
    found = find_turning_point(range(8), [0.40, 0.25, 0.38, 0.31, 0.35, 0.28, 0.32, 0.28])
    assert found.evidence["verdict"] == "undetermined"
    assert "only fell from the first measurement, step 0, within noise" in found.reason


def test_what_is_needed_of_a_first_fall_is_what_is_needed_of_any():
    # By hand: all residuals of the fit are 0; the bends 2.5 - 2 + 0.5 = 1 and 1 - 1 + 0.3 = 0.3 are its noise:
    # 0.2 * sqrt((1 + 0.09) / 2 / 6) = 0.0603, and 20 of it 1.206; the error over prompts is small beside it
    prompts = spread([2.5, 1.0, 0.5, 0.3], error=0.01)
    found = find_turning_point([0, 20, 40, 60], means(prompts), by_prompt=prompts)
    assert found.evidence["verdict"] == "only falls"
    assert found.evidence["fall"] == pytest.approx(2.2) and found.evidence["rise"] == 0
    assert found.evidence["noise"] == pytest.approx(0.0603, abs=1e-4)
    assert found.evidence["needed_fall"] == pytest.approx(1.206, rel=1e-3)
    unsure = spread([2.5, 1.0, 0.5, 0.3], error=0.7)  # 3 of them are 2.1, and the root of 2.1^2 + 1.2^2 is above 2.2
    found = find_turning_point([0, 20, 40, 60], means(unsure), by_prompt=unsure)
    assert found.evidence["verdict"] == "undetermined" and "within noise" in found.reason


def test_flat_prompts_rarely_only_fall():
    generator = np.random.default_rng(14)
    runs = [flat_prompts(generator, 2)[:8] for _ in range(200)]
    verdicts = [verdict_of(prompts) for prompts in runs]
    assert verdicts.count("only falls") <= 200 / 50 + 3 * math.sqrt(200 / 50)


def verdict_of(prompts):
    found = find_turning_point(range(len(prompts)), means(prompts), by_prompt=list(prompts))
    return found.evidence["verdict"]


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
    assert find_turning_point(STEPS, [0.15, 0.29, None, 0.27, 0.20, 0.12, 0.08, 0.05]).step == 10


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
    assert (found.evidence["verdict"] == "turning point") is (found.step is not None)
    if found.evidence["verdict"] != "undetermined":
        known, peak = found.evidence["values"], found.evidence["peak_step"]
        assert found.evidence["fall"] > found.evidence["needed_fall"] and len(known) > patience
        assert (peak == found.evidence["steps"][0]) is (found.evidence["verdict"] == "only falls")
    if found.step is not None:
        known = found.evidence["values"]
        place = found.evidence["steps"].index(found.step)
        assert 0 < place < len(known) - patience
        assert min(found.evidence["rise"], found.evidence["fall"]) > found.evidence["needed"]


# ---- Per-prompt values


def spread(values, number=64, error=0.004, seed=0):
    """Per-prompt values [step][prompt] whose means are `values` and whose differences between steps have the standard
    error `error`; the prompts themselves differ far more."""
    generator = np.random.default_rng(seed)
    noise = generator.standard_normal((len(values), number)) * error * math.sqrt(number / 2)
    noise -= noise.mean(axis=1, keepdims=True)
    return (np.array(values)[:, None] + noise + 3 * generator.standard_normal(number)).tolist()


def means(prompts):
    return [float(np.mean(row)) for row in prompts]


@pytest.mark.parametrize("peak", [1, 2])
def test_prompts_decide_from_few_values(peak):
    values = {1: [0.21, 0.32, 0.27, 0.18, 0.12], 2: [0.21, 0.24, 0.32, 0.27, 0.18, 0.12]}[peak]
    prompts = spread(values)
    steps = range(len(values))
    assert find_turning_point(steps, means(prompts), by_prompt=prompts).step == peak
    assert find_turning_point(steps, means(prompts)).step is None


def test_prompts_that_disagree_leave_it_undetermined():
    values = [0.21, 0.32, 0.25, 0.18, 0.12]
    prompts = spread(values, error=0.05)
    found = find_turning_point(range(5), means(prompts), by_prompt=prompts)
    assert found.step is None and "within noise" in found.reason


def test_what_is_needed_from_prompts():
    prompts = np.array(spread(ENTROPY))
    evidence = find_turning_point(STEPS, means(prompts), by_prompt=prompts.tolist()).evidence
    error = np.std(prompts[2] - prompts[0], ddof=1) / 8
    assert evidence["rise_error"] == pytest.approx(error, rel=1e-9)
    assert evidence["fall_error"] == pytest.approx(np.std(prompts[2] - prompts[7], ddof=1) / 8, rel=1e-9)
    assert evidence["prompts"] == 64
    errors = t_quantile(63, math.erf(STANDARD_ERRORS / math.sqrt(2)))
    assert evidence["needed_rise"] == pytest.approx(math.hypot(errors * error, MULTIPLE * evidence["noise"]))
    assert evidence["needed"] == max(evidence["needed_rise"], evidence["needed_fall"])


def test_pooled_levels_have_the_error_of_their_mean():
    values = [0.22, 0.20, 0.21, 0.32, 0.25, 0.10, 0.12, 0.11]  # a start and an end of three each
    prompts = np.array(spread(values))
    evidence = find_turning_point(range(8), values, by_prompt=prompts.tolist()).evidence
    starts, ends = prompts[3] - prompts[:3].mean(axis=0), prompts[3] - prompts[5:].mean(axis=0)
    assert evidence["rise_error"] == pytest.approx(np.std(starts, ddof=1) / 8)
    assert evidence["fall_error"] == pytest.approx(np.std(ends, ddof=1) / 8)


def test_noise_that_all_prompts_share_still_counts():
    prompts = spread(ENTROPY, error=1e-6)
    assert find_turning_point(STEPS, means(prompts), by_prompt=prompts).step == 20
    shaken = [value + 0.03 * (-1) ** place for place, value in enumerate(ENTROPY)]
    prompts = spread(shaken, error=1e-6)
    assert find_turning_point(STEPS, means(prompts), by_prompt=prompts).step is None


def test_prompts_are_their_own_control():
    prompts = np.array(spread(ENTROPY))
    apart = prompts + 50 * np.random.default_rng(3).standard_normal(64)
    one, other = (find_turning_point(STEPS, ENTROPY, by_prompt=table.tolist()) for table in (prompts, apart))
    assert one.evidence["rise_error"] == pytest.approx(other.evidence["rise_error"])
    assert one.step == other.step == 20


def test_mirrored_prompts_say_the_same():
    prompts = np.array(spread(ENTROPY))
    up = find_turning_point(STEPS, ENTROPY, by_prompt=prompts.tolist())
    down = find_turning_point(STEPS, [-value for value in ENTROPY], mode="min", by_prompt=(-prompts).tolist())
    assert (up.step, up.evidence["needed"]) == (down.step, down.evidence["needed"])


def test_unknown_prompts_and_gaps_are_left_out():
    prompts = spread(ENTROPY)
    full = find_turning_point(STEPS, ENTROPY, by_prompt=prompts)
    holes = [row + [None if place == 3 else 1.0, math.nan] for place, row in enumerate(prompts)]
    holes.insert(2, None)
    found = find_turning_point([0, 10, 15, *STEPS[2:]], [*ENTROPY[:2], None, *ENTROPY[2:]], by_prompt=holes)
    assert found.evidence == full.evidence | {"missing": [15]}
    assert found.step == 20


def test_a_series_without_any_prompts_is_the_plain_rule():
    assert find_turning_point(STEPS, ENTROPY, by_prompt=[None] * 8) == find_turning_point(STEPS, ENTROPY)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda rows: [*rows[:3], None, *rows[4:]], "step 40 has no per-prompt values"),
        (lambda rows: [*rows[:3], rows[3][1:], *rows[4:]], "step 40 has 63 prompts, step 0 has 64"),
        (lambda rows: [row[: MINIMUM_PROMPTS - 1] for row in rows], "15 prompts are complete, at least 16"),
    ],
)
def test_prompts_that_cannot_be_paired_are_left_out_and_it_says_why(change, why):
    found = find_turning_point(STEPS, ENTROPY, by_prompt=change(spread(ENTROPY)))
    assert why in found.evidence["unpaired"]
    plain = find_turning_point(STEPS, ENTROPY)
    assert (found.step, found.reason) == (plain.step, plain.reason)


def test_selection_stop_and_report_hand_the_prompts_on():
    from aesl_trl.diversity.selection import select_checkpoint
    from aesl_trl.report.runs import turning_point
    from aesl_trl.training.callback import DiversityCallback

    prompts = spread([0.21, 0.32, 0.27, 0.18, 0.12])
    plain = [{"step": step, "entropy": value} for step, value in enumerate(means(prompts))]
    rows = [row | {"by_prompt": {"entropy": values}} for row, values in zip(plain, prompts, strict=True)]
    trainer = SimpleNamespace(accelerator=SimpleNamespace(print=lambda text: None))
    callback = SimpleNamespace(
        settings=SimpleNamespace(metric="entropy", patience=3), trainer=trainer, stop=True, selection=None
    )
    callback.measures_at = lambda step, last_step: True
    for measured, step in ((rows, 1), (plain, None)):
        chosen = select_checkpoint(measured, [], [1, 2, 3, 4], rule="turning_point")
        assert chosen["evidence"]["turning_point"]["entropy"]["step"] == step
        callback._measure = lambda step, rows=measured: rows
        control = SimpleNamespace(should_training_stop=False)
        state = SimpleNamespace(global_step=4, max_steps=9, is_world_process_zero=True)
        DiversityCallback.on_step_end(callback, None, state, control)
        assert control.should_training_stop is (step is not None)
        assert turning_point(SimpleNamespace(selection={}, diversity=measured, sft={})).step == step


# ---- The fit


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
        ([0], [0.1], {"by_prompt": []}, "1 steps but 0 lists of per-prompt values"),
        ([0], [0.1], {"by_prompt": [["a"] * 20]}, "by_prompt holds something other than"),
    ],
)
def test_refuses_in_one_line(steps, values, options, said):
    with pytest.raises(InputError, match=said) as error:
        find_turning_point(steps, values, **options)
    assert "\n" not in str(error.value)


def test_selection_is_frozen():
    with pytest.raises(AttributeError):
        find_turning_point(STEPS, ENTROPY).step = 3
