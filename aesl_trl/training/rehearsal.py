"""A rehearsal: TRL's trainer is built on a model without weights, so that a setting is refused before they load.

Many settings only TRL, PEFT and transformers can judge, and they do so in the constructor of the trainer, or when it
makes its optimizer. Both run here in a second or two, with the first rows of the data.
"""

import copy
import logging
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
from transformers import AutoProcessor
from transformers.integrations.liger import apply_liger_kernel
from transformers.trainer_pt_utils import AcceleratorConfig
from trl import get_peft_config

from ..errors import InputError, in_one_line
from ..models.peft_settings import check_peft_config, list_as_written
from ..models.skeleton import access_of, skeleton


ROWS = 8  # rows that the rehearsal prepares
# Modules whose refusal of a setting is told to the user. Of any other error the traceback is kept.
LIBRARIES = ("trl", "peft", "transformers", "accelerate", "datasets", "huggingface_hub", "bitsandbytes", "torch.optim")
NEEDS_PEFT = ("lora_target_modules", "lora_target_parameters", "lora_modules_to_save")
# What a rehearsal must not do, and what it has no use for: make a repository on the hub, start vLLM, load a reference
# model, start processes for the data, print a bar
QUIET = {"push_to_hub": False, "use_vllm": False, "beta": 0.0, "dataset_num_proc": None, "disable_tqdm": True}
QUIET |= {"model_init_kwargs": None, "sync_ref_model": False}


def rehearse(
    kind: type, model: str, args: Any, rows: Any, *, eval_rows: Any = None, peft_config: Any = None, **more: Any
) -> None:
    """Build the trainer `kind`, and its optimizer and schedule, on `model` without weights.

    The arguments are those of the real trainer, and none is changed. PEFT's settings are checked against the names of
    the model's modules.

    Raises:
        InputError: what a library refuses, in its own words.
    """
    access, attention = access_of(args), (args.model_init_kwargs or {}).get("attn_implementation")
    with silence():
        try:
            with refusals_in_one_line():
                network = skeleton(model, attn_implementation=attention, **access)
                if peft_config is not None:
                    check_peft_config(peft_config, network, prefix="lora_")
                if args.deepspeed_plugin is not None:  # accelerate takes it once in a process, for the real trainer
                    return
                trainer = kind(
                    model=network,
                    args=_quiet(args),
                    train_dataset=_first(rows),
                    eval_dataset=None if eval_rows is None else _first(eval_rows),
                    processing_class=AutoProcessor.from_pretrained(model, **access),
                    peft_config=copy.deepcopy(peft_config),
                    **more,
                )
                if args.use_liger_kernel:
                    apply_liger_kernel(trainer.model, args.liger_kernel_config)
                trainer.create_optimizer_and_scheduler(num_training_steps=max(args.max_steps, 1))
        except InputError:
            raise
        except Exception as error:  # it may have failed for want of weights: the real trainer will tell
            logging.getLogger(__name__).debug("no rehearsal: %s", error)


def _quiet(args: Any) -> Any:
    """Return a copy of the trainer's arguments with which a model without weights can be built into a trainer."""
    settings = copy.copy(args)
    # A model without weights cannot be put on a device
    settings.__class__ = type(type(args).__name__, (type(args),), {"place_model_on_device": False})
    for name, value in vars(args).items():  # TRL writes into some of them
        if isinstance(value, dict | list | AcceleratorConfig):
            setattr(settings, name, copy.deepcopy(value))
    for name in QUIET.keys() & vars(args).keys():
        setattr(settings, name, QUIET[name])
    return settings


def _first(rows: Any) -> Any:
    """Return the first rows, as a stream where `rows` are one."""
    return rows.select(range(min(ROWS, len(rows)))) if hasattr(rows, "__len__") else rows.take(ROWS)


@contextmanager
def silence() -> Iterator[None]:
    """Keep warnings and progress bars back: the real trainer shows them again."""
    had_bars, level = not datasets.are_progress_bars_disabled(), logging.root.manager.disable
    datasets.disable_progress_bars()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        if had_bars:
            datasets.enable_progress_bars()


@contextmanager
def refusals_in_one_line() -> Iterator[None]:
    """Turn what a library refuses into an InputError with the library's own sentence."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        library = _refused_by(error)
        if library is None:
            raise
        raise InputError(f"{library} refuses this: {in_one_line(error, 2000)}") from error


def peft_config_of(model_args: Any) -> Any:
    """Return the PEFT config that TRL's ModelConfig asks for, as the user wrote it; None without `use_peft`."""
    unread = [name for name in NEEDS_PEFT if getattr(model_args, name) is not None and not model_args.use_peft]
    if unread:
        warnings.warn(f"{unread[0]} is set, but use_peft is not: there will be no adapter", stacklevel=2)
    with refusals_in_one_line():
        return list_as_written(get_peft_config(model_args))


def _refused_by(error: Exception) -> str | None:
    """Return the library that refuses a value; None where the error may be a mistake in a program."""
    frame, _ = list(traceback.walk_tb(error.__traceback__))[-1]
    module = frame.f_globals.get("__name__", "") + "."
    library = next((name for name in LIBRARIES if module.startswith(f"{name}.")), None)
    # Some are refused by another kind of error, such as RuntimeError for a tracker that is not installed.
    is_raised = (traceback.extract_tb(error.__traceback__)[-1].line or "").startswith("raise ")
    return library if is_raised or isinstance(error, ValueError | TypeError | ImportError) else None
