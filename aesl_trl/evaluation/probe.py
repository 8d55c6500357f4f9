"""`aesl probe CHECKPOINT... --config FILE`: is a checkpoint ready for RL? -> readiness.json and a table.

The config is GRPO's, with a few keys more, so that an RL run's own config serves. `rl_steps` adds a short RL run from
each checkpoint, of equal budget. All that can be refused is refused before the first model loads.

Left out: which checkpoints a name stands for (probe.py), how one is measured (probe_trainer.py), what
the figures mean (diversity/readiness.py) and which candidate is selected by them (diversity/selection.py).
"""

import copy
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trl import GRPOConfig, ModelConfig

from .. import files
from ..arguments import check_folder, positionals, parse
from ..data.prompts import check_held_out, prompt_rows
from ..data.rows import load_rows
from ..diversity.passk import powers_of_two
from ..diversity.readiness import MIN_PROMPTS, MIN_SAMPLES, History, _shown, entry
from ..errors import InputError, exit_on_input_error
from ..files import RunFolder, read_rows
from ..models.folder import ADAPTER_CONFIG
from ..models.loading import release_memory
from ..provenance import package_versions
from ..training.grpo import GRPOScriptArguments, check_rows, find_model, load_rewards
from .evaluate import check_start
from .probe_trainer import build, sample, short_rl


BLOCK = 5  # checkpoints side by side in the printed table


@dataclass(frozen=True)
class Checkpoint:
    """What is probed: `path` as given or found, and the SFT folder and step that it comes from, where known."""

    path: str
    name: str
    run: Path | None = None
    step: int | None = None

    @property
    def is_adapter(self) -> bool:
        return (Path(self.path) / ADAPTER_CONFIG).is_file()


NAME = "aesl probe"


@dataclass
class ProbeArguments(GRPOScriptArguments):
    """GRPO's script arguments, and what a probe adds. The checkpoints come as first arguments."""

    num_prompts: int = field(default=MIN_PROMPTS, metadata={"help": "The first prompts that are sampled."})
    num_samples: int = field(default=MIN_SAMPLES, metadata={"help": "Samples of each prompt."})
    batch_size: int = field(
        default=64, metadata={"help": "Samples generated at once on each process; a multiple of num_samples."}
    )
    rl_steps: int = field(
        default=0,
        metadata={"help": "Steps of RL from each checkpoint, on dataset_name; measured again on eval_dataset_name."},
    )
    success_threshold: float = field(default=1.0, metadata={"help": "Reward from which a sample counts as right."})
    output: str | None = field(
        default=None,
        metadata={"help": "File to write, or its folder. Default: the run whose candidates are probed, else here."},
    )

    def __post_init__(self):
        if hasattr(super(), "__post_init__"):
            super().__post_init__()
        for name, least in (("num_prompts", MIN_PROMPTS), ("num_samples", MIN_SAMPLES)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}, but must be at least {least}: fewer are noise")
        if self.batch_size < 1 or self.batch_size % self.num_samples:
            nearest = max(1, round(self.batch_size / self.num_samples)) * self.num_samples
            raise InputError(
                f"batch_size is {self.batch_size}, but must be a multiple of num_samples ({self.num_samples}), such "
                f"as {nearest}"
            )
        if self.rl_steps < 0:
            raise InputError(f"rl_steps is {self.rl_steps}, but must be at least 0; 0 makes no RL run")


ARGUMENT_TYPES = (ProbeArguments, GRPOConfig, ModelConfig)


