"""The report's last chapter: why the checkpoint was selected, what the handoff checked, settings and versions.

Every object is shown as its stage wrote it, the runs side by side; nothing is judged here.
"""

from collections.abc import Callable
from typing import Any

from .parts import Cell, Section, Table, clip
from .runs import Arm, Run


def evidence(arms: list[Arm], k: int) -> Section:
    run = arms[0].runs[0]
    reason = str(run.selection.get("reason") or "")
    see = f"Why step {run.selection['step']} went to RL: {reason}" if run.selection.get("step") is not None else ""
    missing = [f"{arm.label}: {', '.join(arm.runs[0].missing)}" for arm in arms if arm.runs[0].missing]
    return Section(
        "evidence",
        "Selection and settings",
        see or "No checkpoint was selected in this run.",
        gap=f"Missing in {'; in '.join(missing)}." if missing else "",
        tables=[
            ("Selection", _side_by_side(arms, lambda r: r.selection, ("candidates", "evidence", "path")), True),
            ("Handoff checks", _side_by_side(arms, lambda r: r.handoff, ("template",)), True),
            ("Evidence of the selection", _side_by_side(arms, lambda r: r.selection.get("evidence"), ()), False),
            ("SFT settings", _side_by_side(arms, lambda r: r.sft, ("versions",)), False),
            ("RL settings", _side_by_side(arms, lambda r: r.grpo, ("versions",)), False),
            ("Stages", _side_by_side(arms, _stages, ()), False),
            ("Versions", _side_by_side(arms, _versions, ()), False),
        ],
    )


def _versions(run: Run) -> dict:
    """Versions as SFT and RL recorded them; a package that both name is the same in one chain."""
    found = [settings["versions"] for settings in (run.sft, run.grpo) if isinstance(settings.get("versions"), dict)]
    return {name: version for versions in found for name, version in versions.items()}


def _stages(run: Run) -> dict:
    """What the chain says of each stage but this one, in few words."""
    stages = run.chain.get("stages") if isinstance(run.chain.get("stages"), dict) else {}
    return {name: _stage(facts) for name, facts in stages.items() if name != "report"}


def _stage(facts: Any) -> str:
    if not isinstance(facts, dict):
        return str(facts)
    seconds = facts.get("seconds")
    return str(facts.get("status", "?")) + (f", {seconds:.0f} s" if isinstance(seconds, int | float) else "")


def _side_by_side(arms: list[Arm], of: Callable[[Run], Any], without: tuple[str, ...]) -> Table:
    """Every setting a row, every arm (its first run) a column."""
    given = {id(arm): of(arm.runs[0]) for arm in arms}
    kept = {key: value if isinstance(value, dict) else {} for key, value in given.items()}
    found = {key: _flat({k: v for k, v in value.items() if k not in without}) for key, value in kept.items()}
    holders = [arm for arm in arms if found[id(arm)]]
    keys = list(dict.fromkeys(key for arm in holders for key in found[id(arm)]))
    names = [arm.label + (" (recorded)" if arm.recorded else "") for arm in holders]
    rows = [[Cell(key), *(Cell(found[id(arm)].get(key, "–")) for arm in holders)] for key in keys]
    return Table(["", *names], rows, texts=len(names) + 1)


def _flat(value: dict, prefix: str = "") -> dict[str, str]:
    """Nested objects as dotted names -> short texts."""
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
