"""readiness: the figures against counting by hand, the predictions against the binomial, and every verdict."""

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aesl_trl import files
from aesl_trl.diversity.figures import Group
from aesl_trl.diversity.passk import expected_group_variance
from aesl_trl.diversity.readiness import (
    COLLAPSED,
    ENTROPY_FLAG,
    MAX_TRUNCATED,
    MIN_SIGNAL,
    NEVER_STOPS,
    NOT_ABLE,
    READY,
    SOLVED,
    History,
    critical_rate,
    entry,
    expected_mixed,
    figures_of,
    go_back,
    judge,
    rank,
)
from aesl_trl.evaluation.probe import table


def group(rewards, truncated=None, eos_prob=None):
    """A group of samples with these rewards, one list a sample; lengths and entropies do not matter here."""
    size = len(rewards)
    return Group(
        prompt="p",
        completions=[f"answer {index}" for index in range(size)],
        num_tokens=[2] * size,
        truncated=truncated or [False] * size,
        entropy=[0.5] * size,
        rewards=rewards,
        eos_prob=eos_prob,
    )


def right_and_wrong(*counts, size=8):
    """One group for each count of right samples."""
    return [group([[1.0]] * count + [[0.0]] * (size - count)) for count in counts]


# ---- What equal difficulty would give


@pytest.mark.parametrize("size", [2, 8, 16])
@pytest.mark.parametrize("rate", [0.0, 0.05, 0.3, 0.5, 0.95, 1.0])
def test_predictions_are_those_of_the_binomial(rate, size):
    chances = [math.comb(size, k) * rate**k * (1 - rate) ** (size - k) for k in range(size + 1)]
    mixed = math.fsum(chances[1:-1])
    variance = math.fsum(chance * (k / size) * (1 - k / size) for k, chance in enumerate(chances))
    assert expected_mixed(rate, size) == pytest.approx(mixed, abs=1e-14)
    assert expected_group_variance(rate, size) == pytest.approx(variance, abs=1e-14)


@pytest.mark.parametrize("size", [2, 4, 8, 64])
def test_at_the_critical_rate_half_of_the_groups_are_all_wrong(size):
    assert (1 - critical_rate(size)) ** size == pytest.approx(0.5, abs=1e-14)


def test_the_papers_critical_rate():
    assert round(critical_rate(8), 3) == 0.083


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.integers(2, 16))
def test_prompts_of_different_difficulty_give_less(rates, size):
    """Concavity: the figures at the mean rate are upper bounds of the means over prompts."""
    mean = math.fsum(rates) / len(rates)
    for expected in (expected_mixed, expected_group_variance):
        own = math.fsum(expected(rate, size) for rate in rates) / len(rates)
        assert own <= expected(min(1.0, mean), size) + 1e-12


# ---- Figures


def test_figures_by_hand():
    figures, ends = figures_of(right_and_wrong(0, 8, 2, 6, 4, 0, 0, 8))
    assert figures["pass@1"] == 28 / 64
    assert figures["signal"] == figures["groups_mixed"] == 3 / 8
    assert figures["variance"] == pytest.approx((2 * 3 / 16 + 1 / 4) / 8)
    stds = [np.std([1.0] * count + [0.0] * (8 - count), ddof=1) for count in (0, 8, 2, 6, 4, 0, 0, 8)]
    assert figures["reward_std"] == pytest.approx(np.mean(stds), abs=1e-15)
    assert figures["variance_if_alike"] == expected_group_variance(28 / 64, 8)
    assert figures["mixed_if_alike"] == expected_mixed(28 / 64, 8)
    assert set(ends) == set(figures)
    for key in ("pass@1", "signal", "reward_std", "variance", "variance_if_alike", "mixed_if_alike"):
        assert ends[key][0] <= figures[key] <= ends[key][1] and ends[key][0] < ends[key][1]


def test_the_interval_of_a_prediction_knows_its_peak():
    _, ends = figures_of(right_and_wrong(0, 8, 0, 8, 8, 0))  # p around 0.5, where the prediction is largest
    assert ends["variance_if_alike"][1] == expected_group_variance(0.5, 8)


def test_signal_is_in_the_weighted_sum_and_mixed_in_the_first_reward():
    two = [[1.0, 0.0], [1.0, 0.5], [1.0, None]]
    assert figures_of([group(two)])[0]["signal"] == 1.0
    assert figures_of([group(two)])[0]["groups_mixed"] == 0.0
    assert figures_of([group(two)], reward_weights=[1.0, 0.0])[0]["signal"] == 0.0
    cancels = [[1.0, 0.0], [0.0, 2.0]]
    assert figures_of([group(cancels)], reward_weights=[1.0, 0.5])[0]["signal"] == 0.0


def test_rewards_that_do_not_apply_are_left_out():
    figures, _ = figures_of([group([[None], [None]]), group([[1.0], [0.0], [None]])])
    assert figures["signal"] == 1.0 and figures["variance"] == 0.25
    nothing, ends = figures_of([group([[None], [None]])])
    assert math.isnan(nothing["signal"]) and math.isnan(nothing["mixed_if_alike"])
    assert all(math.isnan(end) for end in ends["variance"])


