"""Coverage lost and gained against enumeration, by hand, without bias, and 0 for the base against itself."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aesl_trl.diversity.coverage import GAINED, LOST, coverage, coverage_k, coverage_sums, lost_sentence
from aesl_trl.diversity.figures import Group, by_prompt, intervals, measure
from aesl_trl.diversity.passk import pass_at_k
from aesl_trl.errors import InputError


def chance(p, k):
    """The chance that one of k samples is right."""
    return 1 - (1 - p) ** k


def group(rights, **changes):
    rewards = [[right if right is None else float(right)] for right in rights]
    size = len(rewards)
    return Group("p", ["x"] * size, [1] * size, [False] * size, [0.5] * size, **{"rewards": rewards, **changes})


def sampled(rng, rates, num):
    return [group(rights) for rights in rng.random((len(rates), num)) < np.array(rates)[:, None]]


# ---- One prompt


def test_by_hand():
    # Two samples, k = 1: A and B are places 0 and 1, or 1 and 0. The base's own samples differ in both pairs of sets.
    assert coverage([True, False], [False, False], 1) == (0.5 - 0.5, 0.0 - 0.5)
    assert coverage([True, True], [False, False], 1) == (1.0, 0.0)
    assert coverage([False, False], [True, True], 1) == (0.0, 1.0)
    # Four samples, k = 2, base 1100, model 0011: of 6 pairs (A, B) the base's A is wrong in 1, and then its B is
    # right: by chance 1/6 is lost. The model's B is wrong in 1, and there A is wrong too: nothing is lost, or gained.
    assert coverage([1, 1, 0, 0], [0, 0, 1, 1], 2) == pytest.approx((-1 / 6, -1 / 6))


@pytest.mark.parametrize(("num", "k"), [(2, 1), (4, 1), (4, 2), (5, 2)])
def test_is_the_mean_over_all_pairs_of_disjoint_sets(num, k):
    places = set(range(num))
    pairs = [(a, b) for a in itertools.combinations(places, k) for b in itertools.combinations(places - {*a}, k)]
    for base, own in itertools.product(itertools.product([0, 1], repeat=num), repeat=2):

        def share(one, other, pairs=pairs):
            """Of the pairs, those where `one` has a right sample in its set and `other` has none."""
            return np.mean([any(one[i] for i in a) and not any(other[i] for i in b) for a, b in pairs])

        expected = share(base, own) - share(base, base), share(own, base) - share(base, base)
        assert coverage(base, own, k) == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("shared_seed", [False, True])
@pytest.mark.parametrize(("p", "q"), [(0.3, 0.3), (0.3, 0.05), (0.2, 0.7), (0.0, 0.4)])
def test_has_no_bias_with_one_seed_and_with_two(p, q, shared_seed):
    """Over all outcomes of 4 places. With one seed a place draws one uniform number, right below p and below q."""
    if shared_seed:
        low, high = min(p, q), max(p, q)
        of_place = {(1, 1): low, (int(p > q), int(q > p)): high - low, (0, 0): 1 - high}
    else:
        of_place = {(b, o): (p if b else 1 - p) * (q if o else 1 - q) for b in (0, 1) for o in (0, 1)}
    mean = np.zeros(2)
    for outcome in itertools.product(of_place.items(), repeat=4):
        places, weights = zip(*outcome, strict=True)
        mean += math.prod(weights) * np.array(coverage(*zip(*places, strict=True), 2))
    before, after = chance(p, 2), chance(q, 2)
    assert mean == pytest.approx((before * (before - after), (1 - before) * (after - before)), abs=1e-13)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=40), st.data())
def test_bounds_and_the_change_of_pass_at_k(pairs, data):
    base, own = zip(*pairs, strict=True)
    k = data.draw(st.integers(1, len(pairs) // 2))
    lost, gained = coverage(base, own, k)
    assert -1 <= lost <= 1 and -1 <= gained <= 1
    change = pass_at_k(len(own), sum(own), k) - pass_at_k(len(base), sum(base), k)
    assert gained - lost == pytest.approx(change, abs=1e-12)
    assert coverage(base, base, k) == (0.0, 0.0)


@pytest.mark.parametrize("arguments", [([1, 0], [1], 1), ([1, 0], [1, 0], 2), ([1, 0], [1, 0], 0), ([], [], 1)])
def test_refuses(arguments):
    with pytest.raises(InputError) as error:
        coverage(*arguments)
    assert "\n" not in str(error.value)


def test_k_is_half_of_the_samples():
    assert [coverage_k(num) for num in (2, 3, 4, 7, 8, 16, 24)] == [1, 1, 2, 2, 4, 8, 8]
    with pytest.raises(InputError):
        coverage_k(1)


# ---- Over prompts


def test_the_base_against_itself_is_0_within_the_interval():
    """Of 150 comparisons of two samplings of one model, 95% of the intervals hold 0; the plain share is above 0.05."""
    rng, held, naive = np.random.default_rng(0), [], []
    for _ in range(150):
        rates = rng.beta(0.4, 2.0, 64)  # many hard prompts, few easy ones
        base, own = (sampled(rng, rates, 8) for _ in range(2))
        sums = coverage_sums(base, own)
        held += [low <= 0 <= high for low, high in intervals(sums, resamples=300).values()]
        solved = [np.array([sum(map(sum, g.rewards)) > 0 for g in side]) for side in (base, own)]
        naive.append(np.mean(solved[0] & ~solved[1]))
    assert 0.90 <= np.mean(held) <= 0.99
    assert np.mean(naive) > 0.05
    same = coverage_sums(base, base)
    assert set(measure(same).values()) == {0.0} and all(ends == [0.0, 0.0] for ends in intervals(same).values())


def test_what_is_lost_is_found():
    """A model that forgets half of the prompts that the base solves, and learns some of the others."""
    rng = np.random.default_rng(1)
    before, after = np.repeat([0.5, 0.5, 0.0, 0.0], 64), np.repeat([0.5, 0.0, 0.5, 0.0], 64)
    sums = coverage_sums(sampled(rng, before, 16), sampled(rng, after, 16))
    figures, ends = measure(sums), intervals(sums)
    truth = {LOST: np.mean(chance(before, 8) * (chance(before, 8) - chance(after, 8)))}
    truth[GAINED] = np.mean((1 - chance(before, 8)) * (chance(after, 8) - chance(before, 8)))
    for name, value in truth.items():
        assert ends[name][0] <= value <= ends[name][1] and figures[name] == pytest.approx(value, abs=0.02)
    assert "coverage lost is 0.25 [" in lost_sentence(figures, ends, 16)
    assert "within 8 samples" in lost_sentence(figures, ends, 16)


def test_places_and_prompts_without_a_reward_are_left_out():
    base = [group([1, 1, None, 0, 0]), group([1, None, None, 0]), group([1, 1], rewards=None)]
    own = [group([0, 0, 1, 1, 1]), group([0, 0, 0, 0]), group([1, 1])]
    sums = coverage_sums(base, own)
    assert by_prompt(sums) == {LOST: [pytest.approx(-1 / 6), None, None], GAINED: [pytest.approx(-1 / 6), None, None]}
    assert coverage_sums(base[2:], own[2:]) == {} == coverage_sums([group([1])], [group([0])])
    assert by_prompt(coverage_sums(base[:1], own[:1], success_threshold=2.0))[LOST] == [0.0]
    with pytest.raises(InputError, match="the base has 2 prompts, but there are 3 groups"):
        coverage_sums(base[:2], own)


@pytest.mark.parametrize("ends", [None, [None, None], [math.nan, math.nan], [-0.01, 0.2], [0.0, 0.2]])
def test_nothing_is_said_where_nothing_is_sure(ends):
    assert lost_sentence({LOST: 0.1}, {LOST: ends}, 8) is None
