"""For the chain's tests: a chain.yaml beside small configs, and checkpoints in the shape of Trainer's."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from aesl_trl.chain.config import read_config
from aesl_trl.chain.stages import Chain


ALL = ["sft", "select", "handoff", "probe", "grpo", "eval", "report"]


def chain_project(folder: Path) -> Callable[..., Path]:
    """Write configs to `folder`. Return `write(**sections)`, which adds a chain.yaml with these sections replaced."""
    for name in ("sft.yaml", "grpo.yaml", "eval.yaml"):
        (folder / name).write_text("learning_rate: 0.1\n")
    (folder / "grpo.yaml").write_text("model_name_or_path: base\n")
    (folder / "sft.yaml").write_text("dataset_name: rows.jsonl\ndiversity_steps: 5\n")
    (folder / "rows.jsonl").write_text('{"text": "a"}\n')
    (folder / "base").mkdir()
    (folder / "cpu.yaml").write_text("use_cpu: true\n")
    values = {
        "output_dir": "runs/one",
        "sft": {"config": "sft.yaml", "accelerate_config": "cpu.yaml"},
        "grpo": {"config": "grpo.yaml", "accelerate_config": "cpu.yaml"},
        "eval": {"config": "eval.yaml"},
    }

    def write(name="chain.yaml", **changes) -> Path:
        sections = {key: value for key, value in {**values, **changes}.items() if value is not ...}
        (folder / name).write_text(json.dumps(sections))
        return folder / name

    return write


def make(path, **given) -> Chain:
    return Chain(read_config(path, **given), Path(path).absolute())


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    save_file({"a": torch.ones(4, 3), "b": torch.ones(2)}, path / "model.safetensors", metadata={"format": "pt"})
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        torch.save({"state": torch.ones(5)}, path / name)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return path


def cut(path: Path, size: int) -> None:
    with open(path, "r+b") as file:
        file.truncate(size)
