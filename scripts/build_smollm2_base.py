#!/usr/bin/env python3
"""Build the base of recipes/SmolLM2-135M-Instruct: stage 0 teaches the model three families of tasks, and a gate asks.

    python scripts/build_smollm2_base.py [--model DIR] [--output_dir DIR] [--seed 0] [flags of aesl sft and aesl probe]

SmolLM2-135M-Instruct answers hardly any of these problems as it is: a base without ability has nothing to forget, and
RL nothing to begin with. So stage 0 trains it, by `aesl sft` and the recipe's own config, on problems that no later
stage uses. Then `aesl probe` asks for each family, at temperature 1: is pass@1 between 0.15 and 0.40, and pass@16 at
least 0.6? Where a family fails, the exit code is 1: change its settings in the recipe's task.py. What the gate found
is recorded in the recipe's results/stage_0.json, one entry for each attempt.

A command that was cut off goes on at its last checkpoint, and a finished training is not run again. A base of another
task.py, config, model or flags is refused: OUTPUT_DIR.json, beside the base, has the digest of what it was trained
with. Flags that the script does not know, such as `--bf16 true`, go to the training, to the probe and into the record.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from recipe_task import RECIPES, digest_of_files, recipe_task

from aesl_trl.errors import InputError, exit_on_input_error
from aesl_trl.files import READINESS, TRAINER_STATE, own_folder, read_json, read_object, write_json


RECIPE = RECIPES / "SmolLM2-135M-Instruct"
RUNS = RECIPES.parent / "runs" / RECIPE.name
CONFIG = RECIPE / "sft/config_stage_0.yaml"
RECORD = RECIPE / "results/stage_0.json"
PASS_1, PASS_16 = (0.15, 0.40), 0.6


def aesl(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "aesl_trl.cli", *map(str, arguments)], check=True)


def digest_of(model: Path, flags: list[str]) -> str:
    """Return a digest of all that a base depends on but its seed: model, stage 0's config, task and flags."""
    return digest_of_files([CONFIG, RECIPE / "task.py", *(path for path in model.iterdir() if path.is_file())], flags)


def train(model: Path, out: Path, seed: int, flags: list[str]) -> str:
    """Train stage 0 into `out`, or go on where it was cut off. Return the digest of what it is trained with.

    Raises:
        InputError: `model` is no folder, or what lies in `out` was trained with something else.
    """
    if not model.is_dir():
        raise InputError(f"model: {model} is not a folder; the recipe's README says how to get the model")
    beside, given = out.with_name(f"{out.name}.json"), {"digest": digest_of(model, flags), "seed": seed}
    if out.exists() and read_object(beside) != given:
        cause = f"another model, seed, {CONFIG.name}, task.py or other flags"
        raise InputError(f"output_dir: {out} was trained with {cause}: remove that folder, or name another")
    if not (own_folder(out) / TRAINER_STATE).exists():  # written at the end
        write_json(beside, given)
        ours = ["--config", CONFIG, "--model_name_or_path", model, "--output_dir", out, "--seed", seed]
        aesl("sft", *ours, *flags, *(["--resume_from_checkpoint", "true"] if out.exists() else []))
    return given["digest"]


def gate(readiness: dict) -> list[dict]:
    """Return each family's figures of a probe of the base, and whether they pass."""
    found = []
    for family in readiness["checkpoints"][0]["tasks"]:
        figures = family["figures"]
        low, high = PASS_1
        passes = low <= figures["pass@1"] <= high and figures["pass@16"] >= PASS_16
        row = {name: figures[name] for name in ("pass@1", "pass@16", "entropy", "truncated")}
        found.append({"family": family["name"], "prompts": family["num_prompts"], **row, "passes": passes})
    return found


def record(model: Path, seed: int, digest: str, flags: list[str], rows: list[dict], path: Path) -> None:
    """Record what the gate found of a base. Other attempts stay: settings that failed are a result too."""
    task = recipe_task(RECIPE.name)
    entry = {
        "digest": digest,
        "seed": seed,
        "flags": flags,
        "model": read_object(model / "origin.json") or {"model": "as downloaded, without origin.json"},
        "rows": task.SIZES["base"],
        "settings": task.TASKS,
        "gate": rows,
    }
    attempts = read_json(path) if path.exists() else []
    others = [each for each in attempts if (each["digest"], each["seed"]) != (digest, seed)]
    write_json(path, [*others, entry])


def table(rows: list[dict]) -> str:
    lines = ["| family | pass@1 | pass@16 | cut off | gate |", "| --- | ---: | ---: | ---: | --- |"]
    for row in rows:
        figures = " | ".join(f"{row[name]:.2f}" for name in ("pass@1", "pass@16", "truncated"))
        lines.append(f"| {row['family']} | {figures} | {'passes' if row['passes'] else '**fails**'} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=RUNS / "model", help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--output_dir", type=Path, help="folder of the base (default: runs/.../base/seed-SEED)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order and of the answers' forms")
    given, flags = parser.parse_known_args()
    out = given.output_dir or RUNS / "base" / f"seed-{given.seed}"
    digest = train(given.model, out, given.seed, flags)
    aesl("probe", out, "--config", RECIPE / "probe.yaml", "--output", out / READINESS, *flags)
    rows = gate(read_json(out / READINESS))
    record(given.model, given.seed, digest, flags, rows, RECORD)
    print(table(rows))
    sys.exit(0 if all(row["passes"] for row in rows) else 1)


if __name__ == "__main__":
    exit_on_input_error("build_smollm2_base.py", main)
