r"""The maths benchmarks of `aesl eval` as a table, and their rows, from the hub or from a local copy.

The table's names were read in public evaluation code and dataset pages, which `read_at` lists; the datasets
themselves could not be opened, and `unverified` says what no page states. A dataset with other columns is refused in
one line that lists the columns found. All benchmarks share one prompt, which a config can replace.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError, nearest
from ..rewards.maths import after_hashes
from .rows import BUILDERS, load_rows


PROMPT = "{problem}\nPlease reason step by step, and put your final answer within \\boxed{}."
LM_EVAL = "https://github.com/EleutherAI/lm-evaluation-harness/blob/main/lm_eval/tasks/"
LIGHTEVAL = "https://github.com/huggingface/lighteval/blob/main/src/lighteval/tasks/"
ATROPOS = "https://github.com/NousResearch/atropos/blob/main/environments/math_server_zero.py"
HUB = "https://huggingface.co/datasets/"


def _text(value: Any) -> str | None:
    """Return an answer as it stands, or None where there is none."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a table of floats writes 7 as 7.0
    return (str(value).strip() if isinstance(value, str | int | float) and not isinstance(value, bool) else "") or None


def _joined(value: Any) -> str | None:
    """Join the entries of OlympiadBench's list: each is one of the answers, and the problem asks for all of them."""
    parts = [_text(item) for item in value] if isinstance(value, list) else [_text(value)]
    return ", ".join(part.strip("$") for part in parts) if parts and all(parts) else None


@dataclass(frozen=True)
class Benchmark:
    """One line of the table."""

    hub: str  # the dataset's name on the hub
    split: str
    problem: str  # the column of problems
    answer: str  # the column of answers
    read_at: tuple[str, ...]  # the pages on which hub, split and columns were read
    config: str | None = None
    gold: Callable[[Any], str | None] = _text  # an answer's text, None of a row without an answer
    prompt: str = PROMPT  # the user's message; `{problem}` stands for the problem
    unverified: str = ""  # facts that no page states


BENCHMARKS = {
    "GSM8K": Benchmark(
        hub="openai/gsm8k",
        config="main",
        split="test",
        problem="question",
        answer="answer",
        gold=after_hashes,
        read_at=(f"{LM_EVAL}gsm8k/gsm8k.yaml", f"{HUB}openai/gsm8k/commit/24cabd494c5be8001358a76e683fbddc41666a13"),
    ),
    "AIME24": Benchmark(
        hub="HuggingFaceH4/aime_2024",
        split="train",
        problem="problem",
        answer="answer",
        read_at=(f"{LIGHTEVAL}tasks/aime.py", ATROPOS),
    ),
    "AIME25": Benchmark(
        hub="math-ai/aime25",
        split="test",
        problem="problem",
        answer="answer",
        read_at=(f"{LM_EVAL}aime/aime25.yaml",),
    ),
    "AMC23": Benchmark(
        hub="math-ai/amc23",
        split="test",
        problem="question",
        answer="answer",
        read_at=(ATROPOS,),
        unverified="whether answers are text or numbers; both are read",
    ),
    "MATH-500": Benchmark(
        hub="HuggingFaceH4/MATH-500",
        split="test",
        problem="problem",
        answer="answer",
        read_at=(f"{LIGHTEVAL}tasks/math_500.py", ATROPOS),
    ),
    "Minerva": Benchmark(
        hub="math-ai/minervamath",
        split="test",
        problem="question",
        answer="answer",
        read_at=(ATROPOS, f"{HUB}math-ai/minervamath/tree/main"),
        unverified="the form of the answers: taken as bare LaTeX",
    ),
    "OlympiadBench": Benchmark(
        hub="Hothan/OlympiadBench",
        config="OE_TO_maths_en_COMP",
        split="train",
        problem="question",
        answer="final_answer",
        gold=_joined,
        read_at=(f"{LIGHTEVAL}extended/olympiade_bench/main.py", ATROPOS),
        unverified="how several answers are written; entries of a list are joined by commas. Text only, English, "
        "open-ended competition problems",
    ),
}


