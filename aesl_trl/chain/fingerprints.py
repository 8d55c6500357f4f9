"""What a stage was started from: its settings by name and the contents of the files that they name, as one hash.

Neither paths nor command lines nor modules enter the hash, so a run that was moved, or whose config was renamed, is
the same run. chain.json keeps the settings beside the hash: where a config spells them otherwise (`3` or `3.0`, a
default written out), the stage's own dataclasses tell whether they are the same.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from .. import files
from ..arguments import INPUT_FIELDS, OUTPUT_FIELDS, resolve, without_defaults
from ..identity import file_hash
from ..values import load_yaml
from .stages import BUILDERS, Chain, Stage, argument_types


WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")  # known by their size: to read them takes minutes


@dataclass(frozen=True)
class Inputs:
    """What a stage depends on. `previous` is the fingerprint of the stage before it."""

    stage: str
    settings: dict[str, Any]
    previous: str | None

    @property
    def fingerprint(self) -> str:
        return _digest(asdict(self))

    def as_recorded(self, record: dict) -> "Inputs":
        """Return these inputs in the spelling of a stage's record, where the record's settings mean the same."""
        recorded = replace(self, settings=record.get("settings") or {})
        if record.get("inputs") != recorded.fingerprint or recorded.fingerprint == self.fingerprint:
            return self
        types = argument_types(self.stage)
        same = without_defaults(self.settings, types) == without_defaults(recorded.settings, types)
        return recorded if same else self


def walk(chain: Chain) -> Iterator[tuple[Stage, Inputs]]:
    """Yield each stage of the chain with its inputs, in order. A stage is built when it is its turn."""
    previous = None
    for name in chain.names:
        stage = BUILDERS[name](chain)
        inputs = Inputs(name, settings_of(stage), previous).as_recorded(chain.recorded(name))
        yield stage, inputs
        if name != "probe":  # the probe only measures: what follows depends on what it measured
            previous = inputs.fingerprint


def settings_of(stage: Stage) -> dict[str, Any]:
    """Return the settings of the stage's configs and those that the chain gives, with contents in place of paths."""
    found = {}
    if stage.config:
        folder = Path(stage.config).parent
        values = {name: resolve(name, value, folder) for name, value in load_yaml(stage.config).items()}
        found = {name: _with_contents(name, value) for name, value in values.items() if name not in OUTPUT_FIELDS}
    for name in found:
        if name == "env" or name.endswith("_token"):  # may be secret, and the record is not
            found[name] = found[name] and _digest(found[name])
    if stage.accelerate_config:
        found["accelerate_config"] = _with_contents("", load_yaml(stage.accelerate_config))
    found |= {name: _with_contents(name, value) for name, value in stage.given.items()}
    return json.loads(json.dumps(files.to_json(found), default=str))


def _with_contents(name: str, value: Any) -> Any:
    """Replace the paths in a setting's value by the contents that they lead to; names on the hub stay."""
    if isinstance(value, list):
        return [_with_contents(name, item) for item in value]
    if isinstance(value, dict):
        return {key: _with_contents(str(key), item) for key, item in value.items()}
    is_path = name.endswith("_file") or (name in INPUT_FIELDS and os.path.isabs(str(value)))
    if not is_path or not isinstance(value, str):
        return value
    path, colon, function = value.rpartition(":") if ".py:" in value else (value, "", "")
    if os.path.isfile(path):
        return f"{_contents(path)}{colon}{function}"
    # Data may lie in subfolders. A model's files do not, while a run beside them may.
    return _folder_contents(Path(path), "**/*" if "data" in name else "*") if os.path.isdir(path) else value


def _folder_contents(folder: Path, pattern: str) -> str:
    found = {}
    for path in sorted(folder.glob(pattern)):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not f"/{name}".count("/."):
            found[name] = path.stat().st_size if path.suffix in WEIGHTS else _contents(path)
    return _digest(found)


def _contents(path: str | Path) -> str:
    """Return the sha256 of a file, which is read again only once it has changed: a comparison's cells share data."""
    now = os.stat(path)
    return _hashed(os.path.abspath(path), now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)


@lru_cache(maxsize=4096)
def _hashed(path: str, *_state: int) -> str:
    return file_hash(path)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
