"""Before a comparison runs: every config checked as its stage will, what is left to run, and how long that takes."""

import statistics
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .. import files
from ..chain.stages import Chain, check_stages
from ..diversity.passk import powers_of_two
from ..errors import InputError, nearest
from ..estimates.hours import HOW, Span
from ..processes import scratch
from ..values import load_yaml
from .cells import CHAIN_CONFIG, MIX_CONFIG, Cell, chain_of, groups, has_ended, source, table_cells
from .config import CompareConfig
from .table import OF_VALUE
from .tuning import planned


# The figures of an evaluation beside pass@k, as diversity/figures.py measures them
FIGURES = (
    "entropy entropy_sampled self_bleu distinct_1 distinct_2 distinct_3 distinct_4 unique length truncated eos_prob "
    "reward groups_all_right groups_all_wrong groups_mixed distinct_answers"
).split()


def check(config: CompareConfig, path: Path, flags: Sequence[str] = ()) -> None:
    """Check each method's chain as [`check_stages`] does, in every setting and at every point of its grid."""
    evaluation = load_yaml(config.chain["eval"]["config"])
    samples = evaluation.get("num_samples", 8)
    known = [*FIGURES, *(f"pass@{k}" for k in powers_of_two(samples))]
    known += [f"{name}@{samples}" for name in ("avg", "pass", "maj")] if evaluation.get("benchmarks") else []
    for field, name in (("metric", config.metric), *([("tune.by", config.tune.by)] if config.tune else [])):
        if name not in known and not (evaluation.get("count_by") and OF_VALUE.fullmatch(name)):
            raise InputError(f"{path}: {field}: the evaluation has no figure {name!r}{nearest(name, known)}")
    with scratch("check") as place:  # the configs in it hold `env`
        trial = replace(config, output_dir=str(place))
        trials = {(cell.base, cell.row, cell.point): cell for cell in [*planned(trial), *table_cells(trial, {})]}
        for cell in trials.values():
            cell.write_configs()
            try:
                chain = chain_of(cell.home)
                check_stages(chain, flags)
                _check_candidates(chain, path)
            except InputError as error:
                raise InputError(_with_own_files(str(error), path, cell)) from None


def _with_own_files(text: str, path: Path, cell: Cell) -> str:
    """Name the user's files in an error in place of those put together for the trial."""
    for written in cell.configs():
        stage = {"grpo.yaml": "grpo", "eval.yaml": "eval", CHAIN_CONFIG: ""}.get(written.name, "sft")
        stage = "mix" if written == cell.home / MIX_CONFIG else stage
        own = cell.config.chain[stage]["config"] if stage else f"{path}: chain"
        text = text.replace(str(written), f"{own} as {path.name} changes it for {cell.row}" if stage else own)
    return text


