"""The plots of a comparison: results by row, diversity against result, result against SFT step."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ..report.parts import LIGHT, Panel, png
from .config import STEP
from .page import TITLES
from .table import distinct_runs


COLOURS = ("aesl", "nll", "eval", "stop", "other1", "other2", "wrong")
MARKS = ("o", "s", "^")  # once the colours are used up
ROWS = 9  # that a panel has room for
RESULTS, DIVERSITY, STEPS = "compare_results.png", "compare_diversity.png", "compare_steps.png"


def write_plots(result: dict[str, Any], folder: Path) -> list[str]:
    """Write the PNGs that the cells allow to `folder`, drop those of another time that they don't; their names."""
    sheets = {
        RESULTS: result_panels(result),
        DIVERSITY: diversity_panels(result),
        STEPS: step_panels(result),
    }
    for name, panels in sheets.items():
        (folder / name).unlink(missing_ok=True)
        if panels:
            (folder / name).write_bytes(png(panels))
    return [name for name, panels in sheets.items() if panels]


def colours(result: dict[str, Any]) -> dict[str, str]:
    """One colour a method: the report's for a name that it knows, grey for RL from the base."""
    starts = {row["method"]: row["selection"] is not None for row in result["rows"]}
    others = [name for name in COLOURS if name not in starts]
    found = {}
    for method, has_cold_start in starts.items():
        if has_cold_start and method not in COLOURS:
            others = [*others[1:], others[0]]
        found[method] = LIGHT[method if method in COLOURS else others[-1] if has_cold_start else "base"]
    return found


# ---- Results, a row a line


def result_panels(result: dict[str, Any]) -> list[Panel]:
    """The metric before (ring) and after RL (dot, interval), and the paired differences to each reference."""
    return [
        panel for setting, rows in _sheets(result["rows"], result["metric"]) for panel in _rows(result, setting, rows)
    ]


def _sheets(rows: list[dict], metric: str) -> list[tuple[str, list[dict]]]:
    """Rows of one setting, no more than a panel has room for; rows by SFT step have plots of their own."""
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


def _rows(result: dict[str, Any], setting: str, rows: list[dict]) -> list[Panel]:
    metric, by_method, panels = result["metric"], colours(result), []
    start = f"{setting}: " if setting else ""
    title = f"{start}{metric}, start (ring), RL (dot)"
    panels.append(Panel(title, lambda ax: _results(ax, rows, result, by_method), False))
    for name in result["reference"]:
        known = [row for row in rows if row["differences"].get(name, {}).get("after", {}).get(metric, {}).get("n")]
        if known:
            title = f"{start}{metric} after RL, minus {name}"
            panels.append(
                Panel(
                    title, lambda ax, known=known, name=name: _differences(ax, known, name, metric, by_method), False
                )
            )
    return panels


def _results(ax: Axes, rows: list[dict], result: dict[str, Any], by_method: dict[str, str]) -> None:
    metric = result["metric"]
    for place, row in enumerate(rows):
        colour, after, before = by_method[row["method"]], row["after"][metric], row["before"][metric]
        seeds = [cell["after"][metric] for cell in result["cells"] if cell["row"] == row["row"]]
        ax.plot(seeds, [place + 0.16] * len(seeds), "o", color=colour, markersize=2.5, alpha=0.6)
        _interval(ax, place, after, colour)
        if before["mean"] is not None:
            ax.plot([before["mean"]], [place], "o", color=colour, markerfacecolor=LIGHT["paper"], markersize=6)
    _rows_axis(ax, rows, by_method)


def _differences(ax: Axes, rows: list[dict], name: str, metric: str, by_method: dict[str, str]) -> None:
    for place, row in enumerate(rows):
        _interval(ax, place, row["differences"][name]["after"][metric], by_method[row["method"]])
    ax.axvline(0, color=LIGHT["muted"], linewidth=0.9)
    _rows_axis(ax, rows, by_method)


def _interval(ax: Axes, place: int, found: dict, colour: str) -> None:
    if found["low"] is not None:
        ax.plot([found["low"], found["high"]], [place, place], color=colour, linewidth=1.6, marker="|", markersize=7)
    ax.plot([found["mean"]], [place], "o", color=colour, markersize=6.5, zorder=4)


