"""Prompts as token ids, and the token that ends an assistant's turn."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import build_tokenizer

from aesl_trl.errors import InputError
from aesl_trl.models.tokens import left_pad, prompt_ids, stop_at_turn_end, stop_ids, turn_end_id


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
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=END_OF_TEXT))
    base = build_tokenizer()
    base.eos_token = "<|endoftext|>"
    assert stop_ids(base, model) == [END_OF_TEXT] and stop_ids(tokenizer, model) == [IM_END, END_OF_TEXT]
    stop_at_turn_end(model, base)
    assert model.generation_config.eos_token_id == [END_OF_TEXT, IM_END]
    stop_at_turn_end(model, base)
    assert model.generation_config.eos_token_id == [END_OF_TEXT, IM_END]
