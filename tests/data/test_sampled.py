"""What can be known of a model's samples before it loads: their room, and rewards that they cannot earn."""

import warnings

import pytest
from refusals import refused
from tiny_models import build_tokenizer
from tokenizers import AddedToken

from aesl_trl.data.sampled import check_rows_fit, check_samples, opened_by_template, warn_of_unrewarded


OPENING = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n"
ASK = [{"role": "user", "content": "q"}]


def opening(tag):
    """A tokenizer whose template opens each answer with `tag`, as R1's does."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(OPENING, OPENING + f"<{tag}>\n")
    assert f"<{tag}>" in tokenizer.chat_template
    return tokenizer


def asks_for(tag):
    def reward(completions, **kwargs):
        return [float(text[0]["content"].startswith(f"<{tag}>")) for text in completions]

    return reward


def says_yes(completions, **kwargs):
    return [float("yes" in (text if isinstance(text, str) else text[0]["content"])) for text in completions]


def needs_solution(completions, solution, **kwargs):
    raise AssertionError("it is not asked")


def test_a_tag_that_the_template_writes_cannot_be_earned():
    row = {"prompt": ASK}
    asked = [says_yes, asks_for("plan"), asks_for("think"), needs_solution]
    (line,) = opened_by_template(opening("plan"), row, asked)
    assert "'reward' cannot be earned" in line and "ends with <plan>" in line
    assert opened_by_template(build_tokenizer(), row, asked) == []


@pytest.mark.slow
def test_trls_format_reward_cannot_be_earned_where_the_template_opens_the_thought():
    from trl.rewards import think_format_reward

    (line,) = opened_by_template(opening("think"), {"prompt": ASK}, [think_format_reward])
    assert "'think_format_reward' cannot be earned" in line
    assert opened_by_template(build_tokenizer(), {"prompt": ASK}, [think_format_reward]) == []


def test_samples_need_room_and_a_reward_that_they_can_earn():
    how = {"field": "rows", "setting": "max_new_tokens"}
    tokenizer = opening("plan")
    refused(["9 positions", "max_new_tokens=4"], check_samples, tokenizer, 9, [{"prompt": ASK}], [says_yes], 4, **how)
    with pytest.warns(UserWarning, match="cannot be earned"):
        check_samples(tokenizer, None, [{"prompt": ASK}], [asks_for("plan")], 4, **how)


def test_a_prompt_beyond_any_length_is_refused_before_the_model_loads():
    """A rotary model has no limit of its own: this one took 11 GB."""
    rows = [{"prompt": ASK}, {"prompt": "9" * 200_000}]
    parts = ["held-out: the prompt of row 1 (from 0) has 200000 tokens, and at most 131072 are read at once: take"]
    how = {"field": "held-out", "setting": "max_new_tokens"}
    refused(parts, check_samples, build_tokenizer(), None, rows, [says_yes], 4, **how)
    check_samples(build_tokenizer(), None, [{"prompt": ASK}, {"prompt": "9" * 131_072}], [says_yes], 4, **how)


def test_demonstrations_that_earn_nothing_as_samples_are_said():
    """As text the demonstration has its tags; as special tokens they are lost when the sample is decoded."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([AddedToken(tag, special=True, normalized=False) for tag in ("<plan>", "</plan>")])
    rows = [{"prompt": ASK, "completion": [{"role": "assistant", "content": "<plan>ok</plan>yes"}]}] * 3
    messages = [{"messages": row["prompt"] + row["completion"]} for row in rows]
    for data in (rows, messages):
        with pytest.warns(UserWarning, match="'reward' gives 0 to each of 3 demonstrations.*'okyes'"):
            warn_of_unrewarded(tokenizer, data, [asks_for("plan"), needs_solution])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_unrewarded(build_tokenizer(), rows, [asks_for("plan"), says_yes])
        warn_of_unrewarded(tokenizer, [{"text": "no prompt"}], [asks_for("plan")])
        warn_of_unrewarded(tokenizer, [{"messages": messages[0]["messages"][1:]}], [asks_for("plan")])
        warn_of_unrewarded(tokenizer, [{"prompt": "a", "completion": " yes"}], [says_yes])


@pytest.mark.parametrize(
    "row",
    [
        {"text": "a" * 9},
        {"prompt": "aaaa", "completion": "aaaaa"},
        {"input_ids": [1] * 10},
    ],
)
def test_a_demonstration_longer_than_the_models_positions_is_refused(row):
    """Nine characters and eos are ten tokens."""
    tokenizer, short = build_tokenizer(), {key: value[:1] for key, value in row.items()}
    check_rows_fit(tokenizer, 10, [row], None, "text")
    check_rows_fit(tokenizer, 9, [row], 9, "text")  # cut by max_length
    check_rows_fit(tokenizer, None, [row], None, "text")
    parts = ["dataset_name, row 1 (from 0) has 10 tokens", "the model 9 positions", "max_length to 9"]
    refused(parts, check_rows_fit, tokenizer, 9, [short, row], None, "text")
