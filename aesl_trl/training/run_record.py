"""What a training says of itself in its run folder: run.json before the first step, the log after the last."""

import os
import shutil
from pathlib import Path
from typing import Any

from .. import files
from ..losses.rules import TOKEN_RULES
from ..provenance import package_versions
from .candidates import forget_candidates
from .config import AESLSFTConfig


def write_record(trainer: Any, rule: dict | None) -> None:
    """Write run.json. `rule` is what DiversityCallback selects by, which `aesl select` repeats; None without one."""
    args, config = trainer.args, trainer.model.config
    model, quantization = getattr(config, "_name_or_path", None), getattr(config, "quantization_config", None)
    loss = {}
    if isinstance(args, AESLSFTConfig):
        names = ["t_scaling", "min_temperature", "prefix_mode", "diversity_metric", "diversity_patience"]
        names += ["best_eval_metric", *TOKEN_RULES[args.cold_start_loss].fields]
        loss = {"cold_start_loss": args.cold_start_loss, **{name: getattr(args, name) for name in names}}
    described = {
        "stage": "sft",
        **loss,
        **(rule or {"selection": None}),
        # A hub name stays; a local folder is named relative to the run, so that the record can move with it
        "model": os.path.relpath(model, args.output_dir) if model and os.path.isdir(model) else model,
        # The handoff merges into, or continues on, a base that is quantized as it was in training
        "quantization": quantization.to_dict() if hasattr(quantization, "to_dict") else quantization,
        "model_type": config.model_type,
        "seed": args.seed,
        "num_processes": trainer.accelerator.num_processes,
        "max_steps": trainer.state.max_steps,
        "learning_rate": args.learning_rate,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "versions": package_versions(),
    }
    files.write_json(files.own_folder(args.output_dir) / files.RUN, described)


def write_log(trainer: Any) -> None:
    """Write Trainer's state, which holds the log, to our own part of its folder."""
    if trainer.is_world_process_zero():
        path = files.own_folder(trainer.args.output_dir) / files.TRAINER_STATE
        path.parent.mkdir(parents=True, exist_ok=True)
        trainer.state.save_to_json(str(path))


def forget_after(output_dir: str | Path, step: int) -> None:
    """Drop what a former run in this folder left behind `step`, all of it at step 0: it would be taken for this run's.

    A training that starts anew also moves what version 0.1.0 left in the output folder itself to its own part.
    """
    if step == 0:
        files.renew_own_folder(output_dir)
    own = files.own_folder(output_dir)
    rows = files.read_jsonl(own / files.DIVERSITY) if (own / files.DIVERSITY).exists() and step > 0 else []
    if rows:
        files.write_jsonl(own / files.DIVERSITY, [row for row in rows if row["step"] <= step])
    else:
        (own / files.DIVERSITY).unlink(missing_ok=True)
    (own / files.SELECTION).unlink(missing_ok=True)
    (own / files.READINESS).unlink(missing_ok=True)
    if step == 0:
        shutil.rmtree(own / files.SELECTED, ignore_errors=True)
    for samples in (own / files.SAMPLES).glob("step-*.jsonl"):
        if int(samples.stem.removeprefix("step-")) > step:
            samples.unlink()
    forget_candidates(own / files.CANDIDATES, step)
