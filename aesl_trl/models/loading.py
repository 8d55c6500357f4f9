"""Load a model, a tokenizer or an adapter; refuse what cannot be loaded, before any weights are read."""

import gc
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
)

from ..errors import InputError, in_one_line, nearest, nearest_sibling
from ..values import without_none
from .chat import REFUSALS, has_images
from .folder import ADAPTER_CONFIG, CONFIG, GENERATION_CONFIG, ModelFolder, check_weights, open_tensors
from .tokens import check_ids, prompt_ids, tokenizer_of, turn_end_id
from .vocabulary import ResizedBase, let_head_run, num_embeddings


# ---- Checks before any weights are read

CHECKED_ROWS = 8  # rows of the data on which a tokenizer is tried


def check_model(model: str, field: str, *, revision: str = "main", trust_remote_code: bool = False) -> None:
    """Refuse a folder or a name on the hub that cannot be loaded as a model; `field` is the setting that names it.

    Raises:
        InputError: a file, a folder without config or weights, an adapter, weights that are cut off, an unknown
            architecture, or a name that is neither a folder nor on the hub.
    """
    folder = Path(model)
    if folder.is_file():
        raise InputError(f"{field}: {model} is a file: name a model's folder")
    if not folder.is_dir() and (folder.is_absolute() or model.startswith(".") or model.count("/") > 1):
        raise InputError(f"{field}: {model} is not a folder{nearest_sibling(folder)}")
    if folder.is_dir():
        if not (folder / CONFIG).is_file():
            if (folder / ADAPTER_CONFIG).is_file():
                remedy = f"name its base, or merge it: aesl handoff {folder} --output_dir {folder}-merged"
                raise InputError(f"{field}: {model} is an adapter: {remedy}")
            inside = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
            hint = f", {inside[-1]} does: name that folder" if inside else ": name a model's folder"
            raise InputError(f"{field}: {model} holds no {CONFIG}{hint}")
        check_weights(folder)
    try:
        AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        if "trust_remote_code" in str(error):
            raise InputError(
                f"{field}: {model} brings code of its own, which is not run: read it, then set trust_remote_code: true"
            ) from None
        raise InputError(f"{field}: {model} cannot be loaded: {in_one_line(error)}") from None


def check_tokenizer(
    model: ModelFolder,
    rows: Iterable[dict],
    *,
    field: str,
    settings: Any = None,
    revision: str = "main",
    trust_remote_code: bool = False,
) -> None:
    """Refuse a tokenizer that cannot encode `rows`, that has no token to end a completion, or that fits another model.

    Args:
        model: whose tokenizer it is.
        rows: some rows of the data, with `prompt` or `messages`.
        field: the setting that names the model.
        settings: an SFTConfig, whose `eos_token` and `chat_template_path` add what the tokenizer lacks.

    Raises:
        InputError: no chat template for conversations, no eos token, or a token without embedding.
    """
    kwargs, tokenizer_name = {"revision": revision, "trust_remote_code": trust_remote_code}, model.tokenizer_at
    processing_class = load_processing_class(tokenizer_name, **kwargs)
    tokenizer = tokenizer_of(processing_class)
    if getattr(settings, "chat_template_path", None):  # brings a template, and enlarges the model for its tokens
        return
    texts = [row for row in rows if not has_images(row)]
    prompts = [without_none(row.get("prompt") or row.get("messages")) for row in texts]
    if processing_class.chat_template is None and any(isinstance(prompt, list) for prompt in prompts):
        where = ", set chat_template_path" if settings is not None else ""
        raise InputError(
            f"{field}: the tokenizer of {tokenizer_name} has no chat template, and the data are conversations: use "
            f"an instruct model{where}, or give the data as text"
        )
    _check_eos(tokenizer, f"{field}: the tokenizer of {tokenizer_name}", tokenizer_name, settings)
    ids = {tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}
    for prompt in filter(None, prompts):
        with suppress(*REFUSALS):  # data/rendered.py names the row that the template refuses
            ids.update(prompt_ids(processing_class, prompt))
    check_ids(tokenizer, ids, num_embeddings(model, **kwargs), f"{field}: {tokenizer_name}: ")