def check_names(names: list[str]) -> None:
    """Refuse an unknown benchmark, and a benchmark that is named twice."""
    for name in names:
        if name not in BENCHMARKS:
            near = nearest(name.upper(), BENCHMARKS) or nearest(name, BENCHMARKS)
            raise InputError(f"benchmarks: unknown benchmark {name!r}{near} (one of {', '.join(BENCHMARKS)})")
        if names.count(name) > 1:
            raise InputError(f"benchmarks: {name} is named twice")


def load_benchmark(
    name: str,
    *,
    data_dir: str | None = None,
    num: int | None = None,
    template: str | None = None,
    system: str = "",
    as_chat: bool = True,
) -> tuple[list[dict], dict]:
    r"""Load the first `num` problems of a benchmark, by default all. Return rows, and a dict of where they come from.

    A row has `prompt`, which is a list of messages or, without `as_chat`, text, and `solution`, the gold answer in
    `\boxed{}`. A copy of the hub's columns in `data_dir` (`name`.jsonl, .json, .parquet or .csv) is read instead of
    the hub. `template` replaces the table's prompt, and `system` is a system message before it.
    """
    benchmark = BENCHMARKS[name]
    columns = [benchmark.problem, benchmark.answer]
    if data_dir:
        place = _local_copy(name, data_dir)
        dataset = load_rows(str(place), field=f"benchmarks: {name}")
    else:
        place = benchmark.hub
        dataset = _from_hub(name, benchmark)
    where = f"benchmarks: {name} ({place})"
    for column in columns:
        if column not in dataset.column_names:
            found = dataset.column_names
            raise InputError(
                f"{where} has no column {column!r}{nearest(column, found)}; it needs {' and '.join(columns)}, its "
                f"columns are {', '.join(found)}"
            )
    raw = list(dataset.select_columns(columns).select(range(min(num or len(dataset), len(dataset)))))
    if not raw:
        raise InputError(f"{where} is empty")
    before = [{"role": "system", "content": system}] if system else []
    rows = []
    for number, row in enumerate(raw):
        problem, gold = row[benchmark.problem], benchmark.gold(row[benchmark.answer])
        if not isinstance(problem, str) or not problem.strip():
            raise InputError(f"{where}, row {number} (from 0): {benchmark.problem} holds no text")
        if gold is None:
            shown = json.dumps(row[benchmark.answer], default=str)[:80]
            raise InputError(f"{where}, row {number} (from 0): no gold answer in {benchmark.answer}: {shown}")
        # Not str.format: problems are full of braces
        text = (template or benchmark.prompt).replace("{problem}", problem)
        prompt = [*before, {"role": "user", "content": text}] if as_chat else text
        rows.append({"prompt": prompt, "solution": gold if "\\boxed" in gold else f"\\boxed{{{gold}}}"})
    digest = hashlib.sha256(json.dumps(raw, sort_keys=True, default=str).encode()).hexdigest()
    source = {"hub": benchmark.hub, "config": benchmark.config, "split": benchmark.split, "read_from": str(place)}
    return rows, {**source, "columns": columns, "sha256": digest}


def _local_copy(name: str, data_dir: str) -> Path:
    folder = Path(data_dir)
    if not folder.is_dir():
        raise InputError(f"data_dir: {data_dir} is not a folder")
    found = [folder / f"{name}{suffix}" for suffix in BUILDERS if (folder / f"{name}{suffix}").is_file()]
    if not found:
        there = sorted(path.name for path in folder.iterdir())
        wanted = f"{name}.jsonl"
        raise InputError(
            f"data_dir: {data_dir} has no copy of {name}: {wanted} or .parquet is needed, it holds "
            f"{', '.join(there[:12]) or 'nothing'}{nearest(wanted, there)}"
        )
    return found[0]


def _from_hub(name: str, benchmark: Benchmark):
    field = f"benchmarks: {name}"
    try:
        return load_rows(benchmark.hub, split=benchmark.split, config=benchmark.config, field=field)
    except InputError as error:
        reason = str(error).partition("cannot be loaded: ")[2] or str(error)
        raise InputError(
            f"{field}: {benchmark.hub} cannot be loaded from the hub ({reason}); put a copy with the columns "
            f"{benchmark.problem} and {benchmark.answer} into a folder as {name}.jsonl or {name}.parquet, and name "
            "the folder in data_dir"
        ) from error
