"""Which code a run was made by, and on what: said beside every number that a comparison reports."""

import importlib.metadata
import os
import shutil
import subprocess
from pathlib import Path

from . import __version__  # noqa: F401 (the floor's way to the version)


def commit() -> str | None:
    """The commit of this package's checkout, with `+` where files differ from it; None where it is installed."""
    here = Path(__file__).resolve().parent
    git = ["git", "-C", str(here)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", str(Path(__file__))], capture_output=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    except OSError:
        return None
    if head.returncode or tracked.returncode:
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def hardware() -> str:
    """Processor, cores that this process may use, and GPUs."""
    models = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = [f"{models[0] if models else 'unknown processor'}, {cores} cores"]
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        parts += subprocess.run(command, capture_output=True, text=True).stdout.split("\n")
    return ", ".join(part.strip() for part in parts if part.strip())


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []


def package_versions() -> dict[str, str | None]:
    """Versions of the packages that decide a run's numbers; None where one is not installed."""
    names = ("aesl_trl", "trl", "transformers", "accelerate", "peft", "datasets", "torch", "sacrebleu")
    return {name: _version(name) for name in names}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
