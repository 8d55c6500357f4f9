"""Each loss's rule in the fused head against its definition on plain logits: loss and every gradient, in float64."""

import math
from types import SimpleNamespace

import pytest
import torch
from head_problems import LENGTHS, TRANSFORMS, LargestTensor, problem, true_logits
from hypothesis import given, settings
from hypothesis import strategies as st

from aesl_trl.losses import head
from aesl_trl.losses.definition import (
    aesl_loss,
    dft_loss,
    eaft_loss,
    gem_loss,
    gold_log_probs,
    nll_loss,
    psft_loss,
    simple_weights,
    weighted_nll,
)
from aesl_trl.losses.head import HeadSettings, LogitTransform, fused_head
from aesl_trl.losses.rules import (
    TOKEN_RULES,
    aesl_rule,
    dft_rule,
    eaft_rule,
    gem_rule,
    linear_rule,
    nll_rule,
    psft_rule,
    rule_from_logits,
    threshold_rule,
)


def simple_loss(logits, labels, *, num_items, **kind):
    weights = simple_weights(logits, labels, **kind)
    return weighted_nll(gold_log_probs(logits, labels), weights, num_items)


# name: (rule, definition, its settings)
LOSSES = {
    "nll": (nll_rule(), nll_loss, {}),
    "aesl": (aesl_rule(), aesl_loss, {}),
    "aesl_exclusive": (aesl_rule(prefix_mode="exclusive"), aesl_loss, {"prefix_mode": "exclusive"}),
    "aesl_none": (aesl_rule(prefix_mode="none"), aesl_loss, {"prefix_mode": "none"}),
    "aesl_none_1": (
        aesl_rule(prefix_mode="none", t_scaling=1.0),
        aesl_loss,
        {"prefix_mode": "none", "t_scaling": 1.0},
    ),
    "linear": (linear_rule(), simple_loss, {"kind": "linear"}),
    "threshold": (threshold_rule(), simple_loss, {"kind": "threshold"}),
    "threshold_0.01": (threshold_rule(threshold=0.01), simple_loss, {"kind": "threshold", "threshold": 0.01}),
    "dft": (dft_rule(), dft_loss, {}),
    "gem": (gem_rule(), gem_loss, {}),
    "gem_0.2": (gem_rule(beta=0.2), gem_loss, {"beta": 0.2}),
    "gem_sigmoid": (gem_rule(h="sigmoid"), gem_loss, {"h": "sigmoid"}),
    "psft": (psft_rule(), psft_loss, {}),
    "psft_0.05": (psft_rule(clip_high=0.05), psft_loss, {"clip_high": 0.05}),
    "eaft": (eaft_rule(), eaft_loss, {}),
    "eaft_5": (eaft_rule(alpha=2.5, top_k=5), eaft_loss, {"alpha": 2.5, "top_k": 5}),
}
OLD = [name for name in LOSSES if name.startswith("psft")]
PREFIX = [name for name in LOSSES if name.startswith("aesl")]


