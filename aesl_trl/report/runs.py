"""What the report reads: run folders -> [`Run`], runs that differ only in their seed -> [`Arm`].

Every file may be missing, and [`Run.missing`] then names it. A file that is there but broken is an [`InputError`].
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import files
from ..diversity.figures import Group
from ..diversity.selection import DEFAULT_RULE
from ..diversity.series import by_step, turning_point_of
from ..diversity.turning_point import Selection
from ..errors import InputError, visible


# What the chapters rely on in each file: keys -> kinds. A plain key must be there; a pattern stands for keys that
# may be missing or null. A list of one kind may have any length, a list of two is a pair.
optional = re.compile
ANY_KEY = optional(".*", re.DOTALL)
WHOLE = (int,)
NUMBER = (int, float, type(None))  # null stands for nan
SCALE = (*NUMBER, str)
PAIR = [NUMBER, NUMBER]
FIGURES = {
    optional("entropy|self_bleu|distinct_2|unique|length|truncated|reward|no_answer|(groups|coverage)_.*"): NUMBER,
    optional(r"(pass|avg|maj)@\d+(_tied)?"): NUMBER,
    optional(".*_interval"): PAIR,
}
BY_PROMPT = {optional("by_prompt"): {ANY_KEY: [NUMBER]}, optional("intervals"): {ANY_KEY: PAIR}}
MEASURED = FIGURES | BY_PROMPT | {optional("num_samples"): WHOLE}
LOGGED = "loss|nll|eval_nll|weight_effective|weight_mean|weight_low_share"  # by SFT
LOGGED += "|weight_eos|temperature_mean"
LOGGED += "|reward|reward_std|frac_reward_zero_std|entropy|completions/clipped_ratio"  # by RL
MODELS = {optional("models"): {ANY_KEY: FIGURES}}
PROBED = {"figures": {ANY_KEY: NUMBER}, "intervals": {ANY_KEY: PAIR}, "reasons": [(str,)]}
SHAPES: dict[str, Any] = {
    files.CHAIN: {optional("stages"): {ANY_KEY: {optional("seconds"): NUMBER}}},
    files.RUN: {
        optional("t_scaling_found|weight_effective|max_steps|diversity_patience"): NUMBER,
        optional("t_scaling"): SCALE,
        optional("versions"): {},
    },
    files.SELECTION: {optional("step"): WHOLE, optional("evidence"): {optional("measured"): MEASURED}},
    files.EVALUATION: MODELS | {optional("benchmarks"): {ANY_KEY: MODELS}},
    files.READINESS: {optional("checkpoints"): [PROBED]},
    files.TRAINER_STATE: [{"step": WHOLE, optional(LOGGED): NUMBER}],
    files.DIVERSITY: [MEASURED | {"step": WHOLE}],
    files.POSITIONS: [{"step": WHOLE, "position": [NUMBER], "weight": [NUMBER], "temperature": [NUMBER]}],
    files.SAMPLES: [{optional("prompt_index"): WHOLE}],
}
KINDS = {WHOLE: "a whole number", NUMBER: "a number", SCALE: "a number or auto", (str,): "a text"}


def check(value: Any, shape: Any, where: str | Path) -> None:
    """Refuse a value that is not of its kind, naming the file, the keys on the way to the value, and the kind."""
    if isinstance(shape, dict):
        kind, fits = "an object", isinstance(value, dict)
    elif isinstance(shape, list):
        kind, fits = "a list" if len(shape) == 1 else "a pair of numbers", isinstance(value, list)
        fits = fits and len(shape) in (1, len(value))
    else:
        kind, fits = KINDS[shape], type(value) in shape
    if not fits:
        raise InputError(f"{where} is {json.dumps(value)[:40]}, not {kind}")
    if isinstance(shape, list):
        for number, item in enumerate(value, 1):
            check(item, shape[0], f"{where}, row {number}")
    elif isinstance(shape, dict):
        for key, inner in shape.items():
            for name in [key] if isinstance(key, str) else filter(key.fullmatch, value):
                if name not in value:
                    raise InputError(f"{where} has no {key!r}: another version wrote it, or it was edited")
                if name is key or value[name] is not None:
                    check(value[name], inner, f"{where}: {name!r}")


class Run:
    """One run as the page shows it: a chain's run folder, an SFT folder or a recorded run.

    Objects and lists are empty where the file is missing; rows are sorted by step. A folder that does not exist or
    holds no file of a run is an [`InputError`].
    """

    def __init__(self, path: str | Path, recorded: bool = False):
        folder = files.RunFolder(path)
        path, rl = folder.path, folder.path / files.GRPO_DIR
        sft, rows = (folder.sft, folder.rows) if folder.has_sft else (path / "sft", lambda name: [])
        self.path = path
        self.chain = _checked(folder.chain, path / files.CHAIN)
        self.has_sft = folder.has_sft or bool(self.chain.get("sft_dir"))
        own = files.own_folder(sft)
        self.sft = _checked(files.read_settings(sft), own / files.RUN)
        self.sft_log = _checked(files.read_log(sft), sft / files.TRAINER_STATE)
        self.diversity = list(by_step(_checked(rows(files.DIVERSITY), own / files.DIVERSITY)).values())
        self.positions = _checked(rows(files.POSITIONS), own / files.POSITIONS)
        self.samples = folder.sample_files if folder.has_sft else {}  # step -> samples/step-N.jsonl
        chosen = (_object(place / files.SELECTION) for place in folder.places)
        self.selection = next(filter(None, chosen), {})
        # The step of the series that went to RL; an average of a step and the base is none of them
        self.selected_step = None if files.is_mix(self.selection.get("candidate")) else self.selection.get("step")
        self.handoff = _object(folder.own / files.HANDOFF)
        self.grpo = _checked(files.read_settings(rl), rl / files.RUN)
        self.grpo_log = _checked(files.read_log(rl), rl / files.TRAINER_STATE)
        self.versions = (self.sft.get("versions") or {}) | (self.grpo.get("versions") or {})
        self.evaluation = _object(folder.own / files.EVALUATION) or _object(path / files.EVALUATION)
        self.benchmarks = self.evaluation.get("benchmarks") or {}
        # Figures of the models that RL began from (as evaluated, else as measured during SFT) and ended with
        measured = next((row for row in self.diversity if row["step"] == self.selected_step), None)
        average = (self.selection.get("evidence") or {}).get("measured") if self.selected_step is None else None
        self.chosen_row = measured or average or {}  # the row of what went to RL: of the series, or of an average
        self.start = self.evaluated("start") or self.chosen_row
        self.final = self.evaluated("final")
        # as probed: first what RL began from, then the candidates
        self.readiness = [entry for place in folder.places for entry in _readiness(place)]
        made = [folder.own / name for name in (files.SELECTED, files.HANDOFF_DIR)]
        places = [path, *made, path / files.GRPO_DIR, path / "sft"]
        weights = [place.glob(form) for place in places for form in ("*.safetensors", "pytorch_model*.bin")]
        self.recorded = recorded or (bool(self.evaluation) and not any(map(any, weights)))
        if not (self.chain or folder.has_sft or self.evaluation or self.grpo_log):
            names = (files.CHAIN, files.DIVERSITY, files.TRAINER_STATE, files.EVALUATION)
            raise InputError(f"{path} holds no run: none of {', '.join(names)} is there")
        for row in self.positions:
            if not len(row["position"]) == len(row["weight"]) == len(row["temperature"]):
                where = f"{own / files.POSITIONS}, step {row['step']}"
                raise InputError(f"{where}: position, weight and temperature are not of one length")
        place = path.resolve()
        seed = re.fullmatch(r"seed[-_]?(\d+(-rl-\d+)?)", place.name)
        self.seed = seed[1] if seed else str(self.sft.get("seed", self.chain.get("seed", "")))
        self.arm = place.parent if seed else place  # the folder that names the arm

    def evaluated(self, model: str, benchmark: str | None = None) -> dict:
        """Return the evaluation's figures of `model`, over all problems or those of a benchmark; {} without any."""
        facts = self.evaluation if benchmark is None else self.benchmarks.get(benchmark) or {}
        return (facts.get("models") or {}).get(model) or {}

    @property
    def method(self) -> str:
        """`base`, or the cold start's loss with the rule that picked its checkpoint, as `nll_last`."""
        if not self.has_sft:
            return "base"
        loss = str(self.sft.get("cold_start_loss", "sft"))
        rule = self.selection.get("applied") or self.sft.get("selection")
        return f"{loss}_{rule or DEFAULT_RULE}"

    @property
    def missing(self) -> list[str]:
        """One phrase for each part of the story that has no file here."""
        sft = {
            f"the SFT settings ({files.RUN})": self.sft,
            f"the SFT log ({files.TRAINER_STATE})": self.sft_log,
            f"diversity measurements ({files.DIVERSITY})": self.diversity,
            f"weights by position ({files.POSITIONS})": self.positions,
            f"samples ({files.SAMPLES}/)": self.samples,
            f"the selection ({files.SELECTION})": self.selection,
        }
        rest = {
            f"the handoff ({files.HANDOFF})": self.handoff,
            f"the RL log ({files.GRPO_DIR}/{files.TRAINER_STATE})": self.grpo_log,
            f"the evaluation ({files.EVALUATION})": self.evaluation,
        }
        parts = sft if self.has_sft else {"an SFT stage (RL from the base model, or not started)": None}
        return [phrase for phrase, found in (parts | rest).items() if not found]


