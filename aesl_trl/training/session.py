"""What `aesl sft` and `aesl grpo` share: datasets, how a model is loaded, a guarded training, and its end."""

import importlib.util
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..data.checks import checked_when_read
from ..data.rows import load_rows
from ..errors import UNFINISHED, InputError, in_one_line, is_write_error, say, tell
from ..files import OWN, TRAINING_LOCK, check_unlinked
from ..processes import is_stage_of, lock, lock_beside
from ..progress import time_left
from ..sampling.draws import failure_on_any_rank
from .checkpoints import find_checkpoint, last_whole_checkpoint
from .resuming import CheckpointCallback
from .signals import StopCallback, StopSignals


SAID_AFTER = (2, 10, 100, 1000)  # steps timed so far; the first step of a process warms up and is not timed


def load_split(script_args: Any, setting: str, split: str | None, *, seed: int, streaming: bool) -> Any:
    """Load the rows that `setting` of TRL's script arguments names; `dataset_config` is for `dataset_name` alone."""
    config = script_args.dataset_config if setting == "dataset_name" else None
    name = getattr(script_args, setting)
    return load_rows(name, split=split, config=config, streaming=streaming, seed=seed, field=setting)


def load_train_and_eval(
    script_args: Any, check: Callable, *, contents: str, seed: int, evaluates: bool, streams_eval: bool
) -> tuple[Any, Any]:
    """Load the rows to train on, and from `eval_dataset_name` or the test split the rows to evaluate on, or None.

    `check(rows, field=setting, start=0)` refuses rows that cannot be used. `contents` says in words what
    `dataset_name` holds. `streams_eval`: `dataset_streaming` is for `eval_dataset_name` as well.
    """
    if not script_args.dataset_name:
        raise InputError(f"dataset_name is missing: name {contents}, a hub dataset or a local file")
    streaming = script_args.dataset_streaming
    train = load_split(script_args, "dataset_name", script_args.dataset_train_split, seed=seed, streaming=streaming)
    check(train, field="dataset_name")
    if streaming:  # the check has seen the first rows alone
        train = checked_when_read(train, check, field="dataset_name")
    if not evaluates:
        return train, None
    setting, split = "dataset_name", script_args.dataset_test_split
    if script_args.eval_dataset_name:
        setting, split, streaming = "eval_dataset_name", None, streaming and streams_eval
    evaluation = load_split(script_args, setting, split, seed=seed, streaming=streaming)
    check(evaluation, field="eval_dataset_name")
    return train, evaluation


def check_quantization(model_args: Any) -> None:
    if (model_args.load_in_4bit or model_args.load_in_8bit) and importlib.util.find_spec("bitsandbytes") is None:
        raise InputError("load_in_4bit and load_in_8bit need the package bitsandbytes: pip install bitsandbytes")


def revision_and_trust(model_args: Any, training_args: Any) -> dict:
    """Return the keywords that say which revision of a model is read, and whether the model's own code may run."""
    return {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code}


def model_init_kwargs(model_args: Any, training_args: Any) -> dict:
    """Return the keywords for loading the model as TRL's scripts put them together; the config's own ones win."""
    return {
        **revision_and_trust(model_args, training_args),
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }


def resume_point(args: Any, command: str) -> Path | None:
    """Return the checkpoint to resume from; the first process prints a line for each torn checkpoint passed over."""
    say = partial(print, f"{command}:", flush=True) if args.process_index == 0 else lambda line: None
    return find_checkpoint(args.resume_from_checkpoint, Path(args.output_dir), say)


@contextmanager
def training_lock(args: Any, accelerator: Any = None) -> Iterator[None]:
    """Keep other trainings, and chains that read what is trained, out of `args.output_dir` inside the block.

    The other training may be one whose launcher was killed and left it behind. A chain that trains in the folder holds
    the lock beside it, from its first stage to its last. The first process takes the locks, as often as it asks. With
    `accelerator`, which all processes then have to give, its refusal is that of all.
    """
    with ExitStack() as stack:
        error = None
        if args.process_index == 0:
            try:
                _take_locks(stack, Path(args.output_dir))
            except InputError as refused:
                error = refused
        failure_on_any_rank(error, accelerator)
        yield


