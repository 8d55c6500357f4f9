"""Hashes that tell a model's weights and its tokenizer from others, wherever they lie."""

import hashlib
from pathlib import Path

import torch
from huggingface_hub import snapshot_download

from ..files import read_object
from .folder import TOKENIZER_CONFIG, open_tensors


CORNER = 16  # rows and columns that are read of each tensor
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja")


def weights_digest(model: str, revision: str | None = None) -> str | None:
    """Return the hash of the weights in a folder, or of a name on the hub; None where no safetensors are on this disk.

    The hash covers each tensor's name and shape and its first values, in bfloat16: a copy in float32, or in other
    shards, is the same model. A training changes values of every tensor that it trains.
    """
    folder = folder_of(model, revision)
    tensors = open_tensors(folder) if folder else {}
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        shape = tensor.get_shape()
        corner = tensor[tuple(slice(CORNER) for _ in shape)] if shape else tensor[...]
        digest.update(f"{name} {shape}".encode())
        digest.update(corner.to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest() if tensors else None


def tokenizer_digest(model: str, revision: str | None = None) -> str | None:
    """Return the hash of the vocabulary, the chat template and the eos token of a model; None where they are not here.

    `model` is a folder or a name on the hub.
    """
    folder = folder_of(model, revision)
    found = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()] if folder else []
    digest = hashlib.sha256()
    for path in found:
        digest.update(path.read_bytes())
    if found:
        config = read_object(folder / TOKENIZER_CONFIG)
        digest.update(f"{config.get('chat_template')} {config.get('eos_token')}".encode())
    return digest.hexdigest() if found else None


def folder_of(model: str, revision: str | None = None) -> Path | None:
    """Return the folder of a model on this disk, the hub's cache included."""
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (OSError, ValueError):  # not in the cache, or no name of the hub
        return None
