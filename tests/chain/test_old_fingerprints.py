"""Records of aesl_trl 0.1.0: their fingerprints are recognised, and rewritten, and no stage starts again."""

import hashlib
import json
from pathlib import Path

import yaml
from small_chains import make

from aesl_trl import files
from aesl_trl.chain import chain as chains
from aesl_trl.chain.fingerprints import walk
from aesl_trl.chain.old_fingerprints import renew
from aesl_trl.chain.stages import Chain


CONFIGS = {
    "sft.yaml": {"dataset_name": "data/rows.jsonl", "diversity_steps": 5, "learning_rate": 1.0e-4},
    "grpo.yaml": {"model_name_or_path": "org/base", "reward_funcs": ["reward.py:exact"], "max_steps": 7},
    "eval.yaml": {"dataset_name": "data/rows.jsonl", "samples": 4},
    "cpu.yaml": {"use_cpu": True},
    "chain.yaml": {
        "output_dir": "runs/one",
        "seed": 3,
        "sft": {"config": "sft.yaml", "accelerate_config": "cpu.yaml"},
        "selection": {"rule": "last"},
        "grpo": {"config": "grpo.yaml", "accelerate_config": "cpu.yaml"},
        "eval": {"config": "eval.yaml"},
        "report": {"title": "old"},
    },
}
# What the code of aesl_trl 0.1.0 recorded of this project
RECORDED = {
    "sft": "b7416d1fb9da80f1abcf18cf7f8a6241dde6c7c25d6ca6c3e6f2951e824659e2",
    "select": "0b13e1ed7b70e56a48d6602a247d9917ac68a6c3e415f390c2dc482ee4f50488",
    "handoff": "0a929794bbd2e8338684aa0701d419eb73d4c457272a4b00788e8a4cfef5768d",
    "probe": "e4a329735589fab963e260a9effd715ac4de94e34a2aef7b25b0271103baf47d",
    "grpo": "b0a839635e4c709f6b2f51858a4c7326a33f31f5c6d6a2c7b4f267bc7fd284cd",
    "eval": "782efd8b2d872f39e47ec0ac989f13bc2071f925ac3987d00c62006ee948abb7",
    "report": "c8c91fdff918a7aa686b294ab453aa33c103c6d8b91cbd870c8297bb2935630d",
}
# The same, spelled out: each stage's command, with paths from its folder, and the files that it and its configs name
ACCELERATE = "python -m accelerate.commands.launch --quiet --config_file ../../cpu.yaml -m"
OLD = {
    "sft": (
        f"{ACCELERATE} aesl_trl.sft --config ../../sft.yaml --output_dir . --seed 3".replace("../../", "../../../"),
        ["../../../sft.yaml", "../../../cpu.yaml", "../../../data/rows.jsonl"],
    ),
    "select": ("aesl select sft --out . --rule last", []),
    "handoff": ("python -m aesl_trl.handoff . --mode auto", []),
    "probe": (
        "python -m aesl_trl.probe handoff --config ../../grpo.yaml --output readiness.json --seed 3",
        ["../../grpo.yaml", "../../reward.py"],
    ),
    "grpo": (
        f"{ACCELERATE} aesl_trl.grpo --config ../../grpo.yaml --model_name_or_path handoff --output_dir grpo --seed 3",
        ["../../grpo.yaml", "../../cpu.yaml", "../../reward.py"],
    ),
    "eval": (
        "python -m aesl_trl.evaluate --config ../../eval.yaml --start handoff --final grpo --output evaluation.json",
        ["../../eval.yaml", "../../data/rows.jsonl"],
    ),
    "report": ("python -m aesl_trl.report . --title=old", []),
}


def project(folder: Path) -> Path:
    """Write a project with a file of every kind that a config names."""
    (folder / "data").mkdir()
    (folder / "data/rows.jsonl").write_text('{"prompt": "1 + 1 =", "completion": " 2"}\n')
    (folder / "reward.py").write_text("def exact(completions, **kwargs):\n    return [1.0 for _ in completions]\n")
    for name, values in CONFIGS.items():
        (folder / name).write_text(yaml.safe_dump(values))
    return folder / "chain.yaml"


