"""`aesl chain --config chain.yaml`: SFT, selection, handoff, probe, GRPO, evaluation and report, one process each.

The stages meet only through files of the run folder, so the chain is no more than their order. chain.json says of each
stage what it was started from (fingerprints.py) and how it ended. When the chain is run again, it skips a stage that
is done and has the same fingerprint. A stage that was cut off goes on from its last whole checkpoint. A stage that
changed starts afresh, and so does all that follows it.
"""

import os
import shlex
import signal
import sys
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

from .. import files
from ..arguments import ArgumentParser, check_replaceable
from ..diversity.readiness import CAUTION, READY
from ..diversity.selection import select_run
from ..errors import UNFINISHED, InputError, tell
from ..errors import say as complain
from ..evaluation.figures import aligned
from ..identity import file_hash
from ..processes import (
    DRY_RUN,
    HERE,
    Interrupts,
    check_in_child,
    end_orphans,
    exit_code,
    lock,
    lock_beside,
    run_process,
)
from ..training.checkpoints import find_checkpoint, sweep
from .config import read_config
from .fingerprints import Inputs, walk
from .old_fingerprints import renew
from .stages import (
    ANYWHERE,
    BUILDERS,
    NAME,
    Chain,
    Stage,
    check_stages,
    is_whole,
    plan,
    portable,
    run_name,
    stage_env,
    where_sft_lies,
)
from .vllm_server import wait_for_server


COLUMNS = ("pass@1", "pass@8", "entropy", "self_bleu", "groups_mixed")  # of the closing table


def run_chain(chain: Chain, interrupts: Interrupts) -> None:
    """Run the stages that are not done yet, in order.

    This process ends with the exit code of a stage that failed (1 where a signal ended it), or with 128 + signal.
    """
    began = time.monotonic()
    chain.read_record()
    renew(chain)
    for number, (stage, inputs) in enumerate(walk(chain), 1):
        elapsed = time.strftime("%H:%M:%S", time.gmtime(time.monotonic() - began))
        say(f"stage {number} of {len(chain.names)}: {stage.name} ({elapsed} elapsed)")
        record = chain.recorded(stage.name)
        is_done = record.get("status") == "done" and record.get("inputs") == inputs.fingerprint
        if is_done and is_whole(stage.output) and record.get("wrote") in (None, written(stage)):
            say(f"{stage.name} is done with the same inputs: skipped")
            chain.note(stage.name, **record)
        else:
            _run_stage(chain, stage, inputs, interrupts)
        if stage.name == "probe":
            check_readiness(chain)


def check_readiness(chain: Chain) -> None:
    """Say the verdict on the model that RL would start from. Stop before RL where the verdict is not "ready"."""
    found = files.read_json(chain.run / files.READINESS)["checkpoints"][0]
    line = f"{found['text']} ({'; '.join(why for why in found['reasons'] if not why.startswith(CAUTION))})"
    if found["verdict"] == READY:
        say(line)
    elif chain.config.ignore_readiness:
        say(f"{line}; ignore_readiness is set, going on")
    else:
        complain(f"{NAME}: no RL: {line}; ignore_readiness: true in {chain.path} goes on all the same")
        sys.exit(UNFINISHED)


def _run_stage(chain: Chain, stage: Stage, inputs: Inputs, interrupts: Interrupts) -> None:
    if stage.name == "grpo":
        wait_for_server(chain.config.grpo.config, chain.start, say)
    resume = _prepare_folder(chain, stage, inputs)
    outdated = chain.names[chain.names.index(stage.name) :]
    for name in (stage.name, chain.names[-1]) if stage.name == "probe" else outdated:
        chain.record["stages"].pop(name, None)
    command = [*stage.command, *(["--resume_from_checkpoint", str(resume)] if resume else [])]
    base = chain.sft_dir if stage.name == "sft" else chain.run
    facts = {
        "command": shlex.join(portable(command, base)),
        "started": datetime.now(UTC).isoformat("T", "seconds"),
        "seconds": None,
        "returncode": None,
        "inputs": inputs.fingerprint,
        "settings": inputs.settings,
    }
    chain.note(stage.name, status="running", **facts)
    log, began = chain.run / files.LOGS / f"{stage.name}.log", time.monotonic()
    before = _version(stage.output)
    if stage.name == "select":
        with interrupts.held():
            code = _select(chain, log)
    else:
        code = run_process(command, log, interrupts, env=stage_env(stage), append=resume is not None)
    facts |= {"seconds": round(time.monotonic() - began, 1), "returncode": code}
    # A training that starts anew in an old run's folder writes to another place
    output = BUILDERS[stage.name](chain).output
    is_done = code == 0 and is_whole(output) and _version(output) != before
    status = "interrupted" if interrupts.received else "done" if is_done else "failed"
    if is_done and written(stage):
        facts["wrote"] = written(stage)
    chain.note(stage.name, status=status, **facts)
    if interrupts.received:
        # The stage may have saved and returned 0: the next one must not start all the same.
        say(f"stopped by {signal.Signals(interrupts.received[0]).name} in stage {stage.name}; run it again to go on")
        sys.exit(128 + interrupts.received[0])
    if code != 0:
        complain(f"{NAME}: stage {stage.name} failed with exit code {code}; its log is {log}")
        sys.exit(exit_code(code))
    if not is_done:
        why = f"ended with exit code 0 but has not written a whole {output}: something in it left early"
        complain(f"{NAME}: stage {stage.name} {why}; its log is {log}")
        sys.exit(1)


