"""What `aesl probe` is asked about: names -> checkpoints, and the SFT run that each comes from.

Left out: whether the weights are whole (training/checkpoints.py), and what is measured (probe_measurement.py).
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from . import files
from .diversity.readiness import History
from .errors import InputError
from .files import candidate_steps, read_rows
from .models.folder import ADAPTER_CONFIG


@dataclass(frozen=True)
class Checkpoint:
    """What is probed: `path` as given or found, and the SFT folder and step that it comes from, where known."""

    path: str
    name: str
    run: Path | None = None
    step: int | None = None

    @property
    def is_adapter(self) -> bool:
        return (Path(self.path) / ADAPTER_CONFIG).is_file()


def find_checkpoints(name: str) -> list[Checkpoint]:
    """The candidates of the run folder `name`, or `name` itself: a model, an adapter, or a name on the hub."""
    path = Path(name)
    try:
        sft = files.sft_dir(path) if path.is_dir() else None
    except InputError:
        if (path / files.CHAIN).exists():  # a run it is, and one that cannot be read, or without SFT
            raise
        sft = None
    if sft is not None and (sft / files.CANDIDATES).is_dir():
        steps = candidate_steps(sft)
        return [Checkpoint(str(sft / files.CANDIDATES / f"step-{step}"), f"step-{step}", sft, step) for step in steps]
    return [Checkpoint(name, path.name if path.is_dir() else name, *origin(path))]


def told_apart(checkpoints: list[Checkpoint]) -> list[Checkpoint]:
    """With the folder above in the name, where two would have the same: `aesl/step-400`."""
    names = [one.name for one in checkpoints]

    def above(one: Checkpoint) -> str:
        return (one.run or Path(one.path).absolute().parent).name

    return [replace(one, name=f"{above(one)}/{one.name}") if names.count(one.name) > 1 else one for one in checkpoints]


def origin(path: Path) -> tuple[Path | None, int | None]:
    """SFT folder and step of a candidate, a checkpoint, `selected` or `handoff`; (None, None) of anything else."""
    path = path.absolute()
    numbered = re.fullmatch(r"(?:step|checkpoint)-(\d+)", path.name)
    folder = path.parent.parent if path.parent.name == files.CANDIDATES else path.parent
    if numbered:
        return (folder, int(numbered[1])) if (folder / files.DIVERSITY).is_file() else (None, None)
    if path.name in (files.SELECTED, files.HANDOFF_DIR) and (folder / files.SELECTION).is_file():
        return files.sft_dir(folder), files.read_json(folder / files.SELECTION).get("step")
    return None, None


def history(checkpoint: Checkpoint) -> History | None:
    """The series of the run that it belongs to; None where there is none."""
    if checkpoint.run is None or checkpoint.step is None or not (checkpoint.run / files.DIVERSITY).is_file():
        return None
    rows = {row["step"]: row for row in read_rows(checkpoint.run / files.DIVERSITY, needs=("step",))}
    has_candidates = (checkpoint.run / files.CANDIDATES).is_dir()
    steps = candidate_steps(checkpoint.run) if has_candidates else []
    return History(checkpoint.step, [rows[step] for step in sorted(rows)], steps)
