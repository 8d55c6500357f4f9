"""`aesl compare --config compare.yaml`: methods x seeds x settings, each cell a chain; tables, statistics and plots.

One cold start for each method and seed serves all its selections, RL has the same budget in each cell, and the
learning rates are tuned first, on seeds that the table does not use. Run again, finished cells are passed over and an
interrupted one goes on: both are the chain's own (chain/chain.py), which runs here as a process for each cell.

Left out: compare.yaml (config.py), cells and their files (cells.py), tuning (tuning.py),
statistics (table.py), tables as text (page.py), plots (plots.py).
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .. import files
from ..chain.config import read_config as read_chain
from ..chain.stages import Chain
from ..errors import InputError, exit_on_input_error, nearest
from ..processes import MARK, end_processes, lock
from ..provenance import commit, hardware, package_versions
from . import cells as cells_of
from .cells import CELL, Cell
from .config import CompareConfig, Point, read_config
from .plan import check, plan
from .table import table
from .tuning import choose, planned, rounds, untuned
from .workers import DEVICES, Workers, split_devices, visible_devices


NAME = "aesl compare"
JSON, MARKDOWN = "compare.json", "compare.md"
LOG = "cell.log"
CHAIN = [sys.executable, "-m", "aesl_trl.chain.chain"]
TUNING_FACTS = ("by", "seeds", "keep")
FAILED = 1  # exit code: a cell failed, and the table lacks it


@dataclass
class Comparison:
    """A comparison at work: its config, what of it is asked for, and the cells that failed."""

    config: CompareConfig
    path: Path
    workers: int = 1
    methods: list[str] | None = None
    seeds: list[int] | None = None
    command: str = NAME
    failed: dict[str, int] = field(default_factory=dict)

    @property
    def output(self) -> Path:
        return Path(self.config.output_dir)

    def asked(self, cells: list[Cell]) -> list[Cell]:
        """Those of `--methods` and, in the table, `--seeds`."""
        return [
            cell
            for cell in cells
            if (self.methods is None or cell.method in self.methods)
            and (self.seeds is None or cell.tuning or cell.seed in self.seeds)
        ]


# ---- Running


def run(comparison: Comparison) -> None:
    """Tuning first, then the table's cells at the points chosen.

    Raises:
        SystemExit: a signal came (128 + signal).
    """
    config = comparison.config
    for cells in rounds(config):
        _run_cells(comparison, comparison.asked(cells))
    chosen, _ = choose(config)
    wanted = comparison.asked(cells_of.table_cells(config, chosen))
    for row in untuned(config, wanted, chosen):
        say(f"{row}: no point of its grid has a result for every tuning seed; its cells are not run")
        wanted = [cell for cell in wanted if cell.row != row]
    _run_cells(comparison, wanted)


def _run_cells(comparison: Comparison, cells: list[Cell]) -> None:
    config = comparison.config
    for cell in cells:
        cells_of.write_configs(config, cell)
    for cell in cells:
        cells_of.check_cold_start(config, cell)
    groups = list(cells_of.in_order(config, cells))
    if not groups:
        return
    workers = min(comparison.workers, len(groups))
    environments = [
        {**os.environ, MARK: str(comparison.output), **({} if share is None else {DEVICES: share})}
        for share in split_devices(visible_devices(), workers)
    ]
    with Workers(
        environments,
        lambda cell, environment: _launch(comparison, cell, environment),
        lambda cell, code: _ended(comparison, cell, code),
    ) as pool:
        pool.run(groups)
    if pool.received:
        say(f"stopped by {signal.Signals(pool.received[0]).name}; run it again to go on")
        sys.exit(128 + pool.received[0])


def _launch(comparison: Comparison, cell: Cell, environment: dict[str, str]) -> subprocess.Popen | None:
    config = comparison.config
    if cells_of.is_done(config, cell):
        return None
    home = cells_of.folder(config, cell)
    twin = same_start(config, cell)
    if twin is not None:
        files.write_json(home / CELL, {"same_as": twin.parent.name})
        say(f"{cell.label}: starts from the same step as {twin.parent.name}: the same run")
        return None
    say(f"{cell.label}: starts, log {home / LOG}")
    files.write_json(home / CELL, _provenance(comparison, home, environment))
    command = [*CHAIN, "--config", str(home / cells_of.CHAIN_CONFIG)]
    with open(home / LOG, "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)


def same_start(config: CompareConfig, cell: Cell) -> Path | None:
    """A finished cell of the same cold start whose selection came to the same step: RL from it would be the same run.

    None while the cold start is not trained, or where the chain itself has to find the step (by probing candidates).
    """
    from ..diversity.selection import select_run

    if cell.selection is None or not cells_of.sft_is_done(config, cell):
        return None
    home = cells_of.folder(config, cell)
    chain = Chain(read_chain(home / cells_of.CHAIN_CONFIG), home / cells_of.CHAIN_CONFIG)
    given = {key: value for key, value in vars(chain.config.selection).items() if value is not None}
    if given.get("rule") == "readiness":
        return None
    try:
        step = select_run(chain.sft_dir, out=home, **given)["step"]
    except InputError:  # the chain will say the same, and only this cell fails
        return None
    for other in config.selections(cell.method):
        sibling = replace(cell, selection=other)
        place = cells_of.folder(config, sibling)
        if place != home and (place / files.SELECTION).exists() and (place / files.CHAIN).exists():
            if files.read_json(place / files.SELECTION)["step"] == step and cells_of.is_done(config, sibling):
                return place
    return None


def _ended(comparison: Comparison, cell: Cell, code: int) -> bool:
    """Whether the other cells of its cold start can go on."""
    if code == 0:
        say(f"{cell.label}: done")
        return True
    log = cells_of.folder(comparison.config, cell) / LOG
    say(f"{cell.label}: ended with exit code {code}; {_last_line(log)} (log {log})")
    comparison.failed[cell.label] = code
    return cell.selection is not None and cells_of.sft_is_done(comparison.config, cell)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "nothing in its log")


def say(line: str) -> None:
    print(f"{NAME}: {line}", flush=True)


def _provenance(comparison: Comparison, home: Path, environment: dict[str, str]) -> dict[str, Any]:
    """What the cell is run by and on; where it goes on, what it was begun by and on stays beside that."""
    now = {
        "command": comparison.command,
        "commit": commit(),
        "hardware": hardware(),
        "devices": environment.get(DEVICES),
        "started": datetime.now(UTC).isoformat("T", "seconds"),
    }
    before = files.read_json(home / CELL) if (home / CELL).exists() else {}
    return {key: [*dict.fromkeys([*(before.get(key) or []), value])] for key, value in now.items()}


# ---- Results


def write_results(comparison: Comparison) -> str:
    """compare.json, compare.md and the plots, from the run folders alone; returns the tables.

    Raises:
        InputError: no cell is finished, or a file of one cannot be used.
    """
    from .page import page
    from .plots import write_plots

    config = comparison.config
    chosen, tuning = choose(config)
    wanted = cells_of.table_cells(config, chosen)
    cells = [item for cell in wanted if (item := cells_of.record(config, cell))]
    if not cells and not any(line["finished"] for line in tuning):
        raise InputError(f"{config.output_dir} holds no finished cell: run it first, or see the logs of what failed")
    result = {
        "config": os.path.relpath(comparison.path, comparison.output),
        "seeds": config.seeds,
        "reference": config.reference,
        **table(cells, cells_of.rows(config), reference=config.reference, metric=config.metric),
        "tuning": config.tune and {**{key: getattr(config.tune, key) for key in TUNING_FACTS}, "rows": tuning},
        "missing": _missing(config, wanted, {item["folder"] for item in cells}),
        "cells": cells,
        "versions": package_versions(),
    }
    files.write_json(comparison.output / JSON, result)
    plots = write_plots(result, comparison.output)
    text = page(files.read_json(comparison.output / JSON), plots)
    files.write_text(comparison.output / MARKDOWN, text)
    return text


def _missing(config: CompareConfig, wanted: Sequence[Cell], found: set[str]) -> list[str]:
    homes = {cell: cells_of.folder(config, cell) for cell in wanted}
    absent = {cell: home for cell, home in homes.items() if os.path.relpath(home, config.output_dir) not in found}
    reasons = {cell: cells_of.failure(home) for cell, home in absent.items()}
    return [cell.label + (f" ({reason})" if reason else "") for cell, reason in reasons.items()]


# ---- Command line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise InputError(f"{message} (see {NAME} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=NAME, description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="FILE", help="compare.yaml: methods, seeds, the chain")
    parser.add_argument("--output_dir", metavar="DIR", help="folder of all cells, in place of the config's")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="cells at a time; GPUs are shared out")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="run these only; the table shows what there is")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="run these seeds of the table only")
    parser.add_argument("--dry_run", action="store_true", help="check everything, print plan and hours, run nothing")
    parser.add_argument("--table_only", action="store_true", help="tables and plots from the folders, run nothing")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Check, print the plan, run, and end with the tables; exit code 1 where a cell failed."""
    argv = sys.argv[1:] if argv is None else list(argv)
    given = _parser().parse_args(argv)
    comparison = _comparison(given, argv)
    if given.table_only:
        print(write_results(comparison))
    elif given.dry_run:
        config, (chosen, _) = comparison.config, choose(comparison.config)
        check(config, comparison.path)
        tuning = comparison.asked(planned(config))
        # Until tuning has chosen, no two rows can count on sharing a cold start.
        pending = {row["row"]: Point((("row", number),)) for number, row in enumerate(cells_of.rows(config)) if tuning}
        cells = comparison.asked(cells_of.table_cells(config, {**pending, **chosen}))
        print(plan(config, comparison.path, tuning, cells, comparison.workers))
    else:
        _main(comparison, argv)


