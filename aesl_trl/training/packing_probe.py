"""Do documents that share a row see each other? A small random copy of the model answers, before any weights load.

Packing and padding-free rows keep their documents apart by position ids and borders, which each architecture and each
attention implementation reads in its own way, or not at all (gpt_oss with eager attention, Mamba without its kernels).
transformers has no flag that tells, so we try: a copy with random weights, every kind of layer that the model has,
TRL's own collator, the same attention implementation and device. Its sizes are small where the architecture takes it.
"""

import copy
import json
import math
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import is_peft_model
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import is_flash_attn_2_available
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..errors import InputError, in_one_line
from ..models.skeleton import access_of, builder_of


FIRST_TOKENS, SECOND_TOKENS = 7, 9
MAX_PARAMETERS = 150_000_000  # of a copy; a larger one would take seconds
# Of the effect that a document's own tokens have. Leaks are above 0.1; in rows of other lengths sums round differently
SEEN_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}
APART_TOLERANCE = {torch.float32: 0.05, torch.bfloat16: 0.3}
VOCABULARY, INNER, EXPERTS, CHOSEN = 128, 64, 8, 2
# The copy's sizes, by the names that configs have for them. The size of an attention head stays: kernels depend on it
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads")
WIDTHS = ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim")
SIZES = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"), INNER),
    **dict.fromkeys(("intermediate_size_mlp", "ffn_dim", "n_inner", "ffn_hidden_size"), INNER),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"), CHOSEN),
    **dict.fromkeys(("n_group", "topk_group", "n_groups", "mamba_n_groups"), 1),
}
# Of a state-space layer: its heads, the size of one, and how much wider than the model it is
STATE_HEADS = (("mamba_n_heads", "mamba_d_head", "mamba_expand"), ("num_heads", "head_dim", "expand"))
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LAYER_NUMBERS = ("layer_idx", "layer_id", "layer_number", "block_idx")
NOT_COPIED = ("architectures", "dtype", "quantization_config", "transformers_version")
INFERRED_BY_PEFT = ("num_layers", "token_dim", "num_attention_heads", "num_transformer_submodules")


class Architecture(NamedTuple):
    """What decides whether documents stay apart."""

    config: PreTrainedConfig
    build: Callable[[PreTrainedConfig], nn.Module]
    attention: str | None  # None: the default of the architecture
    prompt_learning: object | None = None  # PEFT's config, where it adds virtual tokens


class Verdict(NamedTuple):
    """The outcome of a probe, by the largest change of a document's logits, in units of what its own tokens change."""

    attention: str  # the implementation that ran
    seen: float  # when the other document of the row changes
    apart: float  # when the document stands in a row of its own
    dtype: torch.dtype

    @property
    def problem(self) -> str | None:
        if self.seen > SEEN_TOLERANCE[self.dtype]:
            return "the documents of a row see each other"
        if self.apart > APART_TOLERANCE[self.dtype]:
            return "a document's logits are not those of a row of its own"
        return None


_verdicts: dict[tuple, Verdict] = {}


def architecture_of(model, args, peft_config) -> Architecture:
    """Describe a model that is loaded, or that TRL will load by name."""
    if getattr(peft_config, "is_prompt_learning", False) is False:
        peft_config = None
    if not isinstance(model, str):
        base = model.get_base_model() if is_peft_model(model) else model
        return Architecture(base.config, type(base), base.config._attn_implementation, peft_config)
    access = access_of(args)
    config = AutoConfig.from_pretrained(model, **access)
    build = builder_of(config, trust_remote_code=access["trust_remote_code"])
    return Architecture(config, build, (args.model_init_kwargs or {}).get("attn_implementation"), peft_config)


def check_documents_apart(architecture: Architecture, collator, device: torch.device, setting: str, unverified: bool):
    """Refuse a `setting` that puts documents into one row, unless the probe shows that they do not see each other.

    Where the probe cannot run, `unverified` lets the setting pass with a warning.
    """
    prompts = architecture.prompt_learning
    what = f"{setting} on {architecture.config.model_type}"
    what += "" if prompts is None else f" with {prompts.peft_type.value}"
    try:
        verdict = probe(architecture, collator, device)
    except Exception as error:  # custom code and new architectures may raise anything
        reason = f"{type(error).__name__}: {in_one_line(error, 120)}"
        if not unverified:
            raise InputError(
                f"{what}: whether the documents of a row see each other could not be tried on a small copy of the "
                f"model ({reason}); set {setting}: false, or packing_unverified: true if you know that they do not"
            ) from None
        warnings.warn(f"{what} is not verified ({reason}): the documents of a row may see each other", stacklevel=4)
        return
    if verdict.problem is not None:
        others = [name for name in _implementations(device) if _passes(architecture, name, collator, device)]
        other = f", or attn_implementation: {others[0]}, with which they stay apart here" if others else ""
        raise InputError(
            f"{what} with {verdict.attention} attention: {verdict.problem}, as a small copy of the model on "
            f"{device.type} shows; set {setting}: false{other}"
        )


