r"""Read rows of OpenR1-Math-46k or GSM8K as problems with an id, a gradable solution and, on demand, a demonstration.

OpenR1-Math-46k is Elliott/Openr1-Math-46k-8192 on the hub, from LUFFY (arXiv 2504.14945). We read three columns:
`prompt` (messages of a system and the user), `target` (a message of the assistant, with the reasoning in <think>) and
`reward_model` (a struct with `ground_truth`, LaTeX without dollars). GSM8K has `question` and `answer`, whose last
line is `#### 72`. Demonstrations are long and few are needed, so they are read one at a time.
"""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError
from ..rewards.maths import after_hashes
from .rows import nearest_column


OPENR1, GSM8K = "openr1", "gsm8k"
COLUMNS = {OPENR1: ("prompt", "target", "reward_model"), GSM8K: ("question", "answer")}
BATCH = 1000  # rows read, texts tokenized, or demonstrations graded, at once
_CALCULATOR = re.compile(r"<<[^<>]*>>")  # GSM8K's notes to its calculator
_DOLLAR = re.compile(r"(?<!\\)\$")
# Layout of LaTeX: with or without it a formula is the same
_DELIMITERS = re.compile(r"\\[()\[\],;:! ]|(?<!\\)\$|~")
_LAYOUT = re.compile(r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits|quad|qquad)(?![a-zA-Z])")
_FRACTION = re.compile(r"\\[dt]frac(?![a-zA-Z])")


@dataclass
class Problem:
    """One problem. Its `id` depends on its normalised text alone, not on the file and row that hold it."""

    row: int  # in the source, from 0
    id: str
    text: str
    solution: str  # with delimiters, as math-verify reads it
    system: str | None = None  # the source's own system prompt
    pass_rate: float | None = None  # of the base model, in [0, 1]


@dataclass
class Drops:
    """The rows that were left out, of everything (`all`) or of the demonstrations alone (`sft`), and why."""

    rows: list[dict] = field(default_factory=list)

    def add(self, row: int, id: str | None, reason: str, detail: str = "", *, of: str = "all") -> None:
        self.rows.append({"row": row, "id": id, "of": of, "reason": reason, "detail": detail})

    def counts(self, of: str = "all") -> dict[str, int]:
        return dict(Counter(row["reason"] for row in self.rows if row["of"] == of))


def listed(counts: dict[str, int], otherwise: str) -> str:
    """Write counts as text, as in `duplicate 1, wrong 3`; where there are none, return `otherwise`."""
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or otherwise


def problem_id(text: str) -> str:
    return hashlib.sha256(normalise(text).encode()).hexdigest()[:16]


def normalise(text: str) -> str:
    """Return `text` without case, white space, layout commands of LaTeX and the punctuation at its end.

    Two problems are the same when their normalised texts are equal. Operators stay: `x + 1 = 2` and `x - 1 = 2` are
    two problems.
    """
    return re.sub(r"\s+", "", without_layout(text)).rstrip(".?!:;,")


