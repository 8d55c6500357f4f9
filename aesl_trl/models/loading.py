"""A checkpoint's folder -> model, tokenizer and generation config in memory, in the dtype of its files.

PEFT leaves out what finds no place in a base, with a warning at most; here that is refused. What a model or a
tokenizer lacks is looked for before any weights are read. Which folder it is, and whether another base holds the same
weights, is source.py.
"""

import gc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig

from ..errors import InputError, in_one_line, nearest
from .folder import ADAPTER_CONFIG, CONFIG, TOKENIZER_CONFIG, check_weights, is_quantized, tensor_files
from .source import Source
from .tokens import check_ids, prompt_tokens, turn_end_token, without_none


# ---- Checks before any weights are read

CHECKED_ROWS = 8  # of the data, that a tokenizer has to be able to write down


def check_model(model: str, field: str, *, revision: str = "main", trust_remote_code: bool = False) -> None:
    """Refuse what cannot be loaded as a model; `field` is the setting that names it. A name on the hub is looked up.

    Raises:
        InputError: a file, a folder without config or weights, an adapter, weights that are cut off, an unknown
            architecture, or a name that is neither a folder nor on the hub.
    """
    folder = Path(model)
    if folder.is_file():
        raise InputError(f"{field}: {model} is a file: name a model's folder")
    if not folder.is_dir() and (folder.is_absolute() or model.startswith(".") or model.count("/") > 1):
        siblings = [item.name for item in folder.absolute().parent.glob("*") if item.is_dir()]
        raise InputError(f"{field}: {model} is not a folder{nearest(folder.name, siblings)}")
    if folder.is_dir():
        if not (folder / CONFIG).is_file():
            raise InputError(f"{field}: {model} {_without_config(folder)}")
        check_weights(folder)
    try:
        AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        if "trust_remote_code" in str(error):
            raise InputError(
                f"{field}: {model} brings code of its own, which is not run: read it, then set trust_remote_code: true"
            ) from None
        raise InputError(f"{field}: {model} cannot be loaded: {in_one_line(error)}") from None


def _without_config(folder: Path) -> str:
    if (folder / ADAPTER_CONFIG).is_file():
        return f"is an adapter: name its base, or merge it: aesl handoff {folder} --output {folder}-merged"
    inside = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    return f"holds no {CONFIG}" + (f", {inside[-1]} does: name that one" if inside else ": name a model's folder")


def check_tokenizer(
    tokenizer_name: str,
    model: str,
    rows: Iterable[dict],
    *,
    field: str,
    settings: Any = None,
    revision: str = "main",
    trust_remote_code: bool = False,
) -> None:
    """Refuse a tokenizer that cannot write `rows` down, that nothing ends a completion with, or of another model.

    Args:
        tokenizer_name, model: folders or names on the hub; they differ for an adapter.
        rows: some rows of the data, with `prompt` or `messages`.
        field: the setting that names the model.
        settings: an SFTConfig, whose `eos_token` and `chat_template_path` add what is not there.

    Raises:
        InputError: no chat template for conversations, one that refuses them, no eos token, or a token without
            embedding.
    """
    kwargs = {"revision": revision, "trust_remote_code": trust_remote_code}
    tokenizer = _read_tokenizer(tokenizer_name, **kwargs)
    if getattr(settings, "chat_template_path", None):  # brings a template, and enlarges the model for its tokens
        return
    texts = [row for row in rows if not (row.get("image") or row.get("images"))]
    prompts = [without_none(row.get("prompt") or row.get("messages")) for row in texts]
    if tokenizer.chat_template is None and any(isinstance(prompt, list) for prompt in prompts):
        where = ", set chat_template_path" if settings is not None else ""
        raise InputError(
            f"{field}: the tokenizer of {tokenizer_name} has no chat template, and the data are conversations: take "
            f"an instruct model{where}, or give the data as text"
        )
    _check_eos(tokenizer, f"{field}: the tokenizer of {tokenizer_name}", tokenizer_name, settings)
    ids = {tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}
    try:
        ids.update(*(prompt_tokens(tokenizer, prompt) for prompt in prompts if prompt))
    except (TemplateError, TypeError) as error:
        raise InputError(
            f"{field}: the chat template of {tokenizer_name} refuses a prompt: {in_one_line(error)}"
        ) from None
    num_rows = AutoConfig.from_pretrained(model, **kwargs).get_text_config().vocab_size
    check_ids(tokenizer, ids, num_rows, f"{field}: {tokenizer_name}: ")


