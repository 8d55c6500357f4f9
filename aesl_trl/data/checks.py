"""Check rows before training: a row that SFT or RL cannot use is refused in one line that names it.

TRL prepares the rows. It meets a bad row late, with a StopIteration, KeyError or AttributeError, or trains on it in
silence; these checks find the row beforehand. Of a streaming dataset they read the first rows.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from ..errors import InputError, in_one_line
from .rows import nearest_column
from .sharegpt import CONVERSATIONS, row_as_messages


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

# The columns that make a demonstration, in the order in which TRL looks for them.
DEMONSTRATIONS = (("input_ids",), ("prompt", "completion"), ("messages",), (CONVERSATIONS,))
STREAMED_ROWS = 64  # rows of a streaming dataset that are checked before training
MAX_CHARACTERS = 2**22  # of one row: about a million tokens, longer than any context, take minutes to tokenize


def check_demonstrations(
    dataset: "Dataset | IterableDataset", *, field: str = "dataset_name", text_field: str = "text", start: int = 0
) -> None:
    """Refuse a dataset without rows or demonstrations, or with a row that SFT cannot learn from.

    `text_field` is the column of plain texts, as SFTConfig.dataset_text_field. `start` is the number of the first row.
    """
    row, rows = peek(dataset, field)
    kinds = (*DEMONSTRATIONS, (text_field,))
    kind = next((columns for columns in kinds if all(column in row for column in columns)), None)
    if kind is None:
        raise InputError(f"{field} has no demonstrations: {_missing_columns(row, kinds)}")
    if kind == (CONVERSATIONS,):
        rows, kind = [row_as_messages(row, number, field) for number, row in enumerate(rows, start)], ("messages",)
    # TRL checks rows of token ids: it drops those without a trained token, and `check_trainable` sees the others.
    if kind != ("input_ids",):
        for number, row in enumerate(only_columns(rows, kind), start):
            problem = _demonstration_problem(row, kind) or _too_long([row[column] for column in kind])
            if problem:
                raise InputError(f"{field}, row {number} (from 0): {problem}")


def check_prompts(dataset: "Dataset | IterableDataset", *, field: str = "dataset_name", start: int = 0) -> None:
    """Refuse a dataset with a row whose `prompt` (or `messages`) RL cannot use. `start` is its first row's number."""
    first, rows = peek(dataset, field)
    column = prompt_column(first)
    if column is None:
        raise InputError(f"{field} has no prompts: {_missing_columns(first, (('prompt',), ('messages',)))}")
    kind = None
    for number, row in enumerate(only_columns(rows, (column,)), start):
        prompt = row.get(column)
        problem = _prompt_problem(prompt, column) or _too_long(prompt)
        if not problem and kind not in (None, type(prompt)):
            # TRL looks at the first row alone, and would take messages for text, or text for messages
            problem = f"{column} is {_form(prompt)}, and the rows before it hold the other form: all must be alike"
        if problem:
            raise InputError(f"{field}, row {number} (from 0): {problem}")
        kind = type(prompt)


def checked_when_read(stream: "IterableDataset", check: Callable, *, field: str) -> "IterableDataset":
    """Return the stream with `check(rows, field=..., start=...)` called on each row as it is read."""

    def with_check(row: dict, number: int) -> dict:
        check([row], field=field, start=number)
        return row

    return stream.map(with_check, with_indices=True, features=stream.features)


def prompt_column(row: dict) -> str | None:
    return next((name for name in ("prompt", "messages") if name in row), None)


def peek(dataset: Any, field: str) -> tuple[dict, Iterable[dict]]:
    """Return the first row, and the rows to check: all of them, or the first [`STREAMED_ROWS`] of a stream."""
    streaming = not hasattr(dataset, "__len__")
    try:
        rows = list(islice(dataset, STREAMED_ROWS)) if streaming else dataset
        first = next(iter(rows), None)
    except InputError:
        raise
    except (ValueError, OSError, UnicodeError) as error:
        raise InputError(f"{field} cannot be read: {in_one_line(error)}") from error
    if first is None:
        raise InputError(f"{field} is empty: it has no rows")
    return first, rows


