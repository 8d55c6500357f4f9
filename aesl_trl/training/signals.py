"""SIGTERM and SIGINT while `aesl sft` and `aesl grpo` run: finish the step, save, leave with exit code 128 + signal.

Outside of a step (loading, measuring, saving the last weights) the process leaves at once: what it was writing is
renamed into place when it is whole, or lies in a checkpoint that counts as torn. The chain's own signals are in
processes.py.
"""

import contextlib
import os
import signal
import sys
import time
from functools import partial

import torch
from transformers import TrainerCallback

from ..processes import GRACE_S
from .resuming import CheckpointCallback


REPEAT_S = 3  # within it a second signal is the same one: a launcher passes on what its whole group was sent


class StopSignals:
    """Handles both signals while it is entered; `received` is the first one.

    While `is_deferred`, the first one is only noted. Another one, `REPEAT_S` later, ends the process as it would have
    without a handler.
    """

    def __init__(self, command: str):
        self.command = command
        self.received: int | None = None
        self.is_deferred = False

    def __enter__(self):
        self._process = os.getpid()
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame) -> None:
        if os.getpid() != self._process:
            _handle_in_child(number)
        elif self.received is None:
            self.note(number)
            if not self.is_deferred:
                self.leave("nothing was being trained, nothing saved")
            self._say("a checkpoint is saved after this step; the same again ends at once")
        elif time.monotonic() - self._at > REPEAT_S:
            _end_at_once(number)

    def note(self, number: int) -> None:
        self.received, self._at = number, time.monotonic()

    def leave(self, what: str) -> None:
        self._say(what)
        sys.exit(128 + self.received)

    def _say(self, what: str) -> None:
        line = f"{self.command}: {signal.Signals(self.received).name}: {what}\n"
        if os.environ.get("LOCAL_RANK", "0") == "0":
            with contextlib.suppress(OSError):  # whoever read it may be gone
                os.write(2, line.encode())  # not print, which the signal may have come in the middle of


def _handle_in_child(number: int) -> None:
    """A forked process has our handler: Ctrl-C reaches all of them and is the training's affair; a pool ends its own
    with SIGTERM."""
    if number == signal.SIGTERM:
        _end_at_once(number)


def _end_at_once(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def spare_workers(loader) -> None:
    """Let a loader's workers live on when their whole group is sent SIGTERM: the step still needs their rows."""
    loader = getattr(loader, "base_dataloader", loader)  # accelerate's reads through to it, but does not write
    loader.worker_init_fn = partial(_start_worker, loader.worker_init_fn)


def _start_worker(init, number: int) -> None:
    if init is not None:
        init(number)
    # torch's own handler ends the worker, and the training fails; not for ever, for its loader may mean it
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE_S))


class StopCallback(TrainerCallback):
    """
    Saves and leaves at the end of the step in which a signal came, all ranks at the same one.

    Where several steps share one generation (GRPO's `steps_per_generation`, `num_iterations`), at the last of them:
    TRL does not save the samples, and resuming in between would draw others.

    Args:
        trainer ([`~transformers.Trainer`]): the trainer that it is added to, as its last callback.
        signals ([`StopSignals`]): what was received.
        saving ([`~resuming.CheckpointCallback`]): added before this one; by `on_save` it has finished the checkpoint.
    """

    def __init__(self, trainer, signals: StopSignals, saving: CheckpointCallback):
        self.trainer = trainer
        self.signals = signals
        self.saving = saving
        self._stops = False

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        if hasattr(train_dataloader, "worker_init_fn"):  # its workers start with the first step
            spare_workers(train_dataloader)

    def on_step_begin(self, args, state, control, **kwargs):
        self.signals.is_deferred = True

    def on_optimizer_step(self, args, state, control, **kwargs):
        # The callbacks of a step's end come before ours; a measurement among them may take minutes
        measures = getattr(self.trainer, "diversity_callback", None)
        step = state.global_step + 1
        self.signals.is_deferred = measures is None or (step % measures.steps != 0 and step != state.max_steps)

    def on_step_end(self, args, state, control, **kwargs):
        self.signals.is_deferred = True
        self._stops = self._stop_is_due(args, state)
        if self._stops:
            control.should_training_stop = True
            self._save(args, state, control)

    def on_epoch_end(self, args, state, control, **kwargs):
        if self._stops:  # still here: save_strategy best has taken the save back
            control.should_log = control.should_evaluate = False
            self._save(args, state, control)

    def _save(self, args, state, control) -> None:
        control.should_save = True
        self.saving.begin_save(args, state)

    def on_save(self, args, state, control, **kwargs):
        if self._stops or self._stop_is_due(args, state):
            self.trainer.accelerator.wait_for_everyone()  # a rank that leaves first would have the others killed
            self.signals.leave(f"saved checkpoint-{state.global_step}; go on with --resume_from_checkpoint true")

    def on_train_end(self, args, state, control, **kwargs):
        self.signals.is_deferred = False
        if self.signals.received:
            self.signals.leave("the training was over, its last weights are not saved yet")

    def _stop_is_due(self, args, state) -> bool:
        """Whether any rank has received a signal, and the step is one to stop at."""
        accelerator, received = self.trainer.accelerator, self.signals.received or 0
        if accelerator.num_processes > 1:
            received = int(accelerator.gather(torch.tensor([received], device=accelerator.device)).max())
            if received and self.signals.received is None:
                self.signals.note(received)
        batches = state.global_step * args.gradient_accumulation_steps
        shared = getattr(args, "steps_per_generation", 1) * getattr(args, "num_iterations", 1)
        return received > 0 and (batches % shared == 0 or state.global_step >= state.max_steps)
