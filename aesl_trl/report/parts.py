"""The parts that pages are made of: tables of cells, also as markdown, and panels with the kit that draws them."""

import io
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator

from ..diversity.intervals import with_interval
from ..errors import visible


# Variable of the page -> (light, dark): Okabe and Ito's hues, darkened or lightened until text in them is legible.
PALETTE = {
    "ink": ("#1c2128", "#e6e9ed"),
    "muted": ("#5d6670", "#9aa4af"),
    "grid": ("#e3e7eb", "#2c333b"),
    "paper": ("#fefefe", "#14181d"),
    "wrong": ("#868e97", "#8b949e"),
    "right": ("#d3d8de", "#39414a"),
    "base": ("#6b727a", "#a3abb4"),
    "aesl": ("#0067a5", "#56b4e9"),
    "nll": ("#c44601", "#ff8b4d"),
    "stop": ("#a0417f", "#e58fc4"),
    "eval": ("#00765a", "#35c79c"),
    "other1": ("#8a6d00", "#e0bf3a"),
    "other2": ("#4b3fa6", "#a79df0"),
}

LIGHT = {name: light for name, (light, _) in PALETTE.items()}
STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.parse_math": False,
    "text.color": LIGHT["ink"],
    "axes.edgecolor": LIGHT["muted"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 0.8,
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
}

PANEL_INCHES = (4.4, 3.0)
WIDE = (0.105, 0.15, 0.865, 0.72)  # left, bottom, width and height of the axes in a panel
LABELLED = (0.105, 0.15, 0.665, 0.72)  # leaves room on the right for the curves' names


@dataclass(frozen=True)
class Cell:
    text: str
    note: str = ""
    pill: str = ""
    colour: str = ""


@dataclass(frozen=True)
class Table:
    head: list[str]
    rows: list[list[Cell]]
    texts: int = 1  # the first columns, which hold text and are left-aligned; the others hold figures
    groups: list[tuple[str, int]] = field(default_factory=list)  # (heading, columns that it stands over)
    caption: str = ""


@dataclass
class Panel:
    title: str
    draw: Callable[[Axes], None]
    labelled: bool = True  # whether curves carry their names on the right
    see: str = ""  # alternative text


@dataclass
class Section:
    """One chapter. `see` says what to look at; `gap` says what is missing and why."""

    id: str
    title: str
    see: str
    gap: str = ""
    first_table: Table | None = None
    panels: list[Panel] = field(default_factory=list)
    reading: str = ""  # how to read the panels
    legend: list[dict] = field(default_factory=list)
    prompts: list[dict] = field(default_factory=list)
    tables: list[tuple[str, Table, bool]] = field(default_factory=list)  # (name, table, whether it is open)


def mean(values: Sequence[float]) -> float:
    return fmean(values) if values else math.nan


def figure_cell(value: float | None, ends: Sequence[float | None] | None = None, digits: int = 2) -> Cell:
    """Return the cell of a figure, its interval as the note."""
    text, _, interval = with_interval(value, ends, digits).partition(" ")
    return Cell("–" if text == "-" else text, interval)


def markdown_table(head: Sequence[str], lines: Iterable[Sequence[str]], texts: int = 1) -> str:
    """Return a table as markdown; the columns after the first `texts` are aligned to the right."""
    rule = ["---"] * texts + ["---:"] * (len(head) - texts)
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *lines])


def clip(text: str, limit: int) -> tuple[str, int]:
    """Return the first `limit` characters, control characters made visible, and how many characters are left out."""
    return visible(text[:limit]), max(0, len(text) - limit)


def shorten(name: str, width: int = 24) -> str:
    return name if len(name) <= width else name[: width - 1] + "…"


