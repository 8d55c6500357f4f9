"""`aesl mix RUN --config sft.yaml`: averages of the base and a candidate (WiSE-FT), each measured -> mix.json.

The base still varies what training has narrowed, and an average with it can keep both (arXiv 2504.10478). We write a
short path of averages as candidates `mix-W`, W the candidate's share, and measure each on the prompts and with the
settings of the run's own series, so the rows stand beside those of diversity.jsonl. `aesl select --rule mix` reads
them. An average that is written and measured is not made again while the inputs are the same.
"""

import hashlib
import json
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import TrainerState
from trl import ModelConfig

from .. import files
from ..arguments import parse, positionals
from ..diversity.intervals import with_interval
from ..diversity.passk import powers_of_two
from ..diversity.series import by_step, nearest_step, prompts_digest
from ..errors import InputError, exit_on_input_error, tell
from ..files import RunFolder
from ..models.digests import folder_of, weights_digest
from ..models.folder import ModelFolder
from ..models.interpolate import average_with_base, check_weight
from ..models.loading import load_model, load_processing_class, put_adapter, release_memory
from ..provenance import package_versions
from ..rewards.functions import check_columns, load_reward_funcs, reward_name
from ..training.checkpoints import sweep
from ..training.config import AESLSFTConfig
from ..training.measurement import Measurement
from ..training.session import training_lock
from ..training.sft import SFTScriptArguments, load_datasets
from ..values import option
from .figures import aligned


NAME = "aesl mix"
# Averages of a base and nll's last step had the largest entropy within this path on skills-tiny.
WEIGHTS = [0.5, 0.6, 0.7, 0.8]


@dataclass
class MixArguments(SFTScriptArguments):
    """SFT's script arguments, and those of the averages. The run comes as first argument."""

    weights: list[float] = option(
        WEIGHTS, "Shares of the candidate in the averages, in (0, 1); the base has the rest."
    )
    step: int | None = option(None, "Step of the candidate that is averaged with the base. Default: the last one.")

    def __post_init__(self):
        for weight in self.weights:
            check_weight(weight, "the base", "the candidate")
        self.weights = sorted(self.weights)
        if not self.weights or len({name_of(weight) for weight in self.weights}) < len(self.weights):
            raise InputError(f"weights must be different shares, at least one, got {self.weights}")


ARGUMENT_TYPES = (MixArguments, AESLSFTConfig, ModelConfig)


def name_of(weight: float) -> str:
    """Return the name of the average with this share of the candidate."""
    return f"mix-{weight:g}"


@dataclass
class Untrained:
    """What [`Measurement`] reads of a trainer, with a model that was loaded and is not trained."""

    args: AESLSFTConfig
    accelerator: Any
    model: Any = None
    processing_class: Any = None
    state: TrainerState = field(default_factory=TrainerState)

    @property
    def model_wrapped(self) -> Any:
        """The model itself."""
        return self.model


def main(argv: list[str] | None = None) -> None:
    """Write and measure the averages of the run given as first argument, with the config of its SFT."""
    from accelerate import Accelerator

    names, flags = positionals(sys.argv[1:] if argv is None else argv)
    script_args, args, model_args = parse(ARGUMENT_TYPES, flags, prog=NAME)
    if len(names) != 1:
        raise InputError(f"which run? {NAME} RUN --config sft.yaml, the config of its SFT")
    if args.deepspeed:
        raise InputError("deepspeed: an average is measured whole on each GPU: give it a config without deepspeed")
    if not args.diversity_steps:
        raise InputError("diversity_steps is 0, so nothing says how the averages are measured: name the run's config")
    run = RunFolder(names[0])
    run.check_sft_inside("RUN", "average those")
    step = run.candidates[-1] if script_args.step is None else script_args.step
    if step not in run.candidates:
        raise InputError(
            f"{run.candidates_folder} holds no step {step}, the nearest is {nearest_step(step, run.candidates)}"
        )
    base = find_base(run, step, model_args)
    reward_funcs = load_reward_funcs(script_args.reward_funcs)
    _, _, prompts = load_datasets(script_args, args)
    if reward_funcs:
        check_columns(reward_funcs, prompts[0], where="the held-out prompts")
    accelerator = Accelerator(cpu=args.use_cpu)
    mixes = Mixes(run, step, base, script_args.weights, args, prompts, reward_funcs, accelerator)
    with training_lock(SimpleNamespace(output_dir=run.sft, process_index=accelerator.process_index), accelerator):
        mixes.write()
    if accelerator.is_main_process:
        tell(f"{table(run, step)}\n{mixes.path}\nnext: aesl select {names[0]} --rule mix")


def find_base(run: RunFolder, step: int, model_args: ModelConfig) -> Path:
    """Return the folder of the weights that the run began from; for an adapter those of its base.

    InputError: the config names no model, one that is not on this disk, or another than the run was trained from.
    """
    adapter = ModelFolder.find(run.candidate(step), "run")
    base = adapter.base or model_args.model_name_or_path
    if not base:
        raise InputError("model_name_or_path is missing: name the base that the run was trained from")
    revision = None if adapter.base else model_args.model_revision
    folder, recorded = folder_of(base, revision), run.settings.get("model_weights")
    if folder is None:
        raise InputError(f"model_name_or_path: {base} is not on this disk: download it, or name its folder")
    if recorded and weights_digest(str(folder)) not in (None, recorded):
        raise InputError(f"model_name_or_path: {base} is not the model that {run.sft} was trained from")
    return folder


