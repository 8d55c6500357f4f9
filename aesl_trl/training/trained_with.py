"""What a training's steps are trained with, as run.json records it, and the refusal to go on with something else.

The loss, the demonstrations and how TRL prepares them, the starting weights, PEFT's settings and the learning rate
must be those of the steps so far. `max_steps`, epochs, logging, saving and evaluation may change when a training is
resumed, and so may the number of processes and their batches, of which run.json keeps what earlier steps had.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
from accelerate.utils import is_peft_model

from .. import files
from ..errors import InputError
from ..losses.rules import TOKEN_RULES
from ..models.chat import IMAGES
from ..models.digests import tokenizer_digest, weights_digest
from ..models.folder import ModelFolder
from ..rewards.functions import reward_name
from ..sampling.draws import failure_on_any_rank
from ..values import without_none
from .config import AESLSFTConfig


# How TRL makes tokens of the rows
PREPARATION = ("dataset_text_field", "completion_only_loss", "assistant_only_loss", "max_length", "truncation_mode")
PREPARATION += ("packing", "packing_strategy", "padding_free", "eos_token")
# GRPO's loss
RL_SETTINGS = ("loss_type", "beta", "epsilon", "epsilon_high", "importance_sampling_level", "scale_rewards")
RL_SETTINGS += ("reward_weights", "num_generations", "learning_rate")
# What PEFT writes into its settings by itself
NOT_SETTINGS = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping")
MODEL, DATA = "model", "training_data"
# What is compared of the model, wherever it lies
DIGESTS = {"model_weights": weights_digest, "model_tokenizer": tokenizer_digest}
BATCH = 1000  # rows hashed at a time


def trained_with(args: Any, model: str | None, peft: dict | None, rows: Any, revision: str | None = None) -> dict:
    """Return what run.json records of a training's ingredients, ready to be compared.

    Args:
        args: an AESLSFTConfig or a SFTConfig.
        model: a folder or a name on the hub. Weights that are not on this disk are recorded as None.
        peft: what [`peft_settings`] returns.
        rows: the demonstrations. A streamed dataset is recorded as None.
    """
    names = ["loss_type"]
    if isinstance(args, AESLSFTConfig):
        base = ["t_scaling", "min_temperature", "prefix_mode", "chat_template_kwargs"]
        names = ["cold_start_loss", *dict.fromkeys([*base, *TOKEN_RULES[args.cold_start_loss].fields])]
    settings = {name: getattr(args, name) for name in (*names, *PREPARATION, "learning_rate")}
    return _recorded({**settings, **_model(model, args.output_dir, revision), DATA: data_digest(rows), "peft": peft})


def rl_trained_with(
    args: Any, start: ModelFolder, peft: dict | None, rows: Any, reward_funcs: list, revision: str | None = None
) -> dict:
    """Return what is recorded of RL's ingredients, ready to be compared; `args` is a GRPOConfig."""
    found = {name: getattr(args, name) for name in RL_SETTINGS if hasattr(args, name)}
    found |= _model(start.base or start.weights, args.output_dir, revision)
    found["adapter_weights"] = weights_digest(start.weights) if start.is_adapter else None
    found["reward_funcs"] = [reward_name(score) if callable(score) else score for score in reward_funcs]
    return _recorded({**found, DATA: data_digest(rows), "peft": peft})


def _model(model: str | None, output_dir: str, revision: str | None) -> dict:
    return {
        # A hub name stays; a local folder is named relative to the run, so that the record can move with it
        MODEL: os.path.relpath(model, output_dir) if model and os.path.isdir(model) else model,
        **{name: digest(model, revision) if model else None for name, digest in DIGESTS.items()},
    }


def _recorded(found: dict) -> dict:
    """Return `found` as it will be read from JSON."""
    return json.loads(json.dumps(files.to_json(found), default=str))


def ingredients_of(trainer: Any) -> dict:
    """Return [`trained_with`] of a trainer, made once. AESLSFTTrainer has its own, of the rows as they were given.

    Of TRL's own trainer we see the rows that it has prepared.
    """
    if not hasattr(trainer, "ingredients"):
        model = trainer.model
        peft = peft_settings(model.active_peft_config if is_peft_model(model) else None)
        name = getattr(model.config, "_name_or_path", None)
        trainer.ingredients = trained_with(trainer.args, name, peft, trainer.train_dataset)
    quantization = getattr(trainer.model.config, "quantization_config", None)
    quantization = quantization.to_dict() if hasattr(quantization, "to_dict") else quantization
    return {**trainer.ingredients, "quantization": json.loads(json.dumps(quantization, default=str))}