def _implementations(device: torch.device) -> list[str]:
    flash = ["flash_attention_2"] if device.type == "cuda" and is_flash_attn_2_available() else []
    return ["sdpa", "eager", *flash]


def _passes(architecture: Architecture, attention: str, collator, device: torch.device) -> bool:
    with suppress(Exception):  # not every architecture has every implementation
        verdict = probe(architecture._replace(attention=attention), collator, device)
        return verdict.problem is None and verdict.attention == attention
    return False


def probe(architecture: Architecture, collator, device: torch.device) -> Verdict:
    """Change one document of a row and look at the other, on a copy of the model; remember the outcome."""
    errors, failed = [], []
    for small in _small_configs(architecture, errors):
        key = _key(architecture, small, collator, device)
        if key not in _verdicts:
            try:
                with _random_state_kept(device):
                    _verdicts[key] = _try(architecture, small, collator, device)
            except Exception as error:  # these sizes do not fit together: the next candidate may
                failed.append(error)
                continue
        return _verdicts[key]
    raise (failed or errors)[-1]


def _key(architecture: Architecture, small: PreTrainedConfig, collator, device: torch.device) -> tuple:
    return (
        architecture.build,
        architecture.attention,
        device.type,
        json.dumps(small.to_dict(), sort_keys=True, default=str),
        repr(collator),
        repr(architecture.prompt_learning),
    )


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    states = random.getstate(), np.random.get_state()
    try:
        # Random numbers come from the CPU's generator; a model's own code might draw on the GPU
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


# ---- The copy


def _small_configs(architecture: Architecture, errors: list[Exception]) -> Iterator[PreTrainedConfig]:
    """Give configs of copies: small and shallow first. `errors` takes why there is none of a shape."""
    values = {name: value for name, value in architecture.config.to_dict().items() if name not in NOT_COPIED}
    for shape in (_shrunk(values), values):
        found = []
        try:
            deep, model = _on_meta(architecture, shape)
            found = [deep] * _fits(model)
            count = deep.get_text_config().num_hidden_layers
            if (depth := _depth(model, count)) is not None:
                shallow, model = _on_meta(architecture, _cut(shape, count, depth))
                found = [shallow] * _fits(model) + found
            if not found:
                raise ValueError(f"the smallest copy has more than {MAX_PARAMETERS:,} parameters")
        except Exception as error:
            errors.append(error)
        yield from found


def _on_meta(architecture: Architecture, values: dict) -> tuple[PreTrainedConfig, nn.Module]:
    config = _config(architecture, values)
    with torch.device("meta"):
        return config, architecture.build(config)


def _fits(model: nn.Module) -> bool:
    return sum(parameter.numel() for parameter in model.parameters()) <= MAX_PARAMETERS


def _config(architecture: Architecture, values: dict) -> PreTrainedConfig:
    config = type(architecture.config)(**copy.deepcopy(values))
    config._attn_implementation = architecture.attention
    config.name_or_path = architecture.config.name_or_path  # where the model's own code lies
    return config


