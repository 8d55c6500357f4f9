"""Adapters that were trained with another vocabulary than their base has on disk, of every type that PEFT knows."""

import inspect
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from tiny_models import build_model, build_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from aesl_trl.errors import InputError
from aesl_trl.models.folder import NEEDS_MORE, ModelFolder
from aesl_trl.models.handoff import hand_off, load_for_rl
from aesl_trl.models.interpolate import interpolate
from aesl_trl.models.loading import check_tokenizer, load_model, put_adapter
from aesl_trl.models.vocabulary import let_head_run, num_embeddings
from aesl_trl.sampling.offline import load


BASE, GROWN = 259, 264
NEW = list(range(BASE, GROWN))
IDS = torch.tensor([[1, 2, 3, 258, 30]])


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Save a base with tied embeddings, one with untied ones, and one with spare rows."""
    folder = tmp_path_factory.mktemp("bases")
    shapes = {
        "tied": {},
        "untied": {"tie_word_embeddings": False},
        "spare": {"vocab_size": 512},
    }
    for name, shape in shapes.items():
        build_model(build_tokenizer(), **shape).save_pretrained(folder / name)
        build_tokenizer().save_pretrained(folder / name)
    return folder


def trained(base: Path, folder: Path, config, *, rows: int = GROWN, save_embedding_layers="auto"):
    """Put an adapter on a resized base, change what is trained, save the adapter, and return the model."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(rows)
    model = get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    let_head_run(model)
    model.save_pretrained(folder, save_embedding_layers=save_embedding_layers)
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([f"<new-{index}>" for index in range(GROWN - BASE)])
    tokenizer.save_pretrained(folder)
    return model


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids.to(model.device)).logits


def lora(**settings):
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **settings})


VARIANTS = {
    "plain": {},
    "embeddings trained whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "one embedding trained whole": {"modules_to_save": ["embed_tokens"]},
    "single tokens": {"trainable_token_indices": NEW},
    "LoRA on both embeddings": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "tied on purpose": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "as TRL adds the tokens of a template": {
        "modules_to_save": ["lm_head"],
        "trainable_token_indices": {"embed_tokens": NEW},
    },
}


# ---- Seven ways to train LoRA on new tokens


