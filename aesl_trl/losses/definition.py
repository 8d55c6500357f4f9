"""AESL and its rivals by definition: weights and losses on plain logits.

Every faster form is tested against this truth (the fused forms: rules.py; a table of all losses: docs/losses.md).
Every loss is a sum over the trained tokens divided by `num_items`, by default the number of trained tokens, so that
all of them stay exact under gradient accumulation and data parallelism. AESL's source: Li et al., "Getting Your LLMs
Ready for Reinforcement Learning with Lightweight SFT", ICLR 2026 (OpenReview yezWGJmODg), Eq. 4. With z_t the logits
that predict token s_t of one sequence:

    l_t = log softmax(z_t)[s_t]
    m_t = mean of l_1 .. l_t                       (prefix_mode "inclusive")
    T_t = max(min_temperature, -t_scaling * m_t)
    w_t = 1 - softmax(z_t / T_t)[s_t]              (a constant in the backward pass)
    L   = -sum_t w_t * l_t / num_items

What the paper leaves open is settled here: no gradient flows through the weight; the denominator counts tokens, not
weights; ignored labels enter neither the mean nor the loss; the mean starts anew at each packed document; in a
multi-turn sequence it runs on over all its trained tokens.

Shapes: B rows, L positions, V vocabulary. Everything is already shifted: `labels[:, t]` is the token that
`logits[:, t]` predicts. float64 logits are computed in float64 throughout; half precision is computed in float32.
"""

from typing import NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor

from .precision import at_home, in_float64, on_device


PREFIX_MODES = ("inclusive", "exclusive", "none")
AESL_WEIGHTS = ("adaptive", "linear", "threshold")
GEM_H = ("linear", "sigmoid")
GEM_SLOPE = 0.01  # slope of the sigmoid, in the authors' code
EAFT_ENTROPY = 3.0  # nats, close to log 20, the largest entropy of 20 tokens
PSFT_LOG_RATIO = 20.0  # the authors' clamp of log pi - log pi_old, for stability

Count = Tensor | float | int


class AESLSettings(TypedDict, total=False):
    """The keywords of every `aesl_*` function on logits; [`aesl_scores`] says what they mean and has the defaults."""

    t_scaling: float
    min_temperature: float
    prefix_mode: str
    sequence_ids: Tensor | None
    ignore_index: int


class AESLScores(NamedTuple):
    """Weights and temperatures, each `[B, L]` and without gradient; 0 where the label is ignored."""

    weights: Tensor  # in [0, 1]
    temperatures: Tensor  # >= min_temperature on trained tokens


def aesl_loss(
    logits: Tensor, labels: Tensor, *, num_items: Count | None = None, **settings: Unpack[AESLSettings]
) -> Tensor:
    """Return the Adaptive Early-Stop Loss (paper, Eq. 4), `-sum_t w_t * l_t / num_items`, a scalar.

    Args:
        num_items: the denominator, by default the number of labels that are not ignored. Across ranks and accumulation
            steps pass the number of trained tokens of the whole optimiser step.
        logits, labels, settings: as in [`aesl_scores`].
    """
    ignore_index = settings.get("ignore_index", -100)
    weights = aesl_weights(logits, labels, **settings)
    num_items = (labels != ignore_index).sum() if num_items is None else num_items
    return weighted_nll(gold_log_probs(logits, labels, ignore_index=ignore_index), weights, num_items)


def aesl_weights(logits: Tensor, labels: Tensor, **settings: Unpack[AESLSettings]) -> Tensor:
    """Return the adaptive early-stop weight of each token (paper, Eq. 4): `[B, L]` in [0, 1], 0 where ignored.

    The weight is near 0 where the model already expects the token after a prefix that it predicts well, and near 1
    where the prefix is surprising. It carries no gradient. Arguments and errors are those of [`aesl_scores`].
    """
    return aesl_scores(logits, labels, **settings).weights


@torch.no_grad()
def aesl_scores(
    logits: Tensor,
    labels: Tensor,
    *,
    t_scaling: float = 3.0,
    min_temperature: float = 1e-2,
    prefix_mode: str = "inclusive",
    sequence_ids: Tensor | None = None,
    ignore_index: int = -100,
) -> AESLScores:
    """Return the weights of [`aesl_weights`] together with their temperatures.

    Args:
        logits: `[B, L, V]`, after the model's own logit scale and soft cap.
        labels: `[B, L]`, already shifted.
        t_scaling: positive. The temperature is 1 when the prefix's mean negative log-likelihood is `1 / t_scaling`
            nats.
        min_temperature: positive lower clamp: low temperatures amplify the rounding of the logits.
        prefix_mode: `"inclusive"` (paper) averages over the prefix with the current token, and `"exclusive"` without
            it (the first token's temperature is 1). `"none"` takes `t_scaling` itself as every temperature: the
            token-level ablation.
        sequence_ids: `[B, L]`, the document of each label in a packed row, constant over a document and changing at
            its border. Without it each row is one sequence.
        ignore_index: label of tokens that are not trained.

    Raises:
        ValueError: `prefix_mode` is none of the three.
    """
    logits, mask = _full_precision(logits), labels != ignore_index
    log_probs = gold_log_probs(logits, labels, ignore_index=ignore_index)
    temperatures = aesl_temperatures(
        log_probs,
        prefix_sums(log_probs, sequence_ids),
        prefix_sums(mask, sequence_ids),
        t_scaling=t_scaling,
        min_temperature=min_temperature,
        prefix_mode=prefix_mode,
    ).where(mask, 1.0)
    # (z - max z) / T cannot overflow. Summing over the other tokens keeps every digit of 1 - p as p nears 1
    exp = ((logits - logits.amax(-1, keepdim=True)) / temperatures.unsqueeze(-1)).exp()
    index = labels.where(mask, 0).unsqueeze(-1)
    gold = exp.gather(-1, index).squeeze(-1)
    rest = exp.scatter(-1, index, 0.0).sum(-1)
    return AESLScores((rest / (rest + gold)).where(mask, 0.0), temperatures.where(mask, 0.0))


