"""GenerateEngine: what is recorded of each token, and what happens when memory or `generate` fails.

Several processes: test_groups_processes.py.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_draws import PROMPTS, STOPS, KeepingEngine, draw, ending_model, no_memory_beyond, stopping_model
from tiny_models import build_model, build_tokenizer

from aesl_trl.errors import InputError
from aesl_trl.sampling import generate as generating
from aesl_trl.sampling.draws import SamplingFailed, SamplingSettings
from aesl_trl.sampling.generate import GenerateEngine, batches_of
from aesl_trl.sampling.groups import sample_groups


# ---- What is recorded


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_every_number_is_that_of_the_models_logits_at_temperature_one(temperature, tokenizer):
    """1e-5: a forward pass in float32 on padded batches, of losses near 5."""
    model, engine = stopping_model(tokenizer), KeepingEngine(5)
    eos = tokenizer.eos_token_id
    groups = draw(model, tokenizer, engine, temperature=temperature)
    assert {sample.stopped for sample in engine.drawn} == {True, False}
    for place, (prompt, sample) in enumerate(zip(engine.prompts, engine.drawn, strict=True)):
        logits = model.double()(torch.tensor([prompt + sample.ids])).logits[0, len(prompt) - 1 : -1]
        model.float()
        log_probs = logits.log_softmax(-1)
        taken = log_probs[torch.arange(len(sample.ids)), sample.ids]
        ends = log_probs[:, [*STOPS, eos]].exp().sum(-1)
        assert sample.entropy == pytest.approx(-(log_probs.exp() * log_probs).sum(-1).mean().item(), abs=1e-5)
        assert sample.neg_log_prob == pytest.approx(-taken.mean().item(), abs=1e-5)
        assert sample.eos_prob == pytest.approx((ends[-1] if sample.stopped else ends.max()).item(), abs=1e-6)
        assert sample.stopped == (sample.ids[-1] in (*STOPS, eos))
        group = groups[place // 4]
        assert group.neg_log_prob[place % 4] == sample.neg_log_prob and group.eos_prob[place % 4] == sample.eos_prob


def test_samples_end_at_an_end_token_or_are_truncated(tokenizer):
    model = build_model(tokenizer)
    model.generation_config.eos_token_id = list(range(0, 256, 8))  # one token in eight ends a sample
    (group,) = sample_groups(model, tokenizer, PROMPTS[:1], SamplingSettings(64, 1.0, 5))
    assert 0 < sum(group.truncated) < 64
    assert all(tokens == 5 for tokens, truncated in zip(group.num_tokens, group.truncated, strict=True) if truncated)
    assert all(1 <= tokens <= 5 for tokens in group.num_tokens) and min(group.num_tokens) == 1
    assert len(group.completions) == 64 and len(set(group.completions)) > 30


def test_a_base_models_samples_end_with_the_templates_turn():
    """Its own files name <|endoftext|> alone, as those of Qwen's base models do."""
    base = build_tokenizer()
    base.eos_token = "<|endoftext|>"
    end = base.convert_tokens_to_ids("<|im_end|>")
    model = ending_model(base, end)
    assert model.generation_config.eos_token_id == base.eos_token_id != end
    groups = draw(model, base)
    assert all(group.num_tokens == [1] * 4 and group.truncated == [False] * 4 for group in groups)


def test_settings_of_the_models_generation_config_do_not_leak(tokenizer):
    """Instruct models ship top_k, top_p and a repetition penalty, which would change samples and entropy."""
    drawn = []
    for changed in ({}, {"top_k": 1, "top_p": 0.1, "temperature": 0.1, "repetition_penalty": 5.0, "do_sample": False}):
        model = build_model(tokenizer)
        model.generation_config.update(**changed)
        drawn.append(sample_groups(model, tokenizer, PROMPTS, SamplingSettings(4, 1.0, 8)))
    assert drawn[0] == drawn[1]


# ---- Memory


