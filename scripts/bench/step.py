"""Whole training steps of AESLSFTTrainer beside TRL's SFTTrainer, full fine-tuning and LoRA.

    python scripts/bench/step.py [--model small ...] [--mode both] [--labels all] [--blocks 6] [--json FILE]
    python scripts/bench/step.py --model FOLDER --rows train.jsonl --labels all masked --bf16 --rows_per_step 8 ...

`--model` takes the shape of an untrained Qwen2, or the folder of a real model. The batches are the same for every
trainer: random tokens, or the `question` and `answer` of `--rows` (GSM8K's JSONL). With `--labels all` every token is
trained, with `masked` those of the answer alone (of random tokens the second half). TRL 1.16 scores masked tokens on a
CPU too and ours does not, so the ratio to claim is that of `all`.

Diversity is not monitored, every step is logged. The trainers take turns in short blocks of steps, so that noise of a
shared machine hits all alike; every second turn goes the other way round. The first turn warms up and is not counted.
A step lasts from its start to the start of the next one, the last one to the end of the training (forward, backward,
optimizer, logging, next batch). On GPU the device is synchronised; on CPU the time is this process's CPU time, which
with one thread (OMP_NUM_THREADS=1) is what an idle machine would take. The first `--warmup_steps` of a block are left
out. A ratio is the median of the ratios of steps with the same place; the goal is at most 1.00.
Memory is the peak of one more block beyond what was there before it, weights and the optimizer's state: on GPU the
allocator's, on CPU the resident memory's; `--no-peaks` leaves it out.

The nll of TRL is shown with its default tiles and, where `--trl-tiles` names them (it does on CPU for the untrained
models), with better ones; scripts/bench/head.py finds them. TRL 1.15's needs a GPU. The losses that the nll trainers
log must agree, and at the first step, where all have the same weights, the nll that AESL logs too. A trainer that
disagrees has a row that says by how much, and no ratio.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import cycle, islice, pairwise, product
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import record
import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
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
LORA = LoraConfig(
    r=16,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    task_type="CAUSAL_LM",
)
TRL, TUNED = "SFTTrainer, nll", "SFTTrainer, nll, tiles "
TOLERANCE = {False: 1e-4, True: 1e-2}  # of the logged losses, relative: float32 (where bf16 is not asked for), bf16


class Case(NamedTuple):
    """What one table trains."""

    model: str
    mode: str  # full or LoRA
    labels: str  # all or masked


class StepTimer(TrainerCallback):
    """Seconds from the start of each step to the start of the next."""

    def __init__(self):
        self.starts = []

    def on_step_begin(self, args, state, control, **kwargs):
        if args.device.type == "cuda":
            torch.cuda.synchronize()
            self.starts.append(time.perf_counter())
        else:  # CPU time of one thread is what an idle machine would take
            self.starts.append(time.process_time())

    on_train_end = on_step_begin  # the end of the last step

    def take(self, warmup_steps: int) -> list[float]:
        seconds = [end - start for start, end in pairwise(self.starts)][warmup_steps:]
        self.starts = []
        return seconds


def make_rows(args: argparse.Namespace, labels: str, tokenizer: PreTrainedTokenizerFast, vocab: int) -> Dataset:
    """Return tokenized rows, enough for a block: real text, or random tokens as whole rows or to be packed."""
    pairs = text_rows(args, tokenizer) if args.rows else random_rows(args, vocab, tokenizer.eos_token_id)
    rows = []
    for ids, num_prompt in pairs:
        masked = min(num_prompt, len(ids) - 1) if labels == "masked" else 1  # nothing predicts the first one
        rows.append({"input_ids": ids, "labels": [-100] * masked + ids[masked:]})
    return Dataset.from_list(rows)


def text_rows(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> list[tuple[list[int], int]]:
    """Return (token ids, tokens of the prompt) of the file's first rows as plain text, ended as a sample ends."""
    count, rows = args.rows_per_step * args.block_steps, []
    for line in islice(cycle(args.rows.read_text(encoding="utf-8").splitlines()), count):
        row = json.loads(line)
        prompt, answer = (tokenizer(row[name])["input_ids"] for name in ("question", "answer"))
        rows.append(((prompt + answer)[: args.length - 1] + [tokenizer.eos_token_id], len(prompt)))
    return rows


