"""Prompts from rows: for RL, for measuring diversity, and held out from what is trained on.

Left out: loading the rows (rows.py), and which prompts are refused (checks.py).
"""

import json
import textwrap
from itertools import islice
from typing import TYPE_CHECKING

from ..errors import InputError
from ..models.tokens import without_none
from .checks import check_prompts, only_columns, peek, prompt_column


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


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


def check_held_out(
    train: "Dataset | IterableDataset", prompts: list[dict], *, field: str, train_field: str = "dataset_name"
) -> None:
    """Refuse prompts of `prompt_rows` that are trained on too: their samples tell what was learnt by heart.

    Of a streaming `train` the first rows are looked at. Prompts are alike if every character is; texts of whole
    conversations, and `from`/`value` pairs, are not looked into.
    """
    first, rows = peek(train, train_field)
    column = prompt_column(first)
    if column is None:
        return
    held_out = {_prompt_key(row["prompt"]) for row in prompts}
    trained = held_out & {_prompt_key(_prompt_row(row)["prompt"]) for row in only_columns(rows, (column,))}
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
