"""One of two processes fails: the other ends too, soon, and what is shown is the reason."""

import os
import subprocess
import sys
import time

import pytest
import yaml
from bad_input import CPU, lines, user


LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
# README: a lone mistake waits 10 s before it speaks; what is stuck in a collective is killed 30 s after SIGTERM
LIMIT_S = 45
# Rank 1 fails in its second step, when both are at work; `where` is the file that notes the moment
FAILS = """
import os, signal, time
from pathlib import Path

from aesl_trl.training.trainer import AESLSFTTrainer

real_step = AESLSFTTrainer.training_step

def training_step(self, *args, **kwargs):
    if self.state.global_step == 1 and os.environ["RANK"] == "1":
        Path({moment!r}).write_text(str(time.time()))
        {fails}
    return real_step(self, *args, **kwargs)

AESLSFTTrainer.training_step = training_step

def reward(completions, **kwargs):
    return [0.0] * len(completions)
"""
REWARD = """
import os, time
from pathlib import Path

def reward(completions, **kwargs):
    if os.environ["RANK"] == "{rank}" or "{rank}" == "any":
        Path({moment!r}).write_text(str(time.time()))
        return [1 / 0]
    return [0.0] * len(completions)
"""


def launch(folder, command, config):
    """The ended launcher, and the seconds from the failure to its end."""
    (folder / "config.yaml").write_text(yaml.safe_dump({**CPU, "max_steps": 4, **config}), encoding="utf-8")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    arguments = [*LAUNCHER, f"aesl_trl.{command}", "--config", str(folder / "config.yaml")]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=280)
    return done, time.time() - float((folder / "moment").read_text())


def said(done):
    return [line for line in done.stderr.splitlines() if line.startswith("aesl ")]


@pytest.mark.parametrize(
    ("fails", "shown"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "Signal 9 (SIGKILL)"),
        pytest.param("raise RuntimeError('boom')", "boom", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_dies_or_raises_ends_all(tmp_path, tiny_model_dir, fails, shown):
    moment = str(tmp_path / "moment")
    (tmp_path / "reward.py").write_text(FAILS.format(fails=fails, moment=moment), encoding="utf-8")
    rows = lines({"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(16))
    (tmp_path / "train.jsonl").write_text(rows, encoding="utf-8")
    config = {
        "model_name_or_path": tiny_model_dir,
        "dataset_name": "train.jsonl",
        "reward_funcs": ["reward.py:reward"],
    }
    done, seconds = launch(tmp_path, "sft", config)
    assert done.returncode != 0 and seconds < LIMIT_S
    assert shown in done.stderr and "rank      : 1" in done.stderr.split("Root Cause")[1]
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("rank", "suffix"), [("1", "(local rank 1)"), pytest.param("any", "'reward'", marks=pytest.mark.slow)]
)
def test_a_mistake_is_one_line_whichever_rank_finds_it(tmp_path, tiny_model_dir, rank, suffix):
    (tmp_path / "reward.py").write_text(REWARD.format(rank=rank, moment=str(tmp_path / "moment")), encoding="utf-8")
    rows = lines({"prompt": user(f"say {letter}")} for letter in "abcdefgh")
    (tmp_path / "prompts.jsonl").write_text(rows, encoding="utf-8")
    config = {"model_name_or_path": tiny_model_dir, "dataset_name": "prompts.jsonl", "num_generations": 4}
    config |= {"reward_funcs": ["reward.py:reward"], "max_completion_length": 4}
    done, seconds = launch(tmp_path, "grpo", config)
    assert done.returncode != 0 and seconds < LIMIT_S
    (line,) = said(done)
    assert "reward 'reward' raised ZeroDivisionError at" in line and suffix in line