@given(
    lengths=st.lists(st.integers(1, 40), max_size=30), batch_size=st.integers(1, 8), prompt_tokens=st.integers(1, 200)
)
def test_no_batch_of_prompts_takes_more_than_its_tokens(lengths, batch_size, prompt_tokens):
    prompts = [[place] * length for place, length in enumerate(lengths)]
    batches = batches_of(prompts, batch_size, prompt_tokens)
    assert [prompt for batch in batches for prompt in batch] == prompts
    sizes = [len(batch) * max(map(len, batch)) for batch in batches]
    assert all(len(batch) <= batch_size for batch in batches)
    assert all(size <= prompt_tokens or len(batch) == 1 for size, batch in zip(sizes, batches, strict=True))
    for batch, after in zip(batches, batches[1:], strict=False):  # the next prompt had no room
        width = max(map(len, [*batch, after[0]]))
        assert len(batch) == batch_size or (len(batch) + 1) * width > prompt_tokens


def test_batches_worked_out_by_hand():
    prompts = [[1] * length for length in (3, 3, 5, 2, 2, 12, 1)]
    lengths = [[len(prompt) for prompt in batch] for batch in batches_of(prompts, 3, 10)]
    assert lengths == [[3, 3], [5, 2], [2], [12], [1]]  # 3 x 5 > 10, 3 x 5 > 10, 2 x 12 > 10, a prompt of its own
    assert [len(batch) for batch in batches_of(prompts[:5], 3, 10**6)] == [3, 2]


def test_long_prompts_are_read_a_few_at_a_time(tokenizer, monkeypatch):
    """16 samples of prompts of 300 tokens: the model is never given more than 1,000 tokens at once."""
    model, shapes = build_model(tokenizer), []
    forward = type(model.model).forward

    def noting(self, input_ids=None, **kwargs):
        shapes.append(tuple(input_ids.shape))
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(type(model.model), "forward", noting)
    rows = [{"prompt": str(digit) * 300} for digit in range(2)]
    groups = sample_groups(model, tokenizer, rows, SamplingSettings(8, 1.0, 1), engine=GenerateEngine(64, 1_000))
    assert shapes == [(3, 300)] * 5 + [(1, 300)] and [len(group.completions) for group in groups] == [8, 8]


def test_out_of_memory_is_answered_by_half_the_batch_that_is_kept(tokenizer, monkeypatch, capsys):
    model, engine = build_model(tokenizer), GenerateEngine(12)
    expected = draw(model, tokenizer, GenerateEngine(3))
    tried = no_memory_beyond(monkeypatch, 4)
    assert draw(model, tokenizer, engine) == expected  # from the seed anew, as if it had been asked for
    assert tried == [12, 6, 3, 3, 3, 3] and engine.batch_size == 3
    assert capsys.readouterr().out.count("out of memory: from here on 3 completions") == 1
    tried.clear()
    assert draw(model, tokenizer, engine) == expected
    assert tried == [3, 3, 3, 3] and not capsys.readouterr().out


def test_no_memory_for_one_sample_fails_and_leaves_the_batch_size(tokenizer, monkeypatch):
    engine = GenerateEngine(4)
    tried = no_memory_beyond(monkeypatch, 0)
    with pytest.raises(SamplingFailed, match="OutOfMemoryError: CUDA out of memory"):
        draw(build_model(tokenizer), tokenizer, engine)
    assert tried == [4, 2, 1] and engine.batch_size == 4


# ---- Other failures


def test_any_other_error_is_not_tried_again(tokenizer, monkeypatch):
    calls = []

    def generate(*args):
        calls.append(1)
        raise ConnectionError("the server\nis gone")

    monkeypatch.setattr(generating, "_generate", generate)
    with pytest.raises(SamplingFailed) as caught:
        draw(build_model(tokenizer), tokenizer)
    assert str(caught.value) == "ConnectionError: the server is gone" and len(calls) == 1
    assert isinstance(caught.value.__cause__, ConnectionError)


@pytest.mark.parametrize("error", [InputError("wrong"), KeyboardInterrupt(), SystemExit(143)])
def test_wrong_input_and_signals_pass(error, tokenizer, monkeypatch):
    def generate(*args):
        raise error

    monkeypatch.setattr(generating, "_generate", generate)
    with pytest.raises(type(error)):
        draw(build_model(tokenizer), tokenizer)
