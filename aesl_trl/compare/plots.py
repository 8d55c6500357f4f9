"""The plots of a comparison: results by row, diversity against result, result against SFT step."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from ..diversity.intervals import is_number, with_interval
from ..files import write_bytes
from ..report.parts import LIGHT, Panel, Row, png, ring_dot_whisker
from .config import STEP
from .page import TITLES
from .table import distinct_runs


COLOURS = ("aesl", "nll", "eval", "stop", "other1", "other2", "wrong")
MARKS = ("o", "s", "^")  # once the colours are used up
ROWS = 9  # that a panel has room for
RESULTS, DIVERSITY, STEPS = "compare_results.png", "compare_diversity.png", "compare_steps.png"


def write_plots(result: dict[str, Any], folder: Path) -> list[str]:
    """Write each plot that has data to `folder` and delete stale ones. Return the names written."""
    sheets = {RESULTS: result_panels(result), DIVERSITY: diversity_panels(result), STEPS: step_panels(result)}
    for name, panels in sheets.items():
        (folder / name).unlink(missing_ok=True)
        if panels:
            write_bytes(folder / name, png(panels))
    return [name for name, panels in sheets.items() if panels]


def colours(result: dict[str, Any]) -> dict[str, str]:
    """Give each method a colour: the report's for a name that the report knows, grey for RL from the base."""
    starts = {row["method"]: row["selection"] is not None for row in result["rows"]}
    others = [name for name in COLOURS if name not in starts]
    found = {}
    for method, has_cold_start in starts.items():
        if has_cold_start and method not in COLOURS:
            others = [*others[1:], others[0]]
        found[method] = LIGHT[method if method in COLOURS else others[-1] if has_cold_start else "base"]
    return found


def result_panels(result: dict[str, Any]) -> list[Panel]:
    """Draw the metric before (ring) and after RL (dot, interval), and the paired differences to each reference."""
    metric, by_method, cells, panels = result["metric"], colours(result), _by(result["cells"], "row"), []
    for setting, rows in _sheets(result["rows"], metric):
        start, lines = f"{setting}: " if setting else "", []
        for row in rows:
            before, after = row["before"][metric]["mean"], row["after"][metric]
            seeds = [cell["after"][metric] for cell in cells.get(row["row"], [])] or [after["mean"]]
            ring, whisker = [] if before is None else [before], (after["low"], after["high"])
            lines.append(Row(row["name"], by_method[row["method"]], ring, seeds, whisker))
        panels.append(_row_panel(f"{start}{metric}, start (ring), RL (dot)", lines))
        for name in result["reference"]:
            found = [(row, row["differences"].get(name, {}).get("after", {}).get(metric, {})) for row in rows]
            lines = [
                Row(row["name"], by_method[row["method"]], after=[each["mean"]], interval=(each["low"], each["high"]))
                for row, each in found
                if each.get("n")
            ]
            if lines:
                panels.append(_row_panel(f"{start}{metric} after RL, minus {name}", lines, zero=True))
    return panels


def _by(cells: list[dict], key: str) -> dict[Any, list[dict]]:
    found: dict[Any, list[dict]] = {}
    for cell in cells:
        found.setdefault(cell[key], []).append(cell)
    return found