def _checked(value: Any, path: Path) -> Any:
    check(value, SHAPES.get(path.name, {}), path)
    return sorted(value, key=lambda row: row["step"]) if isinstance(value, list) else value


def _object(path: Path) -> dict:
    return _checked(files.read_object(path), path)


def _readiness(folder: Path) -> list[dict]:
    try:
        return _object(folder / files.READINESS).get("checkpoints") or []
    except InputError as error:
        raise InputError(f"{error}: run aesl probe again") from None


def read_samples(path: Path) -> dict[int, Group]:
    """Read samples/step-N.jsonl; return the samples of each prompt by its index."""
    rows = files.read_rows(path)
    check(rows, SHAPES[files.SAMPLES], path)
    groups = [Group.from_row(row, f"{path}, row {number}", needs=()) for number, row in enumerate(rows, 1)]
    return {row.get("prompt_index") or 0: group for row, group in zip(rows, groups, strict=True)}


def turning_point(run: Run) -> Selection:
    """Find the diversity turning point of the run's own measurements, whatever rule then selected a checkpoint."""
    metric = "self_bleu" if run.selection.get("metric") == "self_bleu" else "entropy"
    return turning_point_of(run.diversity, metric, max(1, int(run.sft.get("diversity_patience") or 3)))


@dataclass(frozen=True)
class Arm:
    """Runs that differ only in their seed."""

    name: str
    recorded: bool
    runs: list[Run]
    colour: str = ""  # a name of the page's palette, given by [`~plots.coloured`]

    @property
    def label(self) -> str:
        return visible(self.name).replace("_", " ")


