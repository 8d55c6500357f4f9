"""A comparison's cells: which there are, the chain.yaml that each is run by, and what its folder says.

A cell is one chain: a method in a setting, a selection, a seed, where there are several a base model and an RL run.
Cells that share a base, a method, a setting, a point and a seed share a cold start, and so its SFT folder. In ROOT,
`<output_dir>/[tune/][<base>/][<setting>/]`, lie

    sft/<method>[@<point>].yaml        the cold start's config, merged
    sft/<method>[@<point>]/seed-<n>/   its folder
    <method>[_<selection>][@<point>]/seed-<n>[-rl-<run>]/     the cell: chain.yaml, cell.json

A cell whose averages have a config of their own holds it, merged, as mix.yaml.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .. import files
from ..arguments import resolve
from ..chain.config import read_config as read_chain
from ..chain.fingerprints import walk
from ..chain.old_fingerprints import renew
from ..chain.stages import Chain
from ..errors import InputError
from ..values import load_yaml
from .config import SFT_DIR, STEP, TUNE_DIR, CompareConfig, Point, row_name


CELL = "cell.json"
CHAIN_CONFIG = "chain.yaml"
MIX_CONFIG = "mix.yaml"


@dataclass(frozen=True)
class Cell:
    config: CompareConfig = field(repr=False, compare=False)
    setting: str
    method: str
    selection: str | None
    seed: int
    point: Point = Point()
    tuning: bool = False
    base: str = ""
    run: int = 0  # of RL, from the same start

    @property
    def name(self) -> str:
        """The row without its setting, as `reference` names it."""
        return row_name(self.method, self.selection)

    @property
    def row(self) -> str:
        return f"{self.setting}/{self.name}" if self.setting else self.name

    @property
    def label(self) -> str:
        at = f" at {self.point}" if self.tuning and self.point.values else ""
        base = f", base {self.base}" if self.base else ""
        run = f", RL run {self.run + 1}" if self.run else ""
        return f"{'tuning: ' if self.tuning else ''}{self.row}{at}{base}, seed {self.seed}{run}"

    @property
    def root(self) -> Path:
        """The folder of the cells of this base and setting."""
        return Path(self.config.output_dir, TUNE_DIR if self.tuning else "", self.base, self.setting)

    @property
    def at(self) -> str:
        return f"@{self.point}" if self.point.values else ""

    @property
    def home(self) -> Path:
        """The folder of the cell."""
        name = row_name(self.method, self.selection, "_") + (self.at if self.tuning else "")
        return self.root / name / (f"seed-{self.seed}" + (f"-rl-{self.run + 1}" if self.run else ""))

    @property
    def sft_dir(self) -> Path | None:
        """The folder of the cold start; None without a cold start."""
        return None if self.selection is None else self.root / SFT_DIR / f"{self.method}{self.at}/seed-{self.seed}"

    def configs(self) -> dict[Path, dict[str, Any]]:
        """Return the files that the cell is run by, with what each says; chain.yaml comes last."""
        config, home = self.config, self.home
        setting, base = config.settings[self.setting], config.bases.get(self.base)
        # RL in every cell: from a start that is not ready it shows what that costs.
        chain = {"output_dir": ".", "seed": self.seed, "ignore_readiness": True, "report": {"title": self.label}}
        chain |= {} if self.selection == "readiness" else {"probe": None}
        found = {}
        for stage, section in config.chain.items():
            if stage == "mix" and self.selection != "mix":
                continue
            chain[stage] = dict(section) if isinstance(section, dict) else section
            if stage == "mix" and not (isinstance(section, dict) and isinstance(section.get("config"), str)):
                continue  # SFT's config is read
            kind = "sft" if stage == "mix" else stage  # the averages are measured as the cold start was
            changes, of_base = (getattr(options, kind, None) or {} for options in (setting, base))
            if stage == "grpo" and self.run:
                chain[stage]["seed"] = config.rl_seed(self.seed, self.run)
            if kind == "sft" and self.selection is not None:
                changes = {**of_base, **config.methods[self.method].sft, **changes, **dict(self.point.values)}
                target = home / MIX_CONFIG
                if stage == "sft":
                    target = self.root / SFT_DIR / f"{self.method}{self.at}.yaml"
                    chain[stage] |= {"output_dir": os.path.relpath(self.sft_dir, home)}
            elif (changes := {**of_base, **changes}) and stage in ("grpo", "eval"):
                target = self.root / f"{stage}.yaml"
            else:
                continue
            found[target] = _merged(section["config"], changes, target.parent)
            chain[stage]["config"] = str(target)
        if self.selection is None:
            chain = {name: value for name, value in chain.items() if name not in ("sft", "handoff")}
        else:
            step = self.selection.removeprefix(STEP)
            chain["selection"] = {"rule": step} if step == self.selection else {"step": int(step)}
        for section in chain.values():
            for key in ("config", "accelerate_config"):
                if isinstance(section, dict) and isinstance(section.get(key), str):
                    section[key] = os.path.relpath(section[key], home)
        return {**found, home / CHAIN_CONFIG: chain}

    def write_configs(self) -> None:
        """Write each config of the cell that does not say what it should."""
        for path, values in self.configs().items():
            text = yaml.safe_dump(values, sort_keys=False)
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                files.write_text(path, text)

    def is_done(self) -> bool:
        """Return whether the chain of this cell, with the configs that it would have now, has nothing left to do.

        A cell without a cell.json was run by `aesl chain`. Nothing says from which configs, and we take it as done.
        """
        if not has_ended(self.home) or not (self.home / CELL).exists():
            return has_ended(self.home)
        if any(not path.exists() or load_yaml(path) != values for path, values in self.configs().items()):
            return False
        chain = chain_of(source(self.home))
        return all(chain.recorded(stage.name).get("inputs") == inputs.fingerprint for stage, inputs in walk(chain))

    def sft_is_done(self) -> bool:
        """Return whether the cold start is trained."""
        return files.read_object(files.own_folder(self.sft_dir) / files.STAGE).get("status") == "done"

    def check_cold_start(self) -> None:
        """Refuse a cold start of other inputs before any cell runs. The chain would refuse it in mid-comparison."""
        if self.sft_dir is None or not (files.own_folder(self.sft_dir) / files.STAGE).exists():
            return
        chain = chain_of(self.home)
        _, inputs = next(walk(chain))
        if chain.recorded("sft").get("inputs") != inputs.fingerprint:
            raise InputError(
                f"{self.sft_dir} was trained from other inputs than its config now gives (a config, the data or the "
                "code that it names has changed): use another output_dir, or remove that folder"
            )

    def evaluation(self) -> dict[str, Any]:
        """Return the evaluation of a finished cell, with the figures `before` and `after` RL."""
        path = source(self.home) / files.EVALUATION
        result = files.read_json(path)
        models = result["models"]
        if missing := {"start", "final"} - models.keys():
            raise InputError(f"{path} has no model {missing.pop()!r}: it is no evaluation of a chain")
        before, after = (
            {name: value for name, value in models[model].items() if isinstance(value, int | float)}
            for model in ("start", "final")
        )
        return {**result, "before": before, "after": after}

    def record(self) -> dict[str, Any] | None:
        """Return the cell's entry in compare.json; None before its end."""
        if not has_ended(self.home):
            return None
        facts, result = files.read_object(self.home / CELL), self.evaluation()
        chosen = files.read_object(self.home / files.SELECTION)
        stages = files.read_json(source(self.home) / files.CHAIN)["stages"]
        return {
            **{key: getattr(self, key) for key in ("row", "setting", "method", "selection", "base", "seed", "run")},
            "label": self.label,
            "point": str(self.point),
            "folder": os.path.relpath(self.home, self.config.output_dir),
            "step": chosen.get("step"),
            "start": files.chosen(chosen),
            "applied": chosen.get("applied"),
            "same_as": facts.get("same_as"),
            "outdated": not self.is_done(),
            # On benchmarks the shares of groups are means over benchmarks, and give no counts.
            "problems": None if "benchmarks" in result else result.get("num_prompts"),
            "count_by": result.get("count_by"),
            "before": result["before"],
            "after": result["after"],
            "seconds": {name: stage["seconds"] for name, stage in stages.items()},
            "provenance": {key: facts.get(key) for key in ("command", "commit", "hardware", "devices", "started")},
        }


