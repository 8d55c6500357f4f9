"""The samples of a probe's finished checkpoints on disk, so that a probe that was killed goes on where it was.

They lie beside readiness.json until that is written. Each line has a digest of all that its samples depend on: a probe
with other settings, prompts, rewards or weights finds nothing to go on from. Verdicts are made anew from the samples.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import files
from ..diversity.figures import Group
from ..identity import file_hash
from ..models.folder import ModelFolder
from ..provenance import PACKAGES, package_versions
from ..rewards.functions import source_of
from ..training.trained_with import data_digest


SETTINGS = ("num_samples", "batch_size", "success_threshold")  # of the probe's own
GRADING = ("math-verify", "reasoning-gym")  # packages that grade answers
# Of GRPOConfig: where things go and how they are shown, which changes no sample
NOT_SETTINGS = {"output_dir", "run_name", "report_to", "disable_tqdm", "log_level", "logging_dir", "logging_steps"}


@dataclass(frozen=True)
class Probed:
    """What a checkpoint gave: its graded samples, the figures after a short RL run, and the time that both took."""

    groups: list[Group]
    rl: dict | None
    seconds: float


class ProbedFile:
    """The finished checkpoints of the probe that writes `target`; `settings` are all that their samples depend on."""

    def __init__(self, target: Path, settings: dict, revision: str | None = None):
        self.path = target.with_suffix(".part.jsonl")  # files.PROBED beside files.READINESS
        self._settings, self._revision = settings, revision

    def read(self) -> dict[str, Probed]:
        """Return by key what was finished before."""
        found = {}
        rows = files.read_rows(self.path, ("key", "groups", "rl", "seconds")) if self.path.exists() else []
        for number, row in enumerate(rows, 1):
            where = f"{self.path}, line {number}"
            groups = [Group.from_row(group, where) for group in row["groups"]]
            found[row["key"]] = Probed(groups, row["rl"], row["seconds"])
        return found

    def add(self, key: str, probed: Probed) -> None:
        """Append what a checkpoint gave, in one write."""
        groups = [group.to_row() for group in probed.groups]
        files.append_jsonl(self.path, {"key": key, "groups": groups, "rl": probed.rl, "seconds": probed.seconds})

    def key(self, model: str, rl_steps: int) -> str:
        """Return the digest of a model and the settings."""
        identity = ModelFolder.find(model).identity(self._revision)
        facts = {"model": identity, "rl_steps": rl_steps, **self._settings}
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def settings_of(args: Sequence[Any], reward_funcs: Sequence[str | Callable], rows: list[dict], train: Any) -> dict:
    """Return what the samples of every checkpoint depend on; `args` are those of the script, of GRPO and of the model.

    Of a reward function the file that it is written in counts, but not what that file imports. A stream of rows to
    train on cannot be told from another one, so what a probe with such a stream has kept is never used again.
    """
    script_args, training_args, model_args = args
    names, model = script_args.reward_funcs or (), script_args.reward_model_name_or_path
    named = {os.path.expanduser(name.rpartition(":")[0]) for name in names if ".py:" in name}
    written = {source_of(function) for function in reward_funcs if callable(function)} - {None}
    return {
        **{key: getattr(script_args, key) for key in SETTINGS},
        "rewards": list(names),
        "reward_files": sorted(map(file_hash, named | written)),
        "reward_model": model and ModelFolder.find(model).identity(model_args.model_revision),
        "grpo": {key: value for key, value in training_args.to_dict().items() if key not in NOT_SETTINGS},
        "model_args": vars(model_args),
        "rows": rows,
        "train": train and (data_digest(train) or uuid.uuid4().hex),
        "num_processes": training_args.world_size,
        "versions": package_versions((*PACKAGES, *GRADING)),
    }
