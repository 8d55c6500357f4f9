"""Fixtures of the tests of `aesl probe`."""

import json
import shutil

import pytest
import yaml
from small_probe import REWARDS, ROWS

from aesl_trl.evaluation import probe, probe_trainer


@pytest.fixture
def project(tmp_path, tiny_model_dir):
    """A folder with a model, rows, rewards and a probe.yaml; `write(**changes)` gives the flags for it."""
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    held_out = [{**row, "prompt": f"now {row['prompt']}"} for row in ROWS]
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    (tmp_path / "rewards.py").write_text(REWARDS)

    def write(**changes) -> list[str]:
        values = {
            "dataset_name": "rows.jsonl",
            "reward_funcs": ["rewards.py:length"],
            "batch_size": 512,
            "max_completion_length": 4,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "output": "out/readiness.json",
            **changes,
        }
        values = {key: value for key, value in values.items() if value is not ...}
        (tmp_path / "probe.yaml").write_text(yaml.safe_dump(values))
        return ["--config", str(tmp_path / "probe.yaml")]

    write.folder, write.model = tmp_path, str(tmp_path / "model")
    return write


@pytest.fixture
def spied(monkeypatch):
    """What the trainers of a probe saw: `weights` before and after sampling, `samples` with ids, `log` of TRL."""
    seen = {"weights": [], "samples": [], "log": [], "models": []}
    sample = probe_trainer.sample

    def spy(trainer, rows, num_samples):
        kind = type(trainer)

        def keep(self, *values):
            seen["samples"] += [{**one, "ids": list(one["ids"])} for one in self._drawn]
            kind._keep(self, *values)

        def log(self, logs, start_time=None):
            kind.log(self, logs, start_time)
            seen["log"].append(dict(logs))

        before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        forward = trainer.model.forward
        trainer.__class__ = type("Spied", (kind,), {"_keep": keep, "log": log})
        groups = sample(trainer, rows, num_samples)
        assert trainer.model.forward == forward
        seen["weights"].append((before, {name: value.clone() for name, value in trainer.model.state_dict().items()}))
        seen["models"].append(trainer.model)
        seen["groups"] = groups
        return groups

    for module in (probe, probe_trainer):  # the first sampling is probe's, that after a short RL run probe_trainer's
        monkeypatch.setattr(module, "sample", spy)
    return seen
