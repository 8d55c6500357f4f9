"""Load the rows of a dataset by its name; whatever keeps them from loading is said in one line.

A config names a dataset by its name on the hub, by a local .jsonl, .json, .parquet or .csv file, by a folder, as
`file.py:function`, or as `reasoning_gym:task`. A function takes the seed and returns a dataset or a list of rows. The
library `datasets` loads; this file turns its errors into a line that names the file and the broken line in it.
"""

import inspect
import json
import os
import re
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..arguments import load_function
from ..errors import InputError, in_one_line, nearest, nearest_sibling
from ..models.folder import GIT_LFS
from .gym import PREFIX, gym_rows
from .sharegpt import as_messages


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


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
    """Load the rows that `name` stands for; refuse a name or split that does not exist, or a file that is broken.

    ShareGPT's `conversations` come as `messages`.

    `split` is `train` by default (`validation` for held-out rows of `reasoning_gym:`), and `config` the configuration
    of a hub name or folder; `file.py:function` has neither, and takes the `seed`. Relative paths start from
    `base_dir`, by default the current folder. With `streaming` an IterableDataset is returned. `field` is the setting
    that named the dataset, for messages.
    """
    if not name:
        raise InputError(f"{field} is missing: name a dataset on the hub, a local file, or file.py:function")
    if name.startswith(PREFIX):
        rows = gym_rows(name, split or ("train" if field == "dataset_name" else "validation"), field=field)
        return rows.to_iterable_dataset() if streaming else rows
    base_dir = Path(base_dir or ".")
    file, colon, _ = name.rpartition(":")
    if colon and file.endswith(".py"):
        return as_messages(_function_rows(name, base_dir, seed, streaming, field), field)
    path = base_dir / os.path.expanduser(name)
    if path.is_file():
        return as_messages(_file_rows(path, split or "train", streaming, field), field)
    if not path.is_dir() and (path.suffix in BUILDERS or name.startswith((".", "/", "~"))):
        raise InputError(f"{field}: {name} does not exist, looked for {path.absolute()}{nearest_sibling(path)}")
    source = str(path) if path.is_dir() else name
    return as_messages(_guarded(lambda: _named_rows(source, config, split or "train", streaming), field, name), field)


def _function_rows(name: str, base_dir: Path, seed: int, streaming: bool, field: str) -> "Dataset | IterableDataset":
    from datasets import Dataset, IterableDataset

    function = load_function(name, base_dir, field=field)
    try:
        inspect.signature(function).bind(seed)
    except TypeError as error:
        raise InputError(f"{field}: {name} must take the seed: {error}") from None
    try:
        rows = function(seed)
    except InputError:
        raise
    except Exception as error:
        where = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__][:1]
        place = f" at {where[0].filename}:{where[0].lineno}" if where else ""
        raise InputError(f"{field}: {name} raised {type(error).__name__}{place}: {error}") from error
    if isinstance(rows, list):
        if not rows or not all(isinstance(row, dict) for row in rows):
            raise InputError(f"{field}: {name} must return a dataset or a non-empty list of dicts")
        written = list(map(with_json_text, rows))
        rows = _guarded(lambda: Dataset.from_list(written), field, name)
    if not isinstance(rows, Dataset | IterableDataset):
        raise InputError(
            f"{field}: {name} must return a dataset or a list of dicts, it returned {type(rows).__name__}"
        )
    return rows.to_iterable_dataset() if streaming and isinstance(rows, Dataset) else rows


def with_json_text(row: dict) -> dict:
    """Return `row` with its tools and the arguments of its tool calls as JSON text.

    Arrow has one type for a column: it would add the arguments of every call, as None, to all others.
    """
    written = {key: _calls_as_text(value) if isinstance(value, list) else value for key, value in row.items()}
    if isinstance(row.get("tools"), list) and all(isinstance(tool, dict) for tool in row["tools"]):
        written["tools"] = json.dumps(row["tools"], ensure_ascii=False)
    return written


def _calls_as_text(messages: list) -> list:
    has_calls = any(isinstance(message, dict) and message.get("tool_calls") for message in messages)
    return [_message_as_text(message) for message in messages] if has_calls else messages


