"""chat: tool calls and a row's own keywords reach the template as they are in the data."""

import copy
import json
from pathlib import Path

import dill
import pytest
import trl
from datasets import Dataset

from aesl_trl.models.chat import ChatWriter, template_columns, template_kwargs
from aesl_trl.models.tokens import prompt_ids
from aesl_trl.values import without_none


ASK = {"role": "user", "content": "Do."}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def tokenizer(tokenizer):
    """The tests' tokenizer with the tokens that bundled templates name."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    return tokenizer


def template(name):
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()


def calling(arguments, **more):
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    return {"role": "assistant", "tool_calls": [call], **more}


def test_none_is_dropped_at_any_depth():
    value = {"a": None, "b": [{"c": None, "d": 0}, None], "e": {"f": {"g": None}}}
    assert without_none(value) == {"b": [{"d": 0}, None], "e": {"f": {}}}


def test_keywords_of_a_row():
    row = {"prompt": "p", "tools": json.dumps([TOOL]), "chat_template_kwargs": {"thinking": False, "other": None}}
    assert template_kwargs(row, {"thinking": True, "date": "x"}) == {"tools": [TOOL], "thinking": False, "date": "x"}
    assert template_kwargs({"prompt": "p"}) == {"tools": None}
    columns = template_columns(row, {"date": "x"})
    assert columns == {"tools": [TOOL], "chat_template_kwargs": {"thinking": False, "date": "x"}}
    assert template_kwargs(columns) == template_kwargs(row, {"date": "x"})
    assert template_columns({"prompt": "p", "tools": None}) == {}


@pytest.mark.parametrize(
    ("name", "as_text", "shown"),
    [
        ("qwen2_5", False, '{"name": "add", "arguments": {"a": 1.68, "b": null}}'),
        ("gptoss", False, '{"a": 1.68, "b": null}'),
        ("glm4moe", False, "<arg_key>a</arg_key>\n<arg_value>1.68</arg_value>"),
        ("deepseekv3", True, '```json\n{"a": 1.68, "b": null}\n```'),
        ("llama3", None, ""),
    ],
)
def test_calls_are_written_alike_from_mappings_and_from_text(name, as_text, shown, tokenizer):
    """JSON text is OpenAI's own form. A null in it was written; Arrow adds none to text."""
    writer = ChatWriter(tokenizer, template(name))
    assert writer.text_arguments is as_text
    text = '{"a": 1.68, "b": null}'
    forms = [calling(text), calling(text, content=None), calling(text, content="", name=None)]
    written = {writer.apply_chat_template([ASK, message], tokenize=False) for message in forms}
    assert len(written) == 1 and shown in written.pop()
    plain = [calling('{"a": 1}'), calling({"a": 1}), calling({"a": 1, "city": None})]
    assert len({writer.apply_chat_template([ASK, message], tokenize=False) for message in plain}) == 1


def test_a_call_without_the_wrapper_is_a_call(tokenizer):
    flat = {"role": "assistant", "tool_calls": [{"name": "add", "arguments": '{"a": 1}'}]}
    text = ChatWriter(tokenizer, template("qwen2_5")).apply_chat_template([ASK, flat], tokenize=False)
    assert '{"name": "add", "arguments": {"a": 1}}' in text


def test_a_prompt_is_written_with_its_tools_and_keywords(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template("qwen3")

    def written(row):
        return tokenizer.decode(prompt_ids(tokenizer, row["prompt"], **template_kwargs(row)))

    plain = written({"prompt": [ASK], "tools": []})
    assert plain == "<|im_start|>user\nDo.<|im_end|>\n<|im_start|>assistant\n"
    assert written({"prompt": [ASK], "chat_template_kwargs": {"enable_thinking": False}}) == (
        plain + "<think>\n\n</think>\n\n"
    )
    assert '"name": "add"' in written({"prompt": [ASK], "tools": [TOOL]})


def test_the_writer_goes_to_other_processes(tokenizer):
    """`datasets.map` pickles it, and takes its hash for the cache's name."""
    writer = dill.loads(dill.dumps(ChatWriter(tokenizer, template("qwen2_5"), {"a": 1})))
    assert writer.defaults == {"a": 1} and writer.decode([40]) == tokenizer.decode([40])
    rows = Dataset.from_list([{"messages": [ASK]}])
    found = rows.map(lambda row: {"text": writer.apply_chat_template(row["messages"], tokenize=False)})
    assert "Do." in found[0]["text"]
