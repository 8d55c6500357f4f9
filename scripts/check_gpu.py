"""Run what a GPU has to show, part by part, and end with one table of figures beside their goals.

    python scripts/check_gpu.py [--parts head step ...] [--minutes 10] [--output_dir runs/gpu] [--small]

`scripts/check_gpu.sh` sets up .venv first; that time is not in the ten minutes. Where torch sees no GPU, nothing runs
and the exit code is 2. Each part runs in a process of its own, for as long as its share of
`--minutes` at most: a part beyond that is killed with all that it started. A part that fails does not stop the next
one, and the exit code is then 1. OUTPUT_DIR/gpu.json says how every part ended; a part that is done for the same code
on the same machine with the same torch is not run again, and a record of others is kept as gpu-DATE.json. That file is
also a record as docs/benchmarks.md shows it: copy it to docs/benchmarks/gpu.json.

`--parts` takes names of parts (head-7B) or of groups (head), and runs the part that builds their model too. `--small`
runs the same parts at tiny sizes on a CPU, into runs/gpu-small, so that nothing in the parts fails for the first time
on a GPU; no figure of that means anything.
"""

import argparse
import hashlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import NamedTuple


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts" / "bench")]

import record  # noqa: E402

from aesl_trl import files, provenance  # noqa: E402
from aesl_trl.processes import MARK, Interrupts, run_process  # noqa: E402


MODEL = "Qwen2.5-1.5B-Instruct"
INTERVAL = 50  # steps between two measurements, as docs/monitoring_cost.md counts
# `{model}` is the folder of the random model, `{json}` the file that a benchmark writes
BUILD = "scripts/build_random_model.py {model}"
HEAD = "scripts/bench/head.py --tune few --no-rivals --json {json}"
STEP = "scripts/bench/step.py --json {json}"
MEMORY = "scripts/bench/memory.py {kind} --model {model} --json {json}"
MONITORING = "scripts/bench/monitoring.py --model {model} --lora --json {json}"
# Runs in a process of its own: where CUDA starts, it keeps memory of the GPU
TORCH = "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.is_available())"
TESTS = "-m pytest -q -p no:cacheprovider"
KERNELS, FEATURES = "tests/losses/test_head_triton.py", "tests/training/test_trainer_features.py"


class Figure(NamedTuple):
    """A number of the last table, and what it should be."""

    name: str
    value: float
    at_most: float | None = None
    at_least: float | None = None

    @property
    def goal(self) -> str:
        if self.at_least:
            return f"at least {self.at_least:.2f}"
        if self.at_most:
            return f"at most {self.at_most:.2f}" if self.at_most >= 0.01 else f"at most {self.at_most}"
        return ""

    @property
    def verdict(self) -> str:
        if not self.goal:
            return ""
        return "reached" if (self.at_least or 0) <= self.value <= (self.at_most or float("inf")) else "missed"


class Part(NamedTuple):
    """What runs, for how long at most, and what the tables that it writes say."""

    commands: tuple[str, ...]  # of Python; one after the other
    small: tuple[str, ...]  # the same at tiny sizes
    limit_s: float  # of ten minutes
    figures: Callable[[list[dict]], list[Figure]] = lambda tables: []
    skips: int | None = None  # the exit code that says that what it needs is not here
    needs: str | None = None  # another part, whose files it reads


# ---- What the tables say


def median_ratio(seconds: dict[str, list[float]], name: str, other: str) -> float:
    return record.ratio(seconds[name], seconds[other])["median"]


def disagreements(table: dict) -> list[Figure]:
    """Return how far off are the methods that a table does not time because they disagree: each has missed."""
    errors, tolerance = table["raw"].get("errors", {}), table["raw"].get("tolerance")
    return [Figure(f"{name}: off its peers", error, at_most=tolerance) for name, error in errors.items()]


