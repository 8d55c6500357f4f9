"""The premises of the real model: what finished trainings show, and what holds of it."""

import sys

import premise_curves
import pytest

from aesl_trl import files


NLL = {"nll": (0.9, 0.1), "effective": 1.0, "lost": 0.2}
AESL = {"nll": (0.9, 0.2), "effective": 0.5, "lost": 0.1}


def write_run(folder, nll, effective, lost):
    """Write the files of a training that a cell is recorded from."""
    own = files.own_folder(folder)
    rows = [{"step": 0, "entropy": 1.0, "pass@1": 0.2}, {"step": 20, "entropy": 0.5, "pass@1": 0.3}]
    rows[1] |= {"coverage_lost": lost, "intervals": {"entropy": [0.4, 0.6]}}
    files.write_jsonl(own / files.DIVERSITY, rows)
    log = [{"step": 5, "loss": nll[0], "nll": nll[0], "weight_effective": 1.0}]
    log += [{"step": 20, "loss": nll[1] * effective, "nll": nll[1], "weight_effective": effective}, {"step": 20}]
    files.write_json(own / files.TRAINER_STATE, {"log_history": log})


@pytest.fixture
def recorded(tmp_path):
    def cells(**changes):
        found = {}
        for arm, figures in (("nll", NLL), ("aesl_3", AESL)):
            folder = tmp_path / arm
            write_run(folder, **{**figures, **changes.get(arm, {})})
            found[arm] = premise_curves.record(arm, 3, files.RunFolder(folder), "digest")
        return found

    return cells


@pytest.mark.parametrize(
    ("changes", "failing"),
    [
        ({}, None),
        ({"nll": {"nll": (0.59, 0.1)}}, "the demonstrations are new"),
        ({"nll": {"nll": (0.9, 0.15)}}, "they are learnt"),
        ({"nll": {"lost": 0.04}}, "nll forgets"),
        ({"aesl_3": {"effective": 0.7}}, "aesl_3 acts"),
    ],
)
def test_each_premise_can_fail_alone(recorded, changes, failing):
    held = premise_curves.premises(recorded(**changes))
    assert [name for name, holds in held.items() if not holds] == ([failing] if failing else [])
    assert len(held) == 4


def test_a_cell_is_recorded_and_shown_beside_those_of_its_own_setting(tmp_path, monkeypatch, capsys):
    base, output = tmp_path / "base", tmp_path / "results"
    base.mkdir()
    (base / "model.safetensors").write_bytes(b"weights")
    trained = []

    def train(command, check):
        flags = dict(zip(command[4::2], command[5::2], strict=True))
        trained.append(flags)
        arm = {name: arm for arm, name in premise_curves.ARMS.items()}[flags["--config"].rsplit("/", 1)[-1]]
        write_run(premise_curves.Path(flags["--output_dir"]), **(NLL if arm == "nll" else AESL))

    monkeypatch.setattr(premise_curves.subprocess, "run", train)
    files.write_json(output / "nll-seed-9.json", {"digest": "another"})
    argv = ["", "--base", base, "--work_dir", tmp_path / "work", "--output", output, "--seeds", 1]
    monkeypatch.setattr(sys, "argv", [*map(str, argv), "--arms", "nll", "aesl_3", "--max_steps", "20"])
    premise_curves.main()
    premise_curves.main()  # what is there is not trained again
    assert [(flags["--seed"], flags["--max_steps"]) for flags in trained] == [("1", "20")] * 2
    cell = files.read_json(output / "aesl_3-seed-1.json")
    assert cell["logged"][-1] == {"step": 20, "loss": 0.1, "nll": 0.2, "weight_effective": 0.5}
    assert cell["measured"][1]["intervals"] == {"entropy": [0.4, 0.6]}
    lines = (output / "premises.md").read_text().splitlines()
    assert lines[2] == "| nll | 1 | 0.10 | 1.00 | 0.50 |  | 0.20 | 0.30 |  |"
    assert lines[3] == "| aesl_3 | 1 | 0.20 | 0.50 | 0.50 |  | 0.10 | 0.30 |  |"
    assert lines[-1].startswith("Seed 1. aesl_3 acts: holds; nll forgets: holds;")
    assert (output / "premises.png").read_bytes().startswith(b"\x89PNG")
    assert "Seed 1." in capsys.readouterr().out
