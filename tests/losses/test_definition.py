"""AESL's definition against hand-worked numbers, a token loop, gradcheck and its limits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aesl_trl.losses.definition import (
    GEM_H,
    PREFIX_MODES,
    aesl_loss,
    aesl_scores,
    aesl_temperatures,
    aesl_weights,
    dft_loss,
    eaft_loss,
    gem_loss,
    gold_log_probs,
    nll_loss,
    prefix_sums,
    psft_loss,
    simple_weights,
    top_k_entropy,
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


# ---- Rivals and ablations: constants worked from the authors' formulas in 30 digits

OLD_LOG_PROBS = torch.tensor([[-0.5, -0.1, -2.0, -3.0]], dtype=torch.float64)  # ratios 1.171, 0.927, 1.847, 0.353
RIVALS = {
    "nll": (nll_loss, {}, 1.48665360554074704608),
    "dft": (dft_loss, {}, 0.20197506251221426531),
    "gem linear": (gem_loss, {}, 0.88526769642524001700),
    "gem linear 0.3": (gem_loss, {"beta": 0.3}, 0.99615558501168567479),
    "gem sigmoid": (gem_loss, {"h": "sigmoid"}, 0.45310210261988815358),
    "gem sigmoid 0.3": (gem_loss, {"beta": 0.3, "h": "sigmoid"}, 0.50809266837543713180),
    "psft": (psft_loss, {"old_log_probs": OLD_LOG_PROBS}, -0.93265257661394025808),
    "eaft": (eaft_loss, {}, 0.26583036453485942247),
    "eaft squared": (eaft_loss, {"alpha": 2.0}, 0.08804858022458059193),
    "eaft top 2": (eaft_loss, {"top_k": 2}, 0.12932212426803221985),
}


@pytest.mark.parametrize("name", RIVALS)
def test_rivals_have_their_authors_values(name):
    loss, arguments, value = RIVALS[name]
    assert loss(LOGITS, LABELS, **arguments).item() == pytest.approx(value, rel=1e-14)
    assert loss(LOGITS, LABELS, num_items=10, **arguments).item() == pytest.approx(value * 4 / 10, rel=1e-14)


@pytest.mark.parametrize(
    ("kind", "value"), [("linear", 1.28467854302853278077), ("threshold", 1.35718736928911288372)]
)
def test_simple_weights_have_their_values(kind, value):
    weights = simple_weights(LOGITS, LABELS, kind=kind)
    assert weighted_nll(gold_log_probs(LOGITS, LABELS), weights, 4).item() == pytest.approx(value, rel=1e-14)


@pytest.mark.parametrize("name", RIVALS)
def test_ignored_labels_and_masked_rows_change_no_rival(name):
    loss, arguments, _ = RIVALS[name]
    logits = torch.cat([LOGITS, torch.randn(1, 3, 4).double() * 9], 1).requires_grad_()
    labels = torch.cat([LABELS, torch.full((1, 3), -100)], 1)
    padded = dict(arguments)
    if "old_log_probs" in padded:  # what stands where nothing is trained is not read
        padded["old_log_probs"] = torch.cat([OLD_LOG_PROBS, torch.full((1, 3), torch.nan)], 1)
    found = loss(logits, labels, **padded)
    found.backward()
    assert found.item() == pytest.approx(loss(LOGITS, LABELS, **arguments).item(), rel=1e-14)
    assert (logits.grad[0, 4:] == 0).all() and (logits.grad[0, :4] != 0).any()
    logits.grad = None
    nothing = loss(logits, torch.full((1, 7), -100), **padded)
    nothing.backward()
    assert nothing.item() == 0 and (logits.grad == 0).all()


@pytest.mark.parametrize("h", GEM_H)
@pytest.mark.parametrize("beta", [0.2, 0.7, 1.0])
def test_gradient_of_gem(beta, h):
    """r h - onehot sum(r h); with h 1, softmax(z / beta) - onehot."""
    logits, labels, _ = packed_batch(8, rows=1, length=9, vocab=6)
    labels = labels.clamp(min=0)
    logits.requires_grad_()
    gem_loss(logits, labels, beta=beta, h=h, num_items=1).backward()
    z, onehot = logits.detach(), torch.nn.functional.one_hot(labels, 6)
    target = (z / beta).softmax(-1)
    if h == "sigmoid":
        target = target * torch.sigmoid(0.01 * (z - (z * onehot).sum(-1, keepdim=True)))
    torch.testing.assert_close(logits.grad, target - onehot * target.sum(-1, keepdim=True), atol=1e-13, rtol=0)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), clip_low=st.floats(0.01, 0.99), clip_high=st.floats(0.05, 2.0))
def test_gradient_of_psft(seed, clip_low, clip_high):
    """It is the true one; the lower clip changes nothing."""
    logits, labels, _ = packed_batch(seed, rows=1, length=7, vocab=5)
    log_probs = gold_log_probs(logits, labels)
    old = log_probs + torch.randn(log_probs.shape, generator=torch.Generator().manual_seed(seed)) * 0.3
    logits.requires_grad_()

    def loss(z, low=clip_low):
        return psft_loss(z, labels, old, clip_low=low, clip_high=clip_high, num_items=1)

    ratios = (log_probs - old).exp()
    if ((ratios - 1 - clip_high).abs() > 1e-4).all():  # gradcheck steps over the corner otherwise
        assert torch.autograd.gradcheck(loss, logits)
    (gradient,) = torch.autograd.grad(loss(logits), logits)
    (other,) = torch.autograd.grad(loss(logits, 0.5), logits)
    assert torch.equal(gradient, other) and torch.equal(loss(logits), loss(logits, 0.5))
    softmax, onehot = logits.detach().softmax(-1), torch.nn.functional.one_hot(labels.clamp(min=0), 5)
    weights = ratios.where((ratios <= 1 + clip_high) & (labels != -100), 0.0)
    torch.testing.assert_close(gradient, (softmax - onehot) * weights.unsqueeze(-1), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["dft", "eaft"])
def test_weights_of_dft_and_eaft_are_constants_in_the_backward_pass(name):
    logits, labels, _ = packed_batch(9, rows=2, length=7, vocab=30)
    log_probs = gold_log_probs(logits, labels)
    weights = log_probs.exp() if name == "dft" else top_k_entropy(logits, 20) / 3
    logits.requires_grad_()
    RIVALS[name][0](logits, labels, num_items=3).backward()
    found = logits.grad
    assert torch.autograd.gradcheck(lambda z: weighted_nll(gold_log_probs(z, labels), weights, 3), logits)
    logits.grad = None
    weighted_nll(gold_log_probs(logits, labels), weights, 3).backward()
    torch.testing.assert_close(found, logits.grad, atol=1e-14, rtol=0)


def test_linear_weight_is_no_prefix_at_temperature_one():
    logits, labels, _ = packed_batch(10)
    weights = simple_weights(logits, labels, kind="linear")
    torch.testing.assert_close(weights, (1 - gold_log_probs(logits, labels).exp()).where(labels != -100, 0.0))


def test_top_k_entropy_ends():
    assert top_k_entropy(torch.zeros(1, 50).double(), 20).item() == pytest.approx(math.log(20), rel=1e-14)
    assert top_k_entropy(torch.zeros(1, 7).double(), 20).item() == pytest.approx(math.log(7), rel=1e-14)
    sure = torch.zeros(1, 50).double()
    sure[0, 3] = 800.0
    assert top_k_entropy(sure, 20).item() == 0.0


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: gem_loss(LOGITS, LABELS, h="logsigmoid"), "h is 'logsigmoid'"),
        (lambda: simple_weights(LOGITS, LABELS, kind="adaptive"), "kind is 'adaptive'"),
    ],
)
def test_unknown_kinds(call, name):
    with pytest.raises(ValueError, match=name):
        call()
