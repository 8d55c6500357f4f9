"""Build the docs site from pages that also read well on GitHub: mkdocs calls the functions `on_...`.

mkdocs knows the files of docs/ alone. The recipes' pages, CONTRIBUTING.md and CHANGELOG.md join them here, each at its
path in the repository. A link between two of these pages leads to the other page. A link to any other file of the
repository leads to the repository where setup.cfg has its address, and is plain text otherwise.
"""

import configparser
import os
import re
from pathlib import Path
from posixpath import join, normpath, relpath


ROOT = Path(__file__).resolve().parents[1]
DOCS = "docs/"
LINK = re.compile(r"(?<!\!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
IMAGE = re.compile(r"!\[([^\]]*)\]\(([^()\s]+)\)")
CODE = re.compile(r"(^```.*?^```|`[^`\n]*`)", re.DOTALL | re.MULTILINE)


def repository() -> str | None:
    """Return the repository's address, from setup.cfg; None while it has none."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    return setup.get("metadata", "url", fallback=None)


def pages_beside_docs() -> list[str]:
    """Return the pages outside of docs/ that the site shows, and the pictures in them, by their path."""
    found = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "recipes").rglob("*.md"))]
    pictures = sorted((ROOT / "recipes").rglob("*.png"))
    return [path.relative_to(ROOT).as_posix() for path in [*found, *pictures]]


def place(path: str) -> str | None:
    """Return where the site has a file of the repository; None where the site does not have it."""
    if path == "README.md":
        return "index.md"
    if path.startswith(DOCS) and (ROOT / path).is_file():
        return path.removeprefix(DOCS)
    return path if path in pages_beside_docs() else None


def linked(markdown: str, page: str) -> str:
    """Return the text of a page, a path in the repository, with each relative link as the site needs it."""
    folder, here = os.path.dirname(page), os.path.dirname(place(page))
    address = repository()

    def target_of(target: str) -> str | None:
        name, mark, anchor = target.partition("#")
        found = normpath(join(folder, name))
        if (to := place(found)) is not None:
            return relpath(to, here or ".") + mark + anchor
        return f"{address}/blob/main/{found}" if address else None

    def link(match: re.Match) -> str:
        text, target = match.groups()
        if "://" in target or target.startswith(("#", "mailto:")):
            return match[0]
        to = target_of(target)
        return text if to is None else f"[{text}]({to})"

    def image(match: re.Match) -> str:
        to = match[2] if "://" in match[2] else target_of(match[2])
        return f"![{match[1]}]({to})"

    parts = CODE.split(markdown)  # code stands at the odd places
    # A link's text may hold code, so links are found in the text with its code put aside
    aside = parts[1::2]
    text = "".join(part if i % 2 == 0 else f"\0{i // 2}\0" for i, part in enumerate(parts))
    text = IMAGE.sub(image, LINK.sub(link, text))
    return re.sub("\0(\\d+)\0", lambda match: aside[int(match[1])], text)


def on_config(config):
    config.repo_url = repository() or ""
    return config


def on_files(files, config):
    from mkdocs.structure.files import File

    for path in pages_beside_docs():
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    path = page.file.src_uri
    return linked(markdown, path if path in pages_beside_docs() else DOCS + path)


def on_page_content(html, page, config, files):
    """Show the docstrings' references, [`~trl.SFTTrainer`], as the name alone."""
    return re.sub(r"\[<code>~?(?:[\w.]+\.)?(\w+)</code>\]", r"<code>\1</code>", html)
