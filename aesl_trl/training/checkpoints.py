"""Which checkpoint-N of a training folder is whole, so that training can go on from it, and which ones are deleted.

A checkpoint of ours ends with `manifest.json`, written once everything else is on the disk: sizes, and a checksum of
each file's first and last bytes. Hashing all of 15 GB would hold up the training for seconds at every save; what a
kill or a full disk leaves (a missing file, a short one, an older one) shows in these too. Not seen: damage in the
middle of a large file that keeps its length. Checkpoints of plain TRL have no manifest and are judged by file names,
lengths and headers. No tensor is read either way.
"""

import json
import os
import re
import shutil
import zipfile
import zlib
from pathlib import Path

from .. import files
from ..errors import InputError
from ..provenance import package_versions


MANIFEST = "manifest.json"
INCOMPLETE = "checkpoint-is-incomplete.txt"  # transformers' name for it; lies in a checkpoint while it is being saved
OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer_0", "global_step*")  # Trainer, FSDP, FSDP sharded, DeepSpeed
EDGE_BYTES = 2**22  # hashed at each end of a file: all of the small ones, safetensors' header, a zip's directory
LEFTOVER = re.compile(r"\..+\.(?:(\d+)\.(?:tmp|old)|deleted)")  # of `rotate`, and with its writer's id of files.py


# ---- Finding


def numbered(folder: Path) -> list[Path]:
    """Every checkpoint-N in `folder`, whole or not, the newest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def last_whole_checkpoint(folder: Path) -> tuple[Path | None, list[Path]]:
    """The newest checkpoint-N that training can go on from, and the newer ones that a kill left torn."""
    torn = []
    for path in numbered(folder):
        if is_whole(path):
            return path, torn
        torn.append(path)
    return None, torn


def find_checkpoint(asked: str | bool | None, folder: Path, say=lambda line: None) -> Path | None:
    """What `resume_from_checkpoint` stands for: True is the last whole checkpoint of `folder`, if there is one.

    Args:
        asked: the setting: True, a checkpoint's folder, or None or False for a fresh start.
        folder: the training's output folder.
        say: is given a line for each torn checkpoint that is passed over, and one for where training goes on.

    Raises:
        InputError: the checkpoint that is asked for by name is torn.
    """
    if not asked:
        return None
    last, torn = last_whole_checkpoint(folder)
    if asked is not True:
        problem = damage(Path(asked))
        if problem:
            hint = f"the last whole one is {last}" if last else f"there is no whole one in {folder}"
            raise InputError(f"resume_from_checkpoint: {asked} cannot be gone on from: {problem}; {hint}")
        return Path(asked)
    for path in torn:
        say(f"{path} is not whole ({damage(path)}): passed over")
    say(f"goes on from {last}" if last else f"no whole checkpoint in {folder}: starts from the beginning")
    return last


# ---- Judging


def is_whole(checkpoint: Path) -> bool:
    return damage(checkpoint) is None


def damage(checkpoint: Path) -> str | None:
    """What is missing or cut off, in words; None where weights, optimizer, state and all that the manifest lists is
    there."""
    if (checkpoint / INCOMPLETE).exists():
        return f"it holds {INCOMPLETE}"
    try:
        state = json.loads((checkpoint / files.TRAINER_STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        state = None
    if not isinstance(state, dict):  # Trainer writes it last
        return f"{files.TRAINER_STATE} is missing or cut off"
    weights = list(checkpoint.glob("*.safetensors"))
    if not (weights or any(checkpoint.glob("pytorch_model*")) or any(checkpoint.glob("global_step*"))):
        return "its weights are missing"
    # Without its optimizer (save_only_model) training would go on, silently, with the moments at zero.
    if not any(any(checkpoint.glob(name)) for name in OPTIMIZERS):
        return "its optimizer is missing"
    pickles = [path for pattern in ("*.pt", "*.pth", "*.bin") for path in checkpoint.glob(pattern)]
    # torch writes zips, whose directory is at the end
    short = [path for path in weights if not _whole_safetensors(path)]
    short += [path for path in pickles if not zipfile.is_zipfile(path)]
    if short:
        return f"{short[0].name} is cut off"
    return _missing_shard(checkpoint) or _differs_from_manifest(checkpoint)


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


def _missing_shard(checkpoint: Path) -> str | None:
    index = checkpoint / "model.safetensors.index.json"
    if not index.exists():
        return None
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        missing = [shard for shard in shards if not files.stays_inside(shard) or not (checkpoint / shard).is_file()]
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{index.name} cannot be read"
    return f"{missing[0]} is missing" if missing else None


def _differs_from_manifest(checkpoint: Path) -> str | None:
    path = checkpoint / MANIFEST
    if not path.exists():
        return None
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["files"]
        problems = (_file_differs(checkpoint, name, facts) for name, facts in listed.items())
        return next(filter(None, problems), None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"


def _file_differs(checkpoint: Path, name: str, facts: dict) -> str | None:
    path = checkpoint / name
    if not files.stays_inside(name):
        return f"{MANIFEST} lists {name}, which is outside of it"
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != facts["bytes"]:
        return f"{name} has {path.stat().st_size} bytes, {facts['bytes']} were saved"
    return None if _checksum(path) == facts["crc32"] else f"{name} is not the file that was saved"


def _checksum(path: Path) -> str:
    """CRC-32 of the first and the last `EDGE_BYTES`, which is all of a file of up to twice that."""
    with open(path, "rb") as file:
        value = zlib.crc32(file.read(EDGE_BYTES))
        file.seek(max(file.tell(), os.fstat(file.fileno()).st_size - EDGE_BYTES))
        return f"{zlib.crc32(file.read(EDGE_BYTES), value):08x}"


# ---- Writing


def mark_incomplete(checkpoint: Path, why: str) -> None:
    """From here on the checkpoint counts as torn, until `write_manifest`."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / INCOMPLETE).write_text(f"{why}\n", encoding="utf-8")


