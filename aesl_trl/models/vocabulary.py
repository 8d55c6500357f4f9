"""The vocabulary that a model was trained with: an adapter's base may have fewer or more tokens on disk.

A script adds tokens and resizes the base before it puts the adapter on, and so does TRL's `chat_template_path`. PEFT
saves the resized embeddings with the adapter. So the base gets their size before the adapter is put on again.
"""

from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoConfig
from transformers.integrations import is_deepspeed_zero3_enabled

from ..errors import InputError
from .folder import ModelFolder, open_tensors
from .skeleton import skeleton


# What PEFT calls a tensor of an embedding (without the module's name): the dimension that counts tokens
TOKEN_DIMENSION = {
    "weight": 0,
    "base_layer.weight": 0,
    "modules_to_save.weight": 0,
    "original_module.weight": 0,
    "token_adapter.base_layer.weight": 0,
    "lora_B.weight": 0,
    "lora_embedding_A": 1,
}


def num_embeddings(model: ModelFolder, **kwargs: Any) -> int:
    """Return for how many tokens `model` has embeddings as it was trained; no weights of a base are read.

    `kwargs` are those for loading its config, such as `revision` and `trust_remote_code`.
    """
    if model.is_adapter:
        return trained_size(model.weights, skeleton(model.config_at, **kwargs))
    return AutoConfig.from_pretrained(model.weights, **kwargs).get_text_config().vocab_size


def trained_size(adapter: str, base: Any) -> int:
    """Return for how many tokens `base` had embeddings when `adapter`, a folder or a name on the hub, was trained."""
    from peft import PeftConfig

    embeddings = (base.get_input_embeddings(), base.get_output_embeddings())
    names = [name for name, module in base.named_modules() if any(module is each for each in embeddings)]
    for key, shape in _shapes(adapter).items():
        for name in names:
            _, found, rest = f".{key}".partition(f".{name}.")
            if found and rest in TOKEN_DIMENSION:
                return shape[TOKEN_DIMENSION[rest]]
    # PEFT left the embeddings out, or they are the base's. Some tokens may have been trained alone
    config = PeftConfig.from_pretrained(adapter)
    trained = getattr(config, "token_indices", None) or getattr(config, "trainable_token_indices", None) or []
    trained = sum(trained.values(), []) if isinstance(trained, dict) else trained
    return max(embeddings[0].num_embeddings, *(index + 1 for index in trained), 0)


def _shapes(adapter: str) -> dict[str, list[int]]:
    """Return the shape of each tensor of an adapter; of safetensors in a folder only the headers are read."""
    from peft import load_peft_weights

    tensors = open_tensors(Path(adapter)) or load_peft_weights(adapter, device="cpu")
    return {name: list(t.shape if isinstance(t, torch.Tensor) else t.get_shape()) for name, t in tensors.items()}


class ResizedBase:
    """A base whose embeddings get the size that `adapter` was trained with, before the adapter is put on.

    The rows that the base lacks hold NaN until the adapter brings them.
    """

    def __init__(self, base: Any, adapter: str):
        self.before = base.get_input_embeddings().num_embeddings
        self.size = trained_size(adapter, base)
        if self.size != self.before:
            base.resize_token_embeddings(self.size, mean_resizing=False)
        self.embeddings = [each for each in (base.get_input_embeddings(), base.get_output_embeddings()) if each]
        # A rank of ZeRO-3 holds a part of each weight, and cannot tell which rows are in it
        self.is_enlarged = self.size > self.before and not is_deepspeed_zero3_enabled()
        if self.is_enlarged:
            for each in self.embeddings:
                each.weight.data[self.before :] = torch.nan

    @torch.no_grad()
    def check(self, model: Any, adapter: str) -> None:
        """Refuse an adapter without the rows that its base lacks too: they were trained, and never saved."""
        if not self.is_enlarged:
            return
        weight = self.embeddings[0].weight
        new = torch.arange(self.before, self.size, device=weight.device)
        lost = ["the input embedding"] if model.get_input_embeddings()(new).isnan().any() else []
        for head in self.embeddings[1:]:
            states = torch.zeros(1, head.in_features, dtype=weight.dtype, device=weight.device)
            lost += ["the output embedding"] if model.get_output_embeddings()(states).isnan().any() else []
        if lost:
            raise InputError(
                f"{adapter} was trained with {self.size} tokens, its base has {self.before}, and PEFT saved no new "
                f"rows of {lost[0]}: save the adapter with save_embedding_layers=True and modules_to_save=['lm_head'],"
                " or save the resized base and name that as base_model_name_or_path in adapter_config.json"
            )
        for each in self.embeddings:  # PEFT keeps the base's own rows beside those that were trained
            each.weight.data.nan_to_num_()


def let_head_run(model: Any) -> None:
    """Mend the head of a tied base that PEFT has wrapped for single tokens; TRL's fused head reads its bias.

    When TRL adds the tokens of a chat template, it asks PEFT to train the head as a whole too. The weights are right
    then, but PEFT's forward takes nothing but plain layers under the wrapper of the tokens.
    """
    from peft.utils import ModulesToSaveWrapper

    head = model.get_output_embeddings()
    tokens = getattr(head, "token_adapter", None)
    if tokens is None:
        return
    # Past nn.Module's own __setattr__, which would register the bias once more
    object.__setattr__(head, "bias", getattr(tokens.base_layer, "bias", None))
    if isinstance(tokens.base_layer, ModulesToSaveWrapper):
        tokens.forward_adapters = MethodType(_forward_tokens, tokens)


def _forward_tokens(layer: Any, states: torch.Tensor, active_adapters: list[str], *args, **kwargs) -> torch.Tensor:
    if layer.disable_adapters or layer.merged or not active_adapters:
        return layer.base_layer(states)
    return F.linear(states, layer.get_merged_weights(active_adapters))
