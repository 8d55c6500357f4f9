"""What the report reads: run folders -> [`Run`], runs that differ only in their seed -> [`Arm`].

Every file may be missing, and [`Run.missing`] then names it; a file that is there but broken is an [`InputError`].
Nothing is computed here beyond a mean over seeds.
"""

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ..diversity.turning_point import Selection, find_turning_point
from ..errors import InputError, nearest
from ..files import (
    CHAIN,
    DIVERSITY,
    EVALUATION,
    HANDOFF,
    HANDOFF_DIR,
    POSITIONS,
    READINESS,
    RUN,
    SAMPLES,
    SELECTED,
    SELECTION,
    TRAINER_STATE,
    read_json,
    read_jsonl,
)


GRPO_DIR = "grpo"
LOSS_KEYS = ("loss", "nll", "eval_nll", "weight_mean", "weight_low_share", "weight_eos", "temperature_mean")
RL_KEYS = ("reward", "reward_std", "frac_reward_zero_std", "entropy", "completions/clipped_ratio")
GROUP_KEYS = ("groups_all_wrong", "groups_mixed", "groups_all_right")
DIVERSITY_KEYS = ("entropy", "self_bleu", "distinct_2", "unique", "length", "truncated", "reward", *GROUP_KEYS)


@dataclass(frozen=True)
class Run:
    """One run folder. Objects and lists are empty where the file is missing; rows are sorted by step."""

    path: Path
    name: str  # of the arm: the folder's name, or its parent's for a seed-N folder
    seed: str
    recorded: bool
    chain: dict
    sft: dict
    grpo: dict
    selection: dict
    handoff: dict
    evaluation: dict
    readiness: list[dict]  # what was probed: what RL began from, then the candidates
    diversity: list[dict]
    positions: list[dict]
    sft_log: list[dict]
    grpo_log: list[dict]
    samples: dict[int, Path]  # step -> samples/step-N.jsonl
    has_sft: bool

    @property
    def start(self) -> dict:
        """Figures of the model that RL began from: as evaluated, else as measured during SFT at the selected step."""
        return self.evaluation.get("models", {}).get("start") or self.at_step(self.selection.get("step"))

    @property
    def final(self) -> dict:
        return self.evaluation.get("models", {}).get("final") or {}

    @property
    def start_is_evaluated(self) -> bool:
        return bool(self.evaluation.get("models", {}).get("start"))

    def at_step(self, step: int | None) -> dict:
        return next((row for row in self.diversity if row["step"] == step), {})

    @property
    def method(self) -> str:
        """`base`, or the cold start's loss with the rule that picked its checkpoint, as `nll_last`."""
        if not self.has_sft:
            return "base"
        loss = str(self.sft.get("cold_start_loss", "sft"))
        rule = self.selection.get("applied") or self.sft.get("selection")
        return f"{loss}_{rule or ('last' if loss == 'aesl' else 'turning_point')}"

    @property
    def missing(self) -> list[str]:
        """One phrase for each part of the story that has no file here."""
        sft = [
            (self.sft, f"the SFT settings ({RUN})"),
            (self.sft_log, f"the SFT log ({TRAINER_STATE})"),
            (self.diversity, f"diversity measurements ({DIVERSITY})"),
            (self.positions, f"weights by position ({POSITIONS})"),
            (self.samples, f"samples ({SAMPLES}/)"),
            (self.selection, f"the selection ({SELECTION})"),
        ]
        rest = [
            (self.handoff, f"the handoff ({HANDOFF})"),
            (self.grpo_log, f"the RL log ({GRPO_DIR}/{TRAINER_STATE})"),
            (self.evaluation, f"the evaluation ({EVALUATION})"),
        ]
        no_sft = [] if self.has_sft else ["an SFT stage (RL from the base model, or not started)"]
        return no_sft + [phrase for found, phrase in (sft if self.has_sft else []) + rest if not found]


