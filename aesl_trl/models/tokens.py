"""The tokens that end a completion: decided once, and written alike into every file that names them.

No model is loaded, and nothing is sampled: that the stops work is seen in handoff_checks.py.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from ..errors import InputError
from ..files import read_json, write_json
from .folder import CONFIG, GENERATION_CONFIG


# A turn to read the chat template by; also what is scored where a folder has no samples of its own.
CONVERSATION = [
    {"role": "user", "content": "Count from one to five."},
    {"role": "assistant", "content": "one two three four five"},
]


@dataclass(frozen=True)
class Stops:
    """Ids that end a completion (`eos`) and pad it, and what had to change for all files to agree."""

    eos: list[int]
    pad: int
    turn_end: str | None
    changes: list[str]


def stop_ids(tokenizer, model) -> list[int]:
    """Every token that ends a completion: those of the generation config and the tokenizer's."""
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    return sorted({*ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})


def turn_end_token(tokenizer) -> int | None:
    """The special token right after an assistant's text in the chat template; None where there is none."""
    if tokenizer.chat_template is None:
        return None
    text = tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    start = text.rfind(CONVERSATION[1]["content"])
    if start < 0:
        raise InputError("the chat template does not show the assistant's text")
    after = text[start + len(CONVERSATION[1]["content"]) :].lstrip()
    ids = tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
    return ids[0] if ids and ids[0] in special_ids(tokenizer) else None


def special_ids(tokenizer) -> set[int]:
    """Ids that no plain text encodes to."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def agree_on_stops(tokenizer, declared: dict, num_rows: int) -> Stops:
    """Decide eos and pad, and set them on `tokenizer`.

    eos is the tokenizer's, the token that ends an assistant's turn in the chat template, and what the generation
    config declares besides, if that is a special token: a plain token there would cut texts short. pad is the
    tokenizer's, else its eos, as GRPOTrainer does.
    """
    changes, turn_end = [], turn_end_token(tokenizer)
    if tokenizer.eos_token_id is None:
        if turn_end is None:
            raise InputError("nothing ends a completion: no eos_token in the tokenizer, no special token after a turn")
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(turn_end)
        changes.append(f"tokenizer: eos_token set to {tokenizer.eos_token}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
        changes.append(f"tokenizer: pad_token set to {tokenizer.pad_token}")
    before = _as_list(declared.get("eos_token_id"))
    kept = [index for index in before if index in special_ids(tokenizer)]
    eos = list(dict.fromkeys(filter(lambda index: index is not None, [tokenizer.eos_token_id, turn_end, *kept])))
    changes += [f"generation_config: eos_token_id {index} added" for index in eos if index not in before]
    changes += [f"generation_config: eos_token_id {index} removed" for index in before if index not in eos]
    if declared.get("pad_token_id") != tokenizer.pad_token_id:
        changes.append(f"generation_config: pad_token_id {declared.get('pad_token_id')} -> {tokenizer.pad_token_id}")
    check_ids(tokenizer, (*eos, tokenizer.pad_token_id), num_rows)
    return Stops(
        eos, tokenizer.pad_token_id, None if turn_end is None else tokenizer.convert_ids_to_tokens(turn_end), changes
    )


def check_ids(tokenizer, ids: Iterable[int], num_rows: int, where: str = "") -> None:
    """Refuse a token that the model has no embedding for: on a GPU it would end in an assertion of a kernel.

    `where` opens the message.
    """
    highest = max(ids, default=0)
    if highest >= num_rows:
        token = tokenizer.convert_ids_to_tokens(highest)
        raise InputError(
            f"{where}token {token} has id {highest}, the model {num_rows} embeddings: the tokenizer is another "
            "model's, or was enlarged without model.resize_token_embeddings"
        )


def _as_list(value: int | list[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)


def write_stops(folder: Path, tokenizer, declared: dict, stops: Stops) -> None:
    """Tokenizer, generation_config.json and, where there is one, config.json, all with the same eos and pad."""
    eos = stops.eos[0] if len(stops.eos) == 1 else stops.eos
    ids = {"eos_token_id": eos, "pad_token_id": stops.pad}
    tokenizer.save_pretrained(folder)
    write_json(folder / GENERATION_CONFIG, {**json.loads(json.dumps(declared, default=str)), **ids})
    if (folder / CONFIG).is_file():
        config = read_json(folder / CONFIG)
        nested = (
            {"text_config": {**config["text_config"], **ids}} if isinstance(config.get("text_config"), dict) else {}
        )
        write_json(folder / CONFIG, {**config, **nested, **ids})


def stop_at_turn_end(model, tokenizer) -> None:
    """Let the token that ends an assistant's turn end a completion: a base model's own files name another one."""
    turn_end, ids = end_of_turn(tokenizer), stop_ids(tokenizer, model)
    if turn_end is not None and turn_end not in ids:
        model.generation_config.eos_token_id = [*ids, turn_end]


def end_of_turn(tokenizer) -> int | None:
    """The token that ends an assistant's turn; None where the template does not tell."""
    try:
        return turn_end_token(tokenizer)
    except (InputError, TemplateError, TypeError):  # a template that the conversation does not suit
        return None


def prompt_tokens(tokenizer, prompt: str | list[dict]) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    if tokenizer.chat_template is None:
        raise InputError("the run's prompts are conversations, and the tokenizer has no chat template")
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def without_none(prompt: Any) -> Any:
    # Arrow gives every message the keys of all: a template would see `tool_calls: None` where there are none.
    if not isinstance(prompt, list):
        return prompt
    return [{key: value for key, value in message.items() if value is not None} for message in prompt]
