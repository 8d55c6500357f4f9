"""Which checkpoint-N of a training folder is whole, so that training can go on from it, and which ones are deleted.

We end each checkpoint with `manifest.json`, once everything else is on the disk. It lists each file's size, and a
checksum of the file's first and last bytes. Hashing all of 15 GB would hold up the training for seconds at every save.
A kill or a full disk leaves a missing, a short or an older file, and the manifest shows all three. It does not show
damage in the middle of a large file that keeps its length. A checkpoint of plain TRL has no manifest: we judge it by
its files' names, lengths and headers. No tensor is read.
"""

import json
import os
import re
import shutil
import zipfile
import zlib
from pathlib import Path

import psutil

from .. import files
from ..errors import InputError
from ..provenance import package_versions


MANIFEST = "manifest.json"
INCOMPLETE = "checkpoint-is-incomplete.txt"  # transformers' own name; the file marks a checkpoint that is being saved
OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer_0", "global_step*")  # Trainer, FSDP, FSDP sharded, DeepSpeed
ON_WINDOWS = os.name == "nt"
EDGE_BYTES = 2**22  # hashed at each end of a file: a small file whole, safetensors' header, a zip's directory
# The names that files.py (with its process id) and `rotate` give to what is being written or deleted
NAMES = [re.escape(name) for name in (*files.WRITTEN, MANIFEST, "settings.json")]
NAMES += [r"step-\d+\.jsonl", r"mix-[0-9.e-]+(?:\.jsonl)?", r"report_\w+\.png", r"push-\d+", r"\w+\.log"]
LEFTOVER = re.compile(rf"\.(?:{'|'.join(NAMES)})\.(\d{{1,9}})\.(?:tmp|old)|[._]checkpoint-\d+\.deleted")
# Where in a run we write so: the folder itself, and these
PLACES = (files.OWN, files.LOGS, files.SAMPLES, f"{files.OWN}/{files.SAMPLES}", "checkpoint-*")
PLACES += (f"{files.EVALUATION_SAMPLES}/*", files.CANDIDATES, f"{files.OWN}/{files.CANDIDATES}")


def numbered(folder: Path) -> list[Path]:
    """Return every checkpoint-N in `folder`, whole or not, the newest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def last_whole_checkpoint(folder: Path) -> tuple[Path | None, list[Path]]:
    """Return the newest checkpoint-N that training can go on from, and the newer ones, which are torn."""
    torn = []
    for path in numbered(folder):
        if damage(path) is None:
            return path, torn
        torn.append(path)
    return None, torn


def find_checkpoint(asked: str | bool | None, folder: Path, say=lambda line: None) -> Path | None:
    """Return the checkpoint that the setting `resume_from_checkpoint` asks for; None is a start from step 0.

    True asks for the last whole checkpoint of the output folder `folder`, and so does the text "true", which is what
    TrlParser reads on a command line. A torn checkpoint asked for by name is refused. `say` prints a line for each
    torn checkpoint that we pass over, and a line for where training goes on.
    """
    if isinstance(asked, str):
        asked = {"true": True, "false": False}.get(asked.lower(), asked)
    if not asked:
        return None
    last, torn = last_whole_checkpoint(folder)
    if asked is not True:
        problem = damage(Path(asked))
        if problem:
            hint = f"the last whole one is {last}" if last else f"there is no whole one in {folder}"
            raise InputError(f"resume_from_checkpoint: training cannot go on from {asked}: {problem}; {hint}")
        return Path(asked)
    for path in torn:
        say(f"{path} is not whole ({damage(path)}): passed over")
    say(f"goes on from {last}" if last else f"no whole checkpoint in {folder}: starts from the beginning")
    return last


def is_whole(checkpoint: Path) -> bool:
    return damage(checkpoint) is None


def damage(checkpoint: Path) -> str | None:
    """Say in words what is missing or cut off; return None for a whole checkpoint.

    Whole means that weights, optimizer, Trainer's state and every file in the manifest are there.
    """
    from ..models.folder import safetensors_problem  # imports torch, which a chain seldom needs

    if not checkpoint.is_dir():
        return "there is no such folder"
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
    # Without an optimizer (save_only_model) training would go on, silently, with the moments at zero.
    if not any(any(checkpoint.glob(name)) for name in OPTIMIZERS):
        return "its optimizer is missing"
    pickles = [path for pattern in ("*.pt", "*.pth", "*.bin") for path in checkpoint.glob(pattern)]
    short = [path for path in weights if safetensors_problem(path)]
    short += [path for path in pickles if not _is_zip(path)]  # torch writes zips, whose directory is at the end
    if short:
        return f"{short[0].name} is cut off"
    return _missing_shard(checkpoint) or _difference_from_manifest(checkpoint)


def _is_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # raised for damage that looks like a zip of several disks
        return False


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


def _difference_from_manifest(checkpoint: Path) -> str | None:
    if not (checkpoint / MANIFEST).exists():
        return None
    try:
        for name, saved in json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"].items():
            path = checkpoint / name
            if not files.stays_inside(name):
                return f"{MANIFEST} lists {name}, which is outside of it"
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != saved["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, {saved['bytes']} were saved"
            if _checksum(path) != saved["crc32"]:
                return f"{name} is not the file that was saved"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    return None


def _checksum(path: Path) -> str:
    """Return the CRC-32 of the first and the last `EDGE_BYTES`; they cover a file of up to twice that whole."""
    with open(path, "rb") as file:
        value = zlib.crc32(file.read(EDGE_BYTES))
        file.seek(max(file.tell(), os.fstat(file.fileno()).st_size - EDGE_BYTES))
        return f"{zlib.crc32(file.read(EDGE_BYTES), value):08x}"


def mark_incomplete(checkpoint: Path, why: str) -> None:
    """Mark the checkpoint as torn until `write_manifest` declares it whole; the mark's text is `why`."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / INCOMPLETE).write_text(f"{why}\n", encoding="utf-8")


