"""The fused head against the definition: every statistic and gradient, in float64, then with earned tolerances."""

import math

import pytest
import torch
from head_problems import (
    AESL_SETTINGS,
    LENGTHS,
    TRANSFORMS,
    LargestTensor,
    assert_equal,
    found_by_head,
    problem,
    true_logits,
    truth,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from aesl_trl.losses import head
from aesl_trl.losses.definition import aesl_scores, gold_log_probs, weighted_nll
from aesl_trl.losses.head import HeadSettings, LogitTransform, fused_head
from aesl_trl.losses.rules import TokenRule, aesl_rule, nll_rule


@pytest.mark.parametrize("settings", AESL_SETTINGS, ids=lambda s: f"{s['prefix_mode']}-{s['t_scaling']}")
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_equals_the_definition(transform, settings):
    tensors = problem()
    expected = truth(*tensors, transform, **settings)
    for tile_rows in (1, 5, 64, 1000):
        scores, gradients = found_by_head(*tensors, aesl_rule(**settings), transform, tile_rows=tile_rows)
        # Temperatures reach 100 times a log-probability of 60: 1e-11 is 2e-15 of them
        assert_equal(scores, gradients, expected, atol=1e-12, rtol=1e-13)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    vocab=st.integers(2, 40),
    width=st.integers(1, 5),
    tile_rows=st.integers(1, 60),
    t_scaling=st.floats(0.1, 100),
    min_temperature=st.floats(1e-3, 2),
    prefix_mode=st.sampled_from(["inclusive", "exclusive", "none"]),
    with_bias=st.booleans(),
    seed=st.integers(0, 100),
)
def test_equals_the_definition_for_any_shape(
    lengths, vocab, width, tile_rows, t_scaling, min_temperature, prefix_mode, with_bias, seed
):
    hidden, weight, bias, labels, ids = problem(tuple(lengths), width, vocab, seed=seed)
    tensors = (hidden, weight, bias if with_bias else None, labels, ids)
    settings = {"t_scaling": t_scaling, "min_temperature": min_temperature, "prefix_mode": prefix_mode}
    scores, gradients = found_by_head(*tensors, aesl_rule(**settings), tile_rows=tile_rows)
    assert_equal(scores, gradients, truth(*tensors, LogitTransform(), **settings), atol=1e-12, rtol=1e-12)


def test_sweeps_in_blocks_smaller_than_the_tile(monkeypatch):
    """A vocabulary of 152k leaves three rows to a block; the prefix runs on over blocks and tiles."""
    tensors = problem()
    expected = truth(*tensors, LogitTransform())
    for rows in (1, 3, 20):
        monkeypatch.setattr(head, "CPU_SWEEP_ENTRIES", rows * 337)
        scores, gradients = found_by_head(*tensors, aesl_rule(), tile_rows=64)
        assert_equal(scores, gradients, expected, atol=1e-12, rtol=1e-13)


def test_float32_is_within_its_rounding():
    tensors = problem(dtype=torch.float32)
    expected = truth(*tensors, LogitTransform())
    scores, gradients = found_by_head(*tensors, aesl_rule())
    assert scores.log_probs.dtype == torch.float32
    # Logits up to 60 are rounded by 60 * 2^-24 = 4e-6 in each of two summations
    assert_equal(scores, gradients, expected, atol=2e-5, rtol=1e-6)


# ---- Rules


def test_nll_has_weight_one():
    hidden, weight, bias, labels, ids = problem()
    scores, gradients = found_by_head(hidden, weight, bias, labels, ids, nll_rule())
    expected = truth(hidden, weight, bias, labels, ids, LogitTransform(), weights=torch.ones(len(labels)).double())
    assert_equal(scores, gradients, expected, atol=1e-12, rtol=1e-13)
    reference = torch.nn.functional.cross_entropy(true_logits(hidden, weight, bias), labels, reduction="sum")
    torch.testing.assert_close(scores.loss_sum, reference.detach(), atol=0, rtol=1e-14)


