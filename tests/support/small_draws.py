"""Prompts, a model whose samples often end, and failures of `generate` for the tests of sampling."""

import torch
from tiny_models import build_model

from aesl_trl.sampling import generate as generating
from aesl_trl.sampling.draws import SamplingSettings
from aesl_trl.sampling.generate import GenerateEngine
from aesl_trl.sampling.groups import sample_groups


PROMPTS = [{"prompt": "2+3="}, {"prompt": "Name a colour: "}, {"prompt": "abc"}]
STOPS = list(range(0, 256, 16))  # one token in sixteen ends a sample


def stopping_model(tokenizer):
    model = build_model(tokenizer).eval()
    model.generation_config.eos_token_id = STOPS
    return model


def ending_model(tokenizer, token):
    """A model of which every sample is the one token `token`."""
    model = build_model(tokenizer).eval()
    with torch.no_grad():
        weight = model.model.embed_tokens.weight
        weight[:, 0] = 1.0  # every token carries this direction through the residual stream
        weight[token, 0] = 40.0
    return model


def draw(model, tokenizer, engine=None, *, accelerator=None, **changes):
    """Draw 4 samples of 12 tokens for each of PROMPTS, from seed 3."""
    settings = {"num_samples": 4, "temperature": 1.0, "max_new_tokens": 12, "seed": 3, **changes}
    return sample_groups(
        model, tokenizer, PROMPTS, SamplingSettings(**settings), engine=engine, accelerator=accelerator
    )


class KeepingEngine(GenerateEngine):
    """Keeps the draws, whose tokens a group does not hold."""

    def draw(self, request):
        self.prompts = request.prompt_of_each_sample
        self.drawn = super().draw(request)
        return self.drawn


def no_memory_beyond(monkeypatch, most, error=torch.OutOfMemoryError):
    """Let `generate` of more than `most` rows run out of memory; return the list of the sizes that it tries."""
    tried, original = [], generating._generate

    def generate(model, prompts, config):
        tried.append(len(prompts))
        if len(prompts) > most:
            raise error("CUDA out of memory. Tried to allocate 2.00 GiB")
        return original(model, prompts, config)

    monkeypatch.setattr(generating, "_generate", generate)
    return tried
