"""The prepared base: what a probe's figures have to be, what is trained anew, and what is recorded."""

import shutil
import sys

import build_smollm2_base as builder
import pytest

from aesl_trl import files
from aesl_trl.errors import InputError


def readiness(**changes):
    """Return a probe of one base on two families; `changes` are the second family's figures."""
    good = {"pass@1": 0.25, "pass@16": 0.8, "entropy": 0.5, "truncated": 0.0}
    families = [("chain_sum", good), ("products", {**good, **changes})]
    tasks = [{"name": name, "num_prompts": 32, "figures": figures} for name, figures in families]
    return {"checkpoints": [{"name": "seed-0", "tasks": tasks}]}


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        ({}, True),
        ({"pass@1": 0.15}, True),
        ({"pass@1": 0.14}, False),
        ({"pass@1": 0.41}, False),
        ({"pass@16": 0.59}, False),
    ],
)
def test_each_family_has_to_pass_by_itself(changes, passes):
    rows = builder.gate(readiness(**changes))
    assert [row["passes"] for row in rows] == [True, passes]
    lines = builder.table(rows).splitlines()
    assert lines[2] == "| chain_sum | 0.25 | 0.80 | 0.00 | passes |"
    assert lines[3].endswith("| passes |" if passes else "| **fails** |")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Return a folder with a model in it; the recipe's files are copies, and a training only leaves its last file."""
    copy = shutil.copytree(builder.RECIPE, tmp_path / builder.RECIPE.name, ignore=shutil.ignore_patterns("results"))
    monkeypatch.setattr(builder, "RECIPE", copy)
    monkeypatch.setattr(builder, "CONFIG", copy / "sft/config_stage_0.yaml")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.safetensors").write_bytes(b"weights")
    return tmp_path


def trained(place, monkeypatch, *, seed=3, flags=(), finishes=True):
    """Train the base, and return what `aesl` was called with."""
    calls, out = [], place / "base"

    def aesl(*arguments):
        calls.append(arguments)
        own = builder.own_folder(out)
        own.mkdir(parents=True, exist_ok=True)
        if finishes:
            (own / builder.TRAINER_STATE).write_text("{}")

    monkeypatch.setattr(builder, "aesl", aesl)
    builder.train(place / "model", out, seed, list(flags))
    return calls


def test_a_training_is_begun_gone_on_with_or_left_alone(place, monkeypatch):
    ((command, *flags),) = trained(place, monkeypatch, finishes=False)
    assert (command, flags[flags.index("--seed") + 1]) == ("sft", 3)
    assert "--resume_from_checkpoint" not in flags
    ((_, *flags),) = trained(place, monkeypatch)
    assert "--resume_from_checkpoint" in flags
    assert trained(place, monkeypatch) == []


@pytest.mark.parametrize("finishes", [True, False])
@pytest.mark.parametrize("changed", ["RECIPE/task.py", "RECIPE/sft/config_stage_0.yaml", "model/model.safetensors"])
def test_a_base_of_other_settings_is_refused(changed, finishes, place, monkeypatch):
    trained(place, monkeypatch, finishes=finishes)
    (place / changed.replace("RECIPE", builder.RECIPE.name)).write_text("changed")
    with pytest.raises(InputError, match="base was trained with another model, seed, .*: remove that folder"):
        trained(place, monkeypatch)
    shutil.rmtree(place / "base")
    assert len(trained(place, monkeypatch)) == 1
    for other in ({"seed": 4}, {"flags": ["--bf16", "true"]}):
        with pytest.raises(InputError, match="another model, seed, .* or other flags"):
            trained(place, monkeypatch, **other)


def test_a_base_that_was_made_elsewhere_is_refused(place, monkeypatch):
    (place / "base").mkdir()
    with pytest.raises(InputError, match="remove that folder, or name another"):
        trained(place, monkeypatch)
    with pytest.raises(InputError, match="model: .*gone is not a folder"):
        builder.train(place / "gone", place / "base", 0, [])


def test_every_attempt_is_recorded_once(tmp_path):
    """A gate that failed stays in the record; the same attempt replaces its own entry."""
    files.write_json(tmp_path / "origin.json", {"model": "rounded to 4 bits"})
    rows, path = builder.gate(readiness()), tmp_path / "results/stage_0.json"
    failed = builder.gate(readiness(**{"pass@1": 0.9}))
    for digest, seed, found in (("a", 0, failed), ("b", 0, failed), ("b", 0, rows), ("b", 1, rows)):
        builder.record(tmp_path, seed, digest, ["--bf16", "true"], found, path)
    attempts = files.read_json(path)
    assert [(each["digest"], each["seed"], each["gate"][1]["passes"]) for each in attempts] == [
        ("a", 0, False),
        ("b", 0, True),
        ("b", 1, True),
    ]
    assert attempts[0]["model"] == {"model": "rounded to 4 bits"}
    assert attempts[0]["flags"] == ["--bf16", "true"]
    assert attempts[0]["settings"]["chain_sum"]["max_terms"] == 3
    assert sum(attempts[0]["rows"].values()) == 1600


def test_the_exit_code_is_the_gates(place, monkeypatch, capsys):
    """Run `main` without the training and the probe, which both get the flags that the script does not know."""
    out, calls = place / "base", []

    def aesl(command, *flags):
        calls.append((command, *flags[-2:]))
        own = builder.own_folder(out)
        own.mkdir(parents=True, exist_ok=True)
        (own / builder.TRAINER_STATE).write_text("{}")
        files.write_json(out / builder.READINESS, readiness(**{"pass@16": 0.1}))

    monkeypatch.setattr(builder, "aesl", aesl)
    monkeypatch.setattr(builder, "RECORD", place / "stage_0.json")
    monkeypatch.setattr(sys, "argv", ["", "--model", str(place / "model"), "--output_dir", str(out), "--bf16", "true"])
    with pytest.raises(SystemExit) as ended:
        builder.main()
    assert calls == [("sft", "--bf16", "true"), ("probe", "--bf16", "true")]
    assert ended.value.code == 1 and "**fails**" in capsys.readouterr().out
    assert [row["passes"] for row in files.read_json(place / "stage_0.json")[0]["gate"]] == [True, False]
