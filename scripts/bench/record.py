"""The one form in which every benchmark records what it measured: where it ran, ratios by turns, and raw values.

A benchmark writes one JSON file:

    {"name", "command", "date", "commit", "hardware", "load", "threads", "versions", "tables": [TABLE, ...]}
    TABLE: {"title", "columns": [text, ...], "rows": [[cell, ...], ...], "raw": every value that was measured}

A cell is text, a number, None (nothing to say), or a spread {"median", "low", "high"}. `load` is the machine's load
average over the last 15 minutes: where it is above the number of threads, other work shared the cores.

Nothing here loads torch.
"""

import ctypes
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aesl_trl import provenance


# Beside the packages that decide a run's numbers
PEERS = ("triton", "vllm", "liger-kernel", "cut-cross-entropy", "fast-bleu", "math-verify", "sympy", "numpy")

M_MMAP_THRESHOLD = -3  # of malloc.h


def spread(values: list[float]) -> dict[str, float]:
    """Return the median, the lowest and the highest of `values`."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def ratio(values: list[float], others: list[float]) -> dict[str, float]:
    """Return the spread of the ratios within a turn: the i-th of `values` to the i-th of `others`."""
    return spread([value / other for value, other in zip(values, others, strict=True)])


def table(title: str, columns: list[str], rows: list[list], raw: Any = None) -> dict:
    """Return a table of a record; every row has one cell for each column."""
    assert all(len(row) == len(columns) for row in rows), f"{title}: a row has other cells than {columns}"
    return {"title": title, "columns": columns, "rows": rows, "raw": raw}


def cell_text(cell: Any) -> str:
    """Return a cell as a page shows it, numbers with three digits: `0.62 (0.58 to 0.66)`."""
    if isinstance(cell, dict) and cell["low"] == cell["high"]:
        return cell_text(cell["median"])
    if isinstance(cell, dict):
        return f"{cell_text(cell['median'])} ({cell_text(cell['low'])} to {cell_text(cell['high'])})"
    if isinstance(cell, float):
        return f"{cell:.0f}" if abs(cell) >= 100 else f"{cell:#.3g}".rstrip(".") if abs(cell) >= 1 else f"{cell:.2g}"
    return "" if cell is None else str(cell)


def markdown(table: dict) -> str:
    """Return a table as markdown. The first column is text, the others are numbers."""
    rows = [list(map(cell_text, row)) for row in table["rows"]]
    widths = [max(3, *map(len, column)) for column in zip(table["columns"], *rows, strict=True)]
    line = ["-" * (width - 1) + (":" if place else "-") for place, width in enumerate(widths)]
    lines = []
    for first, *others in (table["columns"], line, *rows):
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def show(table: dict) -> dict:
    """Print a table under its title, and return it."""
    print(f"\n{table['title']}\n\n{markdown(table)}", flush=True)
    return table


def model_name(folder: str) -> str:
    """Return the last part of a model's path, with the part before it where the last one names no model."""
    path = Path(folder)
    return f"{path.parent.name}/{path.name}" if path.name in ("base", "model") else path.name


def threads() -> int | None:
    """Return the threads of torch, or without torch those that OMP_NUM_THREADS allows; None: not known."""
    if "torch" in sys.modules:
        return sys.modules["torch"].get_num_threads()
    return int(os.environ.get("OMP_NUM_THREADS", 0)) or None


def versions() -> dict[str, str]:
    """Return the versions of the installed packages that a benchmark may compare."""
    found = {"python": platform.python_version(), **provenance.package_versions()}
    for package in PEERS:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {name: version for name, version in found.items() if version}


def record(name: str, tables: list[dict]) -> dict:
    """Return the record of benchmark `name`; the command is this process's own."""
    # Paths say nothing elsewhere: of an argument that is one, its last part stays
    arguments = [Path(argument).name if argument.startswith("/") else argument for argument in sys.argv[1:]]
    if "--json" in arguments:
        place = arguments.index("--json")
        del arguments[place : place + 2]
    return {
        "name": name,
        "command": " ".join([f"python scripts/bench/{Path(sys.argv[0]).name}", *arguments]),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": provenance.commit(),
        "hardware": provenance.hardware(),
        "load": os.getloadavg()[2],
        "threads": threads(),
        "versions": versions(),
        "tables": tables,
    }


def write(path: Path | None, name: str, tables: list[dict]) -> None:
    """Write the record of benchmark `name` to `path`; None: nobody asked for it."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record(name, tables), indent=1) + "\n", encoding="utf-8")


def resident_bytes(name: str) -> int:
    """Return `VmRSS`, what is resident, or `VmHWM`, its peak. getrusage would count what the parent process held."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def reset_peak() -> int:
    """Return the bytes that are resident now, from where `VmHWM` then rises."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident_bytes("VmRSS")


@contextmanager
def resident_rise() -> Iterator[list[int]]:
    """Yield a list that gets, after the block, the bytes by which its peak of resident memory is above its start."""
    libc, rise = ctypes.CDLL(None), []
    libc.mallopt(M_MMAP_THRESHOLD, 2**20)  # of what glibc keeps of freed tensors, nothing serves the block
    before = reset_peak()
    yield rise
    rise.append(resident_bytes("VmHWM") - before)
    libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # to which glibc raises it by itself where large tensors are freed


def in_fresh_process(*arguments) -> Any:
    """Run this script again with these arguments added to its own; return the JSON on the last line that it prints."""
    # A fixed threshold: glibc otherwise keeps freed tensors of up to 32 MB, and a later one adds nothing to the peak
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    command = [sys.executable, *sys.argv, *map(str, arguments)]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(result.stdout.splitlines()[-1])
