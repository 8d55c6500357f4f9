"""PEFT settings against the model's names: what matches nothing is refused, and a list of one stays a list."""

import pytest
from peft import IA3Config, LoraConfig, PromptTuningConfig
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl import ModelConfig, get_peft_config

from aesl_trl.errors import InputError
from aesl_trl.models.peft_settings import check_peft_config, list_as_written
from aesl_trl.models.skeleton import skeleton


@pytest.fixture(scope="module")
def network(tiny_model_dir):
    return skeleton(tiny_model_dir)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], exclude_modules=["layers.0"]),
        LoraConfig(target_modules="all-linear"),
        LoraConfig(target_modules=r".*\.(q|v)_proj"),
        LoraConfig(target_modules=["model.layers.1.mlp.up_proj"], rank_pattern={"up_proj": 4}),
        LoraConfig(target_modules=["q_proj"], layers_to_transform=[0, 1], layers_pattern="layers"),
        LoraConfig(target_parameters=["mlp.up_proj.weight"]),
        LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3]}),
        LoraConfig(),
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        PromptTuningConfig(num_virtual_tokens=2),
    ],
)
def test_settings_that_match(config, network):
    before = config.to_dict()
    check_peft_config(config, network)
    assert config.to_dict() == before


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        (LoraConfig(target_modules=["v_proj", "q_porj"]), ("target_modules: 'q_porj'", "did you mean 'q_proj'?")),
        (LoraConfig(target_modules=["experts"]), ("target_modules: 'experts'", "down_proj, embed_tokens")),
        (LoraConfig(target_modules=["all_linear"]), ("'all_linear'", "did you mean 'all-linear'?")),
        (LoraConfig(target_modules=["all-linear", "lm_head"]), ("'all-linear'", "it stands alone, not in a list")),
        (LoraConfig(target_modules="(q|v)_proj"), ("'(q|v)_proj' matches no whole module name", "put .* there")),
        (LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_haed"]), ("modules_to_save", "'lm_head'?")),
        (LoraConfig(target_modules=["q_proj"], exclude_modules=["layer.0"]), ("exclude_modules", "'layers.0'?")),
        (LoraConfig(target_parameters=["up_proj.wieght"]), ("target_parameters", "'up_proj.weight'?")),
        (LoraConfig(target_modules=["q_proj"], rank_pattern={"qproj": 4}), ("rank_pattern: 'qproj'", "'q_proj'?")),
        (LoraConfig(target_modules=["q_proj"], alpha_pattern={"qproj": 4}), ("alpha_pattern: 'qproj'", "'q_proj'?")),
        (LoraConfig(target_modules=["q_proj"], layers_to_transform=[1, 2]), ("no layer 2", "are 0 to 1")),
        (
            LoraConfig(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="blocks"),
            ("layers_to_transform", "no layers named blocks"),
        ),
        (
            LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_token": [1]}),
            ("trainable_token_indices: 'embed_token'", "'embed_tokens'?"),
        ),
        (
            IA3Config(target_modules=["k_proj", "donw_proj"], feedforward_modules=["donw_proj"]),
            ("target_modules: 'donw_proj'", "'down_proj'?"),
        ),
    ],
)
def test_settings_that_match_nothing(config, parts, network):
    with pytest.raises(InputError) as refused:
        check_peft_config(config, network, prefix="lora_")
    assert str(refused.value).startswith("lora_") and all(part in str(refused.value) for part in parts), refused.value


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["q_proj"], {"q_proj"}),
        (["self_attn.q_proj"], {"self_attn.q_proj"}),
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        (["all-linear"], "all-linear"),
        ([r".*\.q_proj"], r".*\.q_proj"),
        (None, None),
    ],
)
def test_a_list_of_one_stays_a_list(given, expected):
    """TRL's ModelConfig makes a string of it, which PEFT would match from the name's first letter on."""
    config = list_as_written(get_peft_config(ModelConfig(use_peft=True, lora_target_modules=given)))
    assert config.target_modules == expected


def test_without_peft_there_is_nothing_to_do():
    assert list_as_written(None) is None


def test_patterns_that_peft_adds_for_experts_are_its_own():
    """PEFT moves the experts of such a model to parameters, and names them in `rank_pattern`."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "moe_intermediate_size": 8, "head_dim": 8, "vocab_size": 64}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **layers, num_experts=4, num_experts_per_tok=2))
    check_peft_config(LoraConfig(target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"]), model, prefix="")