def _comparison(given: argparse.Namespace, argv: list[str]) -> Comparison:
    config = read_config(given.config, output_dir=given.output_dir)
    if given.workers < 1:
        raise InputError(f"--workers must be at least 1, got {given.workers}")
    for name, known in (("methods", config.methods), ("seeds", config.seeds)):
        for value in getattr(given, name) or []:
            if value not in known:
                raise InputError(f"--{name}: {given.config} has no {value}{nearest(str(value), map(str, known))}")
    command = shlex.join([*NAME.split(), *argv])
    return Comparison(config, Path(given.config).absolute(), given.workers, given.methods, given.seeds, command)


def _main(comparison: Comparison, argv: list[str]) -> None:
    comparison.output.mkdir(parents=True, exist_ok=True)
    with lock(comparison.output / ".compare.lock", f"another comparison is at work in {comparison.output}"):
        if ended := end_processes(str(comparison.output)):
            say(f"ended {len(ended)} processes that a killed comparison had left at work in {comparison.output}")
        check_in_child(argv)
        run(comparison)
        for label, code in comparison.failed.items():
            print(f"{NAME}: {label} ended with exit code {code}: not in the table", file=sys.stderr)
        print(write_results(comparison))
    if comparison.failed:
        sys.exit(FAILED)


def check_in_child(argv: list[str]) -> None:
    """`--dry_run` as a process of its own: building TrainingArguments takes hold of the GPU until its process ends."""
    code = subprocess.run([sys.executable, "-m", "aesl_trl.compare.compare", *argv, "--dry_run"]).returncode
    if code != 0:
        sys.exit(code if 1 <= code <= 125 else 1)


if __name__ == "__main__":
    exit_on_input_error(NAME, main)
