"""A chain's stages: the command of each, and the checks of their configs before the first one starts."""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from .. import files
from ..arguments import ENV_NAMES, load_config, parse, resolve
from ..errors import InputError
from ..processes import GRACE_S, MARK, child_env
from ..values import load_yaml
from .config import ChainConfig, MixOptions, TrainingOptions


NAME = "aesl chain"
# A plan needs no GPU. Without one, transformers refuses the bf16 of a config.
ANYWHERE = ("--use_cpu", "true")
CLI = [sys.executable, "-m", "aesl_trl.cli"]
# The module whose ARGUMENT_TYPES read a stage's config. TRL takes seconds to import, so we do it when we need them.
READ_BY = {
    "sft": "aesl_trl.training.sft",
    "candidates": "aesl_trl.evaluation.probe",
    "mix": "aesl_trl.evaluation.mix",
    "probe": "aesl_trl.evaluation.probe",
    "grpo": "aesl_trl.training.grpo",
    "eval": "aesl_trl.evaluation.evaluate",
}


# The stages that measure candidates between SFT and the selection, and the rule that reads what they measured
MEASURED_FOR = {"candidates": "readiness", "mix": "mix"}


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
        measured = [name for name, rule in MEASURED_FOR.items() if self.selects_by(rule)]
        cold_start = ["sft", *measured, "select", "handoff"] if self.config.sft else []
        probe = ["probe"] if self.config.probe else []
        return [*cold_start, *probe, "grpo", *(["eval"] if self.config.eval else []), "report"]

    def selects_by(self, rule: str) -> bool:
        """Say whether this is the chain's rule, or that of SFT's config, which leaves the selection to the chain."""
        if not self.config.sft:
            return False
        return (self.config.selection.rule or load_yaml(self.config.sft.config).get("selection")) == rule

    @property
    def selection(self) -> dict[str, Any]:
        """The options of the selection that chain.yaml names."""
        return {key: value for key, value in vars(self.config.selection).items() if value is not None}

    @property
    def start(self) -> str:
        """Where RL starts: the handed-over folder, or the model of GRPO's config."""
        return str(self.run / files.HANDOFF_DIR) if self.config.sft else base_model(self.config.grpo.config)

    @property
    def own_start(self) -> dict[str, str]:
        """The start as an input of a stage. A start inside of the run is none: it follows from the stages before."""
        return {} if self.config.sft else {"start": self.start}

    def recorded(self, name: str) -> dict:
        """Return the record of a stage's last run. SFT's lies beside SFT, since another chain may have trained it."""
        if name == "sft":
            return files.read_object(files.own_folder(self.sft_dir) / files.STAGE)
        return self.record["stages"].get(name, {})

    def note(self, name: str, **facts) -> None:
        """Write the record of a stage."""
        self.record["stages"][name] = facts
        if name == "sft":
            files.write_json(files.own_folder(self.sft_dir) / files.STAGE, facts)
        files.write_json(self.run / files.CHAIN, self.record)

    def read_record(self) -> None:
        """Read the record of the run's stages."""
        self.record = {
            "config": os.path.relpath(self.path, self.run),
            "seed": self.config.seed,
            # readers follow no symlink on the way
            "sft_dir": self.sft_dir and os.path.relpath(os.path.realpath(self.sft_dir), os.path.realpath(self.run)),
            "stages": files.read_object(self.run / files.CHAIN).get("stages", {}),
        }


@dataclass(frozen=True)
class Stage:
    """One stage: its command, and what its result depends on.

    `output` exists once the stage is done. `given` are the settings that the chain adds to the config. A stage that
    trains does so in `folder`, and goes on from the checkpoints there.
    """

    name: str
    command: list[str]
    output: Path
    config: str | None = None
    accelerate_config: str | None = None
    given: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None


def launch(accelerate_config: str | None, *arguments: str) -> list[str]:
    """Return the command of a module under accelerate, by this Python: `accelerate` need not be on the PATH."""
    named = ["--config_file", accelerate_config] if accelerate_config else []
    return [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *named, "-m", *arguments]


def build_sft(chain: Chain) -> Stage:
    return _training_stage(chain, "sft", chain.config.sft, chain.sft_dir, files.TRAINER_STATE)


def build_grpo(chain: Chain) -> Stage:
    return _training_stage(
        chain, "grpo", chain.config.grpo, chain.run / files.GRPO_DIR, files.RUN, *start_flags(chain)
    )


def _training_stage(
    chain: Chain, name: str, options: TrainingOptions, folder: Path, written_last: str, *start: str
) -> Stage:
    output, own = files.own_folder(folder) / written_last, getattr(options, "seed", None)
    seed = chain.config.seed if own is None else own
    flags = ["--config", options.config, *start, "--output_dir", str(folder), "--seed", str(seed)]
    command = launch(options.accelerate_config, f"aesl_trl.{name}", *flags)
    return Stage(name, command, output, options.config, options.accelerate_config, {"seed": seed}, folder)