def main(argv: list[str] | None = None) -> None:
    """Probe the checkpoints given as first arguments, all candidates of a run folder among them.

    Raises:
        InputError: no checkpoint, or prompts, rewards, models or settings that cannot be used; before any model loads.
    """
    names, flags = positionals(sys.argv[1:] if argv is None else argv)
    script_args, training_args, model_args = parse(ARGUMENT_TYPES, flags, prog=NAME)
    check_alone(training_args)
    checkpoints = told_apart([found for name in names for found in find_checkpoints(name)])
    if not checkpoints:
        raise InputError(
            f"which checkpoint? {NAME} CHECKPOINT... --config probe.yaml; a run's folder stands for its candidates"
        )
    target = find_target(script_args.output, checkpoints)
    check_folder("output", target.parent)
    reward_funcs = load_rewards(script_args)
    rows, train = load_prompts(script_args, training_args, reward_funcs)
    settings = [settings_for(one, script_args, training_args, model_args) for one in checkpoints]
    for one in checkpoints:
        check_start("model", one.path, rows, training_args.trust_remote_code)
    say = print if training_args.process_index == 0 else lambda *_, **__: None
    if len(rows) < script_args.num_prompts:
        say(f"{NAME}: only {len(rows)} prompts, {script_args.num_prompts} were asked for: the intervals are wide")
    entries = []
    for one, its_settings in zip(checkpoints, settings, strict=True):
        say(f"{NAME}: {one.name}, {len(entries) + 1} of {len(checkpoints)}", flush=True)
        entries.append(probe(one, its_settings, reward_funcs, rows, train))
    result = describe(entries, len(rows), script_args, training_args, target)
    if training_args.process_index == 0:
        files.write_json(target, result)
    say(table(result))
    say(target)


# ---- Before the model loads


def check_alone(training_args: GRPOConfig) -> None:
    """Refuse DeepSpeed, which evaluates without an optimizer only in stage 3, and then trains no more."""
    if training_args.deepspeed:
        raise InputError(
            "deepspeed: the probe does without it, and a whole model on each GPU: give it a config of its own that "
            "leaves it out"
        )


def load_prompts(
    script_args: ProbeArguments, training_args: GRPOConfig, reward_funcs: list
) -> tuple[list[dict], Any | None]:
    """The prompts to measure, those of `eval_dataset_name` where it is given; those of the short RL run, if any."""
    common = {"streaming": script_args.dataset_streaming, "seed": training_args.seed}
    if not script_args.dataset_name:
        raise InputError("dataset_name is missing: the prompts that RL trains on")
    if script_args.rl_steps and not script_args.eval_dataset_name:
        raise InputError(
            "rl_steps needs eval_dataset_name: held-out prompts, on which the checkpoints are compared after RL"
        )
    if script_args.rl_steps and not training_args.learning_rate > 0:
        raise InputError(f"rl_steps needs a learning_rate above 0, got {training_args.learning_rate:g}")
    train = None
    if script_args.rl_steps or not script_args.eval_dataset_name:
        train = load_rows(
            script_args.dataset_name,
            split=script_args.dataset_train_split,
            config=script_args.dataset_config,
            **common,
        )
        check_rows(train, reward_funcs, name="dataset_name")
    if not script_args.eval_dataset_name:
        return prompt_rows(train, script_args.num_prompts), None
    held_out = load_rows(script_args.eval_dataset_name, field="eval_dataset_name", **common)
    check_rows(held_out, reward_funcs, name="eval_dataset_name")
    rows = prompt_rows(held_out, script_args.num_prompts, field="eval_dataset_name")
    if script_args.rl_steps:
        check_held_out(train, rows, field="eval_dataset_name")
    return rows, train if script_args.rl_steps else None


