"""Fingerprints as aesl_trl 0.1.0 recorded them, over command lines and paths, so that its runs need not start again.

A record of that kind has no settings. Where the old formula gives its fingerprint, we rewrite the record.
"""

import hashlib
import json
import os
from pathlib import Path

from ..arguments import INPUT_FIELDS, resolve
from ..identity import file_hash
from ..values import load_yaml
from .fingerprints import Inputs, settings_of
from .stages import BUILDERS, Chain, Stage, portable


# Each stage was a module of its own, which `aesl_trl.cli` and the command's name stand for now.
MODULES = {name: f"aesl_trl.{name}" for name in ("handoff", "mix", "probe", "report")} | {"eval": "aesl_trl.evaluate"}

OLD_FLAGS = {"select": "--out", "candidates": "--output", "probe": "--output", "eval": "--output"}  # now --output_dir


def renew(chain: Chain) -> None:
    """Give each record with an old fingerprint the new one, where the stage's inputs are still those of the record."""
    if all("settings" in record or "inputs" not in record for record in map(chain.recorded, chain.names)):
        return
    old = previous = None
    for name in chain.names:
        stage, record = BUILDERS[name](chain), chain.recorded(name)
        found = old_fingerprint(stage, chain.sft_dir if name == "sft" else chain.run, old)
        inputs = Inputs(name, settings_of(stage), previous).as_recorded(record)
        if record.get("inputs") == found:
            chain.note(name, **(record | {"inputs": inputs.fingerprint, "settings": inputs.settings}))
        if name != "probe":
            old, previous = found, inputs.fingerprint


def old_fingerprint(stage: Stage, folder: Path, previous: str | None) -> str:
    """Hash the command, the configs, the files that these name, and the stage before, with paths from `folder`."""
    configs = [path for path in (stage.config, stage.accelerate_config) if path]
    paths = [*configs, *(path for config in configs for path in _named_files(config))]
    flag = OLD_FLAGS.get(stage.name, "--output_dir")
    command = [flag if part == "--output_dir" else part for part in stage.command]
    if "aesl_trl.cli" in command:
        place = command.index("aesl_trl.cli")
        command[place : place + 2] = [MODULES[command[place + 1]]]
    facts = {
        "command": portable(command, folder),
        "files": {os.path.relpath(path, folder): file_hash(path) for path in paths},
        "previous": previous,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _named_files(config: str) -> list[str]:
    values, found = load_yaml(config), []
    for name in INPUT_FIELDS & values.keys():
        value = resolve(name, values[name], Path(config).parent)
        for item in value if isinstance(value, list) else [value]:
            path = str(item).rpartition(":")[0] if ".py:" in str(item) else str(item)
            found += [path] if os.path.isfile(path) else []
    return found
