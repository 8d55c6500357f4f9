"""`aesl chain --config chain.yaml`: SFT, selection, handoff, probe, GRPO, evaluation and report, one process each.

The stages meet only through files of the run folder, so the chain is no more than their order: chain.json says of each
stage what it was started from (a fingerprint of its command, its configs and the stage before it) and how it ended.
Run again, a stage that is done with the same fingerprint is passed over, one that was cut off goes on from its last
whole checkpoint, and one that changed starts afresh, as does everything after it.

Left out: chain.yaml (config.py), each stage's command and fingerprint (stages.py), whether a checkpoint is
whole (training/checkpoints.py), a stage's process and its signals (processes.py).
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .. import files
from ..diversity.readiness import CAUTION, READY
from ..errors import UNFINISHED, InputError, exit_on_input_error
from ..files import GRPO_DIR, LOGS, REPORT, STAGE, TRAINING_LOCK
from ..processes import Interrupts, end_processes, locked, run_process
from ..training.checkpoints import find_checkpoint, sweep
from .config import read_config
from .stages import BUILDERS, NAME, Chain, Stage, check_stages, child_env, fingerprint, plan, portable, rl_start
from .vllm_server import wait_for_server


ORPHANS_S = 30  # seconds that a killed process is waited for; it may be in the midst of a write


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
        if name == "probe":  # it only measures: what follows depends on what it measured
            check_readiness(chain)
        else:
            previous = inputs


def check_readiness(chain: Chain) -> None:
    """Say the verdict on what RL would start from; where that is not "ready", stop before RL.

    Raises:
        SystemExit: code [`~errors.UNFINISHED`], unless the chain says `ignore_readiness`.
    """
    found = files.read_json(chain.run / files.READINESS)["checkpoints"][0]
    line = f"{found['text']} ({'; '.join(why for why in found['reasons'] if not why.startswith(CAUTION))})"
    if found["verdict"] == READY or chain.config.ignore_readiness:
        say(line + ("" if found["verdict"] == READY else "; ignore_readiness is set, going on"))
        return
    print(f"{NAME}: no RL: {line}; ignore_readiness: true in {chain.path} goes on all the same", file=sys.stderr)
    sys.exit(UNFINISHED)


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
    if stage.name == "grpo":
        wait_for_server(chain.config.grpo.config, rl_start(chain), say)
    resume = _prepare_folder(chain, stage, inputs)
    outdated = chain.names[chain.names.index(stage.name) :]
    for name in (stage.name, chain.names[-1]) if stage.name == "probe" else outdated:
        chain.record["stages"].pop(name, None)
    command = [*stage.command, *(["--resume_from_checkpoint", str(resume)] if resume else [])]
    base = chain.sft_dir if stage.name == "sft" else chain.run
    facts = {"command": shlex.join(portable(command, base)), "started": datetime.now(UTC).isoformat("T", "seconds")}
    _note(chain, stage, status="running", **facts, seconds=None, returncode=None, inputs=inputs)
    log, began = chain.run / LOGS / f"{stage.name}.log", time.monotonic()
    if stage.name == "select":
        with interrupts.held():
            code = _select(chain, log)
    else:
        code = run_process(command, log, interrupts, env=child_env(stage), append=resume is not None)
    facts |= {"seconds": round(time.monotonic() - began, 1), "returncode": code, "inputs": inputs}
    status = "interrupted" if interrupts.received else "done" if code == 0 else "failed"
    _note(chain, stage, status=status, **facts)
    if interrupts.received:
        # The stage may have saved and returned 0: what comes next must not start all the same.
        say(f"stopped by {signal.Signals(interrupts.received[0]).name} in stage {stage.name}; run it again to go on")
        sys.exit(128 + interrupts.received[0])
    if code != 0:
        print(f"{NAME}: stage {stage.name} failed with exit code {code}; its log is {log}", file=sys.stderr)
        sys.exit(code if 1 <= code <= 125 else 1)


def _prepare_folder(chain: Chain, stage: Stage, inputs: str) -> Path | None:
    """The checkpoint to resume from; a folder that another run left is moved aside, or refused where it is shared."""
    sweep(stage.folder or chain.run)
    if stage.folder is None or not stage.folder.exists() or set(os.listdir(stage.folder)) <= {STAGE, TRAINING_LOCK}:
        return None
    if _recorded(chain, stage).get("inputs") != inputs:
        if stage.name == "sft" and chain.config.sft.output_dir:
            raise InputError(
                f"sft.output_dir {stage.folder} holds an SFT run of other inputs than {chain.config.sft.config}, seed "
                f"{chain.config.seed}: name another folder, or remove that one"
            )
        _move_aside(stage.folder)
        return None
    say(f"{stage.name} was cut off")
    return find_checkpoint(True, stage.folder, say)


def _move_aside(folder: Path) -> None:
    number = next(n for n in range(1, 10**6) if not folder.with_name(f"{folder.name}.old-{n}").exists())
    target = folder.with_name(f"{folder.name}.old-{number}")
    os.replace(folder, target)
    say(f"{folder} was trained from other inputs: moved to {target}")


def _select(chain: Chain, log: Path) -> int:
    from ..diversity.selection import select_run

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
            stack.enter_context(locked(folder))
        end_orphans(chain)
        check_in_child(argv)
        run_chain(chain, interrupts)
    print(closing_table(chain))
    print(chain.run / REPORT)


def end_orphans(chain: Chain) -> None:
    """End what a killed chain left running: it would write to the same folders as what is started now."""
    for folder in filter(None, (chain.run, chain.sft_dir, chain.run / GRPO_DIR)):
        ended, deadline = set(), time.monotonic() + ORPHANS_S
        while (found := end_processes(str(folder))) and time.monotonic() < deadline:
            ended |= set(found)
            time.sleep(0.1)
        if ended:
            say(f"ended {len(ended)} processes that a killed chain had left at work in {folder}")


def check_in_child(argv: list[str]) -> None:
    """`--dry_run` as a process of its own: building TrainingArguments takes hold of the GPU until its process ends."""
    code = subprocess.run([sys.executable, "-m", "aesl_trl.chain.chain", *argv, "--dry_run"]).returncode
    if code != 0:
        sys.exit(code if 1 <= code <= 125 else 1)


if __name__ == "__main__":
    exit_on_input_error(NAME, main)
