"""Which checkpoint-N of a training folder is whole, so that training can go on from it.

Judged by file names, lengths and headers, in milliseconds: no tensor is read, so damage inside a file of the right
length is not seen.
"""

import json
import zipfile
from pathlib import Path

from . import files


OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer_0", "global_step*")  # Trainer, FSDP, FSDP sharded, DeepSpeed


def last_whole_checkpoint(folder: Path) -> tuple[Path | None, list[Path]]:
    """The newest checkpoint-N that training can go on from, and the newer ones that a kill left torn."""
    numbered = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    torn = []
    for path in sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        if is_whole(path):
            return path, torn
        torn.append(path)
    return None, torn


def is_whole(checkpoint: Path) -> bool:
    """Whether weights, optimizer and trainer_state.json (which Trainer writes last) are there and none is cut off."""
    try:
        state = json.loads((checkpoint / files.TRAINER_STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    weights = list(checkpoint.glob("*.safetensors"))
    has_weights = weights or any(checkpoint.glob("pytorch_model*")) or any(checkpoint.glob("global_step*"))
    # Without its optimizer (save_only_model) training would go on, silently, with the moments at zero.
    has_optimizer = any(any(checkpoint.glob(name)) for name in OPTIMIZERS)
    pickles = [path for pattern in ("*.pt", "*.pth", "*.bin") for path in checkpoint.glob(pattern)]
    return bool(
        isinstance(state, dict)
        and has_weights
        and has_optimizer
        and not (checkpoint / "checkpoint-is-incomplete.txt").exists()  # transformers' mark while it saves on SIGTERM
        and all(map(_whole_safetensors, weights))
        and _has_every_shard(checkpoint)
        and all(map(zipfile.is_zipfile, pickles))  # torch writes zips, whose directory is at the end
    )


def _whole_safetensors(path: Path) -> bool:
    """Whether the file is as long as its header says."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if 0 < length < path.stat().st_size else b""
    try:
        tensors = json.loads(header)
        ends = [entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
    return 8 + length + max(ends, default=0) == path.stat().st_size


def _has_every_shard(checkpoint: Path) -> bool:
    index = checkpoint / "model.safetensors.index.json"
    if not index.exists():
        return True
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError):
        return False
    return all((checkpoint / shard).exists() for shard in shards)
