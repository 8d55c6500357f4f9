"""probe: what GRPOTrainer's own evaluation shows of a tiny model, that nothing changes by it, and what is refused."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny_models import build_model

from aesl_trl import files
from aesl_trl.diversity.readiness import READY
from aesl_trl.diversity.selection import select_run
from aesl_trl.errors import InputError
from aesl_trl.evaluation import probe, probe_trainer


REWARDS = """
def label(completions, label, **kwargs):
    assert "aesl_row" not in kwargs
    return list(label)

def length(completions, **kwargs):
    return [float(len(completion) % 2) for completion in completions]

def stream(completions, none):
    return [0.0] * len(completions)
"""
ROWS = [{"prompt": f"{number} + 1 =", "label": float(number % 3)} for number in range(70)]


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


def run(project, *checkpoints, **changes) -> dict:
    target = project.folder / "out" / files.READINESS
    probe.main([*(checkpoints or [project.model]), *project(**changes)])
    return json.loads(target.read_text())


def digest(folder) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).iterdir()}


# ---- Measuring


def test_figures_are_trls_own_and_nothing_changes(project, spied, capsys):
    files_before = digest(project.model)
    result = run(project, num_prompts=64)
    (found,), (before, after) = result["checkpoints"], spied["weights"][0]
    assert all(torch.equal(before[name], after[name]) for name in before) and before.keys() == after.keys()
    assert digest(project.model) == files_before
    log, figures = spied["log"][0], found["figures"]
    assert figures["signal"] == pytest.approx(1 - log["eval_frac_reward_zero_std"], abs=1e-12)
    assert figures["reward"] == pytest.approx(log["eval_reward"], abs=1e-6)
    assert figures["truncated"] == pytest.approx(log["eval_completions/clipped_ratio"], abs=1e-6)
    assert figures["length"] == pytest.approx(log["eval_completions/mean_length"], abs=1e-5)
    assert figures["entropy"] == pytest.approx(log["eval_entropy"], rel=1e-5)
    assert 0 < figures["signal"] and figures["truncated"] > 0.5  # an untrained model seldom ends
    assert found["text"] == "never stops: fix eos" and found["rl"] is None
    assert (result["num_prompts"], result["num_samples"], result["temperature"]) == (64, 8, 1.0)
    assert found["path"] == "../model"
    printed = capsys.readouterr().out
    assert "never stops: fix eos" in printed and printed.splitlines()[-1].endswith("out/readiness.json")


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_tokens_against_plain_logits(project, spied, temperature):
    """Entropy, -log p and P(eos) of the model itself, also where it samples at another temperature."""
    run(project, num_prompts=64, temperature=temperature)
    model = spied["models"][0].double()
    eos, pad = model.generation_config.eos_token_id, model.generation_config.pad_token_id
    tokenizer = probe_tokenizer(project)
    groups = {index: iter(range(8)) for index in range(64)}
    ended = 0
    for sample in spied["samples"]:
        group, place = spied["groups"][sample["row"]], next(groups[sample["row"]])
        prompt = tokenizer(ROWS[sample["row"]]["prompt"])["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + sample["ids"]])).logits[0, len(prompt) - 1 : -1]
        log_probs = logits.log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1).mean().item()
        chosen = log_probs.gather(1, torch.tensor(sample["ids"])[:, None])
        ends = log_probs[:, eos].exp()
        cut = sample["ids"][-1] not in (eos, pad)
        ended += not cut
        assert group.truncated[place] == cut and group.num_tokens[place] == len(sample["ids"])
        assert group.entropy[place] == pytest.approx(entropy, abs=1e-5)
        assert group.neg_log_prob[place] == pytest.approx(-chosen.mean().item(), abs=1e-5)
        assert group.eos_prob[place] == pytest.approx((ends.max() if cut else ends[-1]).item(), abs=1e-6)
    assert 0 < ended < len(spied["samples"]) == 512


def probe_tokenizer(project):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(project.model)


def test_samples_belong_to_their_prompts(project, spied):
    """The trainer shuffles prompts and draws them in batches: the rewards say whose each sample is."""
    run(project, reward_funcs=["rewards.py:label", "rewards.py:length"], num_prompts=70, batch_size=128)
    groups = spied["groups"]
    assert [group.prompt for group in groups] == [row["prompt"] for row in ROWS]
    for group, row in zip(groups, ROWS, strict=True):
        assert [sample[0] for sample in group.rewards] == [row["label"]] * 8
        assert [sample[1] for sample in group.rewards] == [len(text) % 2 for text in group.completions]


def test_a_probe_repeats_itself(project):
    first, second = (run(project) for _ in range(2))
    for result in (first, second):
        del result["checkpoints"][0]["seconds"]
    assert first == second
    assert run(project, seed=1)["checkpoints"][0]["figures"] != first["checkpoints"][0]["figures"]


def test_fewer_prompts_in_the_data_are_all_taken(project, capsys):
    lines = (project.folder / "rows.jsonl").read_text().splitlines(keepends=True)
    (project.folder / "rows.jsonl").write_text("".join(lines[:9]))
    assert run(project, batch_size=8)["num_prompts"] == 9
    assert "only 9 prompts" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_share_the_prompts(project):
    """560 samples in batches of 2 x 64: the last is filled up with prompts from the beginning, which count once."""
    flags = project(reward_funcs=["rewards.py:label"], num_prompts=70, batch_size=64)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "aesl_trl.evaluation.probe", project.model, *flags]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads((project.folder / "out" / files.READINESS).read_text())
    figures = result["checkpoints"][0]["figures"]
    assert result["num_processes"] == 2 and done.stdout.count("never stops: fix eos") == 1
    assert figures["pass@1"] == sum(row["label"] >= 1 for row in ROWS) / 70
    assert figures["reward"] == sum(row["label"] for row in ROWS) / 70 and figures["signal"] == 0


def test_an_adapter_is_probed_on_its_base(project, spied):
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(project.model)
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    model.peft_config["default"].base_model_name_or_path = project.model
    adapter, merged = project.folder / "adapter", project.folder / "merged"
    model.save_pretrained(adapter)
    tokenizer = probe_tokenizer(project)
    tokenizer.save_pretrained(adapter)
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(project.model), adapter).merge_and_unload()
    whole.save_pretrained(merged)
    tokenizer.save_pretrained(merged)
    before = digest(adapter)
    # use_peft stands in many a GRPO config: a new adapter is for RL, not for the measurement
    result = run(project, str(adapter), str(merged), project.model, use_peft=True)
    first, second, third = result["checkpoints"]
    assert [one["name"] for one in result["checkpoints"]] == ["adapter", "merged", "model"]
    assert first["figures"] == pytest.approx(second["figures"], rel=1e-4)
    assert first["figures"] != pytest.approx(third["figures"], rel=1e-4)
    assert digest(adapter) == before
    assert all(torch.equal(old[name], new[name]) for old, new in spied["weights"] for name in old)


def test_a_short_rl_run_of_equal_budget(project, spied):
    result = run(
        project,
        eval_dataset_name="held_out.jsonl",
        rl_steps=2,
        learning_rate=1e-2,
        per_device_train_batch_size=8,
        lr_scheduler_type="constant",
    )
    rl = result["checkpoints"][0]["rl"]
    assert rl["steps"] == 2 and result["rl_steps"] == 2
    low, high = rl["reward_interval"]
    assert low <= rl["reward"] <= high
    difference, low, high = rl["pass@1_change"]
    assert low <= difference <= high
    assert difference == pytest.approx(rl["pass@1"] - result["checkpoints"][0]["figures"]["pass@1"], abs=1e-12)
    (before, untrained), (trained, after) = spied["weights"]
    assert all(torch.equal(before[name], untrained[name]) for name in before)
    assert any(not torch.equal(before[name], trained[name]) for name in before)
    assert all(torch.equal(trained[name], after[name]) for name in before)
    assert [group.prompt for group in spied["groups"]][0] == "now 0 + 1 ="


# ---- Runs and their candidates


def sft_run(project, steps=(10, 20)) -> Path:
    """An SFT folder with candidates of different weights and a diversity series."""
    folder = project.folder / "sft"
    rows = [{"step": step, "entropy": 1.0 / (step + 1), "groups_mixed": 0.5} for step in (0, *steps)]
    files.write_jsonl(folder / files.DIVERSITY, rows)
    tokenizer = probe_tokenizer(project)
    for step in steps:
        candidate = folder / files.CANDIDATES / f"step-{step}"
        shutil.copytree(project.model, candidate)
        build_model(tokenizer, seed=step).save_pretrained(candidate)
    return folder


def test_a_run_stands_for_its_candidates(project, monkeypatch):
    folder = sft_run(project)
    probe.main([str(folder), *project(output=...)])
    found = json.loads((folder / files.READINESS).read_text())
    assert [(one["step"], one["path"]) for one in found["checkpoints"]] == [
        (10, "candidates/step-10"),
        (20, "candidates/step-20"),
    ]
    selection = select_run(folder, rule="readiness")  # no untrained model is ready
    assert selection["applied"] == "last" and "no candidate is ready (2 never stops)" in selection["reason"]
    for one in found["checkpoints"]:
        one["verdict"] = READY
    files.write_json(folder / files.READINESS, found)
    selection = select_run(folder, rule="readiness")
    best = max(found["checkpoints"], key=lambda one: (one["figures"]["signal"], one["figures"]["variance"]))
    assert (selection["applied"], selection["step"]) == ("readiness", best["step"])


def test_where_a_checkpoint_comes_from(project, monkeypatch):
    folder = sft_run(project)
    for name in ("checkpoint-20", "selected", "handoff"):
        shutil.copytree(project.model, folder / name)
    files.write_json(folder / files.SELECTION, {"step": 10, "path": "selected"})
    expected = {"candidates/step-20": 20, "checkpoint-20": 20, "selected": 10, "handoff": 10}
    for name, step in expected.items():
        (found,) = probe.find_checkpoints(str(folder / name))
        assert (found.run.resolve(), found.step) == (folder, step), name
        history = probe.history_of(found)
        assert (history.step, [row["step"] for row in history.rows], history.candidates) == (
            step,
            [0, 10, 20],
            [10, 20],
        )
    (found,) = probe.find_checkpoints(project.model)
    assert (found.run, found.step, probe.history_of(found)) == (None, None, None)


def test_two_of_the_same_name_get_their_folder_before_it(project):
    folder = sft_run(project)
    shutil.copytree(folder, project.folder / "other")
    paths = [str(project.folder / name / "candidates/step-10") for name in ("sft", "other")]
    found = probe.with_unique_names([one for path in (*paths, project.model) for one in probe.find_checkpoints(path)])
    assert [one.name for one in found] == ["sft/step-10", "other/step-10", "model"]


# ---- What is refused, before a model loads


def torn(project) -> str:
    path = Path(project.model) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    return project.model


def lost_base(project) -> str:
    adapter = project.folder / "adapter"
    adapter.mkdir()
    shutil.copy(Path(project.model) / "model.safetensors", adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(project.folder / "gone")})
    )
    return str(adapter)


RL = {"rl_steps": 2, "eval_dataset_name": "held_out.jsonl"}
REFUSED = {
    "no checkpoint": ([], {}, "which checkpoint?", "aesl probe CHECKPOINT"),
    "misspelt folder": (["modl"], {}, "modl is not a folder", "did you mean 'model'"),
    "torn weights": (torn, {}, "model.safetensors is cut off"),
    "lost base": (lost_base, {}, "gone, which is not there"),
    "unknown key": (None, {"num_promts": 64}, "unknown key 'num_promts'", "did you mean 'num_prompts'"),
    "float": (None, {"rl_steps": 2.5}, "rl_steps must be int, got the float 2.5"),
    "few prompts": (None, {"num_prompts": 8}, "num_prompts is 8, but must be at least 64"),
    "few samples": (None, {"num_samples": 4}, "num_samples is 4, but must be at least 8"),
    "batch": (None, {"batch_size": 20}, "multiple of num_samples (8), such as 16"),
    "no batch": (None, {"batch_size": 0}, "multiple of num_samples (8), such as 8"),
    "negative RL": (None, {"rl_steps": -1}, "rl_steps is -1, but must be at least 0"),
    "no prompts": (None, {"dataset_name": ...}, "dataset_name is missing"),
    "lost prompts": (None, {"dataset_name": "row.jsonl"}, "row.jsonl does not exist", "'rows.jsonl'"),
    "no rewards": (None, {"reward_funcs": ...}, "reward_funcs is missing"),
    "reward's column": (None, {"reward_funcs": ["rewards.py:stream"]}, "needs 'none'"),
    "nothing held out": (None, {"rl_steps": 2}, "rl_steps needs eval_dataset_name"),
    "RL at rate 0": (None, {**RL, "learning_rate": 0.0}, "rl_steps needs a learning_rate above 0"),
    "trained on": (None, {**RL, "eval_dataset_name": "rows.jsonl"}, "64 of 64 prompts of eval_dataset_name are in"),
    "adapter twice": (None, {**RL, "use_peft": True, "lora_r": 0}, "lora_r is 0, but must be at least 1"),
    "output": (None, {"output": "rows.jsonl/out"}, "rows.jsonl", "is a file"),
    "temperature": (None, {"temperature": 0.0}, "temperature is 0.0, but must be above 0"),
}


@pytest.mark.parametrize("checkpoints, changes, parts", [(a, b, c) for a, b, *c in REFUSED.values()], ids=REFUSED)
def test_refusals(project, monkeypatch, checkpoints, changes, parts):
    monkeypatch.setattr(probe, "probe", lambda *_: pytest.fail("a model was loaded"))
    if checkpoints is None:
        names = [project.model]
    else:
        names = [checkpoints(project)] if callable(checkpoints) else [str(project.folder / one) for one in checkpoints]
    with pytest.raises(InputError) as error:
        probe.main([*names, *project(**changes)])
    assert all(part in str(error.value) for part in parts), str(error.value)
    assert not (project.folder / "out").exists()
