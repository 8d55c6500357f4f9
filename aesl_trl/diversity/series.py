"""diversity.jsonl as a series: its rows by step, their turning point, and the settings that all of them must share."""

import hashlib
import json
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .. import files
from ..errors import InputError
from ..values import without_none
from .figures import Group
from .turning_point import Selection, find_turning_point


# The figures whose turning point is looked for, and on which side of the figure diversity is highest.
METRICS = {"entropy": "max", "self_bleu": "min"}
# Rows that differ in one of these settings measure different things: their figures are no series.
SETTINGS = ("num_prompts", "num_samples", "temperature", "max_new_tokens", "backend", "entropy_estimator", "prompts")
# Keys of a row that are not logged as figures.
NOT_FIGURES = ("step", "seed", "gap", "intervals", "by_prompt", "token_budget", "asked", "batch_size", *SETTINGS)


def by_step(rows: Iterable[dict]) -> dict[int, dict]:
    """Return the rows by step, in order. Of a step measured twice (a resumed run), the later row counts.

    Raises:
        InputError: a row has no whole number `step`.
    """
    found = {}
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("step"), int):
            raise InputError(f"{files.DIVERSITY}, row {number} has no whole number 'step': {row.get('step')!r}")
        by_prompt = row.get("by_prompt") or {}
        if not isinstance(by_prompt, dict):
            raise InputError(f"{files.DIVERSITY}, row {number}: 'by_prompt' is no object")
        for name in (*METRICS, "pass@1", "groups_mixed"):
            values = by_prompt.get(name) or []
            if not isinstance(values, list) or not all(map(_is_figure, values)):
                raise InputError(f"{files.DIVERSITY}, row {number}: {name!r} of 'by_prompt' is no list of numbers")
            if not _is_figure(row.get(name)):
                raise InputError(f"{files.DIVERSITY}, row {number}: {name!r} is no number: {reprlib.repr(row[name])}")
        found[row["step"]] = row
    return dict(sorted(found.items()))


def _is_figure(value: Any) -> bool:
    """Say whether a value of a file is a number that a float can hold, or unknown."""
    return value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**1000)


def turning_point_of(rows: Iterable[dict], metric: str, patience: int = 3) -> Selection:
    """Return the turning point of `metric` in rows of diversity.jsonl, by [`~turning_point.find_turning_point`]."""
    measured = by_step(rows)
    return find_turning_point(
        list(measured),
        [row.get(metric) for row in measured.values()],
        mode=METRICS[metric],
        patience=patience,
        by_prompt=[(row.get("by_prompt") or {}).get(metric) for row in measured.values()],
    )


def check_settings(rows: Iterable[dict], where: str | Path = files.DIVERSITY) -> None:
    """Refuse rows that were measured in different ways. A row that lacks a setting (an older version's) agrees.

    Raises:
        InputError: one line with the setting, both values and the steps.
    """
    first = {}
    for row in rows:
        for name in SETTINGS:
            value = row.get(name)
            if value is None:
                continue
            step, known = first.setdefault(name, (row["step"], value))
            if value != known:
                raise InputError(
                    f"{where}: {name} is {known!r} at step {step} and {value!r} at step {row['step']}: figures "
                    "measured in different ways are no series; measure all steps with the same settings"
                )


def prompts_digest(prompts: list[dict]) -> str:
    """Return a hash of the prompts and the columns that rewards read. Keys without a value do not count."""
    text = json.dumps(without_none(prompts), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_prompts(folder: Path, step: int, prompts: list[dict]) -> None:
    """Refuse to go on at `step` with other prompts than those that the series in `folder` was measured on.

    Raises:
        InputError: one line with the first prompt that differs.
    """
    path = folder / files.DIVERSITY
    rows = [row for row in (files.read_jsonl(path) if path.exists() else []) if row["step"] <= step]
    if not rows or "num_prompts" not in rows[-1]:
        return
    row, measured = rows[-1], prompts[: rows[-1]["num_prompts"]]
    samples = folder / files.SAMPLES / f"step-{row['step']}.jsonl"
    before = [sample["prompt"] for sample in files.read_jsonl(samples)] if samples.exists() else None
    if row.get("prompts") == prompts_digest(measured) or (row.get("prompts") is None and before is None):
        return
    pairs = list(zip(before or [], [prompt["prompt"] for prompt in measured], strict=False))
    place = next((place for place, (old, new) in enumerate(pairs) if old != new), None)
    if place is not None:
        old, new = (_last_words(prompt) for prompt in pairs[place])
        problem = f"prompt {place} (from 0) is {new!r}, it was {old!r}"
    elif row.get("prompts") is None:  # of an older version, and the prompts are the same
        return
    else:
        problem = "their number, or a column beside the prompts, is another"
    raise InputError(
        f"{path}: the diversity of the steps so far was measured on other prompts: {problem}. Go on with the same "
        "prompts, or train anew in another output_dir"
    )


def _last_words(prompt: str | list[dict], limit: int = 60) -> str:
    text = prompt if isinstance(prompt, str) else str(prompt[-1].get("content"))
    return text if len(text) <= limit else f"...{text[-limit:]}"


def nearest_step(step: int, saved: Iterable[int]) -> int:
    """Return the saved step that is nearest to `step`, and of two equally near the earlier."""
    return min(saved, key=lambda candidate: (abs(candidate - step), candidate))


def base_groups(folder: Path, prompts: list) -> list[Group] | None:
    """Return the samples of step 0 in an SFT folder, by prompt; None where step 0 has no samples of these prompts."""
    path = folder / files.SAMPLES / "step-0.jsonl"
    if not path.exists():
        return None
    groups = [Group.from_row(row, f"{path}, row {number}") for number, row in enumerate(files.read_jsonl(path), 1)]
    return groups if [group.prompt for group in groups] == prompts else None
