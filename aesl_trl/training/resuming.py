"""What a checkpoint needs beside Trainer's files, so that a killed run of any Trainer ends as an undisturbed one."""

import math
from pathlib import Path

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..errors import tell
from . import checkpoints
from .token_sums import TokenSums


class CheckpointCallback(TrainerCallback):
    """End each checkpoint with a manifest, and restore what Trainer and TRL forget when they resume.

    They forget the sums since the last log (without them the next row of the log covers other steps), the count of
    tokens, and that the training was over. Add this callback after those which measure or stop at a step.
    `resumed_from` is the checkpoint that `train` is told to resume from.
    """

    def __init__(self, trainer, resumed_from: Path | None = None):
        self.trainer, self.resumed_from = trainer, resumed_from
        self._limit = None

    def _checkpoint(self, state) -> Path:
        return Path(self.trainer.args.output_dir) / f"checkpoint-{state.global_step}"

    def on_train_begin(self, args, state, control, **kwargs):
        self._start = state.global_step
        # We rotate in Trainer's place: it would delete older checkpoints before the other ranks have saved their part
        # of the new one, and before the manifest declares the new one whole. Its limit is restored at the end.
        self._limit, args.save_total_limit = args.save_total_limit or self._limit, None
        if args.should_save:
            checkpoints.sweep(Path(args.output_dir))
            self._disown_newer(args, state.global_step)
        if state.global_step == 0:
            return
        self._restore_sums()
        # Trainer would repeat the evaluation that the checkpoint's log_history holds.
        args.eval_on_start = self._evaluation_was_cut_off(args, state)
        if state.global_step >= state.max_steps:
            control.should_training_stop = True
        if control.should_training_stop:
            # Trainer looks at `should_training_stop` only after a step. Without this, a run that was killed after its
            # last step would train one step more when it is resumed, and have other weights than a run that nobody
            # killed. An epoch without batches has no steps, so Trainer goes on to the end of the epoch and stops
            # there. `on_train_end` takes the replacement away.
            self.trainer.get_batch_samples = lambda *args, **kwargs: ([], None)

    def _disown_newer(self, args, step: int) -> None:
        """Mark checkpoints newer than `step` as incomplete, so that no later resume picks them up.

        A former run saved them. This run would leave a mixture of both while it overwrites one.
        """
        for path in checkpoints.numbered(Path(args.output_dir)):
            if checkpoints.step_of(path) > step:
                if checkpoints.is_whole(path):
                    tell(f"aesl_trl: {path} is of a former run, this one starts at step {step}: marked, not used")
                checkpoints.mark_incomplete(path, f"of a former run; another one started here at step {step}")

    def _evaluation_was_cut_off(self, args, state) -> bool:
        """Say whether the checkpoint is of an epoch's last step, and that epoch's evaluation is missing in the log."""
        at_end = args.eval_strategy == IntervalStrategy.EPOCH and float(state.epoch).is_integer()
        logged = [key for row in state.log_history if row["step"] == state.global_step for key in row]
        evaluated = any(key.startswith("eval_") for key in logged)
        return at_end and args.eval_delay <= state.epoch and not evaluated

    def _restore_sums(self) -> None:
        sums = checkpoints.read_manifest(self.resumed_from).get("sums") if self.resumed_from else None
        if sums is None:  # a checkpoint of plain TRL
            return
        trainer, losses = self.trainer, [_number(loss) for loss in sums["losses"]]
        rank, num = trainer.accelerator.process_index, trainer.accelerator.num_processes
        trainer._tr_loss += losses[rank] if len(losses) == num else sum(losses) / len(losses)
        trainer._globalstep_last_logged = sums["last_logged"]
        # Without a further step, TRL's last row has by this mode the figures since the row before, or leaves them out
        trainer.model.train(sums.get("is_training", trainer.model.training))
        for name, values in sums["metrics"].items():
            trainer._metrics["train"][name] = [_number(value) for value in values]
        if sums["tokens"] is not None:
            trainer._total_train_tokens = sums["tokens"]
        if sums["statistics"] is not None:
            statistics = [_number(value) for value in sums["statistics"]]
            trainer._sums["train"] = TokenSums.of_vector(torch.tensor(statistics, dtype=torch.float64))

    def on_step_end(self, args, state, control, **kwargs):
        # With `best` an evaluation still has to decide about the save: a mark made here might never be taken away.
        if control.should_save and args.save_strategy != SaveStrategy.BEST:
            self.begin_save(args, state)

    def on_epoch_end(self, args, state, control, **kwargs):
        if control.should_training_stop and state.global_step == self._start:  # resumed after the last step
            control.should_log = control.should_evaluate = control.should_save = False
        if control.should_save:
            self.begin_save(args, state)

    def begin_save(self, args, state) -> None:
        """Mark the checkpoint of this step as torn until `on_save` has finished it."""
        # With push_to_hub the upload starts before `on_save`, and would publish the mark.
        if args.should_save and not args.push_to_hub:
            checkpoints.mark_incomplete(self._checkpoint(state), "being saved")

    def on_save(self, args, state, control, **kwargs):
        trainer, sums = self.trainer, self._sums_since_log()
        trainer.accelerator.wait_for_everyone()  # every rank has saved its random state and its shards by then
        if not args.should_save:
            return
        checkpoint, num_processes = self._checkpoint(state), trainer.accelerator.num_processes
        checkpoints.write_manifest(checkpoint, step=state.global_step, num_processes=num_processes, sums=sums)
        if self._limit:
            checkpoints.rotate(checkpoint.parent, self._limit, {checkpoint, *_best(state)})

    def _sums_since_log(self) -> dict:
        trainer = self.trainer
        statistics = getattr(trainer, "_sums", {"train": None})["train"]  # AESLSFTTrainer's own
        metrics = trainer._metrics["train"].items()
        return {
            "losses": trainer.accelerator.gather(trainer._tr_loss.detach().reshape(1)).tolist(),  # one a rank
            "last_logged": trainer._globalstep_last_logged,
            "is_training": trainer.model.training,
            "metrics": {name: [float(value) for value in values] for name, values in metrics},
            "tokens": getattr(trainer, "_total_train_tokens", None),
            "statistics": None if statistics is None else statistics.to_vector().tolist(),
        }

    def on_train_end(self, args, state, control, **kwargs):
        args.save_total_limit = self._limit
        vars(self.trainer).pop("get_batch_samples", None)
        if args.should_save and self._limit == 1 and _best(state):  # as Trainer does: only the best one is left
            checkpoints.rotate(Path(args.output_dir), 1, _best(state))


def _best(state) -> set[Path]:
    return {Path(state.best_model_checkpoint)} if state.best_model_checkpoint else set()


def _number(value: float | None) -> float:
    """Return NaN for null: JSON has no NaN."""
    return math.nan if value is None else value
