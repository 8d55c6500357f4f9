"""chain.yaml: its sections as dataclasses, read strictly, with absolute paths."""

import glob
import itertools
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..arguments import check_folder
from ..errors import InputError, nearest_sibling
from ..first_checks import check_kind
from ..values import SEED_BOUNDS, check_bound, load_yaml, read_dataclass


@dataclass
class TrainingOptions:
    config: str
    accelerate_config: str | None = None


@dataclass
class SFTOptions(TrainingOptions):
    output_dir: str | None = None


@dataclass
class GRPOOptions(TrainingOptions):
    """`seed`: RL's own, by default the chain's. Chains that differ in it run RL again from the same start."""

    seed: int | None = field(default=None, metadata=SEED_BOUNDS)


@dataclass
class SelectionOptions:
    rule: Literal["turning_point", "last", "best_eval", "readiness", "mix"] | None = None
    metric: Literal["entropy", "self_bleu"] | None = None
    patience: int | None = None
    step: int | None = None  # the candidate of this step, in place of a rule's choice


@dataclass
class MixOptions(TrainingOptions):
    """The averages with the base that `selection.rule: mix` chooses from: the candidate's shares in them.

    Without a config they are measured as SFT's config says.
    """

    config: str | None = None
    weights: list[float] | None = None


@dataclass
class HandoffOptions:
    mode: Literal["auto", "merge", "continue"] = "auto"


@dataclass
class ProbeOptions(TrainingOptions):
    """Without a config the probe takes GRPO's: RL's own prompts, rewards, lengths and temperature."""

    config: str | None = None


@dataclass
class EvalOptions:
    config: str


@dataclass
class ReportOptions:
    compare: list[str] = field(default_factory=list)
    title: str | None = None


@dataclass
class ChainConfig:
    """chain.yaml with absolute paths. `{seed}` in an output folder or a compared run stands for the seed.

    A compared run may be a pattern with `*`, `?` or `[]`: those that are there are compared.

    Without a `probe` section the probe runs with GRPO's config, and null turns it off. With `ignore_readiness` the
    chain goes on to RL whatever the probe's verdict is.
    """

    output_dir: str
    grpo: GRPOOptions
    seed: int = field(default=0, metadata=SEED_BOUNDS)
    sft: SFTOptions | None = None
    selection: SelectionOptions = field(default_factory=SelectionOptions)
    mix: MixOptions | None = None
    handoff: HandoffOptions = field(default_factory=HandoffOptions)
    probe: ProbeOptions | None = field(default_factory=ProbeOptions)
    ignore_readiness: bool = False
    eval: EvalOptions | None = None
    report: ReportOptions = field(default_factory=ReportOptions)


def read_config(path: str | Path, *, output_dir: str | None = None, seed: int | None = None) -> ChainConfig:
    """Read the chain in `path`. `output_dir` (from the current folder) and `seed` win over it.

    Raises:
        InputError: an unknown or mistyped key, or a named file or run that does not exist.
    """
    path, values = Path(path), load_yaml(path)
    if "sft" not in values and (unused := [name for name in ("selection", "mix", "handoff") if name in values]):
        raise InputError(f"{path}: {unused[0]} needs an sft section: without one, RL starts from grpo's own model")
    for name in ("sft", "mix", "eval"):  # the probe may be null: it is there unless it is turned off
        if name in values and values[name] is None:
            raise InputError(f"{path}: {name} must be a mapping (key: value), got null; leave it out")
    if output_dir is not None:
        values["output_dir"] = os.path.abspath(output_dir)
    config = read_dataclass(ChainConfig, values, str(path))
    if seed is not None:
        check_bound("--seed", seed, **SEED_BOUNDS)
        config.seed = seed
    _resolve_paths(config, path)
    return config


def _resolve_paths(config: ChainConfig, path: Path) -> None:
    folder = path.absolute().parent

    def absolute(value: str) -> str:
        return os.path.abspath(folder / os.path.expanduser(value.replace("{seed}", str(config.seed))))

    config.output_dir = absolute(config.output_dir)
    check_folder(f"{path}: output_dir", config.output_dir)
    for name in ("sft", "mix", "probe", "grpo", "eval"):
        section = getattr(config, name)
        for key in ("config", "accelerate_config"):
            if (value := getattr(section, key, None)) is not None:
                setattr(section, key, absolute(value))
                check_config_file(f"{path}: {name}.{key}: {value}", Path(getattr(section, key)))
                if key == "config":
                    check_kind(name, value, load_yaml(section.config), where=f"{path}: {name}.config")
    if config.sft and config.sft.output_dir:
        config.sft.output_dir = absolute(config.sft.output_dir)
    runs = map(absolute, config.report.compare)
    # An installed package carries no recorded runs: a pattern may match none of them, a plain name has to be there
    matched = (sorted(glob.glob(run)) if glob.has_magic(run) and not Path(run).exists() else [run] for run in runs)
    config.report.compare = list(itertools.chain.from_iterable(matched))
    for run in config.report.compare:
        if not Path(run).is_dir():
            raise InputError(f"{path}: report.compare: {run} is no run folder")


def check_config_file(name: str, path: Path) -> None:
    """Refuse the missing config `path`, and say which config beside it has the nearest name."""
    if not path.is_file():
        raise InputError(f"{name} does not exist, looked for {path}{nearest_sibling(path, '*.y*ml')}")
