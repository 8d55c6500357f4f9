"""`aesl chain --config chain.yaml`: SFT, selection, handoff, GRPO, evaluation and report, one process each.

The stages meet only through files of the run folder, so the chain is no more than their order: chain.json says of each
stage what it was started from (a fingerprint of its command, its configs and the stage before it) and how it ended.
Run again, a stage that is done with the same fingerprint is passed over, one that was cut off goes on from its last
whole checkpoint, and one that changed starts afresh, as does everything after it.
"""

import argparse
import fcntl
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Literal

from . import files
from .arguments import ENV_PREFIXES, INPUT_FIELDS, check_fields, load_yaml, parse, resolve
from .errors import InputError, exit_on_input_error, nearest


NAME = "aesl chain"
STAGE = "stage.json"  # in the SFT folder, which several chains may share
LOGS = "logs"
GRPO_DIR = "grpo"
REPORT = "report.html"
GRACE_S = 120  # seconds that a stage has to end after SIGINT or SIGTERM, e.g. to save a checkpoint
OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer_0", "global_step*")  # Trainer, FSDP, FSDP sharded, DeepSpeed


# ---- chain.yaml


@dataclass
class SFTOptions:
    config: str
    accelerate_config: str | None = None
    output_dir: str | None = None


@dataclass
class SelectionOptions:
    rule: Literal["turning_point", "last", "best_eval"] | None = None
    metric: Literal["entropy", "self_bleu"] | None = None
    patience: int | None = None


@dataclass
class HandoffOptions:
    mode: Literal["auto", "merge", "continue"] = "auto"


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
    """chain.yaml, its paths absolute. `{seed}` in an output folder or a compared run stands for the seed."""

    output_dir: str
    grpo: GRPOOptions
    seed: int = 0
    sft: SFTOptions | None = None
    selection: SelectionOptions = field(default_factory=SelectionOptions)
    handoff: HandoffOptions = field(default_factory=HandoffOptions)
    eval: EvalOptions | None = None
    report: ReportOptions = field(default_factory=ReportOptions)


