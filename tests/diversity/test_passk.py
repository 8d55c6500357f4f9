"""pass@k against enumeration of all subsets, group signal and expected variance."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aesl_trl.diversity.passk import avg_at_k, expected_group_variance, group_signal, pass_at_k, powers_of_two
from aesl_trl.errors import InputError


@pytest.mark.parametrize("num_samples", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(num_samples):
    for right in range(num_samples + 1):
        outcomes = [True] * right + [False] * (num_samples - right)
        for k in range(1, num_samples + 1):
            subsets = list(itertools.combinations(outcomes, k))
            expected = sum(any(subset) for subset in subsets) / len(subsets)
            assert pass_at_k(num_samples, right, k) == expected


def test_pass_at_k_is_unbiased():
    p, n, k = 0.3, 8, 4  # the binomial mean of the estimate is the true pass@k; the plug-in's is lower
    chances = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    truth = 1 - (1 - p) ** k
    assert sum(chance * pass_at_k(n, c, k) for c, chance in enumerate(chances)) == pytest.approx(truth, abs=1e-14)
    assert sum(chance * (1 - (1 - c / n) ** k) for c, chance in enumerate(chances)) < truth - 0.02


@settings(deadline=None)
@given(st.integers(1, 300), st.data())
def test_pass_at_k_bounds_and_order(num_samples, data):
    right = data.draw(st.integers(0, num_samples))
    k = data.draw(st.integers(1, num_samples))
    value = pass_at_k(num_samples, right, k)
    assert 0 <= value <= 1
    assert (value == 0) == (right == 0)
    assert pass_at_k(num_samples, right, 1) == avg_at_k(num_samples, right)
    if k > 1:
        assert value >= pass_at_k(num_samples, right, k - 1)
    if right:
        assert value >= pass_at_k(num_samples, right - 1, k)


def test_pass_at_k_at_sizes_beyond_a_float():
    assert pass_at_k(4000, 1, 1000) == 0.25  # C(4000, 1000) has 976 digits
    assert pass_at_k(np.int64(8), np.int64(2), np.int64(4)) == pass_at_k(8, 2, 4) == 1 - 15 / 70


@pytest.mark.parametrize("counts", [(0, 0, 1), (4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_refuses_impossible_counts(counts):
    with pytest.raises(InputError) as error:
        pass_at_k(*counts)
    assert "\n" not in str(error.value)


def test_powers_of_two():
    assert powers_of_two(0) == []
    assert powers_of_two(1) == [1]
    assert powers_of_two(7) == [1, 2, 4]
    assert powers_of_two(8) == [1, 2, 4, 8]


def test_group_signal_by_hand():
    assert group_signal(4, [4, 0, 1, 3]) == {"all_right": 0.25, "all_wrong": 0.25, "mixed": 0.5}
    assert group_signal([1, 2, 1], [1, 2, 0]) == {"all_right": 2 / 3, "all_wrong": 1 / 3, "mixed": 0.0}
    assert all(math.isnan(share) for share in group_signal(8, []).values())


@pytest.mark.parametrize("arguments", [(4, [5]), ([4], [1, 2]), ([0], [0])])
def test_group_signal_refuses(arguments):
    with pytest.raises(InputError):
        group_signal(*arguments)


@settings(deadline=None)
@given(st.lists(st.integers(0, 8), min_size=1, max_size=50))
def test_group_signal_shares_sum_to_one(num_correct):
    assert sum(group_signal(8, num_correct).values()) == pytest.approx(1)


@pytest.mark.parametrize("group_size", [1, 2, 5, 8])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_expected_group_variance_is_the_mean_over_all_outcomes(p, group_size):
    expected = 0.0
    for outcome in itertools.product([0, 1], repeat=group_size):
        chance = math.prod(p if right else 1 - p for right in outcome)
        expected += chance * np.var(outcome)
    assert expected_group_variance(p, group_size) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("arguments", [(-0.1, 8), (1.1, 8), (0.5, 0)])
def test_expected_group_variance_refuses(arguments):
    with pytest.raises(InputError):
        expected_group_variance(*arguments)
