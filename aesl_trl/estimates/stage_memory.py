"""Turn a stage's settings into the items of its memory; memory.py counts them, check.py says whether they fit."""

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
    """Return how the parsed settings train; `length` is the tokens of a row, `given` are more fields of Training."""
    return Training(
        shape,
        processes=launch.processes,
        sharding=launch.sharding,
        weight_bytes=4 if model_args.dtype in (None, "float32") else 2,
        bits=4 if model_args.load_in_4bit else 8 if model_args.load_in_8bit else 16,
        nested=model_args.use_bnb_nested_quant,
        lora_rank=model_args.lora_r if model_args.use_peft else None,
        lora_dropout=model_args.lora_dropout,
        optimizer=str(getattr(args.optim, "value", args.optim)),
        checkpointing=args.gradient_checkpointing,
        rows=args.per_device_train_batch_size,
        micro_batches=args.gradient_accumulation_steps,
        length=length,
        **{"masked": args.per_device_train_batch_size > 1, **given},
    )


def sft_items(run: Training, args: Any, prompt: int, gpu_gb: float) -> list[Item]:
    """Return the items of training, of evaluation, and of monitoring on prompts of `prompt` tokens."""
    items = training_items(run)
    if args.eval_strategy != "no":
        items.append(forward_item(run.shape, args.per_device_eval_batch_size * run.length))
    return [*items, *_monitoring(run, args, prompt, gpu_gb)] if args.diversity_steps else items


def _monitoring(run: Training, args: Any, prompt: int, gpu_gb: float) -> list[Item]:
    """Return the items of the backend; for `auto` those of both, in two phases."""
    backend, items = args.diversity_backend, []
    if backend in ("auto", "generate"):
        on_one_process = -(-args.diversity_num_prompts // run.processes) * args.diversity_num_samples
        items += sampling_items(
            run.shape,
            samples=min(args.diversity_batch_size, on_one_process),
            prompt=prompt,
            new_tokens=args.diversity_max_new_tokens,
            element_bytes=run.stream_bytes,
            name="monitoring",
        )
        items += gathered_for_sampling(run)
    if backend != "generate":
        # The model scores vLLM's samples in batches of the training's size (training/measurement.py)
        tokens = run.rows * (prompt + args.diversity_max_new_tokens)
        items.append(forward_item(run.shape, tokens, name="monitoring: scores", phase=VLLM))
    if backend in ("auto", "vllm_colocate"):
        sleeps = args.diversity_vllm_enable_sleep_mode
        items.append(vllm_item(gpu_gb, args.diversity_vllm_gpu_memory_utilization, sleeps))
    return items


def monitoring_room(run: Training, args: Any, prompt: int, gpu_gb: float) -> tuple[float, float] | None:
    """Return the GB of vLLM's share and the sequences that it holds, None where monitoring starts no vLLM here."""
    if not args.diversity_steps or args.diversity_backend not in ("auto", "vllm_colocate"):
        return None
    share_gb = gpu_gb * args.diversity_vllm_gpu_memory_utilization
    return share_gb, vllm_sequences(run.shape, share_gb, prompt + args.diversity_max_new_tokens)


def grpo_items(run: Training, args: Any, hardware: Hardware, prompt: int) -> list[Item]:
    """Return the items of training, of a reference model if any, and of sampling by `generate` or by vLLM here."""
    items = training_items(run)
    if args.beta and run.lora_rank is None:
        share = run.processes if run.sharding in ("fsdp", "zero3") else 1
        size = run.shape.parameters * run.trained_bytes / share / GB
        items.append(Item("reference model", ALWAYS, size, f"beta {args.beta} needs a frozen copy"))
    if args.use_vllm and args.vllm_mode == "server":
        return items
    if args.use_vllm:
        return [*items, vllm_item(hardware.gpu_gb, args.vllm_gpu_memory_utilization, args.vllm_enable_sleep_mode)]
    drawn = sampling_items(
        run.shape,
        samples=args.per_device_train_batch_size * args.steps_per_generation,
        prompt=prompt,
        new_tokens=args.max_completion_length,
        element_bytes=run.stream_bytes,
    )
    return [*items, *drawn, *gathered_for_sampling(run)]


def vllm_room(run: Training, args: Any, hardware: Hardware, length: int) -> tuple[float, float]:
    """Return the GB of vLLM's share of a GPU in GRPO, and the sequences of `length` tokens that its cache holds."""
    if args.vllm_mode == "server":
        share_gb, parallel = hardware.gpu_gb * 0.9, hardware.vllm_gpus or 1  # 0.9 is vLLM's own default
    else:
        share_gb, parallel = hardware.gpu_gb * args.vllm_gpu_memory_utilization, args.vllm_tensor_parallel_size
    weights = None if run.bits == 16 else next(item.gb for item in training_items(run) if item.name == "weights")
    return share_gb, vllm_sequences(run.shape, share_gb, length, tensor_parallel=parallel, weight_gb=weights)


def sampling_budget(
    shape: Shape, gpu_gb: float, *, samples: int, prompt: int, new_tokens: int, weight_bytes: int = 2
) -> Budget:
    """Sum the memory of a model that only samples, by `generate`."""
    weights = Item("weights", ALWAYS, shape.parameters * weight_bytes / GB, f"{weight_bytes} bytes each")
    drawn = sampling_items(shape, samples=samples, prompt=prompt, new_tokens=new_tokens, element_bytes=weight_bytes)
    return budget([weights, *drawn], gpu_gb)
