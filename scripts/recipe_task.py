"""Load a recipe's task.py, which no package holds, as a module, and take digests of files; the scripts share this."""

import hashlib
import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType


RECIPES = Path(__file__).resolve().parent.parent / "recipes"


def recipe_task(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{name.replace('-', '_')}_task", RECIPES / name / "task.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def digest_of_files(paths: Iterable[Path], flags: list[str] = ()) -> str:
    """Return a short digest of the names and contents of files, and of the flags of a command."""
    contents = [path.name.encode() + hashlib.sha256(path.read_bytes()).digest() for path in sorted(paths)]
    return hashlib.sha256(b"\0".join([*contents, json.dumps(list(flags)).encode()])).hexdigest()[:12]
