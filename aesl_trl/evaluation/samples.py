"""The samples of an evaluation on disk, drawn and saved in pieces, so that a run that was killed goes on where it was.

A piece is some problems with all their samples, or a part of one problem's samples. Each piece is drawn from a seed of
its own, made from the run's seed, its first problem and its part, and is added to the file as one line. So the samples
do not depend on where a run was cut off. A folder belongs to one model with one set of settings: another model, seed
or length has another folder and never meets these samples.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..diversity.figures import Group
from ..errors import InputError, say
from ..files import append_jsonl, in_place, read_jsonl, write_json
from ..progress import bar
from ..sampling.draws import Piece


SETTINGS = "settings.json"


def pieces(num_problems: int, samples: int, answers: int) -> list[Piece]:
    """Split a run into pieces of about `answers` samples each: several whole problems, or a part of one problem."""
    if samples <= answers:
        step = answers // samples
        return [Piece(first, min(step, num_problems - first), 0, samples) for first in range(0, num_problems, step)]
    starts = range(0, samples, answers)
    return [
        Piece(first, 1, chunk, min(answers, samples - start))
        for first in range(num_problems)
        for chunk, start in enumerate(starts)
    ]


def folder_for(parent: Path, name: str, settings: dict) -> Path:
    """Return the samples' folder below `parent`: the model's name, and a digest of all that the samples depend on."""
    label = "".join(letter if letter.isalnum() or letter in "-._" else "-" for letter in Path(name).name)[:60]
    return parent / f"{label}-{_digest(settings)}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


class SamplesFile:
    """The pieces of one set of prompts, one line each; other prompts under the same name have another file."""

    def __init__(self, folder: Path, name: str, prompts: list, settings: dict):
        self.path = folder / f"{name}-{_digest(prompts)}.jsonl"
        self._settings = settings

    def read(self, wanted: Iterable[Piece]) -> dict[Piece, list[Group]]:
        """Read the pieces drawn so far; a last line that a kill cut off is removed, with a line on stderr."""
        if not self.path.exists():
            return {}
        self._drop_torn_line()
        wanted, found = set(wanted), {}
        for number, row in enumerate(read_jsonl(self.path), 1):
            where = f"{self.path}, line {number} is no piece of an evaluation"
            try:
                piece, rows = Piece(*row["piece"]), list(row["groups"])
            except (KeyError, TypeError) as error:
                raise InputError(f"{where}: {error!r}") from None
            needs = ("prompt", "num_tokens", "truncated", "entropy")
            groups = [Group.from_row(group, f"{where}: a group", needs) for group in rows]
            fits = len(groups) == piece.num and all(len(group.completions) == piece.samples for group in groups)
            if piece not in wanted or not fits:
                raise InputError(f"{self.path}, line {number} is no piece of this evaluation: remove the file")
            found[piece] = groups
        return found

    def add(self, piece: Piece, groups: list[Group]) -> None:
        """Append the piece; the first one of a folder lays the settings beside it."""
        if not (self.path.parent / SETTINGS).exists():
            write_json(self.path.parent / SETTINGS, self._settings)
        append_jsonl(self.path, {"piece": list(piece), "groups": [group.to_row() for group in groups]})

    def _drop_torn_line(self) -> None:
        with open(self.path, "rb+", opener=in_place) as file:
            content = file.read()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                say(f"aesl eval: {self.path} ends in half a line, which is removed and drawn again")
                file.truncate(whole)


def draw_missing(
    file: SamplesFile,
    wanted: list[Piece],
    found: set[Piece],
    draw: Callable[[Piece], list[Group]],
    is_main: bool,
    title: str = "",
) -> None:
    """Draw each piece that is not in `found`, all processes together, and save it from the first process.

    A bar over all answers, with `title` before it, stands at those that are in `found`.
    """
    done, total = (sum(piece.num * piece.samples for piece in pieces) for pieces in (found, wanted))
    with bar(total, title, done=done, unit="answer", shown=is_main) as shown:
        for piece in wanted:
            if piece not in found:
                groups = draw(piece)
                if is_main:
                    file.add(piece, groups)
                shown.update(piece.num * piece.samples)


def assemble(drawn: dict[Piece, list[Group]], wanted: list[Piece]) -> list[Group]:
    """Return one group a problem, the parts of its samples joined in order."""
    whole: dict[int, Group] = {}
    for piece in wanted:
        for index, group in enumerate(drawn[piece], piece.first):
            whole[index] = _join(whole[index], group) if index in whole else group
    return [whole[index] for index in sorted(whole)]


def _join(first: Group, second: Group) -> Group:
    """Join two parts of one prompt's samples. A field that is None in either part becomes None."""
    joined = {}
    for field in dataclasses.fields(Group):
        parts = getattr(first, field.name), getattr(second, field.name)
        joined[field.name] = None if None in parts else [*parts[0], *parts[1]]
    return Group(**{**joined, "prompt": first.prompt})
