"""`aesl recipes`: list the recipes that travel with the package, copy them to a folder of one's own, or check them.

In a checkout they are the folder `recipes` beside the package; a wheel carries the same files inside the package as
`recipe_files` (see setup.cfg).
"""

import shutil
import sys
from pathlib import Path

from ..arguments import ArgumentParser, check_replaceable
from ..errors import InputError, tell
from ..estimates.facts import first_comment
from ..files import swapped
from ..values import check_bound


def recipes_dir() -> Path:
    """Return the folder of the recipes, of this checkout or of the installed package."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "recipe_files", package.parent / "recipes"):
        if folder.is_dir():
            return folder
    raise InputError(f"no recipes beside {package}; install the package with pip")


def list_configs(folder: Path) -> list[str]:
    """Return a line for each YAML file below `folder`: its path, and its first line if that is a comment."""
    paths = sorted(folder.rglob("*.yaml"))
    names = [path.relative_to(folder).as_posix() for path in paths]
    width = max(map(len, names), default=0)
    return [f"{name:{width}}  {first_comment(path)}".rstrip() for name, path in zip(names, paths, strict=True)]


def main(argv: list[str] | None = None) -> None:
    """List, copy or check; leave with exit code 2 where a check found a problem."""
    parser = ArgumentParser("aesl recipes", "List, copy or check the recipes.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="list | copy | check")
    commands.add_parser("list", help="show every config and its hardware")
    copy = commands.add_parser("copy", help="copy all recipes to a folder of your own")
    copy.add_argument("target", metavar="DIR", type=Path, help="a new folder; runs then go to DIR/../runs")
    check = commands.add_parser("check", help="check that they hold together and fit their GPUs; needs no weights")
    check.add_argument("paths", metavar="FOLDER or FILE", nargs="*", type=Path, help="by default all recipes")
    check.add_argument("--brief", action="store_true", help="show the memory's sum and the time alone where it fits")
    check.add_argument("--gpus", type=int, metavar="N", help="memory and time on N GPUs, at the same global batch")
    given = parser.parse_args(argv)
    if given.command == "check":
        if given.gpus is not None:
            check_bound("--gpus", given.gpus, at_least=1)
        from .check import check_config, find_configs, report

        cases = [check_config(path, given.gpus) for path in find_configs(given.paths or [recipes_dir()])]
        tell(report(cases, verbose=not given.brief))
        sys.exit(2 if any(case.problems for case in cases) else 0)
    folder = recipes_dir()
    if given.command == "copy":
        if given.target.exists():  # an empty one too: it may be a mounted volume, which cannot be swapped
            raise InputError(f"DIR: {given.target} exists; name a new folder, e.g. {given.target / 'aesl-recipes'}")
        check_replaceable("DIR", given.target, False)
        # The copies work as they are, since the paths in them are relative
        with swapped(given.target) as place:
            left_out = shutil.ignore_patterns("__pycache__", place.name)
            shutil.copytree(folder, place, ignore=left_out, dirs_exist_ok=True)
        folder = given.target
    tell("\n".join([f"{folder}:", *list_configs(folder)]))
