"""Before a comparison runs: every config checked as its stage will, what is left to run, and how long that takes."""

import statistics
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import files
from ..arguments import load_yaml
from ..chain.config import read_config as read_chain
from ..chain.stages import Chain, check_stages
from ..errors import InputError, nearest
from . import cells as cells_of
from .cells import Cell
from .config import CompareConfig
from .tuning import planned


def check(config: CompareConfig, path: Path) -> None:
    """Have each method's chain checked as the chain would, in every setting and at every point of its grid.

    Raises:
        InputError: a config that a stage would refuse; it names what put it together.
    """
    _check_figures(config, path)
    seen = set()
    with tempfile.TemporaryDirectory() as place:
        trial = replace(config, output_dir=place)
        for cell in [*planned(trial), *cells_of.table_cells(trial, {})]:
            if (key := (cell.row, cell.point)) in seen:
                continue
            seen.add(key)
            chain_yaml = cells_of.write_configs(trial, cell)
            try:
                chain = Chain(read_chain(chain_yaml), chain_yaml)
                check_stages(chain)
                _check_candidates(chain, path)
            except InputError as error:
                raise InputError(_where(str(error), path, trial, cell)) from None


def _check_figures(config: CompareConfig, path: Path) -> None:
    """Whether the evaluation will have the figures that rows are compared, and points are chosen, by."""
    from ..diversity.figures import Group, measure

    values = load_yaml(config.chain["eval"]["config"])
    samples = values.get("samples", 8)
    texts, lists = [str(number) for number in range(samples)], [[1] * samples, [False] * samples, [0.0] * samples]
    known = set(measure([Group("", texts, *lists, rewards=[[0.0]] * samples)]))
    if values.get("benchmarks"):
        known |= {f"{name}@{samples}" for name in ("avg", "pass", "maj")}
    for field, name in (("metric", config.metric), *([("tune.by", config.tune.by)] if config.tune else [])):
        if name not in known:
            raise InputError(f"{path}: {field}: the evaluation has no figure {name!r}{nearest(name, known)}")


def _where(text: str, path: Path, trial: CompareConfig, cell: Cell) -> str:
    """The error with the user's files in place of those put together for the trial."""
    for written in cells_of.configs(trial, cell):
        stage = {"grpo.yaml": "grpo", "eval.yaml": "eval", cells_of.CHAIN_CONFIG: ""}.get(written.name, "sft")
        source = trial.chain[stage]["config"] if stage else f"{path}: chain"
        text = text.replace(str(written), f"{source} as {path.name} changes it for {cell.row}" if stage else source)
    return text


def _check_candidates(chain: Chain, path: Path) -> None:
    """Whether a step of rl_from_steps will be saved: known before training where max_steps is set."""
    step = chain.config.selection.step
    if step is None:
        return
    values = load_yaml(chain.config.sft.config)
    every, last = values["diversity_steps"], values.get("max_steps")
    if step % every and step != last:
        raise InputError(f"{path}: rl_from_steps: step {step} is never saved, candidates are every {every} steps")
    if last and step > last:
        raise InputError(f"{path}: rl_from_steps: step {step} is beyond max_steps {last} of {chain.config.sft.config}")
    kept, needed = values.get("max_candidates", 5), -(-last // every) if last else 0
    if kept < needed:
        raise InputError(
            f"{path}: rl_from_steps: {chain.config.sft.config} keeps {kept} of {needed} candidates; set "
            f"max_candidates: {needed}"
        )


def plan(config: CompareConfig, path: Path, tuning: list[Cell], cells: list[Cell], workers: int) -> str:
    """What is to run and how long it takes, as `--dry_run` and every start print it."""
    lines = [f"{path} -> {config.output_dir}"]
    for name, part in (("tuning", tuning), ("table", cells)):
        counts = Counter(cell.row for cell in part)
        lines += [f"{name}: " + ", ".join(f"{row} x {count}" for row, count in counts.items())] if part else []
    return "\n".join([*lines, _hours_line(hours(config, [*tuning, *cells], workers), workers)])


def _hours_line(found: dict[str, Any], workers: int) -> str:
    what = f"to run: at most {found['cells']} cells and {found['cold_starts']} cold starts"
    if found["process_h"] is None:
        return (
            f"{what}; how long is not known before a cell has finished: state it as "
            "estimate: {sft_s: ..., rl_s: ...}"
        )
    workers_text = f"{workers} worker{'s' if workers > 1 else ''}"
    return (
        f"{what}, {found['process_h']:.2f} process-hours, {found['wall_h']:.2f} hours with {workers_text} "
        f"({found['source']})"
    )


# ---- Time


def hours(config: CompareConfig, cells: list[Cell], workers: int) -> dict[str, Any]:
    """What is left to run and how long it takes: medians of the finished cells, of the method where there are some.

    Returns:
        `cells`, `cold_starts` (to run), `process_h` and `wall_h` (None where nothing tells), `source`.
    """
    measured: dict[str | None, list[tuple[float | None, float]]] = {}
    for cell in cells:
        if (found := _seconds(cells_of.folder(config, cell))) is not None:
            for key in (cell.method, None):
                measured.setdefault(key, []).append(found)
    times, left, starts = [], 0, 0
    for group in cells_of.groups(config, cells):
        waiting = [cell for cell in group if not cells_of.is_done(config, cell)]
        if not waiting:
            continue
        trains = cells_of.sft_folder(config, waiting[0]) is not None and not cells_of.sft_is_done(config, waiting[0])
        left, starts = left + len(waiting), starts + trains
        sft_s, rl_s = _expected(config, measured, waiting[0].method)
        unknown = rl_s is None or (trains and sft_s is None)
        times.append(None if unknown else len(waiting) * rl_s + (sft_s if trains else 0))
    known = None not in times
    total = sum(times) / 3600 if known else None
    wall = max(total / workers, max(times, default=0) / 3600) if known else None
    count = len(measured.get(None, []))
    source = f"medians of {count} finished cells" if count else "as the section estimate says"
    return {"cells": left, "cold_starts": starts, "process_h": total, "wall_h": wall, "source": source}


def _seconds(home: Path) -> tuple[float | None, float] | None:
    """Seconds of a finished cell's cold start, and of the rest."""
    if cells_of.source(home) != home or not cells_of.has_ended(home):
        return None
    stages = {name: stage["seconds"] for name, stage in files.read_json(home / files.CHAIN)["stages"].items()}
    return stages.pop("sft", None), sum(stages.values())


def _expected(config: CompareConfig, measured: dict, method: str) -> tuple[float | None, float | None]:
    """Seconds of a cold start and of the rest: of this method's cells, else of all, else as estimated."""
    stated = (config.estimate.sft_s, config.estimate.rl_s) if config.estimate else (None, None)
    found = []
    for part in (0, 1):
        known = [[times[part] for times in measured.get(key, []) if times[part] is not None] for key in (method, None)]
        values = known[0] or known[1]
        found.append(statistics.median(values) if values else stated[part])
    return found[0], found[1]