@dataclass
class Mixes:
    """The averages of one candidate with the base, and mix.json, which grows by a row with each."""

    run: RunFolder
    step: int
    base: Path
    weights: list[float]
    args: AESLSFTConfig
    prompts: list[dict]
    reward_funcs: list
    accelerator: Any

    @property
    def path(self) -> Path:
        """mix.json."""
        return files.own_folder(self.run.sft) / files.MIXES

    @cached_property
    def described(self) -> dict:
        """The content of mix.json without rows. `inputs` is a hash of what the averages and rows depend on."""
        inputs = {
            "weights": [weights_digest(str(folder)) for folder in (self.base, self.run.candidate(self.step))],
            "measurement": asdict(self.args.measurement),
            "prompts": prompts_digest(self.prompts),
            "rewards": list(map(reward_name, self.reward_funcs)),
            "seed": self.args.seed,
            "template": self.args.chat_template_kwargs,
        }
        return {
            "step": self.step,
            "asked": list(map(name_of, self.weights)),
            "inputs": hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()[:16],
            "versions": package_versions(),
        }

    def rows_so_far(self) -> list[dict]:
        """Return the rows of a call with the same inputs, cut off or not, whose averages are there and measured."""
        try:
            before, rows = files.read_object(self.path), list(self.run.mixes.values())
        except InputError:  # somebody has edited it
            return []
        is_same = {key: before.get(key) for key in self.described} == self.described
        there = [row for row in rows if "gap" not in row and self.run.candidate(row["candidate"]).is_dir()]
        return there if is_same else []

    def write(self) -> None:
        """Make each average and its row, except what a call with the same inputs has made."""
        rows, is_main, say = self.rows_so_far(), self.accelerator.is_main_process, self.accelerator.print
        kept = {row["candidate"] for row in rows}
        samples = files.check_unlinked(self.path.parent / files.SAMPLES, self.run.sft)
        self.accelerator.wait_for_everyone()
        if is_main:
            self._save(rows)
            sweep(self.run.sft)
            for path in [*self.run.candidates_folder.glob("mix-*"), *samples.glob("mix-*.jsonl")]:
                name = path.name.removesuffix(".jsonl")
                if files.is_mix(name) and name not in kept:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        trainer, measurement = Untrained(self.args, self.accelerator), None
        for weight in self.weights:
            name, began = name_of(weight), time.perf_counter()
            if name in kept:
                say(f"{NAME}: {name} is there")
                continue
            say(f"{NAME}: {name}: {weight:g} of step {self.step} and {1 - weight:g} of {self.base}", flush=True)
            if is_main:
                average_with_base(self.run.candidate(self.step), self.base, self.run.candidate(name), weight=weight)
            self.accelerator.wait_for_everyone()
            trainer.model, trainer.processing_class = self._load(self.run.candidate(name))
            if measurement is None:
                how = self.args.measurement, self.reward_funcs, self.args.chat_template_kwargs
                measurement = Measurement(trainer, self.prompts, *how)
                measurement.announce()
            row, groups = measurement.measure_step(self.step, self.path.parent)
            if is_main:
                if groups is not None:
                    files.write_jsonl(samples / f"{name}.jsonl", measurement.sample_rows(groups))
                rows.append({"candidate": name, "weight": weight, **row, "seconds": time.perf_counter() - began})
                self._save(rows)
            trainer.model = None
            if generation := getattr(measurement.engine, "generation", None):
                generation.model = None  # vLLM's next draw gets the next average; until then it would hold this one
            release_memory()

    def _save(self, rows: list[dict]) -> None:
        files.write_json(self.path, {**self.described, "candidates": rows})

    def _load(self, folder: Path) -> tuple:
        found, access = ModelFolder.find(folder), {"trust_remote_code": self.args.trust_remote_code}
        quantization = None if found.is_quantized else self.run.settings.get("quantization")
        where = {"device": str(self.accelerator.device), **access}
        model = load_model(found.config_at, quantization, **where)
        if found.is_adapter:
            model = put_adapter(model, found.weights, found.base).eval()
        return model, load_processing_class(found.tokenizer_at, **access)


def table(run: RunFolder, step: int) -> str:
    """Show the averages between the base (step 0) and the candidate, each figure with its interval over prompts."""
    series = by_step(run.rows(files.DIVERSITY))
    found = list(RunFolder(run.path).mixes.values())
    rows = {
        **({"base": series[0]} if 0 in series else {}),
        **{row["candidate"]: row for row in found},
        **({f"step-{step}": series[step]} if step in series else {}),
    }
    largest = powers_of_two(found[-1]["num_samples"])[-1]
    names = [key for key in ("entropy", "self_bleu", "groups_mixed", "pass@1", f"pass@{largest}") if key in found[-1]]
    lines = [["", *names]]
    for name, row in rows.items():
        lines.append([name, *(with_interval(row.get(key), (row.get("intervals") or {}).get(key)) for key in names)])
    return aligned(lines)


if __name__ == "__main__":
    exit_on_input_error(NAME, main)
