"""chain.yaml: its sections as dataclasses, read strictly, paths made absolute.

What the stages' own configs say is left out: stages.py has each checked by its stage's parser.
"""

import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from ..arguments import check_fields, check_folder, load_yaml
from ..errors import InputError, nearest


@dataclass
class SFTOptions:
    config: str
    accelerate_config: str | None = None
    output_dir: str | None = None


@dataclass
class SelectionOptions:
    rule: Literal["turning_point", "last", "best_eval", "readiness"] | None = None
    metric: Literal["entropy", "self_bleu"] | None = None
    patience: int | None = None
    step: int | None = None  # this candidate, by no rule


@dataclass
class HandoffOptions:
    mode: Literal["auto", "merge", "continue"] = "auto"


@dataclass
class ProbeOptions:
    """Without a config the probe takes GRPO's: RL's own prompts, rewards, lengths and temperature."""

    config: str | None = None
    accelerate_config: str | None = None


@dataclass
class GRPOOptions:
    config: str
    accelerate_config: str | None = None


@dataclass
class EvalOptions:
    config: str


@dataclass
class ReportOptions:
    compare: list[str] = field(default_factory=list)
    title: str | None = None


@dataclass
class ChainConfig:
    """chain.yaml, its paths absolute. `{seed}` in an output folder or a compared run stands for the seed.

    Left out, `probe` is made with GRPO's config; null turns it off. `ignore_readiness`: go on to RL whatever it says.
    """

    output_dir: str
    grpo: GRPOOptions
    seed: int = 0
    sft: SFTOptions | None = None
    selection: SelectionOptions = field(default_factory=SelectionOptions)
    handoff: HandoffOptions = field(default_factory=HandoffOptions)
    probe: ProbeOptions | None = field(default_factory=ProbeOptions)
    ignore_readiness: bool = False
    eval: EvalOptions | None = None
    report: ReportOptions = field(default_factory=ReportOptions)


SECTIONS = {
    "sft": SFTOptions,
    "selection": SelectionOptions,
    "handoff": HandoffOptions,
    "probe": ProbeOptions,
    "grpo": GRPOOptions,
    "eval": EvalOptions,
    "report": ReportOptions,
}


def read_config(path: str | Path, *, output_dir: str | None = None, seed: int | None = None) -> ChainConfig:
    """The chain in `path`; `output_dir` (from the current folder) and `seed` win over it.

    Raises:
        InputError: an unknown or mistyped key, or a named file or run that does not exist.
    """
    path = Path(path)
    values, known = load_yaml(path), {item.name for item in fields(ChainConfig)}
    for key in values:
        if key not in known:
            raise InputError(f"{path}: unknown key {key!r}{nearest(key, known)}")
    if "sft" not in values and (unused := [name for name in ("selection", "handoff") if name in values]):
        raise InputError(f"{path}: {unused[0]} needs an sft section: without one, RL starts from grpo's own model")
    scalars = {
        "output_dir": values.get("output_dir", output_dir),
        "seed": values.get("seed", 0),
        "ignore_readiness": values.get("ignore_readiness", False),
    }
    if scalars["output_dir"] is None or "grpo" not in values:
        raise InputError(f"{path}: {'grpo' if scalars['output_dir'] else 'output_dir'} is missing")
    scalars = check_fields(scalars, _Scalars, str(path))
    without_probe = "probe" in values and values["probe"] is None
    sections = {
        name: kind(**check_fields(values[name], kind, f"{path}: {name}"))
        for name, kind in SECTIONS.items()
        if name in values and not (name == "probe" and without_probe)
    }
    sections |= {"probe": None} if without_probe else {}
    config = ChainConfig(**(scalars | ({} if seed is None else {"seed": seed})), **sections)
    _resolve_paths(config, path)
    if output_dir is not None:
        config.output_dir = os.path.abspath(output_dir.replace("{seed}", str(config.seed)))
    return config


@dataclass
class _Scalars:
    output_dir: str
    seed: int
    ignore_readiness: bool


def _resolve_paths(config: ChainConfig, path: Path) -> None:
    folder = path.absolute().parent

    def absolute(value: str) -> str:
        return os.path.abspath(folder / Path(value.replace("{seed}", str(config.seed))).expanduser())

    config.output_dir = absolute(config.output_dir)
    check_folder(f"{path}: output_dir", config.output_dir)
    for name in ("sft", "probe", "grpo", "eval"):
        section = getattr(config, name)
        for key in ("config", "accelerate_config"):
            value = getattr(section, key, None)
            if value is not None:
                setattr(section, key, absolute(value))
                _check_file(f"{path}: {name}.{key}: {value}", Path(getattr(section, key)))
    if config.sft and config.sft.output_dir:
        config.sft.output_dir = absolute(config.sft.output_dir)
    config.report.compare = [absolute(run) for run in config.report.compare]
    for run in config.report.compare:
        if not Path(run).is_dir():
            raise InputError(f"{path}: report.compare: {run} is no run folder")


def _check_file(what: str, path: Path) -> None:
    if not path.is_file():
        siblings = [item.name for item in path.parent.glob("*.y*ml")]
        raise InputError(f"{what} does not exist, looked for {path}{nearest(path.name, siblings)}")
