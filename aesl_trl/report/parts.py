"""The parts that pages are made of: tables of cells, also as markdown, and panels with the kit that draws them."""

import io
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
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

# A README shows a picture some 800 pixels wide: on a sheet of 8 inches, letters of 9 points are 12 pixels high there
SHEET_INCHES, PANEL_INCHES = 8.0, (4.4, 3.1)
LABELLED, UNLABELLED = (0.58, 0.98), (0.58, 0.22)  # inches left and right of the axes, with and without curves' names
LEGEND_COLUMNS = 3


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

    @property
    def full_head(self) -> list[str]:
        """The columns' headings, each with the heading that stands over it."""
        over = [name for name, span in self.groups for _ in range(span)] or [""] * len(self.head)
        return [f"{group}: {name}" if group else name for group, name in zip(over, self.head, strict=True)]


@dataclass
class Panel:
    title: str
    draw: Callable[[Axes], None]
    margins: tuple[float, float] = LABELLED
    note: str = ""  # under the title: which direction is good
    see: str = ""  # alternative text
    height: float = 2.8  # inches on a sheet
    wide: bool = False  # whether it takes a sheet's whole width


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

    @property
    def is_empty(self) -> bool:
        """Say whether the chapter has nothing to show."""
        return not (self.first_table or self.panels or self.prompts or self.tables)


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
        _draw(panel, figure, PANEL_INCHES)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = "<svg" + buffer.getvalue().split("<svg", 1)[1]
    text = re.sub(r'\s(xmlns(:xlink)?|version)="[^"]*"', "", text, count=3)
    text = re.sub(r'^<svg (.*?)width="[^"]*"(.*?)height="[^"]*"|^<svg height="[^"]*"', r"<svg \1\2", text, count=1)
    for variable, light in LIGHT.items():
        text = text.replace(light, f"var(--{variable})")
    return re.sub(r"font: ([^;\"]*?)'[^\"]*\"", r'font: \1var(--sans)"', text).strip()


@dataclass(frozen=True)
class Look:
    """An entry of a sheet's legend: a name, and the colour, mark and line that stand for it."""

    name: str
    colour: str
    mark: str = "o"
    line: str = ""

    def handle(self) -> Line2D:
        return Line2D([], [], color=self.colour, marker=self.mark, linestyle=self.line, label=self.name, markersize=5)