def settings_for(
    checkpoint: Checkpoint, script_args: ProbeArguments, training_args: GRPOConfig, model_args: ModelConfig
) -> tuple[ProbeArguments, GRPOConfig, ModelConfig]:
    """The config's settings with this checkpoint in place of its model, and what a measurement does without."""
    script_args, training_args, model_args = map(copy.copy, (script_args, training_args, model_args))
    script_args.adapter_name_or_path = checkpoint.path if checkpoint.is_adapter else None
    model_args.model_name_or_path = None if checkpoint.is_adapter else checkpoint.path
    training_args.num_generations_eval = script_args.num_samples
    training_args.per_device_eval_batch_size = script_args.batch_size
    training_args.save_strategy = training_args.eval_strategy = training_args.logging_strategy = "no"
    training_args.report_to, training_args.disable_tqdm, training_args.push_to_hub = [], True, False
    training_args.log_completions = training_args.load_best_model_at_end = training_args.eval_on_start = False
    training_args.resume_from_checkpoint = None
    if script_args.rl_steps:
        training_args.max_steps = script_args.rl_steps
    else:
        # Neither moves or restrains the weights here; a new adapter and a reference model only cost memory.
        training_args.learning_rate, training_args.beta, model_args.use_peft = 0.0, 0.0, False
    find_model(script_args, model_args, training_args)
    return script_args, training_args, model_args


# ---- Output


def find_target(output: str | None, checkpoints: list[Checkpoint]) -> Path:
    """The file to write: `output`, in the run whose candidates are probed, else in the current folder."""
    if output:
        return Path(output) if Path(output).suffix == ".json" else Path(output) / files.READINESS
    runs = {one.run for one in checkpoints if Path(one.path).parent.name == files.CANDIDATES}
    is_whole_run = len(runs) == 1 and None not in runs and len(checkpoints) == len(RunFolder(*runs).candidates)
    return (runs.pop() if is_whole_run else Path.cwd()) / files.READINESS


def describe(
    entries: list[dict], num_prompts: int, script_args: ProbeArguments, training_args: GRPOConfig, target: Path
) -> dict:
    """What readiness.json holds; paths are relative to its folder."""
    for one in entries:
        if Path(one["path"]).is_dir():
            one["path"] = os.path.relpath(one["path"], target.parent)
    return {
        "checkpoints": entries,
        "num_prompts": num_prompts,
        "num_samples": script_args.num_samples,
        "rl_steps": script_args.rl_steps,
        "success_threshold": script_args.success_threshold,
        **{key: getattr(training_args, key) for key in ("temperature", "max_completion_length", "seed")},
        "dataset": script_args.eval_dataset_name or script_args.dataset_name,
        "num_processes": training_args.world_size,
        "versions": package_versions(),
    }


def find_checkpoints(name: str) -> list[Checkpoint]:
    """The candidates of the run folder `name`, or `name` itself: a model, an adapter, or a name on the hub."""
    path = Path(name)
    try:
        sft = files.sft_dir(path) if path.is_dir() else None
    except InputError:
        if (path / files.CHAIN).exists():  # a run it is, and one that cannot be read, or without SFT
            raise
        sft = None
    if sft is not None and (sft / files.CANDIDATES).is_dir():
        steps = RunFolder(sft).candidates
        return [Checkpoint(str(sft / files.CANDIDATES / f"step-{step}"), f"step-{step}", sft, step) for step in steps]
    return [Checkpoint(name, path.name if path.is_dir() else name, *origin(path))]


def told_apart(checkpoints: list[Checkpoint]) -> list[Checkpoint]:
    """With the folder above in the name, where two would have the same: `aesl/step-400`."""
    names = [one.name for one in checkpoints]

    def above(one: Checkpoint) -> str:
        return (one.run or Path(one.path).absolute().parent).name

    return [replace(one, name=f"{above(one)}/{one.name}") if names.count(one.name) > 1 else one for one in checkpoints]


def origin(path: Path) -> tuple[Path | None, int | None]:
    """SFT folder and step of a candidate, a checkpoint, `selected` or `handoff`; (None, None) of anything else."""
    path = path.absolute()
    numbered = re.fullmatch(r"(?:step|checkpoint)-(\d+)", path.name)
    folder = path.parent.parent if path.parent.name == files.CANDIDATES else path.parent
    if numbered:
        return (folder, int(numbered[1])) if (folder / files.DIVERSITY).is_file() else (None, None)
    if path.name in (files.SELECTED, files.HANDOFF_DIR) and (folder / files.SELECTION).is_file():
        return files.sft_dir(folder), files.read_json(folder / files.SELECTION).get("step")
    return None, None


