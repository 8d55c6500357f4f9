"""`aesl report RUN...`: run folders -> report.html, report.md and report_*.png. Reads files only: no torch, no trl.

The page shows what is there and names what is not.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..arguments import ArgumentParser, check_replaceable
from ..errors import exit_on_input_error, tell, visible
from ..files import OWN, REPORT, RunFolder, write_bytes
from .headline import advice, story, warnings
from .parts import PALETTE, Section, Table, markdown_table, png, svg
from .runs import Arm, read_arms
from .sections import sections_of


MARKDOWN = "report.md"
FOOTER = b"Written by aesl report"  # of every version's page


def main(argv: list[str] | None = None) -> None:
    exit_on_input_error("aesl report", lambda: _report(argv))


def _report(argv: list[str] | None) -> None:
    parser = ArgumentParser("aesl report", __doc__.split("\n")[0])
    several = {"nargs": "+", "metavar": "RUN"}
    parser.add_argument("runs", **several, help="chain run folder, SFT folder or recorded run")
    parser.add_argument("--compare", **several, default=[], help="runs to lay beside it, labelled recorded")
    where = f"where the report goes (default: the first RUN, in an SFT folder {OWN})"
    parser.add_argument("--output_dir", metavar="DIR", help=where)
    parser.add_argument("--title", help="heading of the page")
    given = parser.parse_args(argv)
    page = write_report(given.runs, given.compare, output=given.output_dir, title=given.title)
    tell(f"report -> {page}; open it in a browser")


def write_report(
    runs: Iterable[str | Path],
    compare: Iterable[str | Path] = (),
    *,
    output: str | Path | None = None,
    title: str | None = None,
) -> Path:
    """Write report.html, report.md and report_*.png to `output`, and return the page's path.

    By default they lie in the first run. In an SFT folder, which `push_to_hub` uploads, that is in `_aesl`.
    The report is about the first of `runs`; the runs of `compare` are laid beside it and labelled as recorded. Folders
    seed-N beside each other are one arm. A folder that is no run, or that holds a broken file, is an InputError.
    """
    runs = list(runs)
    arms = read_arms(runs, compare)
    sections = sections_of(arms)
    title = title or f"From cold start to RL: {arms[0].label}"
    folder = Path(output) if output is not None else RunFolder(runs[0]).own
    pages = {REPORT: _html, MARKDOWN: _markdown}
    plots = {f"report_{section.id}.png": section.panels for section in sections if section.panels}
    # In the run itself these names are ours, also where report.html was deleted to be made anew
    is_ours = output is None or ((folder / REPORT).is_file() and FOOTER in (folder / REPORT).read_bytes())
    for name in (*pages, *plots):
        check_replaceable("--output_dir", folder / name, is_ours, is_file=True)
    for name, write in pages.items():  # the page comes first: it shows that the other files are ours
        write_bytes(folder / name, visible(write(title, arms, sections)).encode())
    for name, panels in plots.items():
        write_bytes(folder / name, png(panels))
    return folder / REPORT


def _html(title: str, arms: list[Arm], sections: list[Section]) -> str:
    # The loader reads the folder of this file, so that an installed package finds its template
    pages = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    texts = {"title": title, "advice": advice(arms), "story": story(arms), "warnings": warnings(arms)}
    return pages.get_template("report.html.jinja").render(sections=sections, svg=svg, palette=PALETTE, **texts)


def _markdown(title: str, arms: list[Arm], sections: list[Section]) -> str:
    parts = [
        f"# {_plain(title)}",
        _plain(advice(arms)),
        _plain(story(arms)),
        *(f"> {_plain(line)}" for line in warnings(arms)),
    ]
    for section in sections:
        parts += [f"## {section.title}", _plain(section.see)]
        parts += [f"*{_plain(section.gap)}*"] if section.gap else []
        parts += [_table(section.first_table)] if section.first_table else []
        parts += [f"![{section.title}](report_{section.id}.png)"] if section.panels else []
        for name, table, _ in section.tables:
            parts += [f"### {name}", _table(table)] if table.rows else []
    return "\n\n".join(filter(None, parts)) + "\n"


def _table(table: Table) -> str:
    head = [_plain(name) for name in table.full_head]
    lines = [[_plain(f"{c.text} {c.pill and f'({c.pill})'} {c.note}") for c in row] for row in table.rows]
    return markdown_table(head, lines, texts=len(head)) + (f"\n\n{_plain(table.caption)}" if table.caption else "")


def _plain(text: str) -> str:
    """Return text that markdown shows as it is, on one line."""
    return re.sub(r"([|<>`*_\[\]\\])", r"\\\1", " ".join(str(text).split()))
