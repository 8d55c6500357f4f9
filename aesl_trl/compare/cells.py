"""A comparison's cells: which there are, the chain.yaml that each is run by, and what its folder says.

A cell is one chain: a method in a setting, a selection, a seed. Cells that share a method, a setting, a point and a
seed share a cold start, and so its SFT folder:

    <output_dir>/[tune/][<setting>/]sft/<method>[@<point>].yaml        the cold start's config, merged
    <output_dir>/[tune/][<setting>/]sft/<method>[@<point>]/seed-<n>/   its folder
    <output_dir>/[tune/][<setting>/]<method>[_<selection>][@<point>]/seed-<n>/     the cell: chain.yaml, cell.json

Left out: compare.yaml (config.py), running the chains (compare.py).
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .. import files
from ..arguments import load_yaml, resolve
from ..chain.config import read_config as read_chain
from ..chain.stages import BUILDERS, Chain, fingerprint
from ..errors import InputError
from .config import SFT_DIR, STEP, TUNE_DIR, CompareConfig, Point, row_label, row_name


CELL = "cell.json"
CHAIN_CONFIG = "chain.yaml"
SFT_STAGE = "stage.json"  # chain/chain.py's record of an SFT that several chains share


@dataclass(frozen=True)
class Cell:
    setting: str
    method: str
    selection: str | None
    seed: int
    point: Point = Point()
    tuning: bool = False

    @property
    def name(self) -> str:
        """The row without its setting, as `reference` names it."""
        return row_label(self.method, self.selection)

    @property
    def row(self) -> str:
        return f"{self.setting}/{self.name}" if self.setting else self.name

    @property
    def label(self) -> str:
        at = f" at {self.point}" if self.tuning and self.point.values else ""
        return f"{'tuning: ' if self.tuning else ''}{self.row}{at}, seed {self.seed}"


def rows(config: CompareConfig) -> list[dict[str, Any]]:
    """Every row of the table, in order."""
    found = []
    for setting, options in config.settings.items():
        for method in config.methods:
            if options.methods is None or method in options.methods:
                for selection in config.selections(method):
                    cell = Cell(setting, method, selection, 0)
                    row = {"row": cell.row, "name": cell.name, "setting": setting}
                    found.append({**row, "method": method, "selection": selection})
    return found


def table_cells(config: CompareConfig, chosen: dict[str, Point]) -> list[Cell]:
    """The cells of the table, each row at its point of `chosen` (none: the configs as they stand), by seed first."""
    return [
        Cell(row["setting"], row["method"], row["selection"], seed, chosen.get(row["row"], Point()))
        for seed in config.seeds
        for row in rows(config)
    ]


def groups(config: CompareConfig, cells: list[Cell]) -> list[list[Cell]]:
    """Cells by the cold start that they share: they run one after the other, each group by itself."""
    found: dict[Any, list[Cell]] = {}
    for cell in cells:
        found.setdefault(sft_folder(config, cell) or folder(config, cell), []).append(cell)
    return list(found.values())


# ---- Folders and configs


def _root(config: CompareConfig, cell: Cell) -> Path:
    return Path(config.output_dir, *([TUNE_DIR] if cell.tuning else []), *([cell.setting] if cell.setting else []))


def _at(cell: Cell) -> str:
    return f"@{cell.point}" if cell.point.values else ""


def folder(config: CompareConfig, cell: Cell) -> Path:
    name = row_name(cell.method, cell.selection)
    return _root(config, cell) / (name + (_at(cell) if cell.tuning else "")) / f"seed-{cell.seed}"


def sft_folder(config: CompareConfig, cell: Cell) -> Path | None:
    if cell.selection is None:
        return None
    return _root(config, cell) / SFT_DIR / f"{cell.method}{_at(cell)}" / f"seed-{cell.seed}"


def configs(config: CompareConfig, cell: Cell) -> dict[Path, str]:
    """The files that a cell is run by, with their contents; chain.yaml last."""
    root, home, setting = _root(config, cell), folder(config, cell), config.settings[cell.setting]
    # RL in every cell: from a start that is not ready it shows what that costs.
    chain = {"output_dir": ".", "seed": cell.seed, "ignore_readiness": True, "report": {"title": cell.label}}
    chain |= {} if cell.selection == "readiness" else {"probe": None}
    found = {}
    for stage, section in config.chain.items():
        chain[stage] = dict(section) if isinstance(section, dict) else section
        changes = getattr(setting, stage, None) or {}
        if stage == "sft" and cell.selection is not None:
            changes = {**config.methods[cell.method].sft, **changes, **dict(cell.point.values)}
            target = root / SFT_DIR / f"{cell.method}{_at(cell)}.yaml"
            chain[stage] |= {"output_dir": os.path.relpath(sft_folder(config, cell), home)}
        elif changes and stage in ("grpo", "eval"):
            target = root / f"{stage}.yaml"
        else:
            continue
        found[target] = _merged(section["config"], changes, target.parent)
        chain[stage]["config"] = str(target)
    if cell.selection is None:
        chain = {name: value for name, value in chain.items() if name not in ("sft", "handoff")}
    else:
        step = cell.selection.removeprefix(STEP)
        chain["selection"] = {"rule": step} if step == cell.selection else {"step": int(step)}
    for section in chain.values():
        for key in ("config", "accelerate_config"):
            if isinstance(section, dict) and isinstance(section.get(key), str):
                section[key] = os.path.relpath(section[key], home)
    return {**found, home / CHAIN_CONFIG: yaml.safe_dump(chain, sort_keys=False)}


def _merged(source: str, changes: dict[str, Any], target: Path) -> str:
    """The config `source` with `changes`, its paths relative to the folder `target`: the whole tree can be moved."""
    values, place = load_yaml(source), Path(source).parent
    try:
        values = {name: resolve(name, value, place) for name, value in values.items() if name != "output_dir"}
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    values = {name: _relative(value, target) for name, value in {**values, **changes}.items()}
    return yaml.safe_dump(values, sort_keys=False)


def _relative(value: Any, place: Path) -> Any:
    if isinstance(value, list):
        return [_relative(item, place) for item in value]
    return os.path.relpath(value, place) if isinstance(value, str) and os.path.isabs(value) else value


def write_configs(config: CompareConfig, cell: Cell) -> Path:
    """Write what is not there as it should be; returns chain.yaml."""
    for path, text in configs(config, cell).items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            files.write_text(path, text)
    return folder(config, cell) / CHAIN_CONFIG


# ---- What the folders say


def is_done(config: CompareConfig, cell: Cell) -> bool:
    """Whether the chain of this cell, with the configs that it would have now, has nothing left to do.

    A cell without a cell.json was run by `aesl chain`: nothing says from which configs, and its word is taken.
    """
    home = folder(config, cell)
    if not has_ended(home):
        return False
    if not (home / CELL).exists():
        return True
    return _same_configs(config, cell) and _same_inputs(source(home))


def source(home: Path) -> Path:
    """The folder in which a cell's RL was run: its own, or that of a selection that came to the same step."""
    same_as = files.read_json(home / CELL).get("same_as") if (home / CELL).exists() else None
    return home if same_as is None else home.parent.parent / same_as / home.name


