"""The token budget of a measurement (what gives way, in which order, and where it ends), and vLLM's obstacles."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny_models import build_model

from aesl_trl.errors import InputError
from aesl_trl.losses.scoring import add_fused_head
from aesl_trl.training.measurement import DEFAULT_BUDGETS, FLOORS, Size, _vllm_obstacle, budget_of, fit


@pytest.mark.parametrize(
    ("asked", "budget", "expected"),
    [
        (Size(64, 8, 512), 32_768, Size(16, 8, 256)),  # the defaults with generate
        (Size(64, 8, 512), 131_072, Size(32, 8, 512)),  # and with vLLM
        (Size(96, 8, 12), 32_768, Size(96, 8, 12)),
        (Size(64, 8, 512), None, Size(64, 8, 512)),
        (Size(64, 8, 512), 65_536, Size(16, 8, 512)),  # prompts alone
        (Size(64, 8, 512), 65_535, Size(16, 8, 511)),  # then the length
        (Size(64, 8, 512), 32_767, Size(16, 7, 256)),  # then samples
        (Size(64, 8, 512), 16_384, Size(16, 4, 256)),
        (Size(40, 4, 300), 24_000, Size(20, 4, 300)),
        (Size(10, 32, 100), 16_000, Size(10, 16, 100)),  # below a floor already: left as it is
    ],
)
def test_what_gives_way(asked, budget, expected):
    assert fit(asked, budget) == expected


sizes = st.builds(Size, st.integers(1, 200), st.integers(2, 64), st.integers(1, 4096))


@given(asked=sizes, budget=st.integers(1, 10**6))
def test_fits_from_below_and_never_under_the_floors(asked, budget):
    least = [min(getattr(asked, name), floor) for name, floor in FLOORS.items()]
    if least[0] * least[1] * least[2] > budget:
        with pytest.raises(InputError, match=r"set diversity_token_budget to \d+ or more, or to 0"):
            fit(asked, budget)
        return
    size = fit(asked, budget)
    assert size.tokens <= budget
    for (name, floor), low in zip(FLOORS.items(), least, strict=True):
        assert low <= getattr(size, name) <= getattr(asked, name), (name, floor)
    if asked.tokens <= budget:
        assert size == asked
    names = list(FLOORS)
    for place, name in enumerate(names):  # nothing gives way before what stands in front of it is at its floor
        if getattr(size, name) < getattr(asked, name):
            assert all(getattr(size, first) == least[at] for at, first in enumerate(names[:place]))


@pytest.mark.parametrize("backend", DEFAULT_BUDGETS)
def test_defaults_and_no_limit(backend):
    assert budget_of(backend, None) == DEFAULT_BUDGETS[backend]
    assert budget_of(backend, 0) is None
    assert budget_of(backend, 5) == 5


def test_a_budget_below_the_smallest_measurement_names_the_nearest_one():
    with pytest.raises(InputError, match="16 prompts x 4 samples x 256 tokens, takes 16384: set .* to 16384 or more"):
        fit(Size(64, 8, 512), 1000)


def test_at_another_temperature_vllm_needs_the_fused_head(tokenizer):
    model = build_model(tokenizer)
    model.name_or_path = "tiny"
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for candidate in (model, adapted):
        assert _vllm_obstacle(candidate, 1.0) is None
        assert _vllm_obstacle(candidate, 0.5) == "at temperature 0.5 the entropy needs AESLSFTTrainer's fused head"
    add_fused_head(model)
    assert _vllm_obstacle(model, 0.5) is None and _vllm_obstacle(adapted, 0.5) is None
