"""Write the tables of docs/benchmarks.md anew from the records in docs/benchmarks/: `python scripts/bench.py --page`.

The page says `<!-- recorded: NAME -->` where the tables of docs/benchmarks/NAME.json belong, and `<!-- end -->` where
they stop. All other text is written by hand and stays.
"""

import json
import re
from pathlib import Path

import record


DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE, RECORDS = DOCS / "benchmarks.md", DOCS / "benchmarks"
PLACE = re.compile(r"(<!-- recorded: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
ABSENT = {"gpu": "No GPU has run this yet."}


def filled(page: str, records: Path) -> str:
    """Return the page with every place filled from the records in a folder."""
    return PLACE.sub(lambda place: f"{place[1]}\n{text_of(place[2], records)}\n\n{place[3]}", page)


def text_of(name: str, records: Path) -> str:
    """Return the tables of a record, and where they come from."""
    path = records / f"{name}.json"
    if not path.is_file():
        return ABSENT.get(name, "Not recorded yet.")
    found = json.loads(path.read_text(encoding="utf-8"))
    parts = [f"**{table['title']}**\n\n{record.markdown(table)}" for table in found["tables"]]
    return "\n\n".join([*parts, origin(found)])


def origin(found: dict) -> str:
    """Return the lines that say how, where and with what a record was made."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    threads = (
        f"{found['threads']} thread" + "s" * (found["threads"] != 1) if found["threads"] else "threads as they come"
    )
    busy = "; other work shared the cores" if found["load"] > 1.5 * (found["threads"] or 1) else ""
    whole = found["commit"] or "unknown"
    commit = whole[:8] + " with changes" * whole.endswith("+")
    return (
        f"`{found['command']}`  \n"
        f"{found['date']}, commit {commit}, {found['hardware']}, {threads}, load average "
        f"{found['load']:.1f}{busy}; {versions}"
    )


def main() -> None:
    before = PAGE.read_text(encoding="utf-8")
    after = filled(before, RECORDS)
    PAGE.write_text(after, encoding="utf-8")
    print(f"{PAGE}: {'written anew' if after != before else 'nothing new'}")


if __name__ == "__main__":
    main()
