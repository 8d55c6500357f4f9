"""Samples by `generate`: what is recorded of each token, and what happens when memory or the engine fails.

What the callback makes of them: test_callback.py. Several processes: test_groups_processes.py.
"""

import random

import numpy as np
import pytest
import torch
from tiny_models import build_model

from aesl_trl.errors import InputError
from aesl_trl.losses.scoring import add_fused_head
from aesl_trl.sampling import generate as generating
from aesl_trl.sampling.draws import Draw, SamplingFailed, SamplingSettings, is_out_of_memory
from aesl_trl.sampling.generate import GenerateEngine
from aesl_trl.sampling.groups import sample_groups
from aesl_trl.sampling.rescoring import rescore


PROMPTS = [{"prompt": "2+3="}, {"prompt": "Name a colour: "}, {"prompt": "abc"}]
STOPS = list(range(0, 256, 16))  # one token in sixteen ends a sample


def stopping_model(tokenizer):
    model = build_model(tokenizer).eval()
    model.generation_config.eos_token_id = STOPS
    return model


def draw(model, tokenizer, engine=None, **changes):
    settings = {"samples": 4, "temperature": 1.0, "max_new_tokens": 12, "seed": 3, **changes}
    return sample_groups(model, tokenizer, PROMPTS, SamplingSettings(**settings), engine=engine)


class Ids(GenerateEngine):
    """Keeps the draws, whose tokens a group does not hold."""

    def draw(self, request):
        self.prompts = request.prompt_of_each_sample
        self.drawn = super().draw(request)
        return self.drawn


# ---- What is recorded


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_every_number_is_that_of_the_models_logits_at_temperature_one(temperature, tokenizer):
    """1e-5: a forward pass in float32 on padded batches, of losses near 5."""
    model, engine = stopping_model(tokenizer), Ids(5)
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


def test_scoring_gives_what_generating_records(tokenizer):
    """The fused head on right-padded rows against left-padded decoding."""
    model, engine = stopping_model(tokenizer), Ids(64)
    draw(model, tokenizer, engine)
    add_fused_head(model)
    blank = [Draw(sample.ids, sample.stopped, None, None, None) for sample in engine.drawn]
    scored = rescore(model, engine.prompts, blank, batch_size=5, num_batches=4, pad_id=0, device="cpu")
    assert len(scored) == len(blank) == 12
    for found, expected in zip(scored, engine.drawn, strict=True):
        assert found[:2] == expected[:2]
        assert found.entropy == pytest.approx(expected.entropy, abs=1e-5)
        assert found.neg_log_prob == pytest.approx(expected.neg_log_prob, abs=1e-5)
        if found.stopped:  # of the one token that it ended with, where generating knows all of them
            assert 0 < found.eos_prob < expected.eos_prob
        else:
            assert found.eos_prob is None


# ---- Memory


def no_memory_beyond(monkeypatch, most, error=torch.OutOfMemoryError):
    """`generate` of more than `most` rows runs out of memory; returns the sizes that were tried."""
    tried, original = [], generating._generate

    def generate(model, prompts, config):
        tried.append(len(prompts))
        if len(prompts) > most:
            raise error("CUDA out of memory. Tried to allocate 2.00 GiB")
        return original(model, prompts, config)

    monkeypatch.setattr(generating, "_generate", generate)
    return tried


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


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
        (ConnectionError("no server"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, expected):
    assert is_out_of_memory(error) is expected


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


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, ConnectionError])
def test_a_failure_restores_what_sampling_changes(error, tokenizer, monkeypatch):
    model = build_model(tokenizer)
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    tokenizer.padding_side = "right"
    no_memory_beyond(monkeypatch, 0, error)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    with pytest.raises(SamplingFailed):
        draw(model, tokenizer)
    assert [module.training for module in model.modules()] == modes
    assert tokenizer.padding_side == "right"
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
