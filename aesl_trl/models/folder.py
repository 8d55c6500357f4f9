"""A model's folder: where its weights, base, tokenizer and configs lie, and whether the weights are whole."""

from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import InputError, in_one_line
from ..files import RUN, read_json


ADAPTER_CONFIG = "adapter_config.json"
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
INDEX = "model.safetensors.index.json"
MODEL_FILES = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")
GIT_LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class ModelFolder:
    """A model as a user names it: a folder or a name on the hub, with full weights or with an adapter.

    Attributes:
        weights: folder or hub name of the weights; for an adapter, of the adapter's weights.
        base: folder or hub name of an adapter's base; None for full weights.
    """

    weights: str
    base: str | None = None

    @classmethod
    def find(cls, path: str | Path, name: str = "model") -> "ModelFolder":
        """Look up whether the folder `path` holds an adapter, and which base that adapter names.

        A name on the hub counts as full weights. `name` is the setting that an error message opens with.
        """
        path = str(path)
        return cls(path, base_of(path, name) if (Path(path) / ADAPTER_CONFIG).is_file() else None)

    @property
    def folder(self) -> Path:
        """`weights` as a path."""
        return Path(self.weights)

    @property
    def is_adapter(self) -> bool:
        """Whether these are an adapter's weights, which are of use on a base alone."""
        return self.base is not None

    @property
    def config_at(self) -> str:
        """Where the network's config lies: in the base's folder for an adapter."""
        return self.base or self.weights

    @property
    def tokenizer_at(self) -> str:
        """Where the tokenizer lies: beside the weights, else in the base's folder."""
        return self._beside_weights_or_base(TOKENIZER_CONFIG)

    @property
    def generation_config_at(self) -> str:
        """Where the generation config lies: beside the weights, else in the base's folder."""
        return self._beside_weights_or_base(GENERATION_CONFIG)

    @property
    def is_quantized(self) -> bool:
        """Whether the full weights, or the base of the adapter, are quantized on disk."""
        return is_quantized(self.config_at)

    def _beside_weights_or_base(self, name: str) -> str:
        return self.weights if self.base is None or (self.folder / name).is_file() else self.base

    def identity(self) -> dict:
        """Return what distinguishes these weights from others, and from themselves after more training.

        For a name on the hub that is its commit, for a folder the sizes and times of its files. Contents are not read,
        so a copy with other times counts as another model.
        """
        if not self.folder.is_dir():
            from transformers import AutoConfig

            commit = getattr(AutoConfig.from_pretrained(self.weights), "_commit_hash", None)
            return {"name": self.weights, "commit": commit}
        files = sorted(item for item in self.folder.iterdir() if item.suffix in MODEL_FILES)
        return {
            "name": str(self.folder.resolve()),
            "files": [[item.name, item.stat().st_size, item.stat().st_mtime_ns] for item in files],
            "base": ModelFolder(self.base).identity() if self.base else None,
        }


def base_of(adapter: str, field: str) -> str:
    """Return the base that an adapter names, and refuse a base that is a folder which is not there.

    `adapter` is a folder or a name on the hub, `field` the setting that names it.
    """
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


def is_quantized(model: str) -> bool:
    """Say whether the folder `model` holds quantized weights."""
    config = Path(model) / CONFIG
    return config.is_file() and bool(read_json(config).get("quantization_config"))


def quantization_of(base: str, folders: list[Path | None]) -> dict | None:
    """Return how `base` was quantized in training: its own config, else `quantization` in a run.json of `folders`."""
    if is_quantized(base):
        return read_json(Path(base) / CONFIG)["quantization_config"]
    runs = [read_json(folder / RUN) for folder in folders if folder and (folder / RUN).is_file()]
    return next((run["quantization"] for run in runs if run.get("quantization")), None)


# ---- Weight files


def check_weights(folder: Path) -> None:
    """Refuse a folder whose weights are missing or cut off, as an interrupted download or copy leaves them.

    Only the header of each file is read.
    """
    shards = set(read_json(folder / INDEX)["weight_map"].values()) if (folder / INDEX).is_file() else set()
    missing = sorted(shard for shard in shards if not (folder / shard).is_file())
    if missing:
        raise InputError(f"{folder} lacks {missing[0]}, one of {len(shards)} weight files: download or copy it again")
    files = sorted(folder.glob("*.safetensors"))
    if not files and not any(folder.glob("pytorch_model*.bin")) and not any(folder.glob("adapter_model*.bin")):
        raise InputError(f"{folder} holds no weights, only their config: copy the *.safetensors as well")
    for path in files:
        problem = safetensors_problem(path)
        if problem:
            raise InputError(f"{path} {problem}")


def safetensors_problem(path: Path) -> str | None:
    """Return why the file `path` cannot be read as safetensors, as a clause with its remedy; None if it is whole."""
    from safetensors import SafetensorError, safe_open

    with open(path, "rb") as file:
        if file.read(len(GIT_LFS)) == GIT_LFS:
            return "is a pointer of git-lfs, not the file itself: run git lfs pull"
    try:
        with safe_open(path, "pt"):
            return None
    except SafetensorError as error:
        return f"is cut off or no weights ({error}): download or copy it again"


def tensor_files(folder: Path) -> dict[str, Path]:
    """Map the name of each tensor in `folder` to the safetensors file that holds it."""
    from safetensors import safe_open

    files = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            files |= dict.fromkeys(file.keys(), path)
    return files


def first_difference(one: Path, other: Path) -> str | None:
    """Return the first tensor in which two model folders differ: in name, shape, or values.

    Of a vector all values are compared, of a matrix the first 4 rows.
    """
    left, right = (tensor_files(folder) for folder in (one, other))
    for name in sorted(left.keys() | right.keys()):
        if name not in left or name not in right:
            return name
        a, b = (_shape_and_first_rows(files[name], name) for files in (left, right))
        if a[0] != b[0] or not torch.equal(a[1], b[1]):
            return name
    return None


def _shape_and_first_rows(path: Path, name: str) -> tuple[list[int], torch.Tensor]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        tensor = file.get_slice(name)
        shape = tensor.get_shape()
        # bfloat16: a float32 copy of a bfloat16 model is the same model.
        return shape, (tensor[:4] if len(shape) > 1 else tensor[:]).to(torch.bfloat16)
