"""The plots of a comparison: results by row, diversity against result, result against SFT step."""

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..diversity.intervals import is_number, with_interval
from ..files import write_bytes
from ..report.parts import (
    LIGHT,
    SHEET_INCHES,
    STYLE,
    UNLABELLED,
    Look,
    Panel,
    Row,
    margins_of,
    png,
    ring_dot_whisker,
    y_axis,
)
from ..report.plots import BETTER, DIVERSE, METHOD_COLOURS
from .config import STEP
from .page import TITLES
from .table import distinct_runs


# Beside the report's colours, for comparisons of many cold starts; beyond them a mark tells two of one colour apart
MORE_COLOURS = ("#7b3f00", "#2a9d8f", "#d4699e", "#5a8f00", "#111111", "#c9a227", "#56b4e9")
FREE_COLOURS = (*(LIGHT[name] for name in ("other1", "other2", "eval", "stop", "nll", "aesl")), *MORE_COLOURS)
MARKS = ("o", "s", "^", "D")
DIRECTIONS = {
    "entropy": DIVERSE,
    "self_bleu": "↓ lower is more diverse",
    "groups_mixed": "↑ higher: more to learn from",
}
LINES = ("-", "--", ":", "-.")  # of settings
ROW_INCHES = 0.27
RESULTS, DIVERSITY, STEPS = "compare_results.png", "compare_diversity.png", "compare_steps.png"


def write_plots(result: dict[str, Any], folder: Path) -> list[str]:
    """Write each plot that has data to `folder` and delete stale ones. Return the names written."""
    looks = looks_of(result)
    scatters, steps = diversity_panels(result, looks), step_panels(result, looks)
    sheets = {
        RESULTS: results_sheet(result, looks),
        DIVERSITY: png(scatters, _legend(looks, _drawn(result))) if scatters else None,
        STEPS: png(steps, _legend(looks, [name for name, _ in step_lines(result)])) if steps else None,
    }
    for name, sheet in sheets.items():
        (folder / name).unlink(missing_ok=True)
        if sheet:
            write_bytes(folder / name, sheet)
    return [name for name, sheet in sheets.items() if sheet]


def _groups(result: dict[str, Any]) -> list[str]:
    """Return what shares a colour: a method with its selection, in every setting; of rows by SFT step the method."""
    return list(dict.fromkeys(map(group_of, result["rows"])))


def _drawn(result: dict[str, Any]) -> list[str]:
    """Return the groups that have dots of their own: two selections of the same runs have those of one."""
    rows = {cell["row"] for cell in distinct_runs(result["cells"])}
    return [group_of(row) for row in result["rows"] if row["row"] in rows]


def group_of(row: dict) -> str:
    return row["method"] if _by_step(row) else row["name"]