def _message_as_text(message: Any) -> Any:
    if not isinstance(message, dict) or not isinstance(message.get("tool_calls"), list):
        return message
    calls = []
    for call in message["tool_calls"]:
        place = call.get("function", call) if isinstance(call, dict) else {}
        if isinstance(place, dict) and isinstance(place.get("arguments"), dict):
            place = {**place, "arguments": json.dumps(place["arguments"], ensure_ascii=False)}
            call = {**call, "function": place} if "function" in call else place
        calls.append(call)
    return {**message, "tool_calls": calls}


def _file_rows(path: Path, split: str, streaming: bool, field: str) -> "Dataset | IterableDataset":
    from datasets import load_dataset

    if path.suffix not in BUILDERS:
        known = ", ".join(BUILDERS)
        raise InputError(
            f"{field}: {path} is no dataset file, its name must end in one of {known}, or be file.py:function"
        )
    split_name = re.match(r"\w*", split)[0]  # `train[:100]` is a part of train
    if split_name != "train":
        raise InputError(
            f"{field}: {path} has no split {split_name!r}{nearest(split_name, ['train'])}; a file has one split, "
            "train: give other rows as a file of their own"
        )
    builder = BUILDERS[path.suffix]
    if not streaming and builder != "parquet":
        # The JSON loader takes other bytes along, and the row that has them fails only when it is read
        with open(path, "rb") as file:
            for line, text in enumerate(file, 1):
                _decoded(text, f"{field}: {path}, line {line}")
    load = lambda: load_dataset(builder, data_files=str(path), split=split, streaming=streaming)  # noqa: E731
    return _guarded(load, field, path)


def _named_rows(source: str, config: str | None, split: str, streaming: bool) -> "Dataset | IterableDataset":
    from datasets import DatasetDict, load_dataset, load_from_disk

    folder = Path(source)
    # save_to_disk wrote this folder; load_dataset would refuse it
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        rows = load_from_disk(source)
        if isinstance(rows, DatasetDict):
            if split not in rows:
                raise ValueError(f"unknown split {split!r}, it has {', '.join(rows)}")
            rows = rows[split]
        return rows.to_iterable_dataset() if streaming else rows
    return load_dataset(source, config, split=split, streaming=streaming)


def _guarded(load: Callable[[], Any], field: str, name: str | Path) -> Any:
    """Return `load()`. Its errors become one line, which names the broken line of a JSONL file."""
    from datasets.exceptions import DatasetsError

    try:
        return load()
    except InputError:
        raise
    except (DatasetsError, ValueError, TypeError, OSError, StopIteration, RecursionError) as error:
        path = Path(name)
        if path.is_file() and path.suffix in BUILDERS:
            _check_file(path, field)
        reason = in_one_line(error.__cause__ or error) or type(error).__name__
        raise InputError(f"{field}: {name} cannot be loaded: {reason}") from error


def _check_file(path: Path, field: str) -> None:
    """Refuse a data file that is empty, not UTF-8, or has a line that is not a JSON object; name that line.

    A JSON file may also be one array of objects that spans any number of lines.
    """
    with open(path, "rb") as file:
        start = file.read(1024)
    if not start:
        raise InputError(f"{field}: {path} is empty")
    if start.startswith(GIT_LFS):
        raise InputError(f"{field}: {path} is a pointer of git-lfs, not the file itself: run git lfs pull")
    if BUILDERS.get(path.suffix) != "json":
        return
    if start.lstrip().startswith(b"["):
        text = _decoded(path.read_bytes(), f"{field}: {path}")
        try:
            json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{field}: {path}, line {error.lineno} is not valid JSON: {error.msg}") from None
        except (ValueError, RecursionError) as error:  # too many digits, too many levels
            raise InputError(f"{field}: {path} cannot be read: {error}") from None
        return
    is_empty = True
    with open(path, "rb") as file:
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            is_empty, where = False, f"{field}: {path}, line {line}"
            text = _decoded(text, where)
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                raise InputError(f"{where} is not valid JSON: {error.msg} at character {error.pos}") from None
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where} cannot be read: {error}") from None
            if not isinstance(row, dict):
                raise InputError(f"{where} must be a JSON object, got {type(row).__name__}")
    if is_empty:
        raise InputError(f"{field}: {path} is empty")


def _decoded(text: bytes, where: str) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8: {error.reason} at byte {error.start}") from None


def nearest_column(found: Iterable[str], wanted: Sequence[str]) -> str:
    """Return a hint that names the wanted column that one of the columns `found` nearly is, else an empty string."""
    return next(filter(None, (nearest(name, wanted) for name in found if name not in wanted)), "")