def test_a_rule_of_ones_own():
    """DFT, weight q: a rule needs no more than a function of the statistics."""
    tensors = problem()
    rule = TokenRule(weights=lambda stats: stats.log_probs.exp())
    with torch.no_grad():
        weights = gold_log_probs(true_logits(*tensors[:3]), tensors[3]).exp()
    scores, gradients = found_by_head(*tensors, rule, tile_rows=50)
    assert_equal(scores, gradients, truth(*tensors, LogitTransform(), weights=weights), atol=1e-12, rtol=1e-13)


def sequence_mean_rule():
    """A weight of each sequence, from the mean over all its tokens: the first token needs the last."""

    def weights(stats):
        sums = torch.zeros(int(stats.sequences.max()) + 1, dtype=stats.log_probs.dtype)
        sums.index_add_(0, stats.sequences, stats.log_probs)
        counts = torch.bincount(stats.sequences)
        return (sums / counts / 10).exp()[stats.sequences]

    return TokenRule(weights=weights, causal=False)


def test_a_rule_that_is_not_causal():
    tensors = problem()
    with torch.no_grad():
        log_probs = gold_log_probs(true_logits(*tensors[:3]), tensors[3])
        means = torch.stack([part.mean() for part in log_probs.split(list(LENGTHS))])
        weights = (means / 10).exp().repeat_interleave(torch.tensor(LENGTHS))
    expected = truth(*tensors, LogitTransform(), weights=weights)
    for tile_rows in (5, 1000):
        scores, gradients = found_by_head(*tensors, sequence_mean_rule(), tile_rows=tile_rows)
        assert_equal(scores, gradients, expected, atol=1e-12, rtol=1e-13)


def test_a_rule_with_temperatures_is_causal():
    rule = sequence_mean_rule()._replace(temperatures=lambda stats: stats.log_probs)
    with pytest.raises(ValueError, match="not causal"):
        fused_head(*problem(), rule)


@pytest.fixture
def products(monkeypatch):
    """The kinds of matrix products, in order."""
    made = []
    for name in ("_product", "_add_product"):
        original = getattr(head, name)
        monkeypatch.setattr(head, name, lambda *a, _f=original, _n=name, **k: (made.append(_n), _f(*a, **k)))
    return made


@pytest.mark.parametrize(
    ("rule", "frozen", "count"),
    [
        (aesl_rule(), False, 3),
        (aesl_rule(), True, 2),
        (nll_rule(), False, 3),
        (sequence_mean_rule(), False, 4),
        (sequence_mean_rule(), True, 3),
    ],
)
def test_number_of_matrix_products(rule, frozen, count, products):
    hidden, weight, _, labels, ids = problem()
    weight.requires_grad_(not frozen)
    fused_head(hidden, weight, None, labels, ids, rule, HeadSettings(tile_rows=1000)).loss_sum.backward()
    assert len(products) == count
    assert (weight.grad is None) == frozen and hidden.grad is not None


@pytest.mark.parametrize("rule", [aesl_rule(), nll_rule(), sequence_mean_rule()])
def test_without_gradients_there_is_one_product(rule, products):
    tensors = problem()
    with torch.no_grad():
        scores = fused_head(*tensors, rule, HeadSettings(tile_rows=1000))
    assert products == ["_product"] and not scores.loss_sum.requires_grad
    assert torch.equal(scores.loss_sum, fused_head(*tensors, rule, HeadSettings(tile_rows=1000)).loss_sum)


def test_a_trained_head_behind_a_frozen_backbone(products):
    hidden, weight, bias, labels, ids = problem()
    expected = truth(hidden, weight, bias, labels, ids, LogitTransform())
    hidden.requires_grad_(False)
    scores, gradients = found_by_head(hidden, weight, bias, labels, ids, aesl_rule(), tile_rows=1000)
    assert gradients[0] is None and products == ["_product", "_add_product", "_add_product"]
    torch.testing.assert_close(gradients[1], expected[2][1], atol=1e-12, rtol=1e-13)
    torch.testing.assert_close(gradients[2], expected[2][2], atol=1e-12, rtol=1e-13)


