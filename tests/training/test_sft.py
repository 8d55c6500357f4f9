"""`python -m aesl_trl.sft`: the command as a user runs it."""

import json
import os
import subprocess
import sys

import datasets
import preloaded
import pytest
import yaml
from tiny_models import build_tokenizer
from transformers import OPTConfig, OPTForCausalLM, PreTrainedModel

from aesl_trl import cli, files


ROWS = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(24)]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def config(tmp_path, tiny_model_dir):
    """A config beside its data; paths in it are relative to it."""
    write_rows(tmp_path / "train.jsonl", ROWS)
    write_rows(tmp_path / "held_out.jsonl", [{**row, "prompt": "9" + row["prompt"]} for row in ROWS[:4]])
    (tmp_path / "reward.py").write_text(
        "def has_digit(prompts, completions, **kwargs):\n"
        "    return [float(any(c.isdigit() for c in text)) for text in completions]\n",
        encoding="utf-8",
    )
    return {
        "model_name_or_path": tiny_model_dir,
        "dataset_name": "train.jsonl",
        "eval_dataset_name": "held_out.jsonl",
        "reward_funcs": ["reward.py:has_digit"],
        "output_dir": "out",
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "diversity_steps": 2,
        "diversity_samples": 2,
        "diversity_max_new_tokens": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }


def run_sft(tmp_path, config, *flags, launcher=(sys.executable,), **env):
    """Run `LAUNCHER -m aesl_trl.sft` as a user does; without a launcher, by a process that has the libraries."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    command = ["-m", "aesl_trl.sft", "--config", str(path), *flags]
    if not launcher:
        return preloaded.run(command, timeout=280)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **env}
    return subprocess.run([*launcher, *command], capture_output=True, text=True, env=environment, timeout=280)


def test_a_run_writes_what_the_other_stages_read(tmp_path, config):
    done = run_sft(tmp_path, config, "--seed", "3", launcher=())
    assert done.returncode == 0, done.stderr
    assert "is deprecated" not in done.stderr and "own samples" not in done.stderr  # no bar where there is no terminal
    out = tmp_path / "out"
    series = files.read_jsonl(out / files.OWN / files.DIVERSITY)
    assert [row["step"] for row in series] == [0, 2, 4]
    assert all(0 <= row["pass@1"] <= 1 for row in series)
    samples = out / files.OWN / files.SAMPLES
    assert {path.name for path in samples.iterdir()} == {f"step-{n}.jsonl" for n in (0, 2, 4)}
    selection = files.read_json(out / files.OWN / files.SELECTION)
    assert (selection["rule"], selection["applied"], selection["step"]) == (
        "turning_point",
        "last",
        4,
    )  # no peak in 3 steps
    assert (out / files.OWN / selection["path"] / "model.safetensors").exists()
    assert not list(out.rglob("candidates/*/training_args.bin"))
    run = files.read_json(out / files.OWN / files.RUN)
    assert (run["seed"], run["cold_start_loss"], run["num_processes"]) == (3, "aesl", 1)
    logs = files.read_json(out / files.OWN / files.TRAINER_STATE)["log_history"]
    assert sum("nll" in row and "loss" in row for row in logs) == 4
    assert sum("eval_nll" in row for row in logs) == 2
    assert sum("diversity/own_entropy" in row for row in logs) == 3
    assert [row["step"] for row in files.read_jsonl(out / files.OWN / files.POSITIONS)] == [1, 2, 3, 4]


def test_two_processes(tmp_path, config):
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    config["per_device_train_batch_size"] = 2
    done = run_sft(tmp_path, config, launcher=launcher, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr[-2000:]
    assert files.read_json(tmp_path / "out" / files.OWN / files.RUN)["num_processes"] == 2
    series = files.read_jsonl(tmp_path / "out" / files.OWN / files.DIVERSITY)
    assert [row["step"] for row in series] == [0, 2, 4]
    assert all(row["num_prompts"] == 4 for row in series)
    samples = files.read_jsonl(tmp_path / "out" / files.OWN / files.SAMPLES / "step-4.jsonl")
    assert [row["prompt"] for row in samples] == [f"9{n} + 1 =" for n in range(4)]


def one_line(code, stderr):
    lines = [line for line in stderr.splitlines() if line.startswith("aesl sft:")]
    assert code == 2, stderr
    assert len(lines) == 1 and "Traceback" not in stderr
    return lines[0]


@pytest.fixture
def refused(tmp_path, config, monkeypatch, capsys):
    """Run `aesl sft` in this process, which has the libraries already, and return the line that refuses the config."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def run(change, *flags):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({**config, **change}), encoding="utf-8")
        with pytest.raises(SystemExit) as exit:
            cli.main(["sft", "--config", str(path), *flags])
        return one_line(exit.value.code, capsys.readouterr().err)

    return run


def test_the_command_refuses_in_one_line(tmp_path, config):
    done = run_sft(tmp_path, {**config, "t_scalling": 3.0})
    assert "t_scaling" in one_line(done.returncode, done.stderr)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"t_scalling": 3.0}, ("t_scalling", "t_scaling")),
        ({"t_scaling": 0.0}, ("t_scaling", "above 0")),
        ({"t_scaling": None}, ("t_scaling", "None", "auto")),
        ({"prefix_mode": "inclusiv"}, ("prefix_mode", "inclusive")),
        ({"diversity_samples": 1}, ("diversity_num_samples", "at least 2")),
        ({"loss_type": "dft"}, ("loss_type", "cold_start_loss")),
        ({"dataset_name": "trian.jsonl"}, ("dataset_name", "train.jsonl")),
        ({"reward_funcs": ["reward.py:has_digits"]}, ("reward.py", "has_digit")),
        ({"model_name_or_path": "./nowhere"}, ("model_name_or_path", "nowhere")),
        ({"eval_dataset_name": None, "eval_strategy": "no"}, ("eval_dataset_name",)),
    ],
)
def test_bad_values_end_in_one_line_before_any_model_loads(tmp_path, refused, monkeypatch, change, parts):
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    line = refused(change)
    assert all(part in line for part in parts), line
    assert not (tmp_path / "out").exists()


def test_lengths_beyond_the_models_positions_end_in_one_line_before_any_model_loads(tmp_path, refused, monkeypatch):
    """OPT has a table of positions: beyond it an index would be out of range, and on a GPU the process would end."""
    tokenizer, widths = build_tokenizer(), {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 16}
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    config = OPTConfig(**widths, **ids, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=16)
    for part in (OPTForCausalLM(config), tokenizer):
        part.save_pretrained(tmp_path / "opt")
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    model = {"model_name_or_path": str(tmp_path / "opt")}
    line = refused({**model, "diversity_max_new_tokens": 12})
    assert "diversity_max_new_tokens=12" in line and "16 positions" in line
    write_rows(tmp_path / "train.jsonl", [*ROWS, {"prompt": "9 + 9 =", "completion": " 18, as one knows"}])
    line = refused(model)
    assert f"row {len(ROWS)} (from 0) has 25 tokens" in line and "max_length to 16" in line


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ([], ("dataset_name", "empty")),
        ([{"question": "1 + 1 ="}], ("dataset_name", "prompt")),
        ([*ROWS[:3], {"prompt": "1 + 1 =", "completion": None}], ("completion",)),
        ([{"prompt": "x" * 3000, "completion": " 2"}] * 4, ("max_length",)),
    ],
)
def test_bad_rows_end_in_one_line(tmp_path, refused, rows, parts):
    write_rows(tmp_path / "train.jsonl", rows)
    line = refused({}, "--max_length", "64")
    assert all(part in line for part in parts), line
