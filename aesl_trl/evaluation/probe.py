"""`aesl probe CHECKPOINT... --config FILE`: is a checkpoint ready for RL? -> readiness.json and a table.

The config is GRPO's with a few keys more, so an RL run's own config serves. `rl_steps` adds a short RL run from each
checkpoint, of equal budget. `reference` names the base, against which coverage lost and gained are measured. Whatever
can be refused is refused before the first model loads. What a checkpoint gave is kept until readiness.json is written,
so the same command goes on where a killed one was (probed.py).
"""

import copy
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import PrinterCallback, ProgressCallback
from trl import GRPOConfig, ModelConfig

from .. import files
from ..arguments import check_replaceable, parse, positionals
from ..data.prompts import check_held_out, prompt_rows
from ..diversity.coverage import GAINED, LOST
from ..diversity.figures import Group
from ..diversity.intervals import with_interval
from ..diversity.passk import powers_of_two
from ..diversity.readiness import MIN_PROMPTS, MIN_SAMPLES, READY, History, entry
from ..errors import InputError, exit_on_input_error, tell
from ..files import RunFolder
from ..models.folder import ADAPTER_CONFIG
from ..models.loading import check_model, release_memory
from ..processes import next_step, scratch
from ..provenance import package_versions
from ..rewards.golds import check_golds
from ..training.grpo import (
    GRPOScriptArguments,
    build_trainer,
    check_rl_samples,
    check_rows,
    find_model,
    load_rewards,
)
from ..training.session import load_split, revision_and_trust
from ..values import option
from .evaluate import check_model_and_tokenizer
from .figures import aligned
from .probe_trainer import probe_class, sample, short_rl
from .probed import Probed, ProbedFile, settings_of


NAME = "aesl probe"
BLOCK = 5  # checkpoints side by side in the printed table


@dataclass
class ProbeArguments(GRPOScriptArguments):
    """GRPO's script arguments, and those of the probe. The checkpoints come as first arguments."""

    num_prompts: int = option(
        MIN_PROMPTS, "The first prompts that are sampled.", at_least=MIN_PROMPTS, hint="fewer are noise"
    )
    num_samples: int = option(MIN_SAMPLES, "Samples of each prompt.", at_least=MIN_SAMPLES, hint="fewer are noise")
    batch_size: int = option(64, "Samples generated at once on each process; a multiple of num_samples.")
    rl_steps: int = option(
        0,
        "Steps of RL from each checkpoint, on dataset_name; measured again on eval_dataset_name.",
        at_least=0,
        hint="0 makes no RL run",
    )
    success_threshold: float = option(1.0, "Reward from which a sample counts as right.")
    reference: str | None = option(
        None, "The base model. It is sampled as well, for the coverage lost and gained against it."
    )
    output: str | None = option(
        None,
        "Folder for readiness.json; a name that ends in .json is the file itself. Default: the run whose candidates "
        "are probed, else here. In a config it is `output`, on the command line --output_dir: the config's output_dir "
        "is RL's.",
    )

    def __post_init__(self):
        if self.batch_size < 1 or self.batch_size % self.num_samples:
            nearest = max(1, round(self.batch_size / self.num_samples)) * self.num_samples
            multiple = f"a multiple of num_samples ({self.num_samples}), such as {nearest}"
            raise InputError(f"batch_size is {self.batch_size}, but must be {multiple}")


ARGUMENT_TYPES = (ProbeArguments, GRPOConfig, ModelConfig)