def _shrunk(values: dict) -> dict:
    """Return a config's values with small sizes, those of its text model too."""
    small = dict(values)
    for name, value in values.items():
        if isinstance(value, dict) and name.endswith("text_config"):
            small[name] = _shrunk(value)
        elif isinstance(value, dict) and name.endswith("_config"):  # of images or sounds, which packed rows have not
            small[name] = value | dict.fromkeys({"num_hidden_layers", "depth"} & value.keys(), 1)
    numbers = {name for name, value in values.items() if isinstance(value, int) and not isinstance(value, bool)}
    small |= {name: min(values[name], SIZES[name]) for name in numbers & SIZES.keys()}
    small |= {name: [SIZES[name]] * len(values[name]) for name in SIZES if isinstance(values.get(name), list)}
    small |= {name: TOKENS[name] for name in TOKENS if values.get(name) is not None}
    heads = next((values[name] for name in HEADS if name in numbers), None)
    width = next((values[name] for name in WIDTHS if name in numbers), None)
    if heads and width:
        narrow = 2 * (values.get("head_dim") or width // heads)
        small |= dict.fromkeys(numbers & set(HEADS), 2) | dict.fromkeys(numbers & set(WIDTHS), narrow)
        small |= {name: 2 if values[name] == heads else 1 for name in numbers & set(KEY_VALUE_HEADS)}
        for name, size, expand in STATE_HEADS:
            if {name, size, expand} <= numbers and values[name] * values[size] == values[expand] * width:
                small[name] = values[expand] * narrow // values[size]
    return small


def _depth(model: nn.Module, count: int) -> int | None:
    """Return the number of first layers, at least 2, in which every kind of layer appears; None: unknown, or all."""
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    if not stacks or count <= 2:
        return None
    kinds = list(zip(*([_kind(layer) for layer in stack] for stack in stacks), strict=True))
    return max(2, *(kinds.index(kind) + 1 for kind in kinds))


def _kind(layer: nn.Module) -> str:
    """Describe a layer by its modules and their settings, all but its number."""
    settings = [
        {
            name: value
            for name, value in vars(module).items()
            if isinstance(value, str | int | float | bool) and not name.startswith("_") and name not in LAYER_NUMBERS
        }
        for module in layer.modules()
    ]
    return f"{layer}{settings}"


def _cut(values: dict, count: int, depth: int) -> dict:
    """Return the values of a config whose `count` layers end after `depth`: their number, and lists of one a layer."""
    cut = {
        name: _cut(value, count, depth) if isinstance(value, dict) and name.endswith("text_config") else value
        for name, value in values.items()
    }
    cut |= {name: depth for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if name in values}
    lists = [name for name, value in values.items() if isinstance(value, list) and len(value) == count]
    return cut | {name: values[name][:depth] for name in lists}


# ---- The trial


def _try(architecture: Architecture, small: PreTrainedConfig, collator, device: torch.device) -> Verdict:
    dtype = torch.bfloat16 if "flash" in (architecture.attention or "") else torch.float32
    model = architecture.build(copy.deepcopy(small)).to(dtype)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # as initialised, attention would hardly change anything
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    attention = model.config.get_text_config()._attn_implementation
    if architecture.prompt_learning is not None:
        model = get_peft_model(model, _for_copy(architecture.prompt_learning))
    model.to(device).eval()
    vocabulary = small.get_text_config().vocab_size
    first, second = (torch.randint(3, min(vocabulary, VOCABULARY), (num,)) for num in (FIRST_TOKENS, SECOND_TOKENS))
    # Every token is another one
    other_first, other_second = ((tokens - 2) % (min(vocabulary, VOCABULARY) - 3) + 3 for tokens in (first, second))

    def logits(*documents: Tensor) -> tuple[Tensor, ...]:
        row = {"input_ids": torch.cat(documents).tolist(), "seq_lengths": [len(document) for document in documents]}
        inputs = {name: value for name, value in collator([row]).items() if name != "labels"}
        inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
        with torch.no_grad():
            out = model(**inputs, use_cache=False).logits[0].float()
        start = len(out) - inputs["input_ids"].size(1)  # virtual tokens stand in front
        return out[start : start + sum(row["seq_lengths"])].split(row["seq_lengths"])

    together = logits(first, second)
    after_other, before_other = logits(other_first, second), logits(first, other_second)
    own = min(_distance(together[0], after_other[0]), _distance(together[1], before_other[1]))
    seen = max(_distance(together[1], after_other[1]), _distance(together[0], before_other[0])) / own
    apart = _distance(together[1], logits(second)[0]) / own
    if not math.isfinite(seen + apart):
        raise ValueError("the copy's logits are not finite")
    return Verdict(attention, seen, apart, dtype)


def _for_copy(peft_config):
    """Return PEFT's settings for the copy's sizes, with random virtual tokens."""
    settings = copy.deepcopy(peft_config)
    for name in INFERRED_BY_PEFT:
        if hasattr(settings, name):
            setattr(settings, name, None)
    if hasattr(settings, "prompt_tuning_init"):
        settings.prompt_tuning_init = "RANDOM"
    return settings


def _distance(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def packed_rows_collator(args) -> DataCollatorForLanguageModeling:
    """Make TRL's collator as SFTTrainer will for these settings."""
    return DataCollatorForLanguageModeling(
        pad_token_id=0, padding_free=True, pad_to_multiple_of=args.pad_to_multiple_of
    )
