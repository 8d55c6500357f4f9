"""The arithmetic of hours: each formula on a case worked out by hand, ends in order, times as text."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aesl_trl.errors import InputError
from aesl_trl.estimates.facts import CARDS, Card, cards_of
from aesl_trl.estimates.hours import (
    FAST,
    SLOW,
    VLLM_SEQUENCES,
    Draw,
    End,
    Shares,
    Span,
    Traffic,
    between,
    decoding_s,
    forward_flops,
    generate_s,
    multiplied,
    spelt,
    step_s,
    traffic,
    training_flops,
    vllm_batch,
    vllm_s,
)
from aesl_trl.estimates.memory import GB, Shape, Training


# 2 layers with 500 parameters in linear modules, a head of 100 x 10; queries 8 wide, keys and values 4
SHAPE = Shape(
    parameters=2600,
    linear_parameters=500,
    linear_inputs=30,
    linear_outputs=20,
    linears=3,
    layers=2,
    hidden=10,
    intermediate=20,
    heads=4,
    kv_heads=2,
    head_dim=2,
    vocab=100,
    tied=False,
)
# A card of 1e12 products, 1 GB and 1 GB a second, all of which is reached
CARD = Card("card", 1, 1.0, 1.0, 1.0, "none")
WHOLE = Shares(1.0, 1.0, 1.0, 1.0, True, 0.25, 0.5, 7.0, 0.1, 2.0, 1.0)
END = End(CARD, WHOLE)


def test_a_tokens_products_by_hand():
    assert multiplied(SHAPE) == 1500
    # 2 x 1500, and 2 x 10 tokens x 8 wide x 2 layers of attention
    assert forward_flops(SHAPE, 10) == 3000 + 320
    full, lora = Training(SHAPE), Training(SHAPE, lora_rank=4)
    # Forward, recomputed, to the activations, to the weights: 4 passes of 2 x 500; attention 4; the head 3 of 2 x 1000
    assert training_flops(full, 10) == 4 * 1000 + 4 * 320 + 3 * 2000
    assert training_flops(replace(full, checkpointing=False), 10) == 3 * 1000 + 3 * 320 + 3 * 2000
    assert training_flops(lora, 10) == 3 * 1000 + 4 * 320 + 2 * 2000
    assert training_flops(replace(lora, checkpointing=False), 10) == 2 * 1000 + 3 * 320 + 2 * 2000


def test_six_products_a_parameter_where_nothing_is_recomputed():
    """The rule of thumb: without attention and recomputation, 6 x parameters x tokens."""
    assert training_flops(Training(SHAPE, checkpointing=False), 0) == 6 * multiplied(SHAPE)


@pytest.mark.parametrize(
    ("sharding", "lora", "micro", "step", "forward"),
    [
        # N = 4. 2,600 parameters; an adapter of rank 4 trains 4 x 50 x 2 = 400. Shares of 3/4
        ("none", None, 0, 2 * 0.75 * 2600 * 2, 0),  # a ring sends bf16 gradients twice
        ("none", 4, 0, 2 * 0.75 * 400 * 4, 0),  # float32 adapters
        ("zero2", None, 0.75 * 2600 * 2, 0.75 * 2600 * 2, 0),
        ("zero3", None, 3 * 0.75 * 2600 * 2, 0, 0.75 * 2600 * 2),  # two gathers, one reduction
        ("zero3", 4, (2 * 0.75 * 2600 + 0.75 * 400) * 2, 0, 0.75 * 2600 * 2),
        ("fsdp", None, 2 * 0.75 * 2600 * 2, 0.75 * 2600 * 2, 0.75 * 2600 * 2),
        ("fsdp", 4, 2 * 0.75 * 2600 * 2, 0.75 * 400 * 2, 0.75 * 2600 * 2),
    ],
)
def test_traffic_by_hand(sharding, lora, micro, step, forward):
    found = traffic(Training(SHAPE, processes=4, sharding=sharding, lora_rank=lora))
    assert (found.micro_gb * GB, found.step_gb * GB, found.forward_gb * GB) == pytest.approx((micro, step, forward))
    assert traffic(Training(SHAPE, sharding=sharding, lora_rank=lora)) == Traffic(0, 0, 0)  # a card alone


@pytest.mark.parametrize(("sharding", "gathers"), [("none", 0), ("zero2", 0), ("zero3", 1), ("fsdp", 1)])
def test_a_pass_without_gradients_sends_what_it_gathers(sharding, gathers):
    run = Training(SHAPE, processes=4, sharding=sharding, rows=3, length=10, micro_batches=2)
    # At 1 GB a second the traffic takes longer than the products. A gather: 3/4 of 2,600 parameters in bf16
    gather_s = 0.75 * 2600 * 2 / 1e9
    assert step_s(run, END, forwards=1) - step_s(run, END) == pytest.approx(2 * gathers * gather_s)
    assert step_s(run, END, forwards=0.5) - step_s(run, END) == pytest.approx(gathers * gather_s)


def test_a_step_by_hand():
    run = Training(SHAPE, rows=3, length=10, micro_batches=2)
    products = 2 * 3 * 10 * (4000 + 1280 + 6000) / 1e12
    assert step_s(run, END) == pytest.approx(products)
    # One more forward pass for each micro-batch: scores of an old policy, or of a reference
    assert step_s(run, END, forwards=1) == pytest.approx(products + 2 * 3 * 10 * 3320 / 1e12)
    quantized = replace(run, lora_rank=4, bits=4)
    assert step_s(quantized, END) == pytest.approx(2 * 2 * 3 * 10 * (3000 + 1280 + 4000) / 1e12)
    # Rows that fill half of their limit: half of the tokens, and half of their attention
    half = End(CARD, replace(WHOLE, filled=0.5))
    assert step_s(run, half) == pytest.approx(2 * 3 * 5 * (4000 + 640 + 6000) / 1e12)


def test_traffic_hides_behind_products_at_the_fast_end_alone():
    run = Training(SHAPE, processes=4, sharding="fsdp", rows=3, length=10, micro_batches=2)
    sent = 2 * 2 * 0.75 * 5200 / 1e9 + 0.75 * 5200 / 1e9  # at 1 GB a second: longer than the products
    assert step_s(run, END) == pytest.approx(sent)
    alone = step_s(replace(run, processes=1), END)
    assert step_s(run, End(CARD, replace(WHOLE, overlaps=False))) == pytest.approx(alone + sent)


def test_a_decoding_step_by_hand():
    # Keys and values of a token: 2 x 2 layers x 2 heads x 2 wide x 2 bytes. Logits: 6 reads of 100 in float32
    weights, cache, logits = 2 * 1500 / 1e9, 5 * 8 * 32 / 1e9, 4 * 6 * 5 * 100 / 1e9
    assert decoding_s(SHAPE, END, 5, 8) == pytest.approx(weights + cache + logits)
    # On a card that computes slowly the products are what takes time: 2 x 1500 a sequence
    slow = End(replace(CARD, tflops=1e-6), WHOLE)
    assert decoding_s(SHAPE, slow, 5, 8) == pytest.approx(5 * 3000 / 1e6 + cache + logits)


def test_generate_runs_every_batch_to_the_limit():
    # 25 samples in batches of 10 are three; a step is two layers that the CPU launches in 0.25 s each
    assert generate_s(SHAPE, END, Draw(25, 10, 4, 6)) == pytest.approx(3 * 6 * 0.5, rel=1e-6)
    assert generate_s(SHAPE, END, Draw(25, 10, 4, 6, adapter=True)) == pytest.approx(3 * 6 * 0.75, rel=1e-6)
    # Where the card takes longer than the CPU, its own time counts, batch by batch, prompts included
    slow = End(replace(CARD, memory_gb_s=1e-9), replace(WHOLE, layer_s=0.0))
    expected = sum(6 * decoding_s(SHAPE, slow, batch, 4 + 3) for batch in (10, 10, 5))
    expected += 25 * 4 * forward_flops(SHAPE, 4) / 1e12
    assert generate_s(SHAPE, slow, Draw(25, 10, 4, 6)) == pytest.approx(expected)


def test_vllm_refills_places_and_drains_at_the_end():
    half = End(CARD, replace(WHOLE, filled=0.5))
    # 40 samples of 8 tokens each on average, 10 at once: 32 steps, and 8 more until the longest is at its limit of 16
    assert vllm_s(SHAPE, half, Draw(40, 10, 4, 16)) == pytest.approx(40 * 0.5, rel=1e-4)
    # Fewer samples than places: one wave, to the limit
    assert vllm_s(SHAPE, END, Draw(4, 10, 4, 16)) == pytest.approx(16 * 0.5, rel=1e-4)


def test_vllms_places():
    # 3 GB less vLLM's own 2 and 5.2 kB of weights hold sequences of 1,000,000 tokens x 32 bytes
    assert vllm_batch(SHAPE, 3.0, 1_000_000) == 31
    assert vllm_batch(SHAPE, 3.0, 10) == VLLM_SEQUENCES
    assert vllm_batch(SHAPE, 1.0, 10) == 1  # what does not fit is memory.py's to say


sizes = st.integers(1, 5000)


@given(count=sizes, batch=sizes, prompt=sizes, limit=sizes, gpu_gb=st.sampled_from([card.gb for card in CARDS]))
def test_the_fast_end_is_the_faster_one(count, batch, prompt, limit, gpu_gb):
    draw = Draw(count, batch, prompt, limit)
    run = Training(SHAPE, processes=2, sharding="fsdp", rows=batch, length=prompt, micro_batches=3)
    kinds = (
        lambda end: generate_s(SHAPE, end, draw),
        lambda end: vllm_s(SHAPE, end, draw),
        lambda end: step_s(run, end),
    )
    for seconds in kinds:
        found = between(gpu_gb, seconds)
        assert 0 < found.fast <= found.slow < math.inf


def test_what_is_expected_is_a_share():
    for shares in (FAST, SLOW):
        assert all(0 < getattr(shares, name) <= 1 for name in ("train", "sample", "memory", "link", "filled"))


def test_cards_come_fast_first_and_an_unknown_size_is_refused():
    assert [card.name for card in cards_of(24.0)] == ["RTX 4090", "RTX 3090"]
    assert [card.name for card in cards_of(141)] == ["H200", "H200"]
    with pytest.raises(InputError, match="no card of 23 GB .* 12, 24, 40, 48, 80, 141 GB"):
        cards_of(23)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "under 1 min"),
        (56, "under 1 min"),
        (58, "1 min"),
        (59 * 60, "59 min"),
        (59.6 * 60, "1.0 h"),
        (9.94 * 3600, "9.9 h"),
        (9.96 * 3600, "10 h"),
        (100 * 3600, "100 h"),
    ],
)
def test_hours_under_one_are_minutes(seconds, text):
    assert spelt(seconds) == text


def test_a_span_names_its_unit_once():
    assert str(Span(60, 120)) == "1 to 2 min"
    assert str(Span(1800, 7200)) == "30 min to 2.0 h"
    assert str(Span(3600, 3600)) == "1.0 h"
    assert str(Span(1, 120)) == "up to 2 min"
    assert Span(1, 2) + Span(3, 4) * 2 == Span(7, 10)