def main(argv: list[str] | None = None) -> None:
    """Probe the checkpoints given as first arguments; a run's folder stands for all of its candidates."""
    names, flags = positionals(sys.argv[1:] if argv is None else argv)
    flags = [re.sub("^--output[-_]dir(?==|$)", "--output", flag) for flag in flags]  # the config's own is RL's
    script_args, training_args, model_args = parse(ARGUMENT_TYPES, flags, prog=NAME)
    if training_args.deepspeed:  # without an optimizer it evaluates in stage 3 alone, and cannot train after that
        hint = "give it a config of its own without deepspeed"
        raise InputError(f"deepspeed: the probe needs a whole model on each GPU: {hint}")
    checkpoints = with_unique_names([found for name in names for found in find_checkpoints(name)])
    if not checkpoints:
        usage = f"{NAME} CHECKPOINT... --config probe.yaml"
        raise InputError(f"which checkpoint? {usage}; a run's folder stands for its candidates")
    reference = find_reference(script_args.reference)
    target = find_target(script_args.output, checkpoints, names)
    is_ours = files.wrote(target, "checkpoints", "success_threshold", torn=target.name == files.READINESS)
    check_replaceable("output_dir", target, is_ours, is_file=True)
    reward_funcs = load_rewards(script_args)
    if script_args.reward_model_name_or_path:
        access = revision_and_trust(model_args, training_args)
        check_model(script_args.reward_model_name_or_path, "reward_model_name_or_path", **access)
    rows, train = load_prompts(script_args, training_args, reward_funcs)
    settings = [settings_for(checkpoint, script_args, training_args, model_args) for checkpoint in checkpoints]
    if reference:
        check_model_and_tokenizer(reference.path, "reference", rows, training_args.trust_remote_code)
        untrained = replace(script_args, rl_steps=0)
        base_settings = settings_for(reference, untrained, training_args, model_args)
    measured = "eval_dataset_name" if script_args.eval_dataset_name else "dataset_name"
    unearnable = []
    for checkpoint in checkpoints:
        model = check_model_and_tokenizer(checkpoint.path, "model", rows, training_args.trust_remote_code)
        how = {"field": measured, "access": {"trust_remote_code": training_args.trust_remote_code}}
        unearnable.append(check_rl_samples(model, rows, reward_funcs, training_args, **how))
    for setting, prompts in ((measured, rows), ("dataset_name", train or [])):
        check_golds(reward_funcs, prompts, where=setting)
    is_main = training_args.process_index == 0
    say = tell if is_main else lambda _: None
    if len(rows) < script_args.num_prompts:
        say(f"{NAME}: only {len(rows)} prompts, {script_args.num_prompts} were asked for: the intervals are wide")
    file, finished = None, {}
    if is_main:
        all_args = (script_args, training_args, model_args)
        file = ProbedFile(target, settings_of(all_args, reward_funcs, rows, train), model_args.model_revision)
        finished = file.read()

    def probed(checkpoint: Checkpoint, its_settings: tuple, train: Any | None, place: str) -> Probed:
        # The first process decides for all: another one may see other paths and times, and would wait for ever
        key = file.key(checkpoint.path, its_settings[0].rl_steps) if is_main else None
        (known,) = broadcast_object_list([finished.get(key)])
        if known is not None:
            say(f"{NAME}: {checkpoint.name}, {place}: sampled already ({file and file.path})")
            return known
        say(f"{NAME}: {checkpoint.name}, {place}")
        found = probe(its_settings, reward_funcs, rows, train)
        if is_main:
            file.add(key, found)
        return found

    entries = []
    base = probed(reference, base_settings, None, "the reference").groups if reference else None
    for number, (checkpoint, its_settings) in enumerate(zip(checkpoints, settings, strict=True), 1):
        found = probed(checkpoint, its_settings, train, f"{number} of {len(checkpoints)}")
        how = {"unearnable": unearnable[number - 1], "base": base}
        entries.append(entry_of(checkpoint, found, script_args, training_args, rows, **how))
    result = describe(entries, len(rows), script_args, training_args, target)
    if is_main:
        files.write_json(target, result)
        file.remove()
    say(table(result))
    say(f"{NAME}: judged {len(checkpoints)} -> {target}{following(result, checkpoints)}")


def following(result: dict, checkpoints: list["Checkpoint"]) -> str:
    """Say what comes after the verdicts: a selection among a run's candidates; the handoff of a ready one, or RL."""
    runs = {each.run for each in checkpoints}
    if len(checkpoints) > 1 and len(runs) == 1 and None not in runs:
        return next_step(f"aesl select {runs.pop()} --rule readiness")
    if len(checkpoints) > 1 or result["checkpoints"][0]["verdict"] != READY:
        return ""
    path = Path(checkpoints[0].path)
    if not (path / files.HANDOFF).is_file():
        return next_step(f"aesl handoff {path}")
    kind = "adapter" if (path / ADAPTER_CONFIG).is_file() else "model"
    return next_step(f"aesl grpo --config FILE --{kind}_name_or_path {path}")


@dataclass(frozen=True)
class Checkpoint:
    """A model to probe: `path` as given or found, and the SFT folder and step that it comes from, where known.

    `mix` is the name of an average with the base, which belongs to no step.
    """

    path: str
    name: str
    run: Path | None = None
    step: int | None = None
    mix: str | None = None


