"""Write the files of `aesl data`: checked by the checks of SFT and RL, moved into place, data.json last.

A folder without data.json is unfinished. The files of another run are replaced with `--overwrite` alone; writing the
same output again changes nothing.
"""

from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

from ..errors import InputError, tell
from ..files import read_json, write_json, write_jsonl
from ..identity import file_hash
from ..provenance import package_versions
from .checks import check_demonstrations, check_prompts
from .problems import Drops, listed
from .prompts import check_held_out


DATA, DROPPED, PASS_RATES = "data.json", "dropped.jsonl", "pass_rates.jsonl"
SFT, RL, HELD_OUT = "sft.jsonl", "rl.jsonl", "held_out.jsonl"
LOCK = ".data.lock"
# These settings decide where and how the rows are made, not which rows
NOT_SETTINGS = {"output_dir", "overwrite", "batch_size", "use_cpu", "trust_remote_code"}


@dataclass
class Output:
    """The rows of every file, and the counts for data.json."""

    files: dict[str, list[dict]]
    source: dict  # rows, schema, content
    benchmarks: dict[str, dict[str, int]]  # of each benchmark its problems, and the rows dropped for them
    drops: Drops
    difficulty: dict[str, int]  # demonstrations by difficulty; empty without pass rates


def progress(line: str) -> None:
    """Print a line while the command works."""
    tell(f"aesl data: {line}")


def settings_of(args: Any) -> dict:
    return {key: value for key, value in vars(args).items() if key not in NOT_SETTINGS}


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
    """Read data.json in `folder`; return an empty dict where there is none, or where another program wrote it."""
    described = read_json(folder / DATA) if (folder / DATA).exists() else {}
    return described if isinstance(described, dict) and described.get("stage") == "data" else {}


def write(output: Output, args: Any) -> list[str]:
    """Check and write everything; return the lines of the summary. The caller holds the folder's lock."""
    for name, rows in output.files.items():
        check = check_prompts if name in (RL, HELD_OUT) else check_demonstrations
        check(rows, field=name)
        if name != HELD_OUT:
            check_held_out(rows, output.files[HELD_OUT], field=HELD_OUT, train_field=name)
    folder = Path(args.output_dir)
    place = folder / ".aesl-data.tmp"
    rmtree(place, ignore_errors=True)  # a killed run left it
    place.mkdir()
    try:
        for name, rows in {**output.files, DROPPED: output.drops.rows}.items():
            write_jsonl(place / name, rows)
        described = _describe(output, args, place)
        state = _replace(folder, place, described, args.overwrite)
    finally:
        rmtree(place)
    return _summary(described, state, folder)


def _describe(output: Output, args: Any, place: Path) -> dict:
    """Return the contents of data.json for the files in `place`."""
    files = {}
    for name, rows in {**output.files, DROPPED: output.drops.rows}.items():
        path = place / name
        files[name] = {"rows": len(rows), "bytes": path.stat().st_size, "sha256": file_hash(path)}
    return {
        "stage": "data",
        "source": {"dataset_name": args.dataset_name, "split": args.dataset_split, **output.source},
        "settings": settings_of(args),
        "files": files,
        "dropped": output.drops.counts(),
        "not_demonstrations": output.drops.counts("sft"),
        "benchmarks": output.benchmarks,
        "difficulty": output.difficulty,
        "versions": package_versions(),
    }


def _replace(folder: Path, place: Path, described: dict, overwrite: bool) -> str:
    """Move the new files into `folder` and return `written`; return `unchanged` if they are there already."""
    before = _described(folder)
    old, new = before.get("files", {}), described["files"]
    paths = {name: folder / name for name in new}
    changed = [name for name in new if not paths[name].is_file() or file_hash(paths[name]) != new[name]["sha256"]]
    if not changed and old.keys() == new.keys() and (before == described or not overwrite):
        return "unchanged"
    if before and not overwrite:
        raise InputError(
            f"{folder}: {(changed or [DATA])[0]} would change although the settings are the same (the data, the rates "
            "or a package differ): --overwrite replaces it, or name another output_dir"
        )
    (folder / DATA).unlink(missing_ok=True)
    for path in folder.glob("sft*.jsonl"):
        if path.name in old and path.name not in new:
            path.unlink()
    for name in new:
        (place / name).replace(folder / name)
    write_json(folder / DATA, described)
    return "written"


def _summary(described: dict, state: str, folder: Path) -> list[str]:
    lines = [
        f"{described['source']['rows']} rows of {described['source']['dataset_name']}",
        f"dropped: {listed(described['dropped'], 'none')}",
        f"without a demonstration, left to RL: {listed(described['not_demonstrations'], 'none')}",
    ]
    for name, found in described["benchmarks"].items():
        lines.append(f"in {name} ({found['problems']} problems): {found['rows']}")
    if not described["benchmarks"]:
        lines.append("compared with no benchmark: decontaminate is empty")
    if described["difficulty"]:
        lines.append(f"difficulty of the demonstrations: {listed(described['difficulty'], 'none')}")
    counts = {name: file["rows"] for name, file in described["files"].items() if name != DROPPED}
    return [f"  {line}" for line in (*lines, f"{state}: {listed(counts, 'none')} -> {folder}")]
