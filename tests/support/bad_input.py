"""A project of small files whose settings tests spoil, and the one line that a command must print about it."""

import json
import shutil
from pathlib import Path

import yaml
from small_chains import checkpoint
from tiny_models import build_model, build_tokenizer

from aesl_trl import cli


CONFIG, WEIGHTS = "config.json", "model.safetensors"


CPU = {
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "max_steps": 1,
    "per_device_train_batch_size": 4,
    "output_dir": "out",
}


REWARDS = """
import time

def fine(completions, **kwargs):
    return [0.0] * len(completions)

def raises(completions, **kwargs):
    return [1 / 0]

def returns_nothing(completions, **kwargs):
    pass

def nan_at_2(completions, **kwargs):
    return [0.0, 1.0, float("nan"), 0.0]

def one_for_all(completions, **kwargs):
    return [1.0]

def hangs(completions, **kwargs):
    time.sleep(600)
"""


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def user(text):
    return [{"role": "user", "content": text}]


class Project:
    """A user's folder: data, rewards, and `out`, which an earlier SFT run has left."""

    def __init__(self, folder: Path, model: str, adapter: str):
        self.folder, self.base, self.trained_adapter, self.out = folder, model, adapter, folder / "out"
        self.write("train.jsonl", lines({"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(8)))
        self.write("held_out.jsonl", lines({"prompt": f"{n} + 2 =", "completion": f" {n + 2}"} for n in range(4)))
        self.write("prompts.jsonl", lines({"prompt": user(f"say {letter}")} for letter in "abcdefgh"))
        self.write("rewards.py", REWARDS)
        self._leave_a_run()

    def _leave_a_run(self) -> None:
        run = {"stage": "sft", "cold_start_loss": "nll", "selection": "turning_point"}
        series = [{"step": step, "entropy": 1.0, "self_bleu": 0.5, "temperature": 1.0} for step in (0, 2)]
        samples = [{"prompt": "1 + 2 =", "completions": ["a"], "num_tokens": [1], "entropy": [5.5]}]
        self.write("out/run.json", json.dumps({**run, "versions": {"aesl_trl": "0.1.0"}}))
        self.write("out/diversity.jsonl", lines(series))
        self.write("out/trainer_state.json", json.dumps({"log_history": [{"step": 2, "eval_nll": 1.0}]}))
        self.write("out/samples/step-2.jsonl", lines(samples))
        self.write("out/selection.json", json.dumps({"rule": "turning_point", "step": 2, "path": "selected"}))
        for name in ("candidates/step-2", "selected"):
            shutil.copytree(self.base, self.out / name)
        checkpoint(self.out, 2)

    def write(self, name: str, content) -> str:
        """Write bytes, a text or rows to a file of the project; None removes the file."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.unlink()
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else lines(content), encoding="utf-8")
        return str(path)

    def config(self, name: str, values: dict, text: str = "") -> str:
        values = {key: value for key, value in values.items() if value is not ...}
        return self.write(name, yaml.safe_dump(values, sort_keys=False) + text)

    # ---- Something to break

    def model(self, files=None) -> str:
        """Copy the model, with other `files` in it, and return the folder."""
        shutil.copytree(self.base, self.folder / "model")
        for name, content in (files or {}).items():
            self.write(f"model/{name}", content)
        return str(self.folder / "model")

    def torn_model(self) -> str:
        return self.model({WEIGHTS: Path(self.base, WEIGHTS).read_bytes()[:5000]})

    def tokenizer(self, **changes) -> str:
        """Copy the model with a changed tokenizer, and return the folder."""
        folder = self.model({"tokenizer.json": None, "chat_template.jinja": None})
        tokenizer = build_tokenizer()
        for name, value in changes.items():
            setattr(tokenizer, name, value)
        tokenizer.save_pretrained(folder)
        return folder

    def adapter(self, base) -> str:
        """Copy the adapter, let it name another base, and return the folder."""
        folder = Path(shutil.copytree(self.trained_adapter, self.folder / "adapter"))
        config = json.loads((folder / "adapter_config.json").read_text())
        self.write("adapter/adapter_config.json", json.dumps({**config, "base_model_name_or_path": base}))
        return str(folder)

    def wide_model(self) -> str:
        folder = self.folder / "wide"
        build_model(build_tokenizer(), hidden_size=32).save_pretrained(folder)
        build_tokenizer().save_pretrained(folder)
        return str(folder)


def sft(*flags, write=None, text="", model=None, **changes):
    def arguments(project):
        for name, content in (write or {}).items():
            project.write(name, content)
        name = project.base if model is None else model(project)
        values = {"model_name_or_path": name, "dataset_name": "train.jsonl", **CPU, **changes}
        return ["sft", "--config", project.config("sft.yaml", values, text), *flags]

    return arguments


def train(content, **changes):
    return sft(write={"train.jsonl": content}, **changes)


def grpo(*, write=None, model=None, adapter=None, **changes):
    def arguments(project):
        for name, content in (write or {}).items():
            project.write(name, content)
        values = {"dataset_name": "prompts.jsonl", "reward_funcs": ["rewards.py:fine"], "num_generations": 4}
        values["model_name_or_path"] = project.base if model is None else model(project)
        if adapter is not None:
            values |= {"adapter_name_or_path": adapter(project), "model_name_or_path": ...}
        values |= {"max_completion_length": 4, **CPU, **changes}
        return ["grpo", "--config", project.config("grpo.yaml", values)]

    return arguments


def prompts(content, **changes):
    return grpo(write={"prompts.jsonl": content}, **changes)


def evaluate(model, *, write=None, **changes):
    def arguments(project):
        for name, content in (write or {}).items():
            project.write(name, content)
        values = {"dataset_name": "prompts.jsonl", "reward_funcs": ["rewards.py:fine"], "samples": 2, "use_cpu": True}
        values |= {"max_new_tokens": 4, "output": "out", **changes}
        return ["eval", model(project), "--config", project.config("eval.yaml", values)]

    return arguments


def only_line(stderr: str, command: str) -> str:
    """Check that `command` said one line, before which libraries may warn, and return the line."""
    name = f"aesl {command}" if command in cli.COMMANDS else "aesl"
    said = [line for line in stderr.splitlines() if line.startswith("aesl")]
    assert len(said) == 1 and said[0].startswith(f"{name}: "), stderr
    assert stderr.endswith(said[0] + "\n") and "Traceback" not in stderr
    return said[0]