def _rows_axis(ax: Axes, rows: list[dict], by_method: dict[str, str]) -> None:
    """Names inside the axes, above their lines: they are as long as users make them."""
    for place, row in enumerate(rows):
        over = {"xycoords": ax.get_yaxis_transform(), "textcoords": "offset points", "xytext": (0, 5)}
        ax.annotate(row["name"], (0, place), size=7.5, color=by_method[row["method"]], annotation_clip=False, **over)
    ax.set_ylim(len(rows) - 0.5, -0.9)
    ax.set_yticks([])
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.grid(axis="x")
    ax.spines["left"].set_visible(False)


# ---- Score and diversity before RL against the result


def diversity_panels(result: dict[str, Any]) -> list[Panel]:
    """A panel for each figure before RL: a dot for each cell, the correlation in the title."""
    by_method, panels = colours(result), []
    cells = distinct_runs(result["cells"])
    for found in result["correlations"]:
        if not math.isfinite(found["rho"]):
            continue
        name = found["figure"]
        between = "" if not math.isfinite(found["low"]) else f" [{found['low']:.2f}, {found['high']:.2f}]"
        title = f"{TITLES.get(name, name)} before RL: {found['rho']:.2f}{between}"
        panels.append(
            Panel(title, lambda ax, name=name: _scatter(ax, cells, name, result["metric"], by_method), labelled=True)
        )
    return panels


def _scatter(ax: Axes, cells: list[dict], name: str, metric: str, by_method: dict[str, str]) -> None:
    for number, (method, colour) in enumerate(by_method.items()):
        points = [
            (cell["before"][name], cell["after"][metric])
            for cell in cells
            if cell["method"] == method and name in cell["before"] and metric in cell["after"]
        ]
        if points:
            ax.plot(
                *zip(*points, strict=True),
                MARKS[number // len(COLOURS) % 3],
                color=colour,
                markersize=4.5,
                alpha=0.75,
                label=_short(method),
            )
    ax.set_xlabel(f"before RL; up: {metric} after RL", loc="left")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=6.5, handletextpad=0.1)


def _short(name: str, width: int = 18) -> str:
    """Shortened in the middle: names that differ do so at their ends."""
    return name if len(name) <= width else f"{name[: width // 2 - 1]}…{name[-(width // 2) :]}"


# ---- RL potential against SFT steps


def step_panels(result: dict[str, Any]) -> list[Panel]:
    """The paper's Figure 1b: the result of RL against the SFT step it starts from, and what that start was like.

    Seeds faint, their mean strong: the intervals of few seeds would hide both, and stand in the tables.
    """
    lines = step_lines(result)
    if not lines:
        return []
    shown = [(result["metric"], "after"), *((name, "before") for name in result["figures"])]
    by_method = colours(result)
    return [
        Panel(
            f"{TITLES.get(name, name)} {when} RL",
            lambda ax, name=name, when=when: _steps(ax, lines, result["cells"], name, when, by_method),
        )
        for name, when in shown
    ]


def step_lines(result: dict[str, Any]) -> dict[tuple[str, str], list[tuple[int, dict]]]:
    """(setting, method) -> its rows by SFT step, from `rl_from_steps`; RL from the base stands at step 0 of each."""
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


def _steps(ax: Axes, lines: dict, cells: list[dict], name: str, when: str, by_method: dict[str, str]) -> None:
    for (setting, method), line in lines.items():
        colour, label = by_method[method], _short(f"{setting} {method}".strip())
        means = [(step, row[when][name]["mean"]) for step, row in line if row[when][name]["mean"] is not None]
        if not means:
            continue
        ax.plot(*zip(*means, strict=True), "o-", color=colour, linewidth=2, markersize=4, label=label)
        step_of = {row["row"]: step for step, row in line}
        mine = [cell for cell in cells if cell["row"] in step_of and cell[when].get(name) is not None]
        for seed in {cell["seed"] for cell in mine}:
            points = sorted((step_of[cell["row"]], cell[when][name]) for cell in mine if cell["seed"] == seed)
            ax.plot(*zip(*points, strict=True), color=colour, linewidth=0.8, alpha=0.35)
    ax.set_xscale("symlog", linthresh=10)
    ticks = sorted({step for line in lines.values() for step, _ in line})
    ax.set_xticks(_apart(ticks), [f"{step:g}" for step in _apart(ticks)])
    ax.set_xticks([], minor=True)
    ax.set_xlabel("SFT step that RL starts from", loc="left")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=6.5)


def _apart(ticks: Sequence[int]) -> list[int]:
    """Ticks that leave room for each other on the axis, which is logarithmic from 10 on."""
    kept: list[int] = []
    for step in ticks:
        if not kept or step - kept[-1] >= 0.35 * max(step, 10):
            kept.append(step)
    return kept