def only_columns(rows: Any, columns: tuple[str, ...]) -> Iterator[dict]:
    return iter(rows if isinstance(rows, list) else rows.select_columns(list(columns)))


def _missing_columns(first: dict, kinds: Iterable[tuple[str, ...]]) -> str:
    """Say which columns are needed and which are there, and name a column that is nearly right."""
    wanted = ", or ".join(" and ".join(columns) for columns in kinds)
    columns = [column for kind in kinds for column in kind]
    missing = [column for column in columns if column not in first]
    near = nearest_column([name for name in first if name not in columns], missing)
    return f"it needs {wanted}, its columns are {', '.join(first)}{near}"


def _demonstration_problem(row: dict, kind: tuple[str, ...]) -> str:
    """Say what is wrong with the demonstration in `row`; return an empty string where nothing is."""
    if kind == ("prompt", "completion"):
        return _prompt_completion_problem(row["prompt"], row["completion"])
    (column,) = kind
    value = row[column]
    if column == "messages":
        return _messages_problem(value, column)
    return _text_problem(value, column)


def _prompt_completion_problem(prompt: Any, completion: Any) -> str:
    if not isinstance(prompt, str | list):
        return f"prompt is {_named_kind(prompt)}; it must be text or a list of messages"
    problem = _turns_problem(prompt, "prompt") if isinstance(prompt, list) else ""
    check = _messages_problem if isinstance(completion, list) and completion else _text_problem
    problem = problem or check(completion, "completion")
    if not problem and isinstance(prompt, str) != isinstance(completion, str):
        return f"prompt is {_form(prompt)} and completion {_form(completion)}: both must be alike"
    return problem


def _text_problem(text: Any, column: str) -> str:
    if not isinstance(text, str) or not text:
        return f"{column} is {_named_kind(text)}; it must be text"
    return "" if text.strip() else f"{column} is blank; it must be text"


def _messages_problem(messages: Any, column: str) -> str:
    if not isinstance(messages, list) or not messages:
        return f"{column} is {_named_kind(messages)}; it must be a list of messages"
    if problem := _turns_problem(messages, column):
        return problem
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        return f"{column} has no assistant message to learn, its roles are {', '.join(dict.fromkeys(roles))}"
    if roles[-1] != "assistant":
        return f"{column} ends with a message of the {roles[-1]}; a demonstration ends with the assistant's"
    is_empty = not (messages[-1].get("content") or messages[-1].get("tool_calls"))
    return f"the last message of {column} is empty" if is_empty else ""


def _prompt_problem(prompt: Any, column: str) -> str:
    if not isinstance(prompt, str | list) or not prompt:
        return f"{column} is {_named_kind(prompt)}; it must be text or a list of messages"
    return "" if isinstance(prompt, str) else _turns_problem(prompt, column)


def _turns_problem(messages: list, column: str) -> str:
    """Say what no chat template could show of these messages; return an empty string where there is no such thing."""
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not message.get("role"):
            is_pair = isinstance(message, dict) and "from" in message
            hint = "; from/value pairs belong in a column 'conversations'" if is_pair else ""
            return f"{column} has a message without a role{hint}"
        if message.get("content") is None and not message.get("tool_calls"):
            return f"message {number} of {column} ({message['role']}) has no content"
    return ""


def _too_long(value: Any) -> str:
    num = _count_characters(value)
    return "" if num <= MAX_CHARACTERS else f"it has {num} characters, more than {MAX_CHARACTERS}: cut it or drop it"


def _count_characters(value: Any) -> int:
    if isinstance(value, dict | list):
        return sum(map(_count_characters, value.values() if isinstance(value, dict) else value))
    return len(value) if isinstance(value, str) else 0


def _form(value: str | list) -> str:
    return "text" if isinstance(value, str) else "a list of messages"


def _named_kind(value: Any) -> str:
    if value is None:
        return "missing"
    if isinstance(value, str | list) and not value:
        return "empty"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