def _check_eos(tokenizer, what: str, name: str, settings: Any) -> None:
    given = getattr(settings, "eos_token", None)
    if given and given not in tokenizer.get_vocab():
        raise InputError(f"{what} has no token {given!r} (eos_token){nearest(given, tokenizer.all_special_tokens)}")
    if given or tokenizer.eos_token_id is not None:
        return
    try:
        turn_end = turn_end_token(tokenizer)
    except (InputError, TemplateError, TypeError):  # a template that this conversation does not suit
        turn_end = None
    token = "the token that ends a turn" if turn_end is None else repr(tokenizer.convert_ids_to_tokens(turn_end))
    remedy = f"aesl handoff {name} sets it" if settings is None else f"set eos_token to {token}"
    raise InputError(f"{what} has no eos_token, so nothing ends a completion: {remedy}")


def _read_tokenizer(place: str, **kwargs):
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **kwargs)
    except (OSError, ValueError) as error:
        raise InputError(f"no tokenizer in {place}: {in_one_line(error)}") from None
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        # Without its files transformers builds an empty one from the model's type, and says nothing.
        raise InputError(f"no tokenizer in {place}, what is there encodes nothing: copy tokenizer*.json as well")
    return tokenizer


# ---- Loading


def release_memory() -> None:
    """Give back what a model held that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def load_tokenizer(source: Source):
    """The tokenizer beside the weights, else the base's."""
    beside = source.base is None or (source.folder / TOKENIZER_CONFIG).is_file()
    place = str(source.folder if beside else source.base)
    return _read_tokenizer(place, trust_remote_code=source.trust_remote_code)


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
    """The adapter in the folder `adapter` on its base, quantized as in training when `as_trained`."""
    name = source.trained_on if as_trained else source.base
    # Quantized weights bring their own config.
    quantization = source.quantization if as_trained and not is_quantized(name) else None
    base = load_model(name, quantization, trust_remote_code=source.trust_remote_code)
    return put_adapter(base, str(adapter), name).eval()


def put_adapter(base, adapter: str, name: str, **kwargs):
    """The adapter (a folder, or a name on the hub) on the model `base`, which is called `name`.

    Raises:
        InputError: the base has another shape than the one that the adapter was trained on.
    """
    from peft import PeftModel

    try:
        model = PeftModel.from_pretrained(base, adapter, **kwargs)
    except (RuntimeError, ValueError) as error:
        lines = [line for line in str(error).splitlines() if "size mismatch" in line]
        if isinstance(error, RuntimeError) and not lines:  # out of memory, say
            raise
        reason = in_one_line(lines[0] if lines else error)
        raise InputError(f"{adapter} does not fit the base {name}, it was trained on another one: {reason}") from None
    if Path(adapter).is_dir():
        check_adapter_keys(model, Path(adapter), name)
    return model


def check_adapter_keys(model, adapter: Path, base: str) -> None:
    """Refuse a base with more or fewer layers: PEFT leaves out what finds no place, with a warning at most."""
    from peft import get_peft_model_state_dict

    saved = {name for name in tensor_files(adapter) if "embed" not in name and "lm_head" not in name}
    placed = {name for name in get_peft_model_state_dict(model) if "embed" not in name and "lm_head" not in name}
    if saved and saved != placed:
        raise InputError(
            f"{adapter} does not fit the base {base}, it was trained on another one: {sorted(saved ^ placed)[0]} is "
            "only in one of the two"
        )
