"""`aesl recipes check`: do a recipe's files agree with each other, and do they fit their GPUs? No weights are needed.

Each YAML file is parsed as its stage will parse it. Its launch and global batch must agree with its first line, its
lengths with the rows that `aesl data` will write and with the model's context, and the end of a sample with the end of
a turn. The memory of one GPU is summed item by item (estimates/memory.py), and the time by arithmetic
(estimates/hours.py). The model is built on the meta device from model_config.json, or from its own files where this
machine has them.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..arguments import parse
from ..chain.hours import hours_lines
from ..chain.stages import ANYWHERE, Chain
from ..errors import InputError
from ..estimates.facts import (
    Facts,
    Hardware,
    Launch,
    Promise,
    find_facts,
    find_launch,
    first_comment,
    hardware_of,
    kind_of,
    local_facts,
    promised_files,
    read_launch,
    shape_of,
)
from ..estimates.memory import Budget, Shape, budget, vllm_sequences
from ..estimates.stage_hours import PROMPT, Site, stage_time, told
from ..estimates.stage_memory import grpo_items, monitoring_room, sampling_budget, sft_items, training_of, vllm_room
from ..training.measurement import DEFAULT_BUDGETS, Size, budget_of
from ..values import load_yaml


@dataclass
class Case:
    """One config under check: its path, what its first line says, and what the check found.

    With `gpus` the stage is moved to that many GPUs of the same size, at the same global batch.
    """

    path: Path
    hardware: Hardware
    promised: dict[str, Promise]
    gpus: int | None = None
    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @cached_property
    def launch(self) -> Launch:
        """The accelerate config that the first line names, without one a single process.

        On another number of GPUs, a config that shards nothing becomes ddp.yaml, and single_gpu.yaml on one.
        """
        name, gpus, vllm_gpus = self.hardware.launch, self.hardware.gpus, self.hardware.vllm_gpus
        if self.gpus and gpus:
            is_named = name and kind_of(self.path) != "eval"  # whose first line may name other files
            named = read_launch(find_launch(self.path, name)) if is_named else Launch()
            processes = self.gpus - vllm_gpus
            if processes < 1:
                raise InputError(f"--gpus {self.gpus}: {vllm_gpus} GPUs are for vLLM, and none is left to train on")
            name = name if named.sharding != "none" else "ddp.yaml" if processes > 1 else "single_gpu.yaml"
            gpus = "1 GPU" if self.gpus == 1 else f"{self.gpus} GPUs"
            self.lines.append(f"  on {gpus}: {name} with --num_processes {processes}")
            return replace(named, processes=processes)
        launch = read_launch(find_launch(self.path, name)) if name else Launch()
        place = f"{gpus} GPUs" + (f" less {vllm_gpus} for vLLM" if vllm_gpus else "")
        self.expect(
            not gpus or launch.processes == gpus - vllm_gpus,
            f"{name or 'without an accelerate config'} starts {launch.processes} processes on {place}",
        )
        return launch

    def expect(self, holds: bool, problem: str) -> None:
        """Note the problem unless the condition holds."""
        if not holds:
            self.problems.append(problem)

    def facts(self, model: str) -> Facts:
        """Return the facts of `model`. Where this machine has its files, they must agree with model_config.json."""
        written, here = find_facts(self.path), local_facts(model)
        if written is not None and model in {written.name, *written.prepared}:
            for name in ("eos_token", "eos_ids", "turn_end_id") if here else ():
                was, found = getattr(written, name), getattr(here, name)
                self.expect(was == found, f"{written.source} gives {name} as {was}, the model's own files as {found}")
            return written
        if here is None:
            raise InputError(f"{self.path}: {model} is not here, and no model_config.json of the recipe describes it")
        return here

    def arguments(self, kinds: tuple[type, ...], *flags: str) -> tuple:
        """Parse the config as its stage will."""
        argv = ["--config", str(self.path), *flags]
        return parse(kinds, argv, prog="aesl recipes check", to_come=self.promised.keys())

    def prompt_of(self, dataset: str | None) -> int:
        """Return the tokens of the longest prompt of a file that `aesl data` will write, 0 where that is unknown."""
        promise = self.promised.get(str(dataset))
        return promise.max_prompt or 0 if promise else 0

    def show_room(self, share_gb: float, sequences: float, length: int) -> None:
        self.lines.append(f"  vLLM's cache holds {max(sequences, 0):.1f} sequences of {length} tokens at once")
        problem = f"vLLM's {share_gb:.1f} GB cannot hold its weights and one sequence of {length} tokens"
        self.expect(sequences >= 1, problem)

    def show(self, sum_: Budget) -> None:
        """Write the items, and whether the largest phase fits."""
        for item in sum_.items:
            self.lines.append(f"  {item.phase:8}  {item.gb:7.2f} GB  {item.name}: {item.how}")
        peaks = ", ".join(f"{name} {gb:.1f}" for name, gb in sum_.peaks.items())
        over = sum_.peak_gb - sum_.gpu_gb
        verdict = f"OVER by {over:.1f} GB" if over > 0 else f"fits, {-over:.1f} GB to spare"
        self.lines.append(f"  peak {sum_.peak_gb:.1f} GB of {sum_.gpu_gb:.0f} ({peaks}): {verdict}")
        self.expect(sum_.fits, f"needs {sum_.peak_gb:.1f} GB of each GPU's {sum_.gpu_gb:.0f}: over by {over:.1f} GB")

    def show_time(self, kind: str, shape: Shape, context: int, parsed: tuple) -> None:
        """Write how long the stage takes on these GPUs by arithmetic, or why that is not known."""
        launch = self.launch if kind != "eval" or self.gpus else Launch()
        try:
            time = told(stage_time(kind, Site(shape, context, self.hardware, launch, self.promised), parsed))
            self.lines.append(f"  time {time} (estimated)")
        except InputError as error:
            self.lines.append(f"  time not estimated: {error}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the libraries' warnings, and at the end remove what the config's `env` has set in this process."""
    before = dict(os.environ)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.environ.clear()
        os.environ.update(before)