def old_log_probs(log_probs, seed=0):
    """Of an old policy that is near for most tokens, and far beyond the clamp for some."""
    noise = torch.randn(log_probs.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.2
    noise[::7] *= 200
    return log_probs.detach() + noise


def both(name, tensors, transform=LogitTransform(), num_items=1, **head_settings):  # noqa: B008
    """(loss, gradients) of the rule in the head and of the definition, divided by `num_items`."""
    rule, definition, arguments = LOSSES[name]
    *inputs, labels, ids = tensors
    arguments, found, old = dict(arguments), [], {}
    logits = true_logits(*inputs, transform).unsqueeze(0)
    if name in OLD:
        old["old_log_probs"] = old_log_probs(gold_log_probs(logits, labels.unsqueeze(0)))
    if name in PREFIX:
        arguments["sequence_ids"] = ids.unsqueeze(0)
    expected = definition(logits, labels.unsqueeze(0), num_items=num_items, **arguments, **old)
    flat = {key: value.squeeze(0) for key, value in old.items()}
    scores = fused_head(*tensors, rule, HeadSettings(transform, **head_settings), **flat)
    for loss in (scores.loss_sum / num_items, expected):
        for value in inputs:
            if value is not None:
                value.grad = None
        loss.backward()
        found.append((loss.detach(), [None if value is None else value.grad for value in inputs]))
    return found, scores


def assert_same(found, tolerance=1e-10):
    (loss, gradients), (true_loss, true_gradients) = found
    torch.testing.assert_close(loss, true_loss, atol=tolerance, rtol=tolerance)
    for gradient, value in zip(gradients, true_gradients, strict=True):
        assert (gradient is None) == (value is None)
        if value is not None:
            torch.testing.assert_close(gradient, value, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_definition_on_packed_documents(name, transform):
    for tile_rows in (5, 1000):
        found, scores = both(name, problem(), transform, tile_rows=tile_rows)
        assert_same(found)
        assert found[1][1][1].abs().max() > 1e-3 and torch.isfinite(scores.weights).all()


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(list(LOSSES)),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    vocab=st.integers(2, 40),
    tile_rows=st.integers(1, 60),
    spread=st.sampled_from([0.01, 1.0, 30.0]),
    num_items=st.sampled_from([1, 7, 1e6]),
    with_bias=st.booleans(),
    seed=st.integers(0, 100),
)
def test_equals_the_definition_for_any_shape(
    name, lengths, vocab, tile_rows, spread, num_items, with_bias, seed, monkeypatch_module
):
    """Spread 30 gives gaps of hundreds of nats; a vocabulary below EAFT's top-k takes it whole."""
    monkeypatch_module.setattr(head, "CPU_SWEEP_ENTRIES", 3 * vocab)
    hidden, weight, bias, labels, ids = problem(tuple(lengths), 4, vocab, seed=seed, spread=spread)
    found, _ = both(
        name, (hidden, weight, bias if with_bias else None, labels, ids), num_items=num_items, tile_rows=tile_rows
    )
    assert_same(found)


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.mark.parametrize("name", LOSSES)
def test_confident_logits(name):
    """Gaps up to 700 nats, the label on top, at the bottom, and equal to another: nothing overflows."""
    gaps = torch.tensor([0.0, 5.0, 40.0, 700.0, -5.0, -40.0, -700.0], dtype=torch.float64).unsqueeze(1)
    weight = torch.tensor([[1.0], [0.0], [0.0], [-1.0]], dtype=torch.float64).requires_grad_()
    labels, ids = torch.zeros(7, dtype=torch.long), torch.arange(7)
    found, scores = both(name, (gaps.requires_grad_(), weight, None, labels, ids))
    assert_same(found)
    assert all(torch.isfinite(value).all() for value in (scores.loss_sum, scores.weights, found[0][1][0]))


@pytest.mark.parametrize("name", LOSSES)
def test_no_token_is_a_differentiable_zero(name):
    hidden, weight, bias, labels, ids = problem()
    none = slice(0, 0)
    old = torch.zeros(0, dtype=torch.float64) if name in OLD else None
    scores = fused_head(hidden[none], weight, bias, labels[none], ids[none], LOSSES[name][0], old_log_probs=old)
    scores.loss_sum.backward()
    assert scores.loss_sum.item() == 0 and all((value.grad == 0).all() for value in (hidden, weight, bias))


@pytest.mark.parametrize("name", LOSSES)
def test_float32_is_within_its_rounding(name):
    """The head's error against float64 may not exceed that of the definition in float32 by more than a fifth."""
    found, _ = both(name, problem(dtype=torch.float32, spread=0.5))
    tensors = problem(dtype=torch.float32, spread=0.5)
    wide = [value.detach().double().requires_grad_() for value in tensors[:3]]
    truth = both(name, (*wide, *tensors[3:]))[0][1][1]
    for fused, plain, value in zip(found[0][1], found[1][1], truth, strict=True):
        error, plain_error = ((x.double() - value).norm() for x in (fused, plain))
        assert error <= 1.2 * plain_error + 1e-6 * value.norm()


@pytest.mark.parametrize("name", LOSSES)
def test_one_pass_over_three_products_and_no_logits_beyond_the_tile(name, monkeypatch):
    count, vocab = 700, 900
    hidden, weight, _, labels, ids = problem((count,), 8, vocab, torch.float32)
    products = []
    for kind in ("_product", "_add_product"):
        original = getattr(head, kind)
        monkeypatch.setattr(head, kind, lambda *a, _f=original, _k=kind, **k: (products.append(_k), _f(*a, **k)))
    with LargestTensor() as largest:
        fused_head(hidden, weight, None, labels, ids, LOSSES[name][0], HeadSettings(tile_rows=64)).loss_sum.backward()
    assert largest.elements == 64 * vocab
    assert len(products) == 3 * math.ceil(count / 64)


@pytest.mark.parametrize("name", LOSSES)
def test_evaluation_has_the_same_loss_and_no_gradient(name):
    with torch.no_grad():
        scores = fused_head(*problem(), LOSSES[name][0])
    assert not scores.loss_sum.requires_grad
    assert torch.equal(scores.loss_sum, fused_head(*problem(), LOSSES[name][0]).loss_sum)


# ---- Limits that tie one loss to another


def gradients_of(rule, **settings):
    hidden, weight, bias, labels, ids = problem()
    scores = fused_head(hidden, weight, bias, labels, ids, rule, HeadSettings(**settings))
    scores.loss_sum.backward()
    return [value.grad for value in (hidden, weight, bias)], scores


@pytest.mark.parametrize(
    ("rule", "same"),
    [
        (gem_rule(beta=1.0), nll_rule()),
        (psft_rule(), nll_rule()),  # without an old policy the ratio is 1
        (linear_rule(), aesl_rule(prefix_mode="none", t_scaling=1.0)),
        (threshold_rule(threshold=1 - 1e-15), nll_rule()),
        (eaft_rule(alpha=1e-12, top_k=2), nll_rule()),
    ],
    ids=["gem at beta 1", "psft at a refresh", "linear", "threshold near 1", "eaft at alpha 0"],
)
def test_limits(rule, same):
    for found, expected in zip(gradients_of(rule)[0], gradients_of(same)[0], strict=True):
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


def test_psft_without_an_old_policy_is_minus_the_number_of_tokens():
    _, scores = gradients_of(psft_rule())
    assert scores.loss_sum.item() == -sum(LENGTHS) and (scores.weights == 1).all()


def test_psft_releases_what_rose_and_keeps_what_fell():
    hidden, weight, bias, labels, ids = problem((4,))
    log_probs = gold_log_probs(true_logits(hidden, weight, bias), labels).detach()
    rise = torch.tensor([1.27, 1.29, 0.5, 1e-12], dtype=torch.float64)  # the last one beyond the clamp at -20 nats
    scores = fused_head(hidden, weight, bias, labels, ids, psft_rule(), old_log_probs=log_probs - rise.log())
    assert scores.weights.tolist() == pytest.approx([1.27, 0.0, 0.5, 0.0], rel=1e-12)
    assert scores.loss_sum.item() == pytest.approx(-(1.27 + 1.28 + 0.5 + math.exp(-20)), rel=1e-12)


# ---- Rules of one's own


def test_a_loss_of_the_logits_gets_its_gradient_from_autograd():
    def by_token(logits, labels):
        return torch.stack(
            [gem_loss(z[None], y[None], num_items=1, h="sigmoid") for z, y in zip(logits, labels, strict=True)]
        )

    found, scores = gradients_of(rule_from_logits(by_token), tile_rows=50)
    expected, true_scores = gradients_of(gem_rule(h="sigmoid"))
    torch.testing.assert_close(scores.loss_sum, true_scores.loss_sum, atol=1e-10, rtol=1e-12)
    for gradient, value in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, value, atol=1e-12, rtol=1e-12)


