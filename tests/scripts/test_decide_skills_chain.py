"""What DECISION.md decides: verdicts by hand, and nothing while a unit lacks a run."""

import sys

import decide_skills_chain as decide
import pytest

from aesl_trl import files


# Differences of nine units from a row's mean, no two alike, so that two rows differ by their means and a little noise
NOISE = [0.010, -0.007, 0.004, -0.012, 0.009, -0.003, 0.006, -0.008, 0.001]


def cells(means, spread=1.0, runs=2):
    """Return the cells of a table in which row k of `NAMES` has the mean `means[k]`; its two runs differ by 0.02."""
    return [
        {
            "row": row,
            "base": base,
            "seed": seed,
            "same_as": None,
            "folder": f"{row}/{base}/seed-{seed}/{run}",
            "before": {"pass@1": 0.1},
            "after": {"pass@1": means[row] + spread * NOISE[(place + shift) % 9] + (0.01 if run else -0.01)},
        }
        for shift, row in enumerate(decide.NAMES)
        for place, (base, seed) in enumerate(decide.UNITS)
        for run in range(runs)
    ]


def means(**changes):
    return dict.fromkeys(decide.NAMES, 0.8) | {name.replace("__", "/"): value for name, value in changes.items()}


def test_a_unit_is_the_mean_of_its_runs():
    units = decide.units_of(cells(means(nll__last=0.7)))
    assert units["nll/last"]["base-0", 0] == pytest.approx(0.7 + NOISE[1])
    assert {len(of) for of in units.values()} == {9}


@pytest.mark.parametrize(
    ("found", "better", "as_good"),
    [  # mean, low, high, corrected p
        ((0.10, 0.05, 0.15, 0.01), "supported", "supported, and better"),
        ((0.10, -0.01, 0.21, 0.06), "not decided by nine units", "supported"),
        ((0.01, 0.005, 0.015, 0.01), "refuted at this scale", "supported, and better"),  # smaller than the margin
        ((-0.10, -0.15, -0.05, 0.01), "refuted at this scale", "refuted at this scale"),
        ((0.00, -0.04, 0.04, 0.90), "not decided by nine units", "not decided by nine units"),
        ((0.00, 0.00, 0.00, None), "refuted at this scale", "supported"),  # the same runs
    ],
)
def test_verdicts_by_hand(found, better, as_good):
    assert (decide.better(*found), decide.as_good(*found)) == (better, as_good)


def test_a_clear_difference_is_supported_and_moves_the_recommendation():
    units = decide.units_of(cells(means(nll__last=0.6)))
    lines = decide.contrasts(units).splitlines()
    assert lines[2].startswith("| nll, turning point - nll, last | 0.20 [") and lines[2].endswith("| supported |")
    assert lines[5].startswith("| WiSE-FT - nll, turning point | 0.00 [") and "not decided" not in lines[5]
    row, reasons = decide.recommended(units)
    assert row == "nll/turning_point"
    assert len(reasons) == 1
    assert reasons[0].startswith("nll, last: these ended higher: direct RL; nll, turning point; ")


def test_p_is_that_of_all_ways_to_hand_out_the_units():
    """Three against three at three bases, all of one side higher: 2 of 20 ** 3 ways are as far apart."""
    units = decide.units_of(cells(means(nll__last=0.6)))
    assert decide.difference(units["base"], units["nll/last"]).p == 2 / 20**3


def test_without_a_difference_the_simplest_is_recommended():
    assert decide.recommended(decide.units_of(cells(means(nll__mix=0.81), spread=5))) == ("nll/last", [])


def test_where_direct_rl_beats_them_all_it_is_recommended():
    row, reasons = decide.recommended(decide.units_of(cells(means(base=0.95))))
    assert row == "base" and len(reasons) == len(decide.RECOMMENDABLE)


@pytest.mark.parametrize(("drop", "code"), [(0, None), (1, 1)])
def test_nothing_is_decided_while_a_run_is_missing(tmp_path, monkeypatch, capsys, drop, code):
    files.write_json(tmp_path / "compare.json", {"cells": cells(means())[drop:]})
    monkeypatch.setattr(sys, "argv", ["decide", str(tmp_path / "compare.json")])
    if code is None:
        decide.main()
        assert "\nRecommended: nll, last\n" in capsys.readouterr().out
    else:
        with pytest.raises(SystemExit) as stopped:
            decide.main()
        assert stopped.value.code == code
        assert capsys.readouterr().out == "nothing is decided, runs are missing: base base-0 seed 0\n"


def test_its_names_are_those_of_the_comparison():
    from aesl_trl.compare.cells import rows
    from aesl_trl.compare.config import read_config

    config = read_config(decide.Path(decide.__file__).parents[1] / "recipes/skills-chain-tiny/compare.yaml")
    assert {row["row"] for row in rows(config)} == decide.NAMES.keys()
    assert {base for base, _ in decide.UNITS} < config.bases.keys() and set(config.seeds) == {0, 1, 2}