@pytest.mark.parametrize("base", ["tied", "untied"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_adapter_meets_the_embeddings_that_it_was_trained_with(bases, tmp_path, base, variant):
    """The same log-probs as in training, from a base that has five tokens fewer on disk."""
    before = trained(bases / base, tmp_path / "adapter", lora(**VARIANTS[variant]))
    after = put_adapter(load_model(bases / base, device="cpu"), str(tmp_path / "adapter"), base)
    torch.testing.assert_close(logits(after), logits(before), rtol=0, atol=0)
    assert num_embeddings(ModelFolder.find(tmp_path / "adapter")) == GROWN


def check_both_modes(bases, tmp_path, before, name: str = "adapter"):
    """Hand the adapter over in both modes, and compare what RL starts from with the model that was trained."""
    merged, kept = tmp_path / "merged", tmp_path / "kept"
    assert hand_off(tmp_path / name, output=merged)["mode"] == "merge"
    whole = AutoModelForCausalLM.from_pretrained(merged)
    torch.testing.assert_close(logits(whole), logits(before), rtol=1e-4, atol=1e-4)
    assert hand_off(tmp_path / name, output=kept, mode="continue")["mode"] == "continue"
    model, tokenizer = load_for_rl(kept)
    torch.testing.assert_close(logits(model.eval()), logits(before), rtol=0, atol=0)
    assert any(parameter.requires_grad for parameter in model.parameters())
    assert tokenizer.convert_tokens_to_ids("<new-4>") == GROWN - 1


def test_both_handoffs_give_what_a_template_s_tokens_trained_on_a_tied_base(bases, tmp_path):
    settings = VARIANTS["as TRL adds the tokens of a template"]
    check_both_modes(bases, tmp_path, trained(bases / "tied", tmp_path / "adapter", lora(**settings)))


@pytest.mark.slow
@pytest.mark.parametrize("base", ["tied", "untied"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_both_handoffs_give_what_was_trained(bases, tmp_path, base, variant):
    """Merged into one tied matrix, LoRA on both embeddings would be added to it twice."""
    check_both_modes(bases, tmp_path, trained(bases / base, tmp_path / "adapter", lora(**VARIANTS[variant])))


def test_spare_rows_that_training_cut_off_are_cut_off_again(bases, tmp_path):
    before = trained(bases / "spare", tmp_path / "adapter", lora(**VARIANTS["single tokens"]), rows=320)
    after = put_adapter(load_model(bases / "spare", device="cpu"), str(tmp_path / "adapter"), "spare")
    torch.testing.assert_close(logits(after), logits(before), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("base", "settings", "saved", "lost"),
    [
        ("untied", {"trainable_token_indices": NEW}, False, "output"),
        ("untied", {"target_modules": ["q_proj", "embed_tokens"]}, "auto", "output"),  # PEFT leaves the head out
        ("tied", {"target_modules": ["q_proj", "embed_tokens"]}, False, "input"),
    ],
)
def test_rows_that_were_never_saved_are_refused(bases, tmp_path, base, settings, saved, lost):
    trained(bases / base, tmp_path / "adapter", lora(**settings), save_embedding_layers=saved)
    with pytest.raises(InputError, match=f"with 264 tokens, its base has 259, .* no new rows of the {lost} embedding"):
        put_adapter(load_model(bases / base, device="cpu"), str(tmp_path / "adapter"), base)


def test_a_tokenizer_beyond_what_the_adapter_brings_is_refused(bases, tmp_path):
    trained(bases / "tied", tmp_path / "adapter", lora(), save_embedding_layers=False)
    found = ModelFolder.find(tmp_path / "adapter")
    check_tokenizer(found, [], field="model")
    rows = [{"prompt": "Say <new-4>."}]
    with pytest.raises(InputError, match="<new-4> has id 263, the model 259 embeddings: .*save_embedding_layers=True"):
        check_tokenizer(found, rows, field="model")


def test_evaluation_and_interpolation_take_it(bases, tmp_path):
    before = trained(bases / "tied", tmp_path / "adapter", lora(r=2))
    interpolate(tmp_path / "adapter", tmp_path / "adapter", tmp_path / "mixed", weight=0.25)
    for name in ("adapter", "mixed"):
        model, _ = load(str(tmp_path / name), "cpu")
        torch.testing.assert_close(logits(model), logits(before), rtol=1e-5, atol=1e-5)


def test_a_relative_base_is_found_from_a_folder_above_the_adapter(bases, tmp_path, monkeypatch):
    """As where a project was moved as a whole, or the command runs in another folder."""
    project = tmp_path / "project"
    shutil.copytree(bases / "tied", project / "models" / "tied")
    before = trained(bases / "tied", project / "runs" / "adapter", lora())
    config = project / "runs" / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "models/tied"}))
    monkeypatch.chdir(tmp_path)
    result = hand_off(project / "runs" / "adapter", output=tmp_path / "kept", mode="continue")
    assert result["base"] == str(project / "models" / "tied")
    torch.testing.assert_close(logits(load_for_rl(tmp_path / "kept")[0].eval()), logits(before), rtol=0, atol=0)


# ---- Every type of PEFT


SETTINGS = {
    "ADALORA": {"total_step": 10},
    "ADAPTION_PROMPT": {"adapter_len": 3, "adapter_layers": 1},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "CARTRIDGE": {"num_virtual_tokens": 3},
    "CPT": {"cpt_token_ids": [1, 2, 3], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 1, 1]},
    "FOURIERFT": {"n_frequency": 10},
    "GRALORA": {"r": 2, "gralora_k": 2},
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "MISS": {"r": 2},
    "OFT": {"oft_block_size": 4, "r": 0},
    "PREFIX_TUNING": {"num_virtual_tokens": 3},
    "PROMPT_TUNING": {"num_virtual_tokens": 3},
    "PSOFT": {"r": 4},
    "P_TUNING": {"num_virtual_tokens": 3, "encoder_hidden_size": 8},
    "RANDLORA": {"r": 2},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 1},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": NEW},
    "VBLORA": {"num_vectors": 8, "vector_length": 8, "r": 2},
    "WAVEFT": {"n_frequency": 8},
}
WITHOUT_MERGE = {"ADAPTION_PROMPT", "LILY"}
PROMPT_LEARNING = {"CARTRIDGE", "CPT", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"}
OF_EACH_SORT = {"ADALORA", "IA3", "LN_TUNING", "OFT", "PROMPT_TUNING", "TRAINABLE_TOKENS", "VERA"}
TYPES = [getattr(kind, "value", kind) for kind in PEFT_TYPE_TO_CONFIG_MAPPING]


def config_of(kind: str):
    """Return a small config of this type; a package that PEFT wants for it may be missing."""
    if kind == "ADAMSS":
        pytest.importorskip("sklearn")
    build = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    settings = {"task_type": "CAUSAL_LM", **SETTINGS.get(kind, {})}
    if "target_modules" in inspect.signature(build).parameters and kind != "ADAPTION_PROMPT":
        settings.setdefault("target_modules", ["q_proj", "v_proj"])
    return build(**settings)


def base_of_type(bases, tmp_path, kind: str) -> Path:
    if kind != "ADAPTION_PROMPT":  # PEFT has it for a few architectures
        return bases / "tied"
    shape = {"vocab_size": BASE, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    build_tokenizer().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[] if kind in OF_EACH_SORT else pytest.mark.slow)
        for kind in TYPES
        if kind not in NEEDS_MORE
    ],
)
def test_each_type_meets_the_embeddings_that_it_was_trained_with(bases, tmp_path, kind):
    base = base_of_type(bases, tmp_path, kind)
    before = trained(base, tmp_path / "adapter", config_of(kind))
    after = put_adapter(load_model(base, device="cpu"), str(tmp_path / "adapter"), str(base))
    torch.testing.assert_close(logits(after.eval()), logits(before), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind not in NEEDS_MORE])