def test_a_rule_that_reads_the_tile_may_have_temperatures_too():
    """The weight of AESL times that of EAFT."""
    eaft, aesl = eaft_rule(), aesl_rule()
    product = aesl._replace(weights=lambda stats: aesl.weights(stats) * eaft.weights(stats), tile=eaft.tile)
    found, scores = gradients_of(product, tile_rows=50)
    weights = gradients_of(aesl)[1].weights * gradients_of(eaft)[1].weights
    torch.testing.assert_close(scores.weights, weights, atol=1e-14, rtol=1e-13)
    hidden, weight, bias, labels, _ = problem()
    weighted_nll(gold_log_probs(true_logits(hidden, weight, bias), labels), weights, 1).backward()
    torch.testing.assert_close(found[1], weight.grad, atol=1e-11, rtol=1e-11)


def test_a_rule_that_is_not_causal_cannot_read_the_tile():
    with pytest.raises(ValueError, match="not causal cannot have temperatures or read the tile"):
        fused_head(*problem(), eaft_rule()._replace(causal=False))


def test_the_table_hands_each_setting_to_its_rule():
    """Two settings of a loss that train alike would mean that a field is not read."""
    settings = {
        "t_scaling": (3.0, 2.0),
        "min_temperature": (1e-2, 50.0),
        "prefix_mode": ("inclusive", "exclusive"),
        "gem_beta": (0.7, 0.5),
        "gem_h": ("linear", "sigmoid"),
        "psft_clip_high": (0.28, 0.05),
        "eaft_alpha": (1.0, 2.0),
        "eaft_top_k": (20, 5),
    }
    defaults = {name: values[0] for name, values in settings.items()}
    defaults |= {"aesl_weight": "adaptive", "weight_threshold": 0.5, "psft_refresh_steps": 8}

    def gradient(loss, **changes):
        rule = TOKEN_RULES[loss].rule(SimpleNamespace(**{**defaults, **changes}))
        hidden, weight, bias, labels, ids = problem()
        old = old_log_probs(gold_log_probs(true_logits(hidden, weight, bias), labels)) if rule.old_policy else None
        fused_head(hidden, weight, bias, labels, ids, rule, old_log_probs=old).loss_sum.backward()
        return hidden.grad

    for loss, row in TOKEN_RULES.items():
        for name in settings.keys() & set(row.fields):
            assert not torch.equal(gradient(loss), gradient(loss, **{name: settings[name][1]})), name
    kinds = [gradient("aesl", aesl_weight=kind) for kind in ("adaptive", "linear", "threshold")]
    kinds.append(gradient("aesl", aesl_weight="threshold", weight_threshold=1e-6))
    assert not any(torch.equal(one, other) for i, one in enumerate(kinds) for other in kinds[:i])
