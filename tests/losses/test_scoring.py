"""Scores inside a real model's forward: every architecture's own logits, rows, documents and labels."""

import pytest
import torch
import transformers
from small_runs import double_model, gradients
from tiny_models import build_model, tiny_shape

from aesl_trl.errors import InputError
from aesl_trl.losses.definition import aesl_loss, aesl_scores
from aesl_trl.losses.rules import aesl_rule, nll_rule
from aesl_trl.losses.scoring import add_fused_head, logit_transform


# What an architecture's config takes beside `tiny_shape`; the logits of those with a comment are not W h alone
ARCHITECTURES = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 2.0},  # soft cap
    "gemma3_text": {"head_dim": 8},
    "nanochat": {"final_logit_softcapping": 2.0},  # soft cap
    "cohere": {"logit_scale": 0.25},  # scale
    "cohere2": {"logit_scale": 0.25},  # scale
    "granite": {"logits_scaling": 4.0},  # divided
    "hyperclovax": {"logits_scaling": 4.0, "head_dim": 8},  # multiplied
    "falcon_h1": {"lm_head_multiplier": 0.5, "mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_state": 4},  # multiplied
    "phi": {},  # bias
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
    "gpt_neox": {},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 8},
    "bloom": {"n_layer": 2, "n_head": 2},
    "mpt": {"d_model": 16, "n_layers": 2, "n_heads": 2},
    "olmo2": {},
    "phi3": {},
    "glm4": {"head_dim": 8},
    "stablelm": {},
    "starcoder2": {},
    "smollm3": {},
}


def build(kind, tokenizer):
    config = transformers.AutoConfig.for_model(kind, **{**tiny_shape(tokenizer), **ARCHITECTURES[kind]})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    for parameter in model.parameters():  # biases start at 0
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_scores_are_those_of_the_models_own_logits(kind, tokenizer):
    model = build(kind, tokenizer)
    input_ids = torch.randint(3, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    expected = aesl_loss(model(**inputs).logits[:, :-1], input_ids[:, 1:], num_items=1)
    expected.backward()
    true_gradients = gradients(model)
    model.zero_grad()
    add_fused_head(model)
    scored = model(**inputs, labels=input_ids, token_rule=aesl_rule())
    scored.loss_sum.backward()
    torch.testing.assert_close(scored.loss_sum, expected, rtol=1e-6, atol=0)  # some compute rotary angles in float32
    found = gradients(model)
    assert found.keys() == true_gradients.keys()
    for name, value in true_gradients.items():
        assert (found[name] - value).norm() <= 1e-6 * value.norm() + 1e-12, name


@pytest.mark.parametrize(
    ("kind", "scale", "softcap"),
    [("cohere", 0.25, None), ("granite", 0.25, None), ("hyperclovax", 4.0, None), ("gemma2", 1.0, 2.0)],
)
def test_logit_transform_is_read_from_the_config(kind, scale, softcap, tokenizer):
    config = transformers.AutoConfig.for_model(kind, **{**tiny_shape(tokenizer), **ARCHITECTURES[kind]})
    assert logit_transform(config) == (scale, softcap)


@pytest.mark.parametrize(
    ("kind", "head"), [("bert", "cls.predictions.decoder"), ("roberta", "lm_head.decoder"), ("xlm", "pred_layer.proj")]
)
def test_a_head_with_layers_of_its_own_is_refused(kind, head):
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind))
    with pytest.raises(InputError, match=f"not a backbone followed by one linear LM head .found {head}"):
        add_fused_head(model)


def test_a_quantized_head_is_refused(tokenizer):
    model = build_model(tokenizer, tie_word_embeddings=False)
    add_fused_head(model)
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(64, 1, dtype=torch.uint8), requires_grad=False)
    ids = torch.arange(5).unsqueeze(0)
    with pytest.raises(InputError, match=r"LM head's weight is torch.uint8 of shape \(64, 1\)"):
        model(input_ids=ids, labels=ids, token_rule=nll_rule())


def test_without_a_rule_nothing_changes(tokenizer):
    model, ids = build_model(tokenizer), torch.arange(10).unsqueeze(0)
    before = model(input_ids=ids, labels=ids)
    generated = model.generate(ids, max_new_tokens=5, do_sample=False)
    add_fused_head(model)
    after = model(input_ids=ids, labels=ids)
    assert torch.equal(before.logits, after.logits) and torch.equal(before.loss, after.loss)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), generated)


def test_scores_of_a_masked_position_are_zero():
    model = double_model()
    add_fused_head(model)
    input_ids = torch.arange(20).reshape(2, 10)
    labels = input_ids.clone()
    labels[0, :4] = labels[1] = -100
    scores = model(input_ids=input_ids, labels=labels, token_rule=aesl_rule()).scores
    expected = aesl_scores(model(input_ids=input_ids).logits[:, :-1], labels[:, 1:])
    assert scores.label_mask.sum() == 6
    torch.testing.assert_close(scores.weights, expected.weights)
    torch.testing.assert_close(scores.temperatures, expected.temperatures)
    for values in (scores.log_probs, scores.weights, scores.temperatures, scores.entropy, scores.is_top1):
        assert values.shape == (2, 9) and not values[~scores.label_mask].any()


def test_a_batch_without_labels_is_a_differentiable_zero():
    model = double_model()
    add_fused_head(model)
    input_ids = torch.arange(20).reshape(2, 10)
    scored = model(input_ids=input_ids, labels=torch.full_like(input_ids, -100), token_rule=aesl_rule())
    scored.loss_sum.backward()
    assert scored.loss_sum.item() == 0
    assert all((parameter.grad == 0).all() for parameter in model.parameters())


def test_no_logits_in_training(tokenizer, monkeypatch):
    """Neither the head's own forward nor the model's loss function runs."""
    model = build_model(tokenizer)
    add_fused_head(model)

    def refuse(*arguments, **settings):
        raise AssertionError("the logits were built")

    monkeypatch.setattr(model.lm_head, "forward", refuse)
    ids = torch.arange(10).unsqueeze(0)
    model(input_ids=ids, labels=ids, token_rule=aesl_rule()).loss_sum.backward()
    assert model.lm_head.weight.grad.abs().sum() > 0
    with pytest.raises(AssertionError, match="the logits were built"):
        model(input_ids=ids)
