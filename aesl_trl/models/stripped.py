"""Name the special tokens of content that decoding leaves out, so that no reward ever sees them.

GRPOTrainer decodes with `skip_special_tokens=True`, and so do our samples: a reward sees what RL will show it.
"""

import warnings
from collections.abc import Iterable

from jinja2 import TemplateError

from ..errors import InputError
from .tokens import CONVERSATION, rendered, special_ids, stop_ids


SHOWN_TOKENS = 6


def stripped_tokens(tokenizer, trained: Iterable[int] = ()) -> list[str]:
    """Return the special tokens in what an assistant says, by its turn in the chat template and by `trained` ids.

    Tokens that end a turn, and those with which the template writes the turns of others, are no content.
    """
    special = special_ids(tokenizer) - {*stop_ids(tokenizer, None), tokenizer.bos_token_id, tokenizer.pad_token_id}
    others, said = _turns(tokenizer)
    found = (said | (set(trained) - others)) & special
    return [tokenizer.convert_ids_to_tokens(index) for index in sorted(found)]


def _turns(tokenizer) -> tuple[set[int], set[int]]:
    """Return the ids in the turns of system and user, and those that the template writes in the assistant's turn."""
    if tokenizer.chat_template is None:
        return set(), set()
    system, others, said = {"role": "system", "content": "Be brief."}, set(), []
    asked = {"add_generation_prompt": True}
    for messages, kwargs in (([system, *CONVERSATION[:1]], asked), (CONVERSATION[:1], asked), (CONVERSATION, {})):
        try:
            text = rendered(tokenizer, messages, **kwargs)
        except (InputError, TemplateError, TypeError):  # a template may know no system message
            continue
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if messages is CONVERSATION:
            start = next((at for at, (one, two) in enumerate(zip(ids, said, strict=False)) if one != two), len(said))
            return others, set(ids[start:])
        said = ids
        others |= set(ids)
    return others, set()


def warn_of_stripped_tokens(tokenizer, trained: Iterable[int] = ()) -> None:
    """Warn once where rewards will not see a special token that the model is to write."""
    found = stripped_tokens(tokenizer, trained)
    if found:
        shown = ", ".join(found[:SHOWN_TOKENS]) + (", ..." if len(found) > SHOWN_TOKENS else "")
        warnings.warn(
            f"rewards will not see {shown}: GRPOTrainer and the diversity samples leave special tokens out of the "
            'text; where a reward is about them, let it read `completion_ids`, or mark them `"special": false` in '
            "tokenizer.json",
            stacklevel=2,
        )
