"""SIGTERM and SIGINT while `aesl sft` and `aesl grpo` run: finish the step, save, leave with exit code 128 + signal.

Outside of a step (loading, measuring, saving the last weights) the process leaves at once: a file that it was writing
is renamed into place when it is whole, or lies in a checkpoint that counts as torn.
"""

import contextlib
import os
import signal
import sys
import time
from functools import partial

import torch
from transformers import TrainerCallback

from ..processes import GRACE_S, STOP_SIGNALS, handling
from .resuming import CheckpointCallback


REPEAT_S = 3  # a second signal within this time repeats the first: a launcher passes on what its whole group was sent


class StopSignals:
    """Handle both signals inside a `with` block; `received` is the first one.

    While `is_deferred` is set, the first signal is only noted. Another one, `REPEAT_S` later, ends the process as it
    would have without a handler.
    """

    def __init__(self, command: str):
        self.command = command
        self.received: int | None = None
        self.is_deferred = False

    def __enter__(self):
        self._process = os.getpid()
        self._handlers = handling(STOP_SIGNALS, self._handle)
        self._handlers.__enter__()
        return self

    def __exit__(self, *error):
        self._handlers.__exit__(*error)

    def _handle(self, number: int, _frame) -> None:
        if os.getpid() != self._process:
            # A forked process has our handler too. Ctrl-C reaches all processes, and the training answers it; with
            # SIGTERM a pool ends its own.
            if number == signal.SIGTERM:
                _end_at_once(number)
        elif self.received is None:
            self.note(number)
            if not self.is_deferred:
                self.leave("nothing was being trained, nothing saved")
            self._say("a checkpoint is saved after this step; another signal ends at once")
        elif time.monotonic() - self._received_at > REPEAT_S:
            _end_at_once(number)

    def note(self, number: int) -> None:
        self.received, self._received_at = number, time.monotonic()

    def leave(self, outcome: str) -> None:
        """Print the outcome and exit with 128 + signal."""
        self._say(outcome)
        sys.exit(128 + self.received)

    def _say(self, outcome: str) -> None:
        line = f"{self.command}: {signal.Signals(self.received).name}: {outcome}\n"
        if os.environ.get("LOCAL_RANK", "0") == "0":
            with contextlib.suppress(OSError):  # whoever read stderr may be gone
                os.write(2, line.encode())  # the signal may have come in the middle of a print, so we cannot print


def _end_at_once(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def spare_workers(loader) -> None:
    """Let a loader's workers outlive a SIGTERM to their whole group: the step at hand still needs their rows."""
    loader = getattr(loader, "base_dataloader", loader)  # attributes of accelerate's loader can be read, not written
    loader.worker_init_fn = partial(_start_worker, loader.worker_init_fn)


def _start_worker(init, number: int) -> None:
    if init is not None:
        init(number)
    # torch's own handler would end the worker, and the training with it. Ours gives it a time limit instead, because
    # the loader itself may have sent the signal.
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE_S))


class StopCallback(TrainerCallback):
    """Save and leave at the end of the step in which a signal came; all ranks leave at the same step.

    Where several steps share one generation (GRPO's `steps_per_generation`, `num_iterations`), this happens at the
    last of them: TRL does not save the samples, and a run that resumed in between would draw others.

    Add it last, after `saving`, which has then finished the checkpoint. `diversity` is the DiversityCallback of a
    trainer that measures at the end of some steps.
    """

    def __init__(self, trainer, signals: StopSignals, saving: CheckpointCallback, diversity=None):
        self.trainer, self.signals, self.saving, self.diversity = trainer, signals, saving, diversity
        self._stops = False

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        if hasattr(train_dataloader, "worker_init_fn"):  # its workers start with the first step
            spare_workers(train_dataloader)

    def on_step_begin(self, args, state, control, **kwargs):
        self.signals.is_deferred = True

    def on_optimizer_step(self, args, state, control, **kwargs):
        # A measurement at this step's end comes before our own `on_step_end`, and may take minutes.
        measures = self.diversity is not None and self.diversity.measures_at(state.global_step + 1, state.max_steps)
        self.signals.is_deferred = not measures

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
            self.trainer.accelerator.wait_for_everyone()  # if a rank left early, the launcher would kill the others
            self.signals.leave(f"saved checkpoint-{state.global_step}; go on with --resume_from_checkpoint true")

    def on_train_end(self, args, state, control, **kwargs):
        self.signals.is_deferred = False
        if self.signals.received:
            self.signals.leave("the training was over, its last weights are not saved yet")

    def _stop_is_due(self, args, state) -> bool:
        """Say whether any rank has received a signal, and this step is one to stop at."""
        accelerator, received = self.trainer.accelerator, self.signals.received or 0
        if accelerator.num_processes > 1:
            received = int(accelerator.gather(torch.tensor([received], device=accelerator.device)).max())
            if received and self.signals.received is None:
                self.signals.note(received)
        batches = state.global_step * args.gradient_accumulation_steps
        shared = getattr(args, "steps_per_generation", 1) * getattr(args, "num_iterations", 1)
        return received > 0 and (batches % shared == 0 or state.global_step >= state.max_steps)
