"""The statistics of a comparison, against printed tables, numbers by hand and a second way to the same value."""

import math

import numpy as np
import pytest
from counted_work import Read
from hypothesis import given, settings
from hypothesis import strategies as st

from aesl_trl.compare.table import (
    MAX_SEEDS,
    correlations,
    counted,
    distinct_runs,
    figure_names,
    paired,
    rl_noise,
    seeds_to_decide,
    solved,
    starts_of,
    summary,
    table,
    tuned,
)
from aesl_trl.diversity.intervals import share_interval, t_quantile
from aesl_trl.errors import InputError


# ---- Means


def test_interval_by_hand():
    # mean 3, s = sqrt(10 / 4) = 1.5811, half = 2.7764 * 1.5811 / sqrt(5) = 1.9632
    found = summary([1, 2, 3, 4, 5])
    assert (found["mean"], found["n"]) == (3.0, 5)
    assert found["sd"] == pytest.approx(1.58114, abs=1e-5)
    assert (found["low"], found["high"]) == pytest.approx((1.0368, 4.9632), abs=1e-4)


def test_a_share_keeps_inside():
    values = [0.98, 0.98, 0.90, 0.99, 0.97]
    plain, share = summary(values), summary(values, is_share=True)
    assert plain["high"] > 1.0 > share["high"] and share["mean"] == plain["mean"]
    assert (share["low"], share["high"]) == share_interval(plain["mean"], plain["sd"] / math.sqrt(5), 4)
    assert summary([1.0, 1.0], is_share=True)["low"] == 1.0


def test_one_seed_has_no_interval_and_none_no_mean():
    assert summary([0.5]) == {"mean": 0.5, "low": None, "high": None, "sd": None, "n": 1}
    assert summary([]) == {"mean": None, "low": None, "high": None, "sd": None, "n": 0}


def test_an_interval_covers_as_often_as_it_says():
    """20,000 samples of five normal values: the mean lies inside in 95 %, standard error 0.0015."""
    rows = np.random.default_rng(0).normal(0.8, 0.1, size=(20_000, 5))
    half = t_quantile(4) * rows.std(axis=1, ddof=1) / math.sqrt(5)
    assert np.mean(np.abs(rows.mean(axis=1) - 0.8) < half) == pytest.approx(0.95, abs=0.005)


# ---- Paired differences


def test_paired_by_hand():
    # The recorded AESL and nll, last steps: differences 0.01 -0.05 0.14 0.04 0.09; mean 0.046, s 0.07301,
    # half = 2.7764 * 0.07301 / sqrt(5) = 0.09066. n: 2.2010 * 0.07301 / sqrt(12) = 0.04639 does not decide,
    # 2.1788 * 0.07301 / sqrt(13) = 0.04412 does.
    aesl = {0: 0.77, 1: 0.85, 2: 0.85, 3: 0.84, 4: 0.84}
    nll = {0: 0.76, 1: 0.90, 2: 0.71, 3: 0.80, 4: 0.75}
    found = paired(aesl, nll)
    assert found["mean"] == pytest.approx(0.046)
    assert found["sd"] == pytest.approx(0.07301, abs=1e-5)
    assert (found["low"], found["high"]) == pytest.approx((-0.04466, 0.13666), abs=1e-4)
    assert (found["seeds"], found["decided"], found["seeds_to_decide"]) == ([0, 1, 2, 3, 4], False, 13)
    # t = 0.046 / (0.07301 / sqrt(5)) = 1.4088 with 4 degrees of freedom
    assert found["p"] == pytest.approx(0.2317, abs=1e-3)


def test_the_same_runs_have_no_p_and_an_equal_difference_has_none_left():
    same, shifted = {0: 0.5, 1: 0.75}, {0: 0.625, 1: 0.875}
    assert paired(same, same)["p"] is None and paired(shifted, same)["p"] == 0.0


@settings(deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=2, max_size=8))
def test_p_is_small_where_the_interval_excludes_zero(differences):
    found = paired(dict(enumerate(differences)), dict.fromkeys(range(len(differences)), 0.0))
    if found["p"] is not None and abs(found["p"] - 0.05) > 1e-9:
        assert found["decided"] is (found["p"] < 0.05)


def test_only_common_seeds_are_paired():
    found = paired({0: 1.0, 1: 2.0, 7: 9.0}, {1: 1.0, 0: 0.5, 3: 4.0})
    assert (found["seeds"], found["n"], found["mean"]) == ([0, 1], 2, 0.75)
    alone = paired({0: 1.0}, {0: 0.5})
    assert (alone["mean"], alone["low"], alone["decided"], alone["seeds_to_decide"]) == (0.5, None, None, None)
    assert paired({0: 1.0}, {1: 0.5})["n"] == 0