def _sheets(rows: list[dict], metric: str) -> list[tuple[str, list[dict]]]:
    """Return (setting, rows), no more rows than a panel has room for. Rows by SFT step have plots of their own."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        if row["after"][metric]["mean"] is not None and not _by_step(row):
            found.setdefault(row["setting"], []).append(row)
    for setting in {row["setting"] for row in rows if _by_step(row)}:  # the base is step 0 there
        if all(row["selection"] is None for row in found.get(setting, [])):
            found.pop(setting, None)
    return [(setting, of[first : first + ROWS]) for setting, of in found.items() for first in range(0, len(of), ROWS)]


def _by_step(row: dict) -> bool:
    return (row["selection"] or "").startswith(STEP)


def _row_panel(title: str, rows: list[Row], zero: bool = False) -> Panel:
    def draw(ax: Axes) -> None:
        ring_dot_whisker(ax, rows, dense=True)
        if zero:
            ax.axvline(0, color=LIGHT["muted"], linewidth=0.9)

    return Panel(title, draw, labelled=False)


def diversity_panels(result: dict[str, Any]) -> list[Panel]:
    """Draw a panel for each figure before RL: a dot for each cell, the correlation in the title."""
    by_method, cells, panels = colours(result), distinct_runs(result["cells"]), []
    for found in result["correlations"]:
        name = found["figure"]
        title = f"{TITLES.get(name, name)} before RL: {with_interval(found['rho'], (found['low'], found['high']))}"
        if is_number(found["rho"]):
            draw = partial(_scatter, cells=cells, name=name, metric=result["metric"], by_method=by_method)
            panels.append(Panel(title, draw))
    return panels


def _scatter(ax: Axes, cells: list[dict], name: str, metric: str, by_method: dict[str, str]) -> None:
    cells_of = _by(cells, "method")
    for number, (method, colour) in enumerate(by_method.items()):
        points = [
            (cell["before"][name], cell["after"][metric])
            for cell in cells_of.get(method, [])
            if name in cell["before"] and metric in cell["after"]
        ]
        if points:
            mark = MARKS[number // len(COLOURS) % 3]
            look = {"color": colour, "markersize": 4.5, "alpha": 0.75, "label": _short(method)}
            ax.plot(*zip(*points, strict=True), mark, **look)
    ax.set_xlabel(f"before RL; up: {metric} after RL", loc="left")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=6.5, handletextpad=0.1)


def _short(name: str, width: int = 18) -> str:
    """Shorten a name in the middle: names that differ do so at their ends."""
    return name if len(name) <= width else f"{name[: width // 2 - 1]}…{name[-(width // 2) :]}"


def step_panels(result: dict[str, Any]) -> list[Panel]:
    """Draw the paper's Figure 1b: the result of RL against the SFT step that it starts from, and each start's figures.

    Runs are faint and their mean is strong. Intervals of few seeds would hide both; the tables have them.
    """
    lines, panels = step_lines(result), []
    if lines:
        for name, when in [(result["metric"], "after"), *((name, "before") for name in result["figures"])]:
            draw = partial(_steps, lines=lines, result=result, name=name, when=when)
            panels.append(Panel(f"{TITLES.get(name, name)} {when} RL", draw))
    return panels


def step_lines(result: dict[str, Any]) -> dict[tuple[str, str], list[tuple[int, dict]]]:
    """Return the rows of `rl_from_steps` by (setting, method) and SFT step. RL from the base stands at step 0."""
    lines: dict[tuple[str, str], list[tuple[int, dict]]] = {}
    for row in result["rows"]:
        if _by_step(row):
            step = int(row["selection"].removeprefix(STEP))
            lines.setdefault((row["setting"], row["method"]), []).append((step, row))
    bases = {row["setting"]: row for row in result["rows"] if row["selection"] is None}
    for (setting, _), line in lines.items():
        line.sort(key=lambda item: item[0])
        if setting in bases:
            line.insert(0, (0, bases[setting]))
    return lines


def _steps(ax: Axes, lines: dict, result: dict[str, Any], name: str, when: str) -> None:
    by_method, cells_of = colours(result), _by(result["cells"], "row")
    for (setting, method), line in lines.items():
        colour, label = by_method[method], _short(f"{setting} {method}".strip())
        means = [(step, row[when][name]["mean"]) for step, row in line if row[when][name]["mean"] is not None]
        if not means:
            continue
        ax.plot(*zip(*means, strict=True), "o-", color=colour, linewidth=2, markersize=4, label=label)
        runs: dict[tuple, list[tuple[int, float]]] = {}
        for step, row in line:
            for cell in cells_of.get(row["row"], []):
                if cell[when].get(name) is not None:
                    runs.setdefault(_run_of(cell), []).append((step, cell[when][name]))
        for points in runs.values():
            ax.plot(*zip(*sorted(points), strict=True), color=colour, linewidth=0.8, alpha=0.35)
    ax.set_xscale("symlog", linthresh=10)
    ticks = sorted({step for line in lines.values() for step, _ in line})
    ax.set_xticks(_apart(ticks), [f"{step:g}" for step in _apart(ticks)])
    ax.set_xticks([], minor=True)
    ax.set_xlabel("SFT step that RL starts from", loc="left")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=6.5)


def _run_of(cell: dict) -> tuple:
    return cell.get("base"), cell["seed"], cell.get("run")


def _apart(ticks: Sequence[int]) -> list[int]:
    """Return the ticks that leave room for each other on the axis, which is logarithmic from 10 on."""
    kept: list[int] = []
    for step in ticks:
        if not kept or step - kept[-1] >= 0.35 * max(step, 10):
            kept.append(step)
    return kept