def test_intervals_are_over_prompts():
    """Twice the prompts, not twice the samples, narrow it."""
    few, many = right_and_wrong(0, 8, 2, 6), right_and_wrong(*[0, 8, 2, 6] * 4)
    more_samples = right_and_wrong(0, 32, 8, 24, size=32)
    width = {len(groups[0].completions) * len(groups): figures_of(groups)[1]["pass@1"] for groups in (few, many)}
    narrow, wide = (high - low for low, high in (width[128], width[32]))
    same = figures_of(more_samples)[1]["pass@1"]
    assert narrow < 0.6 * wide and same == pytest.approx(width[32], abs=1e-15)


# ---- Verdicts


def figures(**changes):
    known = {"truncated": 0.0, "signal": 0.5, "pass@1": 0.3, "entropy": 0.4, "groups_mixed": 0.5, "variance": 0.1}
    known |= {"groups_all_right": 0.2, "groups_all_wrong": 0.3, "mixed_if_alike": 0.9, "eos_prob": 0.9}
    return known | {key.replace("pass1", "pass@1"): value for key, value in changes.items()}


RUN = [(0, 0.2, 0.4), (10, 0.3, 0.6), (20, 0.5, 0.6), (30, 0.4, 0.5), (40, 0.2, 0.2), (50, 0.1, 0.08), (60, 0.05, 0.0)]
ROWS = [{"step": step, "entropy": entropy, "groups_mixed": mixed} for step, entropy, mixed in RUN]
LATE = History(60, ROWS, [10, 20, 30, 60])


@pytest.mark.parametrize(
    "changes, history, name, text, part",
    [
        ({}, None, READY, "ready", "0.50 of the groups differ"),
        ({"signal": MIN_SIGNAL}, None, READY, "ready", "0.10 of the groups differ"),
        ({"entropy": ENTROPY_FLAG - 0.01}, None, READY, "ready", "caution: entropy 0.17 nats is below 0.18"),
        ({"truncated": MAX_TRUNCATED}, None, NEVER_STOPS, "never stops: fix eos", "0.50 of the samples were cut off"),
        ({"truncated": 1.0, "eos_prob": 0.01}, None, NEVER_STOPS, "never stops: fix eos", "is 0.01"),
        ({"truncated": 1.0, "eos_prob": None}, None, NEVER_STOPS, "never stops: fix eos", "max_completion_length"),
        ({"truncated": 0.49}, None, READY, "ready", "0.50 of the groups differ"),
        (
            {"signal": 0.04},
            None,
            COLLAPSED,
            "collapsed: go back to an earlier step",
            "0.20 of the groups are all right",
        ),
        ({"signal": 0.04}, LATE, COLLAPSED, "collapsed: go back to step 20", "diversity turned at step 20"),
        ({"signal": 0.04, "pass1": 0.05}, LATE, COLLAPSED, "collapsed: go back to step 20", "step 40 the last"),
        ({"signal": 0.04, "pass1": 0.08}, None, NOT_ABLE, "not yet able: more SFT", "pass@1 0.08 is below 0.083"),
        ({"signal": 0.0, "pass1": 0.0}, History(0, ROWS), NOT_ABLE, "not yet able: more SFT", "most groups of 8"),
        ({"signal": None, "pass1": None}, None, NOT_ABLE, "not yet able: more SFT", "pass@1 - is below"),
        ({"signal": 0.04, "pass1": 0.93}, None, SOLVED, "solved: harder prompts", "leaves nothing to learn"),
        ({"signal": 0.04, "pass1": 0.91}, None, COLLAPSED, "collapsed: go back to an earlier step", "0.90 mixed ones"),
    ],
)
def test_verdicts(changes, history, name, text, part):
    verdict = judge(figures(**changes), {}, group_size=8, history=history)
    assert (verdict.name, verdict.text) == (name, text)
    assert any(part in reason for reason in verdict.reasons), verdict.reasons


def test_a_reward_that_cannot_be_earned_is_no_matter_of_more_sft():
    why = ["reward 'think_format_reward' cannot be earned"]
    verdict = judge(figures(signal=0.0, pass1=0.0), {}, group_size=8, unearnable=why)
    assert verdict.text == "not rewarded: change the reward or the template" and why[0] in verdict.reasons
    assert judge(figures(), {}, group_size=8, unearnable=why).name == READY  # other rewards differ


def test_cautions():
    ends = {"signal": [0.05, 0.2]}
    reasons = judge(figures(signal=0.12, groups_mixed=0.02), ends, group_size=8).reasons
    assert any("right and wrong differ in 0.02 of the groups only" in reason for reason in reasons)
    assert any("the interval of the signal includes 0.1" in reason for reason in reasons)
    cold = judge(figures(entropy=0.01), {}, group_size=8, temperature=0.6).reasons
    assert not any("entropy" in reason for reason in cold)  # the flag is of samples at temperature 1


