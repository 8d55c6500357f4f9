"""What a chapter of the report is made of: texts, tables of cells, panels.

Left out: what they say (sections.py and the chapters that it names), how they look (report.py).
"""

import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator


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

WIDE = (0.105, 0.15, 0.865, 0.72)  # left, bottom, width, height of the axes in a panel

LABELLED = (0.105, 0.15, 0.665, 0.72)  # leaves room on the right for the curves' names


@dataclass
class Panel:
    title: str
    draw: Callable[[Axes], None]
    labelled: bool = True  # curves carry their names on the right
    see: str = ""  # alternative text


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
    texts: int = 1  # so many columns of text, left-aligned, before the figures
    groups: list[tuple[str, int]] = field(default_factory=list)  # a heading over so many columns
    caption: str = ""


@dataclass
class Section:
    """One chapter. `see` says what to look at, `gap` what is missing and why."""

    id: str
    title: str
    see: str
    gap: str = ""
    first_table: Table | None = None
    panels: list[Panel] = field(default_factory=list)
    reading: str = ""  # how to read the panels
    legend: list[dict] = field(default_factory=list)
    prompts: list[dict] = field(default_factory=list)
    tables: list[tuple[str, Table, bool]] = field(default_factory=list)  # (name, table, open)


def clip(text: str, limit: int) -> tuple[str, int]:
    """The first `limit` characters with control characters made visible, and how many are left out."""
    shown = "".join(_visible(character) for character in text[:limit])
    return shown, max(0, len(text) - limit)


def _visible(character: str) -> str:
    if character in "\n\t":
        return character
    if ord(character) < 32:
        return chr(0x2400 + ord(character))
    reorders = character in "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    return "\ufffd" if reorders or 0xD800 <= ord(character) <= 0xDFFF or 127 <= ord(character) < 160 else character


def svg(panel: Panel, name: str) -> str:
    """The panel as an SVG element: no declaration, no namespace address, colours as the page's variables."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=PANEL_INCHES)
        _draw(panel, figure)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'\s(xmlns(:xlink)?|version)="[^"]*"', "", text, count=3)
    text = re.sub(r'^<svg (.*?)width="[^"]*"(.*?)height="[^"]*"|^<svg height="[^"]*"', r"<svg \1\2", text, count=1)
    for variable, light in LIGHT.items():
        text = text.replace(light, f"var(--{variable})")
    return re.sub(r"font: ([^;\"]*?)'[^\"]*\"", r'font: \1var(--sans)"', text).strip()


def png(panels: list[Panel]) -> bytes:
    """All panels of a section on one sheet."""
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


def _y_axis(ax: Axes) -> None:
    ax.yaxis.set_major_locator(MaxNLocator(5))
    if ax.dataLim.y0 >= 0:
        ax.set_ylim(0, max(ax.dataLim.y1 * 1.05, 1e-9))


def _name_ends(ax: Axes, ends: list[tuple]) -> None:
    """Each curve's name beside its end, moved apart where two would overlap."""
    low, high = ax.get_ylim()
    line = (high - low) * 0.068
    texts = [(y, _wrap(name), colour) for _, y, name, colour in sorted(ends, key=lambda end: end[1])]
    heights = [line * (text.count("\n") + 1) for _, text, _ in texts]
    places = spread([y for y, *_ in texts], heights, low, high)
    for (_, text, colour), y in zip(texts, places, strict=True):
        where = {"xycoords": ax.get_yaxis_transform(), "textcoords": "offset points", "xytext": (6, 0)}
        ax.annotate(text, (1, y), va="center", size=9.5, color=colour, weight="bold", annotation_clip=False, **where)


def spread(wanted: list[float], heights: list[float], low: float, high: float) -> list[float]:
    """Ascending centres for labels of these heights: near the wanted ones, no overlap, in [low, high] if they fit."""
    places: list[float] = []
    for y, height in zip(wanted, heights, strict=True):
        floor = places[-1] + heights[len(places) - 1] / 2 if places else low - height / 2
        places.append(max(y, floor + height / 2))
    ceiling = high + (heights[-1] / 2 if heights else 0)
    for i in reversed(range(len(places))):
        places[i] = min(places[i], ceiling - heights[i] / 2)
        ceiling = places[i] - heights[i] / 2
    return places


def _short(name: str, width: int = 24) -> str:
    return name if len(name) <= width else name[: width - 1] + "…"


def _wrap(name: str, width: int = 13) -> str:
    """`name` on at most three lines of about `width` characters."""
    lines: list[str] = []
    for word in name.split(" "):
        if lines and len(lines[-1]) + len(word) < width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    lines = [line if len(line) <= width + 1 else line[:width] + "…" for line in lines]
    return "\n".join(lines if len(lines) <= 3 else [*lines[:2], lines[2] + "…"])