def png(panels: list[Panel], legend: Sequence[Look] = ()) -> bytes:
    """Draw all panels of a section on one sheet, two a row or a wide one alone, and the `legend` below them."""
    rows: list[list[Panel]] = []
    for panel in panels:
        if panel.wide or not rows or rows[-1][0].wide or len(rows[-1]) == 2:
            rows.append([])
        rows[-1].append(panel)
    heights = [max(panel.height for panel in row) for row in rows]
    with matplotlib.rc_context(STYLE):
        strip = [0.24 * math.ceil(len(legend) / LEGEND_COLUMNS) + 0.1] if legend else []
        figure = Figure(figsize=(SHEET_INCHES, sum(heights + strip)), facecolor="white")
        bands = figure.subfigures(len(heights + strip), 1, squeeze=False, height_ratios=heights + strip)[:, 0]
        for row, height, band in zip(rows, heights, bands, strict=False):
            columns = 1 if row[0].wide else 2
            for panel, cell in zip(row, band.subfigures(1, columns, squeeze=False)[0], strict=False):
                _draw(panel, cell, (SHEET_INCHES / columns, height))
        if legend:
            look = {"loc": "upper left", "frameon": False, "fontsize": 9, "handletextpad": 0.4, "columnspacing": 1.6}
            bands[-1].legend(handles=[each.handle() for each in legend], ncols=LEGEND_COLUMNS, **look)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _draw(panel: Panel, figure: Figure | SubFigure, size: tuple[float, float]) -> None:
    """Draw the panel into a figure of `size` inches: title and note on top, the axes within the panel's margins."""
    width, height = size
    left, right = panel.margins
    title = textwrap.wrap(panel.title, int(width / 0.084))
    top = 0.12 + 0.17 * len(title) + (0.2 if panel.note else 0.05)
    bottom = 0.46
    box = (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    ax = figure.add_axes(box)
    panel.draw(ax)
    place = {"x": 0.06 / width, "ha": "left", "va": "top"}
    figure.text(y=1 - 0.08 / height, s="\n".join(title), size=10, weight="bold", **place)
    if panel.note:
        y = 1 - (0.11 + 0.17 * len(title)) / height
        figure.text(y=y, s=panel.note, size=9, color=LIGHT["muted"], **place)


def y_axis(ax: Axes) -> None:
    """Give the y axis few ticks, and let it begin at 0 where no value is negative."""
    ax.yaxis.set_major_locator(MaxNLocator(5))
    ax.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    if ax.dataLim.y0 >= 0:
        ax.set_ylim(0, max(ax.dataLim.y1 * 1.05, 1e-9))


def name_ends(ax: Axes, ends: list[tuple]) -> None:
    """Write the curves' names beside their `ends` (x, y, name, colour), in three lines at most and without overlap."""
    low, high = ax.get_ylim()
    height = ax.bbox.height / ax.get_figure(root=True).dpi * 72  # points
    line = (high - low) * 11.5 / height  # of letters of 9.5 points
    texts = []
    for _, y, name, colour in sorted(ends, key=lambda end: end[1]):
        parts = textwrap.wrap(name, 13, break_long_words=False, break_on_hyphens=False)
        lines = [shorten(part, 14) for part in parts[:3]]
        texts.append((y, "\n".join(lines) + "…" * (len(parts) > 3), colour))
    heights = [line * (text.count("\n") + 1) for _, text, _ in texts]
    places = spread([y for y, *_ in texts], heights, low + line / 2, high)  # above the last step's number
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

    name: str  # on one or two lines
    colour: str  # as matplotlib takes it
    before: Sequence[float] = ()  # one value a seed; the ring stands at their mean
    after: Sequence[float] = ()  # likewise of the dot
    interval: Sequence[float | None] | None = None  # ends of the dot's whisker
    text: str = ""  # on the right


def margins_of(rows: Sequence[Row]) -> tuple[float, float]:
    """Return the inches on the left and on the right that the names and the texts of the rows need."""
    names, texts = ([line for row in rows for line in getattr(row, part).splitlines()] for part in ("name", "text"))
    left, right = (max(map(len, lines), default=0) for lines in (names, texts))
    return 0.2 + 0.078 * left, 0.2 + 0.078 * right


def ring_dot_whisker(ax: Axes, rows: Sequence[Row], names: bool = True) -> None:
    """Draw a line for each row: a ring before RL, a dot with a whisker after it, small dots for seeds.

    The row's name stands on its left, unless another plot's names stand there, and its text on its right.
    """
    text = {"textcoords": "offset points", "xycoords": ax.get_yaxis_transform(), "annotation_clip": False}
    text |= {"size": 9, "va": "center", "linespacing": 1.05}
    for place, row in enumerate(rows):
        ring, dot = mean(row.before), mean(row.after)
        if row.before and row.after:
            ax.plot([ring, dot], [place, place], color=row.colour, linewidth=2, alpha=0.35, zorder=2)
        look = {"color": row.colour, "zorder": 3}
        if row.interval and None not in row.interval:
            ax.plot(row.interval, [place, place], marker="|", markersize=7, linewidth=1.4, **look)
        for values, middle, fill in ((row.before, ring, LIGHT["paper"]), (row.after, dot, row.colour)):
            if len(values) > 1:
                ax.plot(values, [place + 0.27] * len(values), "o", markersize=2.6, alpha=0.6, **look)
            ax.plot([middle], [place], "o", color=row.colour, markerfacecolor=fill, markersize=7, zorder=4)
        if names:
            name = {"xytext": (-8, 0), "ha": "right", "weight": "bold", "color": row.colour}
            ax.annotate(row.name, (0, place), **name, **text)
        if row.text:
            ax.annotate(row.text, (1, place), xytext=(8, 0), color=row.colour, **text)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_yticks([])
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.grid(axis="x")
    ax.spines["left"].set_visible(False)
