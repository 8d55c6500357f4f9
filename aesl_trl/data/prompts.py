"""Make prompts of rows, for RL and for measuring diversity, and check that no held-out prompt is trained on."""

import json
import textwrap
from itertools import islice
from typing import TYPE_CHECKING

from ..errors import InputError
from ..values import without_none
from .checks import check_prompts, only_columns, peek, prompt_column
from .sharegpt import row_as_messages


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


def prompt_rows(
    dataset: "Dataset | IterableDataset", num: int | None = None, *, field: str = "dataset_name"
) -> list[dict]:
    """Return the first `num` rows (by default all) with `prompt` and the other columns, which rewards may need.

    Where a row holds `messages`, its prompt is the messages before the last turn of the assistant. A dataset that is
    empty, or has a row whose prompt cannot be used, is refused.
    """
    rows = [row_as_messages(row, number, field) for number, row in enumerate(islice(dataset, num))]
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
    """Refuse prompts of [`prompt_rows`] that `train` holds too: their samples would show what was learnt by heart.

    Two prompts are the same if every character is. Of a streaming `train` the first rows are compared. Plain texts
    are not compared, as the prompt cannot be told from the answer in them.
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
