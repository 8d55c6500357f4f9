"""Prompts as token ids, and the tokens that end a completion: chosen once, then written into every file of a model."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from ..errors import InputError
from ..files import read_json, write_json
from .folder import CONFIG, GENERATION_CONFIG


# A turn to read the chat template by; a folder without samples of its own is scored on it as well.
CONVERSATION = [
    {"role": "user", "content": "Count from one to five."},
    {"role": "assistant", "content": "one two three four five"},
]


# ---- Prompts


def prompt_ids(processing_class, prompt: str | list[dict]) -> list[int]:
    """Encode a prompt as TRL does: text with the tokenizer's special tokens, messages with the template's alone."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    if processing_class.chat_template is None:
        raise InputError("the prompts are conversations, and the tokenizer has no chat template")
    text = processing_class.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def without_none(prompt: Any) -> Any:
    """Drop the keys of messages that hold None, which Arrow adds: a template would see `tool_calls: None`."""
    if not isinstance(prompt, list):
        return prompt
    return [{key: value for key, value in message.items() if value is not None} for message in prompt]


def left_pad(rows: list[list[int]], pad_id: int, device) -> tuple[Tensor, Tensor]:
    """Return `rows` as token ids and attention mask, each `[N, L]`, padded on the left.

    `tokenizer.pad` would not do: Llama's tokenizers have no padding token.
    """
    width = max(map(len, rows))
    ids_NL = torch.tensor([[pad_id] * (width - len(row)) + row for row in rows], device=device)
    mask_NL = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids_NL, mask_NL


def check_ids(tokenizer, ids: Iterable[int], num_rows: int, where: str = "") -> None:
    """Refuse a token without one of the model's `num_rows` embeddings: on a GPU it would fail a kernel's assertion."""
    highest = max(ids, default=0)
    if highest >= num_rows:
        token = tokenizer.convert_ids_to_tokens(highest)
        raise InputError(
            f"{where}token {token} has id {highest}, the model {num_rows} embeddings: the tokenizer is another "
            "model's, or was enlarged without model.resize_token_embeddings"
        )


# ---- What ends a completion


def id_list(ids: int | list[int] | None) -> list[int]:
    """Return the token ids of a config, which may be one, several or none, as a list."""
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def special_ids(tokenizer) -> set[int]:
    """Return the ids that no plain text encodes to."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def turn_end_id(tokenizer, *, strict: bool = False) -> int | None:
    """Return the special token right after an assistant's text in the chat template; None where there is none.

    A template that refuses the conversation, or does not show its text, has none; with `strict` the error is raised.
    """
    if tokenizer.chat_template is None:
        return None
    answer = CONVERSATION[1]["content"]
    try:
        text = tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
        if answer not in text:
            raise InputError("the chat template does not show the assistant's text")
    except (InputError, TemplateError, TypeError):
        if strict:
            raise
        return None
    after = text.rpartition(answer)[2].lstrip()
    ids = tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
    return ids[0] if ids and ids[0] in special_ids(tokenizer) else None


def stop_ids(tokenizer, model) -> list[int]:
    """Return every token that ends a completion: those of the model's generation config, and the tokenizer's eos."""
    declared = id_list(getattr(getattr(model, "generation_config", None), "eos_token_id", None))
    return sorted({*declared, *id_list(tokenizer.eos_token_id)})


def stop_at_turn_end(model, tokenizer) -> None:
    """Let the token that ends an assistant's turn end a completion: a base model's own files name another token."""
    turn_end, ids = turn_end_id(tokenizer), stop_ids(tokenizer, model)
    if turn_end is not None and turn_end not in ids:
        model.generation_config.eos_token_id = [*ids, turn_end]


# ---- Making all files of a model agree


@dataclass(frozen=True)
class Stops:
    """Ids that end a completion (`eos`) and pad it, and what had to change for all files to agree."""

    eos: list[int]
    pad: int
    turn_end: str | None
    changes: list[str]


def agree_on_stops(tokenizer, declared: dict, num_rows: int) -> Stops:
    """Choose eos and pad, and set them on `tokenizer`.

    eos is the tokenizer's, and the token that ends an assistant's turn in the chat template. Special tokens that the
    generation config `declared` names stay; a plain token would cut texts short and is dropped. pad is the
    tokenizer's, else its eos, as in GRPOTrainer.
    """
    changes, turn_end = [], turn_end_id(tokenizer, strict=True)
    if tokenizer.eos_token_id is None:
        if turn_end is None:
            raise InputError("nothing ends a completion: no eos_token in the tokenizer, no special token after a turn")
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(turn_end)
        changes.append(f"tokenizer: eos_token set to {tokenizer.eos_token}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
        changes.append(f"tokenizer: pad_token set to {tokenizer.pad_token}")
    before = id_list(declared.get("eos_token_id"))
    kept = [index for index in before if index in special_ids(tokenizer)]
    eos = list(dict.fromkeys([tokenizer.eos_token_id, *id_list(turn_end), *kept]))
    changes += [f"generation_config: eos_token_id {index} added" for index in eos if index not in before]
    changes += [f"generation_config: eos_token_id {index} removed" for index in before if index not in eos]
    if declared.get("pad_token_id") != tokenizer.pad_token_id:
        changes.append(f"generation_config: pad_token_id {declared.get('pad_token_id')} -> {tokenizer.pad_token_id}")
    check_ids(tokenizer, (*eos, tokenizer.pad_token_id), num_rows)
    turn_end = None if turn_end is None else tokenizer.convert_ids_to_tokens(turn_end)
    return Stops(eos, tokenizer.pad_token_id, turn_end, changes)


def write_stops(folder: Path, tokenizer, declared: dict, stops: Stops) -> None:
    """Write tokenizer, generation_config.json and, where there is one, config.json, all with the same eos and pad."""
    ids = {"eos_token_id": stops.eos[0] if len(stops.eos) == 1 else stops.eos, "pad_token_id": stops.pad}
    tokenizer.save_pretrained(folder)
    write_json(folder / GENERATION_CONFIG, {**json.loads(json.dumps(declared, default=str)), **ids})
    if (folder / CONFIG).is_file():
        config = read_json(folder / CONFIG)
        if isinstance(config.get("text_config"), dict):
            config["text_config"] |= ids
        write_json(folder / CONFIG, {**config, **ids})
