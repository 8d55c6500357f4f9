"""rendered: each row against TRL's own templates. What they leave out is told by words that stand nowhere else."""

import copy
import json
from pathlib import Path

import pytest
import trl
from datasets import Dataset
from refusals import refused

from aesl_trl.data.rendered import check_rendered, lost_part, template_problem
from aesl_trl.models.chat import REFUSALS, ChatWriter


# Those of vision-language models show content parts alone, which a tokenizer is not given
VISION = ("idefics3", "llava_next", "smolvlm")
TEMPLATES = {
    path.stem: path.read_text()
    for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
    if not path.stem.startswith(VISION)
}


def user(text):
    return {"role": "user", "content": text}


def said(text="", **more):
    return {"role": "assistant", "content": text, **more}


def call(**arguments):
    return [{"type": "function", "function": {"name": "lookup", "arguments": arguments}}]


RESULT = {"role": "tool", "name": "lookup", "content": "Result1"}
# Conversations, and the words that must be in what the template writes
CASES = {
    "plain": ([user("Quest1"), said("Answer1")], ["Quest1", "Answer1"]),
    "two turns": ([user("Quest1"), said("Answer1"), user("Quest2"), said("Answer2")], ["Answer1", "Answer2"]),
    "system": ([{"role": "system", "content": "Order1"}, user("Quest1"), said("Answer1")], ["Order1", "Answer1"]),
    "think": ([user("Quest1"), said("<think>\nThought1\n</think>\n\nAnswer1")], ["Thought1", "Answer1"]),
    "think twice": (
        [user("Q"), said("<think>\nThought1\n</think>\n\nA"), user("Q"), said("<think>\nThought2\n</think>\n\nA")],
        ["Thought1", "Thought2"],
    ),
    "reasoning_content": ([user("Q"), said("Answer1", reasoning_content="Thought1")], ["Thought1", "Answer1"]),
    "thinking": ([user("Q"), said("Answer1", thinking="Thought1")], ["Thought1", "Answer1"]),
    "call": ([user("Q"), said(tool_calls=call(city="Place1", count=1234))], ["lookup", "Place1", "1234"]),
    "call beside text": ([user("Q"), said("Words1", tool_calls=call(city="Place1"))], ["Words1", "Place1"]),
    "result": (
        [user("Q"), said(tool_calls=call(city="Place1")), RESULT, said("Answer1")],
        ["Place1", "Result1", "Answer1"],
    ),
    "two answers": ([user("Q"), said("Answer1"), said("Answer2")], ["Answer1", "Answer2"]),
}


@pytest.fixture(scope="module")
def bare(tokenizer):
    """The tokenizer with a beginning, for tests that change its template."""
    bare = copy.deepcopy(tokenizer)
    bare.add_special_tokens({"bos_token": "<s>"})
    return bare


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_a_template_leaves_out_is_found_and_nothing_else(name, bare):
    """A row is in order if and only if all of its words are in what the template writes."""
    writer = ChatWriter(bare, TEMPLATES[name])
    for case, (messages, words) in CASES.items():
        try:
            text = writer.apply_chat_template(messages, tokenize=False)
        except REFUSALS:
            expected = "the chat template refuses it: "
        else:
            expected = "" if all(word in text for word in words) else "the chat template leaves out "
        problem = template_problem({"messages": messages}, writer)
        assert problem.startswith(expected) and bool(problem) == bool(expected), (case, problem)


@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "gemma3", "glm4moe", "cohere", "phi3", "gptoss"])
def test_spelling_is_no_loss(name, bare):
    """White space, LaTeX, markup and other languages stay; a template may trim and indent them."""
    text = "  So $x_1 = \\frac{1}{2}$ & <b>é</b>\n\n\n\tthen 日本\n\\boxed{4}  \n"
    writer = ChatWriter(bare, TEMPLATES[name])
    assert template_problem({"prompt": [user(f"\n {text}")], "completion": [said(text)]}, writer) == ""


@pytest.mark.parametrize(
    "name", ["qwen2_5", "qwen3_5_think", "glm4moe", "gemma4", "lfm2_v2", "llama3_1", "deepseekv3"]
)
@pytest.mark.parametrize("as_text", [False, True])
def test_arguments_may_be_spelt_in_each_templates_way(name, as_text, bare):
    arguments = {"quote": 'a "b"\n', "other": "日本 é", "number": 1.68, "flag": True, "nested": {"list": [1, "x y"]}}
    calls = call(**arguments)
    if as_text:
        calls[0]["function"]["arguments"] = json.dumps(arguments)
    assert template_problem({"messages": [user("Q"), said(tool_calls=calls)]}, ChatWriter(bare, TEMPLATES[name])) == ""


def test_reasoning_in_a_prompt_is_not_learnt(bare):
    """Qwen3's template drops it by design; in `messages` it would be trained."""
    messages, _ = CASES["think twice"]
    writer = ChatWriter(bare, TEMPLATES["qwen3"])
    assert template_problem({"prompt": messages[:-1], "completion": messages[-1:]}, writer) == ""
    assert "leaves out the reasoning of message 1 (assistant)" in template_problem({"messages": messages}, writer)


