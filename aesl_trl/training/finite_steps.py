"""Stop a training whose loss or gradient is not finite, before the optimizer spreads it to all weights.

Trainer itself shows a NaN loss as 0.0, trains on and ends with exit code 0.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..errors import Diverged
from .checkpoints import last_whole_checkpoint


# An fp16 scaler starts at 65536 and halves at each overflow: by then it is at 64, and is no longer the cause.
SKIPPED_STEPS = 10
SHOWN_CHARACTERS = 60
SHOWN_ROWS = 4


class FiniteStepsMixin:
    """Raise [`Diverged`] between backward pass and optimizer step; to be put before a [`~transformers.Trainer`].

    Under fp16 the gradient scaler skips a step that overflows, so only `SKIPPED_STEPS` such steps in a row count.
    """

    _skipped_steps = 0

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is None or math.isfinite(float(norm)):  # DeepSpeed has no norm before its first step
            self._skipped_steps = 0
            return norm
        self._skipped_steps += 1
        scaler = self.accelerator.scaler
        if scaler is None or not scaler.is_enabled():
            self.stop_diverged(f"the gradient's norm is {float(norm)}")
        elif self._skipped_steps >= SKIPPED_STEPS:
            self.stop_diverged(f"fp16 gradients overflowed in {self._skipped_steps} steps on end")
        return norm

    def stop_diverged(self, reason: str) -> None:
        """Raise [`Diverged`] with the step, the reason, and the checkpoint to go back to."""
        checkpoint, _ = last_whole_checkpoint(Path(self.args.output_dir))
        back = f"the last whole checkpoint is {checkpoint}" if checkpoint else "no checkpoint was saved before it"
        raise Diverged(
            f"step {self.state.global_step + 1}: {reason}; stopped before the optimizer's step, {back}. "
            "Lower learning_rate, or look at the rows of this step"
        )


def rows_not_finite(log_probs: Tensor, input_ids: Tensor, sequence_ids: Tensor | None, decode: Callable) -> list[str]:
    """Name the documents of a micro-batch that have a log-probability which is not finite: `row 1 ('2+2=...')`.

    `log_probs` are `[B, L]`, 0 where nothing is trained, and `input_ids` are `[B, L + 1]`. `sequence_ids`, `[B, L]`,
    tell the documents of a packed row apart; they are None when a row is one document.
    """
    if sequence_ids is None:
        sequence_ids = torch.zeros_like(log_probs, dtype=torch.long)
    found = []
    for row, bad in enumerate(~log_probs.isfinite()):
        for document in sequence_ids[row][bad].unique().tolist():
            labels = (sequence_ids[row] == document).nonzero().flatten().tolist()
            # Label i is token i + 1; the document's first token is no label.
            text = decode(input_ids[row, labels[0] : labels[-1] + 2], skip_special_tokens=True)
            found.append(f"row {row} ({text[:SHOWN_CHARACTERS]!r})")
    return found