SECTIONS = {
    "sft": SFTOptions,
    "selection": SelectionOptions,
    "handoff": HandoffOptions,
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
    scalars = {"output_dir": values.get("output_dir", output_dir), "seed": values.get("seed", 0)}
    if scalars["output_dir"] is None or "grpo" not in values:
        raise InputError(f"{path}: {'grpo' if scalars['output_dir'] else 'output_dir'} is missing")
    scalars = check_fields(scalars, _Scalars, str(path))
    sections = {
        name: kind(**check_fields(values[name], kind, f"{path}: {name}"))
        for name, kind in SECTIONS.items()
        if name in values
    }
    config = ChainConfig(**(scalars | ({} if seed is None else {"seed": seed})), **sections)
    _resolve_paths(config, path)
    if output_dir is not None:
        config.output_dir = os.path.abspath(output_dir.replace("{seed}", str(config.seed)))
    return config


@dataclass
class _Scalars:
    output_dir: str
    seed: int


def _resolve_paths(config: ChainConfig, path: Path) -> None:
    folder = path.absolute().parent

    def absolute(value: str) -> str:
        return os.path.abspath(folder / Path(value.replace("{seed}", str(config.seed))).expanduser())

    config.output_dir = absolute(config.output_dir)
    for name in ("sft", "grpo", "eval"):
        section = getattr(config, name)
        for key in ("config", "accelerate_config"):
            value = getattr(section, key, None)
            if value is not None:
                setattr(section, key, absolute(value))
                if not Path(getattr(section, key)).is_file():
                    raise InputError(f"{path}: {name}.{key}: {value} does not exist, looked for {absolute(value)}")
    if config.sft and config.sft.output_dir:
        config.sft.output_dir = absolute(config.sft.output_dir)
    config.report.compare = [absolute(run) for run in config.report.compare]
    for run in config.report.compare:
        if not Path(run).is_dir():
            raise InputError(f"{path}: report.compare: {run} is no run folder")


# ---- The chain and its stages


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
        cold_start = ["sft", "select", "handoff"] if self.config.sft else []
        return [*cold_start, "grpo", *(["eval"] if self.config.eval else []), "report"]


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
    command = [sys.executable, "-m", "aesl_trl.handoff", str(chain.run), "--mode", chain.config.handoff.mode]
    return Stage("handoff", command, chain.run / files.HANDOFF)


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
    start = str(chain.run / files.HANDOFF_DIR) if chain.config.sft else base_model(chain.config.grpo.config)
    output = chain.run / files.EVALUATION
    flags = ["--start", start, "--final", str(chain.run / GRPO_DIR), "--output", str(output)]
    command = [sys.executable, "-m", "aesl_trl.evaluate", "--config", chain.config.eval.config, *flags]
    return Stage("eval", command, output, (chain.config.eval.config,))


def build_report(chain: Chain) -> Stage:
    options = chain.config.report
    compare = ["--compare", *options.compare] if options.compare else []
    title = [f"--title={options.title}"] if options.title else []
    command = [sys.executable, "-m", "aesl_trl.report", str(chain.run), *compare, *title]
    return Stage("report", command, chain.run / REPORT)


BUILDERS = {
    "sft": build_sft,
    "select": build_select,
    "handoff": build_handoff,
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


# ---- Checks before anything starts


def check_stages(chain: Chain) -> None:
    """Parse each stage's config as the stage will, so that a typing error in the last does not wait for the first.

    Raises:
        InputError: a config that its stage would refuse.
    """
    from . import evaluate, grpo, sft
    from .arguments import load_config

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


# ---- Checkpoints


def last_whole_checkpoint(folder: Path) -> tuple[Path | None, list[Path]]:
    """The newest checkpoint-N that training can go on from, and the newer ones that a kill left torn."""
    numbered = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    torn = []
    for path in sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        if is_whole(path):
            return path, torn
        torn.append(path)
    return None, torn


def is_whole(checkpoint: Path) -> bool:
    """Whether weights, optimizer and trainer_state.json (which Trainer writes last) are there and none is cut off."""
    try:
        state = json.loads((checkpoint / files.TRAINER_STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    weights = list(checkpoint.glob("*.safetensors"))
    has_weights = weights or any(checkpoint.glob("pytorch_model*")) or any(checkpoint.glob("global_step*"))
    # Without its optimizer (save_only_model) training would go on, silently, with the moments at zero.
    has_optimizer = any(any(checkpoint.glob(name)) for name in OPTIMIZERS)
    pickles = [path for pattern in ("*.pt", "*.pth", "*.bin") for path in checkpoint.glob(pattern)]
    return bool(
        isinstance(state, dict)
        and has_weights
        and has_optimizer
        and not (checkpoint / "checkpoint-is-incomplete.txt").exists()  # transformers' mark while it saves on SIGTERM
        and all(map(_whole_safetensors, weights))
        and _has_every_shard(checkpoint)
        and all(map(zipfile.is_zipfile, pickles))  # torch writes zips, whose directory is at the end
    )


def _whole_safetensors(path: Path) -> bool:
    """Whether the file is as long as its header says."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if 0 < length < path.stat().st_size else b""
    try:
        tensors = json.loads(header)
        ends = [entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
    return 8 + length + max(ends, default=0) == path.stat().st_size


def _has_every_shard(checkpoint: Path) -> bool:
    index = checkpoint / "model.safetensors.index.json"
    if not index.exists():
        return True
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError):
        return False
    return all((checkpoint / shard).exists() for shard in shards)


# ---- Processes


class Interrupts:
    """SIGINT and SIGTERM while the chain runs: passed on to the stage, whose end is awaited; a second one kills it."""

    def __init__(self):
        self.process: subprocess.Popen | None = None
        self.received: list[int] = []
        self.deadline = float("inf")

    def __enter__(self):
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame) -> None:
        self.received.append(number)
        if self.process is None:
            sys.exit(128 + number)
        self.deadline = time.monotonic() + GRACE_S
        kill_group(self.process, number if len(self.received) == 1 else signal.SIGKILL)

    def wait(self, process: subprocess.Popen, reader: threading.Thread) -> int:
        """The exit code, once every process of the stage is gone."""
        while process.poll() is None or (self.received and reader.is_alive()):
            reader.join(0.1) if process.returncode is not None else _wait_briefly(process)
            if time.monotonic() > self.deadline:
                kill_group(process, signal.SIGKILL)
        # What the stage left behind (a server, a worker) would hold the pipe, and the GPU, for ever.
        reader.join(10)
        if reader.is_alive():
            kill_group(process, signal.SIGKILL)
            reader.join()
        return process.returncode


def _wait_briefly(process: subprocess.Popen) -> None:
    try:
        process.wait(0.5)
    except subprocess.TimeoutExpired:
        pass


def kill_group(process: subprocess.Popen, number: int) -> None:
    try:
        # Its own session: the launcher does not pass a signal on to the processes that it started.
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass


def run_process(command: list[str], log: Path, interrupts: Interrupts, *, env: dict, append: bool = False) -> int:
    """Run `command`, its output on the terminal as it comes and in `log`; its exit code (negative: a signal)."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab" if append else "wb") as file:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )
        interrupts.process = process
        try:
            reader = threading.Thread(target=_copy_output, args=(process.stdout, file), daemon=True)
            reader.start()
            return interrupts.wait(process, reader)
        finally:
            interrupts.process = None
            process.stdout.close()


def _copy_output(source: IO[bytes], file: IO[bytes]) -> None:
    while chunk := os.read(source.fileno(), 65536):
        file.write(chunk)
        file.flush()
        sys.stdout.write(chunk.decode("utf-8", errors="replace"))
        sys.stdout.flush()


def child_env(stage: Stage) -> dict[str, str]:
    """This environment and the config's `env`, which the stage itself can only apply after torch is imported."""
    env = load_yaml(stage.configs[0]).get("env", {}) if stage.configs else {}
    return {**os.environ, "PYTHONUNBUFFERED": "1", **{k: v for k, v in env.items() if k.startswith(ENV_PREFIXES)}}


# ---- Running


def run_chain(chain: Chain, interrupts: Interrupts) -> None:
    """Run what is not done yet, in order.

    Raises:
        InputError: a shared SFT folder holds another run.
        SystemExit: a stage failed (its exit code, 1 where that is none of its own) or a signal came (128 + signal).
    """
    began, previous = time.monotonic(), None
    chain.record = _read_record(chain)
    for number, name in enumerate(chain.names, 1):
        stage = BUILDERS[name](chain)
        folder = chain.sft_dir if name == "sft" else chain.run
        inputs = fingerprint(stage, folder, previous)
        elapsed = time.strftime("%H:%M:%S", time.gmtime(time.monotonic() - began))
        say(f"stage {number} of {len(chain.names)}: {name} ({elapsed} elapsed)")
        if _is_done(chain, stage, inputs):
            say(f"{name} is done with the same inputs: skipped")
            _note(chain, stage, **_recorded(chain, stage))
        else:
            _run_stage(chain, stage, inputs, interrupts)
        previous = inputs


def _read_record(chain: Chain) -> dict[str, Any]:
    path = chain.run / files.CHAIN
    stages = files.read_json(path).get("stages", {}) if path.exists() else {}
    sft = os.path.relpath(chain.sft_dir, chain.run) if chain.sft_dir else None
    config = os.path.relpath(chain.path, chain.run)
    return {"config": config, "seed": chain.config.seed, "sft_dir": sft, "stages": stages}


def _recorded(chain: Chain, stage: Stage) -> dict:
    """What is known of the stage's last run: beside the SFT itself, since another chain may have trained it."""
    if stage.name == "sft":
        path = stage.folder / STAGE
        return files.read_json(path) if path.exists() else {}
    return chain.record["stages"].get(stage.name, {})


def _is_done(chain: Chain, stage: Stage, inputs: str) -> bool:
    record = _recorded(chain, stage)
    return record.get("status") == "done" and record.get("inputs") == inputs and stage.output.exists()


def _note(chain: Chain, stage: Stage, **facts) -> None:
    chain.record["stages"][stage.name] = facts
    if stage.name == "sft":
        files.write_json(stage.folder / STAGE, facts)
    files.write_json(chain.run / files.CHAIN, chain.record)


def _run_stage(chain: Chain, stage: Stage, inputs: str, interrupts: Interrupts) -> None:
    resume = _prepare_folder(chain, stage, inputs)
    for name in chain.names[chain.names.index(stage.name) :]:
        chain.record["stages"].pop(name, None)
    command = [*stage.command, *(["--resume_from_checkpoint", str(resume)] if resume else [])]
    base = chain.sft_dir if stage.name == "sft" else chain.run
    facts = {"command": shlex.join(portable(command, base)), "started": datetime.now(UTC).isoformat("T", "seconds")}
    _note(chain, stage, status="running", **facts, seconds=None, returncode=None, inputs=inputs)
    log, began = chain.run / LOGS / f"{stage.name}.log", time.monotonic()
    if stage.name == "select":
        code = _select(chain, log)
    else:
        code = run_process(command, log, interrupts, env=child_env(stage), append=resume is not None)
    facts |= {"seconds": round(time.monotonic() - began, 1), "returncode": code, "inputs": inputs}
    is_done = code == 0 and not interrupts.received
    _note(chain, stage, status="done" if is_done else "failed", **facts)
    if interrupts.received:
        # The stage may have saved and returned 0: what comes next must not start all the same.
        say(f"stopped by {signal.Signals(interrupts.received[0]).name} in stage {stage.name}; run it again to go on")
        sys.exit(128 + interrupts.received[0])
    if code != 0:
        print(f"{NAME}: stage {stage.name} failed with exit code {code}; its log is {log}", file=sys.stderr)
        sys.exit(code if 1 <= code <= 125 else 1)


def _prepare_folder(chain: Chain, stage: Stage, inputs: str) -> Path | None:
    """The checkpoint to resume from; a folder that another run left is moved aside, or refused where it is shared."""
    if stage.folder is None or not stage.folder.exists() or set(os.listdir(stage.folder)) <= {STAGE}:
        return None
    if _recorded(chain, stage).get("inputs") != inputs:
        if stage.name == "sft" and chain.config.sft.output_dir:
            raise InputError(
                f"sft.output_dir {stage.folder} holds an SFT run of other inputs than {chain.config.sft.config}, seed "
                f"{chain.config.seed}: name another folder, or remove that one"
            )
        _move_aside(stage.folder)
        return None
    checkpoint, torn = last_whole_checkpoint(stage.folder)
    for path in torn:
        say(f"{path} was cut off while it was saved: not used")
    say(f"{stage.name} was cut off: it goes on from {checkpoint.name if checkpoint else 'its beginning'}")
    return checkpoint


def _move_aside(folder: Path) -> None:
    number = next(n for n in range(1, 10**6) if not folder.with_name(f"{folder.name}.old-{n}").exists())
    target = folder.with_name(f"{folder.name}.old-{number}")
    os.replace(folder, target)
    say(f"{folder} was trained from other inputs: moved to {target}")


def _select(chain: Chain, log: Path) -> int:
    from .selection import select_run

    given = {key: value for key, value in vars(chain.config.selection).items() if value is not None}
    chosen = select_run(chain.sft_dir, out=chain.run, **given)
    line = f"step {chosen['step']} by {chosen['applied']}: {chosen['reason']}"
    say(line)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(line + "\n", encoding="utf-8")
    return 0


def say(line: str) -> None:
    print(f"{NAME}: {line}", flush=True)


# ---- The end


COLUMNS = ("pass@1", "pass@8", "entropy", "self_bleu", "groups_mixed")


def closing_table(chain: Chain) -> str:
    """Start and end of RL, here and in the recorded runs: pass@k, entropy (nats per token), and so on."""
    rows = [("run", "model", "step", *COLUMNS)]
    for run, label in [(chain.run, ""), *((Path(run), " (recorded)") for run in chain.config.report.compare)]:
        rows += _table_rows(run, f"{_name(run)}{label}")
    if len(rows) == 1:
        return "no evaluation.json to show"
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _name(run: Path) -> str:
    """`arm/seed-N` of a run folder of that form, else the folder's name."""
    return f"{run.parent.name}/{run.name}" if run.name.startswith("seed-") else run.name


def _table_rows(run: Path, label: str) -> list[tuple[str, ...]]:
    if not (run / files.EVALUATION).exists():
        return []
    models = files.read_json(run / files.EVALUATION)["models"]
    selection = files.read_json(run / files.SELECTION) if (run / files.SELECTION).exists() else {}
    steps = {"start": str(selection.get("step", "-"))}
    return [
        (label, name, steps.get(name, ""), *(_figure(figures.get(column)) for column in COLUMNS))
        for name, figures in models.items()
    ]


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


# ---- Command line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise InputError(f"{message} (see {NAME} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=NAME, description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="FILE", help="chain.yaml: the stages and their configs")
    parser.add_argument("--output_dir", metavar="DIR", help="run folder, in place of the config's")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of every stage, in place of the config's")
    parser.add_argument(
        "--dry_run", action="store_true", help="check every config and print the commands, run nothing"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Check, run, and end with the table of results and the report's path."""
    argv = sys.argv[1:] if argv is None else list(argv)
    given = _parser().parse_args(argv)
    config = read_config(given.config, output_dir=given.output_dir, seed=given.seed)
    chain = Chain(config, Path(given.config).absolute())
    if given.dry_run:
        check_stages(chain)
        print(plan(chain))
        return
    with ExitStack() as stack:
        interrupts = stack.enter_context(Interrupts())
        for folder in {chain.run, chain.sft_dir or chain.run}:
            stack.enter_context(_locked(folder))
        check_in_child(argv)
        run_chain(chain, interrupts)
    print(closing_table(chain))
    print(chain.run / REPORT)


def check_in_child(argv: list[str]) -> None:
    """`--dry_run` as a process of its own: building TrainingArguments takes hold of the GPU until its process ends."""
    code = subprocess.run([sys.executable, "-m", "aesl_trl.chain", *argv, "--dry_run"]).returncode
    if code != 0:
        sys.exit(code if 1 <= code <= 125 else 1)


def _locked(folder: Path) -> IO:
    """The folder's lock, held until it is closed; a second chain in the same folder would mix its files with ours."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the folder, which may be moved aside while the lock is held.
    file = open(folder.with_name(f".{folder.name}.lock"), "w")  # noqa: SIM115 (closed by the caller's stack)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise InputError(f"another chain is at work in {folder}") from None
    return file


if __name__ == "__main__":
    exit_on_input_error(NAME, main)
