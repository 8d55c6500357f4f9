"""A chain's stages: each one's command, what its configs must say, and the fingerprint of what it depends on.

Nothing is started or recorded here; chain.py runs what this describes.
"""

import hashlib
import json
import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import files
from ..arguments import ENV_PREFIXES, INPUT_FIELDS, load_yaml, parse, resolve
from ..errors import InputError
from ..files import GRPO_DIR, REPORT
from ..processes import GRACE_S, MARK
from .config import ChainConfig, GRPOOptions, SFTOptions


NAME = "aesl chain"


@dataclass
class Chain:
    """A chain at work: its config, its folders, and the record that chain.json holds."""

    config: ChainConfig
    path: Path
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def sft_dir(self) -> Path | None:
        return Path(self.config.sft.output_dir or self.run / "sft") if self.config.sft else None

    @property
    def names(self) -> list[str]:
        candidates = ["candidates"] if self.selects_by_readiness else []
        cold_start = ["sft", *candidates, "select", "handoff"] if self.config.sft else []
        probe = ["probe"] if self.config.probe else []
        return [*cold_start, *probe, "grpo", *(["eval"] if self.config.eval else []), "report"]

    @property
    def selects_by_readiness(self) -> bool:
        """By the chain's rule, or by the one of SFT's config, which leaves the selection to the chain."""
        if not self.config.sft:
            return False
        return (self.config.selection.rule or load_yaml(self.config.sft.config).get("selection")) == "readiness"


@dataclass(frozen=True)
class Stage:
    """One stage: what to run, and what its result depends on.

    `folder` is where it trains and has checkpoints to go on from; `output` is there once it is done.
    """

    name: str
    command: list[str]
    output: Path
    configs: tuple[str, ...] = ()
    folder: Path | None = None


def launch(module: str, options: SFTOptions | GRPOOptions, *flags: str) -> list[str]:
    """The module under accelerate, by this Python: `accelerate` need not be on the PATH."""
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    named = ["--config_file", options.accelerate_config] if options.accelerate_config else []
    return [*accelerate, *named, "-m", module, "--config", options.config, *flags]


def build_sft(chain: Chain) -> Stage:
    options, folder = chain.config.sft, chain.sft_dir
    command = launch("aesl_trl.sft", options, "--output_dir", str(folder), "--seed", str(chain.config.seed))
    return Stage("sft", command, folder / files.TRAINER_STATE, _configs(options), folder)


def build_select(chain: Chain) -> Stage:
    """Selection runs in this process: it reads and writes small files. The command is only its record."""
    given = {key: value for key, value in vars(chain.config.selection).items() if value is not None}
    flags = [text for key, value in given.items() for text in (f"--{key}", str(value))]
    command = ["aesl", "select", str(chain.sft_dir), "--out", str(chain.run), *flags]
    return Stage("select", command, chain.run / files.SELECTION)


def build_handoff(chain: Chain) -> Stage:
    command = [sys.executable, "-m", "aesl_trl.models.handoff", str(chain.run), "--mode", chain.config.handoff.mode]
    return Stage("handoff", command, chain.run / files.HANDOFF)


def build_candidates(chain: Chain) -> Stage:
    """Every saved candidate is probed, for the selection; the file lies beside them, where a replay finds it."""
    output = chain.sft_dir / files.READINESS
    return Stage("candidates", *_probe_command(chain, str(chain.sft_dir), output))


def build_probe(chain: Chain) -> Stage:
    """What RL starts from, after the handoff has settled what ends a sample: before it, a candidate may not stop."""
    return Stage("probe", *_probe_command(chain, rl_start(chain), chain.run / files.READINESS))


def _probe_command(chain: Chain, start: str, output: Path) -> tuple[list[str], Path, tuple[str, ...]]:
    options = chain.config.probe
    config = options.config or chain.config.grpo.config
    flags = [start, "--config", config, "--output", str(output), "--seed", str(chain.config.seed)]
    launcher = [sys.executable, "-m"]
    if options.accelerate_config:
        launcher += ["accelerate.commands.launch", "--quiet", "--config_file", options.accelerate_config, "-m"]
    configs = tuple(filter(None, (config, options.accelerate_config)))
    return [*launcher, "aesl_trl.evaluation.probe", *flags], output, configs


def build_grpo(chain: Chain) -> Stage:
    options, folder = chain.config.grpo, chain.run / GRPO_DIR
    flags = ["--output_dir", str(folder), "--seed", str(chain.config.seed)]
    command = launch("aesl_trl.grpo", options, *start_flags(chain), *flags)
    return Stage("grpo", command, folder / files.RUN, _configs(options), folder)


def start_flags(chain: Chain) -> list[str]:
    """What RL starts from: the handed-over model, the adapter that it goes on training, or its config's own model."""
    if not chain.config.sft:
        return []
    handoff, folder = chain.run / files.HANDOFF, str(chain.run / files.HANDOFF_DIR)
    # Before the handoff (in the plan of --dry_run) auto counts as merge, which it is.
    result = files.read_json(handoff) if handoff.exists() else {"mode": chain.config.handoff.mode, "base": "BASE"}
    if result["mode"] == "continue":
        return ["--adapter_name_or_path", folder, "--model_name_or_path", str(result["base"])]
    return ["--model_name_or_path", folder]


def build_eval(chain: Chain) -> Stage:
    # The config's own seed: every seed of a chain is measured on the same prompts.
    output = chain.run / files.EVALUATION
    flags = ["--start", rl_start(chain), "--final", str(chain.run / GRPO_DIR), "--output", str(output)]
    command = [sys.executable, "-m", "aesl_trl.evaluation.evaluate", "--config", chain.config.eval.config, *flags]
    return Stage("eval", command, output, (chain.config.eval.config,))