def _merged(source: str, changes: dict[str, Any], target: Path) -> dict[str, Any]:
    """Return the config `source` with `changes`, its paths relative to the folder `target`: the tree can be moved."""

    def relative(value: Any) -> Any:
        if isinstance(value, list):
            return [relative(item) for item in value]
        return os.path.relpath(value, target) if isinstance(value, str) and os.path.isabs(value) else value

    values, place = load_yaml(source), Path(source).parent
    try:
        used = {name: value for name, value in values.items() if name != "output_dir" and name not in changes}
        values |= {name: resolve(name, value, place) for name, value in used.items()}
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    values.pop("output_dir", None)
    return {name: relative(value) for name, value in {**values, **changes}.items()}


def chain_of(home: Path) -> Chain:
    """Return the chain of a cell, by the config in its folder, with the record of its stages."""
    chain = Chain(read_chain(home / CHAIN_CONFIG), home / CHAIN_CONFIG)
    chain.read_record()
    renew(chain)
    return chain


def source(home: Path) -> Path:
    """Return the folder in which a cell's RL was run: its own, or that of a selection that came to the same step."""
    same_as = files.read_object(home / CELL).get("same_as")
    return home if same_as is None else home.parent.parent / same_as / home.name


def has_ended(home: Path) -> bool:
    """Return whether every stage of a cell's last run is done."""
    home = source(home)
    stages = files.read_object(home / files.CHAIN).get("stages", {})
    # A stage that is to be repeated is taken out first: an evaluation.json without its stage is that of another run.
    ended = {"grpo", "eval"} <= stages.keys() and all(stage.get("status") == "done" for stage in stages.values())
    return ended and (home / files.EVALUATION).exists()


