"""The files through which stages meet: their names in a run folder, atomic writes, and the one reader of a run.

A reader never sees half a file: a write goes to a temporary sibling that replaces the target in one step, and a line
is added whole or not at all. NaN and infinity become null, so that every line is valid JSON.
"""

import errno
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import HALF_A_CHARACTER, InputError, nearest_sibling, say
from .provenance import __version__


# Our part of a training's folder: Trainer's upload to the hub leaves out what begins with an underscore
OWN = "_aesl"
# Files and folders of an SFT run, in its own part
TRAINER_STATE = "trainer_state.json"  # written by Trainer; holds log_history
RUN = "run.json"
TRAINED_WITH = "trained_with.json"  # what RL's steps are trained with; for SFT run.json says it
POSITIONS = "positions.jsonl"
DIVERSITY = "diversity.jsonl"
SAMPLES = "samples"
CANDIDATES = "candidates"
STAGE = "stage.json"  # the chain's record of an SFT that several chains may share
TRAINING_LOCK = ".training.lock"
# Files and folders of a chain's run; without a chain they lie in the own part of the SFT folder
CHAIN = "chain.json"
SELECTION = "selection.json"
SELECTED = "selected"
IDENTITY = "identity.json"  # in `selected`: which weights lie there
HANDOFF = "handoff.json"
HANDOFF_DIR = "handoff"
READINESS = "readiness.json"
PROBED = "readiness.part.jsonl"  # of a probe that has not ended
MIXES = "mix.json"  # averages of the base and a candidate; in the SFT's own part
GRPO_DIR = "grpo"
EVALUATION = "evaluation.json"
REPORT = "report.html"
LOGS = "logs"
EVALUATION_SAMPLES = "evaluation_samples"
# What is written under a temporary name into a run's folder or into its own part
WRITTEN = (RUN, TRAINED_WITH, POSITIONS, DIVERSITY, STAGE, CHAIN, SELECTION, SELECTED, HANDOFF, HANDOFF_DIR, READINESS)
WRITTEN += (MIXES, EVALUATION, REPORT, "report.md")
# One of these files shows where the files of a run lie
BEGUN = (STAGE, RUN, POSITIONS, DIVERSITY)


def to_json(value: Any) -> Any:
    """Replace every float that JSON cannot hold by None."""
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
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, data: bytes) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb", opener=in_place) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # a full disk leaves a part of it


def write_json(path: str | Path, value: Any) -> None:
    write_text(path, _dumps(value, indent=2) + "\n")


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    write_text(path, "".join(_dumps(row) + "\n" for row in rows))


def append_jsonl(path: str | Path, row: dict) -> None:
    """Add one line in one write. A kill leaves the line out or whole; a full disk leaves the file as it was."""
    path, line = Path(path), (_dumps(row) + "\n").encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", buffering=0, opener=in_place) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise


def in_place(path: str | Path, flags: int) -> int:
    """Open a file where it stands, as the `opener` of `open` for every file that we do not write by a rename.

    A symlink is refused: in a run that somebody else made, it may lead to a file of yours.
    """
    if os.path.islink(path):
        raise InputError(f"{path} is a symlink, and what it leads to would be overwritten: remove the link")
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)  # Windows has no such flag


def leads_away(path: Path, root: Path) -> bool:
    """Say whether `path` below `root` is elsewhere, because it or a folder on the way from `root` is a symlink."""
    place = os.path.join(os.path.realpath(root), os.path.relpath(path, root))
    return os.path.realpath(path) != os.path.normpath(place)


def check_unlinked(path: Path, root: Path, *, inside: bool = False) -> Path:
    """Return `path`, which lies below the folder `root` of a run; refuse a symlink on the way to it.

    With `inside` we refuse a symlink inside of `path` too. We make none, and another's may lead to files of yours.
    In a cache of the hub every file is a link, to a blob of the same cache: those pass.
    """
    # One by one: what a link leads to may be a whole disk, and is not walked
    for each in itertools.chain([path], path.rglob("*") if inside else ()):
        if leads_away(each, root) and not (inside and _is_blob(each)):
            place = os.path.realpath(each)
            raise InputError(f"{each} leads by a symlink to {place}, out of {root}: put a copy in the link's place")
    return path


def _is_blob(path: Path) -> bool:
    """Say whether `path` is a file of a snapshot in the hub's cache: MODEL/snapshots/REV/... -> MODEL/blobs/HASH."""
    snapshots = (folder for folder in Path(os.path.realpath(path.parent)).parents if folder.name == "snapshots")
    real = Path(os.path.realpath(path))
    return real.is_file() and any(real.parent == folder.parent / "blobs" for folder in snapshots)