def has_ended(home: Path) -> bool:
    home = source(home)
    if not (home / files.CHAIN).exists() or not (home / files.EVALUATION).exists():
        return False
    stages = files.read_json(home / files.CHAIN).get("stages", {})
    # A stage that is to be repeated is taken out first: an evaluation.json without its stage is that of another run.
    return {"grpo", "eval"} <= stages.keys() and all(stage.get("status") == "done" for stage in stages.values())


def failure(home: Path) -> str | None:
    """`stage grpo failed with exit code 3` where the cell's last run ended so; it is tried again with the next."""
    stages = files.read_json(home / files.CHAIN).get("stages", {}) if (home / files.CHAIN).exists() else {}
    failed = {name: stage.get("returncode") for name, stage in stages.items() if stage.get("status") == "failed"}
    return next((f"stage {name} failed with exit code {code}" for name, code in failed.items()), None)


def _same_configs(config: CompareConfig, cell: Cell) -> bool:
    return all(
        path.exists() and path.read_text(encoding="utf-8") == text for path, text in configs(config, cell).items()
    )


def _same_inputs(home: Path) -> bool:
    """The chain's own check of each stage: its command, configs, data and code files, and the stage before it."""
    chain = Chain(read_chain(home / CHAIN_CONFIG), home / CHAIN_CONFIG)
    recorded, previous = files.read_json(home / files.CHAIN)["stages"], None
    for name in chain.names:
        previous = fingerprint(BUILDERS[name](chain), chain.sft_dir if name == "sft" else chain.run, previous)
        if recorded.get(name, {}).get("inputs") != previous:
            return False
    return True


