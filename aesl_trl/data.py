"""Dataset rows: demonstrations for SFT, prompts for RL and for measuring diversity.

A dataset is named as `name` in a config: a name on the hub, a local .jsonl, .json, .parquet or .csv file, a folder, or
`file.py:function`, whose function takes the seed and returns a dataset or a list of rows. Loading and preparing is the
work of `datasets` and TRL; here are the checks that turn their late StopIteration, KeyError or AttributeError, and
what they would train on in silence, into one line beforehand.
"""

import importlib.util
import inspect
import json
import os
import re
import sys
import textwrap
import traceback
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
MAX_CHARACTERS = 2**22  # of one row, about a million tokens: longer than any context, and minutes of tokenizing
GIT_LFS = b"version https://git-lfs"


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
        rows = _guarded(lambda: Dataset.from_list(rows), field, name)
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
    # Before the split's first punctuation: `train[:100]` is of train.
    asked = re.match(r"\w*", split)[0]
    if asked != "train":
        raise InputError(
            f"{field}: {path} has no split {asked!r}{nearest(asked, ['train'])}; a file is one split, train: give "
            "other rows as a file of their own"
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
    """Refuse a data file that is empty, not UTF-8, or has a line that is not a JSON object, by its line number.

    An array of objects, over as many lines as it likes, is read as well.
    """
    path = Path(path)
    with open(path, "rb") as file:
        start = file.read(1024)
    if not start:
        raise InputError(f"{field}: {path} is empty")
    if start.startswith(GIT_LFS):
        raise InputError(f"{field}: {path} is a pointer of git-lfs, not the file itself: run git lfs pull")
    if BUILDERS.get(path.suffix) != "json":
        return
    if start.lstrip().startswith(b"["):
        _check_array(path, field)
        return
    number = 0
    with open(path, "rb") as file:
        for line, text in enumerate(file, 1):
            if text.strip():
                number += 1
                _check_line(text, f"{field}: {path}, line {line}")
    if not number:
        raise InputError(f"{field}: {path} is empty")


def _check_array(path: Path, field: str) -> None:
    try:
        json.loads(_decoded(path.read_bytes(), f"{field}: {path}"))
    except json.JSONDecodeError as error:
        raise InputError(f"{field}: {path}, line {error.lineno} is not valid JSON: {error.msg}") from None


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
    column = _prompt_column(first)
    if column is None:
        raise InputError(f"{field} has no prompts: {_missing_columns(first, (('prompt',), ('messages',)))}")
    kind = None
    for number, row in enumerate(_only(rows, (column,))):
        prompt = row.get(column)
        problem = _prompt_problem(prompt, column) or _too_long(prompt)
        if not problem and kind not in (None, type(prompt)):
            # TRL looks at the first row alone, and would take messages for text, or text for messages
            problem = f"{column} is {_form(prompt)}, and those before it are not: all must be alike"
        if problem:
            raise InputError(f"{field}, row {number} (from 0): {problem}")
        kind = type(prompt)


def _prompt_column(row: dict) -> str | None:
    return next((name for name in ("prompt", "messages") if name in row), None)


def check_held_out(
    train: "Dataset | IterableDataset", prompts: list[dict], *, field: str, train_field: str = "dataset_name"
) -> None:
    """Refuse prompts of `prompt_rows` that are trained on too: their samples tell what was learnt by heart.

    Of a streaming `train` the first rows are looked at. Prompts are alike if every character is; texts of whole
    conversations, and `from`/`value` pairs, are not looked into.
    """
    first, rows = _peek(train, train_field)
    column = _prompt_column(first)
    if column is None:
        return
    held_out = {_prompt_key(row["prompt"]) for row in prompts}
    trained = held_out & {_prompt_key(_prompt_row(row)["prompt"]) for row in _only(rows, (column,))}
    shared = [number for number, row in enumerate(prompts) if _prompt_key(row["prompt"]) in trained]
    if shared:
        prompt = prompts[shared[0]]["prompt"]
        text = prompt if isinstance(prompt, str) else prompt[-1].get("content")
        raise InputError(
            f"{len(shared)} of {len(prompts)} prompts of {field} are in {train_field} too, the first is row "
            f"{shared[0]} (from 0), {textwrap.shorten(str(text), 60)!r}: take them out of one of the two"
        )


def _prompt_key(prompt: str | list[dict]) -> str:
    return prompt if isinstance(prompt, str) else json.dumps(without_none(prompt), sort_keys=True, default=str)


def check_trainable(
    dataset: Any, max_length: int | None, *, num_embeddings: int | None = None, field: str = "dataset_name"
) -> None:
    """Refuse a dataset, as TRL prepared it, in which no token is trained: `max_length` cut every completion off.

    Or one with a token that the model has no embedding for: on a GPU it would end in an assertion of a kernel. A
    streaming dataset, or one without `labels` (images), is not looked at.
    """
    if not hasattr(dataset, "__len__") or (len(dataset) and "labels" not in dataset.column_names):
        return
    # The first token of a row is predicted by nothing.
    if not any(label != -100 for row in dataset for label in row["labels"][1:]):
        cause = f"max_length={max_length}: raise it, or set it to null" if max_length else "the masks of its rows"
        raise InputError(f"{field} has nothing to learn: every row lost its completion to {cause}")
    if num_embeddings is not None and "input_ids" in dataset.column_names:
        highest = max(_highest(batch["input_ids"]) for batch in dataset.with_format("arrow").iter(1000))
        if highest >= num_embeddings:
            raise InputError(
                f"{field} has token {highest}, and the model {num_embeddings} embeddings: its tokenizer is another "
                "model's, or was enlarged without model.resize_token_embeddings"
            )


def _highest(tokens: Any) -> int:
    import pyarrow.compute

    return pyarrow.compute.max(pyarrow.compute.list_flatten(tokens)).as_py() or 0


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
    return _demonstration_problem(row, kind) or _too_long([row[column] for column in kind])


def _demonstration_problem(row: dict, kind: tuple[str, ...]) -> str:
    if kind == ("prompt", "completion"):
        return _prompt_completion_problem(row["prompt"], row["completion"])
    (column,) = kind
    value = row[column]
    if column == "messages":
        return _messages_problem(value, column)
    if column == "conversations":
        is_list = isinstance(value, list) and value
        return "" if is_list else f"{column} is {_what(value)}; it must be a list of messages"
    return _text_problem(value, column)


def _prompt_completion_problem(prompt: Any, completion: Any) -> str:
    if not isinstance(prompt, str | list):
        return f"prompt is {_what(prompt)}; it must be text or a list of messages"
    problem = _turns_problem(prompt, "prompt") if isinstance(prompt, list) else ""
    if isinstance(completion, list) and completion:
        return problem or _messages_problem(completion, "completion") or _mixed(prompt, completion)
    return problem or _text_problem(completion, "completion") or _mixed(prompt, completion)


def _mixed(prompt: str | list, completion: str | list) -> str:
    is_mixed = isinstance(prompt, str) != isinstance(completion, str)
    return f"prompt is {_form(prompt)} and completion {_form(completion)}: both must be alike" if is_mixed else ""


def _text_problem(text: Any, column: str) -> str:
    if not isinstance(text, str) or not text:
        return f"{column} is {_what(text)}; it must be text"
    return "" if text.strip() else f"{column} is blank; it must be text"


def _messages_problem(messages: Any, column: str) -> str:
    if not isinstance(messages, list) or not messages:
        return f"{column} is {_what(messages)}; it must be a list of messages"
    problem = _turns_problem(messages, column)
    if problem:
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
        return f"{column} is {_what(prompt)}; it must be text or a list of messages"
    return "" if isinstance(prompt, str) else _turns_problem(prompt, column)


def _turns_problem(messages: list, column: str) -> str:
    """What no chat template can show."""
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not message.get("role"):
            is_pair = isinstance(message, dict) and "from" in message
            hint = "; from/value pairs belong in a column 'conversations'" if is_pair else ""
            return f"{column} has a message without a role{hint}"
        if message.get("content") is None and not message.get("tool_calls"):
            return f"message {number} of {column} ({message['role']}) has no content"
    return ""


def _too_long(value: Any) -> str:
    num = _num_characters(value)
    return "" if num <= MAX_CHARACTERS else f"it has {num} characters, more than {MAX_CHARACTERS}: cut it or drop it"


def _num_characters(value: Any) -> int:
    if isinstance(value, dict | list):
        return sum(map(_num_characters, value.values() if isinstance(value, dict) else value))
    return len(value) if isinstance(value, str) else 0


def _form(value: str | list) -> str:
    return "text" if isinstance(value, str) else "a list of messages"


def _what(value: Any) -> str:
    if value is None:
        return "missing"
    if isinstance(value, str | list) and not value:
        return "empty"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


# ---- Prompts


def prompt_rows(
    dataset: "Dataset | IterableDataset", num: int | None = None, *, field: str = "dataset_name"
) -> list[dict]:
    """The first `num` rows (all by default) as dicts with `prompt` and the other columns, which rewards may need.

    `messages` give the prompt up to their last assistant turn, which is the demonstration.

    Raises:
        InputError: the dataset is empty, has neither `prompt` nor `messages`, or a row whose prompt cannot be used.
    """
    rows = list(islice(dataset, num))
    if not rows:
        raise InputError(f"{field} is empty: it has no rows")
    check_prompts(rows, field=field)
    return [_prompt_row(row) for row in rows]


def _prompt_row(row: dict) -> dict:
    if "prompt" in row:
        return {**row, "prompt": without_none(row["prompt"])}
    others = {key: value for key, value in row.items() if key != "messages"}
    messages = without_none(row["messages"])
    assistant = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    return {"prompt": messages[: assistant[-1]] if assistant else messages, **others}


def without_none(prompt: Any) -> Any:
    # Arrow gives every message the keys of all: a template would see `tool_calls: None` where there are none.
    if not isinstance(prompt, list):
        return prompt
    return [{key: value for key, value in message.items() if value is not None} for message in prompt]
