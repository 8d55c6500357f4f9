"""Find the longest sequence that a model can take, and refuse longer ones before the model loads.

Only models with a table of positions have such a limit (OPT, GPT-2, GPT-J): beyond it an index is out of range, which
on a GPU ends the process. Rotary models go on beyond `max_position_embeddings`, as transformers lets them.
"""

from typing import Any

import torch

from ..errors import InputError
from .skeleton import skeleton


RESERVED = 4  # rows of a table before the first position: OPT and BART have two
# Tables that are not embeddings: those of GPT-J and CodeGen are buffers
TABLE = "embed_positions"


def num_positions(model: Any) -> int | None:
    """Return the size of the model's table of positions; None where it has none."""
    text = model.config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if not limit or getattr(text, "rope_parameters", None):  # rotary positions are computed
        return None
    words = model.get_input_embeddings()
    modules = [module for module in model.modules() if isinstance(module, torch.nn.Embedding) and module is not words]
    sizes = [module.num_embeddings for module in modules]
    sizes += [len(buffer) for name, buffer in model.named_buffers() if name.rpartition(".")[2] == TABLE]
    return limit if any(limit <= size <= limit + RESERVED for size in sizes) else None


def num_positions_at(place: str, **kwargs) -> int | None:
    """Return [`num_positions`] of the model in the folder or hub name `place`; its weights are not read.

    The config alone does not tell learned positions from computed ones, so the model is built without memory.
    """
    try:
        return num_positions(skeleton(place, **kwargs))
    except (ValueError, ImportError):  # code of the model's own, or no language model
        return None


def check_prompt_tokens(prompts: list[list[int]], most: int, *, field: str) -> None:
    """Refuse the longest prompt, given as token ids, if it has more than `most` tokens. `field` names the prompts.

    Rotary models would read on, until the memory of the machine ends.
    """
    lengths = [len(prompt) for prompt in prompts]
    if (longest := max(lengths, default=0)) > most:
        raise InputError(
            f"{field}: the prompt of row {lengths.index(longest)} (from 0) has {longest} tokens, and at most {most} "
            "are read at once: take longer prompts out"
        )


def check_room(limit: int, prompts: list[list[int]], new_tokens: int, *, field: str, setting: str) -> None:
    """Refuse the longest prompt, given as token ids, if it leaves no room for `new_tokens` within `limit` positions.

    `field` names the prompts, and `setting` the number of new tokens.
    """
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths, default=0)
    if longest + new_tokens > limit:
        room = f"set {setting} to {limit - longest} or less" if longest < limit else "take longer prompts out"
        raise InputError(
            f"{field}: the prompt of row {lengths.index(longest)} (from 0) has {longest} tokens, and with "
            f"{setting}={new_tokens} the model's {limit} positions are not enough: {room}"
        )
