"""The premises of the real model: what finished trainings show, and what holds of it."""

import sys

import premise_curves
import pytest

from aesl_trl import files


NLL = {"start": 0.9, "nll": 0.1, "effective": 1.0, "lost": 0.2}
AESL = {"start": 0.9, "nll": 0.2, "effective": 0.5, "lost": 0.1}


def write_run(folder, start, nll, effective, lost, cut_off=(0.0, 0.0, 0.0, 0.0)):
    """Write the files of a training that a cell is recorded from; step 10 is selected.

    Args:
        start: held-out nll before step 1; None where nothing was evaluated there.
        cut_off: share of samples cut off at steps 0, 5, 10 and 20.
    """
    own = files.own_folder(folder)
    rows = [{"step": step, "entropy": 0.5, "pass@1": 0.3} for step in (0, 5, 10, 20)]
    rows = [{**row, "truncated": share} for row, share in zip(rows, cut_off, strict=True)]
    rows[-1] |= {"coverage_lost": lost, "intervals": {"entropy": [0.4, 0.6]}}
    files.write_jsonl(own / files.DIVERSITY, rows)
    files.write_json(own / files.SELECTION, {"step": 10})
    log = [] if start is None else [{"step": 0, "eval_nll": start}]
    log += [{"step": 5, "loss": 0.4, "nll": 0.4, "weight_effective": 1.0}, {"step": 5, "eval_nll": 0.5}]
    log += [{"step": 20, "loss": nll * effective, "nll": nll, "weight_effective": effective}, {"step": 20}]
    files.write_json(own / files.TRAINER_STATE, {"log_history": log})


@pytest.fixture
def recorded(tmp_path):
    def cells(**changes):
        found = {}
        for arm, figures in (("nll", NLL), ("aesl_3", AESL)):
            folder = tmp_path / arm
            write_run(folder, **{**figures, **changes.get(arm, {})})
            found[arm] = premise_curves.record(arm, 3, files.RunFolder(folder), "digest", ["--max_steps", "20"])
        return found

    return cells


@pytest.mark.parametrize(
    ("changes", "failing"),
    [
        ({}, None),
        ({"nll": {"start": 0.59}}, "the demonstrations are new"),
        ({"nll": {"start": None}}, "the demonstrations are new"),  # what was not measured does not hold
        ({"nll": {"nll": 0.15}}, "they are learnt"),
        ({"nll": {"lost": 0.04}}, "nll forgets"),
        ({"aesl_3": {"effective": 0.7}}, "aesl_3 acts"),
        ({"nll": {"cut_off": (0.06, 0.0, 0.0, 0.0)}}, "nll's samples end"),  # the base, from which direct RL starts
        ({"nll": {"cut_off": (0.0, 0.9, 0.0, 0.0)}}, None),  # no start
        ({"aesl_3": {"cut_off": (0.0, 0.0, 0.06, 0.0)}}, "aesl_3's samples end"),  # the selected step
        ({"aesl_3": {"cut_off": (0.05, 0.0, 0.05, 0.06)}}, "aesl_3's samples end"),  # the last step
    ],
)
def test_each_premise_can_fail_alone(recorded, changes, failing):
    held = premise_curves.premises(recorded(**changes))
    assert [name for name, holds in held.items() if not holds] == ([failing] if failing else [])
    assert len(held) == 6


def test_any_premise_at_any_seed_counts_but_aesl_3_may_fail_to_act(recorded):
    right = list(recorded().values())
    assert premise_curves.failing(right) == []
    assert premise_curves.failing(list(recorded(aesl_3={"effective": 0.9}).values())) == []
    other = [{**cell, "seed": 4} for cell in recorded(nll={"lost": 0.0}).values()]
    assert premise_curves.failing([*right, *other]) == ["nll forgets"]


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Return the script's command with any flags, whose trainings only write their files, and what it trained."""
    base, trained, figures = tmp_path / "base", [], {"nll": NLL, "aesl_3": AESL}
    base.mkdir()
    (base / "model.safetensors").write_bytes(b"weights")

    def train(command, check):
        flags = dict(zip(command[4::2], command[5::2], strict=True))
        trained.append((flags["--seed"], flags["--max_steps"]))
        arm = {name: arm for arm, name in premise_curves.ARMS.items()}[flags["--config"].rsplit("/", 1)[-1]]
        write_run(premise_curves.Path(flags["--output_dir"]), **figures[arm])

    def run(*flags, **changes):
        figures.update(changes)
        argv = ["", "--base", base, "--work_dir", tmp_path / "work", "--output", tmp_path / "results", "--seeds", 1]
        monkeypatch.setattr(sys, "argv", [*map(str, argv), "--arms", "nll", "aesl_3", *flags])
        with pytest.raises(SystemExit) as ended:
            premise_curves.main()
        return ended.value.code

    monkeypatch.setattr(premise_curves.subprocess, "run", train)
    run.trained, run.results = trained, tmp_path / "results"
    return run


def test_a_cell_is_recorded_and_shown(command, capsys):
    assert command("--max_steps", "20") == 0
    assert command.trained == [("1", "20")] * 2
    (output,) = command.results.iterdir()
    cell = files.read_json(output / "aesl_3-seed-1.json")
    assert cell["logged"][-1] == {"step": 20, "loss": 0.1, "nll": 0.2, "weight_effective": 0.5}
    assert cell["measured"][-1]["intervals"] == {"entropy": [0.4, 0.6]}
    assert (cell["evaluated"][0], cell["selected"]) == ({"step": 0, "eval_nll": 0.9}, 10)
    lines = (output / "premises.md").read_text().splitlines()
    assert lines[2] == "| nll | 1 | 0.10 | 1.00 | 0.50 |  | 0.20 | 0.30 |  |"
    assert lines[3] == "| aesl_3 | 1 | 0.20 | 0.50 | 0.50 |  | 0.10 | 0.30 |  |"
    assert lines[-1].startswith("Seed 1. aesl_3 acts: holds; aesl_3's samples end: holds; nll forgets: holds;")
    assert (output / "premises.png").read_bytes().startswith(b"\x89PNG")
    assert files.read_json(output / "nll-seed-1.json")["flags"] == ["--max_steps", "20"]
    assert "Seed 1." in capsys.readouterr().out


def test_other_flags_overwrite_no_record_and_a_failing_premise_is_the_exit_code(command, monkeypatch):
    monkeypatch.setattr(premise_curves, "png", lambda panels: b"drawn")
    assert command("--max_steps", "20") == 0
    assert command("--max_steps", "20") == 0  # what is there is not trained again
    before = {path: path.read_bytes() for path in command.results.rglob("*") if path.is_file()}
    assert command("--max_steps", "10", nll={**NLL, "lost": 0.0}) == 1
    assert len(before) == 4 and all(path.read_bytes() == content for path, content in before.items())
    assert len(list(command.results.rglob("nll-seed-1.json"))) == 2
    assert [steps for _, steps in command.trained] == ["20", "20", "10", "10"]
