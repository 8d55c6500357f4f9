"""A model and a batch -> per-token scores under a rule, through the fused head inside the model's own forward.

The head runs inside the forward, because there FSDP and ZeRO have their hooks armed, and DDP sees the output. It gets
the hidden states at the trained positions only. This file knows the rows of a batch, packed documents and PEFT's
virtual tokens; head.py does the arithmetic.
"""

import functools
import inspect
import types
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.utils import ModelOutput
from trl.trainer.utils import maybe_gather_lm_head_ctx

from ..errors import InputError
from .head import HeadSettings, LogitTransform, fused_head
from .rules import TokenRule, nll_rule


@dataclass
class TokenScores:
    """Per-token quantities of a batch, each `[B, L]`, without gradient, 0 where `label_mask` is False."""

    log_probs: Tensor  # nats
    label_mask: Tensor  # bool
    entropy: Tensor  # nats, of the teacher-forced distribution
    is_top1: Tensor  # bool: whether the label is the most likely token
    weights: Tensor  # 1 for plain nll
    temperatures: Tensor | None  # None where the rule has none
    labels: Tensor  # shifted, as long as log_probs
    sequence_ids: Tensor | None  # the document of each label; None: one sequence a row


class Uncast:
    """Keeps a value as it is: FSDP's mixed precision rounds every tensor that it finds in a model's output to bf16."""

    def __init__(self, value):
        self.value = value


@dataclass
class ScoredOutput(ModelOutput):
    """The output of a model under a rule. It is a ModelOutput so that FSDP finds the tensors that carry gradients."""

    loss_sum: Tensor | None = None  # scalar: -sum(weights * log_probs) over the trained tokens, nats
    aux_loss: Tensor | None = None  # MoE load balancing, unweighted
    kept: Uncast | None = None

    @property
    def scores(self) -> TokenScores:
        return self.kept.value


def add_fused_head(model) -> None:
    """Let `model(**inputs, labels=labels, token_rule=rule)` return a [`ScoredOutput`] instead of logits.

    A rule that compares with an old policy also takes `old_log_probs=Uncast(values)`, with values `[B, L]` as in
    [`TokenScores`]. Without `token_rule` the original forward runs, so `generate` and TRL's own head are unchanged.
    Call it on the base model, before PEFT or a distributed wrapper.

    Raises:
        InputError: the architecture does more between backbone and logits than one linear layer, a scale and a cap.
    """
    head = model.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is head), None)
    # A head with layers of its own (BERT) would silently train with other logits
    if model.base_model is model or name is None or "." in name:
        raise InputError(
            f"{type(model).__name__} is not a backbone followed by one linear LM head (found {name}), which is what "
            "the fused head computes: use a decoder-only model such as Qwen, Llama, Gemma or Mistral"
        )
    original_forward = model.forward
    text_config = model.config.get_text_config()
    settings = HeadSettings(logit_transform(text_config))

    # `generate` validates its arguments against the original signature
    @functools.wraps(type(model).forward)
    def forward(self, *args, token_rule: TokenRule | None = None, old_log_probs: Uncast | None = None, **kwargs):
        if token_rule is None:
            return original_forward(*args, **kwargs)
        labels = kwargs.pop("labels")
        # Backbone and head are looked up on each call, since FSDP and PEFT replace them after this
        outputs = self.base_model(*args, **{**kwargs, "use_cache": False})
        head = self.get_output_embeddings()
        sequence_ids = packed_sequence_ids(kwargs)
        old = None if old_log_probs is None else old_log_probs.value
        scored = score_hidden(outputs.last_hidden_state, head, labels, sequence_ids, token_rule, settings, old)
        if kwargs.get("output_router_logits"):
            mask = kwargs.get("attention_mask")  # None in packed rows: every token counts
            scored.aux_loss = load_balancing_loss_func(
                outputs.router_logits, text_config.num_experts, text_config.num_experts_per_tok, mask
            )
        return scored

    model.forward = types.MethodType(forward, model)


@torch.no_grad()
def score_batch(trainer, batch: dict) -> TokenScores:
    """Score a batch of a trainer's dataloader by the model as it is, in eval mode, under plain nll."""
    model = trainer.model_wrapped
    model.eval()
    try:
        with trainer.compute_loss_context_manager():
            inputs = trainer._prepare_inputs({**batch, "use_cache": False})
            return model(**inputs, token_rule=nll_rule()).scores
    finally:
        model.train()


def has_fused_head(model) -> bool:
    """Say whether `add_fused_head` was called on the model, whose forward then takes a `token_rule`."""
    return "token_rule" in inspect.signature(model.forward, follow_wrapped=False).parameters


