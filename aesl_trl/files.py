"""The files through which stages meet: their names in a run folder, and atomic JSON.

A reader never sees half a file: a write goes to a temporary sibling that replaces the target in one step, a line is
added whole or not at all. NaN and
infinity become null, so that every line is valid JSON.
"""

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from . import __version__, files
from .errors import InputError


GRPO_DIR = "grpo"

REPORT = "report.html"

TRAINING_LOCK = ".training.lock"


TRAINER_STATE = "trainer_state.json"  # Trainer's own: log_history
RUN = "run.json"
POSITIONS = "positions.jsonl"
DIVERSITY = "diversity.jsonl"
SAMPLES = "samples"
CANDIDATES = "candidates"
SELECTION = "selection.json"
SELECTED = "selected"
CHAIN = "chain.json"
HANDOFF = "handoff.json"
HANDOFF_DIR = "handoff"
EVALUATION = "evaluation.json"
READINESS = "readiness.json"


def to_json(value: Any) -> Any:
    """`value` with every float that JSON cannot hold replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return value


def _dumps(value: Any, **kwargs) -> str:
    return json.dumps(to_json(value), ensure_ascii=False, allow_nan=False, **kwargs)


def write_text(path: str | Path, text: str) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: str | Path, value: Any) -> None:
    write_text(path, _dumps(value, indent=2) + "\n")


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    write_text(path, "".join(_dumps(row) + "\n" for row in rows))


def append_jsonl(path: str | Path, row: dict) -> None:
    """Add one line in one write: a kill leaves it out or whole, and a full disk the file as it was."""
    path, line = Path(path), (_dumps(row) + "\n").encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise


def read_json(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None


def read_jsonl(path: str | Path) -> list[dict]:
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: {error}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise InputError(f"{path}, line {number} is not valid JSON: {error.msg}") from None
    return rows


def replace_dir(source: str | Path, target: str | Path) -> None:
    """Make `target` a copy of the folder `source`, hard-linked where possible; the old `target` goes last."""
    source, target = Path(source), Path(target)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary, copy_function=_link_or_copy)
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    if target.exists():
        os.replace(target, old)
    os.replace(temporary, target)
    shutil.rmtree(old, ignore_errors=True)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def stays_inside(name: str) -> bool:
    """Whether the name of a file or folder, as a file of a run lists it, is one inside that file's own folder."""
    return not os.path.isabs(name) and ".." not in PurePosixPath(name).parts


def sft_dir(run: str | Path) -> Path:
    """The SFT folder of a run: `run` itself, or the one that the chain in `run` trained.

    Raises:
        InputError: neither is an SFT folder (it has no diversity.jsonl, run.json or trainer_state.json).
    """
    run = Path(run)
    if not run.is_dir():
        raise InputError(f"{run} is not a folder")
    if (run / CHAIN).exists():
        folder = read_json(run / CHAIN).get("sft_dir")
        if folder is None:
            raise InputError(f"{run} is a chain without an SFT stage")
        return (run / folder).resolve()
    for folder in (run, run / "sft"):
        if any((folder / name).exists() for name in (DIVERSITY, RUN, TRAINER_STATE)):
            return folder
    raise InputError(f"{run} holds no SFT run: none of {DIVERSITY}, {RUN}, {TRAINER_STATE} is there")


def check_version(sft: Path) -> dict:
    """run.json of a training's folder, empty where there is none (a callback on another trainer writes none).

    An older version's files are read; what they lack is said where it is needed.

    Raises:
        InputError: a newer aesl_trl wrote it, whose files may mean something else.
    """
    path = sft / files.RUN
    run = files.read_json(path) if path.exists() else {}
    if not isinstance(run, dict):
        raise InputError(f"{path} holds a {type(run).__name__}, not an object: {sft} is no run of aesl_trl")
    wrote = (run.get("versions") or {}).get("aesl_trl") or __version__
    if _release(wrote) > _release(__version__):
        raise InputError(f"{path} was written by aesl_trl {wrote}, and this is {__version__}: update aesl_trl")
    return run


def _release(version: str) -> tuple[int, ...]:
    """(0, 1) of 0.1.0: a patch changes no file's meaning."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def read_rows(path: Path, needs: Sequence[str] = ()) -> list[dict]:
    """The lines of a run's JSONL file, each an object that has the keys `needs`."""
    try:
        rows = files.read_jsonl(path)
    except InputError as error:
        raise InputError(f"{error}; take that line out to go on without it") from None
    for number, row in enumerate(rows, 1):
        missing = [key for key in needs if key not in row] if isinstance(row, dict) else ["object"]
        if missing:
            raise InputError(
                f"{path}, row {number} has no {missing[0]!r}: another version wrote it (this is aesl_trl "
                f"{__version__}), or it was edited"
            )
    return rows


def candidate_steps(sft: str | Path) -> list[int]:
    """Steps of the candidates saved in an SFT folder, in order. Raises [`InputError`] without any."""
    folder = Path(sft) / files.CANDIDATES
    names = [path.name.removeprefix("step-") for path in folder.glob("step-*") if path.is_dir()]
    steps = sorted(int(name) for name in names if name.isdecimal())
    if not steps:
        raise InputError(f"{folder} holds no candidate (step-N): train with diversity_steps above 0")
    return steps


def _log_history(sft: Path) -> list[dict]:
    state = sft / files.TRAINER_STATE
    return files.read_json(state).get("log_history", []) if state.exists() else []
