"""Special tokens of content, which no reward sees."""

import pytest
from tiny_models import build_tokenizer
from tokenizers import AddedToken

from aesl_trl.models.stripped import stripped_tokens, warn_of_stripped_tokens


HARMONY = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}"
    "{% if message['role'] == 'assistant' %}<|channel|>final{% endif %}\n{{ message['content'] }}<|return|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)


def with_tokens(*tokens, special=True):
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token in tokens])
    return tokenizer, tokenizer.convert_tokens_to_ids(list(tokens))


@pytest.mark.parametrize("special", [True, False])
def test_tags_among_the_labels_are_named_where_decoding_drops_them(special):
    tokenizer, ids = with_tokens("<think>", "</think>", special=special)
    turns = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "a"])
    assert stripped_tokens(tokenizer, turns) == []
    assert stripped_tokens(tokenizer, [*turns, *ids]) == (["<think>", "</think>"] if special else [])


def test_tokens_that_the_template_writes_into_an_answer_are_named():
    tokenizer, _ = with_tokens("<|channel|>", "<|return|>")
    tokenizer.chat_template = HARMONY
    assert stripped_tokens(tokenizer) == ["<|channel|>"]
    with pytest.warns(UserWarning, match=r"rewards will not see .*<\|channel\|>.*completion_ids"):
        warn_of_stripped_tokens(tokenizer)