def peft_settings(peft_config: Any) -> dict | None:
    """Return a PEFT config's settings, as they were given; None without PEFT."""
    if peft_config is None:
        return None
    values = {name: value for name, value in peft_config.to_dict().items() if name not in NOT_SETTINGS}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}


def data_digest(rows: Any) -> str | None:
    """Return the number of rows and a hash of their contents, in their order; None for a stream.

    100,000 rows of 1 KB of text take about 4 seconds. Keys without a value do not count: a file's format adds them.
    Images do not count either: they are gigabytes.
    """
    if not hasattr(rows, "__len__"):
        return None
    digest = hashlib.sha256()
    for table in rows.with_format("arrow").iter(BATCH):
        given = {name for name in table.column_names if table[name].null_count < len(table)}
        for name in sorted(given - {*IMAGES}):
            digest.update(name.encode())
            digest.update(_column_bytes(table[name]))
    return f"{len(rows)} rows, sha256 {digest.hexdigest()}"


def _column_bytes(column: pa.ChunkedArray) -> bytes:
    kind = column.type
    if (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_integer(kind.value_type):
        lengths, ids = pa.compute.list_value_length(column), pa.compute.list_flatten(column)  # token ids, of many rows
        return b"".join(part.cast(pa.int64()).to_numpy().tobytes() for part in (lengths, ids))
    return json.dumps(without_none(column.to_pylist()), sort_keys=True, default=_plain).encode()


def _plain(value: Any) -> str:
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value)


def refuse_other_ingredients(
    found: dict, checkpoint: Path, output_dir: str | Path, recorded: dict | None = None
) -> None:
    """Refuse to go on from `checkpoint` with something else than `found`, which [`trained_with`] returns.

    `recorded` is by default the run.json beside the checkpoint. What it does not hold, such as that of an older
    version, is not compared.

    Raises:
        InputError: one line with each thing that differs, as it was and as it is now.
    """
    recorded = files.read_settings(checkpoint.absolute().parent) if recorded is None else recorded
    differences = [*_other_model(recorded, found, Path(output_dir), checkpoint.absolute().parent)]
    for name in (found.keys() & recorded.keys()) - {MODEL, *DIGESTS}:
        if not (name == DATA and None in (found[name], recorded[name])):
            differences += _differences(name, recorded[name], found[name])
    if found[DATA] is None and recorded:
        warnings.warn(
            "the training data are a stream: nobody has compared them with those of the steps so far", stacklevel=2
        )
    if differences:
        raise InputError(
            f"resume_from_checkpoint: {checkpoint} was trained with something else: {'; '.join(sorted(differences))}. "
            "Go on with what was, or train anew in another output_dir"
        )


def _other_model(recorded: dict, found: dict, output_dir: Path, run: Path) -> Iterator[str]:
    if not recorded.get(MODEL) or not found[MODEL]:
        return
    before, now = _placed(recorded[MODEL], run), _placed(found[MODEL], output_dir.absolute())
    # An older version recorded no digests. A hub name of its record is compared as a name.
    of_before = {
        name: recorded.get(name) or (digest(before) if os.path.isabs(before) else None)
        for name, digest in DIGESTS.items()
    }
    for name, kind in zip(DIGESTS, ("other weights", "another tokenizer or chat template"), strict=True):
        if None not in (of_before[name], found[name]) and of_before[name] != found[name]:
            yield f"the model {now} has {kind} than {'it' if now == before else before} had"
            return
    if None in (of_before["model_weights"], found["model_weights"]) and before != now and not os.path.isdir(now):
        yield f"the model is {now}, it was {before}"


def _placed(model: str, run: Path) -> str:
    """Return the path of a model's folder that is named relative to a run; a name on the hub stays."""
    path = os.path.normpath(run / model)
    return path if os.path.isdir(path) else model


def _differences(name: str, before: Any, now: Any) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before.keys() & now.keys():
            yield from _differences(f"{name}.{key}", before[key], now[key])
    elif before != now:
        yield f"{name} is {_shown(now)}, it was {_shown(before)}"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return str(value.get("peft_type", "set"))
    text = "unset" if value is None else str(value)
    return text if "sha256 " not in text else text[: text.index("sha256 ") + 15]


def refuse_other_training(trainer: Any, checkpoint: Path) -> None:
    """Call [`refuse_other_ingredients`] on the process that keeps the record, and raise its refusal on all."""
    error = None
    if trainer.args.should_save:
        try:
            refuse_other_ingredients(ingredients_of(trainer), checkpoint, trainer.args.output_dir)
        except InputError as refused:
            error = refused
    failure_on_any_rank(error, trainer.accelerator)
