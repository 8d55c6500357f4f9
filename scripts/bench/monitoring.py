"""Measure the share of a training's time that diversity monitoring takes, on this machine.

    python scripts/bench/monitoring.py [--model MODEL] [--lora] [--steps 100] [--diversity_steps 50] ...

Trains on random tokens (their content plays no part in the time, only their number) with measurements of the default
size, and prints what docs/monitoring_cost.md assumes: training and decoding throughput, and the share that follows
for an interval between two measurements. The first measurement and the first interval are left out: they hold what
happens once. The defaults are the embedded tiny model on this machine; for the single-GPU recipe:

    python scripts/bench/monitoring.py --model Qwen/Qwen2.5-1.5B --lora --batch 4 --accumulation 8 --length 1024
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import record
import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback

from aesl_trl import AESLSFTConfig, AESLSFTTrainer, files
from aesl_trl.recipes.recipes import recipes_dir
from aesl_trl.sampling.backends import TRAINING_BACKENDS


class Clock(TrainerCallback):
    """Keeps when each step began and ended; a measurement lies between two steps."""

    def __init__(self):
        self.began, self.ended = [], []

    def on_step_begin(self, args, state, control, **kwargs):
        self.began.append(now())

    def on_step_end(self, args, state, control, **kwargs):
        self.ended.append(now())


def now() -> float:
    """Return the time in seconds: on CPU this process's CPU time, so that other work on the machine does not count."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(recipes_dir() / "skills-tiny" / "base"))
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--diversity_steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--length", type=int, default=128, help="tokens of a demonstration")
    parser.add_argument("--prompt_length", type=int, default=32)
    parser.add_argument("--num_prompts", type=int, default=AESLSFTConfig.diversity_num_prompts)
    parser.add_argument("--samples", type=int, default=AESLSFTConfig.diversity_num_samples)
    parser.add_argument("--max_new_tokens", type=int, default=AESLSFTConfig.diversity_max_new_tokens)
    parser.add_argument("--batch_size", type=int, default=AESLSFTConfig.diversity_batch_size)
    parser.add_argument("--token_budget", type=int)
    parser.add_argument("--backend", choices=TRAINING_BACKENDS, default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE", help="record every time")
    args = parser.parse_args()
    if args.steps <= args.diversity_steps:
        parser.error("a measurement needs steps before and after it: more than --diversity_steps")
    return args


def random_rows(count: int, length: int, vocabulary: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (count, length), generator=generator).tolist()


def make_trainer(args: argparse.Namespace, folder: str) -> AESLSFTTrainer:
    tokenizer, gpu = AutoTokenizer.from_pretrained(args.model), torch.cuda.is_available()
    rows = args.batch * args.accumulation * args.steps
    prompts = random_rows(args.num_prompts, args.prompt_length, len(tokenizer), 1)
    settings = {
        "output_dir": folder,
        "use_cpu": not gpu,
        "bf16": gpu,
        "gradient_checkpointing": gpu,
        "model_init_kwargs": {"dtype": "bfloat16" if gpu else "float32"},  # as the recipes load a base
        "per_device_train_batch_size": args.batch,
        "gradient_accumulation_steps": args.accumulation,
        "max_length": args.length,
        "max_steps": args.steps,
        "logging_steps": args.diversity_steps,
        "learning_rate": 1e-6,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "max_candidates": 2,
    }
    diversity = {
        "diversity_steps": args.diversity_steps,
        "diversity_num_prompts": args.num_prompts,
        "diversity_num_samples": args.samples,
        "diversity_max_new_tokens": args.max_new_tokens,
        "diversity_batch_size": args.batch_size,
        "diversity_token_budget": args.token_budget,
        "diversity_backend": args.backend,
    }
    demonstrations = [
        {"input_ids": [*ids, tokenizer.eos_token_id], "labels": [-100, *ids[1:], tokenizer.eos_token_id]}
        for ids in random_rows(rows, args.length - 1, len(tokenizer), 0)
    ]
    trainer = AESLSFTTrainer(
        model=args.model,
        args=AESLSFTConfig(**settings, **diversity),
        train_dataset=Dataset.from_list(demonstrations),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if args.lora else None,
        diversity_prompts=[tokenizer.decode(ids) for ids in prompts],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def make_table(rows: list[dict], clock: Clock, size: str, args: argparse.Namespace) -> dict:
    """Return the table of the medians and shares, without the measurement before step 1 and the first interval."""
    every = args.diversity_steps
    between = [begin - end for end, begin in zip(clock.ended, clock.began[1:], strict=False)]
    measured_s = between[every - 1 :: every]
    step_s = [end - begin for begin, end in zip(clock.began, clock.ended, strict=True)]
    step = statistics.median(step_s[every:])
    tokens = statistics.median(row["length"] * row["num_prompts"] * row["num_samples"] for row in rows[1:])
    in_steps = record.spread([seconds / step for seconds in measured_s])
    trained = args.batch * args.accumulation * args.length
    cells = {
        "tokens sampled a measurement": tokens,
        "time of a measurement, in training steps": in_steps,
        "time of a sampled token, in trained tokens": in_steps["median"] / tokens * trained,
        "share of an interval": record.spread([seconds / (seconds + every * step) for seconds in measured_s]),
        "`diversity_steps` for a share of 5%": 19 * in_steps["median"],
    }
    title = (
        f"Monitoring, {record.model_name(args.model)}{', LoRA' if args.lora else ''}, "
        f"{args.batch * args.accumulation} rows of {args.length} tokens a step, {size} by "
        f"{rows[-1]['backend']}, every {every} steps"
    )
    raw = {"measurement_s": measured_s, "step_s": step_s, "sampled_tokens": tokens}
    return record.table(title, ["figure", "value"], [[name, value] for name, value in cells.items()], raw)


def bench(args: argparse.Namespace) -> dict:
    """Train with measurements, and return the table."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, clock = make_trainer(args, folder), Clock()
        trainer.callback_handler.callbacks.insert(0, clock)  # before the measurements
        trainer.train()
        rows = files.RunFolder(folder).rows(files.DIVERSITY)
    return make_table(rows, clock, str(trainer.diversity_callback.measurement.size), args)


def main() -> None:
    args = arguments()
    disable_progress_bars()
    record.write(args.json, "monitoring", [record.show(bench(args))])


if __name__ == "__main__":
    main()
