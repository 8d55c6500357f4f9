"""Inputs of the fused head's tests, the true result by the definition, and the result of the head."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from aesl_trl.losses.definition import aesl_scores, gold_log_probs, weighted_nll
from aesl_trl.losses.head import HeadSettings, LogitTransform, fused_head


LENGTHS = (1, 7, 37, 1, 64, 3, 40)  # one-token sequences among them; no tile size below divides their sum


TRANSFORMS = {
    "plain": LogitTransform(),
    "scale": LogitTransform(scale=0.25),
    "soft_cap": LogitTransform(softcap=3.0),
    "scale_and_soft_cap": LogitTransform(scale=1.5, softcap=3.0),
}


AESL_SETTINGS = [
    {"t_scaling": t_scaling, "prefix_mode": prefix_mode}
    for t_scaling in (0.1, 3.0, 100.0)
    for prefix_mode in ("inclusive", "exclusive", "none")
]


def problem(lengths=LENGTHS, width=16, vocab=337, dtype=torch.float64, seed=0, spread=1.0):
    """Return hidden states, weight and bias that take gradients, labels, and sequence ids."""
    torch.manual_seed(seed)
    count = sum(lengths)
    hidden = (torch.randn(count, width).double() * spread).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width).double().to(dtype).requires_grad_()
    bias = torch.randn(vocab).double().to(dtype).requires_grad_()
    labels = torch.randint(vocab, (count,))
    return hidden, weight, bias, labels, torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def true_logits(hidden, weight, bias, transform=LogitTransform()):  # noqa: B008
    logits = hidden @ weight.t() * transform.scale if bias is None else (hidden @ weight.t() + bias) * transform.scale
    return logits if transform.softcap is None else transform.softcap * torch.tanh(logits / transform.softcap)


def truth(hidden, weight, bias, labels, sequence_ids, transform, weights=None, **settings):
    """Return loss, statistics and gradients by the definition in float64; `weights` stand in for those of AESL."""
    inputs = [None if value is None else value.detach().double().requires_grad_() for value in (hidden, weight, bias)]
    logits = true_logits(*inputs, transform).unsqueeze(0)
    log_probs = gold_log_probs(logits, labels.unsqueeze(0)).squeeze(0)
    temperatures = None
    if weights is None:
        scores = aesl_scores(logits, labels.unsqueeze(0), sequence_ids=sequence_ids.unsqueeze(0), **settings)
        weights, temperatures = scores.weights.squeeze(0), scores.temperatures.squeeze(0)
    loss = weighted_nll(log_probs, weights, 1)
    loss.backward()
    log_softmax = logits.detach().squeeze(0).log_softmax(-1)
    statistics = {
        "log_probs": log_probs.detach(),
        "entropy": -(log_softmax.exp() * log_softmax).sum(-1),
        "is_top1": log_softmax.argmax(-1) == labels,
        "weights": weights,
        "temperatures": temperatures,
    }
    return loss.detach(), statistics, [None if value is None else value.grad for value in inputs]


def found_by_head(hidden, weight, bias, labels, ids, rule, transform=LogitTransform(), **settings):  # noqa: B008
    for value in (hidden, weight, bias):
        if value is not None:
            value.grad = None
    scores = fused_head(hidden, weight, bias, labels, ids, rule, HeadSettings(transform, **settings))
    scores.loss_sum.backward()
    return scores, [None if value is None else value.grad for value in (hidden, weight, bias)]


def assert_equal(scores, gradients, expected, *, atol, rtol=0.0):
    loss, statistics, true_gradients = expected
    # The loss is a sum over the tokens
    torch.testing.assert_close(
        scores.loss_sum.double(), loss, atol=atol * len(scores.log_probs), rtol=rtol, check_dtype=False
    )
    for name, value in statistics.items():
        if value is None:
            assert getattr(scores, name) is None
        else:
            torch.testing.assert_close(getattr(scores, name), value, atol=atol, rtol=rtol, check_dtype=False)
    for gradient, value in zip(gradients, true_gradients, strict=True):
        assert (gradient is None) == (value is None)
        if value is not None:
            torch.testing.assert_close(gradient, value, atol=atol, rtol=rtol, check_dtype=False)


class LargestTensor(TorchDispatchMode):
    """Keeps the largest number of elements that any operation returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return out