def without_layout(text: str) -> str:
    """Return `text` in lower case, with a space in place of each delimiter and layout command of LaTeX."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return _FRACTION.sub(r"\\frac", _LAYOUT.sub(" ", _DELIMITERS.sub(" ", text)))


def schema_of(rows: Any) -> str:
    """Return which of the two schemas `rows` (a dataset) has; refuse rows of neither."""
    if not len(rows):
        raise InputError("dataset_name is empty: it has no rows")
    names = rows.column_names
    schema = next((name for name, columns in COLUMNS.items() if set(columns) <= set(names)), None)
    if schema is None:
        near = nearest_column(names, [column for columns in COLUMNS.values() for column in columns])
        raise InputError(
            "dataset_name needs the columns prompt, target and reward_model (OpenR1-Math-46k) or question and answer "
            f"(GSM8K), its columns are {', '.join(names)}{near}"
        )
    if schema == OPENR1:
        row = rows[0]
        for column in ("prompt", "target"):
            if not isinstance(row[column], list):
                found = type(row[column]).__name__
                raise InputError(f"dataset_name: {column} must be a list of messages, it is a {found}")
        answer = row["reward_model"]
        if not isinstance(answer, dict) or "ground_truth" not in answer:
            found = ", ".join(answer) if isinstance(answer, dict) else type(answer).__name__
            raise InputError(f"dataset_name: reward_model must hold ground_truth, it holds {found}")
    return schema


def read_problems(rows: Any, schema: str, drops: Drops, pass_rate_column: str | None = None) -> list[Problem]:
    """Return a problem for each row that has one with a solution; add the other rows to `drops`."""
    read = {OPENR1: _openr1, GSM8K: _gsm8k}[schema]
    columns = [column for column in COLUMNS[schema] if column != "target"]
    rows = rows.select_columns(columns + ([pass_rate_column] if pass_rate_column else []))
    problems, number = [], -1
    for batch in rows.iter(BATCH):
        for values in zip(*batch.values(), strict=True):
            number, row = number + 1, dict(zip(batch, values, strict=True))
            system, text, answer = read(row)
            if not text:
                drops.add(number, None, "no_problem", "no text of the user alone")
            elif not answer:
                drops.add(number, problem_id(text), "no_solution")
            else:
                rate = checked_rate(row.get(pass_rate_column), f"dataset_name, row {number} (from 0)")
                problems.append(Problem(number, problem_id(text), text, delimited(answer), system, rate))
    return problems


def checked_rate(value: Any, where: str) -> float | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1):
        raise InputError(f"{where}: a pass rate lies between 0 and 1, got {value!r}")
    return None if value is None else float(value)


def _openr1(row: dict) -> tuple[str | None, str | None, str | None]:
    """Return the system prompt, the problem and the answer of a row."""
    messages = row["prompt"] or []
    roles = [message.get("role") for message in messages]
    texts = [message.get("content") or "" for message in messages]
    answer = (row["reward_model"] or {}).get("ground_truth")
    is_number = isinstance(answer, int | float) and not isinstance(answer, bool)
    answer = str(answer) if is_number else answer if isinstance(answer, str) else ""
    if roles not in (["user"], ["system", "user"]):  # an earlier answer would be part of the problem
        return None, None, None
    return (texts[0] if len(texts) == 2 else None), texts[-1].strip(), answer.strip()


def _gsm8k(row: dict) -> tuple[str | None, str | None, str | None]:
    """Return no system prompt, the problem and the answer of a row."""
    return None, (row["question"] or "").strip(), after_hashes(row["answer"])


def delimited(answer: str) -> str:
    r"""Put dollars around `answer`; without them math-verify reads `2\sqrt{3}` as 2, and finds nothing in `(1, 2)`."""
    is_marked = _DOLLAR.search(answer) or r"\boxed" in answer or answer.startswith((r"\(", r"\["))
    return answer if is_marked else f"${answer}$"


def demonstration_of(rows: Any, schema: str) -> Callable[[int], str | None]:
    """Return a function from a row's number to the text of its demonstration, None where it has none."""
    column = "target" if schema == OPENR1 else "answer"
    rows = rows.select_columns([column])
    write = _openr1_demonstration if schema == OPENR1 else _gsm8k_demonstration
    return lambda number: write(rows[number][column])


def _openr1_demonstration(target: list[dict] | None) -> str | None:
    if not target or [message.get("role") for message in target] != ["assistant"]:
        return None
    text = target[0].get("content") or ""
    return text if text.strip() else None


def _gsm8k_demonstration(answer: str) -> str | None:
    """Return the steps without calculator notes, and the answer in a box, where the reward reads it."""
    steps = _CALCULATOR.sub("", answer.rpartition("####")[0]).strip()
    return f"{steps}\n\nThe final answer is $\\boxed{{{after_hashes(answer)}}}$." if steps else None
