"""Tell which symbols of skills-tiny are solved before and after RL: pass@1 by kind of symbol, for a comparison's rows.

    python scripts/skills_by_symbol.py runs/skills-tiny/compare [--output by_symbol.json]

It reads the samples that each cell's evaluation left, or the file that it wrote of them. There are three kinds of
symbols: those whose rare skill SFT demonstrates, those of a rare skill that SFT shows under another symbol, and those
of a skill that the base prefers and SFT never shows; they are those of the recipe's own base. Coverage is that of
aesl_trl/diversity/coverage.py for 8 samples,
against the row `base`, with a symbol in place of a prompt.
"""

import sys
from collections import defaultdict
from statistics import fmean

from compared_samples import check_problems, describe_comparison
from recipe_task import recipe_task


task = recipe_task("skills-tiny")

DEMONSTRATED, RARE, COMMON = "demonstrated", "rare skill, other symbol", "common skill"
K = 8  # samples within which a symbol is to be solved, for its coverage
SOLVED = 0.5  # a symbol below this pass@1 counts as lost: it is nearly always 0 or 1


def kind_of(symbol: str) -> str:
    if symbol in task.DEMONSTRATED:
        return DEMONSTRATED
    return RARE if task.SKILL_OF[symbol] in task.RARE else COMMON


def by_symbol(groups: list[dict]) -> dict[str, float]:
    """Return pass@1 of each symbol."""
    problems, rights = task.held_out(num=len(groups)), defaultdict(list)
    check_problems(groups, problems)
    for group, problem in zip(groups, problems, strict=True):
        rewards = task.skill_reward(None, group["completions"], [problem["answer"]] * len(group["completions"]))
        rights[group["prompt"][0]["content"].split()[0]] += rewards
    return {symbol: round(fmean(rights[symbol]), 4) for symbol in task.SYMBOLS}


def coverage(cell: dict, base: dict) -> tuple[float, float]:
    """Return the coverage before RL that a cell has lost and gained against the base of its seed, mean over symbols.

    A symbol has some 200 samples, so its rate serves as the chance that a sample is right.
    """
    chances = [[1 - (1 - side["before"][symbol]) ** K for symbol in task.SYMBOLS] for side in (base, cell)]
    pairs = list(zip(*chances, strict=True))
    return fmean(p * (p - q) for p, q in pairs), fmean((1 - p) * (q - p) for p, q in pairs)


def table(found: list[dict]) -> str:
    kinds, bases = (COMMON, DEMONSTRATED, RARE), {cell["seed"]: cell for cell in found if cell["row"] == "base"}
    if len(bases) < sum(cell["row"] == "base" for cell in found):
        sys.exit(
            "several rows `base` of one seed: only a comparison of the recipe's own base, with one RL run, is told"
        )
    head = ["RL starts from", *kinds, "lost after RL, by seed", f"coverage at {K} before RL, lost / gained"]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for row in dict.fromkeys(cell["row"] for cell in found):
        mine = [cell for cell in found if cell["row"] == row]
        means = []
        for kind in kinds:
            of_kind = [symbol for symbol in task.SYMBOLS if kind_of(symbol) == kind]
            before, after = (fmean(cell[when][s] for cell in mine for s in of_kind) for when in ("before", "after"))
            means.append(f"{before:.3f} -> {after:.3f}")
        lost = ["".join(s for s in task.SYMBOLS if cell["after"][s] < SOLVED) or "none" for cell in mine]
        against = [coverage(cell, bases[cell["seed"]]) for cell in mine if cell["seed"] in bases]
        share = " / ".join(f"{fmean(side):.2f}" for side in zip(*against, strict=True)) or "-"
        lines.append(f"| {row} | {' | '.join(means)} | {' '.join(lost)} | {share} |")
    return "\n".join(lines)


if __name__ == "__main__":
    describe_comparison(__doc__, by_symbol, table)
