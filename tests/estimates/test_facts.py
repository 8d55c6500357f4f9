"""facts: the models' numbers are those of the public models."""

import pytest
from stand_ins import MODELS, RECIPES

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
