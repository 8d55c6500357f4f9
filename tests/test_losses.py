"""AESL's definition against hand-worked numbers, a token loop, gradcheck and its limits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aesl_trl.losses import (
    PREFIX_MODES,
    aesl_loss,
    aesl_scores,
    aesl_temperatures,
    aesl_weights,
    gold_log_probs,
    nll_loss,
    prefix_sums,
    weighted_nll,
)


LOGITS = torch.tensor([[2, 0, -1, 0.5], [0, 3, 1, -2], [1, 1, 1, 1], [4, 0, 0, -1]], dtype=torch.float64).unsqueeze(0)
LABELS = torch.tensor([[0, 1, 2, 1]])
WORKED = {
    "inclusive": (
        [1.0270487472, 0.7767974175, 1.9041593061, 4.4599608166],
        [0.3000416164, 0.0899212843, 0.75, 0.8095620907],
        1.107710218768,
    ),
    "exclusive": (
        [1.0, 1.0270487472, 0.7767974175, 1.9041593061],
        [0.2899000771, 0.1695879181, 0.75, 0.9070895836],
        1.208900538494,
    ),
    "none": ([3.0, 3.0, 3.0, 3.0], [0.5980428255, 0.5169483882, 0.75, 0.8463948693], 1.189176533920),
}


@pytest.mark.parametrize("prefix_mode", PREFIX_MODES)
def test_worked_example(prefix_mode):
    temperatures, weights, loss = WORKED[prefix_mode]
    settings = {"t_scaling": 3.0, "min_temperature": 1e-3, "prefix_mode": prefix_mode}
    scores = aesl_scores(LOGITS, LABELS, **settings)
    torch.testing.assert_close(
        scores.temperatures[0], torch.tensor(temperatures, dtype=torch.float64), atol=1e-10, rtol=0
    )
    torch.testing.assert_close(scores.weights[0], torch.tensor(weights, dtype=torch.float64), atol=1e-10, rtol=0)
    assert abs(aesl_loss(LOGITS, LABELS, **settings).item() - loss) < 1e-10


def token_loop(logits, labels, sequence_ids, t_scaling, min_temperature, prefix_mode):
    """Eq. 4 read literally, one token at a time, in Python floats."""
    weights, total = torch.zeros(labels.shape, dtype=torch.float64), 0.0
    for row in range(labels.size(0)):
        seen, document = [], None
        for t in range(labels.size(1)):
            if sequence_ids[row, t].item() != document:
                seen, document = [], sequence_ids[row, t].item()
            gold = labels[row, t].item()
            if gold == -100:
                continue
            z = logits[row, t].tolist()
            log_prob = z[gold] - max(z) - math.log(math.fsum(math.exp(x - max(z)) for x in z))
            prefix = [*seen, log_prob] if prefix_mode == "inclusive" else list(seen)
            seen.append(log_prob)
            if prefix_mode == "none":
                temperature = t_scaling
            else:
                temperature = -t_scaling * math.fsum(prefix) / len(prefix) if prefix else 1.0
            temperature = max(min_temperature, temperature)
            exp = [math.exp((x - max(z)) / temperature) for x in z]
            weights[row, t] = math.fsum(e for v, e in enumerate(exp) if v != gold) / math.fsum(exp)
            total -= weights[row, t].item() * log_prob
    return weights, total / max(1, (labels != -100).sum().item())


def packed_batch(seed, rows=3, length=23, vocab=11, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, length, vocab, generator=generator, dtype=torch.float64) * spread
    labels = torch.randint(vocab, (rows, length), generator=generator)
    labels[torch.rand(rows, length, generator=generator) < 0.3] = -100
    borders = torch.rand(rows, length, generator=generator) < 0.25  # one-token documents included
    return logits, labels, borders.cumsum(1)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    prefix_mode=st.sampled_from(PREFIX_MODES),
    t_scaling=st.sampled_from([0.1, 1.0, 3.0, 20.0]),
    spread=st.sampled_from([0.1, 3.0, 30.0]),
)
def test_equals_token_loop_on_packed_batches(seed, prefix_mode, t_scaling, spread):
    logits, labels, sequence_ids = packed_batch(seed, spread=spread)
    arguments = {"t_scaling": t_scaling, "min_temperature": 1e-2, "prefix_mode": prefix_mode}
    weights, loss = token_loop(logits, labels, sequence_ids, **arguments)
    arguments["sequence_ids"] = sequence_ids
    torch.testing.assert_close(aesl_weights(logits, labels, **arguments), weights, atol=1e-11, rtol=1e-9)
    torch.testing.assert_close(aesl_loss(logits, labels, **arguments).item(), loss, atol=1e-11, rtol=1e-10)


@pytest.mark.parametrize("prefix_mode", PREFIX_MODES)
def test_gradient_is_that_of_the_constant_weight(prefix_mode):
    logits, labels, sequence_ids = packed_batch(1, rows=2, length=7, vocab=5)
    weights = aesl_weights(logits, labels, prefix_mode=prefix_mode, sequence_ids=sequence_ids)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: weighted_nll(gold_log_probs(z, labels), weights, 3), logits)
    aesl_loss(logits, labels, num_items=3, prefix_mode=prefix_mode, sequence_ids=sequence_ids).backward()
    softmax, onehot = logits.detach().softmax(-1), torch.nn.functional.one_hot(labels.clamp(min=0), 5)
    torch.testing.assert_close(logits.grad, (softmax - onehot) * (weights / 3).unsqueeze(-1), atol=1e-14, rtol=1e-12)


def test_packing_equals_separate_rows():
    logits, labels, _ = packed_batch(2, rows=1, length=12)
    ids = torch.tensor([[7] * 5 + [3] * 1 + [7] * 6])  # an id may return: only the border counts
    packed = aesl_weights(logits, labels, sequence_ids=ids)
    apart = [aesl_weights(logits[:, a:b], labels[:, a:b]) for a, b in ((0, 5), (5, 6), (6, 12))]
    torch.testing.assert_close(packed, torch.cat(apart, 1), atol=1e-14, rtol=0)


def test_ignored_labels_change_nothing():
    logits, labels, _ = packed_batch(3, rows=1)
    kept = labels[0] != -100
    torch.testing.assert_close(
        aesl_weights(logits, labels)[0, kept], aesl_weights(logits[:, kept], labels[:, kept])[0], atol=1e-14, rtol=0
    )
    assert (aesl_weights(logits, labels)[0, ~kept] == 0).all()


def test_weight_one_is_nll_and_weight_zero_is_nothing():
    logits, labels, _ = packed_batch(4)
    logits.requires_grad_()
    reference = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    log_probs, num_items = gold_log_probs(logits, labels), (labels != -100).sum()
    assert torch.equal(weighted_nll(log_probs, torch.ones_like(log_probs), num_items), nll_loss(logits, labels))
    torch.testing.assert_close(nll_loss(logits, labels), reference, atol=1e-14, rtol=0)
    weighted_nll(log_probs, torch.zeros_like(log_probs), num_items).backward()
    assert (logits.grad == 0).all()


def test_all_masked_is_a_differentiable_zero():
    logits = torch.randn(1, 4, 5, requires_grad=True)
    loss = aesl_loss(logits, torch.full((1, 4), -100))
    loss.backward()
    assert loss.item() == 0 and (logits.grad == 0).all()


def test_half_precision_is_computed_in_float32():
    logits, labels, _ = packed_batch(5)
    half = logits.bfloat16()
    assert aesl_weights(half, labels).dtype == torch.float32
    torch.testing.assert_close(aesl_weights(half, labels), aesl_weights(half.float(), labels))
    assert aesl_weights(logits, labels).dtype == torch.float64


# Where the weight surprises


def certain(gap, vocab=1000):
    logits = torch.zeros(1, 1, vocab, dtype=torch.float64)
    logits[0, 0, 0] = gap
    return logits, torch.zeros(1, 1, dtype=torch.long)


def test_a_certain_token_at_a_fixed_temperature_is_released():
    logits, labels = certain(200.0)
    assert aesl_weights(logits, labels, prefix_mode="none", t_scaling=1.0).item() < 1e-80


def test_a_certain_token_after_a_surprising_prefix_keeps_its_weight_but_has_no_gradient():
    # vocabulary 1000, prefix mean -12, t_scaling 2: T = 24. A gap of 40 nats is certain at T = 1, spread out at T = 24
    logits = torch.zeros(1, 2, 1000, dtype=torch.float64)
    logits[0, 1, 0] = 40.0
    logits[0, 0, 1] = 24.0 + math.log(999.0)  # the first gold token's log-probability is close to -31
    labels = torch.tensor([[0, 0]])
    log_probs = gold_log_probs(logits, labels)
    wanted = 24.0
    scores = aesl_scores(logits, labels, t_scaling=wanted / -log_probs.mean().item())
    assert abs(scores.temperatures[0, 1].item() - wanted) < 1e-9
    assert scores.weights[0, 1].item() == pytest.approx(0.99, abs=0.01)
    logits.requires_grad_()
    weighted_nll(gold_log_probs(logits, labels), scores.weights, 1).backward()
    assert logits.grad[0, 1].abs().max() < 1e-13


def test_infinite_scaling_tends_to_uniform_only_below_a_zero_mean():
    logits, labels, _ = packed_batch(6, vocab=8)
    weights = aesl_weights(logits, labels, t_scaling=1e12)[labels != -100]
    torch.testing.assert_close(weights, torch.full_like(weights, 1 - 1 / 8), atol=1e-8, rtol=0)
    sure, gold = certain(1e6, vocab=8)  # m_t is exactly 0: the temperature stays at its clamp
    assert aesl_weights(sure, gold, t_scaling=1e12).item() == 0.0


def test_low_temperature_asks_whether_gold_is_the_argmax():
    # one rival: q = 0.6 gives w = 1 / (1 + (q / (1 - q)) ** (1 / T)): 0.206 at T 0.3, 0.063 at T 0.15
    logits = torch.tensor([[[math.log(0.6), math.log(0.4)]]], dtype=torch.float64)
    for temperature in (0.3, 0.15):
        expected = 1 / (1 + 1.5 ** (1 / temperature))
        weight = aesl_weights(logits, torch.zeros(1, 1, dtype=torch.long), prefix_mode="none", t_scaling=temperature)
        assert weight.item() == pytest.approx(expected, abs=1e-12)
    # the same 0.4 spread over four rivals releases the token sooner: each is further below gold
    many = torch.tensor([[[math.log(0.6)] + [math.log(0.1)] * 4]], dtype=torch.float64)
    for temperature in (0.3, 0.15):
        expected = 4 / (4 + 6 ** (1 / temperature))
        weight = aesl_weights(many, torch.zeros(1, 1, dtype=torch.long), prefix_mode="none", t_scaling=temperature)
        assert weight.item() == pytest.approx(expected, abs=1e-12)


def test_weight_keeps_its_digits_as_the_probability_nears_one():
    for gap in (10.0, 40.0, 100.0, 500.0):
        logits, labels = certain(gap, vocab=2)
        weight = aesl_weights(logits, labels, prefix_mode="none", t_scaling=1.0).item()
        assert weight == pytest.approx(math.exp(-gap) / (1 + math.exp(-gap)), rel=1e-12)


def test_temperature_clamp_and_first_tokens():
    log_probs, mask = torch.tensor([[0.0, -0.001, -2.0]]).double(), torch.tensor([[True, True, True]])
    sums, counts = prefix_sums(log_probs), prefix_sums(mask)
    temperatures = aesl_temperatures(log_probs, sums, counts, t_scaling=3.0, min_temperature=0.01)
    torch.testing.assert_close(temperatures, torch.tensor([[0.01, 0.01, 2.001]]).double())
    exclusive = aesl_temperatures(log_probs, sums, counts, prefix_mode="exclusive")
    torch.testing.assert_close(exclusive, torch.tensor([[1.0, 0.01, 0.01]]).double())


def test_prefix_sums_over_a_long_packed_row():
    values = torch.full((1, 40_000), -0.1)
    ids = torch.arange(40_000).unsqueeze(0) // 20_000
    sums = prefix_sums(values, ids)
    assert abs(sums[0, 19_999].item() - values[0, 0].double().item() * 20_000) < 1e-8
    assert abs(sums[0, 20_000].item() - values[0, 0].item()) < 1e-8


def test_unknown_prefix_mode():
    with pytest.raises(ValueError, match="prefix_mode"):
        aesl_weights(LOGITS, LABELS, prefix_mode="both")
