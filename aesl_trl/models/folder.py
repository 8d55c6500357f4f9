"""A model's folder: which files it holds, whether its weights are whole, which base an adapter stands on."""

from pathlib import Path

import torch

from ..errors import InputError, in_one_line
from ..files import RUN, read_json


GIT_LFS = b"version https://git-lfs"


def base_of(adapter: str, field: str) -> str:
    """The base that an adapter names, refused where it is a folder that is gone."""
    from peft import PeftConfig

    if Path(adapter).is_dir():
        check_weights(Path(adapter))
    try:
        base = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    except (ValueError, TypeError, OSError) as error:
        raise InputError(f"{field}: the adapter {adapter} cannot be read: {in_one_line(error)}") from None
    if not base:
        raise InputError(f"{field}: {adapter} does not name its base: add base_model_name_or_path to {ADAPTER_CONFIG}")
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise InputError(
            f"{field}: the base of {adapter} is {base}, which is not there: put it there, or correct "
            f"base_model_name_or_path in {ADAPTER_CONFIG}"
        )
    return base


ADAPTER_CONFIG = "adapter_config.json"


CONFIG = "config.json"


GENERATION_CONFIG = "generation_config.json"


TOKENIZER_CONFIG = "tokenizer_config.json"


INDEX = "model.safetensors.index.json"


def first_difference(one: Path, other: Path) -> str | None:
    """First tensor in which two model folders differ: name, shape, a vector's values or a matrix's first 4 rows."""
    left, right = (tensor_files(folder) for folder in (one, other))
    for name in sorted(left.keys() | right.keys()):
        if name not in left or name not in right:
            return name
        a, b = (_head(files[name], name) for files in (left, right))
        if a[0] != b[0] or not torch.equal(a[1], b[1]):
            return name
    return None


def check_weights(folder: Path) -> None:
    """Refuse a folder whose weights are missing or cut off, as a download or copy that broke leaves them.

    Of each file the header is read.
    """
    shards = set(read_json(folder / INDEX)["weight_map"].values()) if (folder / INDEX).is_file() else set()
    missing = sorted(shard for shard in shards if not (folder / shard).is_file())
    if missing:
        raise InputError(f"{folder} lacks {missing[0]}, one of {len(shards)} weight files: download or copy it again")
    files = sorted(folder.glob("*.safetensors"))
    if not files and not any(folder.glob("pytorch_model*.bin")) and not any(folder.glob("adapter_model*.bin")):
        raise InputError(f"{folder} holds no weights, only their config: copy the *.safetensors as well")
    for path in files:
        _check_header(path)


def _check_header(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    with open(path, "rb") as file:
        if file.read(len(GIT_LFS)) == GIT_LFS:
            raise InputError(f"{path} is a pointer of git-lfs, not the file itself: run git lfs pull")
    try:
        with safe_open(path, "pt"):
            pass
    except SafetensorError as error:
        raise InputError(f"{path} is cut off or no weights ({error}): download or copy it again") from None


def tensor_files(folder: Path) -> dict[str, Path]:
    from safetensors import safe_open

    files = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            files |= dict.fromkeys(file.keys(), path)
    return files


def _head(path: Path, name: str) -> tuple[list[int], torch.Tensor]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        tensor = file.get_slice(name)
        shape = tensor.get_shape()
        # bfloat16: a float32 copy of a bfloat16 model is the same model.
        return shape, (tensor[:4] if len(shape) > 1 else tensor[:]).to(torch.bfloat16)


def quantization_of(base: str, folders: list[Path | None]) -> dict | None:
    """How `base` was quantized in training: its own config, else `quantization` in a run.json of `folders`."""
    if is_quantized(base):
        return read_json(Path(base) / CONFIG)["quantization_config"]
    runs = [read_json(folder / RUN) for folder in folders if folder and (folder / RUN).is_file()]
    return next((run["quantization"] for run in runs if run.get("quantization")), None)


def is_quantized(model: str) -> bool:
    """Whether the folder `model` holds quantized weights."""
    config = Path(model) / CONFIG
    return config.is_file() and bool(read_json(config).get("quantization_config"))