def random_rows(args: argparse.Namespace, vocab: int, eos: int) -> list[tuple[list[int], int]]:
    """Return (token ids, tokens of the prompt) of random documents, whose first half counts as the prompt."""
    generator = torch.Generator().manual_seed(0)
    rows, left = [], int(1.2 * args.rows_per_step * args.block_steps * args.length)  # packing leaves gaps
    while left > 0:
        shortest = args.length // 8 if args.packing else args.length
        length = int(torch.randint(shortest, args.length + 1, (1,), generator=generator))
        ids = torch.randint(2, vocab, (length,), generator=generator).tolist()
        rows.append((ids[:-1] + [eos], length // 2))
        left -= length
    return rows


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The trainers ask for one; the rows are tokenized already."""
    words = Tokenizer(models.WordLevel({"<eos>": 0, "<pad>": 1}, unk_token="<eos>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>")


def load(args: argparse.Namespace, model: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Return the named untrained model, or the model in a folder, and a tokenizer."""
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    if model not in MODELS:
        return AutoModelForCausalLM.from_pretrained(model, dtype=dtype), AutoTokenizer.from_pretrained(model)
    with torch.device(args.device):
        torch.manual_seed(0)
        config = Qwen2Config(**MODELS[model], tie_word_embeddings=True, eos_token_id=0, pad_token_id=1)
        return AutoModelForCausalLM.from_config(config, dtype=dtype), make_tokenizer()


def make_trainer(args: argparse.Namespace, case: Case, name: str, folder: str) -> SFTTrainer:
    on_cpu = args.device == "cpu"
    settings = {
        "output_dir": folder,
        "use_cpu": on_cpu,
        "bf16": args.bf16,
        "gradient_checkpointing": not on_cpu,  # TRL's default, which is of no use to a small model
        "dataloader_pin_memory": not on_cpu,
        "per_device_train_batch_size": args.rows_per_step,
        "max_length": args.length,
        "packing": args.packing,
        "max_steps": args.block_steps,
        "logging_steps": 1,
        "learning_rate": 1e-5,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    network, tokenizer = load(args, case.model)
    is_trl = name.startswith(TRL)
    trainer = (SFTTrainer if is_trl else AESLSFTTrainer)(
        model=network,
        args=SFTConfig(**settings) if is_trl else AESLSFTConfig(**settings, cold_start_loss=name.split()[-1]),
        train_dataset=make_rows(args, case.labels, tokenizer, network.config.vocab_size),
        processing_class=tokenizer,
        peft_config=LORA if case.mode == "LoRA" else None,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def trainer_names(args: argparse.Namespace) -> list[str]:
    if args.trainers == "pair":
        return [TRL, "AESLSFTTrainer, aesl"]
    tuned = [f"{TUNED}{args.trl_tiles[0]} x {args.trl_tiles[1]}"] if args.trl_tiles else []
    return [TRL, *tuned, "AESLSFTTrainer, nll", "AESLSFTTrainer, aesl"]


def train_block(trainer: SFTTrainer, name: str, args: argparse.Namespace) -> list[dict]:
    """Train a block of steps, and return what each of them logs."""
    with ExitStack() as stack:
        if name.startswith(TUNED):
            rows, columns = args.trl_tiles
            stack.enter_context(patch.object(chunked_logprob, "TOKEN_CHUNK_SIZE", rows))
            stack.enter_context(patch.object(trl_utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", columns))
        trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


def peak_bytes(run: Callable[[], object], on_cpu: bool) -> int:
    """Return the bytes by which a run's peak of memory is above its start."""
    gc.collect()
    if on_cpu:
        with record.resident_rise() as rise:
            run()
        return rise[0]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def bench(args: argparse.Namespace, case: Case, keep: Callable[[dict], None]) -> dict:
    """Return one table: each trainer's ratios and peak memory. `keep` gets the table after each turn."""
    names = trainer_names(args)
    peaks, on_cpu = {}, args.device == "cpu"
    seconds, losses = {name: [] for name in names}, {name: [] for name in names}
    raw = {"seconds": seconds, "losses": losses, "first_nll": {}, "peak_bytes": peaks}
    raw |= {"tolerance": TOLERANCE[args.bf16], "errors": {}}
    with tempfile.TemporaryDirectory() as folder:
        trainers = {name: make_trainer(args, case, name, folder) for name in names}
        timers = {name: StepTimer() for name in names}
        for name, trainer in trainers.items():
            trainer.add_callback(timers[name])
        title = title_of(args, case, mean_tokens(trainers[TRL]))
        table_of = partial(make_table, title, raw, on_cpu)
        for turn in range(args.blocks + 1):
            for name in names if turn % 2 else names[::-1]:
                logged = train_block(trainers[name], name, args)
                counted = timers[name].take(args.warmup_steps)
                losses[name] += [row["loss"] for row in logged]
                raw["first_nll"].setdefault(name, logged[0].get("nll", logged[0]["loss"]))
                seconds[name] += counted if turn else []  # the first turn warms up
            if turn:
                keep(table_of())
        for name, trainer in trainers.items() if args.peaks else ():
            peaks[name] = peak_bytes(partial(train_block, trainer, name, args), on_cpu)
    return table_of()


def mean_tokens(trainer: SFTTrainer) -> float:
    return statistics.mean(len(row["input_ids"]) for row in trainer.train_dataset)


def title_of(args: argparse.Namespace, case: Case, tokens: float) -> str:
    precision = "float32" if not args.bf16 else "bf16 autocast" if args.device == "cpu" else "bf16"
    trained = {"all": "all tokens trained", "masked": "prompts masked"}[case.labels]
    return (
        f"{'Full fine-tuning' if case.mode == 'full' else case.mode}, {record.model_name(case.model)}, {trained}, "
        f"{args.rows_per_step} rows of {tokens:.0f} tokens{', packed' if args.packing else ''}, {precision}"
    )


def disagreements(raw: dict) -> dict[str, float]:
    """Return by name how far off TRL's a trainer logs the nll: AESL at the first step, the nll trainers at any."""
    found = {}
    for name, losses in raw["losses"].items():
        ours, truths = [raw["first_nll"][name]], [raw["first_nll"][TRL]]
        if "nll" in name:
            ours, truths = ours + losses, truths + raw["losses"][TRL]
        error = max(abs(own - truth) / abs(truth) for own, truth in zip(ours, truths, strict=True))
        if not error <= raw["tolerance"]:  # NaN disagrees too
            found[name] = error
    return found


def make_table(title: str, raw: dict, on_cpu: bool) -> dict:
    """Return the table of the ratios. A CPU's milliseconds say nothing of another's and stay among the raw values."""
    raw["errors"] = disagreements(raw)
    seconds = {name: own for name, own in raw["seconds"].items() if name not in raw["errors"]}
    peaks = raw["peak_bytes"]
    peers = {"to TRL, better tiles" if name != TRL else "to TRL": name for name in seconds if name.startswith(TRL)}
    rows = []
    for name, own in seconds.items():
        times = [] if on_cpu else [1000 * statistics.median(own)]
        memory = [peaks[name] / 2**20] if peaks else []
        rows.append([name, *times, *(record.ratio(own, seconds[peer]) for peer in peers.values()), *memory])
    columns = ["trainer", *([] if on_cpu else ["ms"]), *peers, *(["peak MiB of a step"] if peaks else [])]
    for name, error in raw["errors"].items():
        rows.append([f"{name}: the logged nll is {error:.1e} off TRL's", *[None] * (len(columns) - 1)])
    return record.table(title, columns, rows, raw)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", nargs="+", help=f"{', '.join(MODELS)} or a folder; default: as the device allows")
    parser.add_argument(
        "--rows", type=Path, metavar="FILE", help="JSONL of question and answer; default: random tokens"
    )
    parser.add_argument("--labels", nargs="+", choices=["all", "masked"], default=["all"])
    parser.add_argument("--length", type=int, help="most tokens of a row; default: 2048 on GPU, 256 on CPU")
    parser.add_argument("--rows_per_step", type=int, default=4)
    parser.add_argument("--packing", action=argparse.BooleanOptionalAction, help="default: on GPU")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="default: on GPU; on CPU autocast")
    parser.add_argument("--mode", choices=["full", "LoRA", "both"], default="both")
    parser.add_argument("--trainers", choices=["all", "pair"], default="all", help="pair: TRL's nll and AESL alone")
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--block_steps", type=int, default=4)
    parser.add_argument("--warmup_steps", type=int, default=1, help="of each block, not counted")
    parser.add_argument("--peaks", action=argparse.BooleanOptionalAction, default=True, help="measure memory")
    parser.add_argument("--trl-tiles", type=int, nargs=2, metavar=("TOKENS", "VOCAB"), help="default: 256 4096 on CPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="record every time of every table")
    args = parser.parse_args()
    on_cpu = args.device == "cpu"
    args.model = args.model or (["small"] if on_cpu else ["Qwen2.5-0.5B", "Qwen2.5-1.5B"])
    args.length = args.length or (256 if on_cpu else 2048)
    args.packing = not on_cpu if args.packing is None else args.packing
    args.bf16 = not on_cpu if args.bf16 is None else args.bf16
    args.trl_tiles = args.trl_tiles or ((256, 4096) if on_cpu else None)
    if args.warmup_steps >= args.block_steps:
        parser.error("a block needs a step beyond its warm-up")
    missing = [path for path in args.model if path not in MODELS and not (Path(path) / "config.json").is_file()]
    missing += [] if args.rows is None or args.rows.is_file() else [args.rows]
    if missing:
        parser.error(f"not there: {missing[0]}")
    disable_progress_bars()
    tables = []

    def keep(table: dict) -> None:  # a run that is ended keeps what it has
        record.write(args.json, "step", [*tables, table])

    for case in product(args.model, ("full", "LoRA") if args.mode == "both" else (args.mode,), args.labels):
        tables.append(record.show(bench(args, Case(*case), keep)))
        record.write(args.json, "step", tables)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
