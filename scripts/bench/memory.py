"""Train a stage of a recipe for a few steps, and set its peak memory beside the estimate of `aesl recipes check`.

    python scripts/bench/memory.py sft|grpo --model FOLDER [--full] [--steps 10] [--json FILE]

The stage is `aesl_trl.sft` or `aesl_trl.grpo` with a config of the Qwen2.5-1.5B-Instruct recipe; only its data, its
length and the number of steps are others. `scripts/build_random_model.py` makes the model: a sample ends by chance
alone, so that every completion has its full length. `--full` trains all weights instead of an adapter.

On a GPU two pairs stand side by side: what the tensors took at most beside the items of the estimate, and what the
GPU had to hold (the allocator's reserve, and CUDA's own) beside the whole estimate, which adds an allowance for both.
Another program on the same GPU would count as CUDA's own. On a CPU the rise of the resident memory shows that the
script runs, and nothing more.
"""

import argparse
import json
import random
import tempfile
from importlib import import_module
from pathlib import Path

import record
import torch
from transformers import AutoTokenizer

from aesl_trl.arguments import parse
from aesl_trl.estimates.facts import Hardware, Launch, local_facts, shape_of
from aesl_trl.estimates.memory import GB, Budget, budget
from aesl_trl.estimates.stage_memory import grpo_items, sft_items, training_of
from aesl_trl.recipes.recipes import recipes_dir


CONFIGS = {"sft": "sft/config_aesl_lora.yaml", "grpo": "grpo/config_lora.yaml"}


def letters(completions: list, **kwargs) -> list[float]:
    """Reward a completion for the share of its letters that are an `a`: as good as any, and random groups differ."""
    texts = [completion[0]["content"] for completion in completions]
    return [text.count("a") / max(1, len(text)) for text in texts]


def write_rows(kind: str, path: Path, args: argparse.Namespace) -> None:
    """Write conversations of random words: demonstrations of `length` tokens, or prompts of a quarter of it."""
    vocabulary = [word for word in AutoTokenizer.from_pretrained(args.model).get_vocab() if word.startswith("\u0120")]
    generator = random.Random(0)

    def turn(role: str, tokens: int) -> dict:
        return {"role": role, "content": "".join(f" {word[1:]}" for word in generator.choices(vocabulary, k=tokens))}

    prompt = args.length // 4
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(args.rows):
            row = {"prompt": [turn("user", prompt - 3)]}  # the template adds three tokens
            if kind == "sft":
                row["completion"] = [turn("assistant", args.length - prompt - 1)]
            file.write(f"{json.dumps(row)}\n")


def flags(kind: str, folder: Path, args: argparse.Namespace) -> list[str]:
    """Return the stage's command line: the recipe's config, and what differs from it here."""
    values = {
        "config": recipes_dir() / "Qwen2.5-1.5B-Instruct" / CONFIGS[kind],
        "model_name_or_path": args.model,
        "dataset_name": folder / "rows.jsonl",
        "output_dir": folder / "run",
        "max_steps": args.steps,
        "save_strategy": "no",
    }
    if kind == "sft":
        # Monitoring has a benchmark of its own; the config's file of prompts has to be there even so
        prompts = folder / "rows.jsonl"
        values |= {"diversity_steps": 0, "diversity_dataset_name": prompts, "max_length": args.length}
    else:
        values |= {"max_completion_length": args.new_tokens}
        values |= {"reward_funcs": f"{Path(__file__).resolve()}:letters"}
    if args.full:
        values |= {"use_peft": "false", "learning_rate": "1e-6"}
    if not torch.cuda.is_available():
        values |= {"use_cpu": "true", "bf16": "false", "dtype": "float32", "gradient_accumulation_steps": 1}
        values |= {"per_device_train_batch_size": 2, "num_generations": 2} if kind == "grpo" else {}
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def estimate(kind: str, argv: list[str], args: argparse.Namespace, gpu_gb: float) -> tuple[float, float]:
    """Return GB: the largest phase of the items alone, and with the allowances that `aesl recipes check` adds."""
    stage = import_module(f"aesl_trl.training.{kind}")
    _, config, model_args = parse(stage.ARGUMENT_TYPES, argv, prog="memory.py")
    shape, prompt = shape_of(local_facts(args.model)), args.length // 4
    if kind == "sft":
        run = training_of(shape, Launch(), config, model_args, length=args.length)
        items = sft_items(run, config, prompt, gpu_gb)
    else:
        kinds = {"length": prompt + args.new_tokens, "masked": True, "trl_head": True}
        run = training_of(shape, Launch(), config, model_args, **kinds)
        items = grpo_items(run, config, Hardware(gpus=1, gpu_gb=gpu_gb), prompt)
    return Budget(items, gpu_gb).peak_gb, budget(items, gpu_gb).peak_gb


def measured(kind: str, argv: list[str]) -> dict[str, float]:
    """Run the stage in this process, and return GB: of its tensors, and of what the GPU held for it."""
    on_gpu = torch.cuda.is_available()
    before = 0 if on_gpu else record.reset_peak()
    import_module(f"aesl_trl.{kind}").main(argv)
    if not on_gpu:
        return {"resident": (record.resident_bytes("VmHWM") - before) / GB}
    free, total = torch.cuda.mem_get_info()
    own = total - free - torch.cuda.memory_reserved()
    reserved = torch.cuda.max_memory_reserved() + own
    return {"tensors": torch.cuda.max_memory_allocated() / GB, "GPU": reserved / GB}


def bench(args: argparse.Namespace) -> dict:
    """Return the table of what was measured and what was estimated."""
    gpu_gb = torch.cuda.mem_get_info()[1] / GB if torch.cuda.is_available() else 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(args.kind, folder / "rows.jsonl", args)
        argv = flags(args.kind, folder, args)
        items, whole = estimate(args.kind, argv, args, gpu_gb)
        found = measured(args.kind, argv)
    estimates = {"tensors": items, "GPU": whole, "resident": items}
    rows = [[what, gb, estimates[what], gb / estimates[what]] for what, gb in found.items()]
    how = "all weights" if args.full else "LoRA"
    sizes = f"{args.length} tokens a row" if args.kind == "sft" else f"{args.new_tokens} new tokens a completion"
    title = f"Peak memory of {args.steps} steps, {args.kind.upper()}, {how}, {Path(args.model).name}, {sizes}"
    return record.table(title, ["memory", "measured GB", "estimated GB", "measured to estimated"], rows, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=list(CONFIGS))
    parser.add_argument("--model", required=True, metavar="FOLDER")
    parser.add_argument("--full", action="store_true", help="train all weights, not an adapter")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a demonstration; a prompt has a quarter")
    parser.add_argument("--new_tokens", type=int, default=96, help="of a completion, for grpo")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    record.write(args.json, f"memory_{args.kind}", [record.show(bench(args))])


if __name__ == "__main__":
    main()
