"""The files of `aesl data`: checked by the checks of SFT and RL, written atomically, data.json last.

A folder without data.json is unfinished. What another run left is replaced with `--overwrite` alone; the same output
again changes nothing.
"""

import hashlib
import tempfile
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

from ..errors import InputError
from ..files import read_json, write_json, write_jsonl
from ..processes import lock
from ..provenance import package_versions
from .checks import check_demonstrations, check_prompts
from .problems import Drops
from .prompts import check_held_out


DATA, DROPPED, PASS_RATES = "data.json", "dropped.jsonl", "pass_rates.jsonl"
RL, HELD_OUT = "rl.jsonl", "held_out.jsonl"
# These decide where and how, not what.
NOT_SETTINGS = {"output_dir", "overwrite", "batch_size", "use_cpu", "trust_remote_code"}


@dataclass
class Output:
    files: dict[str, list[dict]]
    source: dict  # rows, schema, content
    benchmarks: dict[str, dict[str, int]]  # problems, and rows that were dropped for them
    drops: Drops
    difficulty: dict[str, int]  # demonstrations by difficulty; empty without pass rates


def settings_of(args: Any) -> dict:
    return {key: value for key, value in vars(args).items() if key not in NOT_SETTINGS}


def locked(folder: str) -> AbstractContextManager:
    return lock(Path(folder) / ".data.lock", f"another aesl data is at work in {folder}")


def check_output(args: Any) -> None:
    """Refuse a folder that holds the output of other settings, before anything is read."""
    folder = Path(args.output_dir)
    if args.overwrite:
        return
    remedy = "--overwrite replaces it, or name another output_dir"
    if not (folder / DATA).exists():
        stray = next((path.name for path in sorted(folder.glob("*.jsonl")) if path.name != PASS_RATES), None)
        if stray:
            raise InputError(f"{folder} holds {stray} without {DATA}, so it is no finished output: {remedy}")
        return
    before, now = _described(folder).get("settings", {}), settings_of(args)
    changed = next((key for key in now if before.get(key) != now[key]), None)
    if changed:
        difference = f"{changed} {before.get(changed)}, now {now[changed]}"
        raise InputError(f"{folder} holds the output of other settings ({difference}): {remedy}")


def _described(folder: Path) -> dict:
    """What data.json in `folder` holds; nothing where it is not there, or somebody else's."""
    described = read_json(folder / DATA) if (folder / DATA).exists() else {}
    return described if isinstance(described, dict) and described.get("stage") == "data" else {}


def write(output: Output, args: Any) -> list[str]:
    """Check and write everything; the lines of the summary.

    Raises:
        InputError: rows that SFT or RL could not use, or files in the folder that differ.
    """
    _check(output.files)
    folder = Path(args.output_dir)
    for old in folder.glob(".new-*"):  # of a run that was killed; the lock keeps others out
        rmtree(old)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as place:
        for name, rows in {**output.files, DROPPED: output.drops.rows}.items():
            write_jsonl(Path(place) / name, rows)
        described = describe(output, args, Path(place))
        state = _replace(folder, Path(place), described, args.overwrite)
    return summary(described, state, folder)


def _check(files: dict[str, list[dict]]) -> None:
    for name, rows in files.items():
        if name in (RL, HELD_OUT):
            check_prompts(rows, field=name)
        else:
            check_demonstrations(rows, field=name)
        if name != HELD_OUT:
            check_held_out(rows, files[HELD_OUT], field=HELD_OUT, train_field=name)


def describe(output: Output, args: Any, place: Path) -> dict:
    """What data.json holds."""
    names = [*output.files, DROPPED]
    return {
        "stage": "data",
        "source": {"dataset_name": args.dataset_name, "split": args.dataset_split, **output.source},
        "settings": settings_of(args),
        "files": {name: _file(place / name, output.files.get(name, output.drops.rows)) for name in names},
        "dropped": output.drops.counts(),
        "not_demonstrations": output.drops.counts("sft"),
        "benchmarks": output.benchmarks,
        "difficulty": output.difficulty,
        "versions": package_versions(),
    }


def _file(path: Path, rows: list[dict]) -> dict:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"rows": len(rows), "bytes": path.stat().st_size, "sha256": digest}


def _replace(folder: Path, place: Path, described: dict, overwrite: bool) -> str:
    """Move the new files into `folder`; `unchanged` where they are there already."""
    before = _described(folder)
    old, new = before.get("files", {}), described["files"]
    is_same = old.keys() == new.keys() and _same(folder, new)
    if is_same and (before == described or not overwrite):
        return "unchanged"
    if before and not overwrite:
        name = next((name for name in new if not _same(folder, {name: new[name]})), DATA)
        raise InputError(
            f"{folder}: {name} would change although the settings are the same (the data, the rates or a package "
            "differ): --overwrite replaces it, or name another output_dir"
        )
    (folder / DATA).unlink(missing_ok=True)
    for path in folder.glob("sft*.jsonl"):
        if path.name in old and path.name not in new:
            path.unlink()
    for name in described["files"]:
        (place / name).replace(folder / name)
    write_json(folder / DATA, described)
    return "written"


def _same(folder: Path, files: dict[str, dict]) -> bool:
    return all((folder / name).is_file() and _digest(folder / name) == file["sha256"] for name, file in files.items())


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def summary(described: dict, state: str, folder: Path) -> list[str]:
    counts = {name: file["rows"] for name, file in described["files"].items() if name != DROPPED}
    lines = [f"{described['source']['rows']} rows of {described['source']['dataset_name']}"]
    lines.append(f"dropped: {_listed(described['dropped'])}")
    lines.append(f"no demonstrations, left to RL: {_listed(described['not_demonstrations'])}")
    for name, found in described["benchmarks"].items():
        lines.append(f"in {name} ({found['problems']} problems): {found['rows']}")
    if not described["benchmarks"]:
        lines.append("compared with no benchmark: decontaminate is empty")
    if described["difficulty"]:
        lines.append(f"difficulty of the demonstrations: {_listed(described['difficulty'])}")
    return [f"  {line}" for line in lines] + [f"  {state}: {_listed(counts)} -> {folder}"]


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "none"
