"""`aesl compare --config compare.yaml`: methods x seeds x settings, each cell a chain; tables, statistics and plots.

One cold start for each method and seed serves all its selections. RL has the same budget in each cell. The learning
rates are tuned first, on seeds that the table does not use. When the comparison is run again, finished cells are
skipped and an interrupted cell goes on, as its chain does: each cell is a process that runs chain/chain.py.
"""

import os
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from .. import files
from ..arguments import ArgumentParser, check_replaceable
from ..chain.stages import ANYWHERE, CLI
from ..diversity.selection import LEFT_TO, select_run
from ..errors import InputError, nearest, tell
from ..errors import say as complain
from ..processes import DRY_RUN, HERE, MARK, check_in_child, child_env, end_orphans, lock
from ..provenance import commit, hardware, package_versions
from ..values import check_bound
from .cells import CELL, CHAIN_CONFIG, Cell, chain_of, failure, has_ended, rows, table_cells, unfinished_groups
from .config import CompareConfig, read_config
from .plan import check, plan
from .table import table
from .tuning import choose, planned, rounds
from .workers import DEVICES, Workers, split_devices, visible_devices


NAME = "aesl compare"
JSON, MARKDOWN = "compare.json", "compare.md"
LOG = "cell.log"
CHAIN = [*CLI, "chain"]
FAILED = 1  # exit code: a cell failed, and the table lacks it


@dataclass
class Comparison:
    """A comparison at work: its config, the cells that are asked for, and those that failed."""

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
        """Return the cells of `--methods` and, in the table, of `--seeds`."""
        return [
            cell
            for cell in cells
            if (self.methods is None or cell.method in self.methods)
            and (self.seeds is None or cell.tuning or cell.seed in self.seeds)
        ]


def run(comparison: Comparison) -> None:
    """Run the cells of tuning, then the table's cells at the points that tuning chose.

    A signal ends this process with the code 128 + signal.
    """
    config = comparison.config
    for cells in rounds(config):
        _run_cells(comparison, comparison.asked(cells))
    chosen, _ = choose(config)
    wanted = comparison.asked(table_cells(config, chosen))
    for row in sorted({cell.row for cell in wanted if config.points(cell.method)} - chosen.keys()):
        say(f"{row}: no point of its grid has a result for every tuning seed; its cells are not run")
        wanted = [cell for cell in wanted if cell.row != row]
    _run_cells(comparison, wanted)


def _run_cells(comparison: Comparison, cells: list[Cell]) -> None:
    for cell in cells:
        cell.write_configs()
    for cell in cells:
        cell.check_cold_start()
    groups = unfinished_groups(cells)
    if not groups:
        return
    workers = min(comparison.workers, len(groups))
    environments = [
        child_env(**{MARK: str(comparison.output), **({} if share is None else {DEVICES: share})})
        for share in split_devices(visible_devices(), workers)
    ]
    with Workers(environments, partial(_launch, comparison), partial(_goes_on, comparison)) as pool:
        pool.run(groups)
    if pool.received:
        say(f"stopped by {signal.Signals(pool.received[0]).name}; run it again to go on")
        sys.exit(128 + pool.received[0])


def _launch(comparison: Comparison, cell: Cell, environment: dict[str, str]) -> subprocess.Popen | None:
    if cell.is_done():
        return None
    home = cell.home
    if twin := same_start(cell):
        files.write_json(home / CELL, {"same_as": twin.parent.name})
        say(f"{cell.label}: starts from the same step as {twin.parent.name}: the same run")
        return None
    say(f"{cell.label}: starts, log {home / LOG}")
    files.write_json(home / CELL, _provenance(comparison, home, environment))
    command = [*CHAIN, "--config", str(home / CHAIN_CONFIG)]
    with open(home / LOG, "ab", opener=files.in_place) as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)


def same_start(cell: Cell) -> Path | None:
    """Return the finished cell of the same cold start and the same step: RL from that step would be the same run.

    None while the cold start is not trained, or where the chain itself has to measure first (readiness, mix).
    """
    if cell.selection is None or not cell.sft_is_done():
        return None
    chain = chain_of(cell.home)
    if chain.config.selection.rule in LEFT_TO:
        return None
    try:
        start = files.chosen(select_run(chain.sft_dir, out=cell.home, **chain.selection))
    except InputError:  # the chain will say the same, and only this cell fails
        return None
    for other in cell.config.selections(cell.method):
        sibling = replace(cell, selection=other)
        place = sibling.home
        if place != cell.home and (place / files.SELECTION).exists() and (place / files.CHAIN).exists():
            if files.chosen(files.read_object(place / files.SELECTION)) == start and sibling.is_done():
                return place
    return None


def _goes_on(comparison: Comparison, cell: Cell, code: int) -> bool:
    """Say how a cell ended. Return whether the other cells of its cold start can go on."""
    if code == 0 and has_ended(cell.home):
        say(f"{cell.label}: done")
        return True
    log = cell.home / LOG
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
    last = next((line.strip()[:300] for line in reversed(lines) if line.strip()), "nothing in its log")
    say(f"{cell.label}: ended with exit code {code}; {last} (log {log})")
    comparison.failed[cell.label] = code
    return cell.selection is not None and cell.sft_is_done()