def head_figures(tables: list[dict]) -> list[Figure]:
    """Return our head's time as a share of TRL's, and the floor's as a share of ours; with tuned launches too."""
    found = []
    for table in tables:
        seconds, head = table["raw"].get("seconds", {}), table["title"].split()[0].lower()
        ours = [name for name in seconds if name.startswith("AESL in one pass, ") and "bfloat16" not in name]
        goal = {"full": 0.80, "frozen": 0.70}.get(head)
        floor = "bare products, one read and write" if "Qwen2.5-0.5B" in table["title"] else "bare products"
        for name in ours:
            of = f"{head} head{', tuned' if 'tuned' in name else ''}"
            for peer in (each for each in seconds if each.startswith("TRL nll")):
                found.append(Figure(f"{of}: time to {peer}", median_ratio(seconds, name, peer), at_most=goal))
            found.append(Figure(f"{of}: {floor} to it", median_ratio(seconds, floor, name), at_least=0.85))
        found += disagreements(table)
    return found


def step_figures(tables: list[dict]) -> list[Figure]:
    """Return a whole step's time to that of TRL's SFTTrainer, for each loss."""
    found = []
    for table in tables:
        seconds = table["raw"]["seconds"]
        peer = next(name for name in seconds if name.startswith("SFTTrainer"))
        ours = [name for name in seconds if name.startswith("AESLSFTTrainer") and name not in table["raw"]["errors"]]
        found += [Figure(f"{name}: step to TRL's", median_ratio(seconds, name, peer), at_most=1.0) for name in ours]
        found += disagreements(table)
    return found


def memory_figures(tables: list[dict]) -> list[Figure]:
    """Return each peak as a share of its estimate: what a GPU holds must not exceed what the estimate promises."""
    return [
        Figure(f"{what}: peak {peak:.1f} GB to the estimate", share, at_most=1.0 if what == "GPU" else None)
        for table in tables
        for what, peak, _, share in table["rows"]
    ]


def monitoring_figures(tables: list[dict]) -> list[Figure]:
    """Return the share of the time that a measurement takes at the interval of the docs."""
    found = []
    for table in tables:
        measurement, step = (statistics.median(table["raw"][name]) for name in ("measurement_s", "step_s"))
        share = measurement / (measurement + INTERVAL * step)
        found.append(Figure(f"share of the time at a measurement every {INTERVAL} steps", share, at_most=0.05))
    return found


# ---- The parts, in the order in which they run


def head_part(shape: str, limit_s: float, small_dtype: str = "bfloat16") -> Part:
    small = f"--device cpu --shape tiny --tokens 40 --repeats 2 --no-peaks --dtype {small_dtype}"
    return Part((f"{HEAD} --device cuda --shape {shape}",), (f"{HEAD} {small}",), limit_s, head_figures)


def step_part(mode: str, small_dtype: str) -> Part:
    small = "--device cpu --model small --length 32 --rows_per_step 2 --blocks 1 --block_steps 2 --no-packing"
    whole = "--device cuda --model Qwen2.5-1.5B --blocks 4"
    smalls = (f"{STEP} --mode {mode} {small} {small_dtype}",)
    return Part((f"{STEP} --mode {mode} {whole}",), smalls, 50, step_figures)


def memory_part(kind: str, more: str, limit_s: float) -> Part:
    command, small = MEMORY.replace("{kind}", kind) + more, "--steps 2 --rows 20 --length 64 --new_tokens 4"
    return Part((command,), (f"{command} {small}",), limit_s, memory_figures, needs="build")


