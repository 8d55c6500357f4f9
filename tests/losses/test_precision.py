"""Sums in float64: everywhere, and beside a device that has none (simulated; no Apple GPU was at hand)."""

import pytest
import torch
from apple_gpu import apple_gpu

from aesl_trl.losses import precision
from aesl_trl.losses.definition import aesl_scores, prefix_sums
from aesl_trl.losses.head import HeadSettings, fused_head
from aesl_trl.losses.rules import TOKEN_RULES
from aesl_trl.training.config import AESLSFTConfig


TOKENS, WIDTH, VOCABULARY = 600, 8, 40


def head_inputs():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).requires_grad_()
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    documents = torch.arange(TOKENS) // 90
    return hidden, weight, None, labels, documents


def scored(rule):
    inputs = head_inputs()
    old = -torch.ones(TOKENS) if rule.old_policy else None
    out = fused_head(*inputs, rule, HeadSettings(tile_rows=64), old_log_probs=old)
    out.loss_sum.backward()
    return out, inputs[0].grad, inputs[1].grad


def test_the_simulation_refuses_float64_on_the_device_alone():
    values = torch.ones(3)
    with apple_gpu():
        with pytest.raises(TypeError, match="float64"):
            values.double()
        with pytest.raises(TypeError, match="float64"):
            torch.zeros(3, dtype=torch.float64)
        assert values.cpu().double().cumsum(0).dtype == torch.float64


def test_elsewhere_sums_stay_in_float64_where_they_are():
    values = torch.ones(3)
    assert precision.at_home(values) is values
    assert precision.in_float64(values).dtype == torch.float64
    sums = prefix_sums(values.unsqueeze(0))
    assert sums.dtype == torch.float64 and precision.on_device(sums, sums.device) is sums


@pytest.mark.parametrize(
    "settings",
    [
        *({"cold_start_loss": loss} for loss in TOKEN_RULES),
        {"prefix_mode": "exclusive"},
        {"prefix_mode": "none"},
        {"aesl_weight": "linear"},
        {"aesl_weight": "threshold"},
    ],
    ids=lambda settings: "-".join(settings.values()),
)
def test_every_loss_and_its_gradients_on_a_device_without_float64(settings, tmp_path):
    args = AESLSFTConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)
    rule = TOKEN_RULES[args.cold_start_loss].rule(args)
    expected, *gradients = scored(rule)
    with apple_gpu():
        found, *simulated = scored(rule)
    # Float32 sums would be off by 1e-5 and more; only the results of the sums are rounded
    torch.testing.assert_close(found.loss_sum, expected.loss_sum, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.weights, expected.weights, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(simulated, gradients, rtol=1e-5, atol=1e-6)


def test_the_definition_on_a_device_without_float64():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 30, 12, generator=generator)
    labels = torch.randint(12, (2, 30), generator=generator)
    documents = (torch.arange(30) // 7).expand(2, 30)
    expected = aesl_scores(logits, labels, sequence_ids=documents)
    with apple_gpu():
        found = aesl_scores(logits, labels, sequence_ids=documents)
    torch.testing.assert_close(found.weights, expected.weights, rtol=2e-6, atol=1e-6)


def test_a_long_packed_row_keeps_its_temperatures():
    """32k tokens of confident documents: float32 prefix sums would move the last temperatures by percents."""
    generator = torch.Generator().manual_seed(0)
    log_probs = -(torch.rand(1, 2**15, generator=generator) * 0.02)
    documents = (torch.arange(2**15) // 16).unsqueeze(0)
    exact = prefix_sums(log_probs, documents)
    with apple_gpu():
        rounded = prefix_sums(log_probs, documents)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded.double(), exact, rtol=2**-23, atol=0)
    in_float32 = log_probs.cumsum(1)
    in_float32 = in_float32 - (in_float32 - log_probs).gather(1, (torch.arange(2**15) // 16 * 16).unsqueeze(0))
    assert ((in_float32 - exact) / exact).abs().max() > 0.01
