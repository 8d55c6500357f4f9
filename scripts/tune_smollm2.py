#!/usr/bin/env python3
"""Choose SFT's and RL's learning rate for recipes/SmolLM2-135M-Instruct, before any RL from a cold start.

    python scripts/tune_smollm2.py [--base DIR] [--stages sft rl] [any flag of the stage's command]

At seed 100, three rates a stage (recipes/SmolLM2-135M-Instruct/DECISION.md): for SFT the one with the lowest held-out
nll after one epoch of plain nll, for RL the one with the highest mean reward over the last 10 of 60 steps of direct RL
from the base. The figures are recorded in the recipe's results/rates.json. Then write the chosen rates into the
configs: `learning_rate` of sft/config_nll.yaml, config_aesl.yaml and config_aesl_auto.yaml, and of grpo/config.yaml.

A training that is there is not run again, and one that was cut off goes on. Flags that the script does not know, such
as `--bf16 true` on a CPU that computes in bfloat16, go to the trainings of each stage named, and into the record.
"""

import argparse
from pathlib import Path

from build_smollm2_base import RECIPE, RUNS, aesl
from recipe_task import digest_of_files

from aesl_trl.errors import InputError, exit_on_input_error
from aesl_trl.files import TRAINER_STATE, own_folder, read_log, read_object, write_json
from aesl_trl.report.parts import markdown_table, mean


SEED, LAST_STEPS = 100, 10
RATES = {"sft": ("2e-5", "5e-5", "1e-4"), "rl": ("3e-6", "1e-5", "3e-5")}
COMMANDS = {"sft": "sft", "rl": "grpo"}
CONFIGS = {"sft": RECIPE / "sft/config_nll.yaml", "rl": RECIPE / "grpo/config.yaml"}
FLAGS = {"sft": ["--num_train_epochs", "1", "--diversity_steps", "0"], "rl": []}
FIGURES = {"sft": "held-out nll after one epoch", "rl": f"mean reward over the last {LAST_STEPS} steps"}


def train(stage: str, rate: str, base: Path, run: Path, flags: list[str]) -> list[dict]:
    """Train one rate into `run`, unless it is there, and return the training's log."""
    ended = {"sft": own_folder(run), "rl": run}[stage] / TRAINER_STATE  # written at the end
    if not ended.exists():
        given = ["--config", CONFIGS[stage], "--model_name_or_path", base, "--output_dir", run, "--seed", SEED]
        resume = ["--resume_from_checkpoint", "true"] if run.exists() else []
        aesl(COMMANDS[stage], *given, "--learning_rate", rate, *flags, *resume)
    return read_log(run)


def figure(stage: str, log: list[dict]) -> float:
    """Return what a rate is judged by."""
    if stage == "sft":
        return [row["eval_nll"] for row in log if "eval_nll" in row][-1]
    return mean([row["reward"] for row in log if "reward" in row][-LAST_STEPS:])


def choose(stage: str, figures: dict[str, float]) -> str:
    """Return the best rate: the lowest nll of SFT, the highest reward of RL. Of equal rates the lower one wins."""
    return min(figures, key=lambda rate: (figures[rate] if stage == "sft" else -figures[rate], float(rate)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--base", type=Path, default=RUNS / "base/seed-0", help="the base of build_smollm2_base.py")
    parser.add_argument("--stages", nargs="+", choices=RATES, default=list(RATES), help="whose rate is chosen")
    parser.add_argument("--work_dir", type=Path, default=RUNS / "rates", help="folder of the trainings")
    parser.add_argument("--record", type=Path, default=RECIPE / "results/rates.json", help="file of the record")
    given, extra = parser.parse_known_args()
    if not any(given.base.glob("*.safetensors")):
        raise InputError(f"base: {given.base} holds no weights: first run python scripts/build_smollm2_base.py")
    for stage in given.stages:
        flags = [*FLAGS[stage], *extra]
        digest = digest_of_files([*given.base.glob("*.safetensors"), CONFIGS[stage], RECIPE / "task.py"], flags)
        runs = {rate: given.work_dir / digest / f"{stage}-{rate}" for rate in RATES[stage]}
        figures = {rate: figure(stage, train(stage, rate, given.base, run, flags)) for rate, run in runs.items()}
        chosen = choose(stage, figures)
        entry = {
            "digest": digest,
            "seed": SEED,
            "flags": flags,
            "figure": FIGURES[stage],
            "figures": figures,
            "chosen": chosen,
        }
        write_json(given.record, {**read_object(given.record), stage: entry})
        rows = [[rate, f"{value:.4f}", "chosen" if rate == chosen else ""] for rate, value in figures.items()]
        print(markdown_table([f"{stage}'s learning rate", FIGURES[stage], ""], rows))
        print(f"{given.record} has the record; next: set learning_rate: {chosen} in the recipe's {stage} configs")


if __name__ == "__main__":
    exit_on_input_error("tune_smollm2.py", main)