def svg(panel: Panel, name: str) -> str:
    """Draw the panel as an SVG element without declaration and namespace, its colours as the page's variables."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=PANEL_INCHES)
        _draw(panel, figure)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = "<svg" + buffer.getvalue().split("<svg", 1)[1]
    text = re.sub(r'\s(xmlns(:xlink)?|version)="[^"]*"', "", text, count=3)
    text = re.sub(r'^<svg (.*?)width="[^"]*"(.*?)height="[^"]*"|^<svg height="[^"]*"', r"<svg \1\2", text, count=1)
    for variable, light in LIGHT.items():
        text = text.replace(light, f"var(--{variable})")
    return re.sub(r"font: ([^;\"]*?)'[^\"]*\"", r'font: \1var(--sans)"', text).strip()


def png(panels: list[Panel]) -> bytes:
    """Draw all panels of a section on one sheet."""
    columns = min(3, len(panels)) if len(panels) != 4 else 2
    rows = math.ceil(len(panels) / columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows), facecolor="white")
        cells = np.array(figure.subfigures(rows, columns, squeeze=False)).flat
        for panel, cell in zip(panels, cells, strict=False):
            _draw(panel, cell)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _draw(panel: Panel, figure: Figure | SubFigure) -> None:
    ax = figure.add_axes(LABELLED if panel.labelled else WIDE)
    panel.draw(ax)
    figure.text(0.012, 0.965, panel.title, ha="left", va="top", size=10.5, weight="bold")


def y_axis(ax: Axes) -> None:
    """Give the y axis few ticks, and let it begin at 0 where no value is negative."""
    ax.yaxis.set_major_locator(MaxNLocator(5))
    if ax.dataLim.y0 >= 0:
        ax.set_ylim(0, max(ax.dataLim.y1 * 1.05, 1e-9))


def name_ends(ax: Axes, ends: list[tuple]) -> None:
    """Write the curves' names beside their `ends` (x, y, name, colour), in three lines at most and without overlap."""
    low, high = ax.get_ylim()
    line = (high - low) * 0.068
    texts = []
    for _, y, name, colour in sorted(ends, key=lambda end: end[1]):
        parts = textwrap.wrap(name, 13, break_long_words=False, break_on_hyphens=False)
        lines = [shorten(part, 14) for part in parts[:3]]
        texts.append((y, "\n".join(lines) + "…" * (len(parts) > 3), colour))
    heights = [line * (text.count("\n") + 1) for _, text, _ in texts]
    places = spread([y for y, *_ in texts], heights, low, high)
    for (_, text, colour), y in zip(texts, places, strict=True):
        where = {"xycoords": ax.get_yaxis_transform(), "textcoords": "offset points", "xytext": (6, 0)}
        ax.annotate(text, (1, y), va="center", size=9.5, color=colour, weight="bold", annotation_clip=False, **where)


def spread(wanted: list[float], heights: list[float], low: float, high: float) -> list[float]:
    """Return centres near the wanted ones, which ascend: no label overlaps another; in [low, high] if all fit."""
    places: list[float] = []
    for y, height in zip(wanted, heights, strict=True):
        floor = places[-1] + heights[len(places) - 1] / 2 if places else low - height / 2
        places.append(max(y, floor + height / 2))
    ceiling = high + (heights[-1] / 2 if heights else 0)
    for i in reversed(range(len(places))):
        places[i] = min(places[i], ceiling - heights[i] / 2)
        ceiling = places[i] - heights[i] / 2
    return places


@dataclass(frozen=True)
class Row:
    """A row of [`ring_dot_whisker`]."""

    name: str
    colour: str  # as matplotlib takes it
    before: Sequence[float] = ()  # one value a seed; the ring stands at their mean
    after: Sequence[float] = ()  # likewise of the dot
    interval: Sequence[float | None] | None = None  # ends of the dot's whisker
    text: str = ""  # on the right


def ring_dot_whisker(ax: Axes, rows: Sequence[Row], dense: bool = False) -> None:
    """Draw a line for each row: a ring before RL, a dot with a whisker after it, small dots for seeds, the name above.

    `dense` rows leave each other little room: their marks are smaller, and no bar joins ring and dot.
    """
    mark, seed, whisker, size, above = (6.5, 2.5, 1.6, 7.5, 8) if dense else (8.5, 3, 1, 9.5, 14)
    text = {"textcoords": "offset points", "xycoords": ax.get_yaxis_transform(), "annotation_clip": False}
    text |= {"size": size, "va": "center"}
    for place, row in enumerate(rows):
        ring, dot = mean(row.before), mean(row.after)
        if row.before and row.after and not dense:
            ax.plot([ring, dot], [place, place], color=row.colour, linewidth=2.2, alpha=0.45, zorder=2)
        look = {"color": row.colour, "zorder": 3}
        if row.interval and None not in row.interval:
            ax.plot(row.interval, [place, place], marker="|", markersize=7, linewidth=whisker, **look)
        for values, middle, fill in ((row.before, ring, LIGHT["paper"]), (row.after, dot, row.colour)):
            if len(values) > 1:
                ax.plot(values, [place + 0.22] * len(values), "o", markersize=seed, alpha=0.6, **look)
            ax.plot([middle], [place], "o", color=row.colour, markerfacecolor=fill, markersize=mark, zorder=4)
        weight = "normal" if dense else "bold"
        ax.annotate(row.name, (0, place), xytext=(0, above), weight=weight, color=row.colour, **text)
        if row.text:
            ax.annotate(row.text, (1, place), xytext=(0, above), ha="right", color=row.colour, **text)
    ax.set_ylim(len(rows) - 0.5, -0.85)
    ax.set_yticks([])
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.grid(axis="x")
    ax.spines["left"].set_visible(False)
