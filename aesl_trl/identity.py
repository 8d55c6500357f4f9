"""Which weights lie in `selected/`: the step that they are of, and what tells each weight file from others.

All candidates of a run have the same names, sizes and headers. So the step is written beside the weights, in the swap
that puts them there, and selection.json repeats it: a selection that was cut off between the two is found.
"""

import hashlib
from pathlib import Path
from typing import Any

from .files import IDENTITY, SELECTION, chosen, read_object


WEIGHTS = (".safetensors", ".bin")
MAX_HEADER = 10**8  # bytes of JSON; safetensors itself takes no longer header


def identity_of(folder: Path, selection: dict, *, contents: bool = False) -> dict[str, Any]:
    """Return the identity of the weights in `folder`, which `selection`, the content of selection.json, names.

    It has `step` and `candidate` of the selection, and for each of the `files` its size in bytes and the sha256 of its
    safetensors header (None for a pickle). With `contents` it has the `sha256` of each whole file too.
    """
    found = {key: selection.get(key) for key in ("step", "candidate")}
    found |= {"files": {path.name: _facts(path) for path in _files(folder)}}
    return found | ({"sha256": {path.name: file_hash(path) for path in _files(folder)}} if contents else {})


def mismatch(folder: Path, selection: dict, *, contents: bool = False) -> str | None:
    """Say why the weights in `folder` are not those that `selection`, the content of selection.json, names.

    None: they are, or an older version selected them, which wrote no identity. `contents` compares the sha256 of each
    file with that recorded by the selection.
    """
    found, said = read_object(folder / IDENTITY), selection.get("identity")
    if not found and not said:
        return "has no sha256 to be compared with" if contents else None
    if chosen(found) != chosen(selection):
        return f"holds the weights of {chosen(found) or 'no known step'}, and {SELECTION} names {chosen(selection)}"
    if said not in (None, found):
        return f"is of another selection than {SELECTION}"
    if contents and not isinstance(found.get("sha256"), dict):
        return "has no sha256 to be compared with"
    now = identity_of(folder, found, contents=contents)
    for key in ("files", "sha256") if contents else ("files",):
        recorded = found.get(key) if isinstance(found.get(key), dict) else {}
        if changed := [name for name in recorded | now[key] if recorded.get(name) != now[key].get(name)]:
            return f"has another {changed[0]} than was selected"
    return None


def file_hash(path: str | Path) -> str:
    """Return the sha256 of a file's contents."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in WEIGHTS)


def _facts(path: Path) -> dict[str, Any]:
    if path.suffix != ".safetensors":
        return {"bytes": path.stat().st_size, "header": None}
    with open(path, "rb") as file:
        length = file.read(8)  # of the JSON that follows
        header = length + file.read(min(int.from_bytes(length, "little"), MAX_HEADER))
    return {"bytes": path.stat().st_size, "header": hashlib.sha256(header).hexdigest()}
