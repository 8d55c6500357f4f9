"""The gate of the prepared base: what a probe's figures have to be."""

import build_smollm2_base as builder
import pytest


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


@pytest.mark.parametrize("state", ["new", "cut off", "finished"])
def test_a_training_is_begun_gone_on_with_or_left_alone(state, tmp_path, monkeypatch):
    calls, out = [], tmp_path / "base"
    monkeypatch.setattr(builder, "aesl", lambda *arguments: calls.append(arguments))
    if state != "new":
        out.mkdir()
    if state == "finished":
        own = builder.own_folder(out)
        own.mkdir(exist_ok=True)
        (own / builder.TRAINER_STATE).write_text("{}")
    builder.train(tmp_path / "model", out, 3)
    if state == "finished":
        assert calls == []
        return
    ((command, *rest),) = calls
    assert (command, rest[rest.index("--seed") + 1]) == ("sft", 3)
    assert ("--resume_from_checkpoint" in rest) == (state == "cut off")
