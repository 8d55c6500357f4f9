"""Recorded runs as a markdown table: mean over seeds, and after RL each seed and the standard deviation.

python scripts/summarize_results.py recipes/skills-tiny/results
"""

import statistics
import sys
from pathlib import Path

from aesl_trl import files


FIGURES = ("pass@1", "pass@8", "entropy", "self_bleu", "groups_mixed")


def mean(values: list[float]) -> float:
    return statistics.fmean(values)


def arm_row(folder: Path) -> tuple[float, str]:
    """Mean pass@1 after RL, and the arm's line."""
    runs = sorted(folder.glob("seed-*"))
    models = [files.read_json(run / files.EVALUATION)["models"] for run in runs]
    steps = [files.read_json(run / files.SELECTION)["step"] for run in runs if (run / files.SELECTION).exists()]
    before = [f"{mean([each['start'][name] for each in models]):.2f}" for name in FIGURES]
    after = [each["final"]["pass@1"] for each in models]
    spread = f"{statistics.stdev(after):.2f}" if len(after) > 1 else "-"
    seeds = " ".join(f"{value:.2f}" for value in after)
    step = " ".join(map(str, steps)) or "-"
    return mean(after), " | ".join([folder.name, step, *before, f"**{mean(after):.2f}**", seeds, spread])


def main() -> None:
    names = ("RL starts from", "step", *FIGURES, "pass@1 after RL", "seeds", "sd")
    print(f"| {' | '.join(names)} |")
    print(f"|{' --- |' * len(names)}")
    arms = [arm_row(folder) for folder in Path(sys.argv[1]).iterdir() if any(folder.glob("seed-*"))]
    for _, line in sorted(arms, reverse=True):
        print(f"| {line} |")


if __name__ == "__main__":
    main()