def rl_start(chain: Chain) -> str:
    """Where RL starts: the handed-over folder, or its config's own model."""
    return str(chain.run / files.HANDOFF_DIR) if chain.config.sft else base_model(chain.config.grpo.config)


def build_report(chain: Chain) -> Stage:
    options = chain.config.report
    compare = ["--compare", *options.compare] if options.compare else []
    title = [f"--title={options.title}"] if options.title else []
    command = [sys.executable, "-m", "aesl_trl.report.report", str(chain.run), *compare, *title]
    return Stage("report", command, chain.run / REPORT)


BUILDERS = {
    "sft": build_sft,
    "candidates": build_candidates,
    "select": build_select,
    "handoff": build_handoff,
    "probe": build_probe,
    "grpo": build_grpo,
    "eval": build_eval,
    "report": build_report,
}


def _configs(options: SFTOptions | GRPOOptions) -> tuple[str, ...]:
    return tuple(filter(None, (options.config, options.accelerate_config)))


def base_model(config: str) -> str:
    """The model that a GRPO config starts from by itself."""
    values, folder = load_yaml(config), Path(config).parent
    for name in ("adapter_name_or_path", "model_name_or_path"):
        if values.get(name):
            return resolve(name, values[name], folder)
    raise InputError(f"{config}: model_name_or_path is missing, and the chain has no sft stage that would train one")


def child_env(stage: Stage) -> dict[str, str]:
    """This environment and the config's `env`, which the stage itself can only apply after torch is imported."""
    env = load_yaml(stage.configs[0]).get("env", {}) if stage.configs else {}
    return {
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(GRACE_S),  # torchrun's own is 30 s, then it kills its workers
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        **{k: v for k, v in env.items() if k.startswith(ENV_PREFIXES)},
        MARK: str(stage.folder or stage.output.parent),
    }


# ---- Checks before anything starts


def check_stages(chain: Chain) -> None:
    """Parse each stage's config as the stage will, so that a typing error in the last does not wait for the first.

    Raises:
        InputError: a config that its stage would refuse.
    """
    from ..arguments import load_config
    from ..evaluation import evaluate, probe
    from ..training import grpo, sft

    config, seed = chain.config, ["--seed", str(chain.config.seed)]
    for options in filter(None, (config.sft, config.grpo)):
        if options.accelerate_config:
            load_yaml(options.accelerate_config)
    if config.sft:
        flags = ["--config", config.sft.config, "--output_dir", str(chain.sft_dir), *seed]
        _, args, _ = parse(sft.ARGUMENT_TYPES, flags, prog=NAME)
        if not args.diversity_steps:
            raise InputError(
                f"{config.sft.config}: diversity_steps is 0, so the chain has no candidates to select from"
            )
    else:
        base_model(config.grpo.config)
    folder = ["--output_dir", str(chain.run / GRPO_DIR)]
    parsed = parse(grpo.ARGUMENT_TYPES, ["--config", config.grpo.config, *folder, *seed], prog=NAME)
    uses_peft = any(getattr(part, "use_peft", False) for part in parsed)
    if config.sft and config.handoff.mode == "continue" and uses_peft:
        raise InputError(
            f"{config.grpo.config}: use_peft adds a new adapter, handoff.mode: continue trains the old one"
        )
    if config.probe:
        named = config.probe.config or config.grpo.config
        _, args, _ = parse(probe.ARGUMENT_TYPES, ["--config", named, *seed], prog=NAME)
        if args.deepspeed:
            raise InputError(f"{named}: the probe does without deepspeed: give chain.yaml's probe a config of its own")
    elif chain.selects_by_readiness:
        raise InputError(f"{chain.path}: selection by readiness needs the probe: leave out probe: null")
    if config.eval:
        load_config(config.eval.config, evaluate.ARGUMENT_TYPES)


def plan(chain: Chain) -> str:
    """Every stage's command, as `--dry_run` prints it."""
    lines = [f"{chain.path} -> {chain.run}, seed {chain.config.seed}"]
    for number, name in enumerate(chain.names, 1):
        lines.append(f"{number}. {name}: {shlex.join(BUILDERS[name](chain).command)}")
    return "\n".join(lines)


# ---- Fingerprints


def portable(command: list[str], folder: Path) -> list[str]:
    """`command` as given from inside `folder`: a run that is moved, or recorded elsewhere, keeps its fingerprint."""
    relative = [os.path.relpath(part, folder) if os.path.isabs(part) else part for part in command[1:]]
    return ["python" if command[0] == sys.executable else command[0], *relative]


def fingerprint(stage: Stage, folder: Path, previous: str | None) -> str:
    """sha256 over the command, its configs, the local files that they name, and the stage before."""
    contents = {os.path.relpath(path, folder): _sha256(path) for path in stage.configs}
    for config in stage.configs:
        contents |= {os.path.relpath(path, folder): _sha256(path) for path in named_files(config)}
    facts = {"command": portable(stage.command, folder), "files": contents, "previous": previous}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def named_files(config: str) -> list[str]:
    """The local files (data, rewards, DeepSpeed config) that a stage's config names, function names dropped."""
    values, found = load_yaml(config), []
    for name in INPUT_FIELDS & values.keys():
        value = resolve(name, values[name], Path(config).parent)
        for item in value if isinstance(value, list) else [value]:
            path = str(item).rpartition(":")[0] if ".py:" in str(item) else str(item)
            found += [path] if os.path.isfile(path) else []
    return sorted(found)


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