def test_pairing_is_what_narrows_the_interval():
    """Seeds that are hard for both: apart the intervals overlap widely, paired the difference is decided."""
    hard = {seed: seed / 10 for seed in range(5)}
    easy = {seed: value + 0.05 + (seed % 2) / 100 for seed, value in hard.items()}
    assert summary(list(hard.values()))["high"] > summary(list(easy.values()))["low"]
    assert paired(easy, hard)["decided"] is True
    assert paired(hard, easy)["mean"] == -paired(easy, hard)["mean"]


@settings(deadline=None)
@given(st.floats(0.001, 1.0), st.floats(0.001, 1.0), st.booleans())
def test_seeds_to_decide_is_the_smallest(mean, sd, negative):
    n = seeds_to_decide(-mean if negative else mean, sd)

    def excludes_zero(n):
        return t_quantile(n - 1) * sd / math.sqrt(n) < mean

    if n is None:
        assert not excludes_zero(MAX_SEEDS)
    else:
        assert excludes_zero(n) and (n == 2 or not excludes_zero(n - 1))


@pytest.mark.parametrize("mean, sd, n", [(0.0, 0.1, None), (0.0, 0.0, None), (0.1, 0.0, 2), (1e-6, 1.0, None)])
def test_seeds_to_decide_at_the_ends(mean, sd, n):
    assert seeds_to_decide(mean, sd) == n


# ---- The table


def cell(name="nll/last", seed=0, *, before=0.3, after=0.8, entropy=0.1, **changes):
    method, _, selection = name.partition("/")
    found = {"row": name, "setting": "", "method": method, "selection": selection or None, "seed": seed, "point": ""}
    start = {"pass@1": before, "pass@8": 0.5, "entropy": entropy, "self_bleu": 0.9, "groups_mixed": 0.2}
    found |= {"folder": f"{changes.get('base', '')}/{name.replace('/', '_')}/seed-{seed}", "same_as": None}
    return {**found, "step": 400, "before": start, "after": {**start, "pass@1": after}, **changes}


def row(name, setting=""):
    method, _, selection = name.partition("/")
    full = f"{setting}/{name}" if setting else name
    return {"row": full, "name": name, "setting": setting, "method": method, "selection": selection or None}


def test_the_cells_are_read_as_often_however_many_rows_there_are():
    def reads(count: int) -> tuple[int, int]:
        rows = Read(row(f"m{number}/last") for number in range(count))
        cells = Read(cell(each["row"], seed) for each in list(rows) for seed in (0, 1))
        rows.times = 0
        table(cells, rows, reference=["m0/last"], metric="pass@1")
        return cells.times, rows.times

    assert reads(9) == reads(3)


def test_the_table():
    cells = [cell(seed=seed, after=0.7 + seed / 10) for seed in (0, 1)]
    cells += [cell("aesl/last", seed, after=0.75 + seed / 10, entropy=0.2) for seed in (0, 1)]
    found = table(cells, [row("nll/last"), row("aesl/last"), row("gem/last")], reference=["nll/last"], metric="pass@1")
    assert found["figures"] == ["pass@1", "pass@8", "entropy", "self_bleu", "groups_mixed"]
    nll, aesl, gem = found["rows"]
    assert nll["after"]["pass@1"]["mean"] == pytest.approx(0.75) and nll["differences"] == {}
    difference = aesl["differences"]["nll/last"]["after"]["pass@1"]
    assert difference["mean"] == pytest.approx(0.05) and difference["n"] == 2
    assert aesl["differences"]["nll/last"]["before"]["entropy"]["mean"] == pytest.approx(0.1)
    assert gem["seeds"] == [] and gem["after"]["pass@1"]["mean"] is None
    assert gem["differences"]["nll/last"]["after"]["pass@1"]["n"] == 0


def test_differences_stay_inside_a_setting():
    cells = [cell(seed=0, after=0.2)]
    cells += [cell(name, 0, after=0.9, row=f"few/{name}", setting="few") for name in ("nll/last", "aesl/last")]
    rows = [row("nll/last"), row("nll/last", "few"), row("aesl/last", "few")]
    found = table(cells, rows, reference=["nll/last"], metric="pass@1")
    assert found["rows"][2]["differences"]["nll/last"]["after"]["pass@1"]["mean"] == 0.0


