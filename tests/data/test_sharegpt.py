"""sharegpt: from/value turns become messages, whatever the names of the roles, or the row is named."""

import json

import pytest
from datasets import Dataset
from refusals import refused

from aesl_trl.data.checks import check_demonstrations
from aesl_trl.data.prompts import prompt_rows
from aesl_trl.data.sharegpt import as_messages


def turns(*pairs):
    return [{"from": name, "value": value} for name, value in pairs]


ASK, ANSWER = ("human", "Say a."), ("gpt", "a")
MESSAGES = [{"role": "user", "content": "Say a."}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    "conversation", [turns(ASK, ANSWER), turns(("user", "Say a."), ("assistant", "a")), MESSAGES], ids=str
)
@pytest.mark.parametrize("streaming", [False, True])
def test_turns_become_messages(conversation, streaming):
    rows = Dataset.from_list([{"conversations": conversation, "id": 3}] * 2)
    rows = as_messages(rows.to_iterable_dataset() if streaming else rows)
    assert list(rows) == [{"id": 3, "messages": MESSAGES}] * 2


def test_a_system_column_is_the_first_message():
    row = {"conversations": turns(ASK, ANSWER), "system": "Be brief."}
    (found,) = as_messages(Dataset.from_list([row]))
    assert found == {"messages": [{"role": "system", "content": "Be brief."}, *MESSAGES]}
    own = {**row, "conversations": turns(("system", "Own."), ASK, ANSWER)}
    assert [m["content"] for m in as_messages(Dataset.from_list([own]))[0]["messages"]] == ["Own.", "Say a.", "a"]
    (found,) = as_messages(Dataset.from_list([{**row, "system": ""}]))
    assert found["messages"] == MESSAGES


def test_calls_and_their_results():
    one = json.dumps({"name": "add", "arguments": {"price": 1.68}})
    row = {"conversations": turns(ASK, ("function_call", one), ("observation", "3"), ANSWER), "tools": "[]"}
    _, call, result, _ = as_messages(Dataset.from_list([row]))[0]["messages"]
    assert call["role"] == "assistant" and result["role"] == "tool" and result["content"] == "3"
    assert call["tool_calls"] == [{"type": "function", "function": {"name": "add", "arguments": '{"price": 1.68}'}}]
    refused(
        ["row 0 (from 0)", "turn 1", "a call without JSON"],
        as_messages,
        Dataset.from_list([{"conversations": turns(ASK, ("function_call", "add(1)"))}]),
    )


@pytest.mark.parametrize(
    ("conversation", "parts"),
    [
        (turns(ASK, ANSWER, ASK), ["ends with a message of the user"]),
        ([*turns(ASK), {"from": "gpt"}], ["message 1", "(assistant) has no content"]),
        (turns(ASK, ("gtp", "a")), ["turn 1 of conversations is from 'gtp'", "did you mean 'gpt'"]),
        ([], ["conversations is empty"]),
        (turns(ASK), ["no assistant message to learn"]),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_rows_that_teach_nothing_are_named(conversation, parts, streaming):
    rows = Dataset.from_list([{"conversations": turns(ASK, ANSWER)}, {"conversations": conversation}])

    def load_and_check():
        found = as_messages(rows.to_iterable_dataset() if streaming else rows, field="data")
        check_demonstrations(found, field="data")

    message = refused(["data, row 1 (from 0)", *parts], load_and_check)
    assert message.count("row 1") == 1


def test_other_rows_stay_as_they_are():
    rows = Dataset.from_list([{"messages": MESSAGES, "conversations": turns(ASK, ANSWER)}])
    assert as_messages(rows) is rows
    text = Dataset.from_list([{"text": "a"}])
    assert as_messages(text) is text


def test_prompts_of_sharegpt_rows():
    """A monitor that a user adds is given rows as they are in her file."""
    (row,) = prompt_rows([{"conversations": turns(ASK, ANSWER), "answer": 1}])
    assert row == {"prompt": MESSAGES[:1], "answer": 1}
