"""Packing and padding-free, allowed only where documents of a row do not see each other."""

import random

import numpy as np
import pytest
import torch
from small_runs import small_config, trainer_for
from tiny_models import build_model, tiny_shape
from transformers import AutoConfig, AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM, Qwen2ForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from trl import SFTTrainer

from aesl_trl import AESLSFTTrainer
from aesl_trl.errors import InputError
from aesl_trl.training import packing_probe
from aesl_trl.training.packing_probe import Architecture, packed_rows_collator, probe


CPU = torch.device("cpu")
APART = (
    "llama qwen2 qwen3 gemma gemma2 gemma3_text mistral phi3 granite olmo3 smollm3 mixtral qwen3_moe deepseek_v3"
).split()
LEAKING = "gpt_oss mamba falcon_mamba jamba afmoe bloom opt minimax".split()
ALSO_LEAKING = {"recurrent_gemma", "mamba2", "mpt", "deepseek_v4", "zaya"}
PACKED = {"packing": True, "max_length": 48}


@pytest.fixture(scope="module")
def collator(tmp_path_factory):
    return packed_rows_collator(small_config(tmp_path_factory.mktemp("args")))


def architecture(kind, **changes):
    """A family with the sizes of its default config, which are those of a real model."""
    config = AutoConfig.for_model(kind, **changes)
    return Architecture(config, AutoModelForCausalLM._model_mapping[type(config)], None)


@pytest.fixture
def gpt_oss(tokenizer):
    torch.manual_seed(0)
    sizes = {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}
    return GptOssForCausalLM(GptOssConfig(**{**tiny_shape(tokenizer), **sizes}))


class OnlyWithSDPA(Qwen2ForCausalLM):
    """Keeps documents apart with sdpa, and not with eager attention."""

    def forward(self, *args, position_ids=None, **kwargs):
        kept = position_ids if self.config._attn_implementation == "sdpa" else None
        return super().forward(*args, position_ids=kept, **kwargs)


class Unrepeatable(Qwen2ForCausalLM):
    """Can be built once."""

    built = False

    def __init__(self, config):
        if Unrepeatable.built:
            raise RuntimeError("this model\nis built once")
        super().__init__(config)


@pytest.mark.parametrize("kind", APART)
def test_families_whose_documents_stay_apart(kind, collator):
    assert probe(architecture(kind), collator, CPU).problem is None


@pytest.mark.parametrize("kind", LEAKING)
def test_families_whose_documents_see_each_other(kind, collator):
    assert probe(architecture(kind), collator, CPU).problem == "the documents of a row see each other"


@pytest.mark.slow
def test_every_causal_language_model_of_transformers(collator):
    """Most families can be tried; a verdict is never near its threshold."""
    verdicts = {}
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            verdicts[kind] = probe(architecture(kind), collator, CPU)
        except Exception as error:  # what a trainer turns into a refusal
            verdicts[kind] = error
    tried = {kind: verdict for kind, verdict in verdicts.items() if not isinstance(verdict, Exception)}
    assert len(tried) > 110, {kind: verdicts[kind] for kind in verdicts.keys() - tried.keys()}
    between = {kind: verdict for kind, verdict in tried.items() if 1e-4 < verdict.seen < 0.05}
    assert not between
    leaking = {kind for kind, verdict in tried.items() if verdict.problem}
    assert leaking >= {*LEAKING, *ALSO_LEAKING} and not leaking & set(APART)


def test_every_kind_of_layer_is_in_the_copy(collator):
    """Gemma 3 has five layers with a window and then one without; Jamba's first attention is its fifth layer."""
    for kind, depth in (("gemma3_text", 6), ("jamba", 5)):
        small = next(packing_probe._small_configs(architecture(kind), []))
        assert small.num_hidden_layers == depth
        assert set(small.layer_types) == set(AutoConfig.for_model(kind).layer_types)


def test_a_leak_of_one_layer_is_found(collator):
    """The copy ends with the only layer of its kind, not with the second."""
    types = ["full_attention"] * 3 + ["linear_attention"]
    found = probe(architecture("minimax", num_hidden_layers=4, layer_types=types), collator, CPU)
    assert found.problem == "the documents of a row see each other"
    only = ["full_attention"] * 4
    assert probe(architecture("minimax", num_hidden_layers=4, layer_types=only), collator, CPU).problem is None


def test_random_numbers_go_on_as_if_there_were_no_probe(collator, monkeypatch):
    monkeypatch.setattr(packing_probe, "_verdicts", {})
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    probe(architecture("qwen2"), collator, CPU)
    assert packing_probe._verdicts
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


def test_a_verdict_is_remembered_for_its_attention_alone(collator, monkeypatch):
    first = probe(architecture("qwen2"), collator, CPU)

    def refuse(*given):
        raise RuntimeError("a second trial")

    monkeypatch.setattr(packing_probe, "_try", refuse)
    assert probe(architecture("qwen2"), collator, CPU) is first
    with pytest.raises(RuntimeError, match="a second trial"):
        probe(architecture("qwen2")._replace(attention="eager"), collator, CPU)


@pytest.mark.parametrize(
    "changes", [PACKED, {"padding_free": True, "max_length": None}], ids=lambda changes: next(iter(changes))
)
def test_a_leaking_model_is_refused_in_one_line(changes, gpt_oss, tokenizer, tmp_path):
    with pytest.raises(InputError) as refused:
        trainer_for(tokenizer, tmp_path, gpt_oss, **changes)
    name = next(iter(changes))
    assert str(refused.value) == (
        f"{name} on gpt_oss with eager attention: the documents of a row see each other, as a small copy of the model "
        f"on cpu shows; set {name}: false"
    )
    trainer_for(tokenizer, tmp_path, gpt_oss)  # one document a row


def test_a_model_by_name_is_refused_before_it_loads(gpt_oss, tokenizer, tmp_path, monkeypatch):
    gpt_oss.save_pretrained(tmp_path / "model")

    def load(*given, **settings):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(SFTTrainer, "__init__", load)
    with pytest.raises(InputError, match="packing on gpt_oss with eager attention"):
        AESLSFTTrainer(str(tmp_path / "model"), small_config(tmp_path, **PACKED))


def test_another_attention_is_named_where_it_was_tried(tokenizer, tmp_path):
    model = OnlyWithSDPA(build_model(tokenizer).config)
    trainer_for(tokenizer, tmp_path, model, **PACKED)
    model = OnlyWithSDPA._from_config(build_model(tokenizer).config, attn_implementation="eager")
    with pytest.raises(InputError, match="; set packing: false, or attn_implementation: sdpa, with which they stay"):
        trainer_for(tokenizer, tmp_path, model, **PACKED)


def test_a_model_that_cannot_be_copied_is_allowed_by_name_alone(tokenizer, tmp_path, monkeypatch):
    model = Unrepeatable(build_model(tokenizer).config)
    monkeypatch.setattr(Unrepeatable, "built", True)
    with pytest.raises(InputError) as refused:
        trainer_for(tokenizer, tmp_path, model, **PACKED)
    assert "RuntimeError: this model is built once" in str(refused.value)
    assert "set packing: false, or packing_unverified: true" in str(refused.value)
    with pytest.warns(UserWarning, match="packing on qwen2 is not verified .RuntimeError: this model is built once"):
        trainer_for(tokenizer, tmp_path, model, packing_unverified=True, **PACKED)


def test_the_setting_does_not_hide_a_leak(gpt_oss, tokenizer, tmp_path):
    with pytest.raises(InputError, match="see each other"):
        trainer_for(tokenizer, tmp_path, gpt_oss, packing_unverified=True, **PACKED)