def logit_transform(text_config) -> LogitTransform:
    """Read from its config what the architecture does to the head's products.

    transformers keeps a scale under several names: Cohere `logit_scale`, Muse Glimmer `output_multiplier`, Falcon-H1
    `lm_head_multiplier`. Granite and MiniCPM3 divide by `logits_scaling`, and HyperCLOVA X multiplies by it.
    """
    names = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
    name = next((name for name in names if getattr(text_config, name, None) is not None), None)
    scale = 1.0 if name is None else getattr(text_config, name)
    if name == "logits_scaling" and text_config.model_type != "hyperclovax":
        scale = 1 / scale
    return LogitTransform(float(scale), getattr(text_config, "final_logit_softcapping", None))


def packed_sequence_ids(inputs: dict) -> Tensor | None:
    """Return the document of each token, `[B, L]`, in a packed or padding-free batch; None if a row is a sequence."""
    if inputs.get("seq_idx") is not None:
        return inputs["seq_idx"]
    position_ids = inputs.get("position_ids")
    if position_ids is None or inputs.get("attention_mask") is not None or position_ids.dim() != 2:
        return None
    return (position_ids == 0).cumsum(1)


# Dynamo stops here and compiles the backbone: the head has kernels of its own
@torch.compiler.disable
def score_hidden(
    hidden_states: Tensor,
    head,
    labels: Tensor,
    sequence_ids: Tensor | None,
    rule: TokenRule,
    settings: HeadSettings,
    old_log_probs: Tensor | None = None,
) -> ScoredOutput:
    """Score the next token at each position but the last: `[B, L + 1, H]`, labels `[B, L + 1]` -> `[B, L]`.

    `old_log_probs` is `[B, L]`, as the scores.

    ZeRO-3: reading `head.weight` inside the engine's forward gathers the weight and registers it with the model, whose
    hooks gather it in later forwards and again before the backward pass: autograd refuses a full gradient for a
    parameter without elements. Any other forward finds a placeholder, which is gathered here. The gradient, built in
    the forward pass, then meets the parameter's own hook, which reduces it as any other.

    FSDP2: inside the root's forward the root's parameters are whole, and so is a head in one unit with the final norm,
    whose forward gathers both (accelerate 1.15). A head that is a unit of its own is still a sharded DTensor, since
    its forward never runs: it is gathered here, and the ranks' gradients are averaged on the way back (without
    `Partial("avg")` each shard would get its own rank's gradient alone).
    """
    weight, bias = _parameters(head)
    # With the model split over devices, the backbone may end on another device than the head
    hidden, device = hidden_states[:, :-1].to(weight.device), weight.device
    # Nothing predicts the first label. PEFT's virtual tokens at the front have no labels, so pad for them
    labels = torch.nn.functional.pad(labels.to(device), (hidden.size(1) + 1 - labels.size(1), 0), value=-100)[:, 1:]
    sequence_ids = None if sequence_ids is None else sequence_ids[:, 1:].to(device)
    mask = labels != -100
    sequences = torch.arange(mask.size(0), device=device).unsqueeze(1).expand_as(mask)  # a number for each row
    if sequence_ids is not None:  # a number for each document of each row
        sequences = sequences * (sequence_ids.max() + 1) + sequence_ids
    with maybe_gather_lm_head_ctx(weight, bias):
        if weight.dim() != 2 or weight.size(1) != hidden.size(-1) or not weight.is_floating_point():
            raise InputError(
                f"the LM head's weight is {weight.dtype} of shape {tuple(weight.shape)}, but must be floating point "
                f"of shape (vocabulary, {hidden.size(-1)}): a quantized head, or one that FSDP1 wraps as a unit of "
                "its own, is not supported (keep lm_head out of the quantization, or use fsdp_version 2)"
            )
        old = None if old_log_probs is None else old_log_probs.to(device)[mask]
        scores = fused_head(
            hidden[mask], weight, bias, labels[mask], sequences[mask], rule, settings, old_log_probs=old
        )
    unpacked = {
        name: None if values is None else values.new_zeros(mask.shape).masked_scatter(mask, values)
        for name, values in scores._asdict().items()
        if name != "loss_sum"
    }
    tokens = TokenScores(**unpacked, label_mask=mask, labels=labels, sequence_ids=sequence_ids)
    return ScoredOutput(loss_sum=scores.loss_sum, kept=Uncast(tokens))


def _parameters(head) -> tuple[Tensor, Tensor | None]:
    weight, bias = head.weight, getattr(head, "bias", None)
    if not isinstance(weight, DTensor):
        return weight, bias
    gradients = [Partial("avg")] * weight.device_mesh.ndim
    return tuple(None if value is None else value.full_tensor(grad_placements=gradients) for value in (weight, bias))
