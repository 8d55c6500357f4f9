"""What a chapter of the report is made of: texts, tables of cells, panels.

Left out: what they say (report_sections.py and the chapters that it names), how they look (report.py).
"""

from dataclasses import dataclass, field

from .report_plots import Panel


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
