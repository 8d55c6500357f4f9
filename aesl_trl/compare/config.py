"""compare.yaml: methods, settings, seeds and tuning, read strictly, with absolute paths.

A method is a name and what it changes in the config of the cold start, so a new loss needs no change here.
"""

import itertools
import math
import os
import re
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..arguments import check_folder, resolve
from ..chain.config import ChainConfig, check_config_file
from ..diversity.selection import DEFAULT_RULE, RULES
from ..errors import InputError, nearest
from ..first_checks import check_kind
from ..values import (
    SEED_BOUNDS,
    SHORT,
    check_bound,
    check_choice,
    load_yaml,
    read_dataclass,
    shown,
    with_new_names,
)


STEP = "step-"  # begins the selections that come from rl_from_steps
TUNE_DIR, SFT_DIR = "tune", "sft"
FOLDERS = (TUNE_DIR, SFT_DIR)  # of the output folder, so no method or setting may have these names
OURS = ("output_dir", "seed", "selection", "report")  # keys of chain.yaml that differ from cell to cell
FIXED = ("output_dir", "seed")  # keys of a stage's config that differ from cell to cell
RL_SEEDS_APART = 10_000  # between RL's seeds of one start, where it is run several times
RATE = "learning_rate"  # whose grid goes on where a row's best lies at an edge
RATES = {RATE: [1.0e-5, 3.0e-5, 1.0e-4, 3.0e-4, 1.0e-3]}  # tried for every row where no grid is named
MAX_NAME = 200  # of a cell's folder: 255 is the file system's limit, and files being written have longer names
FROM_STEP_1 = {"at_least": 1, "hint": "RL from the base is a method with sft: null"}


@dataclass(frozen=True)
class Point:
    """A point of tuning's grid: values for the cold start's config."""

    values: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return ",".join(f"{name}={value}" for name, value in self.values)


@dataclass
class MethodOptions:
    """`sft`: what the method changes in the cold start's config; null: RL from the base. `grid` replaces tune's."""

    sft: dict[str, Any] | None
    selections: list[str] | None = None
    grid: Any = None


@dataclass
class SettingOptions:
    """What the setting changes in every method's configs. `methods` names those that run in it, by default all."""

    sft: dict[str, Any] = field(default_factory=dict)
    grpo: dict[str, Any] = field(default_factory=dict)
    eval: dict[str, Any] = field(default_factory=dict)
    methods: list[str] | None = None


@dataclass
class BaseOptions:
    """A base model: `model` is what the cold start and direct RL begin from; the rest changes in its configs."""

    model: str
    sft: dict[str, Any] = field(default_factory=dict)
    grpo: dict[str, Any] = field(default_factory=dict)
    eval: dict[str, Any] = field(default_factory=dict)


@dataclass
class TuneOptions:
    """`by`: the figure after RL whose highest mean decides. `keep`: how many points go on to the next seed.

    `base`: the base that is tuned on, which the table leaves out. `extend`: how many points are added to a row's grid
    beyond an edge at which its best point lies; by default 2 beside the default grid, and none beside a named one.
    """

    seeds: list[int]
    grid: Any = None
    by: str = "pass@1"
    keep: int | None = None
    base: str | None = None
    extend: int | None = field(default=None, metadata={"at_least": 0, "at_most": 2})


@dataclass
class EstimateOptions:
    """Seconds of a cold start, and of all that follows it in a cell, until finished cells tell."""

    sft_s: float
    rl_s: float


