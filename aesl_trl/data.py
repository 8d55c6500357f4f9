"""Dataset rows: demonstrations for SFT, prompts for RL and for measuring diversity.

A dataset is named as `name` in a config: a name on the hub, a local .jsonl, .json, .parquet or .csv file, a folder, or
`file.py:function`, whose function takes the seed and returns a dataset or a list of rows. Loading and preparing is the
work of `datasets` and TRL; here are the checks that turn their late StopIteration, KeyError or AttributeError into one
line beforehand.
"""

import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError, nearest


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
# The columns that make a demonstration, in the order in which TRL looks for them; `conversations` is from/value.
DEMONSTRATIONS = (("input_ids",), ("prompt", "completion"), ("messages",), ("conversations",))
STREAMED_ROWS = 64  # rows of a streaming dataset that are looked at before training


def load_rows(
    name: str,
    *,
    split: str | None = None,
    config: str | None = None,
    streaming: bool = False,
    seed: int = 0,
    base_dir: str | Path | None = None,
    field: str = "dataset_name",
) -> "Dataset | IterableDataset":
    """The rows that `name` stands for.

    Args:
        name: a hub name, a local file or folder, or `file.py:function`.
        split: the split, `train` by default; a function has none and ignores it.
        config: the dataset's configuration, for hub names and folders.
        seed: given to the function of `file.py:function`.
        base_dir: the folder that a relative path starts from, by default the current one.
        field: the setting that named the dataset, for messages.

    Raises:
        InputError: no such file, folder, function, split or hub dataset, or a file that cannot be read.
    """
    if not name:
        raise InputError(f"{field} is missing: name a dataset on the hub, a local file, or file.py:function")
    base_dir = Path(base_dir or ".")
    file, colon, _ = name.rpartition(":")
    if colon and file.endswith(".py"):
        return _function_rows(name, base_dir, seed, streaming, field)
    path = base_dir / Path(name).expanduser()
    if path.is_file():
        return _file_rows(path, split or "train", streaming, field)
    if path.suffix in BUILDERS or name.startswith((".", "/", "~")):
        if not path.is_dir():
            raise InputError(f"{field}: {name} does not exist, looked for {path.absolute()}{_sibling(path)}")
    source = str(path) if path.is_dir() else name
    return _guarded(lambda: _named_rows(source, config, split or "train", streaming), field, name)


def load_function(name: str, base_dir: str | Path | None = None, *, field: str) -> Callable:
    """The function of `file.py:function`; its file may import its neighbours.

    Raises:
        InputError: no such file or function, or the file cannot be imported.
    """
    file, _, function = name.rpartition(":")
    path = Path(os.path.abspath(Path(base_dir or ".") / Path(file).expanduser()))
    if not path.is_file():
        raise InputError(f"{field}: {file} does not exist, looked for {path}{_sibling(path)}")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"{field}: {path} cannot be imported: {type(error).__name__}: {error}") from error
    found = getattr(module, function, None)
    if not callable(found):
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise InputError(f"{field}: {path} has no function {function!r}{nearest(function, functions)}")
    return found


def _function_rows(name: str, base_dir: Path, seed: int, streaming: bool, field: str) -> "Dataset | IterableDataset":
    from datasets import Dataset, IterableDataset

    function = load_function(name, base_dir, field=field)
    try:
        inspect.signature(function).bind(seed)
    except TypeError as error:
        raise InputError(f"{field}: {name} must take the seed: {error}") from None
    rows = function(seed)
    if isinstance(rows, list):
        if not rows or not all(isinstance(row, dict) for row in rows):
            raise InputError(f"{field}: {name} must return a dataset or a non-empty list of dicts")
        rows = Dataset.from_list(rows)
    if not isinstance(rows, Dataset | IterableDataset):
        raise InputError(
            f"{field}: {name} must return a dataset or a list of dicts, it returned {type(rows).__name__}"
        )
    return rows.to_iterable_dataset() if streaming and isinstance(rows, Dataset) else rows


def _file_rows(path: Path, split: str, streaming: bool, field: str) -> "Dataset | IterableDataset":
    from datasets import load_dataset

    if path.suffix not in BUILDERS:
        known = ", ".join(BUILDERS)
        raise InputError(
            f"{field}: {path} is no dataset file, its name must end in one of {known}, or be file.py:function"
        )
    builder = BUILDERS[path.suffix]
    if not streaming and builder != "parquet":
        _check_utf8(path, field)
    load = lambda: load_dataset(builder, data_files=str(path), split=split, streaming=streaming)  # noqa: E731
    return _guarded(load, field, path)


