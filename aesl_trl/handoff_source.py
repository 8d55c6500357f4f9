"""What is handed over: the folder with the selected weights, its base, and the run's own samples.

Folders and JSON are looked at, and of two bases a few rows of each tensor; no model is built (loading.py), and what
happens to an adapter is not decided here (handoff.py).
"""

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from .data import GIT_LFS
from .errors import InputError, nearest
from .files import (
    CHAIN,
    DIVERSITY,
    RUN,
    SAMPLES,
    SELECTION,
    check_version,
    read_json,
    read_rows,
    sft_dir,
    stays_inside,
)


ADAPTER_CONFIG = "adapter_config.json"
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
INDEX = "model.safetensors.index.json"
DEFAULT_NEW_TOKENS = 256


@dataclass(frozen=True)
class Source:
    """What is handed over.

    `folder` holds the weights. For an adapter, `base` is what it goes on with, and `trained_on` and `quantization` say
    what it was trained on: the same model, quantized as this dict says (None: not at all), or another folder that
    holds quantized weights already.
    """

    folder: Path
    base: str | None
    trained_on: str | None
    quantization: dict | None
    step: int | None
    samples: list[dict]
    max_new_tokens: int
    trust_remote_code: bool = False


def find_source(run: Path, base: str | None = None, trust_remote_code: bool = False) -> Source:
    """The selected weights of `run` (a chain run or an SFT folder), or `run` itself if it is a model or an adapter."""
    if not run.is_dir():
        siblings = [item.name for item in run.absolute().parent.glob("*") if item.is_dir()]
        raise InputError(f"{run} is not a folder{nearest(run.name, siblings)}")
    folder, step, sft = _selected(run)
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    if not is_adapter and not (folder / CONFIG).is_file():
        hint = f"select one: aesl select {run}" if sft else "name a run, a model or an adapter"
        raise InputError(f"{folder} holds neither {CONFIG} with weights nor {ADAPTER_CONFIG}; {hint}")
    check_weights(folder)
    if base and not is_adapter:
        raise InputError(f"--base is for adapters: {folder} holds full weights")
    samples, max_new_tokens = _samples(sft, step)
    if not is_adapter:
        return Source(folder, None, None, None, step, samples, max_new_tokens, trust_remote_code)
    recorded = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    base = check_base(base, recorded, folder)
    trained_on = recorded if recorded and is_quantized(recorded) else base
    quantization = quantization_of(trained_on, [folder, folder.parent, sft])
    if quantization and importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            f"{folder} was trained on a quantized base, which needs the package bitsandbytes: it is not installed"
        )
    return Source(folder, base, trained_on, quantization, step, samples, max_new_tokens, trust_remote_code)


def _selected(run: Path) -> tuple[Path, int | None, Path | None]:
    """Folder with the weights, their step, and the SFT folder that has their samples."""
    try:
        sft = sft_dir(run)
    except InputError:
        if (run / CHAIN).exists():  # a run it is, and one that cannot be read
            raise
        sft = None
    if sft:
        check_version(sft)
    for place in filter(None, (run, sft)):
        if (place / SELECTION).is_file():
            selection = _selection(place, run)
            path = selection.get("path") or ""
            folder = place / path
            if not path or not stays_inside(path) or not folder.is_dir():
                what = "is not a folder" if stays_inside(path) else "is outside of its folder"
                raise InputError(f"{place / SELECTION} points to {folder}, which {what}; run aesl select {run} again")
            return folder, selection.get("step"), sft
    return run, None, sft


def _selection(place: Path, run: Path) -> dict:
    try:
        selection = read_json(place / SELECTION)
    except InputError as error:
        raise InputError(f"{error}; make it anew: aesl select {run}") from None
    return selection if isinstance(selection, dict) else {}


def _samples(sft: Path | None, step: int | None) -> tuple[list[dict], int]:
    """Lines of samples/step-N.jsonl, N the selected step or else the newest, and the length they were cut at."""
    steps = (
        {int(path.stem[5:]): path for path in (sft / SAMPLES).glob("step-*.jsonl") if path.stem[5:].isdigit()}
        if sft
        else {}
    )
    if not steps:
        return [], DEFAULT_NEW_TOKENS
    measured = step if step in steps else max(steps)
    rows = read_rows(sft / DIVERSITY) if (sft / DIVERSITY).is_file() else []
    figures = next((row for row in rows if row.get("step") == measured), {})
    samples = read_rows(steps[measured], needs=("prompt", "completions"))
    for sample in samples:
        # Entropy is the model's own only at temperature 1 and at its own step.
        sample["comparable"] = measured == step and figures.get("temperature") == 1.0
    return samples, figures.get("max_new_tokens") or DEFAULT_NEW_TOKENS


def check_base(given: str | None, recorded: str | None, adapter: Path) -> str:
    """The base of `adapter`: the recorded one, or the given one if it is not seen to be another model."""
    base = given or recorded
    if not base:
        raise InputError(f"{adapter / ADAPTER_CONFIG} does not name its base: give it with --base")
    if os.path.isabs(base) or base.startswith("."):
        if not Path(base).is_dir():
            hint = "" if given else "; it has moved: give it with --base"
            raise InputError(f"the base of {adapter} is {base}, which is not a folder{hint}")
    if given and recorded and Path(given).is_dir() and Path(recorded).is_dir() and not is_quantized(recorded):
        tensor = first_difference(Path(given), Path(recorded))
        if tensor:
            raise InputError(
                f"--base {given} is another model than {recorded}, on which the adapter was trained: {tensor} differs"
            )
    return str(Path(base).resolve()) if Path(base).is_dir() else base


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
