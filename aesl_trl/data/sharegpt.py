"""ShareGPT rows as messages: `conversations` of from/value turns, with human and gpt for user and assistant.

TRL renames the keys alone: `human` would be trained as a role of its own, which no prompt of RL ever shows.
"""

import json
from typing import TYPE_CHECKING, Any

from ..errors import InputError, nearest


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

CONVERSATIONS = "conversations"
ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bing", "bard"), "assistant"),
    "system": "system",
    **dict.fromkeys(("observation", "tool", "function_response", "tool_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
}
CALLS = ("function_call", "tool_call")
# Rows with one of these are not read from `conversations`
OTHERS = ("messages", "prompt", "input_ids")


def as_messages(dataset: "Dataset | IterableDataset", field: str = "dataset_name") -> "Dataset | IterableDataset":
    """Return the dataset with `messages` in the place of ShareGPT's `conversations`; leave other datasets alone.

    A `system` column becomes the first message.

    Raises:
        InputError: a turn without words, or of a role that is not known, by its row.
    """
    try:
        columns = dataset.column_names or list(next(iter(dataset), {}))
    except (ValueError, OSError):  # a broken file, of which the checks of its rows tell
        return dataset
    if CONVERSATIONS not in columns or any(name in columns for name in OTHERS):
        return dataset
    removed = [name for name in (CONVERSATIONS, "system") if name in columns]
    return dataset.map(_row, with_indices=True, fn_kwargs={"field": field}, remove_columns=removed)


def row_as_messages(row: dict, number: int, field: str) -> dict:
    """Return one row as [`as_messages`] does."""
    if CONVERSATIONS not in row or any(name in row for name in OTHERS):
        return row
    others = {key: value for key, value in row.items() if key not in (CONVERSATIONS, "system")}
    return {**others, **_row(row, number, field)}


def _row(row: dict, number: int, field: str) -> dict:
    where = f"{field}, row {number} (from 0)"
    turns, system = row[CONVERSATIONS], row.get("system")
    if not isinstance(turns, list) or not turns:
        raise InputError(
            f"{where}: {CONVERSATIONS} is {'empty' if turns == [] else 'no list'}; it must be a list of turns"
        )
    messages = [_message(turn, place, where) for place, turn in enumerate(turns)]
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return {"messages": messages}


def _message(turn: Any, place: int, where: str) -> dict:
    if not isinstance(turn, dict):
        raise InputError(f"{where}: turn {place} of {CONVERSATIONS} is a {type(turn).__name__}; it must be from/value")
    name = turn.get("from") or turn.get("role")
    value = turn.get("value") if turn.get("value") is not None else turn.get("content")
    if name not in ROLES:
        known = ", ".join(ROLES)
        raise InputError(
            f"{where}: turn {place} of {CONVERSATIONS} is from {name!r}{nearest(str(name), ROLES)} (of {known})"
        )
    if name in CALLS:
        return {
            "role": "assistant",
            "content": "",
            "tool_calls": _calls(value, f"{where}: turn {place} of {CONVERSATIONS}"),
        }
    others = {key: item for key, item in turn.items() if key not in ("from", "value", "role", "content")}
    return {**others, "role": ROLES[name], "content": value}


def _calls(value: Any, where: str) -> list[dict]:
    """Return the calls in a turn `function_call`: JSON of one call or of a list, with name and arguments."""
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        calls = None
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list) or not all(isinstance(call, dict) and call.get("name") for call in calls):
        raise InputError(f"{where} is a call without JSON of its name and arguments")
    return [
        {"type": "function", "function": {"name": call["name"], "arguments": _as_text(call.get("arguments", {}))}}
        for call in calls
    ]


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