# A CPU's own dtype is float32, a GPU's bf16: the small parts run both
PARTS = {
    "tests-kernels": Part((f"{TESTS} -m '' {KERNELS}",), (f"{TESTS} {KERNELS} -k confident",), 45),
    "tests-trainer": Part((f"{TESTS} -m gpu {FEATURES}",), (f"{TESTS} {FEATURES} -k refused",), 35),
    "head-0.5B": head_part("Qwen2.5-0.5B", 55, "float32"),
    "head-7B": head_part("Qwen2.5-7B", 45),
    "head-8B": head_part("Llama-3.1-8B", 45),
    "step-full": step_part("full", "--no-bf16"),
    "step-LoRA": step_part("LoRA", "--bf16"),
    "build": Part((BUILD,), (f"{BUILD} --small",), 25),
    "memory-sft": memory_part("sft", "", 30),
    "memory-sft-full": memory_part("sft", " --full", 35),
    "memory-grpo": memory_part("grpo", "", 70),
    "monitoring": Part(
        (f"{MONITORING} --batch 4 --accumulation 8 --length 1024 --steps 5 --diversity_steps 3",),
        (
            f"{MONITORING} --batch 2 --length 16 --steps 5 --diversity_steps 3 --num_prompts 2 --samples 2 "
            "--max_new_tokens 4 --token_budget 0",
        ),
        45,
        monitoring_figures,
        needs="build",
    ),
    "vllm": Part(("scripts/check_vllm.sh",), ("scripts/check_vllm.sh",), 40, skips=2),
}


def chosen(names: list[str]) -> list[str]:
    """Return the parts that the names mean and what these need, in their order; exit at a name that means none."""
    for name in names:
        if not any(part == name or part.startswith(f"{name}-") for part in PARTS):
            raise SystemExit(f"check_gpu.py: --parts: there is no part {name!r} (parts: {', '.join(PARTS)})")
    meant = [part for part in PARTS if not names or any(part == each or part.startswith(f"{each}-") for each in names)]
    return [part for part in PARTS if part in meant or part in {PARTS[each].needs for each in meant}]


# ---- Running


def code_digest() -> str:
    """Return a digest of the package, the scripts and the tests: with it a part that is done is known as done."""
    paths = [path for folder in ("aesl_trl", "scripts", "tests") for path in (ROOT / folder).rglob("*.*")]
    sources = sorted(path for path in paths if path.suffix in (".py", ".sh"))
    parts = [text for path in sources for text in (str(path.relative_to(ROOT)).encode(), path.read_bytes())]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def torch_build() -> tuple[str, bool]:
    """Return which torch this Python has, and whether that torch sees a GPU."""
    done = subprocess.run([sys.executable, "-c", TORCH], capture_output=True, text=True)
    if done.returncode:
        return "torch cannot be imported", False
    version, cuda, sees_gpu = done.stdout.split()
    return f"torch {version}, {'without CUDA' if cuda == 'None' else f'CUDA {cuda}'}", sees_gpu == "True"


def command_lines(part: Part, small: bool, folder: Path, name: str) -> list[list[str]]:
    """Return the part's command lines, with the paths of this run in them."""
    model = folder / (f"{MODEL}-small" if small else f"{MODEL}-random")
    places = {"model": str(model), "json": str(folder / f"{name}.json")}
    lines = []
    for command in part.small if small else part.commands:
        words = [word.format(**places) for word in shlex.split(command)]
        words = [str(ROOT / word) if word.startswith(("scripts/", "tests/")) else word for word in words]
        lines.append(["bash" if words[0].endswith(".sh") else sys.executable, *words])
    return lines