# ---- Hard cases


def test_no_token_is_a_differentiable_zero():
    hidden, weight, bias, labels, ids = problem()
    none = slice(0, 0)
    scores = fused_head(hidden[none], weight, bias, labels[none], ids[none], aesl_rule())
    scores.loss_sum.backward()
    assert scores.loss_sum.item() == 0 and scores.weights.shape == (0,)
    assert all((value.grad == 0).all() for value in (hidden, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_confident_logits(dtype):
    """Gaps of up to 500 nats at T = 0.01: nothing overflows, and the small weights keep their digits."""
    gaps = torch.tensor([5.0, 10.0, 40.0, 80.0, 500.0], dtype=dtype)
    hidden, weight = gaps.unsqueeze(1).requires_grad_(), torch.tensor([[1.0], [0.0], [0.0]], dtype=dtype)
    labels, ids = torch.zeros(5, dtype=torch.long), torch.arange(5)
    scores, gradients = found_by_head(hidden, weight, None, labels, ids, aesl_rule(t_scaling=1.0, prefix_mode="none"))
    true_weights = [2 * math.exp(-gap) / (1 + 2 * math.exp(-gap)) for gap in gaps.tolist()]
    # Below the smallest normal number a weight is 0
    normal = [value if value > torch.finfo(dtype).tiny else 0.0 for value in true_weights]
    assert scores.weights.tolist() == pytest.approx(normal, rel=2e-6 if dtype == torch.float32 else 1e-13, abs=0)
    low = aesl_rule(t_scaling=1e-6, min_temperature=1e-2)
    scores, gradients = found_by_head(hidden, weight, None, labels, ids, low)
    assert torch.isfinite(gradients[0]).all() and torch.isfinite(scores.entropy).all()
    assert (scores.temperatures == torch.tensor(1e-2, dtype=dtype)).all() and (scores.weights[:2] > 0).sum() <= 2


def test_the_first_of_equal_logits_is_the_top_one():
    hidden, weight = torch.ones(4, 1), torch.tensor([[1.0], [3.0], [3.0], [2.0]])
    scores = fused_head(hidden, weight, None, torch.tensor([0, 1, 2, 3]), torch.zeros(4), nll_rule())
    assert scores.is_top1.tolist() == [False, True, False, False]


def test_backward_twice_is_refused():
    loss = fused_head(*problem(), aesl_rule()).loss_sum
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="cannot go backward twice"):
        loss.backward()


def test_the_loss_may_be_scaled_after():
    hidden, weight, bias, labels, ids = problem()
    _, once = found_by_head(hidden, weight, bias, labels, ids, aesl_rule())
    hidden.grad = weight.grad = bias.grad = None
    (fused_head(hidden, weight, bias, labels, ids, aesl_rule()).loss_sum * 8 / 1024).backward()
    assert torch.equal(weight.grad * 128, once[1]) and torch.equal(hidden.grad * 128, once[0])


# ---- Half precision


def half_errors(dtype, rule_settings, tile_dtype=None):
    """Errors against float64 on the same rounded operands: of the head, and of the definition on plain logits.

    The largest absolute error of each. Labels are drawn from the softmax, as a model's own text is.
    """
    hidden, weight, bias, _, ids = problem(lengths=(60, 40), width=32, vocab=500, dtype=dtype, spread=0.5)
    with torch.no_grad():
        labels = true_logits(hidden.double(), weight.double(), bias.double()).softmax(-1).multinomial(1).squeeze(1)
    tensors = (hidden, weight, bias, labels, ids)
    loss, statistics, true_gradients = truth(*tensors, LogitTransform(), **rule_settings)
    scores, gradients = found_by_head(*tensors, aesl_rule(**rule_settings), tile_dtype=tile_dtype)
    plain = [value.detach().clone().requires_grad_() for value in tensors[:3]]
    logits = torch.nn.functional.linear(*plain).unsqueeze(0)
    plain_scores = aesl_scores(logits, tensors[3][None], sequence_ids=tensors[4][None], **rule_settings)
    weighted_nll(gold_log_probs(logits, tensors[3][None]), plain_scores.weights, 1).backward()

    def largest(found, expected):
        return (found.double() - expected).abs().max().item()

    fused = {"weights": largest(scores.weights, statistics["weights"])}
    unfused = {"weights": largest(plain_scores.weights[0], statistics["weights"])}
    for name, found, value, expected in zip(
        ("hidden", "weight", "bias"), gradients, plain, true_gradients, strict=True
    ):
        fused[name], unfused[name] = largest(found, expected), largest(value.grad, expected)
        assert found.dtype == dtype
    return fused, unfused


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", [{}, {"t_scaling": 0.3, "prefix_mode": "none"}], ids=["default", "T 0.3"])
def test_half_precision_is_no_worse_than_plain_logits(dtype, settings):
    """The gradients leave in half precision either way; the float32 tile makes the weights better."""
    fused, unfused = half_errors(dtype, settings)
    assert all(fused[name] <= 1.05 * unfused[name] for name in fused), (fused, unfused)
    assert fused["weights"] < 1e-4 and unfused["weights"] > 5 * fused["weights"]


def test_a_tile_in_half_precision_has_the_error_of_plain_logits():
    low = {"t_scaling": 0.3, "prefix_mode": "none"}
    fused, unfused = half_errors(torch.bfloat16, low, tile_dtype=torch.bfloat16)
    assert fused["weights"] > 1e-3
    assert all(fused[name] <= 1.5 * unfused[name] for name in fused), (fused, unfused)


def test_small_factors_do_not_vanish_in_fp16():
    """1 / num_items of a million would be subnormal on the rows; the loss scale comes before the rounding."""
    hidden, weight, bias, labels, ids = problem(lengths=(30,), dtype=torch.float16, spread=0.3)
    _, plain = found_by_head(hidden, weight, bias, labels, ids, aesl_rule())
    hidden.grad = weight.grad = bias.grad = None
    loss = fused_head(hidden, weight, bias, labels, ids, aesl_rule()).loss_sum / 2**20
    (loss * 2**20).backward()
    assert torch.equal(weight.grad, plain[1]) and torch.equal(hidden.grad, plain[0])


def test_autocast_rounds_the_operands_and_keeps_float32_gradients():
    tensors = problem(dtype=torch.float32, spread=0.3)
    hidden, weight, bias, labels, ids = tensors
    rounded = [value.detach().bfloat16().double().requires_grad_() for value in (hidden, weight, bias)]
    expected = truth(*rounded, labels, ids, LogitTransform())
    with torch.autocast("cpu", torch.bfloat16):
        scores, gradients = found_by_head(*tensors, aesl_rule())
    assert [value.dtype for value in gradients] == [torch.float32] * 3
    assert_equal(scores, gradients, expected, atol=1e-5, rtol=1e-5)


# ---- Memory


@pytest.mark.parametrize("rule", [aesl_rule(), nll_rule(), sequence_mean_rule()])
def test_no_logits_beyond_the_tile(rule):
    count, vocab, width = 700, 900, 8
    hidden, weight, _, labels, ids = problem((count,), width, vocab, torch.float32)
    with LargestTensor() as largest:
        fused_head(hidden, weight, None, labels, ids, rule, HeadSettings(tile_rows=64)).loss_sum.backward()
    assert largest.elements == 64 * vocab


def test_activation_offloading_is_not_given_the_gradients():
    """It moves what autograd saves to the CPU and back at each micro-batch; dW and dH would be gigabytes."""
    hidden, weight, bias, labels, ids = problem()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda value: saved.append(value.shape) or value, lambda value: value
    ):
        loss = fused_head(hidden, weight, bias, labels, ids, aesl_rule()).loss_sum
    assert saved == []
    loss.backward()
    assert weight.grad.abs().sum() > 0
