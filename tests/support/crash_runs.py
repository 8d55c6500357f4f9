"""What is killed: a small project of SFT, GRPO and a whole chain, and what must be equal however often it was struck.

test_crashes.py strikes single runs at chosen points (crash_script.py), scripts/soak.py chains at random moments.
"""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from aesl_trl import files


SUPPORT = Path(__file__).parent
ROOT = SUPPORT.parents[1]
REWARD = f"""
import sys
sys.path.append({str(SUPPORT)!r})
import crash_script
crash_script.install()
def has_digit(prompts, completions, **kwargs):
    return [float(any(c.isdigit() for c in str(text))) for text in completions]
"""
# Logs, measurements, saves and epochs (of 5 steps) never fall together for long; the last step is inside an epoch.
SFT = {
    "model_name_or_path": "model",
    "dataset_name": "train.jsonl",
    "eval_dataset_name": "held_out.jsonl",
    "reward_funcs": ["reward.py:has_digit"],
    "output_dir": "out",
    "max_steps": 9,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.01,
    "lr_scheduler_type": "constant",
    "diversity_steps": 2,
    "diversity_samples": 2,
    "diversity_max_new_tokens": 6,
    "selection": "best_eval",
    "max_candidates": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "logging_steps": 4,
    "save_strategy": "steps",
    "save_steps": 3,
    "save_total_limit": 2,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
}
GRPO = {
    **{key: value for key, value in SFT.items() if key in ("model_name_or_path", "reward_funcs", "output_dir")},
    "dataset_name": "train.jsonl",
    "max_steps": 6,
    "learning_rate": 0.01,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "max_completion_length": 6,
    "logging_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
}
# Of this call, or of this machine; the last two in a checkpoint's manifest, whose files hold times and the run's place
CLOCK = re.compile(
    "runtime|seconds|time_share|per_second|step_time|train_loss|total_flos|started|^trainer_state.json$|^training_args.bin$"
)
RESUMED = re.compile(r" --resume_from_checkpoint [\w/]*checkpoint-\d+")  # in a stage's command, as it was last started
OF_MODEL_FILES = re.compile("-[0-9a-f]{12}(?=/)")  # the names of folders of samples, which the files' times go into


def crash_project(folder: Path, model: str | Path) -> Path:
    """Write rows, a reward that lets crash_script.py strike, and the configs of SFT, GRPO and a chain to `folder`.

    The chain trains SFT in two processes under `accelerate launch`, GRPO in one.
    """
    (folder / "model").symlink_to(model)
    rows = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}", "solution": str(n + 1)} for n in range(20)]
    files.write_jsonl(folder / "train.jsonl", rows)
    files.write_jsonl(folder / "held_out.jsonl", [{**row, "prompt": "9" + row["prompt"]} for row in rows[:4]])
    (folder / "reward.py").write_text(REWARD)
    accelerate = ROOT / "recipes/accelerate_configs"
    evaluation = {"dataset_name": "held_out.jsonl", "reward_funcs": SFT["reward_funcs"], "samples": 4}
    configs = {
        "sft": SFT,
        "grpo": GRPO,
        "chain-sft": {**SFT, "per_device_train_batch_size": 2, "dataloader_num_workers": 1},
        "chain-grpo": {
            **GRPO,
            "reward_funcs": [*GRPO["reward_funcs"], "math_reward"],  # graded in child processes
            "max_completion_length": 16,
            "mask_truncated_completions": False,
        },
        "chain-eval": {**evaluation, "max_new_tokens": 16},
        "chain": {
            "probe": None,
            "output_dir": "chain",
            "sft": {"config": "chain-sft.yaml", "accelerate_config": str(accelerate / "cpu_2_processes.yaml")},
            "grpo": {"config": "chain-grpo.yaml", "accelerate_config": str(accelerate / "cpu.yaml")},
            "eval": {"config": "chain-eval.yaml"},
        },
    }
    for name, values in configs.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return folder


def chained(config: Path, out: Path, sleep_s: float = 0.0, **popen) -> subprocess.Popen:
    """Start `aesl chain`; each training step takes `sleep_s` seconds more."""
    command = [sys.executable, "-m", "aesl_trl.cli", "chain", "--config", str(config), "--output_dir", str(out)]
    env = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    env |= {"CRASH_FOLDER": str(out), "CRASH_SLEEP": str(sleep_s)}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, **popen}
    return subprocess.Popen(command, env={**os.environ, **env, **options.pop("env", {})}, **options)


def without_clock(value: Any) -> Any:
    """Return `value`, as JSON holds it, without what a clock has written."""
    if isinstance(value, dict):
        return {key: without_clock(item) for key, item in value.items() if not CLOCK.search(key)}
    return [without_clock(item) for item in value] if isinstance(value, list) else value


def contents(run: Path) -> dict[str, Any]:
    """Return every weight, JSON and JSONL file of a run by its name, and the names alone of all else but its log.

    Clock times, the place of the run itself and where a stage was resumed are left out. Of pickles, which Trainer
    resumes from, a checkpoint's manifest has the sums.
    """
    found = {}
    for path in sorted(path for path in run.rglob("*") if path.is_file() and path.suffix != ".log"):
        name = OF_MODEL_FILES.sub("", str(path.relative_to(run)))
        if path.name == "settings.json":
            found[name] = None
        elif path.suffix in (".json", ".jsonl"):
            read = files.read_json if path.suffix == ".json" else files.read_jsonl
            found[name] = RESUMED.sub("", str(without_clock(read(path))).replace(str(run), "RUN"))
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.suffix == ".safetensors" else None
    return found