def _check_eos(tokenizer, subject: str, name: str, settings: Any) -> None:
    given = getattr(settings, "eos_token", None)
    if given and given not in tokenizer.get_vocab():
        raise InputError(f"{subject} has no token {given!r} (eos_token){nearest(given, tokenizer.all_special_tokens)}")
    if given or tokenizer.eos_token_id is not None:
        return
    turn_end = turn_end_id(tokenizer)
    token = "the token that ends a turn" if turn_end is None else repr(tokenizer.convert_ids_to_tokens(turn_end))
    remedy = f"aesl handoff {name} sets it" if settings is None else f"set eos_token to {token}"
    raise InputError(f"{subject} has no eos_token, so nothing ends a completion: {remedy}")


def load_processing_class(place: str, **kwargs) -> Any:
    """Load the tokenizer in the folder or hub name `place`, or a vision-language model's processor.

    Where the processor's own parts are missing, such as torchvision, the tokenizer serves for text. A tokenizer that
    encodes nothing is refused.
    """
    try:
        processing_class = AutoProcessor.from_pretrained(place, **kwargs)
    except (OSError, ValueError, ImportError, AttributeError) as error:
        try:
            processing_class = AutoTokenizer.from_pretrained(place, **kwargs)
        except (OSError, ValueError, ImportError, AttributeError):
            raise InputError(f"no tokenizer in {place}: {in_one_line(error)}") from None
    if not tokenizer_of(processing_class)("a", add_special_tokens=False)["input_ids"]:
        # Without the files transformers silently builds an empty tokenizer from the model's type.
        raise InputError(f"no tokenizer in {place}, what is there encodes nothing: copy tokenizer*.json as well")
    return processing_class


# ---- Loading


def release_memory() -> None:
    """Free the memory, on the GPU too, of models and tensors that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def load_model(
    path: str | Path,
    quantization: dict | None = None,
    *,
    device: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
):
    """Load a model in eval mode, by default in the dtype of its files and on the GPU when there is one."""
    device = device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    kwargs = {"quantization_config": BitsAndBytesConfig.from_dict(quantization)} if quantization else {}
    kwargs |= {"dtype": dtype, "device_map": device, "trust_remote_code": trust_remote_code}
    # The class that the config names, as TRL has it: AutoModelForCausalLM knows few vision-language models
    name = (AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code).architectures or [""])[0]
    return getattr(transformers, name, AutoModelForCausalLM).from_pretrained(path, **kwargs).eval()


def put_adapter(base, adapter: str, name: str, **kwargs):
    """Put the adapter (a folder, or a name on the hub) on the model `base`, which is called `name`.

    A generation config beside the adapter replaces the base's, which does not know what ends a turn after training.

    Raises:
        InputError: the base has other shapes, or more or fewer layers, than the base that the adapter was trained on.
    """
    from peft import PeftModel, get_peft_model_state_dict

    misfit = f"{adapter} does not fit the base {name}, it was trained on another one"
    resized = ResizedBase(base, adapter)
    try:
        model = PeftModel.from_pretrained(base, adapter, **kwargs)
    except (RuntimeError, ValueError, ImportError) as error:
        lines = [
            line for line in str(error).splitlines() if "size mismatch" in line or "not found in the base" in line
        ]
        if isinstance(error, RuntimeError) and not lines:  # out of memory, say
            raise
        problem = misfit if lines else f"{adapter} cannot be put on {name}"
        raise InputError(f"{problem}: {in_one_line(lines[0] if lines else error)}") from None
    if Path(adapter).is_dir():
        saved, placed = (
            {key for key in keys if "embed" not in key and "lm_head" not in key}
            for keys in (open_tensors(Path(adapter)), get_peft_model_state_dict(model))
        )
        if saved and saved != placed:  # PEFT leaves tensors out, with a warning at most
            raise InputError(f"{misfit}: {sorted(saved ^ placed)[0]} is only in one of the two")
    let_head_run(model)
    resized.check(model, adapter)
    if (Path(adapter) / GENERATION_CONFIG).is_file():
        try:
            model.get_base_model().generation_config = GenerationConfig.from_pretrained(adapter)
        except OSError as error:
            raise InputError(f"{adapter}: {GENERATION_CONFIG} cannot be read: {in_one_line(error)}") from None
    return model
