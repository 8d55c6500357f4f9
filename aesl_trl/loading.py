"""A checkpoint's folder -> model, tokenizer and generation config in memory, in the dtype of its files.

PEFT leaves out what finds no place in a base, with a warning at most; here that is refused. Which folder it is, and
whether another base holds the same weights, is handoff_source.py.
"""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig

from .errors import InputError
from .handoff_source import TOKENIZER_CONFIG, Source, is_quantized, tensor_files


def load_tokenizer(source: Source):
    """The tokenizer beside the weights, else the base's."""
    beside = source.base is None or (source.folder / TOKENIZER_CONFIG).is_file()
    place = str(source.folder if beside else source.base)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=source.trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(f"no tokenizer in {place}: {' '.join(str(error).split())}") from None
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        # Without its files transformers builds an empty one from the model's type, and says nothing.
        raise InputError(f"no tokenizer in {place}: what is there encodes nothing")
    return tokenizer


def num_embeddings(source: Source) -> int:
    config = AutoConfig.from_pretrained(source.base or source.folder, trust_remote_code=source.trust_remote_code)
    return config.get_text_config().vocab_size


def generation_config(source: Source) -> dict:
    """The generation config beside the weights, else the base's, else what the model's config declares."""
    for place in (source.folder, source.base):
        try:
            return GenerationConfig.from_pretrained(place).to_diff_dict() if place else {}
        except OSError:
            continue
    return {}


def load_model(
    path: str | Path, quantization: dict | None = None, *, device: str | None = None, trust_remote_code: bool = False
):
    """A model in the dtype of its files, not training; by default on the GPU when there is one."""
    device = device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    kwargs = {"quantization_config": BitsAndBytesConfig.from_dict(quantization)} if quantization else {}
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype="auto", device_map=device, trust_remote_code=trust_remote_code, **kwargs
    )
    return model.eval()


def load_adapter(source: Source, adapter: Path, *, as_trained: bool = False):
    """The adapter in the folder `adapter` on its base, quantized as in training when `as_trained`.

    Raises:
        InputError: the base has another shape than the one that the adapter was trained on.
    """
    from peft import PeftModel

    name = source.trained_on if as_trained else source.base
    # Quantized weights bring their own config.
    quantization = source.quantization if as_trained and not is_quantized(name) else None
    base = load_model(name, quantization, trust_remote_code=source.trust_remote_code)
    try:
        model = PeftModel.from_pretrained(base, str(adapter))
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{adapter} does not fit the base {name}: {str(error)[:300]}") from None
    check_adapter_keys(model, adapter, name)
    return model.eval()


def check_adapter_keys(model, adapter: Path, base: str) -> None:
    """Refuse a base with more or fewer layers: PEFT leaves out what finds no place, with a warning at most."""
    from peft import get_peft_model_state_dict

    saved = {name for name in tensor_files(adapter) if "embed" not in name and "lm_head" not in name}
    placed = {name for name in get_peft_model_state_dict(model) if "embed" not in name and "lm_head" not in name}
    if saved and saved != placed:
        raise InputError(
            f"{adapter} does not fit the base {base}: {sorted(saved ^ placed)[0]} is only in one of the two"
        )
