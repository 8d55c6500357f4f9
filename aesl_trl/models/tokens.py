"""Prompts as token ids, and the tokens that end a completion: chosen once, then written into every file of a model."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from jinja2 import TemplateError
from torch import Tensor

from ..errors import InputError
from ..files import read_json, write_json
from ..values import without_none
from .chat import ChatWriter, template_kwargs
from .folder import CONFIG, GENERATION_CONFIG


# A turn to read the chat template by; a folder without samples of its own is scored on it as well.
CONVERSATION = [
    {"role": "user", "content": "Count from one to five."},
    {"role": "assistant", "content": "one two three four five"},
]


def tokenizer_of(processing_class):
    """Return the tokenizer itself, or that of a vision-language model's processor."""
    return getattr(processing_class, "tokenizer", processing_class)


# ---- Prompts


def prompt_ids(processing_class, prompt: str | list[dict], **kwargs) -> list[int]:
    """Encode a prompt as TRL does: text with the tokenizer's special tokens, messages with the template's alone.

    `kwargs` are for the chat template, as [`~aesl_trl.models.chat.template_kwargs`] reads them off a row.
    """
    tokenizer = tokenizer_of(processing_class)
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    if processing_class.chat_template is None:
        raise InputError("the prompts are conversations, and the tokenizer has no chat template")
    text = ChatWriter(processing_class).apply_chat_template(
        prompt, tokenize=False, add_generation_prompt=True, **kwargs
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def row_prompt_ids(processing_class, row: dict, defaults: dict | None = None) -> list[int]:
    """Encode the prompt of a row with what the row says of its template, and `defaults` where it says nothing."""
    return prompt_ids(processing_class, without_none(row["prompt"]), **template_kwargs(row, defaults))


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
            "model's, or was enlarged without model.resize_token_embeddings (or the adapter was saved without "
            "save_embedding_layers=True)"
        )


# ---- What ends a completion


def id_list(ids: int | list[int] | None) -> list[int]:
    """Return the token ids of a config, which may be one, several or none, as a list."""
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def special_ids(tokenizer) -> set[int]:
    """Return the ids that a decoder with `skip_special_tokens` leaves out."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def rendered(tokenizer, messages: list[dict], **kwargs) -> str:
    """Render messages of text, also by a template that shows lists of content parts alone (vision-language models)."""
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
    except (TemplateError, TypeError):
        return tokenizer.apply_chat_template(parts, tokenize=False, **kwargs)
    shown = messages[-1]["content"] in text
    return text if shown else tokenizer.apply_chat_template(parts, tokenize=False, **kwargs)


def turn_end_id(tokenizer, *, strict: bool = False) -> int | None:
    """Return the added token right after an assistant's text in the chat template; None where there is none.

    The token need not be marked as special: no plain text is split into it either way. A template that refuses the
    conversation, or does not show its text, has none; with `strict` the error is raised.
    """
    if tokenizer.chat_template is None:
        return None
    answer = CONVERSATION[1]["content"]
    try:
        text = rendered(tokenizer, CONVERSATION)
        if answer not in text:
            raise InputError("the chat template does not show the assistant's text")
    except (InputError, TemplateError, TypeError):
        if strict:
            raise
        return None
    after = text.rpartition(answer)[2].lstrip()
    ids = tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
    return ids[0] if ids and _is_added(tokenizer, ids[0]) else None


def _is_added(tokenizer, index: int) -> bool:
    return index in tokenizer.added_tokens_decoder or index in tokenizer.all_special_ids


def stop_ids(tokenizer, declared: int | list[int] | None) -> list[int]:
    """Return every token that ends a completion, the tokenizer's eos first: nothing else decides what ends a sample.

    Those are the tokenizer's eos, the token that ends an assistant's turn in the chat template, and the tokens that a
    generation config declares (`declared`, its `eos_token_id`).
    """
    turn_end = turn_end_id(tokenizer)
    return list(dict.fromkeys([*id_list(tokenizer.eos_token_id), *id_list(turn_end), *id_list(declared)]))


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

    eos is what [`stop_ids`] says of the added tokens that the generation config `declared` names; a plain token would
    cut texts short, and is dropped. pad is the tokenizer's, else its eos, as in GRPOTrainer.
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
    eos = stop_ids(tokenizer, [index for index in before if _is_added(tokenizer, index)])
    changes += [f"generation_config: eos_token_id {index} added" for index in eos if index not in before]
    changes += [f"generation_config: eos_token_id {index} removed" for index in before if index not in eos]
    if declared.get("pad_token_id") != tokenizer.pad_token_id:
        changes.append(f"generation_config: pad_token_id {declared.get('pad_token_id')} -> {tokenizer.pad_token_id}")
    check_ids(tokenizer, (*eos, tokenizer.pad_token_id), num_rows)
    turn_end = None if turn_end is None else tokenizer.convert_ids_to_tokens(turn_end)
    return Stops(eos, tokenizer.pad_token_id, turn_end, changes)


def write_stops(folder: Path, processing_class, declared: dict, stops: Stops) -> None:
    """Write tokenizer, generation_config.json and, where there is one, config.json, all with the same eos and pad."""
    ids = {"eos_token_id": stops.eos[0] if len(stops.eos) == 1 else stops.eos, "pad_token_id": stops.pad}
    processing_class.save_pretrained(folder)
    write_json(folder / GENERATION_CONFIG, {**json.loads(json.dumps(declared, default=str)), **ids})
    if (folder / CONFIG).is_file():
        config = read_json(folder / CONFIG)
        if isinstance(config.get("text_config"), dict):
            config["text_config"] |= ids
        write_json(folder / CONFIG, {**config, **ids})
