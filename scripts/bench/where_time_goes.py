"""Show where the CPU time of one SFT step, one GRPO step and one measurement goes: ours, and TRL's beside it.

    python scripts/bench/where_time_goes.py --rows train.jsonl [--model FOLDER] [--bf16] [--steps 2] [--json FILE]

A timer that runs on the process's CPU time asks every few milliseconds which Python line is at work. The time since
the last question goes to the innermost frame outside torch and the standard library. If that frame is ours, the time
is ours; else it belongs to the part of the step that the frame tells. Autograd's backward pass runs no Python, except
for our head and TRL's, so the layers' backward pass is what accelerate's `backward` waits for.

The last of `--steps` steps is shown; earlier ones load what is loaded once. So each row is one single step, and TRL's
runs first: read the shares, which noise of the machine moves alike. "time to TRL's" is one ratio without a spread, and
scripts/bench/step.py measures that ratio by turns. SFT trains all tokens of the rows'
`question` and `answer` (GSM8K's JSONL), by AESL and by SFTTrainer's nll. GRPO samples `--samples` completions of one
question, with `math_reward` in ours and `accuracy_reward` in TRL's GRPOTrainer; what graders compute in other
processes is not in the time. TRL has no measurement.
"""

import argparse
import json
import signal
import tempfile
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from types import FrameType

import record
import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from trl.rewards import accuracy_reward

from aesl_trl import AESLSFTConfig, AESLSFTTrainer
from aesl_trl.recipes.recipes import recipes_dir
from aesl_trl.rewards.functions import load_reward_funcs
from aesl_trl.training.grpo import trainer_class


INTERVAL_S = 0.004
OWNERS = ("aesl_trl", "trl", "transformers", "peft", "accelerate", "datasets")
# (part, beginnings of a full name); the first that holds counts. `generate` is looked for in the whole stack
PARTS = [
    ("head and loss", ("trl.kernels", "trl.trainer.utils", "transformers.loss", "aesl_trl.losses")),
    ("backward of the layers", ("accelerate.accelerator.Accelerator.backward",)),
    ("optimizer", ("accelerate.optimizer", "accelerate.accelerator.Accelerator.clip_grad_norm_")),
    ("forward of the layers", ("transformers.m", "transformers.integrations", "transformers.activations", "peft")),
]
COLUMNS = ["sampling", "forward of the layers", "backward of the layers", "head and loss", "optimizer", "rest"]
SHOWN = 0.02  # of a step's time, from which one of our functions is named


class Sampled:
    """Counts CPU seconds by (part, owner) while it is entered."""

    def __init__(self):
        self.seconds: Counter[tuple[str, str]] = Counter()

    def __enter__(self) -> "Sampled":
        self.last = time.process_time()
        self.before = signal.signal(signal.SIGPROF, self._tick)
        signal.setitimer(signal.ITIMER_PROF, INTERVAL_S, INTERVAL_S)
        return self

    def __exit__(self, *exception) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, self.before)

    def _tick(self, number: int, frame: FrameType | None) -> None:
        # Python calls this once an operation of torch has returned, however long it took: the frame has called it
        now = time.process_time()
        self.seconds[place_of(frame)] += now - self.last
        self.last = now


def place_of(frame: FrameType | None) -> tuple[str, str]:
    """Return the part that a frame works on, and its innermost function outside torch and the standard library."""
    owner, is_sampling = None, False
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if owner is None and module.split(".")[0] in OWNERS:
            owner = f"{module}.{frame.f_code.co_qualname}"
        is_sampling = is_sampling or module == "transformers.generation.utils"
        frame = frame.f_back
    if owner is None:
        return "rest", "python"
    part = next((part for part, names in PARTS if owner.startswith(names)), "rest")
    return "sampling" if is_sampling and part != "head and loss" else part, owner


class LastStep(TrainerCallback):
    """Enters `sampled` for the last step of a training, from forward to optimizer."""

    def __init__(self, sampled: Sampled):
        self.sampled = sampled

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps - 1:
            self.sampled.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps:
            self.sampled.__exit__()


def read_rows(args: argparse.Namespace, num: int) -> list[dict]:
    lines = islice(args.rows.read_text(encoding="utf-8").splitlines(), num)
    return [json.loads(line) for line in lines]


def settings(args: argparse.Namespace, folder: str) -> dict:
    return {
        "output_dir": folder,
        "use_cpu": True,
        "bf16": args.bf16,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "max_steps": args.steps,
        "learning_rate": 1e-5,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def load(args: argparse.Namespace):
    return AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)