def _check_candidates(chain: Chain, path: Path) -> None:
    """Refuse a step of rl_from_steps that will not be saved, where max_steps tells so before training."""
    step = chain.config.selection.step
    if step is None:
        return
    config, where = chain.config.sft.config, f"{path}: rl_from_steps"
    values = load_yaml(config)
    every, last = values["diversity_steps"], values.get("max_steps")
    if step % every and step != last:
        raise InputError(f"{where}: step {step} is never saved, candidates are every {every} steps")
    if last and step > last:
        raise InputError(f"{where}: step {step} is beyond max_steps {last} of {config}")
    kept, needed = values.get("max_candidates", 5), -(-last // every) if last else 0
    if kept < needed:
        raise InputError(f"{where}: {config} keeps {kept} of {needed} candidates; set max_candidates: {needed}")


def plan(config: CompareConfig, path: Path, cells: list[Cell], workers: int, open_rows: Collection[str] = ()) -> str:
    """Return what is to run and how long it takes, as `--dry_run` and every start print it; see [`hours`]."""
    lines = [f"{path} -> {config.output_dir}"]
    for name, tuning in (("tuning", True), ("table", False)):
        counts = Counter(cell.row for cell in cells if cell.tuning is tuning)
        lines += [f"{name}: " + ", ".join(f"{row} x {count}" for row, count in counts.items())] if counts else []
    found = hours(config, cells, workers, open_rows)
    to_run = f"to run: at most {found.cells} cells and {found.cold_starts} cold starts"
    with_workers = "1 worker" if workers == 1 else f"{workers} workers"
    if found.process_h is not None:
        time = f"{found.process_h:.2f} process-hours, {found.wall_h:.2f} hours with {with_workers} ({found.source})"
        return "\n".join([*lines, f"{to_run}, {time}"])
    try:
        expected = estimated(config, path)
    except InputError as error:
        stated = "how long is not known before a cell has finished: state it as estimate: {sft_s: ..., rl_s: ...}"
        return "\n".join([*lines, f"{to_run}; {stated} (not estimated: {error})"])
    ends = [hours(config, cells, workers, open_rows, expected[end]) for end in ("fast", "slow")]
    process = Span(*(end.process_h * 3600 for end in ends))
    wall = Span(*(end.wall_h * 3600 for end in ends))
    return "\n".join(
        [*lines, f"{to_run}, one after the other {process}, with {with_workers} {wall} (estimated: {HOW})"]
    )


Expected = dict[tuple[str, str], tuple[float | None, float | None]]  # by method and setting


def estimated(config: CompareConfig, path: Path) -> dict[str, Expected]:
    """Estimate the seconds of a cold start and of the rest by arithmetic, for the fast and the slow end.

    Each end has one pair for each method in each setting, since a method may change the steps of its cold start. An
    [`InputError`] says why there is no estimate.
    """
    from ..chain.hours import chain_hours  # with it come torch and TRL, which a missing file does not wait for

    found: dict[str, Expected] = {"fast": {}, "slow": {}}
    with scratch("estimate") as place:
        trial = replace(config, output_dir=str(place))
        for cell in sorted(table_cells(trial, {}), key=lambda cell: cell.selection is None):
            kind = cell.method, cell.setting
            if kind in found["fast"]:
                continue
            cell.write_configs()
            stages = chain_hours(chain_of(cell.home), path)
            for end, pairs in found.items():
                seconds = {name: getattr(stage.seconds, end) for name, stage in stages.items()}
                pairs[kind] = seconds.pop("sft", None), sum(seconds.values())
    return found


@dataclass(frozen=True)
class Hours:
    """The work that is left. The hours are None where nothing tells them."""

    cells: int
    cold_starts: int
    process_h: float | None
    wall_h: float | None
    source: str


def hours(
    config: CompareConfig,
    cells: list[Cell],
    workers: int,
    open_rows: Collection[str] = (),
    expected: Expected | None = None,
) -> Hours:
    """Return what is left to run and how long it takes: medians of the method's finished cells, else of all cells.

    `expected` are the seconds where no cell has finished; without them the config's `estimate` tells.

    Tuning has still to choose the point of `open_rows`. We count all their cells, and cold starts for each row, since
    no two of these rows can count on the same point.
    """
    measured: dict[str | None, list[tuple[float | None, float]]] = {}
    for cell in cells:
        if (found := _seconds(cell.home)) is not None:
            for key in (cell.method, None):
                measured.setdefault(key, []).append(found)
    is_open = {cell for cell in cells if not cell.tuning and cell.row in open_rows}
    one_of = {(cell.method, cell.setting): cell for cell in cells}
    seconds = {key: _expected(config, measured, cell, expected) for key, cell in one_of.items()}
    times, left, starts = [], 0, 0
    settled = [cell for cell in cells if cell not in is_open]
    of_row: dict[str, list[Cell]] = {row: [] for row in open_rows}
    for cell in is_open:
        of_row[cell.row].append(cell)
    pools = [settled, *of_row.values()]
    for group in (group for pool in pools for group in groups(pool)):
        waiting = [cell for cell in group if cell in is_open or not cell.is_done()]
        if not waiting:
            continue
        first = waiting[0]
        trains = first.sft_dir is not None and (first in is_open or not first.sft_is_done())
        left, starts = left + len(waiting), starts + trains
        sft_s, rl_s = seconds[first.method, first.setting]
        unknown = rl_s is None or (trains and sft_s is None)
        times.append(None if unknown else len(waiting) * rl_s + (sft_s if trains else 0))
    known = None not in times
    total = sum(times) / 3600 if known else None
    wall = max(total / workers, max(times, default=0) / 3600) if known else None
    count = len(measured.get(None, []))
    told_by = f"medians of {count} finished cells" if count else "as the section estimate says"
    return Hours(left, starts, total, wall, told_by)


def _seconds(home: Path) -> tuple[float | None, float] | None:
    """Return the seconds of a finished cell's cold start and those of the rest; None for a cell without a run."""
    if source(home) != home or not has_ended(home):
        return None
    stages = {name: stage["seconds"] for name, stage in files.read_json(home / files.CHAIN)["stages"].items()}
    return stages.pop("sft", None), sum(stages.values())


def _expected(
    config: CompareConfig, measured: dict, cell: Cell, expected: Expected | None
) -> tuple[float | None, float | None]:
    """Return the seconds of a cold start and of the rest: of this method's cells, else of all, else as expected."""
    stated = (config.estimate.sft_s, config.estimate.rl_s) if config.estimate else (None, None)
    stated = stated if expected is None else expected[cell.method, cell.setting]
    found = []
    for part in (0, 1):
        known = [
            [times[part] for times in measured.get(key, []) if times[part] is not None] for key in (cell.method, None)
        ]
        values = known[0] or known[1]
        found.append(statistics.median(values) if values else stated[part])
    return found[0], found[1]