def written(stage: Stage) -> str | None:
    """Return the sha256 of the averages' file, which another chain that shares the SFT may replace; else None."""
    return file_hash(stage.output) if stage.name == "mix" else None


def _version(output: Path) -> tuple[int, int] | None:
    """Return what changes when a stage writes its output anew; None where there is no output."""
    if not output.exists():
        return None
    found = output.stat()
    return found.st_ino, found.st_mtime_ns


def _prepare_folder(chain: Chain, stage: Stage, inputs: Inputs) -> Path | None:
    """Return the checkpoint to resume from. Move aside what another run left, or refuse it where it is shared."""
    folder = stage.folder
    for place in {chain.run, chain.sft_dir or chain.run, folder or chain.run}:
        sweep(place)
    if folder is None or not folder.exists():
        return None
    places = [place for place in (folder, folder / files.OWN) if place.is_dir()]
    if {name for place in places for name in os.listdir(place)} <= {files.OWN, files.STAGE, files.TRAINING_LOCK}:
        return None
    if chain.recorded(stage.name).get("inputs") == inputs.fingerprint:
        say(f"{stage.name} was cut off")
        return find_checkpoint(True, folder, say)
    if stage.name == "sft" and chain.config.sft.output_dir:
        raise InputError(
            f"sft.output_dir {folder} holds an SFT run of other inputs than {chain.config.sft.config}, seed "
            f"{chain.config.seed}: name another folder, or remove that one"
        )
    others = (folder.with_name(f"{folder.name}.old-{number}") for number in range(1, 10**6))
    target = next(other for other in others if not other.exists())
    os.replace(folder, target)
    say(f"{folder} was trained from other inputs: moved to {target}")
    return None


def _select(chain: Chain, log: Path) -> int:
    chosen = select_run(chain.sft_dir, out=chain.run, **chain.selection)
    line = f"{files.chosen(chosen)} by {chosen['applied']}: {chosen['reason']}"
    line += f"; replaces {chosen['replaces']}" if chosen["replaces"] else ""
    say(line)
    files.write_text(log, line + "\n")
    return 0


def say(line: str) -> None:
    """Print a line of the chain's own, at once."""
    tell(f"{NAME}: {line}")


def closing_table(chain: Chain) -> str:
    """Lay out the figures at RL's start and end, of this run and of the recorded ones. Entropy is in nats a token."""
    rows = [("run", "model", "step", *COLUMNS)]
    for run, label in [(chain.run, ""), *((Path(run), " (recorded)") for run in chain.config.report.compare)]:
        start = {"start": (files.chosen(files.read_object(run / files.SELECTION)) or "-").removeprefix("step ")}
        for name, figures in files.read_object(run / files.EVALUATION).get("models", {}).items():
            shown = ("-" if figures.get(column) is None else f"{figures[column]:.3f}" for column in COLUMNS)
            rows.append((f"{run_name(run)}{label}", name, start.get(name, ""), *shown))
    return aligned(rows) if rows[1:] else "no evaluation.json to show"


def main(argv: list[str] | None = None) -> None:
    """Check the configs, run the stages, and end with the table of results and the report's path."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = ArgumentParser(NAME, __doc__.split("\n")[0])
    parser.add_argument("--config", required=True, metavar="FILE", help="chain.yaml: the stages and their configs")
    parser.add_argument("--output_dir", metavar="DIR", help="run folder, in place of the config's")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of every stage, in place of the config's")
    parser.add_argument("--dry_run", **DRY_RUN)
    given = parser.parse_args(argv)
    config = read_config(given.config, output_dir=given.output_dir, seed=given.seed)
    chain = Chain(config, Path(given.config).absolute())
    if given.dry_run:
        check_stages(chain, () if given.dry_run == HERE else ANYWHERE)
        from .hours import hours_lines  # with it come torch and TRL, which a missing file does not wait for

        tell("\n".join([plan(chain), *hours_lines(chain, chain.path)]))
        return
    record = chain.run / files.CHAIN
    check_replaceable("output_dir", record, files.wrote(record, "stages"), is_file=True)
    for name in ("sft", files.GRPO_DIR, files.LOGS):
        files.check_unlinked(chain.run / name, chain.run)
    with ExitStack() as stack:
        interrupts = stack.enter_context(Interrupts())
        trained = list(filter(None, (chain.sft_dir, chain.run / files.GRPO_DIR)))
        for folder in dict.fromkeys([chain.run, *trained]):
            message = f"another chain is at work in {folder}, or a training of its own: end it first"
            stack.enter_context(lock(lock_beside(folder), message))
            end_orphans(folder, say, "chain")
        for folder in filter(Path.is_dir, trained):
            with lock(folder / files.OWN / files.TRAINING_LOCK, f"a training is at work in {folder}: end it first"):
                pass  # no stage but its own may read, or move aside, what is still being written
        check_in_child("chain", argv)
        for line in where_sft_lies(chain):
            say(line)
        run_chain(chain, interrupts)
    tell(closing_table(chain))
    tell(f"model after RL -> {chain.run / files.GRPO_DIR}")
    tell(f"report -> {chain.run / files.REPORT}; open it in a browser")