@pytest.mark.parametrize(
    "history, step, part",
    [
        (LATE, 20, "diversity turned at step 20"),
        (History(60, ROWS, [10, 30, 60]), 10, "turned at step 20, saved is 10"),  # of two as near, the earlier
        (History(60, ROWS, []), 20, "of which no weights are saved"),
        (
            History(20, ROWS, [10, 20]),
            10,
            "step 10 has the most diverse samples",
        ),  # the turning point itself collapsed
        (History(60, ROWS[:4], [10, 20, 60]), 20, "step 20 has the most diverse samples"),  # too short for one
        (History(60, [*ROWS, *ROWS[3:]], [10, 20, 30]), 20, "diversity turned at step 20"),  # a resumed run's file
        (History(60, ROWS[:4], [60]), None, "no earlier step"),
        (History(60, [], [10, 20]), None, "no earlier step"),
    ],
)
def test_where_to_go_back_to(history, step, part):
    found, why = go_back(history)
    assert found == step and part in why


# ---- Which is best


def candidate(step, verdict=READY, signal=0.5, variance=0.1, reward=None, steps=20):
    rl = None if reward is None else {"steps": steps, "reward": reward}
    found = {"signal": signal, "variance": variance}
    return {"step": step, "verdict": verdict, "figures": found, "intervals": {"signal": [0.4, 0.6]}, "rl": rl}


@pytest.mark.parametrize(
    "entries, step, part",
    [
        (
            [candidate(10), candidate(20, signal=0.6), candidate(30)],
            20,
            "largest share of groups that differ in reward, 0.60",
        ),
        ([candidate(10), candidate(20, COLLAPSED, signal=0.9)], 10, "of 1 ready candidates"),
        ([candidate(10), candidate(20, variance=0.2)], 20, "differ in reward"),
        ([candidate(20), candidate(10)], 10, "differ in reward"),
        ([candidate(10, reward=0.3), candidate(20, signal=0.2, reward=0.5)], 20, "after 20 steps of RL, 0.500"),
        ([candidate(10, reward=0.3), candidate(20, signal=0.6)], 20, "differ in reward"),  # not every one was trained
        # of unequal budget
        ([candidate(10, reward=0.9, steps=5), candidate(20, signal=0.6, reward=0.1)], 20, "differ in reward"),
        (
            [candidate(10, COLLAPSED), candidate(20, COLLAPSED), candidate(30, NEVER_STOPS)],
            None,
            "2 collapsed, 1 never",
        ),
    ],
)
def test_the_best_of_the_ready_ones(entries, step, part):
    best, why = rank(entries)
    assert (best and best["step"]) == step and part in why


# ---- Entries and the table


def test_an_entry_survives_its_file(tmp_path):
    one = entry("a", [group([[None], [None]])])
    files.write_json(tmp_path / "readiness.json", {"checkpoints": [one], "num_samples": 8})
    back = files.read_json(tmp_path / "readiness.json")
    assert back["checkpoints"][0]["figures"]["signal"] is None
    assert table(back).splitlines()[0].split() == ["a"]


def test_table():
    entries = [entry(f"step-{step}", right_and_wrong(0, 4, 8, 2)) for step in range(7)]
    entries[1]["rl"] = {"steps": 20, "reward": 0.625, "reward_interval": [0.5, 0.75]}
    text = table({"checkpoints": entries, "num_samples": 8})
    first, second, sentences = text.split("\n\n")
    assert first.splitlines()[0].split() == [f"step-{step}" for step in range(5)]
    assert second.splitlines()[0].split() == ["step-5", "step-6"]
    signal = next(line for line in first.splitlines() if line.startswith("rewards differ"))
    assert signal.split("  ")[-1].strip().startswith("0.50 [") and signal.count("0.50 [") == 5
    assert "reward, RL step 20" in first and "0.62 [0.50, 0.75]" in first and "RL step" not in second
    assert sentences.count(": ready\n  - 0.50 [") == 7


def test_lost_coverage_is_said_and_decides_nothing():
    """The base solves the first 40 prompts half of the time, the model never and the others instead."""
    base, own = right_and_wrong(*[4] * 40, *[0] * 24), right_and_wrong(*[0] * 40, *[4] * 24)
    found = entry("late", own, base=base)
    assert found["verdict"] == READY and found["figures"]["coverage_lost"] > 0.4
    low, high = found["intervals"]["coverage_lost"]
    said = (
        f"caution: coverage lost is {found['figures']['coverage_lost']:.2f} [{low:.2f}, {high:.2f}]: share of prompts"
    )
    assert sum(reason.startswith(said) for reason in found["reasons"]) == 1
    text = table({"checkpoints": [found], "num_samples": 8, "reference": "base"})
    assert "coverage lost" in text and f"  - {said} that the base solves within 4 samples" in text
    itself = entry("base", base, base=base)
    assert (itself["figures"]["coverage_lost"], itself["intervals"]["coverage_lost"]) == (0.0, [0.0, 0.0])
    assert not any("coverage" in reason for reason in itself["reasons"])
    assert "coverage_lost" not in entry("late", own)["figures"]


def test_no_torch_is_needed():
    code = (
        "import sys; from aesl_trl.diversity import readiness, selection; "
        "print('torch' in sys.modules, 'trl' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