def test_rl_runs_are_averaged_within_a_start():
    """Two starts with two RL runs and one with one: three units. RL's own sd by hand: 0.02 + 0.02 over two degrees."""
    after = {0: [0.7, 0.9], 1: [0.6, 0.8], 2: [0.5]}
    cells = [cell(seed=seed, after=value, run=run) for seed, of in after.items() for run, value in enumerate(of)]
    starts = starts_of(cells)
    assert [start["after"]["pass@1"] for start in starts] == pytest.approx([0.8, 0.7, 0.5])
    assert [start["runs"] for start in starts] == [2, 2, 1]
    noise = rl_noise(cells, "pass@1")
    assert (noise["sd"], noise["df"]) == (pytest.approx(math.sqrt(0.02)), 2)
    assert rl_noise(cells[:1], "pass@1") == {"sd": None, "df": 0}
    # a readiness probe, repeated beside each RL run, may choose another step
    assert rl_noise([{**cells[0], "start": "step 10"}, *cells[1:4]], "pass@1")["df"] == 1
    (found,) = table(cells, [row("nll/last")], reference=[], metric="pass@1")["rows"]
    assert (found["seeds"], found["runs"], found["after"]["pass@1"]["n"]) == ([0, 1, 2], [2, 2, 1], 3)
    assert found["after"]["pass@1"]["mean"] == pytest.approx(2 / 3) and found["rl_noise"] == noise


def test_the_unit_is_a_base_with_a_seed():
    """Two bases at different levels: the level drops out of the pairs, and of the permutations."""
    level = {"small": 0.2, "large": 0.6}
    cells = [
        cell(name, seed, base=base, after=level[base] + seed / 100 + shift)
        for name, shift in (("nll/last", 0.0), ("aesl/last", 0.1))
        for base in level
        for seed in (0, 1, 2)
    ]
    nll, aesl = table(cells, [row("nll/last"), row("aesl/last")], reference=["nll/last"], metric="pass@1")["rows"]
    means = {base: found["mean"] for base, found in nll["bases"].items()}
    assert means == pytest.approx({"small": 0.21, "large": 0.61})
    assert (nll["bases"]["small"]["n"], nll["after"]["pass@1"]["n"]) == (3, 6)
    found = aesl["differences"]["nll/last"]["after"]["pass@1"]
    assert found["seeds"][:2] == [("large", 0), ("large", 1)] and found["mean"] == pytest.approx(0.1)
    assert found["permutation_p"] == pytest.approx(2 / 20**2)  # the observed one and its mirror image


def test_holm_is_over_the_rows_of_a_reference_and_counts_the_same_runs_once():
    after = {
        "nll/last": (0.5, 0.5, 0.5),
        "nll/best_eval": (0.5, 0.5, 0.5),
        "a/last": (0.70, 0.71, 0.72),
        "b/last": (0.60, 0.65, 0.62),
        "b/best_eval": (0.60, 0.65, 0.62),
    }
    twins = {"nll/best_eval": "nll_last", "b/best_eval": "b_last"}
    cells = [
        cell(name, seed, after=value, same_as=twins.get(name))
        for name, of in after.items()
        for seed, value in enumerate(of)
    ]
    found = table(cells, [row(name) for name in after], reference=["nll/last"], metric="pass@1")["rows"]
    of = {each["row"]: each["differences"]["nll/last"]["after"]["pass@1"] for each in found[1:]}
    assert of["nll/best_eval"]["p"] is None is of["nll/best_eval"]["p_holm"]
    # two contrasts: a's p is smaller and counts twice, b's once
    assert of["a/last"]["p_holm"] == pytest.approx(2 * of["a/last"]["p"])
    assert of["b/last"]["p_holm"] == of["b/best_eval"]["p_holm"] == pytest.approx(of["b/last"]["p"])
    assert of["a/last"]["permutation_p"] == pytest.approx(0.1)  # 2 of 20 ways
    assert of["a/last"]["permutation_p_holm"] == pytest.approx(0.2)


def test_rows_of_equal_figures_are_tests_of_their_own():
    """Two methods that came out alike are two contrasts: 3 rows, and the smallest permutation p counts three times."""
    after = {"nll/last": (0.5, 0.5, 0.5), "a/last": (0.6, 0.65, 0.62), "b/last": (0.6, 0.65, 0.62)}
    after["c/last"] = (0.5, 0.5, 0.5)  # as the reference: no t test, but a permutation test
    cells = [cell(name, seed, after=value) for name, of in after.items() for seed, value in enumerate(of)]
    found = table(cells, [row(name) for name in after], reference=["nll/last"], metric="pass@1")["rows"]
    a, b, c = (each["differences"]["nll/last"]["after"]["pass@1"] for each in found[1:])
    assert a["p_holm"] == b["p_holm"] == pytest.approx(2 * a["p"]) and c["p"] is None is c["p_holm"]
    assert (c["permutation_p"], c["permutation_p_holm"]) == (1.0, 1.0)
    assert a["permutation_p_holm"] == b["permutation_p_holm"] == pytest.approx(3 * 0.1)