def _named_rows(source: str, config: str | None, split: str, streaming: bool) -> "Dataset | IterableDataset":
    from datasets import DatasetDict, load_dataset, load_from_disk

    folder = Path(source)
    # What save_to_disk wrote; load_dataset would refuse it.
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        rows = load_from_disk(source)
        if isinstance(rows, DatasetDict):
            if split not in rows:
                raise ValueError(f"unknown split {split!r}, it has {', '.join(rows)}")
            rows = rows[split]
        return rows.to_iterable_dataset() if streaming else rows
    return load_dataset(source, config, split=split, streaming=streaming)


def _guarded(load: Callable[[], Any], field: str, name: str | Path) -> Any:
    """`load()`, its errors in one line; a broken JSONL file by its line."""
    from datasets.exceptions import DatasetsError

    try:
        return load()
    except InputError:
        raise
    except (DatasetsError, ValueError, TypeError, OSError, StopIteration) as error:
        path = Path(name)
        if path.is_file() and path.suffix in BUILDERS:
            check_file(path, field=field)
        reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        raise InputError(f"{field}: {name} cannot be loaded: {reason}") from error


def check_file(path: str | Path, *, field: str) -> None:
    """Refuse a data file that is empty, not UTF-8, or has a line that is not a JSON object, by its line number."""
    path = Path(path)
    if path.stat().st_size == 0:
        raise InputError(f"{field}: {path} is empty")
    if path.suffix != ".jsonl":
        return
    number = 0
    with open(path, "rb") as file:
        for line, text in enumerate(file, 1):
            if text.strip():
                number += 1
                _check_line(text, f"{field}: {path}, line {line}")
    if not number:
        raise InputError(f"{field}: {path} is empty")


def _check_utf8(path: Path, field: str) -> None:
    # The JSON loader takes other bytes along, and the row that has them fails only when it is read.
    with open(path, "rb") as file:
        for line, text in enumerate(file, 1):
            _decoded(text, f"{field}: {path}, line {line}")


def _decoded(text: bytes, where: str) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8: {error.reason} at byte {error.start}") from None


def _check_line(text: bytes, where: str) -> None:
    try:
        row = json.loads(_decoded(text, where))
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not valid JSON: {error.msg} at character {error.pos}") from None
    if not isinstance(row, dict):
        raise InputError(f"{where} must be a JSON object, got {type(row).__name__}")


def _sibling(path: Path) -> str:
    return nearest(path.name, os.listdir(path.parent)) if path.parent.is_dir() else ""


# ---- Checks before training


def check_demonstrations(
    dataset: "Dataset | IterableDataset", *, field: str = "dataset_name", text_field: str = "text"
) -> None:
    """Refuse a dataset that SFT cannot learn from: every row, or the first of a streaming one.

    Args:
        text_field: the column of plain texts, as SFTConfig.dataset_text_field.

    Raises:
        InputError: no rows, no demonstration columns, or a row (from 0) whose completion is missing, empty or no text.
    """
    first, rows = _peek(dataset, field)
    kinds = (*DEMONSTRATIONS, (text_field,))
    kind = next((columns for columns in kinds if all(column in first for column in columns)), None)
    if kind is None:
        raise InputError(f"{field} has no demonstrations: {_missing_columns(first, kinds)}")
    # Rows of token ids are TRL's to check: it drops those without a trained token; `check_trainable` sees the rest.
    if kind != ("input_ids",):
        for number, row in enumerate(_only(rows, kind)):
            problem = _row_problem(row, kind)
            if problem:
                raise InputError(f"{field}, row {number} (from 0): {problem}")


def check_prompts(dataset: "Dataset | IterableDataset", *, field: str = "dataset_name") -> None:
    """Refuse a dataset with a row that has no `prompt` (or `messages`): every row, or the first of a streaming one."""
    first, rows = _peek(dataset, field)
    column = next((name for name in ("prompt", "messages") if name in first), None)
    if column is None:
        raise InputError(f"{field} has no prompts: {_missing_columns(first, (('prompt',), ('messages',)))}")
    for number, row in enumerate(_only(rows, (column,))):
        if not isinstance(row[column], str | list) or not row[column]:
            raise InputError(f"{field}, row {number} (from 0): {column} is {_what(row[column])}")


def check_trainable(dataset: Any, max_length: int | None, *, field: str = "dataset_name") -> None:
    """Refuse a dataset, as TRL prepared it, in which no token is trained: `max_length` cut every completion off.

    A streaming dataset, or one without `labels` (images), is not looked at.
    """
    if not hasattr(dataset, "__len__") or (len(dataset) and "labels" not in dataset.column_names):
        return
    # The first token of a row is predicted by nothing.
    if not any(label != -100 for row in dataset for label in row["labels"][1:]):
        cause = f"max_length={max_length}: raise it, or set it to null" if max_length else "the masks of its rows"
        raise InputError(f"{field} has nothing to learn: every row lost its completion to {cause}")