@dataclass(frozen=True)
class Arm:
    """Runs that differ only in their seed. `colour` is a name of the page's palette."""

    name: str
    recorded: bool
    colour: str
    runs: list[Run]

    @property
    def label(self) -> str:
        return self.name.replace("_", " ")

    def figures(self, of: Callable[[Run], dict], key: str) -> list[float]:
        """The figure `key` of each run that has it."""
        values = [of(run).get(key) for run in self.runs]
        return [float(value) for value in values if value is not None]


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def series(rows: Iterable[dict], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the rows that hold `key`; a null is nan, so that a curve shows its gap."""
    found = [row for row in rows if key in row]
    return [row["step"] for row in found], [math.nan if row[key] is None else float(row[key]) for row in found]


def read_run(path: str | Path, *, recorded: bool = False) -> Run:
    """Read one chain run folder, SFT folder or recorded run.

    Raises:
        InputError: the folder does not exist, holds no file of a run, or one of its files is broken.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path} is not a folder{_sibling(path)}")
    chain = _object(path / CHAIN)
    sft, rl = _sft_folder(path, chain), path / GRPO_DIR
    evaluation, grpo_log = _evaluation(path / EVALUATION), _log(rl, RL_KEYS)
    if not (chain or sft or evaluation or grpo_log):
        raise InputError(f"{path} holds no run: none of {CHAIN}, {DIVERSITY}, {TRAINER_STATE}, {EVALUATION} is there")
    name, seed = _name(path)
    settings = _object(sft / RUN) if sft else {}
    _check_figures(str(sft and sft / RUN), settings, ("t_scaling", "max_steps", "diversity_patience"))
    return Run(
        path=path,
        name=name,
        seed=str(seed or settings.get("seed", chain.get("seed", ""))),
        recorded=recorded or _has_no_weights(path, evaluation),
        chain=chain,
        sft=settings,
        grpo=_object(rl / RUN),
        selection=_selection([path, sft] if sft else [path]),
        handoff=_object(path / HANDOFF),
        evaluation=evaluation,
        readiness=[entry for folder in dict.fromkeys([path, sft or path]) for entry in _readiness(folder / READINESS)],
        diversity=_diversity(sft / DIVERSITY) if sft else [],
        positions=_positions(sft / POSITIONS) if sft else [],
        sft_log=_log(sft, LOSS_KEYS) if sft else [],
        grpo_log=grpo_log,
        samples=_sample_files(sft) if sft else {},
        has_sft=sft is not None or bool(chain.get("sft_dir")),
    )


def read_arms(runs: Iterable[str | Path], compare: Iterable[str | Path] = ()) -> list[Arm]:
    """The arms in the order given. Runs named in `compare`, and finished runs without weights, are recorded ones."""
    read = [read_run(path) for path in runs] + [read_run(path, recorded=True) for path in compare]
    groups: dict[tuple, list[Run]] = {}
    for run in read:
        groups.setdefault((_arm_folder(run.path), run.recorded), []).append(run)
    names = _distinct_names(list(groups), [runs[0].name for runs in groups.values()])
    colours = _colours([runs[0].method for runs in groups.values()], names)
    return [
        Arm(name, recorded, colour, list({run.path.resolve(): run for run in runs}.values()))
        for name, colour, ((_, recorded), runs) in zip(names, colours, groups.items(), strict=True)
    ]


def read_samples(path: Path) -> list[dict]:
    """The lines of samples/step-N.jsonl, sorted by prompt_index."""
    rows = read_jsonl(path)
    for number, row in enumerate(rows, 1):
        where = f"{path}, line {number}"
        completions = row.get("completions") if isinstance(row, dict) else None
        if not isinstance(completions, list) or not all(isinstance(text, str) for text in completions):
            raise InputError(f"{where} has no list of texts 'completions'")
        for key in ("rewards", "truncated"):
            given = row.get(key)
            if given is not None and (not isinstance(given, list) or len(given) != len(completions)):
                raise InputError(f"{where}: {key!r} is not one entry for each of the {len(completions)} completions")
    return sorted(rows, key=lambda row: row.get("prompt_index", 0))


# One colour for each method, whatever else is on the page; an arm without one of these takes the first that is free.
METHOD_COLOURS = {
    "base": "base",
    "aesl_last": "aesl",
    "nll_last": "nll",
    "nll_turning_point": "stop",
    "nll_best_eval": "eval",
}
FREE_COLOURS = ("other1", "other2", "eval", "stop", "nll", "aesl", "base")


