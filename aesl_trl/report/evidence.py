"""The report's last chapter: the objects that the stages wrote, as they wrote them, the runs side by side."""

from collections.abc import Callable
from typing import Any

from .. import files
from .parts import Cell, Section, Table, clip
from .runs import Arm, Run


def evidence(arms: list[Arm]) -> Section:
    selection = arms[0].runs[0].selection
    see = "No checkpoint was selected in this run."
    if start := files.chosen(selection):
        see = f"Why {start} went to RL: {selection.get('reason') or ''}"
    omitted = ("candidates", "evidence", "path", "identity")
    return Section(
        "evidence",
        "Selection and settings",
        see,
        gap=_missing(arms),
        tables=[
            ("Selection", _side_by_side(arms, lambda run: run.selection, omitted), True),
            ("Handoff checks", _side_by_side(arms, lambda run: run.handoff, ("template",)), True),
            ("Evidence of the selection", _side_by_side(arms, lambda run: run.selection.get("evidence") or {}), False),
            ("SFT settings", _side_by_side(arms, lambda run: run.sft, ("versions",)), False),
            ("RL settings", _side_by_side(arms, lambda run: run.grpo, ("versions",)), False),
            ("Stages", _side_by_side(arms, _stages), False),
            ("Versions", _side_by_side(arms, lambda run: run.versions), False),
        ],
    )


def _missing(arms: list[Arm]) -> str:
    """Return which files are not there; arms that lack the same ones are named together."""
    lacking: dict[str, list[str]] = {}
    for arm in arms:
        if arm.runs[0].missing:
            lacking.setdefault(", ".join(arm.runs[0].missing), []).append(arm.label)
    parts = [f"{', '.join(labels)}: {names}" for names, labels in lacking.items()]
    return f"Missing in {'; in '.join(parts)}." if parts else ""


def _stages(run: Run) -> dict:
    """Return each stage's status and seconds as the chain wrote them, without the report's own."""
    texts = {}
    for name, facts in (run.chain.get("stages") or {}).items():
        if name != "report":
            seconds = (facts or {}).get("seconds")
            texts[name] = str((facts or {}).get("status", "?")) + ("" if seconds is None else f", {seconds:.0f} s")
    return texts


def _side_by_side(arms: list[Arm], of: Callable[[Run], dict], without: tuple[str, ...] = ()) -> Table:
    """Return a row for each setting, and a column for each arm's first run that has settings."""
    found = [(arm, _flat({k: v for k, v in of(arm.runs[0]).items() if k not in without})) for arm in arms]
    found = [(arm, texts) for arm, texts in found if texts]
    keys = dict.fromkeys(key for _, texts in found for key in texts)
    names = [arm.label + (" (recorded)" if arm.recorded else "") for arm, _ in found]
    rows = [[Cell(key), *(Cell(texts.get(key, "–")) for _, texts in found)] for key in keys]
    return Table(["", *names], rows, texts=len(names) + 1)


def _flat(value: dict, prefix: str = "") -> dict[str, str]:
    """Return nested objects as dotted names -> short texts."""
    flat: dict[str, str] = {}
    for key, item in value.items():
        if isinstance(item, dict) and item:
            flat |= _flat(item, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = clip(_text(item), 300)[0]
    return flat


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(_text, value)) if isinstance(value, list) else str(value)