# ---- Stages


def check_sft(case: Case) -> None:
    from ..training import sft

    script, args, model_args = case.arguments(sft.ARGUMENT_TYPES, *ANYWHERE)
    facts = case.facts(model_args.model_name_or_path)
    check_batch(case, args)
    data, prompt = case.promised.get(str(script.dataset_name)), case.prompt_of(script.diversity_dataset_name)
    if data and data.max_length and args.max_length:
        case.expect(
            data.max_length <= args.max_length,
            f"max_length {args.max_length} cuts off demonstrations of up to {data.max_length} tokens "
            f"({data.config.name}), their end of sequence first",
        )
    if "max_length" in load_yaml(case.path):  # TRL's default is a limit that shorter rows never meet
        check_context(case, facts, "max_length", args.max_length or 0)
    if args.diversity_steps:
        check_context(case, facts, "prompt and diversity_max_new_tokens", prompt + args.diversity_max_new_tokens)
    check_weights(case, args, model_args)
    if case.hardware.gpus:
        run = training_of(shape_of(facts), case.launch, args, model_args, length=args.max_length or facts.context)
        room = monitoring_room(run, args, prompt, case.hardware.gpu_gb)
        if room is not None:
            case.show_room(*room, prompt + args.diversity_max_new_tokens)
        check_token_budget(case, args)
        case.show(budget(sft_items(run, args, prompt, case.hardware.gpu_gb), case.hardware.gpu_gb))
        case.show_time("sft", run.shape, facts.context, (script, args, model_args))


def check_token_budget(case: Case, args: Any) -> None:
    """Note a token budget that would make a measurement smaller than the config asks for."""
    size = Size(args.diversity_num_prompts, args.diversity_num_samples, args.diversity_max_new_tokens)
    limit = min(budget_of(name, args.diversity_token_budget) or size.tokens for name in DEFAULT_BUDGETS)
    case.expect(
        not args.diversity_steps or size.tokens <= limit,
        f"a measurement of {size} costs {size.tokens} tokens, and the token budget of {limit} would make it smaller: "
        "set diversity_token_budget, 0 for no limit",
    )


