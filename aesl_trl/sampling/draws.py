"""What engines are asked for, what they return, and how ranks agree that a draw has failed.

A rank that fails must not leave the others in a collective: every rank comes to [`agree`] after its own part of the
draw, and all go the same way from there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object

from ..errors import InputError


class Piece(NamedTuple):
    """Problems `first` .. `first + num - 1`, part `chunk` of their samples, `samples` of each."""

    first: int
    num: int
    chunk: int
    samples: int


class SamplingFailed(RuntimeError):
    """No samples could be drawn; raised on every rank alike, the message is one line."""


class Draw(NamedTuple):
    """One sample. The last three at temperature 1, per token where they are means; None where unknown."""

    ids: list[int]  # sampled tokens, the stop token included
    stopped: bool  # by a stop token, not by the length limit
    entropy: float | None  # nats, exact
    neg_log_prob: float | None  # nats
    eos_prob: float | None


@dataclass(frozen=True)
class Request:
    """What is to be drawn on this rank.

    Attributes:
        prompts: token ids of this rank's prompts; all samples of a prompt are drawn on one rank.
        indices: their places among the prompts of all ranks.
        num_prompts: of all ranks.
        longest: tokens of the longest prompt of all ranks.
        samples, temperature, max_new_tokens, seed: of [`~aesl_trl.sampling.groups.sample_groups`].
        accelerator: None in one process without one.
        say: prints one line, on the first rank.
    """

    prompts: list[list[int]]
    indices: list[int]
    num_prompts: int
    longest: int
    samples: int
    temperature: float
    max_new_tokens: int
    seed: int
    accelerator: Any
    gradient_checkpointing_kwargs: dict | None
    say: Callable[[str], None]

    @property
    def rank(self) -> int:
        return 0 if self.accelerator is None else self.accelerator.process_index


def share(prompts: list[list[int]], accelerator: Any, **settings: Any) -> Request:
    """What this rank draws of `prompts`, the token ids of each; `settings`: the other fields of [`Request`]."""
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator is not None else (0, 1)
    mine = list(range(rank, len(prompts), world))
    return Request(
        prompts=[prompts[index] for index in mine],
        indices=mine,
        num_prompts=len(prompts),
        longest=max(map(len, prompts)),
        accelerator=accelerator,
        say=accelerator.print if accelerator is not None else print,
        **settings,
    )


class Failure(NamedTuple):
    reason: str
    is_memory: bool  # out of memory on every rank that failed


def is_out_of_memory(error: BaseException) -> bool:
    """Of the GPU, of an engine behind another exception, or of the machine, as torch reports it on CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("out of memory" in text.lower() or "can't allocate memory" in text)


def agree(error: Exception | None, accelerator) -> Failure | None:
    """What went wrong on the ranks, the same on each; None where nothing did. Each rank has to call it.

    Raises:
        InputError: one rank had one; it is raised on all of them.
    """
    here = None
    if error is not None:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        here = (isinstance(error, InputError), is_out_of_memory(error), text[:500])
    found = [here] if accelerator is None or accelerator.num_processes == 1 else gather_object([here])
    failed = [(rank, one) for rank, one in enumerate(found) if one is not None]
    if not failed:
        return None
    for _, (is_input, _, text) in failed:
        if is_input:
            if isinstance(error, InputError):
                raise error
            raise InputError(text.removeprefix("InputError: "))
    # Another error than memory is the one that a smaller batch would not help against
    rank, (_, _, text) = min(failed, key=lambda item: item[1][1])
    where = f" (rank {rank})" if len(found) > 1 else ""
    return Failure(text + where, all(is_memory for _, (_, is_memory, _) in failed))


def draw_seed(seed: int, problem: int, chunk: int) -> int:
    """The seed from which part `chunk` of the samples of `problem` is drawn, in 0 .. 2**32 - 1.

    Seeds beside each other would not do: vLLM gives the i-th sample of a request the request's seed plus i. The first
    piece has the run's own seed.
    """
    if (problem, chunk) == (0, 0):
        return seed
    return int(np.random.SeedSequence([seed, problem, chunk]).generate_state(1)[0])