@contextmanager
def swapped(target: str | Path) -> Iterator[Path]:
    """Give an empty folder to write to, and put it in the place of `target` when the block ends without an error.

    The folder is a sibling of `target`, so the last step is a rename, and an error leaves the old `target` whole.
    Whether `target` may be replaced is for the caller to check ([`~aesl_trl.arguments.check_replaceable`]).
    """
    target = Path(target).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    new, old = (target.with_name(f".{target.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir()
    except FileNotFoundError:  # /proc and the like
        raise InputError(f"{target} cannot be made, {target.parent} takes no folders; name another folder") from None
    try:
        yield new
        while True:
            shutil.rmtree(old, ignore_errors=True)
            with suppress(FileNotFoundError):  # there is none, or another process has just moved it aside
                os.replace(target, old)
            try:
                os.replace(new, target)
                break
            except OSError:
                if not target.exists():  # else another process was faster, and ours replaces that one's
                    raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if old.exists() and not target.exists():  # the last rename failed
            os.replace(old, target)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    try:
        os.link(os.path.realpath(source), target)  # a link in the hub's cache would lead nowhere from `target`
    except OSError:
        shutil.copy2(source, target)


def read_json(path: str | Path) -> Any:
    try:
        text = Path(path).read_text(encoding="utf-8")
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except UnicodeEncodeError:
        raise InputError(f"{path} is not valid JSON: {HALF_A_CHARACTER}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, too many digits, too many levels
        raise InputError(f"{path} is not valid JSON: {error}") from None


def read_object(path: str | Path) -> dict:
    """Return the JSON object in `path`, or an empty one where there is no such file."""
    value = read_json(path) if Path(path).is_file() else {}
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def wrote(path: str | Path, *keys: str, torn: bool = True) -> bool:
    """Say whether a command of ours wrote the file `path`: a JSON object with the `keys`.

    `torn` is the answer where the file cannot be read: True under a name that only we give, else False, since the file
    may be data of another kind, such as JSON lines.
    """
    try:
        found = read_json(path) if Path(path).is_file() else None
    except InputError:
        return torn
    return isinstance(found, dict) and all(key in found for key in keys)


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
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", error)
                raise InputError(f"{path}, line {number} is not valid JSON: {reason}") from None
    return rows


def read_rows(path: str | Path, needs: Sequence[str] = ()) -> list[dict]:
    """Read the lines of a run's JSONL file; each must be an object that has the keys `needs`."""
    try:
        rows = read_jsonl(path)
    except InputError as error:
        raise InputError(f"{error}; take that line out to go on without it") from None
    for number, row in enumerate(rows, 1):
        missing = [key for key in needs if key not in row] if isinstance(row, dict) else ["object"]
        if missing:
            cause = f"another version wrote it (this is aesl_trl {__version__}), or it was edited"
            raise InputError(f"{path}, row {number} has no {missing[0]!r}: {cause}")
    return rows


def stays_inside(name: str) -> bool:
    """Say whether `name`, as a file of a run lists it, is the name of something inside that file's own folder."""
    return not os.path.isabs(name) and ".." not in PurePosixPath(name).parts


def own_folder(training: str | Path) -> Path:
    """Return the folder of our files in a training's folder: `_aesl`, whether or not it exists yet.

    A run that version 0.1.0 began has them in the training's folder itself. It goes on there: no series is cut in two.
    """
    folder = Path(training)
    began_before = _has_begun(folder) and not _has_begun(folder / OWN)
    return folder if began_before else folder / OWN


def _has_begun(folder: Path) -> bool:
    return any((folder / name).exists() and not (name == RUN and _is_foreign(folder / name)) for name in BEGUN)


def _is_foreign(path: Path) -> bool:
    """Say whether somebody else wrote this run.json: ours names its stage."""
    try:
        found = read_json(path)
    except InputError:  # torn: its reader says so
        return False
    return isinstance(found, dict) and "stage" not in found


def renew_own_folder(training: str | Path) -> None:
    """Move what version 0.1.0 left in a training's folder to `_aesl`, for a training that starts there anew."""
    folder = Path(training)
    if own_folder(folder) == folder:
        made = (CANDIDATES, SAMPLES, SELECTED, SELECTION, READINESS, MIXES, HANDOFF_DIR, HANDOFF, REPORT)
        # What shows that they lie here goes last: a move that was cut off is finished by the next start.
        for name in (*made, TRAINER_STATE, *BEGUN):
            if (folder / name).exists():
                (folder / OWN).mkdir(exist_ok=True)
                os.replace(folder / name, folder / OWN / name)


def run_of(weights: Path) -> Path:
    """Return the folder of the run to which weights belong: a candidate, a checkpoint, `selected` or `handoff`."""
    parent = weights.absolute().parent
    parent = parent.parent if parent.name == CANDIDATES else parent
    return parent.parent if parent.name == OWN else parent


class RunFolder:
    """A run as it lies on disk: an SFT folder, or a chain's run folder with its SFT inside or elsewhere.

    Every command that looks into a run looks through this class, so it knows each file's place and checks each file
    once. Files that are not there read as empty. Broken files, and a `path` that is no folder, raise an InputError.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise InputError(f"{self.path} is not a folder{nearest_sibling(self.path)}")

    @cached_property
    def chain(self) -> dict:
        """chain.json."""
        return read_object(self.path / CHAIN)

    @cached_property
    def sft(self) -> Path:
        """The SFT folder: the run itself, or the one that its chain trained.

        Several chains may share one, elsewhere: a line then says where it lies. The cells of a comparison need no
        line: they share the folder sft beside them.

        Raises:
            InputError: there is none, or chain.json names no SFT run of ours.
        """
        if (self.path / CHAIN).exists():
            folder = self.chain.get("sft_dir")
            if folder is None:
                raise InputError(f"{self.path} is a chain without an SFT stage")
            return self._shared(str(folder))
        for folder in (self.path, self.path / "sft"):
            if is_sft_folder(folder):
                return folder
        raise InputError(f"{self.path} holds no SFT run: none of {DIVERSITY}, {RUN}, {TRAINER_STATE} is there")

    def _shared(self, name: str) -> Path:
        """Return the folder that chain.json names as `sft_dir`."""
        home = os.path.realpath(self.path)
        folder = Path(os.path.realpath(os.path.join(home, name)))  # a cluster's /scratch is often a link
        if folder.is_dir() and any(folder.iterdir()):  # it may be deleted when all is done
            if not any(map(_has_begun, (folder, folder / OWN))):
                raise InputError(f"{self.path / CHAIN}: sft_dir names {folder}, which is no SFT run of aesl_trl")
            of_comparison = Path(home, "../../sft").resolve()
            if not any(map(folder.is_relative_to, (home, of_comparison))):
                _say_where(self.path, folder)
        return folder

    @property
    def own(self) -> Path:
        """The folder for what a command makes of this run: that of a chain's run, else the SFT folder's own part."""
        has_chain = (self.path / CHAIN).exists() or not is_sft_folder(self.path)
        return self.path if has_chain else check_unlinked(own_folder(self.path), self.path)

    @property
    def places(self) -> list[Path]:
        """The folders in which such things lie: the run's, and then those of the SFT folder that its chain shares."""
        return list(dict.fromkeys([self.own, *([own_folder(self.sft)] if self.has_sft else [])]))

    @property
    def has_sft(self) -> bool:
        """Whether an SFT folder with our files is there. RL from a base has none, nor has a chain that just began."""
        if (self.path / CHAIN).exists():
            return bool(self.chain.get("sft_dir")) and is_sft_folder(self.sft)
        return is_sft_folder(self.path) or is_sft_folder(self.path / "sft")

    def check_sft_inside(self, field: str, hint: str) -> None:
        """Refuse a chain's run whose SFT lies elsewhere: nothing is written there unasked. `hint` is the way out."""
        if (self.path / CHAIN).exists() and not self.sft.resolve().is_relative_to(self.path.resolve()):
            raise InputError(f"{field}: the candidates of {self.path} lie in {self.sft}: {hint}")

    @cached_property
    def settings(self) -> dict:
        """run.json of the SFT ([`read_settings`]); empty where an older DiversityCallback ran beside a TRL trainer."""
        return read_settings(self.sft)

    @cached_property
    def log(self) -> list[dict]:
        """Trainer's log_history of the SFT, of its newest checkpoint while the run has not ended."""
        return read_log(self.sft)

    def rows(self, name: str, needs: Sequence[str] = ()) -> list[dict]:
        """Return the rows of the SFT folder's JSONL file `name`, each with the keys `needs`."""
        path = own_folder(self.sft) / name
        return read_rows(path, needs) if path.is_file() else []

    @property
    def candidates_folder(self) -> Path:
        return own_folder(self.sft) / CANDIDATES

    @property
    def candidates(self) -> list[int]:
        """Steps of the saved candidates, in order. InputError: none was saved."""
        folder = self.candidates_folder
        names = [path.name.removeprefix("step-") for path in folder.glob("step-*") if path.is_dir()]
        steps = sorted(int(name) for name in names if name.isdecimal())
        if not steps:
            raise InputError(f"{folder} holds no candidate (step-N): train with diversity_steps above 0")
        return steps

    def candidate(self, name: int | str) -> Path:
        """Return the folder of the candidate of a step, or of that name (`mix-0.7`). InputError: it is a symlink."""
        name = name if isinstance(name, str) else f"step-{name}"
        return check_unlinked(self.candidates_folder / name, self.sft, inside=True)

    @cached_property
    def mixes(self) -> dict[str, dict]:
        """The rows of mix.json by their candidates' names; none where `aesl mix` has not run."""
        path = own_folder(self.sft) / MIXES
        rows = read_object(path).get("candidates", [])
        objects = isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
        if not objects or not all(is_mix(row.get("candidate")) for row in rows):
            raise InputError(f"{path} is not what aesl mix writes: run aesl mix {self.sft} again")
        return {row["candidate"]: row for row in rows}

    @property
    def sample_files(self) -> dict[int, Path]:
        """The files samples/step-N.jsonl by step, in order."""
        paths = (own_folder(self.sft) / SAMPLES).glob("step-*.jsonl")
        found = [(path.stem.removeprefix("step-"), path) for path in paths]
        return dict(sorted((int(step), path) for step, path in found if step.isdecimal()))

    def object(self, name: str) -> dict:
        """Return the JSON object `name` of the run, else of its SFT folder, else an empty one."""
        return next((found for place in self.places if (found := read_object(place / name))), {})


def is_mix(candidate: Any) -> bool:
    """Say whether this is the name of an average of the base and a candidate."""
    return isinstance(candidate, str) and re.fullmatch(r"mix-[0-9.e-]+", candidate) is not None


def chosen(selection: dict) -> str | None:
    """Say what a selection.json chose: `step 400`, or `mix-0.7`; None where it chose nothing."""
    step, candidate = selection.get("step"), selection.get("candidate")
    return candidate if is_mix(candidate) else None if step is None else f"step {step}"


def repeats(selection: dict) -> dict[str, Any]:
    """Return the options with which `aesl select` makes the selection of this selection.json again."""
    rule, step, evidence = selection.get("rule"), selection.get("step"), selection.get("evidence")
    if rule == "step" and isinstance(step, int):
        return {"step": step}
    found = {"rule": rule, "metric": selection.get("metric")}
    if rule == "best_eval" and isinstance(evidence, dict) and isinstance(evidence.get("evaluation"), dict):
        found["best_eval_metric"] = evidence["evaluation"].get("metric")
    return {key: value for key, value in found.items() if isinstance(value, str)}


@cache
def _say_where(run: Path, sft: Path) -> None:
    say(f"aesl_trl: the SFT of {run} is {sft}, as its {CHAIN} says")


def check_candidate(path: str | Path) -> None:
    """Refuse a candidate of a run, named by its path, that is a symlink or holds one. Other folders pass."""
    path = Path(path).absolute()
    if path.parent.name == CANDIDATES and (re.fullmatch(r"step-\d+", path.name) or is_mix(path.name)):
        check_unlinked(path, run_of(path), inside=True)


def is_sft_folder(folder: Path) -> bool:
    return any((place / name).exists() for place in (folder, folder / OWN) for name in (DIVERSITY, RUN, TRAINER_STATE))


def read_settings(folder: Path) -> dict:
    """Read run.json of a training's folder. Refuse a newer aesl_trl's, whose files may mean something else.

    An older version's file is read, and a reader that lacks a key says so.
    """
    path = own_folder(folder) / RUN
    run = read_json(path) if path.exists() else {}
    if not isinstance(run, dict):
        raise InputError(f"{path} holds a {type(run).__name__}, not an object: {folder} is no run of aesl_trl")
    versions = run.get("versions")
    wrote = str((versions.get("aesl_trl") if isinstance(versions, dict) else None) or __version__)
    # 0.1.1 after 0.1.0 changes no file's meaning, so the patch number does not count.
    written, ours = ([int(number) for number in re.findall(r"\d+", text)[:2]] for text in (wrote, __version__))
    if written > ours:
        raise InputError(f"{path} was written by aesl_trl {wrote}, and this is {__version__}: update aesl_trl")
    return run


def read_log(folder: Path) -> list[dict]:
    """Read Trainer's log_history of a training's folder; see [`RunFolder.log`]."""
    checkpoints = folder.glob(f"checkpoint-*/{TRAINER_STATE}")
    newest = sorted(checkpoints, key=lambda path: int(re.sub(r"\D", "", path.parent.name) or 0))[-1:]
    places = [own_folder(folder) / TRAINER_STATE, folder / TRAINER_STATE, *newest]
    path = next((path for path in places if path.is_file()), None)
    history = read_object(path).get("log_history") if path else []
    if not isinstance(history, list) or not all(isinstance(row, dict) for row in history):
        raise InputError(f"{path} has no list 'log_history' of objects")
    return history