def failure(cell: Cell) -> str | None:
    """Return `stage grpo failed with exit code 3` where the cell's last run ended so. The next run tries it again.

    A cold start that failed fails every cell that shares it, also those that were not started for it.
    """
    stages = files.read_object(cell.home / files.CHAIN).get("stages", {})
    if cell.sft_dir is not None:
        stages = {**stages, "sft": files.read_object(files.own_folder(cell.sft_dir) / files.STAGE)}
    codes = {name: stage.get("returncode") for name, stage in stages.items() if stage.get("status") == "failed"}
    return next((f"stage {name} failed with exit code {code}" for name, code in codes.items()), None)


def rows(config: CompareConfig) -> list[dict[str, Any]]:
    """Return every row of the table, in order."""
    cells = [
        Cell(config, setting, method, selection, 0)
        for setting, options in config.settings.items()
        for method in config.methods
        if options.methods is None or method in options.methods
        for selection in config.selections(method)
    ]
    return [{key: getattr(cell, key) for key in ("row", "name", "setting", "method", "selection")} for cell in cells]


def table_cells(config: CompareConfig, chosen: dict[str, Point]) -> list[Cell]:
    """Return the cells of the table, seed by seed. A row without a point in `chosen` takes the configs as they are."""
    return [
        Cell(
            *(config, row["setting"], row["method"], row["selection"], seed, chosen.get(row["row"], Point())),
            base=base,
            run=run,
        )
        for seed in config.seeds
        for base in config.table_bases
        for row in rows(config)
        for run in range(config.rl_runs)
    ]


def groups(cells: list[Cell]) -> list[list[Cell]]:
    """Group the cells by the cold start that they share: one worker runs a group's cells one after the other."""
    found: dict[Path, list[Cell]] = {}
    for cell in cells:
        found.setdefault(cell.sft_dir or cell.home, []).append(cell)
    return list(found.values())


def unfinished_groups(cells: list[Cell]) -> list[list[Cell]]:
    """Return the groups that have something to do. Those under way come first, so that they are finished first."""
    waiting = [group for group in groups(cells) if not all(cell.is_done() for cell in group)]
    return sorted(waiting, key=lambda group: not any((cell.home / CELL).exists() for cell in group))
