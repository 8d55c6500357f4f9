"""`aesl recipes`: list the recipes that travel with the package, copy them to a folder of one's own, or check them.

In a checkout they are the folder `recipes` beside the package; a wheel carries the same files inside the package as
`recipe_files` (see setup.cfg).
"""

import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from ..arguments import ArgumentParser, check_replaceable
from ..errors import InputError, nearest, tell
from ..estimates.facts import ACCELERATE_CONFIGS, first_comment
from ..files import swapped
from ..values import check_bound


def recipes_dir() -> Path:
    """Return the folder of the recipes, of this checkout or of the installed package."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "recipe_files", package.parent / "recipes"):
        if folder.is_dir():
            return folder
    raise InputError(f"no recipes beside {package}; install the package with pip")


def names_in(folder: Path) -> list[str]:
    """Return the names of the recipes in `folder`: those that have a chain."""
    return sorted(path.name for path in folder.iterdir() if any(path.glob("chain*.yaml")))


def list_recipes(folder: Path) -> str:
    """Return a line for each recipe in `folder`: its name, what its chain.yaml runs and on which hardware."""
    return _lines({name: _chains(folder / name)[0] for name in names_in(folder)})


def list_chains(folder: Path) -> str:
    """Return a line for each chain and comparison of the recipe in `folder`; the first is the recommended one."""
    return _lines({path.name: path for path in [*_chains(folder), *sorted(folder.glob("compare*.yaml"))]})


def _lines(paths: dict[str, Path]) -> str:
    """Return a line for each config: its name, and its first line, a comment that names its hardware."""
    width = max(map(len, paths))
    return "\n".join(f"{name:{width}}  {first_comment(path)}".rstrip() for name, path in paths.items())


def _chains(folder: Path) -> list[Path]:
    return sorted(folder.glob("chain*.yaml"), key=lambda path: (path.name != "chain.yaml", path.name))


def copy(folder: Path, target: Path, names: Sequence[str]) -> None:
    """Copy the recipes `names` with all that their configs name, or all recipes where there are no names."""
    if target.exists():  # an empty one too: it may be a mounted volume, which cannot be swapped
        raise InputError(f"DIR: {target} exists; name a new folder, e.g. {target / 'aesl-recipes'}")
    check_replaceable("DIR", target, False)
    texts = [path.read_text(encoding="utf-8") for path in find_configs([folder / name for name in names])]
    beside = {ACCELERATE_CONFIGS} | {
        name for text in texts for name in re.findall(r"(?:\.\./)+(\w[\w.-]*)/", text) if (folder / name).is_dir()
    }
    # The copies work as they are, since the paths in them are relative
    with swapped(target) as place:
        left_out = shutil.ignore_patterns("__pycache__", place.name)
        for path in folder.iterdir():
            if names and path.name not in {*names, *beside}:
                continue
            if path.is_dir() and path.name != place.name:
                shutil.copytree(path, place / path.name, ignore=left_out)


def find_configs(paths: list[Path]) -> list[Path]:
    """Return the YAML files that `paths` name, or that lie below them; refuse a path without any.

    What a recipe has recorded, in its folder `results`, is no config to run.
    """
    found = []
    for path in paths:
        if path.is_dir():
            inside = sorted(each for each in path.rglob("*.yaml") if "results" not in each.relative_to(path).parts)
        else:
            inside = [path] if path.is_file() else []
        if not inside:
            raise InputError(f"{path} {'holds no YAML file' if path.is_dir() else 'does not exist'}")
        found += inside
    return list(dict.fromkeys(found))


def main(argv: list[str] | None = None) -> None:
    """List, copy or check; leave with exit code 2 where a check found a problem."""
    parser = ArgumentParser("aesl recipes")
    commands = parser.add_subparsers(prog="aesl recipes", dest="command", required=True, metavar="list | copy | check")
    show = commands.add_parser("list", help="show the recipes, a line each, or the chains of one recipe")
    show.add_argument("name", metavar="NAME", nargs="?", help="a recipe")
    copying = commands.add_parser("copy", help="copy one recipe, or all, to a folder of your own")
    copying.add_argument(
        "names", metavar="NAME ... DIR", nargs="+", help="recipes, and a new folder, by default recipes"
    )
    check = commands.add_parser("check", help="check that they hold together and fit their GPUs; needs no weights")
    check.add_argument("paths", metavar="FOLDER or FILE", nargs="*", type=Path, help="by default all recipes")
    check.add_argument("--brief", action="store_true", help="show the memory's sum and the time alone where it fits")
    check.add_argument("--gpus", type=int, metavar="N", help="memory and time on N GPUs, at the same global batch")
    given = parser.parse_args(argv)
    if given.command == "check":
        if given.gpus is not None:
            check_bound("--gpus", given.gpus, at_least=1)
        paths = find_configs(given.paths or [recipes_dir()])
        from .check import check_config, report  # it imports torch, and a path that is not there needs none

        cases = [check_config(path, given.gpus) for path in paths]
        tell(report(cases, verbose=not given.brief))
        sys.exit(2 if any(case.problems for case in cases) else 0)
    folder = recipes_dir()
    known = names_in(folder)
    if given.command == "list" and given.name is None:
        tell(f"{list_recipes(folder)}\nin {folder}; next: aesl recipes list NAME, or aesl recipes copy NAME")
    elif given.command == "list":
        check_name(given.name, known)
        chains = list_chains(folder / given.name)
        tell(f"{chains}\nin {folder / given.name}; next: aesl chain {folder / given.name / 'chain.yaml'} --dry_run")
    else:
        *names, last = dict.fromkeys(given.names)
        names, target = ([*names, last], Path("recipes")) if last in known else (names, Path(last))
        for name in names:
            check_name(name, known)
        if last not in known and "/" not in last and (hint := nearest(last, known)):
            raise InputError(f"NAME: there is no recipe {last}{hint} (a new folder of that name: ./{last})")
        copy(folder, target, names)
        shown = ", ".join(names) or f"{len(known)} recipes"
        example = target / (names or known)[0]
        tell(f"copied {shown} -> {target}; next: aesl recipes check {example}")


def check_name(name: str, known: Sequence[str]) -> None:
    """Refuse the name of no recipe."""
    if name not in known:
        raise InputError(f"NAME: there is no recipe {name}{nearest(name, known)} (one of {', '.join(known)})")
