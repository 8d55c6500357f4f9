"""`aesl env`: what a bug report needs. Nothing heavy is imported, so a torch that cannot start is told of too."""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.requirements import Requirement

from . import __version__
from .arguments import ArgumentParser
from .errors import tell
from .provenance import PACKAGES, commit, hardware, package_versions


NAME = "aesl env"
BESIDE = ("numpy", "huggingface_hub", "tokenizers", "triton", "deepspeed", "flash-attn")
BESIDE += ("wandb", "trackio", "tensorboard")  # each is shown only where it is installed
EXTRAS = ("vllm", "qlora", "math", "gym")
NOT_INSTALLED = "not installed"
SETTINGS = ("HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")


def main(argv: list[str] | None = None) -> None:
    """Print a line for each fact, to be pasted into an issue."""
    ArgumentParser(NAME).parse_args(argv)
    tell("\n".join(f"- {name}: {value}" for name, value in facts().items()))


def facts() -> dict[str, str]:
    """Return what is known of the code, Python, the packages, the extras and the hardware."""
    at = commit()
    found = {
        "aesl_trl": __version__ + (f" (commit {at})" if at else ""),
        "Python": platform.python_version() + (" in a virtual environment" if sys.prefix != sys.base_prefix else ""),
        "platform": platform.platform(),
        "hardware": hardware(),
        "GPU driver": gpu_driver(),
        "CUDA of torch": cuda_of_torch(),
    }
    found |= {name: installed(name) for name in PACKAGES[1:]}
    found |= {name: installed(name) for name in BESIDE if installed(name) != NOT_INSTALLED}
    found |= {f"extra {extra}": installed_extra(extra) for extra in EXTRAS}
    return found | {name: os.environ[name] for name in SETTINGS if name in os.environ}


def installed(package: str) -> str:
    """Return the version of a package, or that it is not installed."""
    return package_versions((package,))[package] or NOT_INSTALLED


def installed_extra(extra: str) -> str:
    """Return the versions of the packages that an extra of aesl_trl adds, which it names in its metadata."""
    try:
        needed = [Requirement(line) for line in requires("aesl_trl") or []]
    except PackageNotFoundError:
        return "unknown: aesl_trl itself is not installed"
    added = [each for each in needed if each.marker and each.marker.evaluate({"extra": extra})]
    added = [each for each in added if not each.marker.evaluate({"extra": ""})]
    return ", ".join(f"{each.name} {installed(each.name)}" for each in added if each.name not in PACKAGES)


def gpu_driver() -> str:
    """Return the driver's version and each GPU's memory, as nvidia-smi tells them."""
    if not shutil.which("nvidia-smi"):
        return "no nvidia-smi"
    command = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    return "; ".join(done.stdout.split("\n")).strip("; ") or f"nvidia-smi fails with exit code {done.returncode}"


def cuda_of_torch() -> str:
    """Return the CUDA version that torch was built for, from the file in which torch keeps it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.origin:
        return NOT_INSTALLED
    text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    found = re.search(r"^cuda\b.*= *['\"](.+)['\"]", text, re.MULTILINE)
    return found[1] if found else "none (a build for the CPU)"


if __name__ == "__main__":
    main()