def _colours(methods: list[str], names: list[str]) -> list[str]:
    """A colour for each arm; a run and its recorded seeds (one method, one name) share theirs."""
    arms = list(zip(methods, names, strict=True))
    given: dict[tuple, str] = {}
    for arm in sorted(arms, key=lambda arm: arm[0] not in METHOD_COLOURS):
        wanted = [METHOD_COLOURS[arm[0]]] if arm[0] in METHOD_COLOURS else []
        free = [colour for colour in (*wanted, *FREE_COLOURS) if colour not in given.values()]
        given.setdefault(arm, (free or ["base"])[0])
    return [given[arm] for arm in arms]


def _name(path: Path) -> tuple[str, str]:
    """(arm, seed): `results/aesl/seed-3` is ("aesl", "3"); `runs/x/sft` is ("x", "")."""
    folder = _arm_folder(path)
    seed = re.fullmatch(r"seed[-_]?(\d+)", path.resolve().name)
    return folder.parent.name if folder.name == "sft" else folder.name, seed[1] if seed else ""


def _arm_folder(path: Path) -> Path:
    path = path.resolve()
    return path.parent if re.fullmatch(r"seed[-_]?\d+", path.name) else path


def _distinct_names(keys: list[tuple], names: list[str]) -> list[str]:
    """`names`, with the parent folder's in front where two live (or two recorded) arms have the same one."""
    seen = [(name, recorded) for name, (_, recorded) in zip(names, keys, strict=True)]
    return [
        f"{folder.parent.name}/{name}" if seen.count((name, recorded)) > 1 else name
        for name, (folder, recorded) in zip(names, keys, strict=True)
    ]


def _sft_folder(path: Path, chain: dict) -> Path | None:
    """The SFT folder of `path`, or None: a base arm, a chain that has not begun, or a record that left it out."""
    named = [path / str(chain["sft_dir"])] if chain.get("sft_dir") else []
    for folder in [*named, path / "sft", path]:
        if folder == path and chain:
            break
        if any((folder / name).is_file() for name in (DIVERSITY, RUN, TRAINER_STATE)):
            return folder
    return None


def _has_no_weights(path: Path, evaluation: dict) -> bool:
    """Whether this is a finished run whose weights are not kept here."""
    folders = (path, path / SELECTED, path / HANDOFF_DIR, path / GRPO_DIR, path / "sft")
    patterns = ("*.safetensors", "pytorch_model*.bin")
    kept = any(next(folder.glob(pattern), None) for folder in folders if folder.is_dir() for pattern in patterns)
    return bool(evaluation) and not kept


def _sibling(path: Path) -> str:
    parent = path.absolute().parent
    return nearest(path.name, [entry.name for entry in parent.iterdir() if entry.is_dir()] if parent.is_dir() else [])


def _object(path: Path) -> dict:
    """The object in `path`; empty when there is no such file."""
    if not path.is_file():
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def _check_figures(where: str, row: dict, keys: Iterable[str]) -> None:
    for key in keys:
        value = row.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise InputError(f"{where}: {key!r} is {json.dumps(value)[:40]}, not a number")


def _checked_rows(path: Path, rows: list, keys: Iterable[str]) -> list[dict]:
    """`rows` sorted by step, each an object with a whole `step` and numbers (or null) under `keys`."""
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}"
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            raise InputError(f"{where} has no whole number 'step'")
        _check_figures(where, row, (*keys, *_pass_keys(row)))
    return sorted(rows, key=lambda row: row["step"])


def _pass_keys(row: dict) -> list[str]:
    return [key for key in row if re.fullmatch(r"pass@\d+", key)]


def _selection(folders: list[Path]) -> dict:
    """The chain's selection, else the one that SFT made."""
    path = next((folder / SELECTION for folder in folders if (folder / SELECTION).is_file()), folders[0] / SELECTION)
    selection = _object(path)
    step = selection.get("step")
    if step is not None and (isinstance(step, bool) or not isinstance(step, int)):
        raise InputError(f"{path}: 'step' is {json.dumps(step)[:40]}, not a whole number")
    return selection


def _diversity(path: Path) -> list[dict]:
    """One row a step: a resumed run measures a step again, and the later line holds."""
    rows = _checked_rows(path, read_jsonl(path) if path.is_file() else [], DIVERSITY_KEYS)
    return list({row["step"]: row for row in rows}.values())


