#!/usr/bin/env python3
"""Run every benchmark of this project beside its peers; print the tables, and write one JSON file for each.

    python scripts/bench.py [NAMES ...] [--quick] [--output_dir runs/bench]
    python scripts/bench.py --model FOLDER --rows train.jsonl    # the benchmarks on a real model too
    python scripts/bench.py --page                               # docs/benchmarks.md anew from its records

Each benchmark is a script of its own in scripts/bench/, with its own `--help`, and runs in a process of its own, one
after the other. `--quick` takes small sizes and few turns, and leaves out the real model: 2 minutes on two idle
cores. The records of the docs lie in docs/benchmarks: run with `--output_dir docs/benchmarks`, then `--page`.

`--model` takes the folder of any causal model, `--rows` JSONL with the columns `question` and `answer`, as GSM8K's.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple


ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts" / "bench"
ONE_STEP = "--rows_per_step 2 --length 128 --no-bf16 --trainers pair --blocks 3 --block_steps 1 --warmup_steps 0"
SHORT = "--length 64 --prompt_length 16 --max_new_tokens 40"  # the tiny model has 64 positions


class Benchmark(NamedTuple):
    """A script of scripts/bench/ and its arguments."""

    script: str
    quick: str | None  # None: left out by --quick
    whole: str
    real_model: bool = False  # wants --model and --rows


BENCHMARKS = {
    "head": Benchmark("head", "--tokens 256 --repeats 3 --head full", "--tokens 512"),
    "step": Benchmark(
        "step",
        "--length 64 --rows_per_step 2 --blocks 2 --block_steps 3 --mode full --no-peaks",
        "--blocks 4 --labels all masked",
    ),
    "step_real": Benchmark("step", None, f"--mode full --labels all masked {ONE_STEP}", real_model=True),
    "step_real_lora": Benchmark("step", None, f"--mode LoRA --labels all masked {ONE_STEP}", real_model=True),
    "self_bleu": Benchmark("self_bleu", "--completions 8 16 --words 500 --repeats 3", "--full 1100000 --hypotheses 2"),
    "grading": Benchmark("grading", "--answers 40 --repeats 3 --children 2", "--answers 100"),
    "sampling": Benchmark("sampling", "--repeats 3 --prompts 4", "--repeats 5"),
    "sampling_real": Benchmark(
        "sampling", None, "--prompts 4 --max_new_tokens 16 --batch_size 16 --repeats 3", real_model=True
    ),
    "monitoring": Benchmark(
        "monitoring", f"--steps 11 --num_prompts 8 {SHORT}", f"--steps 26 --num_prompts 16 {SHORT}"
    ),
    "growth": Benchmark("growth", "--quick --only head selection", ""),
    "startup": Benchmark("startup", "--repeats 1 --commands sft select report", "--repeats 3"),
    "where_time_goes": Benchmark(
        "where_time_goes", None, "--batch 2 --length 128 --prompts 2 --samples 4 --max_new_tokens 16", real_model=True
    ),
}


def chosen(args: argparse.Namespace) -> list[str]:
    """Return the names to run; exit where one that was asked for by name cannot run."""
    runs = []
    for name, benchmark in BENCHMARKS.items():
        able = not (args.quick and benchmark.quick is None) and not (benchmark.real_model and args.model is None)
        if name in args.names and not able:
            raise SystemExit(f"bench.py: {name} wants a real model: give --model and --rows, without --quick")
        if able and (not args.names or name in args.names):
            runs.append(name)
    return runs


def command(name: str, args: argparse.Namespace) -> list[str]:
    """Return the command line of a benchmark."""
    benchmark = BENCHMARKS[name]
    arguments = (benchmark.quick if args.quick else benchmark.whole).split()
    if benchmark.real_model:
        arguments = ["--model", str(args.model.resolve()), "--rows", str(args.rows.resolve()), *arguments]
    output = args.output_dir.resolve() / f"{name}.json"
    return [sys.executable, str(SCRIPTS / f"{benchmark.script}.py"), *arguments, "--json", str(output)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAMES", help=f"{', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="small sizes, no real model")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs" / "bench", metavar="DIR")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a real model, for the benchmarks on one")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="what it trains on: JSONL of question and answer")
    parser.add_argument("--page", action="store_true", help="run nothing, write the tables of docs/benchmarks.md anew")
    args = parser.parse_args()
    if args.page:
        sys.exit(subprocess.run([sys.executable, str(SCRIPTS / "page.py")]).returncode)
    unknown = [name for name in args.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"there is no benchmark {unknown[0]!r} (one of {', '.join(BENCHMARKS)})")
    if (args.model is None) != (args.rows is None):
        parser.error("--model and --rows go together")
    if args.model and not (args.model / "config.json").is_file() or args.rows and not args.rows.is_file():
        parser.error("--model is the folder of a model, --rows a file")
    # One thread: on CPU the benchmarks take the CPU time of one thread for the time
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ}
    failed = []
    for name in chosen(args):
        print(f"\n== {name}", flush=True)
        start = time.monotonic()
        result = subprocess.run(command(name, args), env=environment)
        print(f"\n{name}: {time.monotonic() - start:.0f} s", flush=True)
        failed += [name] if result.returncode else []
    print(f"\nThe records lie in {args.output_dir}")
    if failed:
        sys.exit(f"bench.py: failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