def _peek(dataset: Any, field: str) -> tuple[dict, Iterable[dict]]:
    """The first row and the rows to check."""
    streaming = not hasattr(dataset, "__len__")
    try:
        rows = list(islice(dataset, STREAMED_ROWS)) if streaming else dataset
        first = next(iter(rows), None)
    except (ValueError, OSError, UnicodeError) as error:
        raise InputError(f"{field} cannot be read: {' '.join(str(error).split())}") from error
    if first is None:
        raise InputError(f"{field} is empty: it has no rows")
    return first, rows


def _only(rows: Any, columns: tuple[str, ...]) -> Iterator[dict]:
    return iter(rows if isinstance(rows, list) else rows.select_columns(list(columns)))


def _missing_columns(first: dict, kinds: Iterable[tuple[str, ...]]) -> str:
    """What is needed and what is there; a column that is nearly right is named."""
    wanted = ", or ".join(" and ".join(columns) for columns in kinds)
    missing = [column for columns in kinds for column in columns if column not in first]
    near = next(filter(None, (nearest(name, missing) for name in first if name not in sum(kinds, ()))), "")
    return f"it needs {wanted}, its columns are {', '.join(first)}{near}"


def _row_problem(row: dict, kind: tuple[str, ...]) -> str:
    """What is wrong with the demonstration in `row`, or an empty string."""
    if kind == ("prompt", "completion"):
        return _prompt_completion_problem(row["prompt"], row["completion"])
    (column,) = kind
    value = row[column]
    if column == "messages":
        return _messages_problem(value, column)
    if column == "conversations":
        return "" if isinstance(value, list) and value else f"{column} is {_what(value)}, not a list of messages"
    return "" if isinstance(value, str) and value else f"{column} is {_what(value)}"


def _prompt_completion_problem(prompt: Any, completion: Any) -> str:
    if not isinstance(prompt, str | list):
        return f"prompt is {_what(prompt)}, not a str or messages"
    if isinstance(completion, list) and completion:
        return _messages_problem(completion, "completion") or _mixed(prompt, list)
    if not isinstance(completion, str) or not completion:
        return f"completion is {_what(completion)}"
    return _mixed(prompt, str)


def _mixed(prompt: Any, kind: type) -> str:
    return "" if isinstance(prompt, kind) else "one of prompt and completion is a str and the other messages"


def _messages_problem(messages: Any, column: str) -> str:
    if not isinstance(messages, list) or not messages:
        return f"{column} is {_what(messages)}, not a list of messages"
    if not all(isinstance(message, dict) and message.get("role") for message in messages):
        return f"{column} has a message without a role"
    said = [message for message in messages if message["role"] == "assistant"]
    if not any(message.get("content") or message.get("tool_calls") for message in said):
        return f"{column} has no assistant message with content"
    return ""


def _what(value: Any) -> str:
    if value is None:
        return "missing"
    if isinstance(value, str | list) and not value:
        return "empty"
    return f"a {type(value).__name__}, not text"


# ---- Prompts


def prompt_rows(
    dataset: "Dataset | IterableDataset", num: int | None = None, *, field: str = "dataset_name"
) -> list[dict]:
    """The first `num` rows (all by default) as dicts with `prompt` and the other columns, which rewards may need.

    `messages` give the prompt up to their last assistant turn, which is the demonstration.

    Raises:
        InputError: the dataset is empty or has neither `prompt` nor `messages`.
    """
    rows = [_prompt_row(row, field) for row in islice(dataset, num)]
    if not rows:
        raise InputError(f"{field} is empty: it has no rows")
    return rows


def _prompt_row(row: dict, field: str) -> dict:
    if "prompt" in row:
        return {**row, "prompt": _without_none(row["prompt"])}
    if "messages" not in row:
        raise InputError(f"{field} has no prompts: {_missing_columns(row, (('prompt',), ('messages',)))}")
    others = {key: value for key, value in row.items() if key != "messages"}
    messages = _without_none(row["messages"])
    assistant = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    return {"prompt": messages[: assistant[-1]] if assistant else messages, **others}


def _without_none(prompt: Any) -> Any:
    # Arrow gives every message the keys of all: a template would see `tool_calls: None` where there are none.
    if not isinstance(prompt, list):
        return prompt
    return [{key: value for key, value in message.items() if value is not None} for message in prompt]