def test_permutations_are_over_the_starts_that_both_rows_have():
    """Seed 3 of the reference has no partner: with its 0.9 the p would be that of another difference."""
    after = {"nll/last": (0.5, 0.51, 0.52, 0.9), "a/last": (0.70, 0.71, 0.72)}
    cells = [cell(name, seed, after=value) for name, of in after.items() for seed, value in enumerate(of)]
    _, a = table(cells, [row(name) for name in after], reference=["nll/last"], metric="pass@1")["rows"]
    found = a["differences"]["nll/last"]["after"]["pass@1"]
    assert found["seeds"] == [0, 1, 2] and found["permutation_p"] == pytest.approx(0.1)  # 2 of 20 ways


def test_problems_are_counted():
    one = cell(problems=16)
    one["after"] |= {"groups_all_right": 14 / 16, "groups_mixed": 1 / 16}
    two = cell(seed=1, problems=16)
    two["after"] |= {"groups_all_right": 1.0, "groups_mixed": 0.0}
    assert solved([one, two]) == {"right": 30, "mixed": 1, "of": 32, "by": None}
    assert solved([one, cell(seed=2)]) is None and solved([]) is None
    of_symbols = [
        {**each, "count_by": "symbol", "after": {**each["after"], "solved": 7, "solved_of": 8}} for each in (one, two)
    ]
    assert counted(of_symbols) == "symbol"
    assert solved(of_symbols, "symbol") == {"right": 14, "mixed": 0, "of": 16, "by": "symbol"}
    # cells evaluated before eval.yaml had count_by: the whole table counts problems
    assert counted([*of_symbols, one]) is None and solved(of_symbols)["right"] == 30
    one["after"] |= {"problems_not_graded": 2}  # 14/16 of the other 14
    assert solved([one]) == {"right": 12, "mixed": 1, "of": 14, "by": None}


def test_the_largest_pass_that_every_cell_has():
    cells = [cell(), cell(seed=1)]
    cells[0]["before"] = {**cells[0]["before"], "pass@16": 0.9}
    assert figure_names(cells)[1] == "pass@8"


def test_each_of_a_few_values_has_a_column_of_its_own():
    """Values that only some cells have are left out, and five values are too many for a table."""
    cells = [cell(), cell(seed=1)]
    of_all, of_one = {"pass@1[sums]": 0.5, "pass@1[legs]": 0.25}, {"pass@1[spelling]": 1.0}
    for each, more in zip(cells, ({}, of_one), strict=True):
        for when in ("before", "after"):
            each[when] = {**each[when], **of_all, **more}
    assert figure_names(cells)[-2:] == ("pass@1[legs]", "pass@1[sums]")
    found = table(cells, [row("nll/last")], reference=[], metric="pass@1[legs]")
    assert found["rows"][0]["after"]["pass@1[legs]"]["mean"] == 0.25
    for each in cells:
        for when in ("before", "after"):
            each[when] |= {f"pass@1[{letter}]": 0.0 for letter in "abc"}
    assert not any("[" in name for name in figure_names(cells))


def test_an_unknown_metric_is_refused():
    with pytest.raises(InputError, match="no finished cell has 'pas@1'; did you mean 'pass@1'"):
        table([cell()], [row("nll/last")], reference=[], metric="pas@1")


def test_selections_of_one_step_are_one_point():
    cells = [cell("nll/last", 0), cell("nll/best_eval", 0), cell("nll/turning_point", 0, step=30), cell("base", 0)]
    cells += [cell("nll/last", 1), cell("base", 1, step=None)]
    assert [(each["row"], each["seed"]) for each in distinct_runs(cells)] == [
        ("nll/last", 0),
        ("nll/turning_point", 0),
        ("base", 0),
        ("nll/last", 1),
        ("base", 1),
    ]
    (found,) = correlations(cells, ["entropy"], "pass@1")
    assert (found["cells"], found["rows"]) == (5, 3) and math.isnan(found["rho"])


# ---- Tuning


def test_the_best_whole_point_wins():
    points, seeds = ["a", "b", "c"], [7, 8]
    results = {("a", 7): 0.5, ("a", 8): 0.7, ("b", 7): 0.9, ("c", 7): 0.6, ("c", 8): 0.6}
    cells = [{"point": point, "seed": seed, "value": value} for (point, seed), value in results.items()]
    best, lines = tuned(cells, points, seeds, lambda item: item["value"])
    assert best == "a"  # b lacks a seed, c is as good as a and later in the grid
    assert [line["values"] for line in lines] == [[0.5, 0.7], [0.9], [0.6, 0.6]]
    assert lines[1]["mean"] == 0.9
    assert tuned(cells[2:3], points, seeds, lambda item: item["value"])[0] is None