@dataclass
class CompareConfig:
    """compare.yaml. `chain` is the template of each cell's chain.yaml, with absolute `config` paths.

    `rl_runs`: how often RL is run from each start of the table, with other seeds of its own.
    """

    output_dir: str
    seeds: list[int]
    chain: dict[str, Any]
    methods: dict[str, MethodOptions]
    settings: dict[str, SettingOptions] = field(default_factory=dict)
    bases: dict[str, BaseOptions] = field(default_factory=dict)
    rl_runs: int = field(default=1, metadata={"at_least": 1})
    rl_from_steps: list[int] = field(default_factory=list, metadata=FROM_STEP_1)
    reference: list[str] = field(default_factory=list)
    metric: str = "pass@1"
    tune: TuneOptions | None = None
    estimate: EstimateOptions | None = None

    @property
    def table_bases(self) -> list[str]:
        """Return the bases of the table, which are all but that of tuning; "" for the model that the configs name."""
        return [name for name in self.bases if self.tune is None or name != self.tune.base] or [""]

    def selections(self, method: str) -> list[str | None]:
        """Return the ways to choose the start of RL, one for each row; [None] without a cold start."""
        options = self.methods[method]
        if options.sft is None:
            return [None]
        return [*(options.selections or []), *(f"{STEP}{step}" for step in self.rl_from_steps)]

    def rl_seed(self, seed: int, run: int) -> int:
        """Return the seed of a start's RL run; that of the first, number 0, is the start's own."""
        return seed + run * RL_SEEDS_APART

    def points(self, method: str) -> list[Point]:
        """Return the points that tuning tries for a method; none for a method without a cold start."""
        options = self.methods[method]
        if self.tune is None or options.sft is None:
            return []
        return grid_points(self.tune.grid if options.grid is None else options.grid)


def read_config(path: str | Path, *, output_dir: str | None = None, to_come: Collection[str] = ()) -> CompareConfig:
    """Read the comparison in `path`. `output_dir`, from the current folder, wins over it.

    The configs may name the absolute paths `to_come` although they do not exist yet.

    Raises:
        InputError: an unknown or mistyped key, a file that does not exist, names that would share a folder, a
            reference that is no row, tuning on the table's seeds or with unequal budgets.
    """
    path = Path(path)
    values, folder = load_yaml(path), path.absolute().parent
    if output_dir is not None:
        values["output_dir"] = os.path.abspath(output_dir)
    if values.get("settings") in (None, {}):
        values["settings"] = {"": {}}
    if isinstance(values["settings"], dict):  # a setting without changes may be left empty
        values["settings"] = {name: {} if item is None else item for name, item in values["settings"].items()}
    config = read_dataclass(CompareConfig, values, str(path))
    config.output_dir = os.path.abspath(folder / os.path.expanduser(config.output_dir))
    try:
        check_folder("output_dir", config.output_dir)
        _resolve_chain(config, folder)
        _resolve_changes(config, folder, to_come)
        _set_default_selections(config)
        _check_selections(config)
        _check_names(config)
        _check_seeds_and_grids(config)
        _check_lengths(config)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return config


def _resolve_chain(config: CompareConfig, folder: Path) -> None:
    """Make the paths of the template's own configs absolute. The rest is checked as a chain.yaml."""
    known = [item.name for item in fields(ChainConfig) if item.name not in OURS]
    for name in config.chain:
        if name in OURS:
            raise InputError(f"chain: {name} is set for each cell by the comparison; leave it out")
        if name not in known:
            raise InputError(f"chain: unknown key {name!r}{nearest(name, known)}")
    for name in ("grpo", "eval"):
        if name not in config.chain:
            raise InputError(f"chain.{name} is missing: what a comparison shows is measured after RL")
    if "sft" not in config.chain and any(options.sft is not None for options in config.methods.values()):
        raise InputError("chain.sft is missing: the methods with a cold start need its config")
    for name, section in config.chain.items():
        if name == "grpo" and isinstance(section, dict) and "seed" in section:
            raise InputError("chain.grpo: seed is set for each cell by the comparison; leave it out")
        has_config = isinstance(section, dict) and isinstance(section.get("config"), str)
        if name in ("sft", "grpo", "eval") and not has_config:
            raise InputError(f"chain.{name} must be a mapping with the path config, got {shown(section)}")
        for key in ("config", "accelerate_config"):
            if isinstance(section, dict) and isinstance(section.get(key), str):
                target = Path(os.path.abspath(folder / os.path.expanduser(section[key])))
                check_config_file(f"chain.{name}.{key}: {section[key]}", target)
                if key == "config":
                    check_kind(name, section[key], load_yaml(target), where=f"chain.{name}.config")
                section[key] = str(target)


