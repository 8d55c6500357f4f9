"""Measure what a second process costs: SFT steps, a measurement and an evaluation, on one CPU process and on two.

    python scripts/bench/scaling.py [--model MODEL] [--repeats 5] [--json FILE]

`torchrun` starts one process, then two over gloo. Strong scaling shares the work of one process out to both; weak
scaling gives each as much as one had. The times are CPU seconds of a process, so that other work on the machine does
not count: waiting for the other process does not count either, and the busiest process is the one that the others
wait for. What two processes do beyond one is named: summing the gradients, and what rank 0 does alone.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import record


RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "skills-tiny"
WORKS = ("SFT step", "measurement", "evaluation")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=str(RECIPE / "base"), help="its rows are random, its evaluation skills-tiny's"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=32, help="of an SFT step on one process")
    parser.add_argument("--length", type=int, default=32, help="tokens of a row")
    parser.add_argument(
        "--prompts", type=int, default=32, help="of a measurement and of an evaluation, 8 samples each"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="record every time")
    parser.add_argument("--worker", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


# ---- In a process that torchrun started


def work(args: argparse.Namespace) -> None:
    """Time each work, and write what this rank measured to FOLDER/ranks-N-R.json."""
    import torch
    from datasets import disable_progress_bars

    disable_progress_bars()
    torch.set_num_threads(1)
    ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    found = {}
    for kind, shares in (("strong", ranks), ("weak", 1)) if ranks > 1 else (("alone", 1),):
        folder = args.worker / f"{kind}-{ranks}"
        found[kind] = dict(
            zip(WORKS, [*_training(args, folder, shares), _evaluation(args, folder, ranks // shares)], strict=True)
        )
    if ranks > 1:
        found["reduce"] = _reduction(args.model, args.repeats)
    (args.worker / f"ranks-{ranks}-{rank}.json").write_text(json.dumps(found))


def _training(args: argparse.Namespace, folder: Path, shares: int) -> tuple[list[float], list[float]]:
    """Return the times of SFT steps, and of measurements, of a trainer whose rows `shares` processes share."""
    import monitoring

    ranks = int(os.environ["WORLD_SIZE"])
    settings = SimpleNamespace(
        model=args.model,
        lora=False,
        steps=args.repeats + 2,
        diversity_steps=10**6,
        batch=args.rows // shares,
        accumulation=ranks,  # rows for every rank; the steps accumulate nothing
        length=args.length,
        prompt_length=8,
        num_prompts=args.prompts * ranks // shares,
        samples=8,
        max_new_tokens=12,
        batch_size=args.prompts * 8,
        token_budget=0,
        backend="generate",
    )
    trainer, clock = monitoring.make_trainer(settings, str(folder / "sft")), monitoring.Clock()
    trainer.args.gradient_accumulation_steps = trainer.accelerator.gradient_accumulation_steps = 1
    trainer.callback_handler.callbacks.insert(0, clock)
    trainer.train()
    steps = [end - begin for begin, end in zip(clock.began, clock.ended, strict=True)][2:]
    measurement = trainer.diversity_callback.measurement
    return steps, [_timed(lambda: measurement.measure_step(0, folder)) for _ in range(args.repeats)]


def _evaluation(args: argparse.Namespace, folder: Path, times: int) -> list[float]:
    """Return the times of `aesl eval` of `times` as many problems, the model's loading included."""
    from aesl_trl.evaluation import evaluate

    argv = [
        args.model,
        "--config",
        str(RECIPE / "eval.yaml"),
        "--num_prompts",
        str(args.prompts * times),
        "--use_cpu",
        "true",
    ]
    return [
        _timed(lambda place=folder / f"eval-{number}": evaluate.main([*argv, "--output", f"{place}/evaluation.json"]))
        for number in range(args.repeats)
    ]


def _reduction(model: str, repeats: int) -> list[float]:
    """Return the times of summing gradients of the model's size over the processes."""
    import torch
    from transformers import AutoModelForCausalLM

    gradients = torch.zeros(sum(item.numel() for item in AutoModelForCausalLM.from_pretrained(model).parameters()))
    return [_timed(lambda: torch.distributed.all_reduce(gradients)) for _ in range(repeats)]


def _timed(call: Callable) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


# ---- The table


def run(processes: int, args: argparse.Namespace, folder: Path) -> list[dict]:
    """Start this script on `processes` ranks; return what each measured."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    flags = [f"--{name}={getattr(args, name)}" for name in ("model", "repeats", "rows", "length", "prompts")]
    command = [*launch, __file__, *flags, "--worker", str(folder)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(
            f"scaling.py: {processes} processes ended with exit code {done.returncode}:\n{done.stdout[-3000:]}"
        )
    return [json.loads((folder / f"ranks-{processes}-{rank}.json").read_text()) for rank in range(processes)]


def busiest(ranks: list[dict], kind: str, name: str) -> list[float]:
    """Return, repeat by repeat, the time of the process that took longest."""
    return [max(times) for times in zip(*(rank[kind][name] for rank in ranks), strict=True)]


def make_table(alone: dict, two: list[dict], args: argparse.Namespace) -> dict:
    """Return the ratios of two processes to one; each repeat is compared with that of the same number."""
    rows = []
    for name in WORKS:
        one = alone["alone"][name]
        strong, weak = busiest(two, "strong", name), busiest(two, "weak", name)
        both = [sum(times) for times in zip(*(rank["strong"][name] for rank in two), strict=True)]
        rows.append([name, record.ratio(strong, one), record.ratio(both, one), record.ratio(weak, one)])
    for name in WORKS[1:]:
        more = [first - second for first, second in zip(two[0]["strong"][name], two[1]["strong"][name], strict=True)]
        shares = [each / one for each, one in zip(more, alone["alone"][name], strict=True)]
        rows.append([f"what rank 0 does alone, of a whole {name}", record.spread(shares), None, None])
    step = record.spread(alone["alone"]["SFT step"])["median"]
    reduce = [max(times) for times in zip(*(rank["reduce"] for rank in two), strict=True)]
    rows.append(
        ["summing the gradients, of a whole SFT step", record.spread([each / step for each in reduce]), None, None]
    )
    columns = ["work", "strong: busiest / one (0.5)", "strong: both / one (1)", "weak: busiest / one (1)"]
    title = f"Two processes beside one, {Path(args.model).parent.name}, CPU seconds; in brackets what costs nothing"
    return record.table(title, columns, rows, {"one": alone, "two": two})


def main() -> None:
    args = arguments()
    if args.worker:
        return work(args)
    with tempfile.TemporaryDirectory() as folder:
        (alone,), two = (run(processes, args, Path(folder)) for processes in (1, 2))
    record.write(args.json, "scaling", [record.show(make_table(alone, two, args))])


if __name__ == "__main__":
    main()
