"""Whole training steps of AESLSFTTrainer beside TRL's SFTTrainer, full fine-tuning and LoRA.

    python scripts/bench/step.py [--model small ...] [--mode both] [--blocks 6] [--json FILE]

The same untrained Qwen2 and the same batches of random tokens, all trained, for every trainer; diversity is not
monitored, every step is logged. The trainers take turns in short blocks of steps, so that noise of a shared machine
hits all alike. A step lasts from its start to the start of the next one (forward, backward, optimizer, logging, next
batch) with the device synchronised; the first one of a block is left out. A ratio is the median of the ratios of
steps with the same place; the goal is at most 1.00. Memory is the peak of a fresh process for each trainer, weights
and optimizer included: on GPU the allocator's, on CPU the rise of the resident memory.

The nll of TRL is shown with its default tiles and, where `--trl-tiles` names them (it does on CPU), with better ones;
scripts/bench/head.py finds them. TRL 1.15's needs a GPU. The losses that the nll trainers log must agree, or there is
no table.
"""

import argparse
import gc
import json
import tempfile
import time
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import torch
from datasets import Dataset, disable_progress_bars
from head import in_fresh_process, machine, print_markdown, ratio, reset_peak, resident_bytes, spread_ms
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Qwen2Config,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils

from aesl_trl import AESLSFTConfig, AESLSFTTrainer


def _shape(
    hidden_size: int, intermediate_size: int, layers: int, heads: int, key_value_heads: int, vocab: int
) -> dict:
    return {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "vocab_size": vocab,
    }


MODELS = {
    "Qwen2.5-0.5B": _shape(896, 4864, 24, 14, 2, 151936),
    "Qwen2.5-1.5B": _shape(1536, 8960, 28, 12, 2, 151936),
    "small": _shape(256, 1024, 4, 4, 2, 32768),
}
BATCH = 4
BLOCK_STEPS, WARMUP_STEPS = 4, 1
LORA = LoraConfig(
    r=16,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    task_type="CAUSAL_LM",
)
TRL, TUNED = "SFTTrainer, nll", "SFTTrainer, nll, tiles "
TOLERANCE = {"cpu": 1e-4, "cuda": 1e-2}  # of the logged losses, relative: float32, bf16


class StepTimer(TrainerCallback):
    """Seconds from the start of each step to the start of the next."""

    def __init__(self):
        self.starts = []

    def on_step_begin(self, args, state, control, **kwargs):
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        self.starts.append(time.perf_counter())

    def take(self) -> list[float]:
        seconds = [end - start for start, end in pairwise(self.starts)][WARMUP_STEPS:]
        self.starts = []
        return seconds


