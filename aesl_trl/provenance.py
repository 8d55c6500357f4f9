"""Which code made a run, and on what machine: every number that a comparison reports is said with both."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path

from . import __version__  # noqa: F401 (the floors above take it from here)


# These packages decide a run's numbers.
PACKAGES = ("aesl_trl", "trl", "transformers", "accelerate", "peft", "datasets", "torch", "sacrebleu")


def package_versions(names: Iterable[str] = PACKAGES) -> dict[str, str | None]:
    """Return the versions of the packages; None stands for one that is not installed."""
    return {name: _version(name) for name in names}


@cache
def _version(package: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)


def commit() -> str | None:
    """Return the commit of this package's checkout, with `+` where files differ from it; None without a checkout."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    except OSError:  # there is no git
        return None
    if head.returncode or tracked.returncode:
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def num_cores() -> int:
    """Return the number of cores that this process may use; macOS and Windows know only those of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hardware() -> str:
    """Name the processor, the number of cores that this process may use, and the GPUs."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").split("\n") if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.processor() or "unknown processor"
    parts = [f"{model}, {num_cores()} cores"]
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        parts += subprocess.run(command, capture_output=True, text=True).stdout.split("\n")
    return ", ".join(part.strip() for part in parts if part.strip())