def test_the_parts_are_sought_in_order():
    messages = [user("two"), said("one"), user("one"), said("two")]
    assert lost_part(messages, "two one one two") == ""
    assert lost_part(messages, "two one two") == 'the text of message 2 (user), "one"'
    assert lost_part([user("q"), {"role": "system", "content": "s"}, said("a")], "s q a") == ""


def test_the_row_and_what_to_do_are_named(bare):
    good = {"messages": CASES["plain"][0]}
    bare.chat_template = TEMPLATES["deepseek_r1_distill"]
    rows = Dataset.from_list([good] * 15 + [{"messages": CASES["think"][0]}, good])
    parts = ["data, row 15 (from 0)", "the reasoning of message 1", '"Thought1"', "assistant_only_loss: true keeps it"]
    refused([*parts, "chat_template_path"], check_rendered, rows, bare, field="data")
    check_rendered(rows, bare, field="data", chat_template=TEMPLATES["deepseek_r1_distill_training"])
    bare.chat_template = TEMPLATES["qwen2_5"]
    message = refused(
        ["row 0", "reasoning_content"],
        check_rendered,
        [{"messages": CASES["reasoning_content"][0]}],
        bare,
        field="data",
    )
    assert "assistant_only_loss" not in message  # TRL's training template of Qwen2.5 leaves it out too
    bare.chat_template = TEMPLATES["gemma"]
    rows = [good] * 9 + [{"prompt": CASES["system"][0][:2]}]
    refused(["row 9 (from 0)", "refuses it: System role not supported"], check_rendered, rows, bare, field="data")
    refused(["row 0"], check_rendered, [{"prompt": [user("a"), user("b")]}], bare, field="data")


def test_only_the_first_rows_of_a_stream_are_read(bare):
    def endless():
        while True:
            yield {"messages": CASES["plain"][0]}

    from datasets import IterableDataset

    check_rendered(IterableDataset.from_generator(endless), bare, field="data", chat_template=TEMPLATES["qwen3"])


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        (
            {"prompt": [user("q"), said("So <think>")], "completion": [said("a")]},
            ["the prompt ends with the assistant's words", "begin the completion with them"],
        ),
        ({"prompt": [user("q"), said("So <think>")]}, ["the prompt ends with", "as text that ends with them"]),
        ({"prompt": [user("q")], "tools": "add(a)"}, ["tools is text that is not JSON"]),
        ({"prompt": [user("q")], "chat_template_kwargs": "x"}, ["chat_template_kwargs is a str", "a mapping"]),
        (
            {"messages": [user("q"), said(tool_calls=[{"function": {"name": "f", "arguments": "a=1"}}])]},
            ["the arguments of a tool call of message 1", "no JSON text"],
        ),
    ],
)
def test_rows_that_no_template_can_write(row, parts, bare):
    refused(["row 0", *parts], check_rendered, [row], bare, field="data", chat_template=TEMPLATES["qwen2_5"])


def test_text_token_ids_and_images_pass(bare):
    rows = [{"prompt": "q", "completion": "a"}, {"text": "a"}, {"messages": [user("q"), said("a")], "image": object()}]
    check_rendered(rows, bare, field="data", chat_template="{{ raise_exception('no') }}")
    ids = Dataset.from_list([{"input_ids": [1], "labels": [1]}])
    check_rendered(ids, bare, field="data", chat_template="{{ raise_exception('no') }}")


def test_processes_share_the_rows(bare, monkeypatch):
    """`dataset_num_proc` is handed on to `datasets.map`; one process does here what many would."""
    rows = Dataset.from_list([{"messages": CASES[name][0]} for name in ("plain", "two turns", "think twice")])
    asked, run = [], Dataset.map

    def mapped(self, *args, num_proc, **kwargs):
        asked.append(num_proc)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(Dataset, "map", mapped)
    how = {"field": "data", "chat_template": TEMPLATES["qwen3"], "num_proc": 4}
    refused(["row 2 (from 0)", '"Thought1"'], check_rendered, rows, bare, **how)
    assert asked == [4]


@pytest.mark.parametrize(
    ("written", "lost"),
    [
        (r"""q Let me look get(x='it\'s') "{\"t\": 22}" done""", ""),
        (r"""q get(x='it\'s') {"t": 22} Let me look done""", ""),
        (r"""q Let me look get(x='it\'s') done""", "the text of message 2 (tool)"),
        (r"""q Let me look get() {"t": 22} done""", "the arguments of the tool call of message 1"),
    ],
    ids=["JSON in JSON", "text behind the result", "no result", "no argument"],
)
def test_calls_and_results_are_found_as_templates_spell_them(written, lost):
    call = {"type": "function", "function": {"name": "get", "arguments": {"x": "it's"}}}
    asking = {**said("Let me look"), "tool_calls": [call]}
    messages = [user("q"), asking, {"role": "tool", "content": '{"t": 22}'}, said("done")]
    assert lost_part(messages, written).startswith(lost) and bool(lost_part(messages, written)) == bool(lost)


@pytest.mark.parametrize("system", ["/no_think", "Be brief. /think Please."])
def test_a_switch_may_leave_the_system_message(system):
    messages = [{"role": "system", "content": system}, user("q")]
    assert lost_part(messages, "Be brief.  Please. q") == ""
    assert (
        lost_part([{"role": "system", "content": "Be long."}, user("q")], "q")
        == 'the text of message 0 (system), "Be long."'
    )