def make_rows(args: argparse.Namespace, vocab: int) -> Dataset:
    """Documents of random tokens: whole rows, or to be packed."""
    generator = torch.Generator().manual_seed(0)
    rows, left = [], int(1.2 * BATCH * BLOCK_STEPS * args.length)  # packing leaves gaps
    while left > 0:
        shortest = args.length // 8 if args.packing else args.length
        length = int(torch.randint(shortest, args.length + 1, (1,), generator=generator))
        ids = torch.randint(2, vocab, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100, *ids[1:]]})  # nothing predicts the first one
        left -= length
    return Dataset.from_list(rows)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The trainers ask for one; the rows are tokenized already."""
    words = Tokenizer(models.WordLevel({"<eos>": 0, "<pad>": 1}, unk_token="<eos>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>")


def make_trainer(args: argparse.Namespace, model: str, mode: str, name: str, folder: str) -> SFTTrainer:
    on_cpu = args.device == "cpu"
    settings = {
        "output_dir": folder,
        "use_cpu": on_cpu,
        "bf16": not on_cpu,
        "gradient_checkpointing": not on_cpu,  # TRL's default, which is of no use to a small model
        "dataloader_pin_memory": not on_cpu,
        "per_device_train_batch_size": BATCH,
        "max_length": args.length,
        "packing": args.packing,
        "max_steps": BLOCK_STEPS,
        "logging_steps": 1,
        "learning_rate": 1e-5,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    with torch.device(args.device):
        torch.manual_seed(0)
        config = Qwen2Config(**MODELS[model], tie_word_embeddings=True, eos_token_id=0, pad_token_id=1)
        network = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if on_cpu else torch.bfloat16)
    is_trl = name.startswith(TRL)
    trainer = (SFTTrainer if is_trl else AESLSFTTrainer)(
        model=network,
        args=SFTConfig(**settings) if is_trl else AESLSFTConfig(**settings, cold_start_loss=name.split()[-1]),
        train_dataset=make_rows(args, config.vocab_size),
        processing_class=make_tokenizer(),
        peft_config=LORA if mode == "LoRA" else None,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def trainer_names(args: argparse.Namespace) -> list[str]:
    tuned = [f"{TUNED}{args.trl_tiles[0]} x {args.trl_tiles[1]}"] if args.trl_tiles else []
    return [TRL, *tuned, "AESLSFTTrainer, nll", "AESLSFTTrainer, aesl"]


def train_block(trainer: SFTTrainer, name: str, args: argparse.Namespace) -> list[float]:
    """The losses that a block of steps logs."""
    with ExitStack() as stack:
        if name.startswith(TUNED):
            rows, columns = args.trl_tiles
            stack.enter_context(patch.object(chunked_logprob, "TOKEN_CHUNK_SIZE", rows))
            stack.enter_context(patch.object(trl_utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", columns))
        trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def print_peak(args: argparse.Namespace) -> None:
    """In a fresh process: the peak of one trainer, in bytes."""
    model, mode, name = args.peak_of
    before = 0 if args.device == "cuda" else reset_peak()
    with tempfile.TemporaryDirectory() as folder:
        train_block(make_trainer(args, model, mode, name, folder), name, args)
    print(torch.cuda.max_memory_allocated() if args.device == "cuda" else resident_bytes("VmHWM") - before)


def bench(args: argparse.Namespace, model: str, mode: str) -> dict:
    """One table: the heading, and for each trainer its seconds and peak bytes."""
    names = trainer_names(args)
    # Before this process takes memory of the GPU itself
    rows = {
        name: {"seconds": [], "losses": [], "peak_bytes": in_fresh_process("--peak-of", model, mode, name)}
        for name in names
    }
    with tempfile.TemporaryDirectory() as folder:
        trainers = {name: make_trainer(args, model, mode, name, folder) for name in names}
        timers = {name: StepTimer() for name in names}
        for name, trainer in trainers.items():
            trainer.add_callback(timers[name])
        for _ in range(args.blocks):
            for name, trainer in trainers.items():
                rows[name]["losses"] += train_block(trainer, name, args)
                rows[name]["seconds"] += timers[name].take()
    refuse_different_losses(rows, TOLERANCE[args.device])
    dtype = "float32" if args.device == "cpu" else "bf16"
    title = (
        f"{'Full fine-tuning' if mode == 'full' else mode}, {model}, {BATCH} x {args.length} tokens"
        f"{', packed' if args.packing else ''}, {dtype}, {machine(args.device)}"
    )
    return {"title": title, "rows": rows}


def refuse_different_losses(rows: dict[str, dict], tolerance: float) -> None:
    expected = torch.tensor(rows[TRL]["losses"])
    for name, row in rows.items():
        error = ((torch.tensor(row["losses"]) - expected) / expected).abs().max()
        if "nll" in name and not error <= tolerance:
            raise SystemExit(f"{name}: the logged loss is {error:.1e} off TRL's")


def print_table(table: dict) -> None:
    rows = table["rows"]
    peers = [name for name in rows if name.startswith(TRL)]
    print(f"\n{table['title']}\n")
    cells = [("trainer", "median ms", "min..max ms", *("to TRL", "to TRL, better tiles")[: len(peers)], "peak MiB")]
    for name, row in rows.items():
        ratios = [ratio(row["seconds"], rows[peer]["seconds"]) for peer in peers]
        cells.append((name, *spread_ms(row["seconds"]), *ratios, f"{row['peak_bytes'] / 2**20:.0f}"))
    print_markdown(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", nargs="+", choices=list(MODELS), help="default: both Qwen2.5 on GPU, small on CPU")
    parser.add_argument("--length", type=int, help="tokens of each of the 4 rows; default: 2048 on GPU, 256 on CPU")
    parser.add_argument("--packing", action=argparse.BooleanOptionalAction, help="default: on GPU")
    parser.add_argument("--mode", choices=["full", "LoRA", "both"], default="both")
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--trl-tiles", type=int, nargs=2, metavar=("TOKENS", "VOCAB"), help="default: 256 4096 on CPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="record every time of every table")
    parser.add_argument("--peak-of", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    on_cpu = args.device == "cpu"
    args.length = args.length or (256 if on_cpu else 2048)
    args.packing = not on_cpu if args.packing is None else args.packing
    args.trl_tiles = args.trl_tiles or ((256, 4096) if on_cpu else None)
    disable_progress_bars()
    if args.peak_of:
        print_peak(args)
        return
    tables = []
    for model in args.model or (["small"] if on_cpu else ["Qwen2.5-0.5B", "Qwen2.5-1.5B"]):
        for mode in ("full", "LoRA") if args.mode == "both" else (args.mode,):
            tables.append(bench(args, model, mode))
            print_table(tables[-1])
            gc.collect()
            torch.cuda.empty_cache()
    if args.json:
        args.json.write_text(json.dumps(tables, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