def _resolve_changes(config: CompareConfig, folder: Path, to_come: Collection[str]) -> None:
    """Make the paths absolute that a method, a setting or a base puts into a stage's config.

    Every changed setting, those of the grids too, gets today's name.
    """
    changes = {f"methods.{name}.sft": options.sft or {} for name, options in config.methods.items()}
    for options in config.bases.values():
        for stage in (options.sft, options.grpo):
            stage["model_name_or_path"] = options.model
    for kind in ("settings", "bases"):
        for name, options in getattr(config, kind).items():
            changes |= {f"{kind}.{name}.{stage}": getattr(options, stage) for stage in ("sft", "grpo", "eval")}
    for where, mapping in changes.items():
        if fixed := [key for key in mapping if key in FIXED]:
            raise InputError(f"{where}: {fixed[0]} is set for each cell by the comparison; leave it out")
        try:
            changed = {key: resolve(key, value, folder, to_come) for key, value in mapping.items()}
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        mapping.clear()
        mapping.update(with_new_names(changed, where))
    if config.tune is not None:
        config.tune.grid = _by_new_names(config.tune.grid, "tune.grid")
    for name, options in config.methods.items():
        options.grid = _by_new_names(options.grid, f"methods.{name}.grid")


def _by_new_names(grid: Any, where: str) -> Any:
    """Return a grid, in either form, with today's names of the settings."""
    if isinstance(grid, list):
        return [with_new_names(point, where) if isinstance(point, dict) else point for point in grid]
    return with_new_names(grid, where) if isinstance(grid, dict) else grid


def _set_default_selections(config: CompareConfig) -> None:
    """Give a method that names no selection the default one, or none beside rl_from_steps."""
    for options in config.methods.values():
        if options.sft is not None and options.selections is None:
            options.selections = [] if config.rl_from_steps else [DEFAULT_RULE]


def _check_names(config: CompareConfig) -> None:
    """Refuse names that no folder can have, that would give two rows one folder, or that nothing has."""
    if not config.methods:
        raise InputError("methods is empty: name at least one")
    settings, seen = [name for name in config.settings if name], {}
    for kind, names in (("methods", config.methods), ("settings", settings), ("bases", config.bases)):
        for name in names:
            is_name = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", name) and len(name) <= MAX_NAME
            if not is_name or name in FOLDERS:
                wanted = f"at most {MAX_NAME} letters, digits and _ . + -, and not {' or '.join(FOLDERS)}"
                raise InputError(f"{kind}: {SHORT.repr(name)} names a folder: {wanted}")
    pairs = [(method, each) for method in config.methods for each in config.selections(method)]
    places = [(method, row_name(method, each, "_")) for method, each in pairs]
    folders = [*((f"setting {name}", name) for name in settings), *((f"base {name}", name) for name in config.bases)]
    for owner, place in [*folders, *places]:
        if place in seen:
            raise InputError(f"{owner} and {seen[place]} would both write to the folder {place}: rename one")
        seen[place] = owner
    for name, options in config.settings.items():
        for method in options.methods or []:
            if method not in config.methods:
                raise InputError(f"settings.{name}.methods: no method {method!r}{nearest(method, config.methods)}")
    rows = [row_name(method, each) for method, each in pairs]
    for name in config.reference:
        if name not in rows:
            raise InputError(f"reference: no row {name!r}, there are {', '.join(rows)}{nearest(name, rows)}")


def _check_selections(config: CompareConfig) -> None:
    for name, options in config.methods.items():
        if options.sft is None and options.selections:
            raise InputError(f"methods.{name}: selections need a cold start, and sft is null")
        for rule in options.selections or []:
            check_choice(f"methods.{name}.selections", rule, RULES)
        selections = config.selections(name)
        if not selections:
            raise InputError(f"methods.{name}: neither selections nor rl_from_steps says where RL starts")
        if len(set(selections)) != len(selections):
            raise InputError(f"methods.{name}: the same selection twice")


def row_name(method: str, selection: str | None, separator: str = "/") -> str:
    """Return a row's name without its setting, as `reference` and the tables give it. Its folder has a "_"."""
    return method if selection is None else f"{method}{separator}{selection}"


