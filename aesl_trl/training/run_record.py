"""What a training says of itself in its run folder: run.json before the first step, the log after the last."""

import shutil
from pathlib import Path
from typing import Any

from .. import files
from ..provenance import package_versions
from .candidates import forget_candidates
from .trained_with import ingredients_of


FOUND, EFFECTIVE = "t_scaling_found", "weight_effective"  # keys of Trainer's log, and so of each checkpoint


def found_by(state: Any) -> dict[str, float]:
    """Return what a training has found, by its log so far: `t_scaling` where that is "auto", and its last weight."""
    return {name: row[name] for row in state.log_history for name in (FOUND, EFFECTIVE) if name in row}


def write_record(trainer: Any, rule: dict | None) -> None:
    """Write run.json. `rule` is what DiversityCallback selects by, which `aesl select` repeats; None without one.

    A resumed training keeps, in the list `earlier`, what the steps before were trained with where it is another.
    """
    args, config = trainer.args, trainer.model.config
    selecting = ("diversity_metric", "diversity_patience", "best_eval_metric")
    described = {
        "stage": "sft",
        **{name: getattr(args, name) for name in selecting if hasattr(args, name)},
        **(rule or {"selection": None}),
        # With the quantization: the handoff merges into, or continues on, a base that is quantized as in training
        **ingredients_of(trainer),
        **found_by(trainer.state),
        "model_type": config.model_type,
        "seed": args.seed,
        "num_processes": trainer.accelerator.num_processes,
        "max_steps": trainer.state.max_steps,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "versions": package_versions(),
    }
    described["earlier"] = _earlier(described, files.read_settings(Path(args.output_dir)), trainer.state.global_step)
    files.write_json(files.own_folder(args.output_dir) / files.RUN, described)


def _earlier(described: dict, before: dict, step: int) -> list[dict]:
    """Return what the steps up to `step` were trained with, where `described` says something else of it."""
    if step == 0:
        return []
    compared = before.keys() - {"earlier", EFFECTIVE}
    changed = {name: before[name] for name in before if name in compared and before[name] != described.get(name)}
    return [*before.get("earlier", []), *([{"until_step": step, **changed}] if changed else [])]


def renew_record(trainer: Any) -> None:
    """Write into run.json what the training has found since its first step."""
    folder = Path(trainer.args.output_dir)
    if trainer.args.should_save:
        found = found_by(trainer.state)
        rest = {name: value for name, value in files.read_settings(folder).items() if name not in found}
        files.write_json(files.own_folder(folder) / files.RUN, rest | found)  # last, in a resumed training too


def write_log(trainer: Any) -> None:
    """Write Trainer's state, which holds the log, to our own part of its folder."""
    if trainer.is_world_process_zero():
        path = files.own_folder(trainer.args.output_dir) / files.TRAINER_STATE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # Trainer would write through a symlink
        trainer.state.save_to_json(str(path))


def forget_after(output_dir: str | Path, step: int) -> None:
    """Drop what a former run in this folder left behind `step`, all of it at step 0: it would be taken for this run's.

    A training that starts anew also moves what version 0.1.0 left in the output folder itself to its own part.
    """
    if step == 0:
        files.renew_own_folder(output_dir)
    own = files.own_folder(output_dir)
    for place in (own / files.CANDIDATES, own / files.SAMPLES):  # before anything is deleted there
        files.check_unlinked(place, Path(output_dir))
    rows = files.read_jsonl(own / files.DIVERSITY) if (own / files.DIVERSITY).exists() and step > 0 else []
    if rows:
        files.write_jsonl(own / files.DIVERSITY, [row for row in rows if row["step"] <= step])
    else:
        (own / files.DIVERSITY).unlink(missing_ok=True)
    if step == 0 or (own / files.SELECTION).exists():  # without it nothing would show that selected/ is ours
        shutil.rmtree(own / files.SELECTED, ignore_errors=True)
    (own / files.SELECTION).unlink(missing_ok=True)
    for name in (files.READINESS, files.PROBED, files.MIXES):
        (own / name).unlink(missing_ok=True)
    for samples in (own / files.SAMPLES).glob("step-*.jsonl"):
        if step == 0 or int(samples.stem.removeprefix("step-")) > step:
            samples.unlink()
    for samples in (own / files.SAMPLES).glob("mix-*.jsonl"):
        samples.unlink()
    forget_candidates(own / files.CANDIDATES, step)
