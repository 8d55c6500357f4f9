"""prompts: prompts from rows, and none that is trained on."""

import pytest
from datasets import Dataset
from refusals import refused

from aesl_trl.data.prompts import check_held_out, prompt_rows


ROWS = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(5)]
CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize("streaming", [False, True])
def test_prompts_that_are_trained_on(streaming):
    """Counted by prompt, whether it is a column or the beginning of a conversation."""

    def check(train, held_out):
        train = Dataset.from_list(train)
        prompts = prompt_rows(Dataset.from_list(held_out))
        check_held_out(train.to_iterable_dataset() if streaming else train, prompts, field="held_out")

    check(ROWS, [{"prompt": "p"}, {"prompt": "p0 "}])
    check([{"text": "p0"}], [{"prompt": "p0"}])
    parts = ["2 of 3 prompts of held_out are in dataset_name too", "the first is row 1 (from 0), 'p1'"]
    refused(parts, check, ROWS, [{"prompt": "q"}, {"prompt": "p1"}, {"prompt": "p4"}])
    other = [{"role": "user", "content": "r"}]
    refused(["1 of 2", "'q'"], check, [{"messages": CHAT}], [{"prompt": other}, {"prompt": CHAT[:1]}])
    check([{"messages": CHAT}], [{"messages": [*other, CHAT[1]]}])


def test_prompt_rows_from_prompts():
    rows = prompt_rows(Dataset.from_list([{"prompt": f"p{i}", "answer": i} for i in range(5)]), 2)
    assert rows == [{"prompt": "p0", "answer": 0}, {"prompt": "p1", "answer": 1}]


def test_prompt_rows_from_messages():
    system = {"role": "system", "content": "s"}
    tool = {"role": "assistant", "content": "x", "tool_calls": "t"}
    turns = [[system, *CHAT], [*CHAT, *CHAT], CHAT[:1], [CHAT[0], tool]]
    rows = prompt_rows(
        Dataset.from_list([{"messages": messages, "answer": 1} for messages in turns]).to_iterable_dataset()
    )
    assert [row["prompt"] for row in rows] == [[system, CHAT[0]], [*CHAT, CHAT[0]], CHAT[:1], CHAT[:1]]
    assert all(row["answer"] == 1 and "messages" not in row for row in rows)


def test_prompt_rows_refuses():
    refused(["has no rows"], prompt_rows, Dataset.from_list(ROWS).select([]), 3)
    refused(["no prompts", "text"], prompt_rows, Dataset.from_list([{"text": "a"}]), 3)