def build_select(chain: Chain) -> Stage:
    """Describe the selection. It runs in this process, on small files, and the command is only its record."""
    flags = [text for key, value in chain.selection.items() for text in (f"--{key}", str(value))]
    command = ["aesl", "select", str(chain.sft_dir), "--output_dir", str(chain.run), *flags]
    return Stage("select", command, chain.run / files.SELECTION, given=chain.selection)


def build_handoff(chain: Chain) -> Stage:
    mode = chain.config.handoff.mode
    command = [*CLI, "handoff", str(chain.run), "--mode", mode]
    return Stage("handoff", command, chain.run / files.HANDOFF, given={"mode": mode})


def build_candidates(chain: Chain) -> Stage:
    """Probe every saved candidate for the selection. The file lies beside them, where a replay finds it."""
    output = files.own_folder(chain.sft_dir) / files.READINESS
    return _probe_stage(chain, "candidates", str(chain.sft_dir), output)


def build_mix(chain: Chain) -> Stage:
    """Write and measure averages of the base and a candidate, beside the candidates."""
    options, seed = chain.config.mix or MixOptions(), chain.config.seed
    config, accelerate = options.config or chain.config.sft.config, options.accelerate_config
    weights = ["--weights", *map(str, options.weights)] if options.weights else []
    arguments = ["mix", str(chain.sft_dir), "--config", config, "--seed", str(seed), *weights]
    command = launch(accelerate, "aesl_trl.cli", *arguments) if accelerate else [*CLI, *arguments]
    given = {"seed": seed, **({"weights": options.weights} if options.weights else {})}
    return Stage("mix", command, files.own_folder(chain.sft_dir) / files.MIXES, config, accelerate, given)


def build_probe(chain: Chain) -> Stage:
    """Probe RL's start, after the handoff has settled what ends a sample: before it, a candidate may not stop."""
    return _probe_stage(chain, "probe", chain.start, chain.run / files.READINESS)


def _probe_stage(chain: Chain, name: str, start: str, output: Path) -> Stage:
    options, seed = chain.config.probe, chain.config.seed
    config = options.config or chain.config.grpo.config
    arguments = ["probe", start, "--config", config, "--output_dir", str(output), "--seed", str(seed)]
    accelerate = options.accelerate_config
    command = launch(accelerate, "aesl_trl.cli", *arguments) if accelerate else [*CLI, *arguments]
    return Stage(name, command, output, config, accelerate, {"seed": seed, **chain.own_start})


def start_flags(chain: Chain) -> list[str]:
    """Return GRPO's flags for its start: a handed-over model or adapter; none where its config names the model."""
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
    config, output = chain.config.eval.config, chain.run / files.EVALUATION
    flags = ["--start", chain.start, "--final", str(chain.run / files.GRPO_DIR), "--output_dir", str(output)]
    return Stage("eval", [*CLI, "eval", "--config", config, *flags], output, config, given=chain.own_start)


def build_report(chain: Chain) -> Stage:
    options = chain.config.report
    compare = ["--compare", *options.compare] if options.compare else []
    title = [f"--title={options.title}"] if options.title else []
    evaluations = [path for run in options.compare if (path := Path(run) / files.EVALUATION).exists()]
    given = {"title": options.title, "compare": [run_name(Path(run)) for run in options.compare]}
    given["evaluation_file"] = list(map(str, evaluations))
    command = [*CLI, "report", str(chain.run), *compare, *title]
    return Stage("report", command, chain.run / files.REPORT, given=given)


BUILDERS = {
    "sft": build_sft,
    "candidates": build_candidates,
    "mix": build_mix,
    "select": build_select,
    "handoff": build_handoff,
    "probe": build_probe,
    "grpo": build_grpo,
    "eval": build_eval,
    "report": build_report,
}


def run_name(run: Path) -> str:
    """Return `arm/seed-N` for a run folder of that form, else the folder's name."""
    return f"{run.parent.name}/{run.name}" if run.name.startswith("seed-") else run.name


def base_model(config: str) -> str:
    """Return the model that a GRPO config starts from by itself."""
    values, folder = load_yaml(config), Path(config).parent
    for name in ("adapter_name_or_path", "model_name_or_path"):
        if values.get(name):
            return resolve(name, values[name], folder)
    raise InputError(f"{config}: model_name_or_path is missing, and the chain has no sft stage that would train one")


def is_whole(output: Path) -> bool:
    """Say whether a stage's output is there and was written to its end."""
    if output.suffix != ".json":
        return output.is_file() and output.stat().st_size > 0
    try:
        return output.is_file() and isinstance(files.read_json(output), dict)
    except InputError:
        return False