def write_manifest(checkpoint: Path, **facts) -> None:
    """List what is there and declare the checkpoint whole; `facts` are kept along.

    Every file is on the disk by then and not only in memory: a machine that dies would leave a manifest that lies.
    """
    listed = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name not in (MANIFEST, INCOMPLETE) and not path.name.startswith("."):
            _sync(path)
            facts_of = {"bytes": path.stat().st_size, "crc32": _checksum(path)}
            listed[path.relative_to(checkpoint).as_posix()] = facts_of
    files.write_json(checkpoint / MANIFEST, {**facts, "versions": package_versions(), "files": listed})
    (checkpoint / INCOMPLETE).unlink(missing_ok=True)
    _sync(checkpoint)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(checkpoint: Path) -> dict:
    """The manifest, or an empty one for a checkpoint of plain TRL."""
    path = checkpoint / MANIFEST
    return files.read_json(path) if path.exists() else {}


def rotate(folder: Path, limit: int, keep: set[Path]) -> None:
    """Delete checkpoints until `limit` are left: the torn ones first, then the oldest, never one of `keep`.

    Trainer's own rotation goes by age alone, and deletes the last whole one while other ranks still save the new one.
    """
    found = sorted(numbered(folder), key=lambda path: (is_whole(path), step_of(path)))
    surplus = len(found) - max(limit, len(keep))
    for path in [path for path in found if path not in keep][: max(0, surplus)]:
        gone = path.with_name(f".{path.name}.deleted")  # a kill in between must not leave half of it under its name
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(path, gone)
        shutil.rmtree(gone, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what killed writers left in `folder`: hidden files and folders that were about to be renamed."""
    for path in list(folder.rglob(".*")):
        match = LEFTOVER.fullmatch(path.name)
        if match and not _is_at_work(match[1]):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _is_at_work(process: str | None) -> bool:
    """Whether another process of this machine has that id; it may be one that is writing."""
    return process is not None and int(process) != os.getpid() and Path("/proc", process).exists()
