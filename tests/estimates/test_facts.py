"""facts: the models' numbers are those of the public models."""

from dataclasses import replace

import pytest
from stand_ins import MODELS, RECIPES

from aesl_trl.errors import InputError
from aesl_trl.estimates.facts import read_facts, shape_of


@pytest.mark.parametrize(
    ("name", "parameters"),
    # As the model cards and papers round them: 1.54 B, 7.61 B, 7.61 B, 8.03 B.
    list(zip(MODELS, (1_543_714_304, 7_615_616_512, 7_615_616_512, 8_030_261_248), strict=True)),
)
def test_the_models_numbers_are_those_of_the_public_models(name, parameters):
    facts = read_facts(RECIPES / name / "model_config.json")
    assert shape_of(facts).parameters == parameters
    assert facts.turn_end_id in facts.eos_ids or name == "Qwen2.5-Math-7B"  # a base: its recipe sets eos_token


def test_a_model_of_another_build_is_refused():
    facts = read_facts(RECIPES / MODELS[0] / "model_config.json")
    other = replace(facts, config={"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 16})
    with pytest.raises(
        InputError, match="no dense decoder with a gated MLP: .*num_key_value_heads|.*intermediate_size"
    ):
        shape_of(other)
    with pytest.raises(InputError, match="max_position_embeddings, the model's context, is missing"):
        replace(facts, config={}).context  # noqa: B018
