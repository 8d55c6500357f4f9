"""Prompts as token ids, and the token that ends an assistant's turn."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import build_tokenizer
from tokenizers import AddedToken

from aesl_trl.errors import InputError
from aesl_trl.models.tokens import left_pad, prompt_ids, stop_ids, turn_end_id


IM_END, END_OF_TEXT = 256, 257
CHAT = [{"role": "user", "content": "hi"}]


def test_a_prompt_is_encoded_as_text_or_by_the_template(tokenizer):
    processor = SimpleNamespace(
        tokenizer=tokenizer, chat_template=tokenizer.chat_template, apply_chat_template=tokenizer.apply_chat_template
    )
    written = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    for processing_class in (tokenizer, processor):
        assert tokenizer.decode(prompt_ids(processing_class, "hi")) == "hi"
        assert tokenizer.decode(prompt_ids(processing_class, CHAT)) == written


def test_a_conversation_needs_a_template():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="the prompts are conversations, and the tokenizer has no chat template"):
        prompt_ids(tokenizer, CHAT)


def test_rows_are_padded_on_the_left():
    ids, mask = left_pad([[5], [1, 2, 3]], 9, "cpu")
    assert ids.tolist() == [[9, 9, 5], [1, 2, 3]] and mask.tolist() == [[0, 0, 1], [1, 1, 1]]
    assert ids.dtype == torch.long


PLAIN = "{% for message in messages %}{{ message['content'] + '\n' }}{% endfor %}"
SILENT = "{% for message in messages %}{{ message['role'] }}{% endfor %}"
REFUSING = "{{ raise_exception('only one message') }}"


@pytest.mark.parametrize(
    ("template", "error"), [(SILENT, InputError), (REFUSING, Exception), (PLAIN, None), (None, None)]
)
def test_a_template_that_does_not_end_turns(template, error):
    tokenizer = build_tokenizer()
    assert turn_end_id(tokenizer) == turn_end_id(tokenizer, strict=True) == IM_END
    tokenizer.chat_template = template
    assert turn_end_id(tokenizer) is None
    if error is None:
        assert turn_end_id(tokenizer, strict=True) is None
        return
    with pytest.raises(error, match="does not show the assistant's text|only one message"):
        turn_end_id(tokenizer, strict=True)


def test_the_end_of_a_turn_joins_what_the_files_name(tokenizer):
    base = build_tokenizer()
    base.eos_token = "<|endoftext|>"
    assert stop_ids(base, END_OF_TEXT) == [END_OF_TEXT, IM_END]
    assert stop_ids(base, None) == [END_OF_TEXT, IM_END]
    assert stop_ids(tokenizer, [7, END_OF_TEXT]) == [IM_END, 7, END_OF_TEXT]
    base.chat_template = None
    assert stop_ids(base, END_OF_TEXT) == [END_OF_TEXT]


def test_the_end_of_a_turn_need_not_be_marked_as_special():
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([AddedToken("<end_of_turn>", special=False, normalized=False)])
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<end_of_turn>")
    assert turn_end_id(tokenizer) == tokenizer.convert_tokens_to_ids("<end_of_turn>")


PARTS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}<|im_end|>\n{% endfor %}"
)


def test_a_template_that_shows_parts_of_content_alone_ends_turns_too():
    """Templates of vision-language models; where the content is text, they show nothing or fail."""
    tokenizer = build_tokenizer()
    for template in (PARTS, PARTS.replace("part['text']", "part['text'].strip()")):
        tokenizer.chat_template = template
        assert turn_end_id(tokenizer, strict=True) == IM_END