def find_checkpoints(name: str) -> list[Checkpoint]:
    """Return the candidates of the run folder `name`, or `name` itself: a model, an adapter, or a name on the hub."""
    path = Path(name)
    try:
        run = RunFolder(RunFolder(path).sft) if path.is_dir() else None
    except InputError:
        if (path / files.CHAIN).exists():  # a chain's run that cannot be read, or that has no SFT
            raise
        run = None
    if run is not None and run.candidates_folder.is_dir():
        return [Checkpoint(str(run.candidate(step)), f"step-{step}", run.path, step) for step in run.candidates]
    return [Checkpoint(name, path.name if path.is_dir() else name, *origin_of(path))]


def find_reference(name: str | None) -> Checkpoint | None:
    """Return the model to compare with, named as a checkpoint is; None without a name."""
    found = find_checkpoints(name) if name else [None]
    if len(found) != 1:
        example = f", such as {found[-1].path}" if found else ""
        raise InputError(f"reference: {name} holds {len(found)} candidates, but must be one model{example}")
    return found[0]


def origin_of(path: Path) -> tuple[Path | None, int | None, str | None]:
    """Return SFT folder, step and [`~Checkpoint.mix`] of a candidate, a checkpoint, `selected` or `handoff`.

    Each is None where it is not known.
    """
    path = path.absolute()
    numbered = re.fullmatch(r"(?:step|checkpoint)-(\d+)", path.name)
    folder = files.run_of(path)
    if numbered:
        has_series = (files.own_folder(folder) / files.DIVERSITY).is_file()
        return (folder, int(numbered[1]), None) if has_series else (None, None, None)
    if path.name in (files.SELECTED, files.HANDOFF_DIR) and folder.is_dir():
        run = RunFolder(folder)
        if (run.own / files.SELECTION).is_file():
            selection = files.read_object(run.own / files.SELECTION)
            candidate = selection.get("candidate")
            return (run.sft, None, candidate) if files.is_mix(candidate) else (run.sft, selection.get("step"), None)
    return None, None, path.name if files.is_mix(path.name) else None


def with_unique_names(checkpoints: list[Checkpoint]) -> list[Checkpoint]:
    """Prefix the parent folder, as in `aesl/step-400`, to names that occur twice."""
    counts = Counter(each.name for each in checkpoints)
    parents = [(each.run or Path(each.path).absolute().parent).name for each in checkpoints]
    return [
        replace(each, name=f"{parent}/{each.name}") if counts[each.name] > 1 else each
        for each, parent in zip(checkpoints, parents, strict=True)
    ]


def history_of(checkpoint: Checkpoint) -> History | None:
    """Read the series of the run that the checkpoint belongs to; None where no run is known."""
    if checkpoint.run is None or checkpoint.step is None:
        return None
    run = RunFolder(checkpoint.run)
    rows = {row["step"]: row for row in run.rows(files.DIVERSITY, needs=("step",))}
    if not rows:
        return None
    steps = run.candidates if run.candidates_folder.is_dir() else []
    return History(checkpoint.step, [rows[step] for step in sorted(rows)], steps)


def load_prompts(
    script_args: ProbeArguments, training_args: GRPOConfig, reward_funcs: list
) -> tuple[list[dict], Any | None]:
    """Load the prompts to measure, and those of the short RL run, which are None when `rl_steps` is 0."""
    rl_steps, held_out_name = script_args.rl_steps, script_args.eval_dataset_name
    if not script_args.dataset_name:
        raise InputError("dataset_name is missing: name the prompts that RL trains on")
    if rl_steps and not held_out_name:
        raise InputError("rl_steps needs eval_dataset_name: held-out prompts to compare checkpoints on after RL")
    if rl_steps and not training_args.learning_rate > 0:
        raise InputError(f"rl_steps needs a learning_rate above 0, got {training_args.learning_rate:g}")

    def load(setting: str, split: str | None) -> Any:
        streaming = script_args.dataset_streaming
        rows = load_split(script_args, setting, split, seed=training_args.seed, streaming=streaming)
        check_rows(rows, field=setting, reward_funcs=reward_funcs)
        return rows

    train = load("dataset_name", script_args.dataset_train_split) if rl_steps or not held_out_name else None
    if not held_out_name:
        return prompt_rows(train, script_args.num_prompts), None
    rows = prompt_rows(load("eval_dataset_name", None), script_args.num_prompts, field="eval_dataset_name")
    if rl_steps:
        check_held_out(train, rows, field="eval_dataset_name")
    return rows, train


