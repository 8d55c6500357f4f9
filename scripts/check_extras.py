#!/usr/bin/env python3
"""Resolve each extra of setup.cfg alone, and all of them together, as pip would install them; nothing is installed.

    python scripts/check_extras.py [--seconds 300]

pip plans each set against the registry (`pip install --dry-run`) from the packages' metadata; it downloads a package
only where the registry does not serve them. The exit code is 1 where a set has no solution, or where pip has gone far
back through old versions when the time is up. What a slow or silent registry leaves open is reported as `NOT CHECKED`,
with exit code 0.
"""

import argparse
import configparser
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


SETUP = Path(__file__).parents[1] / "setup.cfg"
SHOWN = ("torch", "transformers", "trl", "vllm", "math-verify", "bitsandbytes")
# What pip prints where a set cannot be installed, and where it goes back through versions
IMPOSSIBLE = ("ResolutionImpossible", "No matching distribution", "conflicting dependencies", "Invalid requirement")
BACKTRACKS = ("taking longer than usual", "resolution-too-deep")
# What it prints where it cannot reach the registry: then "no matching distribution" says nothing
UNREACHABLE = ("Retrying (", "Could not fetch URL", "NewConnectionError", "Read timed out", "ReadTimeoutError")
SIDE_BY_SIDE = 3


def read_sets(path: Path) -> dict[str, list[str]]:
    """Return the requirements of each extra with those of the package, and all extras together."""
    config = configparser.ConfigParser(comment_prefixes=("#",))
    config.read_string(path.read_text(encoding="utf-8"))
    base = config["options"]["install_requires"].split("\n")
    extras = {name: value.split("\n") for name, value in config["options.extras_require"].items()}
    sets = {name: base + lines for name, lines in extras.items()}
    sets[",".join(extras)] = base + [line for lines in extras.values() for line in lines]
    return {name: [line.strip() for line in lines if line.strip()] for name, lines in sets.items()}


def resolve(python: Path, name: str, requirements: list[str], deadline: float) -> tuple[str, str]:
    """Return `ok`, `FAIL` or `NOT CHECKED` for a set, and a line that says why."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report, log = Path(folder, "report.json"), Path(folder, "log")
        command = [python, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-input", "--report", report]
        with open(log, "wb") as out:
            try:
                code = subprocess.run(
                    [*command, *requirements], stdout=out, stderr=out, timeout=max(deadline - began, 1)
                ).returncode
            except subprocess.TimeoutExpired:
                code = None
        text, seconds = log.read_text(errors="replace"), f"{time.monotonic() - began:.0f} s"
        if code == 0:
            found = {
                item["metadata"]["name"]: item["metadata"]["version"]
                for item in json.loads(report.read_text())["install"]
            }
            versions = ", ".join(f"{package} {found[package]}" for package in SHOWN if package in found)
            return "ok", f"{len(found)} packages in {seconds}: {versions}"
    is_impossible = any(words in text for words in IMPOSSIBLE) and not any(words in text for words in UNREACHABLE)
    if is_impossible or (code is None and any(words in text for words in BACKTRACKS)):
        lines = [line for line in text.splitlines() if line.startswith(("ERROR", "INFO"))]
        return "FAIL", f"pip finds no versions that fit together ({seconds}): {' | '.join(lines[-3:])[:1000]}"
    why = f"no answer within {seconds}" if code is None else " | ".join(text.splitlines()[-2:])[:500]
    return "NOT CHECKED", why


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=300, help="for all sets together")
    parser.add_argument("--setup", type=Path, default=SETUP, help="the setup.cfg to read")
    given = parser.parse_args()
    deadline, failed = time.monotonic() + given.seconds, False
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        python = Path(folder, "bin/python")
        # Before 23.3, pip downloads the packages (torch: 6 GB) to plan with them
        newest = [python, "-m", "pip", "install", "--quiet", "--retries", "1", "--upgrade", "pip"]
        try:
            subprocess.run(newest, check=True, timeout=60, capture_output=True)
        except subprocess.SubprocessError:
            print("check_extras: NOT CHECKED: the package registry does not answer")
            return
        sets = sorted(read_sets(given.setup).items(), key=lambda item: -len(item[1]))  # the longest first
        answers = pool.map(lambda item: resolve(python, *item, deadline), sets)
        for (name, _), (verdict, why) in zip(sets, answers, strict=True):
            print(f"check_extras: {verdict}: [{name}]: {why}", flush=True)
            failed |= verdict == "FAIL"
    sys.exit(failed)


if __name__ == "__main__":
    main()
