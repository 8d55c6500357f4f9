"""Candidates: weights of past steps, of which one is selected for RL; a bounded number of them is on disk."""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import files
from ..diversity.selection import EVAL_METRICS, METRICS
from ..values import check_bounds


@dataclass
class Candidates:
    """The candidates of a trainer's run."""

    trainer: Any
    metric: str  # of diversity, by which the most diverse candidates are kept
    best_eval_metric: str = field(metadata={"choices": tuple(EVAL_METRICS)})  # its best candidate is always kept
    max_candidates: int = field(metadata={"at_least": 2})  # on disk at a time

    def __post_init__(self):
        check_bounds(self)

    @property
    def folder(self) -> Path:
        """Folder of the candidates, which exists once there is one."""
        return files.own_folder(self.trainer.args.output_dir) / files.CANDIDATES

    def keep(self, step: int, series: list[dict]) -> None:
        """Save the weights of `step`, and drop the least promising candidates; `series` are the rows up to `step`."""
        target, saving = self.folder / f"step-{step}", self.folder / f".step-{step}.tmp"
        self.trainer.save_model(str(saving), _internal_call=True)  # an internal call does not push to the hub
        if self.trainer.args.should_save:
            (saving / "training_args.bin").unlink(missing_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(saving, target)
            saved = _steps(self.folder)
            for dropped in set(saved) - self._worth_keeping(list(saved), step, series):
                shutil.rmtree(saved[dropped])
        self.trainer.accelerator.wait_for_everyone()

    def _worth_keeping(self, saved: list[int], step: int, series: list[dict]) -> set[int]:
        """Return the last step, the best ones by evaluation, diversity and mixed groups, and then by diversity."""
        saved = sorted(saved)
        evaluations = (
            {row["step"]: -row["eval_nll"] for row in self.trainer.state.log_history if "eval_nll" in row}
            if self.best_eval_metric == "eval_nll"
            else {row["step"]: row.get(self.best_eval_metric) for row in series}
        )
        diversity = {row["step"]: row[self.metric] for row in series if row[self.metric] is not None}
        diverse = [candidate for candidate in saved if candidate in diversity]
        diverse.sort(key=diversity.get, reverse=METRICS[self.metric] == "max")

        def best(figures: dict[int, float | None]) -> list[int]:
            known = [candidate for candidate in saved if figures.get(candidate) is not None]
            return [max(known, key=figures.get)] if known else []

        mixed = best({row["step"]: row.get("groups_mixed") for row in series})
        wanted = dict.fromkeys([step, *best(evaluations), *diverse[:1], *mixed, *diverse])
        return set(list(wanted)[: self.max_candidates])


def forget_candidates(folder: Path, step: int) -> None:
    """Drop the candidates of a former run in this folder that lie behind `step`, all of them at step 0.

    Averages with the base go too.
    """
    for candidate, path in _steps(folder).items():
        if step == 0 or candidate > step:
            shutil.rmtree(path)
    saving = (path for path in folder.glob(".step-*.tmp") if path.name[6:-4].isdecimal())
    mixes = (path for path in folder.glob("mix-*") if files.is_mix(path.name))
    for path in [*saving, *mixes]:
        shutil.rmtree(path)


def _steps(folder: Path) -> dict[int, Path]:
    found = {path.name.removeprefix("step-"): path for path in folder.glob("step-*") if path.is_dir()}
    return {int(step): path for step, path in found.items() if step.isdecimal()}
