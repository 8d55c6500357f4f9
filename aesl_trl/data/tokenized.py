"""Check rows as TRL prepared them, as token ids and labels, before the first step.

Is there anything to learn, can a trained label end a sample, and has the model a row for each token and position? Of a
streaming dataset the first rows are read; what is wrong with them is a warning there, as later rows may differ.
"""

import warnings
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from ..errors import InputError
from .checks import STREAMED_ROWS


FEW_ENDS = 0.5  # share of demonstrations with a trained end below which a warning is due
IGNORED = -100  # the label of a token that is not trained


@dataclass
class Found:
    """What the rows hold."""

    rows: int = 0
    documents: int = 0  # more than rows where they are packed
    longest: int = 0  # tokens of the longest document
    cut: int = 0  # rows as long as max_length without a trained end
    ended: int = 0  # rows with a trained end
    ends: int = 0  # labels that end a sample
    trained: set[int] = field(default_factory=set)  # the ids among the labels
    highest: int = 0  # of all ids

    @property
    def ended_share(self) -> float:
        packed = self.documents != self.rows
        return min(self.ends, self.documents) / self.documents if packed else self.ended / self.rows


def check_trainable(
    dataset: Any,
    max_length: int | None,
    *,
    stops: dict[int, str] | None = None,
    num_embeddings: int | None = None,
    num_positions: int | None = None,
    field: str = "train_dataset",
) -> set[int]:
    """Refuse a dataset from which nothing can be learnt, or from which a model cannot learn to end a sample.

    Refuse it too when the model has no embedding for a token or a position: on a GPU a kernel's assertion would end
    the run. A dataset without `labels` (images) passes unchecked. Where few rows have an end there is a warning.

    Args:
        stops: the tokens that end a sample, by id ([`~aesl_trl.models.tokens.stop_ids`]).
        num_embeddings, num_positions: those of the model; None: unknown, or without a limit.

    Returns:
        The ids among the trained labels.
    """
    is_stream = not hasattr(dataset, "__len__")
    if is_stream:
        from datasets import Dataset

        dataset = Dataset.from_list(list(islice(dataset, STREAMED_ROWS)))
        is_stream = len(dataset) == STREAMED_ROWS  # a shorter one is known to its end
    if len(dataset) and "labels" not in dataset.column_names:
        return set()
    found = _find(dataset, max_length, list(stops or ()))
    problem = _problem(found, max_length, stops, num_embeddings, num_positions)
    if problem and not is_stream:
        raise InputError(f"{field} {problem}")
    if not problem and stops and found.ended_share < FEW_ENDS:
        share = f"only {found.ended_share:.0%} of the demonstrations train an end ({', '.join(stops.values())})"
        problem = f"{share}: {_why_no_end(found, max_length)}"
    if problem:
        first = f"the first {len(dataset)} rows of " if is_stream else ""
        warnings.warn(f"{first}{field} {problem}", stacklevel=3)
    return found.trained


def _find(dataset: Any, max_length: int | None, stops: list[int]) -> Found:
    found = Found()
    columns = [name for name in ("input_ids", "labels", "seq_lengths") if name in dataset.column_names]
    for table in dataset.select_columns(columns).with_format("arrow").iter(1000):
        labels, lengths = _flat(table["labels"])
        row_of = np.repeat(np.arange(len(lengths)), lengths)
        is_first = np.zeros(len(labels), dtype=bool)
        is_first[(np.cumsum(lengths) - lengths)[lengths > 0]] = True
        is_trained = (labels != IGNORED) & ~is_first  # nothing predicts the first token of a row
        is_end = is_trained & np.isin(labels, stops)
        has_end = np.zeros(len(lengths), dtype=bool)
        has_end[row_of[is_end]] = True
        documents = _flat(table["seq_lengths"])[0] if "seq_lengths" in columns else lengths
        found.rows += len(lengths)
        found.documents += len(documents)
        found.longest = max(found.longest, int(documents.max(initial=0)))
        found.cut += int(((lengths == max_length) & ~has_end).sum()) if max_length else 0
        found.ended += int(has_end.sum())
        found.ends += int(is_end.sum())
        found.trained.update(np.unique(labels[is_trained]).tolist())
        if "input_ids" in columns:
            found.highest = max(found.highest, int(_flat(table["input_ids"])[0].max(initial=0)))
    return found


def _flat(column: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of a column of lists one after the other, and the length of each list."""
    import pyarrow.compute

    values = pyarrow.compute.list_flatten(column).to_numpy()
    return values, pyarrow.compute.list_value_length(column).to_numpy()


def _problem(
    found: Found,
    max_length: int | None,
    stops: dict[int, str] | None,
    num_embeddings: int | None,
    num_positions: int | None,
) -> str:
    """Say why these rows cannot be trained on; return an empty string where nothing is wrong."""
    if not found.trained:
        cause = f"max_length={max_length}: raise it, or set it to null" if max_length else "the masks of its rows"
        return f"has nothing to learn: every row lost its completion to {cause}"
    if num_embeddings is not None and found.highest >= num_embeddings:
        return (
            f"has token {found.highest}, and the model {num_embeddings} embeddings: its tokenizer is another model's, "
            "or was enlarged without model.resize_token_embeddings"
        )
    if num_positions is not None and found.longest > num_positions:
        return f"has a row of {found.longest} tokens, and the model {num_positions} positions: set max_length to that"
    if stops and not found.ended:
        names = ", ".join(stops.values())
        return f"trains no token that ends a sample ({names}), so the model would never stop: " + _why_no_end(
            found, max_length
        )
    return ""


def _why_no_end(found: Found, max_length: int | None) -> str:
    if found.cut:
        cut = f"max_length={max_length} cuts {found.cut} of {found.rows} rows before their end"
        return f"{cut}: raise it, or set it to null"
    return (
        "the chat template ends no turn, or the masks of the rows leave its end out; assistant_only_loss: true helps "
        "where TRL has a training template, and plain text gets eos from TRL"
    )