def test_each_type_is_handed_over_or_refused_by_name(bases, tmp_path, kind):
    before = trained(base_of_type(bases, tmp_path, kind), tmp_path / "adapter", config_of(kind))
    if kind in PROMPT_LEARNING:
        for mode in ("merge", "continue"):
            with pytest.raises(InputError, match=f"of type {kind}, which learns a prompt: .* RL cannot start from it"):
                hand_off(tmp_path / "adapter", output=tmp_path / "out", mode=mode)
        return
    if kind in WITHOUT_MERGE:
        with pytest.raises(InputError, match="cannot be merged.*use --mode continue"):
            hand_off(tmp_path / "adapter", output=tmp_path / "merged")
    else:
        hand_off(tmp_path / "adapter", output=tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(logits(merged), logits(before), rtol=1e-4, atol=1e-4)
    hand_off(tmp_path / "adapter", output=tmp_path / "kept", mode="continue")
    torch.testing.assert_close(logits(load_for_rl(tmp_path / "kept")[0].eval()), logits(before), rtol=0, atol=0)


@pytest.mark.parametrize("kind", [*NEEDS_MORE, "FUTURE_TUNER"])
def test_a_type_that_cannot_run_here_is_refused_by_name(bases, tmp_path, kind):
    trained(bases / "tied", tmp_path / "adapter", lora())
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "peft_type": kind}))
    for use in (hand_off, ModelFolder.find):
        with pytest.raises(InputError, match=f"adapter is of type '?{kind}'?, ") as caught:
            use(tmp_path / "adapter")
        assert "\n" not in str(caught.value)
    assert kind == "FUTURE_TUNER" or kind in TYPES