def say(line: str) -> None:
    """Print a line of the comparison's own, at once."""
    tell(f"{NAME}: {line}")


def _provenance(comparison: Comparison, home: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Return how and where the cell is run, after the like of its earlier starts."""
    now = {
        "command": comparison.command,
        "commit": commit(),
        "hardware": hardware(),
        "devices": environment.get(DEVICES),
        "started": datetime.now(UTC).isoformat("T", "seconds"),
    }
    before = files.read_object(home / CELL)
    return {key: [*dict.fromkeys([*(before.get(key) or []), value])] for key, value in now.items()}


def write_results(comparison: Comparison) -> str:
    """Write compare.json, compare.md and the plots, from the run folders alone. Return the tables."""
    from .page import page  # with the plots it imports matplotlib
    from .plots import write_plots

    config, tune = comparison.config, comparison.config.tune
    chosen, tuning = choose(config)
    records = {cell: cell.record() for cell in table_cells(config, chosen)}
    cells = [item for item in records.values() if item]
    if not cells and not any(line["finished"] for line in tuning):
        raise InputError(f"{config.output_dir} holds no finished cell: run it first, or see the logs of what failed")
    failed = {cell: failure(cell) for cell, item in records.items() if not item}
    result = {
        "config": os.path.relpath(comparison.path, comparison.output),
        "seeds": config.seeds,
        "reference": config.reference,
        **table(cells, rows(config), reference=config.reference, metric=config.metric),
        "tuning": tune and {**{key: getattr(tune, key) for key in ("by", "seeds", "keep", "base")}, "rows": tuning},
        "missing": [cell.label + (f" ({reason})" if reason else "") for cell, reason in failed.items()],
        "cells": cells,
        "versions": package_versions(),
    }
    files.write_json(comparison.output / JSON, result)
    plots = write_plots(result, comparison.output)
    text = page(files.read_json(comparison.output / JSON), plots)
    files.write_text(comparison.output / MARKDOWN, text)
    return text


def main(argv: list[str] | None = None) -> None:
    """Check, print the plan, run, and end with the tables; exit with code 1 where a cell failed."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = ArgumentParser(NAME, __doc__.split("\n")[0])
    parser.add_argument("--config", required=True, metavar="FILE", help="compare.yaml: methods, seeds, the chain")
    parser.add_argument("--output_dir", metavar="DIR", help="folder of all cells, in place of the config's")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="cells at a time; they share the GPUs")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="run only these; the table has all there is")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="run only these seeds of the table")
    parser.add_argument("--dry_run", **DRY_RUN)
    parser.add_argument("--table_only", action="store_true", help="tables and plots from the folders, run nothing")
    given = parser.parse_args(argv)
    config = read_config(given.config, output_dir=given.output_dir)
    check_bound("--workers", given.workers, at_least=1)
    for name, known in (("methods", config.methods), ("seeds", config.seeds)):
        for value in getattr(given, name) or []:
            if value not in known:
                raise InputError(f"--{name}: {given.config} has no {value}{nearest(str(value), map(str, known))}")
    path, command = Path(given.config).absolute(), shlex.join([*NAME.split(), *argv])
    comparison = Comparison(config, path, given.workers, given.methods, given.seeds, command)
    # Beside our cells these names are ours, also where compare.json was deleted to be made anew
    known = [*planned(config), *table_cells(config, {})]  # a table cell's folder does not depend on its point
    is_ours = files.wrote(comparison.output / JSON, "cells") or any((cell.home / CELL).exists() for cell in known)
    for name in (JSON, MARKDOWN, *(path.name for path in comparison.output.glob("compare_*.png"))):
        check_replaceable("output_dir", comparison.output / name, is_ours, is_file=True)
    if given.table_only:
        _tell_results(comparison)
    elif given.dry_run:
        check(config, path, () if given.dry_run == HERE else ANYWHERE)
        chosen, _ = choose(config)
        tuning, cells = comparison.asked(planned(config)), comparison.asked(table_cells(config, chosen))
        open_rows = {cell.row for cell in cells if tuning and config.points(cell.method)} - chosen.keys()
        tell(plan(config, path, [*tuning, *cells], given.workers, open_rows))
    else:
        _run_and_write(comparison, argv)


def _tell_results(comparison: Comparison) -> None:
    tell(write_results(comparison))
    tell(f"tables -> {comparison.output / MARKDOWN}, figures -> {comparison.output / JSON}, plots beside them")


def _run_and_write(comparison: Comparison, argv: list[str]) -> None:
    with lock(comparison.output / ".compare.lock", f"another comparison is at work in {comparison.output}"):
        end_orphans(comparison.output, say, "comparison")
        check_in_child("compare", argv)
        run(comparison)
        for label, code in comparison.failed.items():
            complain(f"{NAME}: {label} ended with exit code {code}: not in the table")
        _tell_results(comparison)
    if comparison.failed:
        sys.exit(FAILED)