def stage_env(stage: Stage) -> dict[str, str]:
    """Return a child's environment with the config's `env`, which the stage itself would apply after torch is in."""
    env = load_yaml(stage.config).get("env") or {} if stage.config else {}
    place = stage.folder or stage.output.parent
    return {
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(GRACE_S),  # torchrun's own is 30 s, then it kills its workers
        **child_env(PYTHONUNBUFFERED="1"),
        **{name: value for name, value in env.items() if name in ENV_NAMES},
        MARK: str(place.parent if place.name == files.OWN else place),
    }


def portable(command: Sequence[str], folder: Path) -> list[str]:
    """Return `command` with the paths as seen from `folder`, so that a record names no place of this machine."""
    relative = [os.path.relpath(part, folder) if os.path.isabs(part) else part for part in command[1:]]
    return ["python" if command[0] == sys.executable else command[0], *relative]


def argument_types(name: str) -> tuple[type, ...]:
    """Return the dataclasses that read a stage's config; none for a stage without one."""
    return import_module(READ_BY[name]).ARGUMENT_TYPES if name in READ_BY else ()


def check_stages(chain: Chain, flags: Sequence[str] = ()) -> None:
    """Parse each stage's config as the stage will, so that a typing error in the last does not wait for the first.

    `flags` are added to the command line of each training, such as [`ANYWHERE`].
    """
    config, common = chain.config, ["--seed", str(chain.config.seed), *flags]
    for options in filter(None, (config.sft, config.grpo)):
        if options.accelerate_config:
            load_yaml(options.accelerate_config)
    if config.sft:
        flags = ["--config", config.sft.config, "--output_dir", str(chain.sft_dir), *common]
        _, args, model_args = parse(argument_types("sft"), flags, prog=NAME)
        if not args.diversity_steps:
            raise InputError(f"{config.sft.config}: diversity_steps is 0: the chain has no candidates to select from")
        if args.push_to_hub and chain.run.resolve().is_relative_to(chain.sft_dir.resolve()):
            raise InputError(
                f"{chain.path}: output_dir {chain.run} lies in sft.output_dir, which push_to_hub uploads: all that "
                "the chain writes would go along; name a folder outside of it"
            )
    else:
        base_model(config.grpo.config)
    flags = ["--config", config.grpo.config, "--output_dir", str(chain.run / files.GRPO_DIR), *common]
    parsed = parse(argument_types("grpo"), flags, prog=NAME)
    uses_peft = any(getattr(part, "use_peft", False) for part in parsed)
    if config.sft and config.handoff.mode == "continue" and uses_peft:
        raise InputError(f"{config.grpo.config}: use_peft adds an adapter, handoff.mode: continue trains the old one")
    if config.probe:
        named = config.probe.config or config.grpo.config
        _, args, _ = parse(argument_types("probe"), ["--config", named, *common], prog=NAME)
        if args.deepspeed:
            raise InputError(f"{named}: the probe does without deepspeed: give chain.yaml's probe a config of its own")
    elif chain.selects_by("readiness"):
        raise InputError(f"{chain.path}: selection by readiness needs the probe: leave out probe: null")
    if chain.selects_by("mix"):
        stage = build_mix(chain)
        weights = ["--weights", *map(str, stage.given["weights"])] if "weights" in stage.given else []
        _, args, _ = parse(argument_types("mix"), ["--config", stage.config, *weights, *common], prog=NAME)
        if args.deepspeed:
            raise InputError(
                f"{stage.config}: aesl mix does without deepspeed: give chain.yaml's mix a config of its own"
            )
        if not args.diversity_steps:
            raise InputError(f"{stage.config}: diversity_steps is 0: nothing says how the averages are measured")
        _check_average(model_args, config.sft.config)
    elif config.mix:
        raise InputError(f"{chain.path}: mix is for selection by mix: add selection: {{rule: mix}}, or leave it out")
    if config.eval:
        load_config(config.eval.config, argument_types("eval"))


def _check_average(model_args: Any, path: str) -> None:
    """Refuse an adapter that has no average with its base, which `aesl mix` would refuse after the training."""
    from ..models.interpolate import beyond_plain_lora
    from ..training.rehearsal import peft_config_of

    adapter = peft_config_of(model_args)
    if adapter is not None and (extra := beyond_plain_lora(adapter.to_dict())):
        raise InputError(
            f"{path}: {extra} is more than plain LoRA, and selection by mix averages adapters: leave it out"
        )


def where_sft_lies(chain: Chain) -> list[str]:
    """Return a line on an SFT run outside of the run folder, which several chains may share; none for one inside."""
    if chain.sft_dir is None or chain.sft_dir.is_relative_to(chain.run):
        return []
    return [f"SFT runs in {chain.sft_dir}, as sft.output_dir of {chain.path.name} says, and not in the run folder"]


def plan(chain: Chain) -> str:
    """Return every stage's command, as `--dry_run` prints it."""
    lines = [f"{chain.path} -> {chain.run}, seed {chain.config.seed}", *where_sft_lies(chain)]
    for number, name in enumerate(chain.names, 1):
        lines.append(f"{number}. {name}: {shlex.join(BUILDERS[name](chain).command)}")
    return "\n".join(lines)