def sft_trainer(args: argparse.Namespace, folder: str, is_ours: bool) -> SFTTrainer:
    """Return a trainer of full rows; ours has one measurement's settings too."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = []
    for row in read_rows(args, args.batch * args.steps):
        ids = tokenizer(f"{row['question']}\n{row['answer']}")["input_ids"][: args.length - 1]
        ids.append(tokenizer.eos_token_id)
        rows.append({"input_ids": ids, "labels": [-100, *ids[1:]]})
    common = settings(args, folder) | {"per_device_train_batch_size": args.batch, "max_length": args.length}
    data = {"train_dataset": Dataset.from_list(rows), "processing_class": tokenizer}
    if not is_ours:
        return SFTTrainer(model=load(args), args=SFTConfig(**common), **data)
    diversity = {
        "diversity_steps": args.steps + 1,  # never by itself after step 0
        "diversity_num_prompts": args.prompts,
        "diversity_num_samples": args.samples,
        "diversity_max_new_tokens": args.max_new_tokens,
        "diversity_token_budget": 0,
    }
    prompts = [row["question"] for row in read_rows(args, args.prompts)]
    return AESLSFTTrainer(
        model=load(args), args=AESLSFTConfig(**common, **diversity), diversity_prompts=prompts, **data
    )


def grpo_trainer(args: argparse.Namespace, folder: str, is_ours: bool) -> GRPOTrainer:
    """Return a trainer whose step draws and trains on one group."""
    rows = [
        {"prompt": row["question"], "solution": f"${row['answer'].rpartition('#### ')[2]}$"}
        for row in read_rows(args, args.steps)
    ]
    kind, reward = (trainer_class(), load_reward_funcs(["math_reward"])[0]) if is_ours else (GRPOTrainer, as_texts)
    return kind(
        model=load(args),
        reward_funcs=[reward],
        args=GRPOConfig(
            **settings(args, folder),
            per_device_train_batch_size=args.samples,
            num_generations=args.samples,
            max_completion_length=args.max_new_tokens,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(args.model, padding_side="left"),
    )


def as_texts(completions: list[str], solution: list[str], **columns) -> list[float | None]:
    """Give plain texts to TRL's `accuracy_reward`, which reads messages."""
    return accuracy_reward([[{"role": "assistant", "content": text}] for text in completions], solution)


def profile_training(trainer: SFTTrainer | GRPOTrainer) -> Sampled:
    sampled = Sampled()
    trainer.remove_callback(PrinterCallback)
    trainer.callback_handler.callbacks.insert(0, LastStep(sampled))  # its end comes before a last measurement
    trainer.train()
    return sampled


def row_of(name: str, sampled: Sampled, peer: Sampled | None) -> list:
    """Return a row of shares; the last cell names our functions that take more than `SHOWN`."""
    total = sampled.seconds.total()
    shares, functions = Counter(), Counter()
    for (part, function), seconds in sampled.seconds.items():
        shares[part] += seconds / total
        if function.startswith("aesl_trl."):
            functions[function.removeprefix("aesl_trl.")] += seconds / total
    ours = [f"`{function}` {share:.0%}" for function, share in functions.most_common() if share > SHOWN]
    cells = [f"{shares[part]:.0%}" if shares[part] >= 0.005 else None for part in COLUMNS]
    return [name, total / peer.seconds.total() if peer else None, *cells, ", ".join(ours) or None]


def bench(args: argparse.Namespace) -> dict:
    """Return the table of five lines."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for stage, make in (("SFT step", sft_trainer), ("GRPO step", grpo_trainer)):
            for whose in ("TRL", "ours"):
                trainer = make(args, f"{folder}/{stage}-{whose}", whose == "ours")
                found[f"{stage}, {whose}"] = profile_training(trainer)
                if (stage, whose) == ("SFT step", "ours"):  # its measurement at step 0 has loaded what is loaded once
                    with Sampled() as sampled:
                        trainer.diversity_callback.measurement.measure_step(0, Path(folder))
                del trainer
    found["measurement, ours"] = sampled
    peers = {"SFT step, ours": "SFT step, TRL", "GRPO step, ours": "GRPO step, TRL"}
    rows = [row_of(name, sampled, found.get(peers.get(name))) for name, sampled in found.items()]
    precision = "bf16 autocast" if args.bf16 else "float32"
    title = (
        f"Shares of CPU time, {record.model_name(args.model)}, {precision}: SFT on {args.batch} rows, GRPO on "
        f"{args.samples} samples of at most {args.max_new_tokens} tokens, a measurement of {args.prompts} prompts x "
        f"{args.samples} samples"
    )
    raw = {
        name: {" | ".join(key): value for key, value in sampled.seconds.most_common()}
        for name, sampled in found.items()
    }
    return record.table(title, ["one", "time to TRL's", *COLUMNS, "ours above 2 %"], rows, raw)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, metavar="FILE", required=True, help="JSONL of question and answer")
    parser.add_argument("--model", default=str(recipes_dir() / "skills-tiny" / "base"), help="folder of a model")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8, help="rows of an SFT step")
    parser.add_argument("--length", type=int, default=256, help="most tokens of a row")
    parser.add_argument("--prompts", type=int, default=4, help="of a measurement")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--bf16", action="store_true", help="autocast")
    parser.add_argument("--json", type=Path, metavar="FILE", help="record every function's time")
    args = parser.parse_args()
    disable_progress_bars()
    record.write(args.json, "where_time_goes", [record.show(bench(args))])


if __name__ == "__main__":
    main()
