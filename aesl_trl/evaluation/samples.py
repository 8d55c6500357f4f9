"""The samples of an evaluation on disk, drawn and saved in pieces, so that a run that was killed goes on where it was.

A piece is some problems with all their samples, or a part of one problem's samples. Each is drawn from a seed of its
own, made from the run's seed, its first problem and its part, and added to the file as one line. So the samples do
not depend on where a run was cut off. A folder is of one model with one set of settings: another model, seed or
length has another folder, and never meets these samples.

What draws is sampling/offline.py and sampling/offline.py.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..diversity.figures import Group
from ..errors import InputError
from ..files import append_jsonl, read_jsonl, write_json
from ..sampling.draws import Piece


SAMPLES_DIR = "evaluation_samples"
SETTINGS = "settings.json"
MODEL_FILES = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")


def pieces(num_problems: int, samples: int, answers: int) -> list[Piece]:
    """The pieces of a run, about `answers` samples each: several whole problems, or a part of one."""
    if samples <= answers:
        step = answers // samples
        return [Piece(first, min(step, num_problems - first), 0, samples) for first in range(0, num_problems, step)]
    starts = range(0, samples, answers)
    return [
        Piece(first, 1, chunk, min(answers, samples - start))
        for first in range(num_problems)
        for chunk, start in enumerate(starts)
    ]


def model_identity(path: str, base: str | None = None) -> dict:
    """What tells a model from another one, and from itself after more training: its commit, or sizes and times.

    Of a folder the contents are not read: a copy with other times counts as another model, and is drawn from anew.
    """
    folder = Path(path)
    if not folder.is_dir():
        from transformers import AutoConfig

        return {"name": path, "commit": getattr(AutoConfig.from_pretrained(path), "_commit_hash", None)}
    files = sorted(item for item in folder.iterdir() if item.suffix in MODEL_FILES)
    facts = [[item.name, item.stat().st_size, item.stat().st_mtime_ns] for item in files]
    return {"name": str(folder.resolve()), "files": facts, "base": model_identity(base) if base else None}


def folder_for(parent: Path, name: str, settings: dict) -> Path:
    """The folder of the samples with these settings below `parent`, named after the model and the settings' hash."""
    label = "".join(letter if letter.isalnum() or letter in "-._" else "-" for letter in Path(name).name)[:60]
    return parent / f"{label}-{_digest(settings)}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


class SamplesFile:
    """The pieces of one set of prompts, a line each; other prompts under the same name have another file."""

    def __init__(self, folder: Path, name: str, prompts: list, settings: dict):
        self.path = folder / f"{name}-{_digest(prompts)}.jsonl"
        self._settings = settings

    def read(self, wanted: Iterable[Piece]) -> dict[Piece, list[Group]]:
        """What was drawn. A last line that a kill cut off is taken off the file, with a line on stderr.

        Raises:
            InputError: a line before the last that is not whole, or one that is no piece of this run.
        """
        if not self.path.exists():
            return {}
        self._drop_torn_line()
        wanted, found = set(wanted), {}
        for number, row in enumerate(read_jsonl(self.path), 1):
            try:
                piece, groups = Piece(*row["piece"]), [Group(**item) for item in row["groups"]]
            except (KeyError, TypeError) as error:
                raise InputError(f"{self.path}, line {number} is no piece of an evaluation: {error!r}") from None
            fits = len(groups) == piece.num and all(len(group.completions) == piece.samples for group in groups)
            if piece not in wanted or not fits:
                raise InputError(f"{self.path}, line {number} is no piece of this evaluation: remove the file")
            found[piece] = groups
        return found

    def add(self, piece: Piece, groups: list[Group]) -> None:
        if not (self.path.parent / SETTINGS).exists():
            write_json(self.path.parent / SETTINGS, self._settings)
        append_jsonl(self.path, {"piece": list(piece), "groups": [dataclasses.asdict(group) for group in groups]})

    def _drop_torn_line(self) -> None:
        with open(self.path, "rb+") as file:
            content = file.read()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                print(f"aesl eval: {self.path} ends in half a line: cut off, drawn anew", file=sys.stderr)
                file.truncate(whole)


def draw_missing(
    file: SamplesFile, wanted: list[Piece], found: set[Piece], draw: Callable[[Piece], list[Group]], is_main: bool
) -> None:
    """Draw each piece that is not there, all processes together, and save it from the first."""
    for piece in wanted:
        if piece not in found:
            groups = draw(piece)
            if is_main:
                file.add(piece, groups)


def assemble(drawn: dict[Piece, list[Group]], wanted: list[Piece]) -> list[Group]:
    """One group a problem: the parts of its samples one after the other."""
    whole: dict[int, Group] = {}
    for piece in wanted:
        for offset, group in enumerate(drawn[piece]):
            index = piece.first + offset
            whole[index] = _joined(whole[index], group) if index in whole else group
    return [whole[index] for index in sorted(whole)]


def _joined(one: Group, other: Group) -> Group:
    """A field that one of the two lacks is lacking."""
    pairs = {field.name: (getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(Group)}
    return Group(
        **{
            name: one.prompt if name == "prompt" else None if None in pair else [*pair[0], *pair[1]]
            for name, pair in pairs.items()
        }
    )
