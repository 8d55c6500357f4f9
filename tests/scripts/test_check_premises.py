"""The premises of a comparison: what runs on disk have to show before any RL."""

import check_premises
import pytest

from aesl_trl import files


@pytest.fixture
def finished(tmp_path):
    """Write both runs of seed 3 as a training leaves them; returns the folder of all runs."""

    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes(b"weights")

    def write(effective=0.2, lost=0.1, low=0.01):
        for loss, share in (("nll", 1.0), ("aesl", effective)):
            folder = tmp_path / check_premises.digest_of(tmp_path / "base") / "seed-3" / loss / "_aesl"
            figures = {"pass@1": 0.5, "pass@8": 0.7, "entropy": 0.1, "coverage_gained": 0.2}
            ends = {"coverage_lost": [low, lost + 0.1]}
            rows = [{"step": 0}, {"step": 20, **figures, "coverage_lost": lost, "intervals": ends}]
            files.write_jsonl(folder / files.DIVERSITY, rows)
            log = [{"step": 10, "loss": 1.0, "nll": 1.0}, {"step": 20, "loss": 0.5 * share, "nll": 0.5}, {"step": 20}]
            files.write_json(folder / files.TRAINER_STATE, {"log_history": log})
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("changes", "acts", "forgets"),
    [
        ({}, True, True),
        ({"effective": 0.71}, False, True),
        ({"lost": 0.04}, True, False),
        ({"low": -0.01}, True, False),
    ],
)
def test_each_premise_needs_all_that_it_says(finished, tmp_path, changes, acts, forgets):
    found = check_premises.check(tmp_path / "base", 3, finished(**changes))
    assert (found["aesl_acts"], found["nll_forgets"]) == (acts, forgets)
    assert found["aesl"]["weight_effective"] == pytest.approx(changes.get("effective", 0.2))


def test_the_runs_of_another_base_are_others(finished, tmp_path, monkeypatch):
    finished()
    (tmp_path / "base" / "model.safetensors").write_bytes(b"other weights")
    monkeypatch.setattr(check_premises.subprocess, "run", lambda command, check: pytest.fail("trains", pytrace=False))
    with pytest.raises(pytest.fail.Exception, match="trains"):
        check_premises.check(tmp_path / "base", 3, tmp_path)


def test_the_table_says_where_a_premise_fails(finished, tmp_path):
    rows = [check_premises.check(tmp_path / "base", 3, finished(**changes)) for changes in ({}, {"low": -0.01})]
    lines = check_premises.table(rows).splitlines()
    assert lines[2] == "| base | 3 | 0.200 | 0.10 [0.01, 0.20] | 0.10 [0.01, 0.20] | hold |"
    assert lines[3] == "| base | 3 | 0.200 | 0.10 [-0.01, 0.20] | 0.10 [-0.01, 0.20] | **fail** |"


def test_the_recipes_readme_says_what_was_recorded():
    """Each recorded seed's line stands in the README, and its premises hold."""
    rows = files.read_json(check_premises.RECIPE / "results" / "premises.json")
    assert all(row["aesl_acts"] and row["nll_forgets"] for row in rows)
    assert check_premises.table(rows) in (check_premises.RECIPE / "README.md").read_text()
