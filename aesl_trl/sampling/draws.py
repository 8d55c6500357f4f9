"""The terms of sampling: what a caller asks of an engine, what an engine returns, and how ranks share a failure.

A rank that fails must not leave the others in a collective: after its own part of a draw every rank calls
[`failure_on_any_rank`], and all of them go the same way from there.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from accelerate.utils import gather_object

from ..errors import InputError, tell


# Tokens of the prompts that transformers reads at once, and of one prompt: 128 prompts of 1,024 tokens
PROMPT_TOKENS = 131_072


@dataclass(frozen=True)
class SamplingSettings:
    """How completions are sampled. Five fields are for engines that load a model."""

    num_samples: int  # completions of each prompt
    temperature: float  # positive; the recorded figures are at temperature 1 nevertheless
    max_new_tokens: int  # length at which a sample is cut off
    batch_size: int = 64  # completions that transformers generates at once on each process
    seed: int = 0  # the draw is the same for the same weights, settings and number of processes
    tensor_parallel_size: int = 1  # vLLM's name, as are the next two
    gpu_memory_utilization: float = 0.9
    max_model_len: int | None = None
    dtype: str = "auto"  # of the weights: a name that transformers and vLLM know, or as the files have them
    trust_remote_code: bool = False  # run code that lies beside the model
    chat_template_kwargs: dict | None = None  # keywords for the chat template; those of a row come before them


class Piece(NamedTuple):
    """A part of a draw: problems `first` .. `first + num - 1`, part `chunk` of their samples, `samples` of each."""

    first: int
    num: int
    chunk: int
    samples: int


@dataclass(frozen=True)
class Request:
    """A draw as one rank sees it. All samples of a prompt are drawn on one rank."""

    prompts: list[list[int]]  # token ids of this rank's prompts
    indices: list[int]  # places of this rank's prompts among those of all ranks
    num_prompts: int  # of all ranks
    longest: int  # tokens of the longest prompt of all ranks
    settings: SamplingSettings
    piece: Piece
    model: Any  # wrapped or not; None for an engine that holds its model elsewhere
    tokenizer: Any
    accelerator: Any = None  # None in a single process without one
    gradient_checkpointing_kwargs: dict | None = None  # with which it is turned on again, where it was on
    bar: Any = None  # a progress bar over this rank's samples

    @property
    def rank_seed(self) -> int:
        """The seed of this rank's part of the piece."""
        rank = 0 if self.accelerator is None else self.accelerator.process_index
        return self.seed * 1_000_003 + rank

    @property
    def seed(self) -> int:
        """The seed of the piece."""
        return draw_seed(self.settings.seed, self.piece.first, self.piece.chunk)

    @property
    def prompt_of_each_sample(self) -> list[list[int]]:
        """This rank's prompts, each repeated for every sample of it."""
        return [prompt for prompt in self.prompts for _ in range(self.piece.samples)]

    def say(self, line: str) -> None:
        """Print `line` on the first rank."""
        if self.accelerator is None or self.accelerator.is_main_process:
            tell(line)

    def show(self, num: int) -> None:
        """Let the bar stand at `num` samples; an attempt that begins anew moves it back."""
        if self.bar is not None:
            self.bar.update(num - self.bar.n)


class Draw(NamedTuple):
    """One sample. Figures are at temperature 1, and means over its tokens where they are per token; None: unknown."""

    ids: list[int]  # sampled tokens, the stop token included
    stopped: bool  # by a stop token, not by the length limit
    entropy: float | None  # nats per token, exact
    neg_log_prob: float | None  # nats per token
    eos_prob: float | None
    text: str | None = None  # as the engine decoded it; None: the tokenizer decodes `ids`


class Engine(Protocol):
    """Draws from a model under training (generate.py, vllm_synced.py) or from a model in a folder (offline.py)."""

    name: str
    batch_size: int | None  # completions at once on each process; None where the engine decides

    def draw(self, request: Request) -> list[Draw]:
        """Return the samples of the request's first prompt, then those of the second; or raise [`SamplingFailed`]."""


class SamplingFailed(RuntimeError):
    """No samples could be drawn. Every rank raises it alike, with the first failed rank's reason in one line."""


def split_over_ranks(prompts: list[list[int]], accelerator: Any, **fields: Any) -> Request:
    """Return this rank's request for `prompts`, the token ids of all ranks; `fields` are [`Request`]'s others."""
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator is not None else (0, 1)
    mine = list(range(rank, len(prompts), world))
    return Request(
        prompts=[prompts[index] for index in mine],
        indices=mine,
        num_prompts=len(prompts),
        longest=max(map(len, prompts)),
        accelerator=accelerator,
        **fields,
    )


class Failure(NamedTuple):
    """The reason of a failed draw, and whether each rank that failed ran out of memory."""

    reason: str
    is_memory: bool


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether memory ran out: a GPU's, that of an engine behind another exception, or the machine's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("out of memory" in text.lower() or "can't allocate memory" in text)


def failure_on_any_rank(error: Exception | None, accelerator) -> Failure | None:
    """Return the same failure on all ranks, which all have to call this; None where no rank has an `error`.

    Where one rank's error is an InputError, all ranks raise it.
    """
    here = None
    if error is not None:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        here = (isinstance(error, InputError), is_out_of_memory(error), text[:500])
    found = [here] if accelerator is None or accelerator.num_processes == 1 else gather_object([here])
    failed = [(rank, *outcome) for rank, outcome in enumerate(found) if outcome is not None]
    if not failed:
        return None
    for _, is_input, _, text in failed:
        if is_input:
            raise error if isinstance(error, InputError) else InputError(text.removeprefix("InputError: "))
    # An error that is not about memory comes first: a smaller batch would not help against it
    rank, _, _, text = min(failed, key=lambda outcome: outcome[2])
    where = f" (rank {rank})" if len(found) > 1 else ""
    return Failure(text + where, all(is_memory for _, _, is_memory, _ in failed))


def draw_seed(seed: int, problem: int, chunk: int) -> int:
    """Return the seed, in 0 .. 2**32 - 1, from which part `chunk` of the samples of `problem` is drawn.

    Neighbouring seeds would not do: vLLM gives the i-th sample of a request the request's seed plus i. The first piece
    has the run's own seed.
    """
    if (problem, chunk) == (0, 0):
        return seed
    return int(np.random.SeedSequence([seed, problem, chunk]).generate_state(1)[0])
