"""Log-probabilities of the labels under an old policy, for losses that compare with one (PSFT).

The old policy is the model itself some steps ago, so no second model is needed. At each refresh the batches of the
next steps are taken from the dataloader and scored by the model as it is, without gradients, one forward pass a batch.
They then wait, collated as they are, and are trained on one step after another. Since the log-probabilities are those
of the finished batch, truncation, packing, padding and virtual tokens cannot move them away from their tokens.

The first step after a refresh needs no scores: there the model is its own old policy, and the ratio is 1. That saves
1 / refresh of the forward passes; with dropout the ratio of that step is 1 nevertheless.

A refresh comes at the start of an epoch and every `refresh_steps` optimiser steps within the epoch. A run resumed
between two refreshes starts with a refresh of its own, and is in step with the undisturbed run from the next one on.
"""

import itertools
import math
from collections.abc import Iterator

from transformers.trainer_utils import has_length

from .scoring import Uncast, score_batch


OLD_LOG_PROBS = "old_log_probs"  # the key in a batch; its value is wrapped, or mixed precision would round it


class OldPolicy:
    """The batches of an AESLSFTTrainer with the old policy's log-probabilities beside them.

    A refresh comes after `refresh_steps` optimiser steps, at least 1.
    """

    def __init__(self, trainer, refresh_steps: int):
        self.trainer, self.refresh_steps = trainer, refresh_steps
        self.iterator = None  # the iterator of the epoch that the waiting batches belong to
        self.waiting = []

    def next_step(self, epoch_iterator: Iterator[dict], num_batches: int) -> Iterator[dict]:
        """Return the next step's batches, at most `num_batches`, each with [`OLD_LOG_PROBS`] (None: the model's own).

        At a refresh this takes the batches up to the next refresh from `epoch_iterator`, and scores them.
        """
        if epoch_iterator is not self.iterator:
            self.iterator, self.waiting = epoch_iterator, []
        if not self.waiting:
            batches = list(itertools.islice(epoch_iterator, self._steps_left() * num_batches))
            first, later = batches[:num_batches], batches[num_batches:]
            self.waiting = [{**batch, OLD_LOG_PROBS: None} for batch in first]
            self.waiting += [
                {**batch, OLD_LOG_PROBS: Uncast(score_batch(self.trainer, batch).log_probs)} for batch in later
            ]
        taken, self.waiting = self.waiting[:num_batches], self.waiting[num_batches:]
        return iter(taken)

    def _steps_left(self) -> int:
        """Return the number of steps to the next refresh, or to the end of the training."""
        state, dataloader = self.trainer.state, self.trainer.callback_handler.train_dataloader
        accumulated = self.trainer.args.gradient_accumulation_steps
        # As Trainer counts: a stream without length is one epoch
        length = len(dataloader) if has_length(dataloader) else state.max_steps * accumulated
        steps_per_epoch = max(1, math.ceil(length / accumulated))
        since_refresh = state.global_step % steps_per_epoch % self.refresh_steps
        return min(self.refresh_steps - since_refresh, state.max_steps - state.global_step)