def looks_of(result: dict[str, Any]) -> dict[str, Look]:
    """Give each group a colour of its own: the report's colour of that method, grey for RL from the base."""
    bases = {group_of(row) for row in result["rows"] if row["selection"] is None}
    groups, found = _groups(result), {}
    for name in groups:
        methods = ("base",) if name in bases else (name.replace("/", "_"), f"{name}_last")
        known = next(filter(None, map(METHOD_COLOURS.get, methods)), None)
        if known and LIGHT[known] not in found.values():
            found[name] = LIGHT[known]
    free = [colour for colour in FREE_COLOURS if colour not in found.values()]
    others = [name for name in groups if name not in found]
    looks = {name: Look(name, colour) for name, colour in found.items()}
    for number, name in enumerate(others):
        looks[name] = Look(name, free[number % len(free)], MARKS[number // len(free) % len(MARKS)])
    return looks


def _legend(looks: dict[str, Look], names: Sequence[str]) -> list[Look]:
    return [replace(looks[name], name=_short(name, 30)) for name in dict.fromkeys(names)]


def results_sheet(result: dict[str, Any], looks: dict[str, Look]) -> bytes | None:
    """Draw all rows below each other: before and after RL, and beside it the paired difference to each reference."""
    metric = result["metric"]
    sheets = _sheets(result["rows"], metric)
    lines = [line for setting, rows in sheets for line in ([setting] if setting else []) + rows]
    if not lines:
        return None
    cells = _by(result["cells"], lambda cell: cell["row"])
    note, first = "ring: start, dot: after RL", [_result(each, metric, cells, looks) for each in lines]
    columns = [(f"{metric} after RL", note, first)]
    for name in result["reference"]:
        found = [_difference(each, name, metric, looks) for each in lines]
        if any(row.after for row in found):
            columns.append((f"{metric}, minus", name, found))
    left = margins_of(first)[0]
    height = 0.95 + ROW_INCHES * len(lines)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(SHEET_INCHES, height), facecolor="white")
        shape = {"left": left / SHEET_INCHES, "right": 0.985, "top": 1 - 0.55 / height, "bottom": 0.4 / height}
        axes = figure.subplots(1, len(columns), squeeze=False, gridspec_kw={"wspace": 0.17, **shape})[0]
        for number, (ax, (title, note, rows)) in enumerate(zip(axes, columns, strict=True)):
            ring_dot_whisker(ax, rows, names=number == 0)
            ax.xaxis.set_major_locator(MaxNLocator(3))
            if number == 0 and ax.dataLim.x0 >= 0:
                ax.set_xlim(left=0)
            if number:
                ax.axvline(0, color=LIGHT["muted"], linewidth=0.9)
            texts = {"xycoords": "axes fraction", "textcoords": "offset points", "annotation_clip": False}
            ax.annotate(title, (0, 1), xytext=(0, 22), size=9.5, weight="bold", **texts)
            ax.annotate(_short(note, 34), (0, 1), xytext=(0, 9), size=9, color=LIGHT["muted"], **texts)
        figure.text(0.012, 0.09 / height, "→ further right is better", size=9, color=LIGHT["muted"])
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _result(row: dict | str, metric: str, cells: dict[str, list[dict]], looks: dict[str, Look]) -> Row:
    """Return a row of the first column; a text is a setting, which heads the rows below it."""
    if isinstance(row, str):
        return Row(row, LIGHT["ink"])
    before, after = row["before"][metric]["mean"], row["after"][metric]
    seeds = [cell["after"][metric] for cell in cells.get(row["row"], [])] or [after["mean"]]
    ring = [] if before is None else [before]
    return Row(_short(row["name"], 26), looks[group_of(row)].colour, ring, seeds, (after["low"], after["high"]))


def _by(cells: list[dict], key: Callable[[dict], Any]) -> dict[Any, list[dict]]:
    found: dict[Any, list[dict]] = {}
    for cell in cells:
        found.setdefault(key(cell), []).append(cell)
    return found


def _difference(row: dict | str, reference: str, metric: str, looks: dict[str, Look]) -> Row:
    """Return a row of a reference's column, empty where the row has no difference to it."""
    found = {} if isinstance(row, str) else row["differences"].get(reference, {}).get("after", {}).get(metric, {})
    if not found.get("n"):
        return Row("", LIGHT["ink"])
    return Row("", looks[group_of(row)].colour, after=[found["mean"]], interval=(found["low"], found["high"]))


def _sheets(rows: list[dict], metric: str) -> list[tuple[str, list[dict]]]:
    """Return (setting, rows). Rows by SFT step have plots of their own."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        if row["after"][metric]["mean"] is not None and not _by_step(row):
            found.setdefault(row["setting"], []).append(row)
    for setting in {row["setting"] for row in rows if _by_step(row)}:  # the base is step 0 there
        if all(row["selection"] is None for row in found.get(setting, [])):
            found.pop(setting, None)
    return list(found.items())


def _by_step(row: dict) -> bool:
    return (row["selection"] or "").startswith(STEP)


def diversity_panels(result: dict[str, Any], looks: dict[str, Look]) -> list[Panel]:
    """Draw a panel for each figure before RL: a dot for each cell, the correlation in the title."""
    cells, metric, panels = distinct_runs(result["cells"]), result["metric"], []
    groups = {row["row"]: group_of(row) for row in result["rows"]}
    for found in result["correlations"]:
        name = found["figure"]
        title = TITLES.get(name, name)
        if is_number(found["rho"]):
            rho = with_interval(found["rho"], (found["low"], found["high"]))
            draw = partial(_scatter, cells=cells, name=name, metric=metric, groups=groups, looks=looks)
            note = f"rank correlation with {metric} after RL: {rho}"
            panels.append(Panel(f"{_capital(title)} before RL", draw, UNLABELLED, note))
    return panels


def _scatter(ax: Axes, cells: list[dict], name: str, metric: str, groups: dict, looks: dict[str, Look]) -> None:
    cells_of = _by(cells, lambda cell: groups.get(cell["row"]))
    for group, look in looks.items():
        points = [
            (cell["before"][name], cell["after"][metric])
            for cell in cells_of.get(group, [])
            if name in cell["before"] and metric in cell["after"]
        ]
        if points:
            ax.plot(*zip(*points, strict=True), look.mark, color=look.colour, markersize=4.5, alpha=0.75)
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.yaxis.set_major_locator(MaxNLocator(5))
    ax.set_xlabel(f"up: {metric} after RL (better); no axis starts at 0", loc="left", size=9)


def _capital(title: str) -> str:
    return title if title.startswith(("pass@", "avg@", "maj@")) else title[0].upper() + title[1:]


def _short(name: str, width: int) -> str:
    """Shorten a name in the middle: names that differ do so at their ends."""
    return name if len(name) <= width else f"{name[: width // 2 - 1]}…{name[-(width // 2) :]}"


def step_panels(result: dict[str, Any], looks: dict[str, Look]) -> list[Panel]:
    """Draw the paper's Figure 1b: the result of RL against the SFT step that it starts from, and each start's figures.

    Runs are faint and their mean is strong. Intervals of few seeds would hide both; the tables have them.
    """
    lines, panels = step_lines(result), []
    if lines:
        for name, when in [(result["metric"], "after"), *((name, "before") for name in result["figures"])]:
            draw = partial(_steps, lines=lines, result=result, name=name, when=when, looks=looks)
            title = f"{_capital(TITLES.get(name, name))} {when} RL"
            panels.append(Panel(title, draw, UNLABELLED, DIRECTIONS.get(name, BETTER)))
    return panels


def step_lines(result: dict[str, Any]) -> dict[tuple[str, str], list[tuple[int, dict]]]:
    """Return the rows of `rl_from_steps` by (method, setting) and SFT step. RL from the base stands at step 0."""
    lines: dict[tuple[str, str], list[tuple[int, dict]]] = {}
    for row in result["rows"]:
        if _by_step(row):
            step = int(row["selection"].removeprefix(STEP))
            lines.setdefault((row["method"], row["setting"]), []).append((step, row))
    bases = {row["setting"]: row for row in result["rows"] if row["selection"] is None}
    for (_, setting), line in lines.items():
        line.sort(key=lambda item: item[0])
        if setting in bases:
            line.insert(0, (0, bases[setting]))
    return lines


def _steps(ax: Axes, lines: dict, result: dict[str, Any], name: str, when: str, looks: dict[str, Look]) -> None:
    cells_of = _by(result["cells"], lambda cell: cell["row"])
    settings = list(dict.fromkeys(setting for _, setting in lines))
    for (method, setting), line in lines.items():
        colour, style = looks[method].colour, LINES[settings.index(setting) % len(LINES)]
        means = [(step, row[when][name]["mean"]) for step, row in line if row[when][name]["mean"] is not None]
        if not means:
            continue
        ax.plot(*zip(*means, strict=True), "o", linestyle=style, color=colour, linewidth=2, markersize=4)
        runs: dict[tuple, list[tuple[int, float]]] = {}
        for step, row in line:
            for cell in cells_of.get(row["row"], []):
                if cell[when].get(name) is not None:
                    runs.setdefault(_run_of(cell), []).append((step, cell[when][name]))
        for points in runs.values():
            ax.plot(*zip(*sorted(points), strict=True), color=colour, linewidth=0.8, alpha=0.35)
    ax.set_xscale("symlog", linthresh=10)
    ticks = _apart(sorted({step for line in lines.values() for step, _ in line}))
    ax.set_xticks(ticks, [f"{step:g}" for step in ticks])
    ax.set_xticks([], minor=True)
    ax.set_xlabel("SFT step that RL starts from", loc="left", size=9)
    y_axis(ax)


def _run_of(cell: dict) -> tuple:
    return cell.get("base"), cell["seed"], cell.get("run")


def _apart(ticks: Sequence[int]) -> list[int]:
    """Return the ticks that leave room for each other on the axis, which is logarithmic from 10 on."""
    kept: list[int] = []
    for step in ticks:
        if not kept or step - kept[-1] >= 0.6 * max(step, 10):
            kept.append(step)
    return kept