def aesl_temperatures(
    log_probs: Tensor,
    prefix_sums: Tensor,
    prefix_counts: Tensor,
    *,
    t_scaling: float = 3.0,
    min_temperature: float = 1e-2,
    prefix_mode: str = "inclusive",
) -> Tensor:
    """Return the temperature of each trained token, from the log-probabilities alone (paper, Eq. 4).

    `prefix_sums` and `prefix_counts` are float64: the sum of the log-probabilities in the token's sequence up to and
    with the token, and their number. All have the shape of `log_probs`, and so does the result, whose values are
    meaningless where no token is trained. The settings and their errors are those of [`aesl_scores`].
    """
    if prefix_mode not in PREFIX_MODES:
        raise ValueError(f"prefix_mode is {prefix_mode!r}, but must be one of {', '.join(PREFIX_MODES)}")
    if prefix_mode == "none":
        return torch.full_like(log_probs, max(t_scaling, min_temperature))
    if prefix_mode == "exclusive":
        prefix_sums, prefix_counts = prefix_sums - log_probs, prefix_counts - 1
    temperatures = -t_scaling * prefix_sums / prefix_counts.clamp(min=1)
    # The first token of an exclusive prefix has no mean yet: T = 1
    return temperatures.where(prefix_counts > 0, 1.0).clamp(min=min_temperature).to(log_probs.dtype)


def prefix_sums(values: Tensor, sequence_ids: Tensor | None = None) -> Tensor:
    """Return the running sum along each row, in float64: `[B, L]` -> `[B, L]`. It starts anew at each sequence.

    On a device without float64 the sums are taken on the CPU, and come back as float32 (precision.py).
    """
    device, values = values.device, in_float64(values)
    sums = values.cumsum(1)
    if sequence_ids is None:
        return on_device(sums, device)
    sequence_ids = at_home(sequence_ids)
    positions = torch.arange(values.size(1), device=values.device).expand_as(values)
    starts = torch.ones_like(positions, dtype=torch.bool)
    starts[:, 1:] = sequence_ids[:, 1:] != sequence_ids[:, :-1]
    start_positions = positions.where(starts, 0).cummax(1).values
    return on_device(sums - (sums - values).gather(1, start_positions), device)


def simple_weights(
    logits: Tensor, labels: Tensor, *, kind: str, threshold: float = 0.5, ignore_index: int = -100
) -> Tensor:
    """Return the weights of AESL's ablations without prefix and temperature, with q the label's probability.

    `kind` is `"linear"` (1 - q, which is `prefix_mode="none"` at temperature 1) or `"threshold"` (1 where q is below
    `threshold` in (0, 1), else 0). The weights are `[B, L]` in [0, 1], without gradient, 0 where ignored.
    """
    if kind not in AESL_WEIGHTS[1:]:
        raise ValueError(f"kind is {kind!r}, but must be one of {', '.join(AESL_WEIGHTS[1:])}")
    if kind == "linear":
        return aesl_weights(logits, labels, t_scaling=1.0, prefix_mode="none", ignore_index=ignore_index)
    probs = gold_log_probs(logits.detach(), labels, ignore_index=ignore_index).exp()
    return (probs < threshold).to(probs.dtype).where(labels != ignore_index, 0.0)