def _positions(path: Path) -> list[dict]:
    rows = _checked_rows(path, read_jsonl(path) if path.is_file() else [], ())
    for number, row in enumerate(rows, 1):
        lists = [row.get(key) for key in ("position", "weight", "temperature")]
        if not all(isinstance(values, list) for values in lists) or len({len(values) for values in lists}) != 1:
            raise InputError(f"{path}, row {number}: position, weight and temperature are not lists of one length")
        for values in lists:
            _check_figures(f"{path}, row {number}", dict(enumerate(values)), range(len(values)))
    return rows


def _log(folder: Path, keys: Iterable[str]) -> list[dict]:
    """Trainer's log_history: of the finished run, else of its newest checkpoint."""
    checkpoints = folder.glob(f"checkpoint-*/{TRAINER_STATE}")
    newest = sorted(checkpoints, key=lambda path: int(re.sub(r"\D", "", path.parent.name) or 0))[-1:]
    path = next((path for path in [folder / TRAINER_STATE, *newest] if path.is_file()), None)
    if path is None:
        return []
    history = _object(path).get("log_history")
    if not isinstance(history, list):
        raise InputError(f"{path} has no list 'log_history'")
    return _checked_rows(path, history, keys)


def _evaluation(path: Path) -> dict:
    evaluation = _object(path)
    _check_models(str(path), evaluation.get("models", {}))
    benchmarks = evaluation.get("benchmarks", {})
    if not isinstance(benchmarks, dict) or not all(isinstance(facts, dict) for facts in benchmarks.values()):
        raise InputError(f"{path}: 'benchmarks' is not an object of objects")
    for name, facts in benchmarks.items():
        _check_models(f"{path}, benchmark {name!r}", facts.get("models", {}))
    return evaluation


def _check_models(where: str, models: object) -> None:
    if not isinstance(models, dict) or not all(isinstance(figures, dict | None) for figures in models.values()):
        raise InputError(f"{where}: 'models' is not an object of objects")
    for name, figures in models.items():
        keys = [key for key in figures or {} if re.fullmatch(r"(avg|maj)@\d+(_tied)?", key)]
        _check_figures(f"{where}, model {name!r}", figures or {}, (*DIVERSITY_KEYS, *_pass_keys(figures or {}), *keys))
        for key in [key for key in figures or {} if key.endswith("_interval")]:
            _check_interval(f"{where}, model {name!r}: {key!r}", figures[key])


def _readiness(path: Path) -> list[dict]:
    """The checkpoints in a readiness.json."""
    entries = _object(path).get("checkpoints", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f"{path}: 'checkpoints' is not a list of objects")
    for number, entry in enumerate(entries):
        figures, ends, where = entry.get("figures"), entry.get("intervals"), f"{path}, checkpoint {number} (from 0)"
        if not isinstance(figures, dict) or not isinstance(ends, dict) or not isinstance(entry.get("reasons"), list):
            raise InputError(f"{where} has no figures, intervals and reasons: run aesl probe again")
        _check_figures(where, figures, figures)
        for key, value in ends.items():
            _check_interval(f"{where}: {key!r}", value)
    return entries


def _check_interval(where: str, value: object) -> None:
    ends = value if isinstance(value, list) and len(value) == 2 else [value]
    if value is not None and not (len(ends) == 2 and all(isinstance(end, int | float | None) for end in ends)):
        raise InputError(f"{where} is not a pair of numbers")


def _sample_files(folder: Path) -> dict[int, Path]:
    found = [(re.fullmatch(r"step-(\d+)", path.stem), path) for path in (folder / SAMPLES).glob("step-*.jsonl")]
    return {int(match[1]): path for match, path in sorted(found, key=lambda pair: pair[1].name) if match}


def turning_point(run: Run) -> Selection:
    """The diversity turning point of the run's own measurements, whatever rule then selected a checkpoint."""
    metric = "self_bleu" if run.selection.get("metric") == "self_bleu" else "entropy"
    steps, values = series(run.diversity, metric)
    patience = max(1, int(run.sft.get("diversity_patience") or 3))
    by_prompt = [row.get("by_prompt", {}).get(metric) for row in run.diversity if metric in row]
    mode = "min" if metric == "self_bleu" else "max"
    return find_turning_point(steps, values, mode=mode, patience=patience, by_prompt=by_prompt)
