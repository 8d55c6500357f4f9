"""How often the base model solves a problem: sampled answers graded by the rewards, kept on disk, or read from a file.

Sampling is the dear part (problems x samples completions), so each finished chunk is written at once, and a run that
was cut off goes on with the problems that are missing. Rates that were drawn with other settings stay in the file and
are not used. One process samples, by vLLM where it can.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from ..files import append_jsonl, read_jsonl
from ..sampling.draws import Piece
from .problems import Problem, checked_rate, problem_id
from .rows import load_rows


CHUNK = {"transformers": 64, "vllm": 512}  # problems between two writes; vLLM runs empty at the end of each


@dataclass
class Sampling:
    """What a pass rate depends on, besides prompt and solution."""

    model: str
    samples: int
    temperature: float
    max_new_tokens: int
    seed: int
    success_threshold: float
    reward: str  # the first reward's name
    backend: str  # vllm or transformers

    def keys(self, rows: list[dict]) -> list[str]:
        """A digest for each row: rates of the same key are of the same draw."""
        common = json.dumps([vars(self), _weights(self.model)], sort_keys=True)
        texts = [common + json.dumps(row, sort_keys=True) for row in rows]
        return [hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts]


def _weights(model: str) -> list:
    """Names, sizes and times of a local model's weight files; a name on the hub stands for itself."""
    files = sorted(Path(model).glob("*.safetensors")) if Path(model).is_dir() else []
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]


# ---- From files


def rates_in_file(path: str, field: str = "pass_rate_file") -> dict[str, float]:
    """Pass rates by problem id, from rows with `pass_rate` and `id` or `problem`.

    Raises:
        InputError: other columns, a rate outside [0, 1], or two rates for one problem.
    """
    rows = load_rows(path, field=field)
    name = next((column for column in ("id", "problem") if column in rows.column_names), None)
    if name is None or "pass_rate" not in rows.column_names:
        found = ", ".join(rows.column_names)
        raise InputError(f"{field}: {path} needs the columns pass_rate and id or problem, its columns are {found}")
    rates: dict[str, float] = {}
    for number, row in enumerate(rows.select_columns([name, "pass_rate"])):
        where = f"{field}: {path}, row {number} (from 0)"
        rate = checked_rate(row["pass_rate"], where)
        id = row["id"] if name == "id" else problem_id(row["problem"])
        if rate is None:
            continue
        if rates.setdefault(id, rate) != rate:
            raise InputError(f"{where}: {id} has the pass rate {rate} here and {rates[id]} above: keep one of them")
    return rates


# ---- Sampled


def sample_rates(
    problems: list[Problem],
    rows: list[dict],
    path: Path,
    sampling: Sampling,
    rewards: list[Callable],
    *,
    accelerator,
    batch_size: int,
    max_model_len: int | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, float | None]:
    """Pass rate of each of `problems`, whose prompts and solutions are in `rows`; what `path` lacks is drawn.

    Returns:
        By problem id the share of right answers among those that could be graded, None where none could.
    """
    keys = {problem.id: key for problem, key in zip(problems, sampling.keys(rows), strict=True)}
    done = _known(path, keys)
    todo = [(problem, row) for problem, row in zip(problems, rows, strict=True) if problem.id not in done]
    say(f"pass rates: {len(problems) - len(todo)} of {len(problems)} known from {path}, {len(todo)} to sample")
    if todo:
        limits = {"batch_size": batch_size, "max_model_len": max_model_len, "trust_remote_code": trust_remote_code}
        for line in _sampled(todo, sampling, rewards, accelerator, limits, say):
            append_jsonl(path, {**line, "key": keys[line["id"]]})
            done[line["id"]] = line["pass_rate"]
    return {problem.id: done[problem.id] for problem in problems}


def _known(path: Path, keys: dict[str, str]) -> dict[str, float | None]:
    lines = read_jsonl(path) if path.exists() else []
    return {line["id"]: line["pass_rate"] for line in lines if keys.get(line["id"]) == line.get("key")}


def _sampled(todo, sampling, rewards, accelerator, limits, say):
    """A line of the file for each problem, chunk after chunk."""
    from ..evaluation.evaluate import EvalArguments
    from ..rewards.functions import score_groups
    from ..sampling.offline import open_engine

    drawn = {name: getattr(sampling, name) for name in ("samples", "temperature", "max_new_tokens", "seed")}
    engine = open_engine(sampling.backend, sampling.model, EvalArguments(**drawn, **limits), accelerator)
    size = CHUNK[sampling.backend]
    for start in range(0, len(todo), size):
        chunk = todo[start : start + size]
        rows = [row for _, row in chunk]
        groups = engine.draw(rows, Piece(_number(chunk[0][0].id), len(chunk), 0, sampling.samples))
        scored = score_groups(groups, rows, rewards)
        for (problem, _), group in zip(chunk, scored, strict=True):
            yield _line(problem, group, sampling.success_threshold)
        say(f"pass rates: {start + len(chunk)} of {len(todo)} sampled")
    engine.close()


def _number(id: str) -> int:
    """A problem's place in the seed of its chunk: chunks differ, and one drawn again draws the same."""
    return int(hashlib.sha256(id.encode()).hexdigest()[:8], 16)


def _line(problem: Problem, group, success_threshold: float) -> dict:
    graded = [rewards[0] for rewards in group.rewards if not math.isnan(rewards[0])]
    right = sum(reward >= success_threshold for reward in graded)
    return {
        "id": problem.id,
        "pass_rate": right / len(graded) if graded else None,
        "right": right,
        "graded": len(graded),
        "truncated": sum(group.truncated),
    }
