"""Groups of samples of any engine: prompts in, completions out, a training left as it was.

Random states, train mode, gradient checkpointing and the tokenizer's padding side are restored, also when the draw
fails. The draw depends on the seed and the prompts' order, not on what the training has drawn.
"""

import random
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object

from ..diversity.figures import Group
from ..models.loading import release_memory
from ..models.tokens import row_prompt_ids
from .draws import Engine, Piece, SamplingSettings, split_over_ranks
from .generate import GenerateEngine


@contextmanager
def preserved_random_state():
    """Restore the random states of Python, NumPy and torch (CPU and accelerator) at the end of the block."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def _undisturbed(model, tokenizer):
    """Turn on eval mode and left padding inside the block; restore them and the random states at its end."""
    training = {module: module.training for module in model.modules()}
    padding_side = tokenizer.padding_side
    with preserved_random_state():
        try:
            tokenizer.padding_side = "left"
            model.eval()
            yield
        finally:
            tokenizer.padding_side = padding_side
            for module, mode in training.items():
                module.training = mode


@torch.no_grad()
def sample_groups(
    model,
    processing_class,
    rows: list[dict],
    settings: SamplingSettings,
    *,
    engine: Engine | None = None,
    piece: Piece | None = None,
    accelerator=None,
    gradient_checkpointing_kwargs: dict | None = None,
    bar: Any = None,
) -> list[Group]:
    """Sample completions of each row's `"prompt"`, and return one group a row, without rewards, on every process.

    The prompts, texts or lists of messages, are split over the accelerator's processes. `piece` is the part of all
    samples that `rows` are, by default all of them. See [`Request`] for `model`, `gradient_checkpointing_kwargs` and
    `bar`.
    When nothing could be drawn, every process raises SamplingFailed; FSDP1 is refused, and what an engine refuses.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    engine = engine or GenerateEngine(settings.batch_size)
    piece = piece or Piece(0, len(rows), 0, settings.num_samples)
    request = split_over_ranks(
        [row_prompt_ids(processing_class, row, settings.chat_template_kwargs) for row in rows],
        accelerator,
        settings=settings,
        piece=piece,
        model=model,
        tokenizer=tokenizer,
        gradient_checkpointing_kwargs=gradient_checkpointing_kwargs,
        bar=bar,
    )
    with nullcontext() if model is None else _undisturbed(model, tokenizer):
        try:
            drawn = engine.draw(request)
        finally:
            if torch.cuda.is_available():
                release_memory()  # the training has other sizes to find room for
    groups = []
    for place, index in enumerate(request.indices):
        samples = drawn[place * piece.samples : (place + 1) * piece.samples]
        group = Group(
            prompt=rows[index]["prompt"],
            completions=[
                tokenizer.decode(sample.ids, skip_special_tokens=True) if sample.text is None else sample.text
                for sample in samples
            ],
            num_tokens=[len(sample.ids) for sample in samples],
            truncated=[not sample.stopped for sample in samples],
            entropy=[sample.entropy for sample in samples],
            neg_log_prob=[sample.neg_log_prob for sample in samples],
            eos_prob=[sample.eos_prob for sample in samples],
            token_ids=[sample.ids for sample in samples],
        )
        groups.append((index, group))
    if accelerator is not None and accelerator.num_processes > 1:
        groups = gather_object(groups)
    return [group for _, group in sorted(groups, key=lambda item: item[0])]
