"""Compare each row as the chat template writes it with what the row says: nothing that it teaches may be left out.

Templates drop reasoning of earlier turns, calls, results or text without a word, and refuse roles that they do not
know. We look for every part of every message in the written text, in order, whatever the white space between words.
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from trl.chat_template_utils import get_training_chat_template

from ..errors import InputError, in_one_line
from ..models.chat import IMAGES, REFUSALS, ChatWriter, arguments_of, has_images, template_kwargs
from ..values import without_none
from .checks import peek


# Keys under which data keep the reasoning of a message beside its content
REASONING = ("reasoning_content", "reasoning", "thinking")
THINK = re.compile(r"</?think>")
SWITCHES = re.compile(r"/(?:no_think|think|system_override)\b")  # SmolLM3's template reads them and takes them out
TEXT = "the text"
LEAVES_OUT = "the chat template leaves out"
COLUMNS = ("prompt", "completion", "messages", "tools", "chat_template_kwargs", *IMAGES)
_passed: set[tuple] = set()  # datasets and templates that were looked at; the trainer asks again what a command asked


def check_rendered(
    rows: Any,
    processing_class: Any,
    *,
    field: str,
    chat_template: str | None = None,
    defaults: dict | None = None,
    num_proc: int | None = None,
    start: int = 0,
) -> None:
    """Refuse the first row of conversations that the chat template refuses, or of which it leaves a part out.

    A row has `messages`, `prompt` and `completion`, or `prompt` alone. Rows of text, and rows with images, pass. Of a
    stream we read the first rows.

    Args:
        field: the setting that names the rows.
        chat_template: replaces the template of `processing_class`, as TRL's training template does.
        defaults: keywords for the template; those of a row's `chat_template_kwargs` come before them.
        num_proc: processes that share a `Dataset`.
        start: the number of the first row.
    """
    used = chat_template or processing_class.chat_template
    key = (getattr(rows, "_fingerprint", None), str(used), str(defaults))
    if used is None or key in _passed:
        return
    writer = ChatWriter(processing_class, chat_template, defaults)
    for number, problem in _problems(rows, writer, num_proc, field):
        if problem:
            if problem.startswith(LEAVES_OUT):
                is_kept = chat_template is None and _training_template_keeps(rows, number, processing_class, defaults)
                remedy = "assistant_only_loss: true keeps it (TRL's training template), or " if is_kept else ""
                problem += f": {remedy}take a template that writes it (chat_template_path), or drop it from the rows"
            raise InputError(f"{field}, row {start + number} (from 0): {problem}")
    if key[0]:
        _passed.add(key)


def _problems(rows: Any, writer: ChatWriter, num_proc: int | None, field: str) -> Iterator[tuple[int, str]]:
    if getattr(rows, "column_names", None):
        if {*IMAGES} & {*rows.column_names}:  # such rows are TRL's, and reading them decodes the images
            return iter(())
        rows = rows.select_columns([name for name in COLUMNS if name in rows.column_names])
        if not rows.column_names:  # token ids
            return iter(())
    if num_proc and num_proc > 1 and hasattr(rows, "__len__") and not isinstance(rows, list):
        found = rows.map(
            _problem_column, fn_kwargs={"writer": writer}, remove_columns=rows.column_names, num_proc=num_proc
        )
        return enumerate(found["problem"])
    return ((number, template_problem(row, writer)) for number, row in enumerate(peek(rows, field)[1]))


def _problem_column(row: dict, writer: ChatWriter) -> dict:
    return {"problem": template_problem(row, writer)}


def template_problem(row: dict, writer: ChatWriter) -> str:
    """Say what the template does to `row` that it should not; return an empty string where there is no such thing."""
    before, after = row.get("prompt"), row.get("completion")
    before, after = ([], row.get("messages")) if before is None else (before, after or [])
    if not isinstance(before, list) or not isinstance(after, list) or has_images(row):
        return ""
    messages = without_none([*before, *after])
    if problem := _prefilled(before, after) or _unreadable(row, messages):
        return problem
    try:
        text = writer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=not after, **template_kwargs(row)
        )
    except REFUSALS as error:
        return f"the chat template refuses it: {in_one_line(error)}"
    lost = lost_part(messages, text, len(before))
    return f"{LEAVES_OUT} {lost}" if lost else ""


def _prefilled(before: list[dict], after: list[dict]) -> str:
    """Refuse a prompt that ends with the assistant's words: TRL closes them, and opens another turn behind them."""
    if not before or before[-1].get("role") != "assistant":
        return ""
    remedy = "begin the completion with them" if after else "give the prompt as text that ends with them"
    return f"the prompt ends with the assistant's words, and the model would begin another turn: {remedy}"


