"""Tell how countdown-tiny's problems are answered before and after RL, for a comparison's rows.

    python scripts/countdown_by_form.py runs/countdown-tiny/compare [--output by_form.json]

It reads the samples that each cell's evaluation left. It gives the shares of completions in steps, of completions with
times or over, and of completions that are a true calculation with the given numbers, whatever its result. And it gives
pass@1 on the problems that plus and minus alone can solve, as in the demonstrations, and on the others.
"""

from itertools import permutations, product
from statistics import fmean

from compared_samples import check_problems, describe_comparison
from recipe_task import recipe_task


task = recipe_task("countdown-tiny")

FIGURES = {
    "in_steps": "in steps",
    "times_over": "times or over",
    "true": "true calculation",
    "plus_minus_problems": "pass@1 where plus and minus suffice",
    "other_problems": "pass@1 elsewhere",
}


def plus_and_minus_suffice(numbers: list[int], target: int) -> bool:
    calculations = product(set(permutations(numbers)), product(task.EASY, repeat=len(numbers) - 1))
    return any(task.is_right(task.at_once(order, names), numbers, target) for order, names in calculations)


def is_true(completion: str, numbers: list[int]) -> bool:
    return any(task.is_right(completion, numbers, target) for target in range(len(task.NUMBERS)))


def by_form(groups: list[dict]) -> dict[str, float]:
    """Return the figures that `FIGURES` names, each from 0 to 1."""
    problems = task.held_out(num=len(groups))
    check_problems(groups, problems)
    values = {name: [] for name in FIGURES}
    for group, problem in zip(groups, problems, strict=True):
        numbers, target = problem["numbers"], problem["target"]
        suffice = plus_and_minus_suffice(numbers, target)
        for completion in group["completions"]:
            words = completion.split()
            values["in_steps"].append(task.IS in words)
            values["times_over"].append("times" in words or "over" in words)
            values["true"].append(is_true(completion, numbers))
            kind = "plus_minus_problems" if suffice else "other_problems"
            values[kind].append(task.is_right(completion, numbers, target))
    return {name: round(fmean(found), 4) for name, found in values.items()}


def table(cells: list[dict]) -> str:
    lines = [f"| RL starts from | {' | '.join(FIGURES.values())} |", "| --- |" + " ---: |" * len(FIGURES)]
    for row in dict.fromkeys(cell["row"] for cell in cells):
        mine = [cell for cell in cells if cell["row"] == row]
        means = [[fmean(cell[when][name] for cell in mine) for when in ("before", "after")] for name in FIGURES]
        lines.append(f"| {row} | {' | '.join(f'{before:.2f} -> {after:.2f}' for before, after in means)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    describe_comparison(__doc__, by_form, table)
