"""Write conversations by a chat template: tool calls as they are in the data, with what a row says of its template.

TRL hands messages to the template as Arrow returns them, which adds `None` to every call that lacks an argument of
another call. Templates also differ in how they want a call: with arguments as a mapping, or as JSON text.
"""

import json
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from transformers import ProcessorMixin
from trl.data_utils import prepare_multimodal_messages

from ..values import without_none


IMAGES = ("image", "images")  # the columns in which TRL looks for them
# What a template raises on a conversation that it cannot write
REFUSALS = (TemplateError, TypeError, ValueError, KeyError, AttributeError)
# A call by which we learn how a template wants arguments. Where a mapping and text both do, both give the same text
CALL = {"type": "function", "function": {"name": "convert", "arguments": {"amount": 1234, "city": "Rome"}}}


def has_images(row: dict) -> bool:
    return any(row.get(name) for name in IMAGES)


def template_kwargs(row: dict, defaults: dict | None = None) -> dict:
    """Return the keywords with which the template writes `row`: its tools, and its own keywords over `defaults`.

    TRL's SFTTrainer reads the same two columns: `tools`, a list or its JSON text, and `chat_template_kwargs`.
    """
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return {"tools": tools, **(defaults or {}), **without_none(row.get("chat_template_kwargs") or {})}


def template_columns(row: dict, defaults: dict | None = None) -> dict:
    """Return the columns of `row` from which [`template_kwargs`] makes the same keywords without the defaults."""
    kwargs = template_kwargs(row, defaults)
    found = {"tools": kwargs.pop("tools"), "chat_template_kwargs": kwargs}
    return {column: value for column, value in found.items() if value}


def arguments_of(call: dict) -> Any:
    """Return the arguments of a tool call: a mapping, or the text as it stands where it is not JSON of a mapping."""
    arguments = call.get("function", call).get("arguments") or {}
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except ValueError:
            return arguments
        return parsed if isinstance(parsed, dict) else arguments
    return arguments


class ChatWriter:
    """A tokenizer whose `apply_chat_template` brings a conversation into the form that its template wants.

    It stands in for the tokenizer where TRL prepares rows. `defaults` are keywords for the template, which the
    keywords of a call replace.
    """

    def __init__(self, processing_class, chat_template: str | None = None, defaults: dict | None = None):
        self.processing_class = processing_class
        self.chat_template_used = chat_template
        self.defaults = defaults or {}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # pickle asks for these before there is a processing_class
            raise AttributeError(name)
        return getattr(self.processing_class, name)

    def __call__(self, *args, **kwargs):
        return self.processing_class(*args, **kwargs)

    def apply_chat_template(self, conversation: list[dict], tools: list | None = None, **kwargs) -> Any:
        kwargs = {"chat_template": self.chat_template_used, **self.defaults, **without_none(kwargs)}
        tools = without_none(tools) or None  # a template may announce tools for an empty list
        return self.processing_class.apply_chat_template(self.written(conversation), tools=tools, **kwargs)

    def written(self, messages: list[dict]) -> list[dict]:
        """Return the messages without keys that hold None, and with their tool calls as the template wants them."""
        messages = without_none(messages)
        if isinstance(self.processing_class, ProcessorMixin):
            messages = prepare_multimodal_messages(messages)  # as TRL does: such templates show content parts alone
        if not any(message.get("tool_calls") for message in messages):
            return messages
        return [_with_calls(message, bool(self.text_arguments)) for message in messages]

    @cached_property
    def text_arguments(self) -> bool | None:
        """Whether the template wants the arguments of a call as JSON text; None where it writes no calls."""
        ask, call = {"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [CALL]}
        for as_text in (False, True):
            try:
                text = self.processing_class.apply_chat_template(
                    [ask, _with_calls(call, as_text)], tokenize=False, chat_template=self.chat_template_used
                )
            except REFUSALS:
                continue
            # JSON text within JSON, and a mapping printed as Python prints it, are not what was written
            if all(word in text for word in ("convert", "1234", "Rome")) and not any(
                wrong in text for wrong in ('\\"city', "'city'")
            ):
                return as_text
        return None


def _with_calls(message: dict, as_text: bool) -> dict:
    """Bring the tool calls of `message` into form. Beside a call the content must be there, or some templates fail."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = arguments_of(call)
        if as_text and not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        place = {**call.get("function", call), "arguments": arguments}
        calls.append({**call, "function": place} if "function" in call else place)
    return {"content": "", **message, "tool_calls": calls}