def _unreadable(row: dict, messages: list[dict]) -> str:
    """Say what of a row's columns for the template, or of its calls, cannot be read."""
    if isinstance(row.get("tools"), str):
        try:
            json.loads(row["tools"])
        except ValueError as error:
            return f"tools is text that is not JSON: {in_one_line(error)}"
    if not isinstance(row.get("chat_template_kwargs") or {}, dict):
        return f"chat_template_kwargs is a {type(row['chat_template_kwargs']).__name__}; it must be a mapping"
    for number, message in enumerate(messages):
        for call in message.get("tool_calls") or []:
            if not isinstance(call, dict) or not isinstance(arguments_of(call), dict):
                return f"the arguments of a tool call of message {number} are no mapping, and no JSON text of one"
    return ""


def lost_part(messages: list[dict], text: str, num_prompt: int = 0) -> str:
    """Name the first part of `messages` that is not in `text`, the conversation as written; "" where all is there.

    The first `num_prompt` messages are the prompt. Reasoning in it may be left out: a template does so by design, and
    the prompt is not learnt.
    """
    # Most templates keep white space, and the first look is the faster one
    return _lost_part(messages, text, num_prompt, str.strip) and _lost_part(messages, text, num_prompt, _packed)


def _lost_part(messages: list[dict], text: str, num_prompt: int, pack: Callable[[str], str]) -> str:
    text, place = pack(text), 0
    for number, message in enumerate(messages):
        end = place
        for part, shown, spellings in _parts(message, is_learnt=number >= num_prompt):
            # A system message may be written anywhere, as may a part within its message
            start = 0 if message["role"] == "system" else place
            found = [(text.find(spelling, start), spelling) for spelling in map(pack, spellings)]
            ends = [at + len(spelling) for at, spelling in found if at >= 0]
            if not ends:
                shown = json.dumps(" ".join(shown.split())[:40], ensure_ascii=False)
                return f"{part} of message {number} ({message['role']}), {shown}"
            if part != TEXT or not message.get("tool_calls"):  # beside a call it may stand behind the call's result
                end = max(end, min(ends))
        place = place if message["role"] == "system" else end
    return ""


def _parts(message: dict, is_learnt: bool) -> Iterator[tuple[str, str, list[str]]]:
    """Yield what the written message must hold: a name for each part, the part, and the ways to spell it."""
    if is_learnt:
        for key in REASONING:
            if isinstance(message.get(key), str) and message[key].strip():
                yield key, message[key], [message[key]]
    content = message.get("content") or ""
    texts = [content] if isinstance(content, str) else [part.get("text") or "" for part in content]
    for text in texts:
        *thought, answer = THINK.split(text)
        for piece in thought if is_learnt else []:
            if piece.strip():
                yield "the reasoning", piece, [piece]
        if answer.strip():
            yield TEXT, answer, _text_spellings(message["role"], answer)
    for call in message.get("tool_calls") or []:
        name = call.get("function", call).get("name") or ""
        yield "the tool call", name, [name]
        for leaf in _leaves(arguments_of(call)):
            yield "the arguments of the tool call", str(leaf), _spellings(leaf)


def _text_spellings(role: str, text: str) -> list[str]:
    """Return the ways to write a message's text: a tool's result may be JSON, a switch leaves a system message."""
    if role == "system":
        return [text, SWITCHES.sub("", text)]
    return _spellings(text) if role in ("tool", "ipython") else [text]


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _spellings(leaf: Any) -> list[str]:
    """Return `leaf` as text, as JSON with and without escapes, and as Python writes it."""
    if isinstance(leaf, str):
        quoted = [json.dumps(leaf, ensure_ascii=False), json.dumps(leaf), repr(leaf)]
        single = leaf.replace("'", "\\'")  # in single quotes, whatever Python would take
        written = [leaf, *(text[1:-1] for text in quoted), single, repr('"' + leaf)[2:-1]]
    else:
        written = [json.dumps(leaf), str(leaf)]
    return list(dict.fromkeys(written))


def _packed(text: str) -> str:
    return "".join(text.split())


def _training_template_keeps(rows: Any, number: int, processing_class: Any, defaults: dict | None) -> bool:
    """Say whether the template with which TRL trains on the assistant's turns alone writes all of that row."""
    try:
        template = get_training_chat_template(processing_class)
    except ValueError:  # TRL has none for this template
        return False
    row = next(row for index, row in enumerate(rows) if index == number)
    return template is not None and not template_problem(row, ChatWriter(processing_class, template, defaults))