def _check_seeds_and_grids(config: CompareConfig) -> None:
    """Refuse to tune on the table's seeds, or on grids of unequal size: one more knob must not try more points."""
    for name, seeds in {"seeds": config.seeds, "tune.seeds": config.tune.seeds if config.tune else [0]}.items():
        for seed in seeds:
            check_bound(f"{name}: a seed", seed, whole=True, **SEED_BOUNDS)
        if not seeds or len(set(seeds)) != len(seeds):
            raise InputError(f"{name} must be different whole numbers, at least one, got {SHORT.repr(seeds)}")
    grids = {f"methods.{name}.grid": options for name, options in config.methods.items() if options.grid is not None}
    rl_seeds = [config.rl_seed(seed, run) for seed in config.seeds for run in range(config.rl_runs)]
    check_bound("seeds: RL's last seed", max(rl_seeds), whole=True, **SEED_BOUNDS)
    if len(set(rl_seeds)) != len(rl_seeds):
        raise InputError(
            f"rl_runs: two starts would share a seed of RL, which are {RL_SEEDS_APART} apart: other seeds"
        )
    if config.tune is None:
        if grids:
            raise InputError(f"{next(iter(grids))} needs a section tune, with seeds of its own")
        return
    _check_tuned_base(config)
    if config.tune.extend is None:
        config.tune.extend = 2 if config.tune.grid is None else 0
    config.tune.grid = RATES if config.tune.grid is None else config.tune.grid
    if shared := sorted({*config.seeds} & {*config.tune.seeds}):
        raise InputError(f"tune.seeds and seeds share {shared[0]}: tune on seeds that the table does not use")
    budget = len(_named_points(config.tune.grid, "tune.grid"))
    if config.tune.keep is not None and not 1 <= config.tune.keep <= budget:
        raise InputError(f"tune.keep must lie from 1 to {budget}, the points of the grid, got {config.tune.keep}")
    for where, options in grids.items():
        if options.sft is None:
            raise InputError(f"{where}: without a cold start there is nothing to tune")
        if (tried := len(_named_points(options.grid, where))) != budget:
            raise InputError(f"{where} has {tried} points, tune.grid {budget}: every method gets the same budget")


def _check_tuned_base(config: CompareConfig) -> None:
    """Ask for a base to tune on that the table does not use, where there are several."""
    base, names = config.tune.base, ", ".join(config.bases)
    if base is None and config.bases:
        raise InputError(f"tune.base is missing: which of {names} is tuned on? The table leaves it out")
    if base is not None and base not in config.bases:
        raise InputError(f"tune.base: no base {base!r} among bases{nearest(base, config.bases)}")
    if base is not None and len(config.bases) == 1:
        raise InputError(f"tune.base: the table leaves {base} out, and bases has no other")


def _check_lengths(config: CompareConfig) -> None:
    """Refuse names that a cell's folder cannot have together: the method, the selection and the point of a grid."""
    for method in config.methods:
        points = [str(point) for point in config.points(method)]
        for selection in config.selections(method):
            name = max((f"{row_name(method, selection, '_')}@{point}" for point in ["", *points]), key=len)
            if len(name) > MAX_NAME:
                raise InputError(f"methods.{method}: {SHORT.repr(name)} names a folder: at most {MAX_NAME} characters")


def _named_points(grid: Any, where: str) -> list[Point]:
    is_lists = isinstance(grid, dict) and all(isinstance(item, list) and item for item in grid.values())
    is_points = isinstance(grid, list) and all(isinstance(item, dict) and item for item in grid)
    if not grid or not (is_lists or is_points):
        raise InputError(
            f"{where} must hold lists of values (learning_rate: [1.0e-5, 1.0e-4]) or be a list of points "
            "([{learning_rate: 1.0e-5}, ...])"
        )
    points = grid_points(grid)
    for point in points:
        if bad := [name for name, value in point.values if isinstance(value, list | dict) or name in FIXED]:
            raise InputError(f"{where}: {bad[0]} must have plain values of the cold start's config")
        if (rate := dict(point.values).get(RATE)) is not None and not _is_positive(rate):
            raise InputError(f"{where}: {RATE} must be a number above 0, got {SHORT.repr(rate)}")
        if not re.fullmatch(r"[A-Za-z0-9_.,=+-]+", str(point)):
            raise InputError(f"{where}: {point} names a folder: letters, digits and _ . , = + - only")
    if len({str(point) for point in points}) != len(points):
        raise InputError(f"{where} has the same point twice")
    return points


def _is_positive(value: Any) -> bool:
    """Return whether a value is a number above 0; YAML reads 1e-5, without a dot, as a text."""
    try:
        return 0 < float(value) < math.inf
    except (TypeError, ValueError):
        return False


def grid_points(grid: dict[str, list] | list[dict]) -> list[Point]:
    """Return all combinations of a mapping's values, or the points of a list as they stand."""
    if isinstance(grid, dict):
        grid = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    return [Point(tuple(point.items())) for point in grid]