def settings_for(
    checkpoint: Checkpoint, script_args: ProbeArguments, training_args: GRPOConfig, model_args: ModelConfig
) -> tuple[ProbeArguments, GRPOConfig, ModelConfig]:
    """Copy the config's settings, with this checkpoint as their model and without what a measurement does not need."""
    script_args, training_args, model_args = map(copy.copy, (script_args, training_args, model_args))
    is_adapter = (Path(checkpoint.path) / ADAPTER_CONFIG).is_file()
    script_args.adapter_name_or_path = checkpoint.path if is_adapter else None
    model_args.model_name_or_path = None if is_adapter else checkpoint.path
    training_args.num_generations_eval = script_args.num_samples
    training_args.per_device_eval_batch_size = script_args.batch_size
    training_args.save_strategy = training_args.eval_strategy = training_args.logging_strategy = "no"
    training_args.report_to, training_args.push_to_hub = [], False
    training_args.disable_tqdm = training_args.disable_tqdm or not sys.stderr.isatty()
    training_args.log_completions = training_args.load_best_model_at_end = training_args.eval_on_start = False
    training_args.resume_from_checkpoint = None
    if script_args.rl_steps:
        training_args.max_steps = script_args.rl_steps
    else:
        # Nothing is trained: a new adapter and a reference model would only cost memory.
        training_args.learning_rate, training_args.beta, model_args.use_peft = 0.0, 0.0, False
    find_model(script_args, model_args, training_args)
    return script_args, training_args, model_args


def probe(settings: tuple, reward_funcs: list, rows: list[dict], train: Any | None) -> Probed:
    """Sample the checkpoint of `settings`, and train it for a short while where `train` holds prompts to train on.

    The model is freed at the end.
    """
    script_args, began, rl = settings[0], time.perf_counter(), None
    with scratch("probe") as place:
        trainer = trainer_in(str(place), settings, reward_funcs, rows, train)
        groups = sample(trainer, rows, script_args.num_samples)
        if train is not None:
            sizes = {"num_samples": script_args.num_samples, "success_threshold": script_args.success_threshold}
            rl = short_rl(trainer, groups, rows, **sizes)
    del trainer
    release_memory()
    return Probed(groups, rl, round(time.perf_counter() - began, 1))


def entry_of(
    checkpoint: Checkpoint,
    probed: Probed,
    script_args: ProbeArguments,
    training_args: GRPOConfig,
    rows: list[dict],
    *,
    unearnable: list[str],
    base: list[Group] | None,
) -> dict:
    """Return a checkpoint's entry in readiness.json.

    `base` holds the samples of the reference, `unearnable` why rewards cannot be earned (see [`~readiness.judge`]).
    """
    how = {
        "success_threshold": script_args.success_threshold,
        "reward_weights": training_args.reward_weights,
        "temperature": training_args.temperature,
        "unearnable": unearnable,
    }
    history, groups = history_of(checkpoint), probed.groups
    found = entry(checkpoint.name, groups, step=checkpoint.step, history=history, base=base, **how)
    found["path"] = checkpoint.path
    if checkpoint.mix:
        found["candidate"] = checkpoint.mix
    for task, places in places_by_task(rows).items():
        part, of_base = [groups[i] for i in places], base and [base[i] for i in places]
        its = {**entry(task, part, base=of_base, **how), "num_prompts": len(places)}
        found.setdefault("tasks", []).append(its)
    if probed.rl is not None:
        found["rl"] = probed.rl
    found["seconds"] = probed.seconds
    return found


def places_by_task(rows: list[dict]) -> dict[str, list[int]]:
    """Return the places of each task's rows by the column `task`; nothing where that column holds no few names."""
    names = [row.get("task") for row in rows]
    if not all(isinstance(name, str) for name in names):
        return {}
    places = {name: [i for i, other in enumerate(names) if other == name] for name in dict.fromkeys(names)}
    return places if len(places) > 1 and min(map(len, places.values())) >= MIN_SAMPLES else {}


def trainer_in(folder: str, settings: tuple, reward_funcs: list, rows: list[dict], train: Any | None = None) -> Any:
    """Build the trainer that samples the checkpoint of `settings`; what it writes goes to `folder`."""
    from datasets import Dataset

    settings[1].output_dir = folder
    # GRPOTrainer insists on a training set: without RL it gets the prompts, and never reads them.
    train_dataset = train or Dataset.from_list([{"prompt": row["prompt"]} for row in rows])
    trainer = build_trainer(*settings, reward_funcs, train_dataset, kind=probe_class())
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    if not settings[1].disable_tqdm:
        trainer.add_callback(BarsAlone)
    return trainer


