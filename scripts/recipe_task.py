"""Load a recipe's task.py, which no package holds, as a module; the scripts about a recipe share this."""

import importlib.util
from pathlib import Path
from types import ModuleType


RECIPES = Path(__file__).resolve().parent.parent / "recipes"


def recipe_task(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{name.replace('-', '_')}_task", RECIPES / name / "task.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
