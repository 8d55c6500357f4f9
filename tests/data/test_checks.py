"""checks: one line for each row that SFT or RL could not use."""

import re

import pytest
from datasets import Dataset, IterableDataset
from hypothesis import given
from hypothesis import strategies as st
from refusals import refused

from aesl_trl.data.checks import check_demonstrations, check_prompts, checked_when_read


CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    "row",
    [
        {"text": "a"},
        {"messages": CHAT},
        {"prompt": "", "completion": "c"},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        {"input_ids": [1, 2]},
        {"conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]},
        {"messages": [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]},
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_good_demonstrations(row, streaming):
    dataset = Dataset.from_list([row] * 3)
    check_demonstrations(dataset.to_iterable_dataset() if streaming else dataset)


GOOD = {"prompt": "p", "completion": "c"}


@pytest.mark.parametrize(
    "rows, parts",
    [
        ([GOOD, GOOD, {"prompt": "p", "completion": None}], ["row 2 (from 0)", "completion is missing"]),
        ([GOOD, {"prompt": "p", "completion": ""}], ["row 1", "completion is empty"]),
        ([GOOD, {"prompt": None, "completion": "c"}], ["row 1", "prompt is missing"]),
        ([{"prompt": "p", "completion": 3}], ["row 0", "completion is an int"]),
        ([{"prompt": CHAT[:1], "completion": "a"}], ["row 0", "prompt is a list of messages and completion text"]),
        ([{"prompt": CHAT[:1], "completion": []}], ["row 0", "completion is empty"]),
        ([{"messages": CHAT}, {"messages": CHAT[:1]}], ["row 1", "no assistant message"]),
        ([{"messages": CHAT}, {"messages": []}], ["row 1", "messages is empty"]),
        ([{"messages": [*CHAT, CHAT[0]]}], ["row 0", "messages ends with a message of the user"]),
        (
            [{"messages": [CHAT[0], {"role": "assistant", "content": ""}]}],
            ["row 0", "the last message of messages is"],
        ),
        (
            [{"messages": [{"role": "user", "content": None}, CHAT[1]]}],
            ["message 0 of messages (user) has no content"],
        ),
        ([{"prompt": [{"role": "user", "content": None}], "completion": CHAT[1:]}], ["message 0 of prompt (user)"]),
        ([{"text": " \n"}], ["row 0", "text is blank"]),
        ([GOOD, {"prompt": "p" * 2**22, "completion": "c"}], ["row 1", f"it has {2**22 + 1} characters"]),
        ([{"messages": [{"content": "q"}]}], ["row 0", "without a role"]),
        ([{"text": "a"}, {"text": ""}], ["row 1", "text is empty"]),
        ([{"text": "a"}, {"text": None}], ["row 1", "text is missing"]),
        ([{"prompt": "p", "completions": "c"}], ["needs", "its columns are prompt, completions", "'completion'"]),
        ([{"question": "p", "answer": "c"}], ["no demonstrations", "its columns are question, answer"]),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_bad_demonstrations(rows, parts, streaming):
    dataset = Dataset.from_list(rows)
    dataset = dataset.to_iterable_dataset() if streaming else dataset
    refused([*parts, "train_rows"], check_demonstrations, dataset, field="train_rows")


def test_text_field():
    check_demonstrations(Dataset.from_list([{"body": "a"}]), text_field="body")
    refused(["body"], check_demonstrations, Dataset.from_list([{"text": "a"}]), text_field="body")


def test_empty_dataset():
    refused(["dataset_name is empty"], check_demonstrations, Dataset.from_list([GOOD]).select([]))
    empty = IterableDataset.from_generator(lambda: iter(()))
    refused(["dataset_name is empty"], check_demonstrations, empty)


def test_streaming_looks_at_the_first_rows_only():
    def endless():
        while True:
            yield GOOD

    check_demonstrations(IterableDataset.from_generator(endless))


def test_the_rest_of_a_stream_is_checked_as_it_is_read():
    rows = [GOOD] * 70 + [{**GOOD, "completion": None}]
    stream = checked_when_read(Dataset.from_list(rows).to_iterable_dataset(), check_demonstrations, field="data")
    assert stream.column_names == ["prompt", "completion"]
    assert len(list(stream.take(68))) == 68  # datasets reads a row ahead
    refused(["data, row 70 (from 0): completion is missing"], list, stream)


@given(st.lists(st.booleans(), min_size=1, max_size=30))
def test_the_first_bad_row_is_named(good):
    dataset = Dataset.from_list([{"prompt": "p", "completion": "c" if ok else ""} for ok in good])
    if all(good):
        check_demonstrations(dataset)
    else:
        message = refused(["completion is empty"], check_demonstrations, dataset)
        assert int(re.search(r"row (\d+)", message).group(1)) == good.index(False)


def test_prompts():
    check_prompts(Dataset.from_list([{"prompt": "p", "answer": 1}]))
    check_prompts(Dataset.from_list([{"messages": CHAT}]))
    refused(["no prompts", "'prompt'"], check_prompts, Dataset.from_list([{"prompts": "p"}]))
    refused(["row 1", "prompt is empty"], check_prompts, Dataset.from_list([{"prompt": "p"}, {"prompt": ""}]))
