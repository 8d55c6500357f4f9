"""What of a run goes to the hub beside the model: nothing but the parts that `hub_include` names.

Trainer uploads the whole output folder but for `_*` and `checkpoint-*`, so that what is ours stays here, in `_aesl`.
"""

import os
import shutil
import time
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

from transformers.utils.hub import PushInProgress

from .. import files
from ..errors import InputError, in_one_line
from ..values import check_choice


PARTS = {
    "selected": files.SELECTED,
    "selection": files.SELECTION,
    "candidates": files.CANDIDATES,
    "samples": files.SAMPLES,
    "diversity": files.DIVERSITY,
    "positions": files.POSITIONS,
    "run": files.RUN,
    "log": files.TRAINER_STATE,
}


def check_parts(names: Collection[str], pushes: bool) -> None:
    """Refuse a value of `hub_include` that is no list of known parts, or that nothing would push."""
    if isinstance(names, str):
        raise InputError(f"hub_include is {names!r}, but must be a list of parts, such as [selected, samples]")
    for name in names:
        check_choice("hub_include", name, PARTS)
    if names and not pushes:
        raise InputError("hub_include asks for an upload, but push_to_hub is false: set push_to_hub to true")


def push_parts(trainer: Any, names: Collection[str]) -> None:
    """Upload the named parts to `_aesl` in the model's repository, beside the push that Trainer now begins.

    The upload runs in the background, as Trainer's own at a save: Trainer waits for both at the end. Training goes on
    and changes the files meanwhile, so that a snapshot of them is uploaded: hard links of weights, copies of the rest.
    """
    own, args = files.own_folder(trainer.args.output_dir), trainer.args
    present = [PARTS[name] for name in names if (own / PARTS[name]).exists()]
    if not present or not trainer.is_world_process_zero():
        return
    snapshot = own / f".push-{time.time_ns()}.{os.getpid()}.tmp"  # a name that `sweep` knows
    snapshot.mkdir()
    for name in present:
        if (own / name).is_dir():
            shutil.copytree(own / name, snapshot / name, copy_function=files.link_or_copy, ignore=_unfinished)
        else:
            shutil.copy2(own / name, snapshot / name)
    job = _upload_folder()(
        repo_id=trainer.hub_model_id,
        folder_path=str(snapshot),
        path_in_repo=files.OWN,
        commit_message=f"{', '.join(present)} at step {trainer.state.global_step}",
        token=args.hub_token,
        revision=args.hub_revision,
        # What an earlier push left of a folder, such as candidates that have been dropped since
        delete_patterns=[f"{name}/*" for name in present if (snapshot / name).is_dir()],
        run_as_future=True,
    )
    job.add_done_callback(lambda done: _finish(done, snapshot))
    if trainer.push_in_progress is None or trainer.push_in_progress.is_done():
        trainer.push_in_progress = PushInProgress([])
    trainer.push_in_progress.jobs.append(job)


def _upload_folder() -> Any:
    """Return the upload of Trainer's own client, which makes one commit after the other: two at once can collide."""
    from transformers import trainer  # takes seconds, and a config is read without it

    return (trainer.hf_api() if hasattr(trainer, "hf_api") else trainer).upload_folder


def _unfinished(folder: str, names: list[str]) -> list[str]:
    """Name what is still being written."""
    return [name for name in names if name.startswith(".")]


def _finish(job: Any, snapshot: Path) -> None:
    shutil.rmtree(snapshot, ignore_errors=True)
    if not job.cancelled() and job.exception() is not None:
        warnings.warn(f"aesl_trl: hub_include was not uploaded: {in_one_line(job.exception())}", stacklevel=2)