def _full_precision(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def gold_log_probs(logits: Tensor, labels: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Return the log-probability of each label, in nats: `[B, L, V]`, `[B, L]` -> `[B, L]`, 0 where ignored."""
    logits, mask = _full_precision(logits), labels != ignore_index
    gold = logits.gather(-1, labels.where(mask, 0).unsqueeze(-1)).squeeze(-1)
    return (gold - logits.logsumexp(-1)).where(mask, 0.0)


def weighted_nll(log_probs: Tensor, weights: Tensor | None, num_items: Count) -> Tensor:
    """Return `-sum(weights * log_probs) / num_items`, every weight 1 by default.

    When nothing is trained the result is a differentiable 0.
    """
    weighted = log_probs if weights is None else weights * log_probs
    return -weighted.sum() / torch.as_tensor(num_items, device=log_probs.device).clamp(min=1)


def nll_loss(logits: Tensor, labels: Tensor, *, num_items: Count | None = None, ignore_index: int = -100) -> Tensor:
    """Return the plain negative log-likelihood, a scalar in nats per item: AESL with every weight 1."""
    num_items = (labels != ignore_index).sum() if num_items is None else num_items
    return weighted_nll(gold_log_probs(logits, labels, ignore_index=ignore_index), None, num_items)


def dft_loss(logits: Tensor, labels: Tensor, *, num_items: Count | None = None, ignore_index: int = -100) -> Tensor:
    """Return the loss of Dynamic Fine-Tuning (arXiv 2508.05629), `sum_t sg(q_t) (-log q_t) / num_items`.

    The weight q_t, the label's probability, is a constant in the backward pass. TRL has this loss as
    `loss_type="dft"`.
    """
    num_items = (labels != ignore_index).sum() if num_items is None else num_items
    log_probs = gold_log_probs(logits, labels, ignore_index=ignore_index)
    return weighted_nll(log_probs, log_probs.detach().exp(), num_items)


def gem_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    beta: float = 0.7,
    h: str = "linear",
    num_items: Count | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Return the loss of GEM (Li et al., "Preserving Diversity in Supervised Fine-Tuning of LLMs", ICLR 2025).

        L = -sum_t sum_v sg(r_v h_v) (log pi(s_t) - log pi(v)) / num_items,    r = softmax(z_t / beta)

    r and h are constants in the backward pass, and the gradient by the logits is r h - onehot(s_t) sum_v r_v h_v.
    The value may be negative.

    Args:
        beta: in (0, 1): near 1 the gradient is that of nll, near 0 more diversity is kept.
        h: `"linear"`: h_v = 1; `"sigmoid"`: h_v = sigmoid(0.01 (z_v - z_gold)), "logsigmoid" in the authors' code.
    """
    if h not in GEM_H:
        raise ValueError(f"h is {h!r}, but must be one of {', '.join(GEM_H)}")
    logits, mask = _full_precision(logits), labels != ignore_index
    logits, labels = logits[mask], labels[mask].unsqueeze(-1)
    with torch.no_grad():
        target = (logits / beta).softmax(-1)
        if h == "sigmoid":
            target = target * torch.sigmoid(GEM_SLOPE * (logits - logits.gather(-1, labels)))
    log_probs = logits.log_softmax(-1)
    total = -(target * (log_probs.gather(-1, labels) - log_probs)).sum()
    return total / torch.as_tensor(mask.sum() if num_items is None else num_items, device=mask.device).clamp(min=1)


def psft_loss(
    logits: Tensor,
    labels: Tensor,
    old_log_probs: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    num_items: Count | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Return the loss of Proximal SFT (arXiv 2508.17784): PPO's clipped objective with advantage 1.

        L = -sum_t min(r_t, clip(r_t, 1 - clip_low, 1 + clip_high)) / num_items,    r_t = pi(s_t) / pi_old(s_t)

    Nothing is detached: the gradient is -r_t grad log pi, and 0 beyond 1 + clip_high. The lower clip changes neither
    value nor gradient, since the minimum takes the smaller r_t; it is here because the authors write it. log r_t is
    clamped to +-20, as in their code.

    Args:
        old_log_probs: `[B, L]`, log pi_old of the labels, in nats; not read where ignored.
    """
    mask = labels != ignore_index
    log_probs = gold_log_probs(logits, labels, ignore_index=ignore_index)
    log_ratios = (log_probs - old_log_probs.where(mask, 0.0)).clamp(-PSFT_LOG_RATIO, PSFT_LOG_RATIO)
    ratios = log_ratios.exp()
    clipped = torch.minimum(ratios, ratios.clamp(1 - clip_low, 1 + clip_high)).where(mask, 0.0)
    return -clipped.sum() / torch.as_tensor(mask.sum() if num_items is None else num_items).clamp(min=1)


def top_k_entropy(logits: Tensor, k: int) -> Tensor:
    """Return the entropy of the softmax over the k largest logits, in nats: `[..., V]` -> `[...]`, in [0, log k]."""
    log_probs = logits.topk(min(k, logits.size(-1)), dim=-1).values.log_softmax(-1)
    return (log_probs.exp() * -log_probs).sum(-1)


def eaft_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    top_k: int = 20,
    num_items: Count | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Return the loss of Entropy-Adaptive Fine-Tuning (arXiv 2601.02151).

        L = sum_t sg((H_t / 3)^alpha) (-log q_t) / num_items

    H_t is the entropy of the softmax over the `top_k` largest logits, in nats, and a constant in the backward pass.
    The 3 is close to log 20, so that the weights end near 1; it stays 3 for another `top_k`, as in the authors' code.
    """
    log_probs = gold_log_probs(logits, labels, ignore_index=ignore_index)
    entropy = top_k_entropy(_full_precision(logits.detach()), top_k)
    weights = ((entropy / EAFT_ENTROPY) ** alpha).where(labels != ignore_index, 0.0)
    return weighted_nll(log_probs, weights, (labels != ignore_index).sum() if num_items is None else num_items)
