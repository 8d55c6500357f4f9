"""A stage's settings -> the items of its memory: which of them exist, and how many rows and tokens they hold.

The arithmetic is memory.py's; whether the sum fits is said by check.py.
"""

from typing import Any

from .facts import Hardware, Launch
from .memory import (
    ALWAYS,
    GB,
    VLLM,
    Budget,
    Item,
    Shape,
    Training,
    budget,
    forward_item,
    gathered_for_sampling,
    sampling_items,
    training_items,
    vllm_item,
    vllm_sequences,
)


def training_of(shape: Shape, launch: Launch, args: Any, model_args: Any, *, length: int, **given: bool) -> Training:
    """How the parsed settings train; `length` is the tokens of a row."""
    bits = 4 if model_args.load_in_4bit else 8 if model_args.load_in_8bit else 16
    return Training(
        shape,
        processes=launch.processes,
        sharding=launch.sharding,
        weight_bytes=4 if model_args.dtype in (None, "float32") else 2,
        bits=bits,
        nested=model_args.use_bnb_nested_quant,
        lora_rank=model_args.lora_r if model_args.use_peft else None,
        lora_dropout=model_args.lora_dropout,
        optimizer=str(getattr(args.optim, "value", args.optim)),
        checkpointing=args.gradient_checkpointing,
        rows=args.per_device_train_batch_size,
        length=length,
        **{"masked": args.per_device_train_batch_size > 1, **given},
    )


def sft_items(run: Training, args: Any, prompt: int, gpu_gb: float) -> list[Item]:
    """Training, evaluation, and the monitoring's samples of `prompt` and new tokens."""
    items = training_items(run)
    if args.eval_strategy != "no":
        items.append(forward_item(run.shape, args.per_device_eval_batch_size * run.length))
    return [*items, *_monitoring(run, args, prompt, gpu_gb)] if args.diversity_steps else items


def _monitoring(run: Training, args: Any, prompt: int, gpu_gb: float) -> list[Item]:
    """By the backend; of `auto` what either would take, as two phases."""
    backend, items = args.diversity_backend, []
    if backend in ("auto", "generate"):
        mine = -(-args.diversity_num_prompts // run.processes) * args.diversity_samples
        items += sampling_items(
            run.shape,
            samples=min(args.diversity_batch_size, mine),
            prompt=prompt,
            new_tokens=args.diversity_max_new_tokens,
            element_bytes=run.stream_bytes,
            name="monitoring",
        )
        items += gathered_for_sampling(run)
    if backend != "generate":
        tokens = run.rows * (
            prompt + args.diversity_max_new_tokens
        )  # as many at once as in training: training/measurement.py
        items.append(forward_item(run.shape, tokens, name="monitoring: scores", phase=VLLM))
    if backend in ("auto", "vllm_colocate"):
        sleeps = args.diversity_vllm_enable_sleep_mode
        items.append(vllm_item(gpu_gb, args.diversity_vllm_gpu_memory_utilization, sleeps))
    return items


def monitoring_room(run: Training, args: Any, prompt: int, gpu_gb: float) -> tuple[float, float] | None:
    """(GB of vLLM's share, sequences that it holds) where the monitoring may start one on the GPU, else None."""
    if not args.diversity_steps or args.diversity_backend not in ("auto", "vllm_colocate"):
        return None
    share_gb = gpu_gb * args.diversity_vllm_gpu_memory_utilization
    return share_gb, vllm_sequences(run.shape, share_gb, prompt + args.diversity_max_new_tokens)


def grpo_items(run: Training, args: Any, hardware: Hardware, prompt: int) -> list[Item]:
    """Training, a reference model where there is one, and what samples: `generate`, or vLLM on the same GPUs."""
    items = training_items(run)
    if args.beta and run.lora_rank is None:
        share = run.processes if run.sharding in ("fsdp", "zero3") else 1
        size = run.shape.parameters * run.trained_bytes / share / GB
        items.append(Item("reference model", ALWAYS, size, f"beta {args.beta} needs a frozen copy"))
    if args.use_vllm:
        if args.vllm_mode == "server":
            return items
        share_of_gpu, sleeps = args.vllm_gpu_memory_utilization, args.vllm_enable_sleep_mode
        return [*items, vllm_item(hardware.gpu_gb, share_of_gpu, sleeps)]
    samples = args.per_device_train_batch_size * args.steps_per_generation
    drawn = sampling_items(
        run.shape,
        samples=samples,
        prompt=prompt,
        new_tokens=args.max_completion_length,
        element_bytes=run.stream_bytes,
    )
    return [*items, *drawn, *gathered_for_sampling(run)]


def vllm_room(run: Training, args: Any, hardware: Hardware, length: int) -> tuple[float, float]:
    """(GB of vLLM's share of a GPU, sequences of `length` tokens that its cache holds at once) for a GRPO run."""
    if args.vllm_mode == "server":
        share_gb, parallel = hardware.gpu_gb * 0.9, hardware.vllm_gpus or 1  # vLLM's own default
    else:
        share_gb, parallel = hardware.gpu_gb * args.vllm_gpu_memory_utilization, args.vllm_tensor_parallel_size
    weights = None if run.bits == 16 else next(item.gb for item in training_items(run) if item.name == "weights")
    return share_gb, vllm_sequences(run.shape, share_gb, length, tensor_parallel=parallel, weight_gb=weights)


def sampling_budget(
    shape: Shape, gpu_gb: float, *, samples: int, prompt: int, new_tokens: int, weight_bytes: int = 2
) -> Budget:
    """A model that only samples, by `generate`."""
    weights = Item("weights", ALWAYS, shape.parameters * weight_bytes / GB, f"{weight_bytes} bytes each")
    drawn = sampling_items(shape, samples=samples, prompt=prompt, new_tokens=new_tokens, element_bytes=weight_bytes)
    return budget([weights, *drawn], gpu_gb)
