"""What the mains of SFT and GRPO share: checks before the model loads, how it loads, and how a training has ended.

Data, rewards and the trainers themselves are each main's own.
"""

import importlib.util
import math
import os
import sys
from pathlib import Path
from typing import Any

from .errors import UNFINISHED, InputError


def check_quantization(model_args: Any) -> None:
    if (model_args.load_in_4bit or model_args.load_in_8bit) and importlib.util.find_spec("bitsandbytes") is None:
        raise InputError("load_in_4bit and load_in_8bit need the package bitsandbytes: pip install 'aesl_trl[qlora]'")


def check_exists(name: str, value: Any) -> None:
    """Refuse a path that is not there; `org/name` may be a model on the hub and passes."""
    is_path = isinstance(value, str) and (os.path.isabs(value) or value.startswith(".") or value.count("/") > 1)
    if is_path and not Path(value).exists():
        raise InputError(f"{name}: {value} does not exist")


def model_init_kwargs(model_args: Any, training_args: Any) -> dict:
    """Keyword arguments for loading the model, as TRL's scripts put them together; those of the config win."""
    return {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }


def check_gradients(log_history: list[dict]) -> None:
    """Stop before saving when the gradient is not finite: Trainer logs a NaN loss as 0.0 and ends with exit code 0."""
    norms = [(row["step"], row["grad_norm"]) for row in log_history if row.get("grad_norm") is not None]
    if norms and not math.isfinite(norms[-1][1]):
        first = next(step for step, norm in norms if not math.isfinite(norm))
        raise InputError(
            f"the gradient is {norms[-1][1]} since step {first}: not saved; lower learning_rate or max_grad_norm"
        )


def check_finished(trainer: Any, command: str) -> None:
    """Exit with [`~aesl_trl.errors.UNFINISHED`] before the last step.

    A signal with enable_jit_checkpoint saves and returns as if all steps were done; what follows must not believe it.
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
