"""The recipes that travel with the package: where they are, what there is, a copy to work on.

In a checkout they are the folder `recipes` beside the package; a wheel carries the same files inside the package as
`recipe_files` (see setup.cfg), a name of its own because a package `recipes` would hide this module.
"""

import argparse
import shutil
from pathlib import Path

from .errors import InputError


def recipes_dir() -> Path:
    """The folder of the recipes, of this checkout or of the installed package.

    Raises:
        InputError: the package was taken out of its checkout without them.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "recipe_files", package.parent / "recipes"):
        if folder.is_dir():
            return folder
    raise InputError(f"no recipes beside {package}; install the package with pip")


def list_configs(folder: Path) -> list[str]:
    """One line per YAML file below `folder`: its path, and its first line where that is a comment (its hardware)."""
    paths = sorted(folder.rglob("*.yaml"))
    names = [path.relative_to(folder).as_posix() for path in paths]
    width = max(map(len, names), default=0)
    return [f"{name:{width}}  {_first_comment(path)}".rstrip() for name, path in zip(names, paths, strict=True)]


def _first_comment(path: Path) -> str:
    with open(path, encoding="utf-8") as file:
        line = file.readline().strip()
    return line.lstrip("# ") if line.startswith("#") else ""


def copy_recipes(target: str | Path) -> Path:
    """Copy all recipes to the new folder `target`: their configs name each other, and outputs, relative to themselves.

    Raises:
        InputError: `target` exists.
    """
    target = Path(target)
    if target.exists():
        raise InputError(f"{target} exists; name a new folder, e.g. {target}-aesl")
    shutil.copytree(recipes_dir(), target, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="aesl recipes", description="List the recipes, or copy them to a folder of your own.", allow_abbrev=False
    )
    parser.add_argument("--copy", metavar="DIR", help="copy all of them to DIR; runs then go to DIR/../runs")
    target = parser.parse_args(argv).copy
    folder = copy_recipes(target) if target is not None else recipes_dir()
    print("\n".join([f"{folder}:", *list_configs(folder)]))
