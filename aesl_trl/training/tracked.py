"""What a tracker shows first of a measurement: four summary charts, and the samples as a table.

transformers writes `train/` before every name that `Trainer.log` is given, so a measurement's figures stand there as
`train/diversity/...`, among some fifty other charts. We log four of them once more as `diversity/summary/...`, which
wandb, trackio and tensorboard sort before `eval/` and `train/`. The trackers get them directly, as TRL does it with
GRPO's completions. Other trackers have the names below `train/` alone.
"""

import math
from importlib import import_module
from typing import Any

from transformers.integrations import TensorBoardCallback

from ..diversity.figures import Group


# Name of the chart -> key of diversity.jsonl. TRL's `entropy` is that of the demonstrations: ours has another name.
SUMMARY = {"own_entropy": "entropy", "groups_mixed": "groups_mixed", "pass@1": "pass@1", "self_bleu": "self_bleu"}
RENAMED = {key: name for name, key in SUMMARY.items()}
WITH_TABLES = ("wandb", "trackio")  # by the names that `report_to` has for them
PROMPTS_SHOWN = 4


def logged_figures(figures: dict[str, float], intervals: dict[str, list]) -> dict[str, float]:
    """Return what `Trainer.log` gets: `diversity/NAME` of each figure, and interval ends of those in [`SUMMARY`]."""
    logs = {f"diversity/{RENAMED.get(key, key)}": value for key, value in figures.items()}
    for name, key in SUMMARY.items():
        for end, value in zip(("low", "high"), intervals.get(key) or (), strict=False):
            logs |= {f"diversity/intervals/{name}_{end}": value} if _is_known(value) else {}
    return logs


def track(trainer: Any, row: dict, groups: list[Group] | None) -> None:
    """Log the summary of a measurement, and a table of its samples, to the trackers that the trainer reports to."""
    charts = {f"diversity/summary/{name}": row[key] for name, key in SUMMARY.items() if _is_known(row.get(key))}
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            for name, value in charts.items():
                callback.tb_writer.add_scalar(name, value, row["step"])
    for name in WITH_TABLES:
        if name in trainer.args.report_to:
            tracker = import_module(name)
            if not _is_open(name, tracker):
                continue
            table = {"diversity/samples": _table(tracker, row["step"], groups)} if groups else {}
            tracker.log({**charts, **table, "train/global_step": row["step"]})


def _is_open(name: str, tracker: Any) -> bool:
    """Say whether the tracker has a run: wandb has none where it is turned off, and trackio none without `init`."""
    run = tracker.run if name == "wandb" else tracker.context_vars.current_run.get()
    return run is not None


def _is_known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _table(tracker: Any, step: int, groups: list[Group]) -> Any:
    """Return the samples of the first prompts as the tracker's own table, a sample a row."""
    import pandas as pd

    rows = [
        {"step": step, "prompt": str(group.prompt), "completion": text, "rewards": str(rewards or "")}
        for group in groups[:PROMPTS_SHOWN]
        for text, rewards in zip(group.completions, group.rewards or [None] * len(group.completions), strict=True)
    ]
    return tracker.Table(dataframe=pd.DataFrame(rows))
