"""Stop a training whose loss or gradient is not finite, before the optimizer makes all weights so.

Trainer itself shows a NaN loss as 0.0, trains on and ends with exit code 0.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..errors import Diverged
from .checkpoints import last_whole_checkpoint


# An fp16 scaler that starts at 65536 and halves is at 64 by then: what still overflows is not its doing
SKIPPED_STEPS = 10
SHOWN_CHARACTERS = 60
SHOWN_ROWS = 4


class FiniteStepsMixin:
    """Before a [`~transformers.Trainer`]: raises [`Diverged`] between the backward pass and the optimizer's step.

    An overflow under fp16 is the gradient scaler's business, which skips the step, until `SKIPPED_STEPS` follow each
    other.
    """

    _skipped_steps = 0

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is None or math.isfinite(float(norm)):  # DeepSpeed has none before its first step
            self._skipped_steps = 0
            return norm
        self._skipped_steps += 1
        scaler = self.accelerator.scaler
        if scaler is None or not scaler.is_enabled():
            self.stop_diverged(f"the gradient's norm is {float(norm)}")
        elif self._skipped_steps >= SKIPPED_STEPS:
            self.stop_diverged(f"fp16 gradients overflowed in {self._skipped_steps} steps on end")
        return norm

    def stop_diverged(self, what: str) -> None:
        """Raise [`Diverged`] with the step, and the checkpoint to go back to."""
        checkpoint, _ = last_whole_checkpoint(Path(self.args.output_dir))
        back = f"the last whole checkpoint is {checkpoint}" if checkpoint else "no checkpoint was saved before it"
        raise Diverged(
            f"step {self.state.global_step + 1}: {what}; stopped before the optimizer's step, {back}. "
            "Lower learning_rate, or look at the rows of this step"
        )


def rows_not_finite(log_probs: Tensor, input_ids: Tensor, sequence_ids: Tensor | None, decode: Callable) -> list[str]:
    """`["row 1 ('2+2=...')", ...]`: the documents of a micro-batch with a log-probability that is not finite.

    Args:
        log_probs: `[B, L]`, 0 where nothing is trained.
        input_ids: `[B, L + 1]`.
        sequence_ids: `[B, L]`, the document of each label in a packed row; None: one document a row.
        decode: token ids -> text.
    """
    if sequence_ids is None:
        sequence_ids = torch.zeros_like(log_probs, dtype=torch.long)
    found = []
    for row, bad in enumerate(~log_probs.isfinite()):
        for document in sequence_ids[row][bad].unique().tolist():
            first, *_, last = (sequence_ids[row] == document).nonzero().flatten().tolist() * 2
            text = decode(input_ids[row, first : last + 2], skip_special_tokens=True)  # the first is no label
            found.append(f"row {row} ({text[:SHOWN_CHARACTERS]!r})")
    return found
