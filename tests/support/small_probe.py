"""A tiny model with rows and rewards to probe: what tests of `aesl probe` share."""

import hashlib
import json
from pathlib import Path

from aesl_trl import files
from aesl_trl.evaluation import probe


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


def run(project, *checkpoints, **changes) -> dict:
    target = project.folder / "out" / files.READINESS
    probe.main([*(checkpoints or [project.model]), *project(**changes)])
    return json.loads(target.read_text())


def digest(folder) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).iterdir()}


def probe_tokenizer(project):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(project.model)