def check_grpo(case: Case) -> None:
    from trl import GRPOConfig

    from ..training import grpo

    class Config(GRPOConfig):
        """GRPOConfig as the launch's processes see it: it checks that all their completions make whole groups."""

        world_size = case.launch.processes

    kinds = tuple(Config if kind is GRPOConfig else kind for kind in grpo.ARGUMENT_TYPES)
    script, args, model_args = case.arguments(kinds, *ANYWHERE)
    facts, prompt = case.facts(model_args.model_name_or_path), case.prompt_of(script.dataset_name)
    length = prompt + args.max_completion_length
    check_batch(case, args)
    check_groups(case, args)
    check_context(case, facts, "prompt and max_completion_length", length)
    check_weights(case, args, model_args)
    if args.use_vllm and args.vllm_mode == "colocate":
        limit = args.vllm_max_model_length
        case.expect(
            limit is not None and length <= limit <= facts.context,
            f"vllm_max_model_length is {limit}, but must lie between {length} (prompt and completion) and the model's "
            f"context of {facts.context}, which vLLM takes without it",
        )
    if case.hardware.gpus:
        kind = {"length": length, "masked": True, "trl_head": True}
        run = training_of(shape_of(facts), case.launch, args, model_args, **kind)
        if args.use_vllm:
            case.show_room(*vllm_room(run, args, case.hardware, length), length)
        case.show(budget(grpo_items(run, args, case.hardware, prompt), case.hardware.gpu_gb))
        case.show_time("grpo", run.shape, facts.context, (script, args, model_args))


