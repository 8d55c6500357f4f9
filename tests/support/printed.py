"""Run Python as it is printed in a page or an example, with a small model, small sizes and no hub."""

import re
from pathlib import Path

import datasets
import trl

import aesl_trl
import aesl_trl.training.trainer  # before shrink: its config is made from TRL's own class


CPU = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "logging_steps": 1,
}
SFT = {"max_steps": 4, "per_device_train_batch_size": 2}
DIVERSITY = {
    "diversity_steps": 2,
    "diversity_num_prompts": 3,
    "diversity_num_samples": 2,
    "diversity_max_new_tokens": 12,
}
GRPO = {
    "max_steps": 1,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "num_generations": 4,
    "max_completion_length": 12,
}


def blocks(page: str | Path, language: str = "python") -> list[str]:
    """Return the fenced blocks of a language in a page, in their order."""
    return re.findall(rf"^```{language}\n(.*?)^```", Path(page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def swapped(text: str, swaps: dict[str, object]) -> str:
    """Return `text` with each key replaced by its value; a key that `text` does not hold is a mistake of the test."""
    for old, new in swaps.items():
        assert old in text, old
        text = text.replace(old, str(new))
    return text


def shrink(monkeypatch, rows: list[dict], **settings) -> None:
    """Let configs take small sizes on CPU, whatever they are given, and let every dataset's name stand for `rows`."""

    def small(config, sizes):
        def make(**given):
            measured = DIVERSITY if "diversity_steps" in given else {}
            return config(**{**given, **CPU, **sizes, **measured, **settings})

        return make

    for module, name, sizes in (
        (trl, "SFTConfig", SFT),
        (trl, "GRPOConfig", GRPO),
        (aesl_trl, "AESLSFTConfig", SFT),
    ):
        monkeypatch.setattr(module, name, small(getattr(module, name), sizes), raising=False)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: datasets.Dataset.from_list(rows))


def run_printed(source: str, name: str | Path, found: dict | None = None) -> dict:
    """Run `source`, which stands in the file `name`, and return its variables. `found` are those it starts with."""
    variables = {"__name__": "__main__"} if found is None else found
    exec(compile(source, str(name), "exec"), variables)
    return variables
