"""sample_groups: groups are of the prompts and the seed, and the training is left as it was.

What the callback makes of them: tests/training/test_callback.py. Several processes: test_groups_processes.py.
"""

import random

import numpy as np
import pytest
import torch
from small_draws import PROMPTS, draw, no_memory_beyond
from small_runs import user
from tiny_models import build_model

from aesl_trl.sampling.draws import SamplingFailed, SamplingSettings
from aesl_trl.sampling.groups import sample_groups


def test_sampling_restores_what_it_changes(tokenizer):
    model = build_model(tokenizer)
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    tokenizer.padding_side = "right"
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    sample_groups(model, tokenizer, PROMPTS, SamplingSettings(2, 1.0, 4))
    assert [module.training for module in model.modules()] == modes
    assert tokenizer.padding_side == "right"
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states


@pytest.mark.parametrize("temperature", [0.25, 1.0, 4.0])
def test_entropy_is_that_of_the_model_at_temperature_one(temperature, tokenizer):
    model = build_model(tokenizer).eval()
    prompts = [{"prompt": text} for text in ("a", "a longer prompt")]
    groups = sample_groups(model, tokenizer, prompts, SamplingSettings(2, temperature, 1))
    for group in groups:
        logits = model(**tokenizer(group.prompt, return_tensors="pt", add_special_tokens=False)).logits[0, -1]
        expected = torch.distributions.Categorical(logits=logits).entropy().item()
        assert group.entropy == pytest.approx([expected] * 2, abs=1e-4)  # left padding included


def test_draws_depend_on_the_seed_alone(tokenizer):
    model = build_model(tokenizer)
    first = sample_groups(model, tokenizer, PROMPTS, SamplingSettings(4, 1.0, 8, seed=1))
    torch.rand(7)
    assert sample_groups(model, tokenizer, PROMPTS, SamplingSettings(4, 1.0, 8, seed=1)) == first
    assert sample_groups(model, tokenizer, PROMPTS, SamplingSettings(4, 1.0, 8, seed=2)) != first


def test_messages_are_rendered_with_a_generation_prompt(tokenizer):
    model = build_model(tokenizer).eval()
    (group,) = sample_groups(model, tokenizer, [{"prompt": user("hello")}], SamplingSettings(1, 1.0, 1))
    text = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    logits = model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits[0, -1]
    assert group.entropy[0] == pytest.approx(torch.distributions.Categorical(logits=logits).entropy().item(), abs=1e-5)
    assert group.prompt == user("hello")


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