class BarsAlone(ProgressCallback):
    """Shows transformers' bars of a training and of an evaluation, and prints no logs: the probe's table has them."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        pass


def find_target(output: str | None, checkpoints: list[Checkpoint], names: Sequence[str] = ()) -> Path:
    """Return the file to write: `output`, else in the run of which all candidates are probed, else in this folder.

    A chain's run among the `names` may lead to an SFT folder elsewhere, where nothing is written unasked.
    """
    if output:
        return Path(output) if Path(output).suffix == ".json" else Path(output) / files.READINESS
    runs = {each.run for each in checkpoints if Path(each.path).parent.name == files.CANDIDATES}
    is_whole_run = len(runs) == 1 and None not in runs and len(checkpoints) == len(RunFolder(*runs).candidates)
    if not is_whole_run:
        return Path.cwd() / files.READINESS
    run = runs.pop()
    for name in names:
        RunFolder(name).check_sft_inside("output_dir", "probe that, or name where to write")
    return RunFolder(run).own / files.READINESS


def describe(
    entries: list[dict], num_prompts: int, script_args: ProbeArguments, training_args: GRPOConfig, target: Path
) -> dict:
    """Return the content of readiness.json; paths in it are relative to its folder."""
    for each in entries:
        each["path"] = relative(each["path"], target)
    return {
        "checkpoints": entries,
        "num_prompts": num_prompts,
        "num_samples": script_args.num_samples,
        "rl_steps": script_args.rl_steps,
        "success_threshold": script_args.success_threshold,
        **{key: getattr(training_args, key) for key in ("temperature", "max_completion_length", "seed")},
        "dataset": script_args.eval_dataset_name or script_args.dataset_name,
        **({"reference": relative(script_args.reference, target)} if script_args.reference else {}),
        "num_processes": training_args.world_size,
        "versions": package_versions(),
    }


def relative(path: str, target: Path) -> str:
    """Return a folder as seen from the folder of `target`; a name on the hub stays."""
    return os.path.relpath(path, target.parent) if Path(path).is_dir() else path


def table(result: dict) -> str:
    """Show readiness.json as text: a column a checkpoint, each figure with its interval, then the verdicts."""
    entries, largest = result["checkpoints"], powers_of_two(result["num_samples"])[-1]
    keys = ("entropy", "pass@1", f"pass@{largest}", "signal", "groups_mixed", "mixed_if_alike", "variance")
    keys += ("variance_if_alike", "reward_std", "truncated", "eos_prob")
    keys += (LOST, GAINED) if result.get("reference") else ()
    headings = {
        "groups_mixed": "mixed groups",
        "signal": "rewards differ",
        "eos_prob": "P(eos)",
    }  # the others are the keys with spaces
    parts = []
    for start in range(0, len(entries), BLOCK):
        block = entries[start : start + BLOCK]
        lines = [["", *(each["name"] for each in block)]]
        for key in keys:
            figures = [with_interval(each["figures"].get(key), each["intervals"].get(key)) for each in block]
            lines.append([headings.get(key, key.replace("_", " ")), *figures])
        after_rl = [each.get("rl") or {} for each in block]
        if any(after_rl):
            steps = next(rl["steps"] for rl in after_rl if rl)
            rewards = [with_interval(rl.get("reward"), rl.get("reward_interval")) for rl in after_rl]
            lines.append([f"reward, RL step {steps}", *rewards])
        parts.append(aligned(lines))
    for each in entries:
        if each.get("tasks"):
            shown = ("pass@1", f"pass@{largest}", "groups_mixed")
            lines = [[f"{each['name']}, by task", "prompts", *(headings.get(key, key) for key in shown), ""]]
            for task in each["tasks"]:
                figures = [with_interval(task["figures"].get(key), task["intervals"].get(key)) for key in shown]
                few = "; few prompts" if task["num_prompts"] < MIN_PROMPTS else ""
                lines.append([task["name"], str(task["num_prompts"]), *figures, task["text"] + few])
            parts.append(aligned(lines))
    verdicts = []
    for each in entries:
        verdicts += [f"{each['name']}: {each['text']}", *(f"  - {reason}" for reason in each["reasons"])]
    return "\n\n".join([*parts, "\n".join(verdicts)])


if __name__ == "__main__":
    exit_on_input_error(NAME, main)