def write_manifest(checkpoint: Path, **facts) -> None:
    """List every file of the checkpoint in its manifest, beside `facts`, and declare the checkpoint whole.

    Each file is forced to the disk first: if the machine died, the manifest would list what was only in memory.
    """
    listed = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name not in (MANIFEST, INCOMPLETE) and not path.name.startswith("."):
            _sync(path)
            name = path.relative_to(checkpoint).as_posix()
            listed[name] = {"bytes": path.stat().st_size, "crc32": _checksum(path)}
    files.write_json(checkpoint / MANIFEST, {**facts, "versions": package_versions(), "files": listed})
    (checkpoint / INCOMPLETE).unlink(missing_ok=True)
    _sync(checkpoint)


def _sync(path: Path) -> None:
    if ON_WINDOWS and path.is_dir():  # it opens no folders
        return
    descriptor = os.open(path, os.O_RDWR if ON_WINDOWS else os.O_RDONLY)  # and syncs only what may be written
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(checkpoint: Path) -> dict:
    """Read the manifest; that of a checkpoint of plain TRL, which has none, is empty."""
    return files.read_object(checkpoint / MANIFEST)


def rotate(folder: Path, limit: int, keep: set[Path]) -> None:
    """Delete checkpoints until `limit` are left: first the torn ones, then the oldest, and never one of `keep`.

    Trainer's own rotation goes by age alone. It can delete the last whole one while other ranks still save the next.
    """
    found = sorted(numbered(folder), key=lambda path: (is_whole(path), step_of(path)))
    surplus = max(0, len(found) - max(limit, len(keep)))
    for path in [path for path in found if path not in keep][:surplus]:
        # A kill in between leaves no half checkpoint under its name, and an upload to the hub passes over `_*`
        gone = path.with_name(f"_{path.name}.deleted")
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(path, gone)
        shutil.rmtree(gone, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what killed writers left in `folder`, that of a run. What a live process writes stays.

    The folder may be a home: what has another name than ours, or lies where we write nothing, is somebody else's.
    """
    places = [place for name in PLACES for place in folder.glob(name) if not files.leads_away(place, folder)]
    for path in [path for place in (folder, *places) if place.is_dir() for path in place.iterdir()]:
        if match := LEFTOVER.fullmatch(path.name):
            writer = int(match[1] or os.getpid())
            if writer == os.getpid() or not psutil.pid_exists(writer):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
