"""The pages that repeat what the code says are what the script writes."""

from argparse import SUPPRESS
from dataclasses import dataclass, field
from typing import Literal

import reference_pages
from reference_pages import DOCS, call_of, own_fields, table, tree, with_call, written

from aesl_trl.commands import COMMANDS


def test_the_pages_are_up_to_date():
    stale = [path.name for path, text in written().items() if path.read_text(encoding="utf-8") != text]
    assert stale == [], "python scripts/reference_pages.py"


def test_each_command_has_a_page_in_the_navigation():
    pages = {f"commands/{name}.md" for name in COMMANDS}
    assert {path.relative_to(DOCS).as_posix() for path in written()} == pages | {"reference/config.md"}
    nav = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8").split("nav:")[1]
    assert all(page in nav for page in pages)


@dataclass
class Theirs:
    seed: int = 0


@dataclass
class Part:
    rule: Literal["a", "b"] | None = None
    shares: list[float] | None = None


@dataclass
class Ours(Theirs):
    name: str = field(metadata={"help": "A | b.", "choices": ("x", "y")}, kw_only=True)
    part: Part = field(default_factory=Part)
    parts: dict[str, Part] = field(default_factory=dict)
    on: bool = False
    old: int | None = field(default=None, metadata={"help": SUPPRESS})


def test_tables_by_hand():
    fields = own_fields((Ours,), (Theirs,))
    assert [each.name for each in fields] == ["name", "part", "parts", "on", "old"]
    assert table([fields[0], fields[-1]])[2:] == ["| `name` |  | A \\| b. One of `x`, `y`. |"]
    assert tree(Ours) == [
        "| `seed` | `0` | whole number |",
        "| `name` |  | text |",
        "| `part.rule` |  | `a`, `b` |",
        "| `part.shares` |  | list of number |",
        "| `parts.NAME.rule` |  | `a`, `b` |",
        "| `parts.NAME.shares` |  | list of number |",
        "| `on` | `false` | `true` or `false` |",
        "| `old` |  | whole number |",
    ]


def test_a_key_of_trl_is_not_repeated_and_each_of_ours_is_there():
    page = reference_pages.config_page()
    assert "| `diversity_steps` | `0` |" in page and "| `learning_rate` |" not in page


def test_only_what_stands_between_the_marks_is_written():
    page = f"above\n{reference_pages.BEGIN}\nold\n{reference_pages.END}\nbelow\n"
    once = with_call(page, "new")
    assert once == with_call(once, "new") and once.startswith("above\n") and once.endswith("\nbelow\n")
    assert "old" not in once and "new" in once
    assert "| 2 |" in call_of("select")