def check_cold_start(config: CompareConfig, cell: Cell) -> None:
    """Refuse a cold start of other inputs before any cell is run: the chain would, in the middle of the comparison."""
    sft = sft_folder(config, cell)
    if sft is None or not (sft / SFT_STAGE).exists():
        return
    home = folder(config, cell)
    chain = Chain(read_chain(home / CHAIN_CONFIG), home / CHAIN_CONFIG)
    if files.read_json(sft / SFT_STAGE).get("inputs") != fingerprint(BUILDERS["sft"](chain), sft, None):
        raise InputError(
            f"{sft} was trained from other inputs than its config now gives (a config, the data or the code that it "
            "names has changed): use another output_dir, or remove that folder"
        )


def record(config: CompareConfig, cell: Cell) -> dict[str, Any] | None:
    """What compare.json holds of a finished cell; None before its end."""
    home = folder(config, cell)
    if not has_ended(home):
        return None
    facts, run = files.read_json(home / CELL) if (home / CELL).exists() else {}, source(home)
    models = files.read_json(run / files.EVALUATION)["models"]
    if missing := {"start", "final"} - models.keys():
        raise InputError(f"{run / files.EVALUATION} has no model {missing.pop()!r}: it is no evaluation of a chain")
    chosen = files.read_json(home / files.SELECTION) if (home / files.SELECTION).exists() else {}
    stages = files.read_json(run / files.CHAIN)["stages"]
    return {
        **{key: getattr(cell, key) for key in ("row", "setting", "method", "selection", "seed")},
        "point": str(cell.point),
        "folder": os.path.relpath(home, config.output_dir),
        "step": chosen.get("step"),
        "applied": chosen.get("applied"),
        "same_as": facts.get("same_as"),
        "outdated": not is_done(config, cell),
        "before": _numbers(models["start"]),
        "after": _numbers(models["final"]),
        "seconds": {name: stage["seconds"] for name, stage in stages.items()},
        "provenance": {key: facts.get(key) for key in ("command", "commit", "hardware", "devices", "started")},
    }


def _numbers(figures: dict) -> dict[str, float]:
    return {name: value for name, value in figures.items() if isinstance(value, int | float)}


def sft_is_done(config: CompareConfig, cell: Cell) -> bool:
    path = sft_folder(config, cell) / SFT_STAGE
    return path.exists() and files.read_json(path).get("status") == "done"


def in_order(config: CompareConfig, cells: list[Cell]) -> Iterator[list[Cell]]:
    """Groups with something to do; those that are under way first, so that a resumed comparison ends what it began."""
    waiting = [group for group in groups(config, cells) if not all(is_done(config, cell) for cell in group)]
    yield from sorted(waiting, key=lambda group: not any((folder(config, cell) / CELL).exists() for cell in group))
