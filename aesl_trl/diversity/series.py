"""diversity.jsonl as a series: what its rows hold beside figures, and which settings all of them must share."""

from collections.abc import Iterable
from pathlib import Path

from .. import files
from ..errors import InputError


# Two rows that differ in one of these measure different things: their figures are no series
SETTINGS = ("num_prompts", "num_samples", "temperature", "max_new_tokens", "backend", "entropy_estimator")
# Not logged as figures
NOT_FIGURES = (
    *("step", "seed", "gap", "intervals", "by_prompt", "token_budget", "asked", "batch_size"),
    *SETTINGS,
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


def base_completions(folder: Path, prompts: list) -> list[list[str]] | None:
    """The samples of step 0 in an SFT folder, by prompt; None where there are none of the same prompts."""
    path = folder / files.SAMPLES / "step-0.jsonl"
    if not path.exists():
        return None
    rows = files.read_jsonl(path)
    if [row["prompt"] for row in rows] != prompts:
        return None
    return [row["completions"] for row in rows]
