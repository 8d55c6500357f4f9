"""CheckpointCallback: what a checkpoint needs beside Trainer's files so that a killed run ends as an undisturbed one.

For any Trainer, as the GRPO main uses TRL's own. How a checkpoint is judged and deleted is in checkpoints.py; when a
signal saves one, in signals.py.
"""

import math
from pathlib import Path

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from . import checkpoints


class CheckpointCallback(TrainerCallback):
    """
    Ends each checkpoint with a manifest, and takes up again what Trainer and TRL forget on resuming: the sums since
    the last log (without them its next row covers other steps), the count of tokens, and that the training was over.

    Add it last: callbacks that measure or stop at a step then have done so.

    Args:
        trainer ([`~transformers.Trainer`]): the trainer that it is added to.
        resumed_from (`Path`, *optional*): the checkpoint that `train` is told to resume from.
    """

    def __init__(self, trainer, resumed_from: Path | None = None):
        self.trainer = trainer
        self.resumed_from = resumed_from
        self._limit = None

    @property
    def _folder(self) -> Path:
        return Path(self.trainer.args.output_dir)

    # ---- Going on

    def on_train_begin(self, args, state, control, **kwargs):
        self._start = state.global_step
        # Trainer would rotate before the other ranks, and the manifest, are done
        self._limit, args.save_total_limit = args.save_total_limit or self._limit, None
        if args.should_save:
            checkpoints.sweep(self._folder)
            self._disown_newer(state.global_step)
        if state.global_step == 0:
            return
        self._restore_sums()
        # Trainer would evaluate again what the checkpoint's log_history holds
        args.eval_on_start = self._evaluation_was_cut_off(args, state)
        if state.global_step >= state.max_steps:
            control.should_training_stop = True
        if control.should_training_stop:
            # Trainer looks at it after a step only, and would train one more
            self.trainer.get_batch_samples = lambda *args, **kwargs: ([], None)

    def _disown_newer(self, step: int) -> None:
        """What a former run saved later must not be taken for this run's, nor half of it while it is overwritten."""
        for path in checkpoints.numbered(self._folder):
            if checkpoints.step_of(path) > step:
                if checkpoints.is_whole(path):
                    print(f"aesl_trl: {path} is of a former run, this one starts at step {step}: marked, not used")
                checkpoints.mark_incomplete(path, f"of a former run; another one started here at step {step}")

    def _evaluation_was_cut_off(self, args, state) -> bool:
        """Whether the checkpoint is of an epoch's last step, whose evaluation was still to come."""
        at_end = args.eval_strategy == IntervalStrategy.EPOCH and float(state.epoch).is_integer()
        evaluated = any(
            row["step"] == state.global_step and any(key.startswith("eval_") for key in row)
            for row in state.log_history
        )
        return at_end and args.eval_delay <= state.epoch and not evaluated

    def _restore_sums(self) -> None:
        sums = checkpoints.read_manifest(self.resumed_from).get("sums") if self.resumed_from else None
        if sums is None:  # a checkpoint of plain TRL
            return
        trainer, losses = self.trainer, [_number(loss) for loss in sums["losses"]]
        rank, num = trainer.accelerator.process_index, trainer.accelerator.num_processes
        trainer._tr_loss += losses[rank] if len(losses) == num else sum(losses) / len(losses)
        trainer._globalstep_last_logged = sums["last_logged"]
        for name, values in sums["metrics"].items():
            trainer._metrics["train"][name] = [_number(value) for value in values]
        if sums["tokens"] is not None:
            trainer._total_train_tokens = sums["tokens"]
        if sums["statistics"] is not None:
            statistics = torch.tensor(sums["statistics"], dtype=torch.float64, device=trainer.accelerator.device)
            trainer._sums["train"] = statistics

    # ---- Saving

    def on_step_end(self, args, state, control, **kwargs):
        # An evaluation decides about a save of the best, so that what is begun here might never be ended
        if control.should_save and args.save_strategy != SaveStrategy.BEST:
            self.begin_save(args, state)

    def on_epoch_end(self, args, state, control, **kwargs):
        if control.should_training_stop and state.global_step == self._start:  # nothing was trained: all this is done
            control.should_log = control.should_evaluate = control.should_save = False
        if control.should_save:
            self.begin_save(args, state)

    def begin_save(self, args, state) -> None:
        """From here until `on_save` the checkpoint of this step counts as torn."""
        # A push to the hub takes the folder before the manifest is in it
        if args.should_save and not args.push_to_hub:
            checkpoints.mark_incomplete(self._folder / f"checkpoint-{state.global_step}", "being saved")

    def on_save(self, args, state, control, **kwargs):
        sums = self._sums_since_log()
        self.trainer.accelerator.wait_for_everyone()  # every rank's random state and shards are there
        if not args.should_save:
            return
        checkpoint = self._folder / f"checkpoint-{state.global_step}"
        num_processes = self.trainer.accelerator.num_processes
        checkpoints.write_manifest(checkpoint, step=state.global_step, num_processes=num_processes, sums=sums)
        if self._limit:
            checkpoints.rotate(self._folder, self._limit, {checkpoint, *_best(state)})

    def _sums_since_log(self) -> dict:
        trainer = self.trainer
        statistics = getattr(trainer, "_sums", {"train": None})["train"]
        return {
            "losses": trainer.accelerator.gather(trainer._tr_loss.detach().reshape(1)).tolist(),  # one a rank
            "last_logged": trainer._globalstep_last_logged,
            "metrics": {
                name: [float(value) for value in values] for name, values in trainer._metrics["train"].items()
            },
            "tokens": getattr(trainer, "_total_train_tokens", None),
            "statistics": None if statistics is None else statistics.tolist(),
        }

    def on_train_end(self, args, state, control, **kwargs):
        args.save_total_limit = self._limit
        vars(self.trainer).pop("get_batch_samples", None)
        if args.should_save and self._limit == 1 and _best(state):  # as Trainer does: the best alone is left
            checkpoints.rotate(self._folder, 1, _best(state))


def _best(state) -> set[Path]:
    return {Path(state.best_model_checkpoint)} if state.best_model_checkpoint else set()


def _number(value: float | None) -> float:
    """JSON holds no NaN: null stands for it."""
    return math.nan if value is None else value
