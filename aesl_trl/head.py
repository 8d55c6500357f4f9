"""The scoring head: a batch -> per-token log-probabilities, weights and temperatures.

Losses that need only log-probabilities go through TRL's fused head. AESL's weight needs a second softmax at a
temperature of its own for each token, so it is computed from the model's full logits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .losses import aesl_scores, gold_log_probs


@dataclass
class TokenScores:
    """Per-token quantities of a batch, each `[B, L]`, 0 where `label_mask` is False.

    Only `log_probs` and `aux_loss` carry gradients.
    """

    log_probs: Tensor  # nats
    label_mask: Tensor  # bool
    entropy: Tensor  # nats, of the teacher-forced distribution
    is_top1: Tensor  # whether the label is the most likely token
    weights: Tensor  # in [0, 1]; 1 for plain nll
    temperatures: Tensor | None  # None where the loss has none
    labels: Tensor  # shifted, as long as log_probs
    sequence_ids: Tensor | None  # the document of each label; None: one sequence a row
    aux_loss: Tensor | None = None  # MoE load balancing, unweighted


def packed_sequence_ids(inputs: dict) -> Tensor | None:
    """The document of each token `[B, L]` in a packed or padding-free batch; None when every row is one sequence."""
    if inputs.get("seq_idx") is not None:
        return inputs["seq_idx"]
    position_ids = inputs.get("position_ids")
    if position_ids is None or inputs.get("attention_mask") is not None or position_ids.dim() != 2:
        return None
    return (position_ids == 0).cumsum(1)


def _shift(labels: Tensor, sequence_ids: Tensor | None, length: int) -> tuple[Tensor, Tensor | None]:
    """Align labels with `length` positions of output: drop the first, pad for virtual tokens as PEFT does."""
    labels = torch.nn.functional.pad(labels, (length - labels.size(1), 0), value=-100)[:, 1:]
    return labels, None if sequence_ids is None else sequence_ids[:, 1:]


def score_nll(model, inputs: dict) -> TokenScores:
    """Plain negative log-likelihood through TRL's fused head; no logits are built."""
    outputs = model(**inputs, fused_lm_head=True)
    labels, sequence_ids = _shift(inputs["labels"], packed_sequence_ids(inputs), outputs.log_probs.size(1) + 1)
    return TokenScores(
        log_probs=outputs.log_probs,
        label_mask=outputs.label_mask,
        entropy=outputs.entropy.detach(),
        is_top1=outputs.is_top1,
        weights=outputs.label_mask.to(outputs.log_probs.dtype),
        temperatures=None,
        labels=labels,
        sequence_ids=sequence_ids,
        aux_loss=outputs.aux_loss,
    )


def score_aesl(model, inputs: dict, *, t_scaling: float, min_temperature: float, prefix_mode: str) -> TokenScores:
    """AESL from the model's full logits, of which only the trained positions are upcast and swept."""
    outputs = model(**{key: value for key, value in inputs.items() if key != "labels"})
    logits = outputs.logits[:, :-1]
    labels, sequence_ids = _shift(inputs["labels"].to(logits.device), packed_sequence_ids(inputs), logits.size(1) + 1)
    mask = labels != -100
    # The trained tokens as one packed row, [1, N, V] and [1, N]
    packed_logits, packed_labels = logits[mask].unsqueeze(0), labels[mask].unsqueeze(0)
    packed_ids = _row_and_document(mask, sequence_ids)[mask].unsqueeze(0)
    log_probs = gold_log_probs(packed_logits, packed_labels)
    scores = aesl_scores(
        packed_logits,
        packed_labels,
        t_scaling=t_scaling,
        min_temperature=min_temperature,
        prefix_mode=prefix_mode,
        sequence_ids=packed_ids,
    )
    entropy, is_top1 = _metrics(packed_logits, packed_labels)

    def unpack(values: Tensor) -> Tensor:
        # masked_scatter keeps an all-masked batch connected to the model, which must give a differentiable zero
        return values.new_zeros(mask.shape).masked_scatter(mask, values)

    return TokenScores(
        log_probs=unpack(log_probs),
        label_mask=mask,
        entropy=unpack(entropy),
        is_top1=unpack(is_top1),
        weights=unpack(scores.weights),
        temperatures=unpack(scores.temperatures),
        labels=labels,
        sequence_ids=sequence_ids,
        aux_loss=getattr(outputs, "aux_loss", None),
    )


def _row_and_document(mask: Tensor, sequence_ids: Tensor | None) -> Tensor:
    """A number for each (row, document): `[B, L]`."""
    rows = torch.arange(mask.size(0), device=mask.device).unsqueeze(1).expand_as(mask)
    return rows if sequence_ids is None else rows * (sequence_ids.max() + 1) + sequence_ids.to(mask.device)


@torch.no_grad()
def _metrics(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy in nats and whether the label is the most likely token: `[1, N, V]`, `[1, N]` -> `[1, N]`, `[1, N]`."""
    log_probs = logits.float().log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1), log_probs.argmax(-1) == labels