def read_arms(runs: Iterable[str | Path], compare: Iterable[str | Path] = ()) -> list[Arm]:
    """Return the arms in the order given. Runs named in `compare`, and finished runs without weights, are recorded.

    Where two live (or two recorded) arms have the same name, the parent folder's name stands in front.
    """
    groups: dict[tuple[Path, bool], dict[Path, Run]] = {}
    for run in [*map(Run, runs), *(Run(path, recorded=True) for path in compare)]:
        groups.setdefault((run.arm, run.recorded), {})[run.path.resolve()] = run
    places = [(folder.parent if folder.name == "sft" else folder, recorded) for folder, recorded in groups]
    count = Counter((place.name, recorded) for place, recorded in places)
    names = [f"{p.parent.name}/{p.name}" if count[p.name, recorded] > 1 else p.name for p, recorded in places]
    named = zip(names, groups.items(), strict=True)
    return [Arm(name, recorded, list(found.values())) for name, ((_, recorded), found) in named]


def values_of(rows: Iterable[dict], key: str) -> list[float]:
    """Return the figure `key` of each row that has it."""
    return [float(row[key]) for row in rows if row.get(key) is not None]


def series(rows: Iterable[dict], key: str) -> tuple[list[int], list[float]]:
    """Return steps and values of the rows that hold `key`; a null is nan, so that a curve shows its gap."""
    found = [row for row in rows if key in row]
    return [row["step"] for row in found], [math.nan if row[key] is None else float(row[key]) for row in found]
