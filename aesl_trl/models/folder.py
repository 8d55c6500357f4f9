"""A model's folder: where its weights, base, tokenizer and configs lie, and whether the weights are whole."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open

from ..errors import InputError, in_one_line
from ..files import check_candidate, read_object, stays_inside


ADAPTER_CONFIG = "adapter_config.json"
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
INDEX = "model.safetensors.index.json"
PICKLE_INDEX = "pytorch_model.bin.index.json"
MODEL_FILES = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")
# Types of PEFT whose forward pass wants more than token ids
NEEDS_MORE = {
    "MULTITASK_PROMPT_TUNING": "which wants the task of each row",
    "POLY": "which wants the task of each row",
    "SHADOW": "which runs a second model beside the first",
    "XLORA": "which mixes adapters of other folders",
}
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
        check_candidate(path)
        is_adapter = (Path(path) / ADAPTER_CONFIG).is_file()
        return cls(str(path), base_of(str(path), name) if is_adapter else None)

    @property
    def folder(self) -> Path:
        """`weights` as a path."""
        return Path(self.weights)

    @property
    def is_adapter(self) -> bool:
        """Whether the weights are those of an adapter."""
        return self.base is not None

    @property
    def config_at(self) -> str:
        """Where the network's config lies: for an adapter, in the base's folder."""
        return self.base or self.weights

    @property
    def tokenizer_at(self) -> str:
        """Where the tokenizer lies: beside the weights, else in the base's folder."""
        return self.weights if (self.folder / TOKENIZER_CONFIG).is_file() else self.config_at

    @property
    def generation_config_at(self) -> str:
        """Where the generation config lies: beside the weights, else in the base's folder."""
        return self.weights if (self.folder / GENERATION_CONFIG).is_file() else self.config_at

    @property
    def is_quantized(self) -> bool:
        """Whether the full weights, or those of the adapter's base, are quantized on disk."""
        config = Path(self.config_at) / CONFIG
        return bool(read_object(config).get("quantization_config"))

    def identity(self, revision: str | None = None) -> dict:
        """Return what tells these weights from others: a hub name's commit, or the sizes and times of the files.

        Contents are not read, so a copy with other times counts as another model. `revision` is that of a hub name,
        also of an adapter's base. The config is fetched and not loaded, so no code of the model is asked for or run.
        """
        if not self.folder.is_dir():
            # Its folder in the hub's cache is named by the commit
            commit = Path(hf_hub_download(self.weights, CONFIG, revision=revision)).parent.name
            return {"name": self.weights, "commit": commit}
        files = sorted(item for item in self.folder.iterdir() if item.suffix in MODEL_FILES)
        return {
            "name": str(self.folder.resolve()),
            "files": [[item.name, item.stat().st_size, item.stat().st_mtime_ns] for item in files],
            "base": ModelFolder(self.base).identity(revision) if self.base else None,
        }


def base_of(adapter: str, field: str) -> str:
    """Return the base that `adapter`, a folder or a name on the hub, names; refuse one whose folder is not there.

    `field` is the setting that names the adapter.
    """
    if Path(adapter).is_dir():
        check_weights(Path(adapter))
    base = adapter_config(adapter, field).base_model_name_or_path
    if not base:
        raise InputError(f"{field}: {adapter} does not name its base: add base_model_name_or_path to {ADAPTER_CONFIG}")
    base = found_from(base, adapter)
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise InputError(
            f"{field}: the base of {adapter} is {base}, which is not there: put it there, or correct "
            f"base_model_name_or_path in {ADAPTER_CONFIG}"
        )
    return base


def adapter_config(adapter: str, field: str) -> Any:
    """Read PEFT's config of `adapter`; refuse a type that PEFT does not know, or that token ids alone cannot run."""
    from peft import PeftConfig

    try:
        config = PeftConfig.from_pretrained(adapter)
    except KeyError as error:
        raise InputError(f"{field}: the adapter {adapter} is of type {error}, which this PEFT does not know") from None
    except (ValueError, TypeError, OSError) as error:
        raise InputError(f"{field}: the adapter {adapter} cannot be read: {in_one_line(error)}") from None
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind in NEEDS_MORE:
        raise InputError(
            f"{field}: the adapter {adapter} is of type {kind}, {NEEDS_MORE[kind]}: it cannot be used here"
        )
    return config


def found_from(base: str, adapter: str) -> str:
    """Return the folder `base`: a relative name counts from the current folder, else from one above the adapter.

    The second holds where a project's folder was moved as a whole. Other names are returned as they are.
    """
    places = [Path(base), *(parent / base for parent in Path(adapter).resolve().parents)]
    return next((str(place) for place in places if (place / CONFIG).is_file()), base)


# ---- Weight files


def check_weights(folder: Path) -> None:
    """Refuse weights that are missing or cut off, as an interrupted copy leaves them; only their headers are read."""
    for index in (folder / INDEX, folder / PICKLE_INDEX):
        listed = read_object(index).get("weight_map", {})
        if not isinstance(listed, dict) or not all(isinstance(shard, str) for shard in listed.values()):
            raise InputError(f"{index}: 'weight_map' must name a file for each tensor: download or copy it again")
        shards = set(listed.values())
        if outside := sorted(shard for shard in shards if not stays_inside(shard)):
            raise InputError(f"{index} names {outside[0]}, which is outside of its folder: download or copy it again")
        if missing := sorted(shard for shard in shards if not (folder / shard).is_file()):
            raise InputError(
                f"{folder} lacks {missing[0]}, one of {len(shards)} weight files: download or copy it again"
            )
    files = sorted(folder.glob("*.safetensors"))
    if not files and not any(folder.glob("pytorch_model*.bin")) and not any(folder.glob("adapter_model*.bin")):
        raise InputError(f"{folder} holds no weights, only their config: copy the *.safetensors as well")
    for path in files:
        if problem := safetensors_problem(path):
            raise InputError(f"{path} {problem}")


def safetensors_problem(path: Path) -> str | None:
    """Return why the file `path` cannot be read as safetensors, as a clause with its remedy; None if it is whole."""
    with open(path, "rb") as file:
        if file.read(len(GIT_LFS)) == GIT_LFS:
            return "is a pointer of git-lfs, not the file itself: run git lfs pull"
    try:
        with safe_open(path, "pt"):
            return None
    except SafetensorError as error:
        return f"is cut off or no weights ({error}): download or copy it again"


def open_tensors(folder: Path) -> dict[str, Any]:
    """Map the name of each tensor in `folder` to its slice in a safetensors file, of which an index reads a part."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        file = safe_open(path, "pt")
        tensors |= {name: file.get_slice(name) for name in file.keys()}
    return tensors


def first_difference(one: Path, other: Path) -> str | None:
    """Return the first tensor whose name, shape or first 4 rows differ between two model folders."""
    left, right = open_tensors(one), open_tensors(other)
    for name in sorted(left.keys() | right.keys()):
        if name not in left or name not in right or left[name].get_shape() != right[name].get_shape():
            return name
        is_matrix = len(left[name].get_shape()) > 1
        # bfloat16: a float32 copy of a bfloat16 model is the same model.
        a, b = ((tensor[:4] if is_matrix else tensor[...]).to(torch.bfloat16) for tensor in (left[name], right[name]))
        if not torch.equal(a, b):
            return name
    return None