class Run:
    """One run of the parts: what is known of each lies in OUTPUT_DIR/gpu.json, anew after every part."""

    def __init__(self, args: argparse.Namespace, build: str, interrupts: Interrupts):
        folder = args.output_dir or ROOT / "runs" / ("gpu-small" if args.small else "gpu")
        self.folder, self.small, self.interrupts = folder.resolve(), args.small, interrupts
        self.scale = args.minutes / 10
        self.path = self.folder / "gpu.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.of = {"code": code_digest(), "device": provenance.hardware(), "torch": build, "small": self.small}
        self.parts = self.known_parts()

    def known_parts(self) -> dict[str, dict]:
        """Return what gpu.json says of the parts; move aside a gpu.json of other code, machine or torch."""
        if not self.path.is_file():
            return {}
        known = files.read_json(self.path)
        if all(self.of.items() <= part.items() for part in known["parts"].values()):
            return known["parts"]
        names = (f"gpu-{known['date']}{'' if number == 1 else f'-{number}'}.json" for number in count(1))
        aside = next(path for path in map(self.folder.joinpath, names) if not path.exists())
        self.path.rename(aside)
        print(f"The record of other code or another machine is now {aside}", flush=True)
        return {}

    def part(self, name: str) -> None:
        """Run a part unless it is done, and note how it ended."""
        if self.parts.get(name, {}).get("status") == "done":
            print(f"\n== {name}: done before", flush=True)
            return
        part = PARTS[name]
        limit_s, start = part.limit_s * self.scale, time.monotonic()
        print(f"\n== {name}, for {limit_s:.0f} s at most", flush=True)
        (self.folder / f"{name}.json").unlink(missing_ok=True)
        status, code = "done", 0
        for place, line in enumerate(command_lines(part, self.small, self.folder, name)):
            code = self.process(name, line, start + limit_s, append=place > 0)
            if code:
                late = time.monotonic() - start >= limit_s
                status = "skipped" if code == part.skips else "beyond its limit" if late else "failed"
                break
        seconds = time.monotonic() - start
        self.parts[name] = {"status": status, "code": code, "seconds": seconds, "limit_s": limit_s, **self.of}
        print(f"== {name}: {status} ({seconds:.0f} s)", flush=True)
        self.write()

    def process(self, name: str, line: list[str], deadline: float, *, append: bool) -> int:
        """Run one command line until the deadline, and return its exit code."""
        paths = [str(ROOT), str(ROOT / "scripts"), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ, "PYTHON": sys.executable}
        env |= {"PYTHONPATH": os.pathsep.join(paths), MARK: str(self.folder / name)}
        env |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"} if self.small else {}
        self.interrupts.deadline = deadline
        return run_process(line, self.folder / f"{name}.log", self.interrupts, env=env, append=append)

    def write(self) -> None:
        """Write gpu.json: the record of the tables, and how each part ended."""
        found = record.record("gpu", [self.table(), *(table for name in PARTS for table in self.tables(name))])
        command = found["command"].replace("python scripts/bench/check_gpu.py", "bash scripts/check_gpu.sh")
        files.write_json(self.path, {**found, "command": command, "parts": self.parts})

    def tables(self, name: str) -> list[dict]:
        """Return the tables that a part has written, as far as it came."""
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8"))["tables"] if name in self.parts and path.is_file() else []

    def table(self) -> dict:
        """Return the last table: how each part ended, and its figures beside their goals."""
        rows = []
        for name in PARTS:
            known = self.parts.get(name)
            if known is None:
                continue
            rows.append([name, known["status"], f"{known['seconds']:.0f} s of {known['limit_s']:.0f}", None, None])
            for figure in PARTS[name].figures(self.tables(name)):
                rows.append([name, figure.name, figure.value, figure.goal, figure.verdict])
        sizes = "tiny sizes on a CPU: no figure means anything" if self.small else self.of["device"]
        return record.table(f"What a GPU has to show, {sizes}", ["part", "figure", "value", "goal", ""], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=[], metavar="NAME", help=f"default: all of {', '.join(PARTS)}")
    parser.add_argument("--minutes", type=float, default=10.0, help="of all parts together; each has its share")
    parser.add_argument("--output_dir", type=Path, metavar="DIR", help="default: runs/gpu, or runs/gpu-small")
    parser.add_argument("--small", action="store_true", help="tiny sizes on a CPU")
    args = parser.parse_args()
    names = chosen(args.parts)
    build, sees_gpu = torch_build()
    if not (sees_gpu or args.small):
        print(f"check_gpu.py: no GPU to check ({build}): run it where there is one, or with --small", file=sys.stderr)
        return 2
    with Interrupts() as interrupts:
        run = Run(args, build, interrupts)
        for name in names:
            run.part(name)
            if interrupts.received:
                return 128 + interrupts.received[0]
    record.show(run.table())
    print(f"\nThe record is {run.path}")
    return 1 if any(run.parts[name]["status"] not in ("done", "skipped") for name in names) else 0


if __name__ == "__main__":
    sys.exit(main())