def _take_locks(stack: ExitStack, folder: Path) -> None:
    check_unlinked(folder / OWN, folder)
    message = f"another training is at work in {folder}: end it first"
    stack.enter_context(lock(folder.resolve() / OWN / TRAINING_LOCK, message, again=True))
    beside = lock_beside(folder)
    if beside.exists() and not is_stage_of(folder):  # a folder that no chain has seen has none
        message = f"a chain is at work with {folder}: end it first, or name another output_dir"
        stack.enter_context(lock(beside, message, again=True))


@contextmanager
def guarded_training(args: Any, signals: StopSignals) -> Iterator[None]:
    """Hold the folder's locks, and end in one line when a signal or the disk is the reason.

    The exit code is 128 + signal after a signal, and 1 when the disk takes no more.
    """
    folder = Path(args.output_dir)
    args.enable_jit_checkpoint = False  # it would take SIGTERM for itself, and return as if all steps were done
    with training_lock(args):
        try:
            yield
        except Exception as error:
            if signals.received:  # another rank, or a process that the step needs, has ended before this one
                signals.leave(f"the step could not be finished, nothing saved ({in_one_line(error)})")
            if not is_write_error(error):
                raise
            last, _ = last_whole_checkpoint(folder)
            kept = f"the last whole checkpoint is {last}" if last else "there is no whole checkpoint yet"
            place = f"{folder} ({shutil.disk_usage(folder).free / 1e9:.3f} GB free)"
            say(f"{signals.command}: {place} cannot be written: {in_one_line(error)}; {kept}")
            sys.exit(1)
        except SystemExit as leaving:
            if leaving.code not in (None, 0):  # our own exits before the end have codes
                raise
            frame = traceback.extract_tb(leaving.__traceback__)[-1]
            raise InputError(
                f"sys.exit at {frame.filename}:{frame.lineno} ended the training before its end, as if all were done; "
                "raise an error there, or let a callback set control.should_training_stop"
            ) from None


def train(trainer: Any, checkpoint: Path | None, signals: StopSignals, diversity: Any = None) -> None:
    """Train to the end, from `checkpoint` if there is one; a signal ends in a checkpoint and SystemExit."""
    saving = CheckpointCallback(trainer, checkpoint)
    for callback in (saving, StopCallback(trainer, signals, saving, diversity), TimeLeft(signals.command)):
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


class TimeLeft(TrainerCallback):
    """Print `aesl sft: step 3 of 252, 12.1 s a step, 50 min left` on the first process.

    The pace is the mean since the first step of this process, so a resumed run has a pace of its own. Time between the
    steps (measurements, evaluation, checkpoints) counts as far as it has passed.
    """

    def __init__(self, command: str):
        self.command = command
        self.first: tuple[int, float] | None = None  # the first step, and the time of its end

    def on_train_begin(self, args, state, control, **kwargs):
        self.first = None

    def on_step_end(self, args, state, control, **kwargs):
        if self.first is None:
            self.first = (state.global_step, time.monotonic())
            return
        timed, left = state.global_step - self.first[0], state.max_steps - state.global_step
        if timed not in SAID_AFTER or left <= 0 or not state.is_world_process_zero:
            return
        step_s = (time.monotonic() - self.first[1]) / timed
        pace = f"{step_s:.2g} s a step, {time_left(step_s * left)} left"
        tell(f"{self.command}: step {state.global_step} of {state.max_steps}, {pace}")


def check_finished(trainer: Any, command: str) -> None:
    """Exit with `UNFINISHED` before the last step: a callback may end a training as if all steps were done."""
    step, last = trainer.state.global_step, trainer.state.max_steps
    if step < last:
        trainer.accelerator.print(f"{command}: stopped at step {step} of {last}", file=sys.stderr)
        sys.exit(UNFINISHED)


def end_trackers(trainer: Any) -> None:
    """End the trackers and the process group; transformers can do so from 5.18 on."""
    if hasattr(trainer, "end"):
        trainer.end()
