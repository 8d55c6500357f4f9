"""What the mains of SFT and GRPO share: checks before the model loads, how it loads, what it resumes from, and how a
training has ended.

Data, rewards and the trainers themselves are each main's own.
"""

import errno
import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

from transformers import TrainerCallback

from ..errors import UNFINISHED, InputError
from ..files import TRAINING_LOCK
from ..processes import lock
from .checkpoints import find_checkpoint, last_whole_checkpoint


SAID_AFTER = (2, 10, 100, 1000)  # steps that were timed; the first of a process is not, it warms up


class HoursLeft(TrainerCallback):
    """Prints `aesl sft: step 3 of 252, 12.1 s a step, 0.8 h left` on the first process.

    The pace is the mean since the first step of this process, so that of a resumed run is its own. What interrupts the
    steps (measurements, evaluation, checkpoints) counts as far as it has happened.
    """

    def __init__(self, command: str):
        self.command = command
        self.first: tuple[int, float] | None = None  # step and time of the first step's end

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
        line = (
            f"step {state.global_step} of {state.max_steps}, {step_s:.2g} s a step, {step_s * left / 3600:.2g} h left"
        )
        print(f"{self.command}: {line}", flush=True)


# A disk that takes no more; anything else that a file can fail with may be a mistake in the code, and keeps its
# traceback
WRITE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
# What transformers and PEFT say of a setting that only they can judge -> the setting
SETTINGS = {"Target modules": "lora_target_modules", "attn_implementation": "attn_implementation"}


def check_quantization(model_args: Any) -> None:
    if (model_args.load_in_4bit or model_args.load_in_8bit) and importlib.util.find_spec("bitsandbytes") is None:
        raise InputError("load_in_4bit and load_in_8bit need the package bitsandbytes: pip install 'aesl_trl[qlora]'")


def check_exists(name: str, value: Any) -> None:
    """Refuse a path that is not there; `org/name` may be a model on the hub and passes."""
    is_path = isinstance(value, str) and (os.path.isabs(value) or value.startswith(".") or value.count("/") > 1)
    if is_path and not Path(value).exists():
        raise InputError(f"{name}: {value} does not exist")


def source(model_args: Any, training_args: Any) -> dict:
    """Which version of the model is meant, and whether its own code may run."""
    return {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code}


def model_init_kwargs(model_args: Any, training_args: Any) -> dict:
    """Keyword arguments for loading the model, as TRL's scripts put them together; those of the config win."""
    return {
        **source(model_args, training_args),
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }


@contextmanager
def named_settings() -> Iterator[None]:
    """What the libraries refuse of a setting while the model loads is the user's to mend: one line that names it."""
    try:
        yield
    except (ValueError, ImportError) as error:
        text = _in_one_line(error)
        setting = next((setting for start, setting in SETTINGS.items() if start in text), None)
        if setting is None or isinstance(error, InputError):
            raise
        raise InputError(f"{setting}: {text}") from None


def resume_point(args: Any, command: str) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` stands for, with a line for each torn one that is passed over."""
    check_exists("resume_from_checkpoint", args.resume_from_checkpoint)

    def say(line: str) -> None:
        if args.process_index == 0:
            print(f"{command}: {line}", flush=True)

    return find_checkpoint(args.resume_from_checkpoint, Path(args.output_dir), say)


@contextmanager
def at_work(args: Any, signals: Any) -> Iterator[None]:
    """Keep a second training out of the output folder, and end in one line where a signal or the disk is the reason.

    Raises:
        InputError: another process trains in the folder, such as one whose launcher was killed and left it behind.
        SystemExit: a signal came (128 + signal), or the disk takes no more (1).
    """
    folder = Path(args.output_dir)
    args.enable_jit_checkpoint = False  # it would take SIGTERM for itself, and return as if all steps were done
    with ExitStack() as stack:
        if args.process_index == 0:
            folder.mkdir(parents=True, exist_ok=True)
            message = f"another training is at work in {folder}: end it first"
            stack.enter_context(lock(folder / TRAINING_LOCK, message))
        try:
            yield
        except Exception as error:
            if signals.received:  # another rank, or a process that the step needs, has ended before it
                signals.leave(f"the step could not be finished, nothing saved ({_in_one_line(error)})")
            if not is_write_error(error):
                raise
            _leave_unwritten(error, folder, signals.command)


def train(trainer: Any, checkpoint: Path | None, signals: Any) -> None:
    """Train to the end, from `checkpoint` if there is one, with checkpoints that a kill or a signal can come between.

    Raises:
        SystemExit: a signal came, and a checkpoint is saved.
    """
    pass
    from .resuming import CheckpointCallback
    from .signals import StopCallback

    callbacks = trainer.callback_handler.callbacks
    saving = next((one for one in callbacks if isinstance(one, CheckpointCallback)), None)
    if saving is None:
        saving = CheckpointCallback(trainer)
        trainer.add_callback(saving)
    saving.resumed_from = checkpoint
    trainer.add_callback(StopCallback(trainer, signals, saving))
    trainer.add_callback(HoursLeft(signals.command))
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


def _leave_unwritten(error: Exception, folder: Path, command: str) -> NoReturn:
    last, _ = last_whole_checkpoint(folder)
    kept = f"the last whole checkpoint is {last}" if last else "there is no whole checkpoint yet"
    free_gb = shutil.disk_usage(folder).free / 1e9
    text = _in_one_line(error)
    print(f"{command}: {folder} ({free_gb:.3f} GB free) cannot be written: {text}; {kept}", file=sys.stderr)
    sys.exit(1)


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def is_write_error(error: BaseException) -> bool:
    """A full disk and the like, as Python, safetensors (in Rust) and torch.save (in C++) report it."""
    known = isinstance(error, OSError) and error.errno in WRITE_ERRORS
    torch_save = "inline_container.cc" in str(error) and "Reader" not in str(error)
    return known or torch_save or str(error).startswith("Error while serializing")  # the last is safetensors'


def check_finished(trainer: Any, command: str) -> None:
    """Exit with [`~aesl_trl.errors.UNFINISHED`] before the last step.

    A callback may end a training as if all steps were done; what follows must not believe it.
    """
    state = trainer.state
    if state.global_step < state.max_steps:
        trainer.accelerator.print(
            f"{command}: stopped at step {state.global_step} of {state.max_steps}", file=sys.stderr
        )
        sys.exit(UNFINISHED)


def end(trainer: Any) -> None:
    """Finish the trackers and the process group, where transformers can (from 5.18)."""
    if hasattr(trainer, "end"):
        trainer.end()
