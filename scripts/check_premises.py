"""Check, before any RL, what a comparison of cold starts on skills-chain-tiny presupposes: AESL acts, and nll forgets.

    python scripts/check_premises.py [--bases DIR ...] [--seeds 0 1 2] [--work_dir DIR] [--json FILE]

For each base and seed it trains nll and AESL by the recipe's own configs. Samples are measured at the first and the
last step alone: 192 held-out prompts with 16 samples each, so that coverage is that within 8 samples. Where a premise
fails at a seed, the exit code is 1: then change the data, and not what is compared. A run that is there is not trained
again; runs of another base, other configs or another task lie in a folder of their own.
"""

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path

from recipe_task import RECIPES

from aesl_trl.diversity.coverage import GAINED, LOST
from aesl_trl.files import DIVERSITY, TRAINER_STATE, RunFolder, own_folder


RECIPE = RECIPES / "skills-chain-tiny"
MAX_EFFECTIVE, MIN_LOST = 0.7, 0.05
FLAGS = {
    "diversity_steps": 100_000,  # above max_steps: the first and the last step are measured in any case
    "diversity_num_prompts": 192,
    "diversity_num_samples": 16,
    "diversity_token_budget": 0,
    "diversity_batch_size": 1536,
    "eval_strategy": "no",
    "learning_rate": 3e-4,  # the same for both losses
}
AESL = {"t_scaling": 3.0}  # beside `FLAGS`, the setting of the recorded premises; the recipe's own is auto


def train(loss: str, base: Path, seed: int, run: Path) -> RunFolder:
    flags = {
        "config": RECIPE / "sft" / f"config_{loss}.yaml",
        "model_name_or_path": base,
        "output_dir": run,
        "seed": seed,
        **FLAGS,
        **(AESL if loss == "aesl" else {}),
    }
    command = [sys.executable, "-m", "aesl_trl.cli", "sft"]
    command += [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    if not (own_folder(run) / TRAINER_STATE).exists():  # written at the end
        subprocess.run(command, check=True)
    return RunFolder(run)


def digest_of(base: Path) -> str:
    """Return a digest of all that a run depends on but its seed: base, configs, task and this file's flags."""
    paths = sorted([*base.iterdir(), *(RECIPE / "sft").iterdir(), RECIPES / "skills-tiny" / "task.py"])
    contents = [path.name.encode() + path.read_bytes() for path in paths if path.is_file()]
    return hashlib.sha256(b"\0".join([*contents, json.dumps(FLAGS | AESL).encode()])).hexdigest()[:12]


def check(base: Path, seed: int, work_dir: Path) -> dict:
    """Train both losses and return their figures, with what holds."""
    digest = digest_of(base)
    found, work_dir = {"base": base.name, "digest": digest, "seed": seed}, work_dir / digest
    for loss in ("nll", "aesl"):
        run = train(loss, base, seed, work_dir / f"seed-{seed}" / loss)
        logged = [row for row in run.log if "loss" in row][-1]
        row = run.rows(DIVERSITY)[-1]
        found[loss] = {name: row[name] for name in ("step", "pass@1", "pass@8", "entropy", LOST, GAINED)}
        found[loss] |= {
            "coverage_lost_ends": row["intervals"][LOST],
            "weight_effective": logged["loss"] / logged["nll"],
        }
    lost, (low, _) = found["nll"][LOST], found["nll"]["coverage_lost_ends"]
    return found | {
        "aesl_acts": found["aesl"]["weight_effective"] < MAX_EFFECTIVE,
        "nll_forgets": lost > MIN_LOST and low > 0,
    }


def table(rows: list[dict]) -> str:
    lines = [
        "| base | seed | AESL's loss / nll at the end | coverage lost: nll | AESL | premises |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        lost = [
            f"{row[loss][LOST]:.2f} [{', '.join(f'{end:.2f}' for end in row[loss]['coverage_lost_ends'])}]"
            for loss in ("nll", "aesl")
        ]
        holds = "hold" if row["aesl_acts"] and row["nll_forgets"] else "**fail**"
        effective = f"{row['aesl']['weight_effective']:.3f}"
        lines.append(f"| {row['base']} | {row['seed']} | {effective} | {' | '.join(lost)} | {holds} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--bases", type=Path, nargs="+", default=[RECIPE / "base"], help="folders of base models")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of data and training")
    parser.add_argument("--work_dir", type=Path, default=RECIPES.parent / "runs/skills-chain-tiny/premises")
    parser.add_argument("--json", type=Path, metavar="FILE", help="record the figures")
    args = parser.parse_args()
    rows = [check(base, seed, args.work_dir) for base in args.bases for seed in args.seeds]
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if not all(row["aesl_acts"] and row["nll_forgets"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