def check_probe(case: Case) -> None:
    from ..evaluation import probe

    script, args, model_args = case.arguments(probe.ARGUMENT_TYPES, *ANYWHERE)
    facts, prompt = find_facts(case.path), case.prompt_of(script.eval_dataset_name or script.dataset_name)
    if facts is None:
        return
    check_context(case, facts, "prompt and max_completion_length", prompt + args.max_completion_length)
    if case.hardware.gpus:
        shape = shape_of(facts)
        on_one_process = -(-script.num_prompts // case.launch.processes) * script.num_samples
        sampled = sampling_budget(
            shape,
            case.hardware.gpu_gb,
            samples=min(script.batch_size, on_one_process),
            prompt=prompt,
            new_tokens=args.max_completion_length,
            weight_bytes=4 if model_args.dtype in (None, "float32") else 2,
        )
        case.show(sampled)
        case.show_time("probe", shape, facts.context, (script, args, model_args))


def check_eval(case: Case) -> None:
    from ..evaluation import evaluate

    (args,) = case.arguments(evaluate.ARGUMENT_TYPES)
    facts, prompt = find_facts(case.path), PROMPT if args.benchmarks else case.prompt_of(args.dataset_name)
    if facts is None:
        return
    length, limit = prompt + args.max_new_tokens, args.max_model_len or facts.context
    check_context(case, facts, "prompt and max_new_tokens", length)
    case.expect(
        length <= limit <= facts.context, f"max_model_len {limit} must lie between {length} and {facts.context}"
    )
    if not case.hardware.gpus:
        return
    shape, gpu_gb = shape_of(facts), case.hardware.gpu_gb
    if args.backend != "transformers":
        share_gb = gpu_gb * args.gpu_memory_utilization
        parallel = args.tensor_parallel_size
        case.show_room(share_gb, vllm_sequences(shape, share_gb, limit, tensor_parallel=parallel), limit)
    if args.backend != "vllm":
        sizes = {"samples": args.batch_size, "prompt": prompt, "new_tokens": args.max_new_tokens}
        case.show(sampling_budget(shape, gpu_gb, **sizes))
    case.show_time("eval", shape, facts.context, (args,))


def check_chain(case: Case) -> None:
    """Note stages that the chain would launch in another way than the first lines of their configs say."""
    from ..chain.config import read_config

    config = read_config(case.path)
    sections = {name: getattr(config, name, None) for name in ("sft", "probe", "grpo")}
    for name, section in sections.items():
        if section is not None and section.config is not None:
            path, launch = Path(section.config), section.accelerate_config
            hardware, given = hardware_of(path), Path(launch).name if launch else None
            case.expect(
                not hardware.gpus or hardware.launch == given,
                f"{name}.accelerate_config is {given}, but the first line of {path.name} says {hardware.launch}",
            )
    if case.hardware.gpus and not case.gpus and find_facts(case.path) is not None:
        case.lines += [f"  {line}" for line in hours_lines(Chain(config, case.path), case.path, case.promised.keys())]


def check_compare(case: Case) -> None:
    """Read the comparison: rows, files and budgets must agree. `aesl compare --dry_run` checks each cell's chain."""
    from ..compare.config import read_config

    read_config(case.path, to_come=case.promised.keys())


def check_data(case: Case) -> None:
    from ..data.prepare import ARGUMENT_TYPES

    (args,) = case.arguments(ARGUMENT_TYPES)
    facts = find_facts(case.path)
    if facts is not None and args.max_length:
        check_context(case, facts, "max_length", args.max_length)


# ---- What stages share


def move(case: Case, args: Any) -> None:
    """Share the global batch out to the processes of `--gpus`, by other accumulation."""
    wanted, processes = case.hardware.global_batch, case.launch.processes
    if not case.gpus or wanted is None:
        return
    a_step = processes * args.per_device_train_batch_size
    if wanted % a_step:
        raise InputError(
            f"--gpus {case.gpus}: global batch {wanted} is no multiple of {processes} processes x "
            f"{args.per_device_train_batch_size} rows"
        )
    before, args.gradient_accumulation_steps = args.gradient_accumulation_steps, wanted // a_step
    if getattr(args, "steps_per_generation", None):
        args.steps_per_generation = max(1, args.steps_per_generation * args.gradient_accumulation_steps // before)
        args.generation_batch_size = a_step * args.steps_per_generation


def check_batch(case: Case, args: Any) -> None:
    move(case, args)
    size, steps, processes = args.per_device_train_batch_size, args.gradient_accumulation_steps, case.launch.processes
    wanted, found = case.hardware.global_batch, size * steps * processes
    if wanted is None:
        case.expect(not case.hardware.gpus, f"the first line does not say the global batch, {found}")
        return
    how = f"{processes} processes x {steps} accumulated x {size}"
    case.expect(wanted == found, f"the first line says global batch {wanted}, but {how} are {found}")


def check_groups(case: Case, args: Any) -> None:
    """Note a generation whose groups differ in number or size from those that the first line says."""
    group, said = args.num_generations, (case.hardware.prompts, case.hardware.generations)
    prompts = args.generation_batch_size // group
    case.expect(
        said in ((None, None), (prompts, group)),
        f"the first line says {said[0]} prompts x {said[1]}, a generation is {prompts} x {group}",
    )


def check_context(case: Case, facts: Facts, what: str, length: int) -> None:
    case.expect(
        length <= facts.context, f"{what}: {length} tokens, but the context of {facts.name} is {facts.context}"
    )


def check_weights(case: Case, args: Any, model_args: Any) -> None:
    """Note weights that are trained in a precision too coarse for a step, or that are not saved whole."""
    if not model_args.use_peft and case.launch.sharding == "none":
        case.expect(
            model_args.dtype not in ("bfloat16", "float16", "auto"),
            f"dtype {model_args.dtype} trains bf16 weights, whose rounding swallows steps of {args.learning_rate:g}: "
            "leave it float32, or shard with FSDP2 or ZeRO, which keep float32 masters",
        )
    if getattr(args, "diversity_steps", 0):
        case.expect(
            case.launch.saves_whole_weights, "candidates need zero3_save_16bit_model: true in the accelerate config"
        )
    case.expect(
        not case.launch.offloads, "offload to the CPU dropped gradients silently (arXiv 2604.23747): turn it off"
    )


# ---- All files


CHECKS: dict[str, Callable[[Case], None]] = {
    "sft": check_sft,
    "grpo": check_grpo,
    "chain": check_chain,
    "compare": check_compare,
    "eval": check_eval,
    "probe": check_probe,
    "data": check_data,
}


def check_config(path: Path, gpus: int | None = None) -> Case:
    """Check one file; return all that can be said of it, with what is wrong in `problems`.

    `gpus` moves the stages that run on GPUs to that many.
    """
    case = Case(path, Hardware(0, 0.0), {}, gpus)
    try:
        kind = kind_of(path)
        if kind is None:
            raise InputError(
                f"{path} is no config of a recipe: sft/, grpo/, chain*, compare*, eval*, probe*, data*.yaml are"
            )
        if kind == "accelerate":
            read_launch(path)
            return case
        with _quiet():
            folder = path.absolute().parent
            case.promised = promised_files(folder.parent if kind in ("sft", "grpo") else folder)
            case.hardware = case.hardware if kind == "data" else hardware_of(path)
            CHECKS[kind](case)
    except InputError as error:
        case.problems.append(str(error).removeprefix(f"{path}: "))
    return case


BRIEF = ("  peak", "  time", "  on ")  # begins the lines that are shown in any case


def report(cases: list[Case], *, verbose: bool) -> str:
    lines = []
    for case in cases:
        lines.append(f"{'FAIL' if case.problems else 'ok  '}  {case.path}: {first_comment(case.path)}")
        lines += case.lines if verbose or case.problems else [line for line in case.lines if line.startswith(BRIEF)]
        lines += [f"  FAIL: {problem}" for problem in case.problems]
    failed = sum(bool(case.problems) for case in cases)
    return "\n".join([*lines, f"{len(cases)} files checked, {failed} with problems"])