def history(checkpoint: Checkpoint) -> History | None:
    """The series of the run that it belongs to; None where there is none."""
    if checkpoint.run is None or checkpoint.step is None or not (checkpoint.run / files.DIVERSITY).is_file():
        return None
    rows = {row["step"]: row for row in read_rows(checkpoint.run / files.DIVERSITY, needs=("step",))}
    has_candidates = (checkpoint.run / files.CANDIDATES).is_dir()
    steps = RunFolder(checkpoint.run).candidates if has_candidates else []
    return History(checkpoint.step, [rows[step] for step in sorted(rows)], steps)


def columns(num_samples: int) -> list[tuple[str, str]]:
    """(key, heading) of the figures that the table shows."""
    largest = powers_of_two(num_samples)[-1]
    return [
        ("entropy", "entropy"),
        ("pass@1", "pass@1"),
        (f"pass@{largest}", f"pass@{largest}"),
        ("signal", "signal"),
        ("groups_mixed", "mixed"),
        ("mixed_if_alike", "mixed if alike"),
        ("variance", "variance"),
        ("variance_if_alike", "variance if alike"),
        ("reward_std", "reward std"),
        ("truncated", "truncated"),
        ("eos_prob", "P(eos)"),
    ]


def table(result: dict) -> str:
    """readiness.json as `aesl probe` prints it: a column a checkpoint, each figure with its interval, the verdicts."""
    entries = result["checkpoints"]
    blocks = [entries[start : start + BLOCK] for start in range(0, len(entries), BLOCK)]
    figures = [_block(block, result["num_samples"]) for block in blocks]
    return "\n\n".join([*figures, "\n".join(_sentence(one) for one in entries)])


def _block(entries: list[dict], num_samples: int) -> str:
    lines = [["", *(one["name"] for one in entries)]]
    for key, heading in columns(num_samples):
        lines.append([heading, *(_shown(one["figures"], one["intervals"], key) for one in entries)])
    after = [one["rl"] for one in entries if one.get("rl")]
    if after:
        cells = [_after(one["rl"]) if one.get("rl") else "-" for one in entries]
        lines.append([f"reward, RL step {after[0]['steps']}", *cells])
    return aligned(lines)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Lay `rows` of texts out as a table for a terminal, each column as wide as its longest text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _after(rl: dict) -> str:
    return _shown(rl, {"reward": rl.get("reward_interval")}, "reward")


def _sentence(one: dict) -> str:
    return f"{one['name']}: {one['text']}\n" + "\n".join(f"  - {reason}" for reason in one["reasons"])


def probe(checkpoint: Checkpoint, settings: tuple, reward_funcs: list, rows: list[dict], train: Any | None) -> dict:
    """The checkpoint's entry in readiness.json. One model is in memory at a time."""
    script_args, training_args, model_args = settings
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="aesl-probe-") as scratch:
        training_args.output_dir = scratch
        trainer = build(script_args, training_args, model_args, reward_funcs, train or never_read(rows))
        groups = sample(trainer, rows, script_args.num_samples)
        found = entry(
            checkpoint.name,
            groups,
            success_threshold=script_args.success_threshold,
            reward_weights=training_args.reward_weights,
            temperature=training_args.temperature,
            step=checkpoint.step,
            history=history(checkpoint),
        )
        found["path"] = checkpoint.path
        if train is not None:
            found["rl"] = short_rl(
                trainer,
                groups,
                rows,
                num_samples=script_args.num_samples,
                success_threshold=script_args.success_threshold,
            )
    found["seconds"] = round(time.perf_counter() - began, 1)
    del trainer
    release_memory()
    return found


def never_read(rows: list[dict]) -> Any:
    """A training set, which GRPOTrainer insists on."""
    from datasets import Dataset

    return Dataset.from_list([{"prompt": row["prompt"]} for row in rows])


if __name__ == "__main__":
    exit_on_input_error(NAME, main)
