"""Compare what each `aesl` command costs before its work begins, with `trl sft --help`.

    python scripts/bench/startup.py [--commands sft select ...] [--repeats 3] [--json FILE]

Two things are timed, each in a process of its own: `aesl COMMAND --help`, and the one line about a config, folder or
model that is not there. The time is the CPU time of the process and of those that it started. The commands take turns,
and a ratio is the median of the ratios within a turn.
"""

import argparse
import resource
import subprocess
import sys
from pathlib import Path

import record

from aesl_trl.cli import COMMANDS


BIN = Path(sys.executable).parent
NOWHERE = "nowhere/at-all"
# What is not there, by command; the others take a folder
WRONG = {
    **{name: ["--config", f"{NOWHERE}.yaml"] for name in ("data", "sft", "grpo", "chain", "probe", "eval", "compare")},
    "interpolate": [NOWHERE, NOWHERE, "--weight", "0.5", "--output", NOWHERE],
    "recipes": ["check", NOWHERE],
}
PEER = "trl sft --help"


def cpu_seconds(command: list[str], expected: int) -> float:
    """Return the CPU seconds of a process and its children; exit where it does not end with the `expected` code."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if result.returncode != expected:
        raise SystemExit(f"{' '.join(command[-3:])} ended with {result.returncode}: {result.stderr[-300:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def bench(commands: list[str], repeats: int) -> dict:
    """Return the table of ratios to `trl sft --help`."""
    runs = {PEER: ([BIN / "trl", "sft", "--help"], 0)}
    for name in commands:
        runs[f"{name} --help"] = ([BIN / "aesl", name, "--help"], 0)
        runs[f"{name}, refused"] = ([BIN / "aesl", name, *WRONG.get(name, [NOWHERE])], 2)
    seconds = {name: [] for name in runs}
    for _ in range(repeats):
        for name, (command, expected) in runs.items():
            seconds[name].append(cpu_seconds([str(part) for part in command], expected))
    rows = []
    for name in commands:
        own = (seconds[f"{name} --help"], seconds[f"{name}, refused"])
        rows.append([f"aesl {name}", *(record.ratio(each, seconds[PEER]) for each in own)])
    columns = ["command", "--help", "a missing config, folder or model"]
    return record.table(f"Start-up, CPU time to that of `{PEER}`", columns, rows, {"cpu_seconds": seconds})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commands", nargs="+", choices=list(COMMANDS), default=list(COMMANDS))
    parser.add_argument("--repeats", type=int, default=3, help="turns")
    parser.add_argument("--json", type=Path, metavar="FILE", help="record every time")
    args = parser.parse_args()
    record.write(args.json, "startup", [record.show(bench(args.commands, args.repeats))])


if __name__ == "__main__":
    main()