def old_run(folder: Path, **changes: str) -> Chain:
    """Write a finished run of the project with its old records; `changes` replace a stage's status."""
    chain = make(project(folder))
    outputs = (chain.run / name for name in (files.SELECTION, files.HANDOFF, files.READINESS, files.EVALUATION))
    probed = {"verdict": "ready", "text": "ready: go", "reasons": [], "mode": "full", "checkpoints": [], "models": {}}
    for output in (*outputs, chain.sft_dir / files.TRAINER_STATE, chain.run / "grpo" / files.RUN):
        files.write_json(output, probed | {"checkpoints": [probed], "stage": "grpo"})
    (chain.run / files.REPORT).write_text("<html></html>")
    facts = {"returncode": 0, "seconds": 1.0}
    stages = {name: {"status": "done", **facts, "inputs": inputs} for name, inputs in RECORDED.items()}
    for name, status in changes.items():
        stages[name]["status"] = status
    files.write_json(chain.sft_dir / files.STAGE, stages["sft"])
    files.write_json(chain.run / files.CHAIN, {"stages": stages})
    return chain


def test_the_old_formula_in_full(tmp_path):
    chain, previous = old_run(tmp_path), None
    for name, (command, paths) in OLD.items():
        folder = chain.sft_dir if name == "sft" else chain.run
        contents = {path: hashlib.sha256((folder / path).read_bytes()).hexdigest() for path in paths}
        facts = {"command": command.split(), "files": contents, "previous": previous}
        assert hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest() == RECORDED[name], name
        if name != "probe":
            previous = RECORDED[name]


def test_no_stage_of_an_old_run_starts_again(tmp_path, monkeypatch, capsys):
    chain = old_run(tmp_path)
    monkeypatch.setattr(chains, "check_in_child", lambda command, argv: None)
    for _ in range(2):
        chains.main(["--config", str(chain.path)])
        assert capsys.readouterr().out.count("done with the same inputs: skipped") == len(RECORDED)
    record = files.read_json(chain.run / files.CHAIN)["stages"]
    chain.read_record()
    for stage, inputs in walk(chain):
        assert record[stage.name]["inputs"] == inputs.fingerprint != RECORDED[stage.name]
        assert record[stage.name]["settings"] == inputs.settings and record[stage.name]["seconds"] == 1.0
    assert files.read_json(chain.sft_dir / files.STAGE) == record["sft"]


def test_an_old_run_that_was_cut_off_goes_on(tmp_path):
    chain = old_run(tmp_path, grpo="interrupted")
    chain.read_record()
    renew(chain)
    for stage, inputs in walk(chain):
        assert chain.recorded(stage.name)["inputs"] == inputs.fingerprint
    assert chain.recorded("grpo")["status"] == "interrupted"


def test_an_old_record_of_other_inputs_stays(tmp_path):
    chain = old_run(tmp_path)
    (tmp_path / "reward.py").write_text("def exact(completions, **kwargs):\n    return [0.0 for _ in completions]\n")
    chain.read_record()
    renew(chain)
    renewed = [name for name in RECORDED if "settings" in chain.recorded(name)]
    assert renewed == ["sft", "select", "handoff"]  # the probe and GRPO name the reward


def test_two_chains_with_one_old_cold_start(tmp_path):
    """The first chain rewrites the record of SFT, and the second one still knows its own."""
    first = old_run(tmp_path)
    second = make(first.path, output_dir=str(tmp_path / "runs/one"))
    second.read_record()
    first.read_record()
    renew(first)
    files.write_json(first.run / files.CHAIN, second.record)
    renew(second)
    assert all(second.recorded(stage.name)["inputs"] == inputs.fingerprint for stage, inputs in walk(second))
