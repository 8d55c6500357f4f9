"""Turn a stage's parsed settings into its time, part by part; hours.py has the arithmetic.

Where the settings do not say how many steps or problems there are, an [`InputError`] says what is missing.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..training.measurement import Size, budget_of, fit
from .facts import PROBLEMS, Hardware, Launch, Promise
from .hours import Draw, End, Span, between, forward_flops, generate_s, step_s, vllm_batch, vllm_s
from .memory import Shape, Training, training_items
from .stage_memory import training_of


TRAINING, MEASURING, SAMPLING = "training", "measuring", "sampling"
PROMPT = 512  # tokens of a prompt whose limit nothing says; the benchmarks' problems are mostly shorter
SERVER_SHARE = 0.9  # of a GPU's memory, vLLM's own default


@dataclass(frozen=True)
class Site:
    """What a stage works on: a model, the cards, how it is launched, and the files that `aesl data` will write."""

    shape: Shape
    context: int
    hardware: Hardware
    launch: Launch = Launch()
    promised: Mapping[str, Promise] = field(default_factory=dict)

    def rows(self, dataset: str | None) -> int | None:
        """Return the rows that a data*.yaml asks for, else those of a file that is here; None where neither tells."""
        promise = self.promised.get(str(dataset))
        if promise and promise.rows:
            return promise.rows
        path = Path(str(dataset))
        if path.suffix != ".jsonl" or not path.is_file():
            return None
        with open(path, "rb") as file:
            return sum(1 for _ in file)

    def prompt(self, dataset: str | None) -> int:
        """Return the tokens of the longest prompt."""
        promise = self.promised.get(str(dataset))
        return promise.max_prompt or PROMPT if promise else PROMPT


def stage_time(kind: str, site: Site, parsed: tuple, *, models: int = 1) -> dict[str, Span]:
    """Return the time of each part of a stage: `sft`, `grpo`, `probe` or `eval`, the last of `models` models."""
    if kind == "eval":
        return _eval(site, *parsed, models)
    return {"sft": _sft, "grpo": _grpo, "probe": _probe}[kind](site, *parsed)


def _steps(args: Any, rows: int | None, a_step: float) -> int:
    """Return the optimizer steps of a training on `rows`, of which each step takes `a_step`."""
    if args.max_steps > 0:
        return args.max_steps
    if rows is None:
        raise InputError("how many rows dataset_name has is not known here, and max_steps does not say the steps")
    return math.ceil(args.num_train_epochs * math.ceil(rows / a_step))


def _sft(site: Site, script: Any, args: Any, model_args: Any) -> dict[str, Span]:
    run = training_of(site.shape, site.launch, args, model_args, length=args.max_length or site.context)
    gpu_gb = site.hardware.gpu_gb
    steps = _steps(args, site.rows(script.dataset_name), run.processes * run.micro_batches * run.rows)
    found = {TRAINING: between(gpu_gb, lambda end: step_s(run, end)) * steps}
    if args.diversity_steps:
        count = 1 + math.ceil(steps / args.diversity_steps)  # the base, every so many steps, and the last step
        prompt = site.prompt(script.diversity_dataset_name)
        found[MEASURING] = between(gpu_gb, lambda end: measurement_s(run, args, prompt, gpu_gb, end)) * count
    return found


def measurement_s(run: Training, args: Any, prompt: int, gpu_gb: float, end: End) -> float:
    """Return the time of one measurement. `auto` is vLLM at the fast end, and generate at the slow one."""
    backend = _engine(args.diversity_backend, end, "vllm_colocate", "generate")
    asked = Size(args.diversity_num_prompts, args.diversity_num_samples, args.diversity_max_new_tokens)
    size = fit(asked, budget_of(backend, args.diversity_token_budget))
    count, limit = math.ceil(size.num_prompts / run.processes) * size.num_samples, size.max_new_tokens
    figures = size.num_prompts * size.num_samples * end.expected.figures_s
    if backend == "generate":
        adapter, batch = run.lora_rank is not None, args.diversity_batch_size
        draw = Draw(count, batch, prompt, limit, size.num_samples, adapter, run.stream_bytes)
        return generate_s(run.shape, end, draw) + figures
    batch = vllm_batch(run.shape, gpu_gb * args.diversity_vllm_gpu_memory_utilization, prompt + limit)
    scores = count * _forward_s(run.shape, prompt + limit, end)
    drawn = vllm_s(run.shape, end, Draw(count, batch, prompt, limit, size.num_samples))
    return drawn + end.expected.sync_s + scores + figures


def _engine(backend: str, end: End, vllm: str, other: str) -> str:
    if backend != "auto":
        return backend
    return vllm if end.expected.overlaps else other


def _forward_s(shape: Shape, limit: int, end: End) -> float:
    """Return the time of a forward pass over one sample of up to `limit` tokens."""
    length = limit * end.expected.filled
    return length * forward_flops(shape, length) / end.training


def _grpo(site: Site, script: Any, args: Any, model_args: Any) -> dict[str, Span]:
    prompt, limit = site.prompt(script.dataset_name), args.max_completion_length
    kind = {"length": prompt + limit, "masked": True, "trl_head": True}
    run = training_of(site.shape, site.launch, args, model_args, **kind)
    updates = args.steps_per_generation * args.num_iterations  # micro-batches that learn from one generation
    prompts = run.processes * run.micro_batches * run.rows / (args.num_generations * args.num_iterations)
    steps = _steps(args, site.rows(script.dataset_name), prompts)
    # TRL scores the samples before it trains on them where vLLM drew them, or where they outlive the step
    scored = (args.use_vllm and args.vllm_importance_sampling_correction) or run.micro_batches % updates != 0
    forwards = (int(scored) + int(bool(args.beta))) / args.num_iterations  # once a generation, however often it serves
    gpu_gb, count = site.hardware.gpu_gb, run.rows * args.steps_per_generation

    def train(end: End) -> float:
        return step_s(run, end, forwards=forwards)

    def sample(end: End) -> float:
        how = {"prompt": prompt, "limit": limit, "per_prompt": args.num_generations}
        if not args.use_vllm:
            adapter = run.lora_rank is not None
            return generate_s(
                run.shape, end, Draw(count, count, adapter=adapter, weight_bytes=run.stream_bytes, **how)
            )
        drawn, share, parallel = count, args.vllm_gpu_memory_utilization, 1
        if args.vllm_mode == "server":
            parallel, share = site.hardware.vllm_gpus or 1, SERVER_SHARE
            drawn = math.ceil(count * run.processes / parallel)
        weight_gb = None if run.bits == 16 else training_items(run)[0].gb
        batch = vllm_batch(run.shape, gpu_gb * share, prompt + limit, weight_gb=weight_gb)
        return vllm_s(run.shape, end, Draw(drawn, batch, **how)) + end.expected.sync_s

    generations = steps * run.micro_batches / updates
    return {SAMPLING: between(gpu_gb, sample) * generations, TRAINING: between(gpu_gb, train) * steps}


def _probe(site: Site, script: Any, args: Any, model_args: Any) -> dict[str, Span]:
    """Return the time of sampling one checkpoint by generate; `rl_steps` is left out."""
    count = math.ceil(script.num_prompts / site.launch.processes) * script.num_samples
    prompt = site.prompt(script.eval_dataset_name or script.dataset_name)
    weight_bytes = 4 if model_args.dtype in (None, "float32") else 2
    draw = Draw(
        count, script.batch_size, prompt, args.max_completion_length, script.num_samples, weight_bytes=weight_bytes
    )
    figures = script.num_prompts * script.num_samples
    return {
        SAMPLING: between(
            site.hardware.gpu_gb,
            lambda end: generate_s(site.shape, end, draw) + figures * end.expected.figures_s,
        )
    }


def _eval(site: Site, args: Any, models: int) -> dict[str, Span]:
    gpu_gb, problems = site.hardware.gpu_gb, _problems(site, args)
    prompt = PROMPT if args.benchmarks else site.prompt(args.dataset_name)
    count = math.ceil(problems / site.launch.processes) * args.num_samples

    def sample(end: End) -> float:
        figures = problems * args.num_samples * end.expected.figures_s
        if _engine(args.backend, end, "vllm", "transformers") == "transformers":
            return generate_s(site.shape, end, Draw(count, args.batch_size, prompt, args.max_new_tokens)) + figures
        batch = vllm_batch(site.shape, gpu_gb * args.gpu_memory_utilization, prompt + args.max_new_tokens)
        drawn = math.ceil(count / args.tensor_parallel_size)
        return vllm_s(site.shape, end, Draw(drawn, batch, prompt, args.max_new_tokens, args.num_samples)) + figures

    return {SAMPLING: between(gpu_gb, sample) * models}


def _problems(site: Site, args: Any) -> int:
    most = args.num_prompts or math.inf
    if args.benchmarks:
        return sum(min(PROBLEMS[name], most) for name in args.benchmarks)
    found = min(site.rows(args.dataset_name) or math.inf, most)
    if found == math.inf:
        raise InputError("how many problems dataset_name has is not known here, and num_prompts does not say it")
    return found


def told(parts: Mapping[str, Span]) -> str:
    """Write the time of a stage's parts, and their sum where there are several."""
    each = ", ".join(f"{span} {name}" for name, span in parts.items())
    return f"{sum(parts.values(), Span())}: {each}" if len(parts) > 1 else each
