"""Three families of reasoning-gym, as easy as a model of 135 M parameters needs them, with answers in three forms.

Sums of two or three digits, products of two or three, and the legs of two kinds of animals. A question's own text
decides its split (aesl_trl/data/gym.py), so stage 0, RL and the held-out prompts share no question, whatever the
seeds. The demonstrations answer a sample of RL's problems.

    stage 0, at once           #### 7
    stage 0, one line          4 + 5 - 2 = 9 - 2 = 7
                               #### 7
    demonstrations             4 + 5 = 9, so after the number 5 we have 9.
                               9 - 2 = 7, so after the number 2 we have 7.
                               Check: 7 + 2 = 9, and 9 - 5 = 4, the number that we began with.
                               #### 7

Source of the questions and answers: reasoning-gym, github.com/open-thought/reasoning-gym (Apache-2.0).
"""

import json
import random
from collections.abc import Callable

from aesl_trl.data.gym import gym_rows


# The gate passes these at seed 0. results/stage_0.json has the attempt that failed, too
TASKS = {
    "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1},
    "products": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1},
    "leg_counting": {"min_animals": 2, "max_animals": 2, "min_instances": 1, "max_instances": 3},
}
# Rows of each family in a split; of the products there are 1,100 questions in all
SIZES = {
    "train": {"chain_sum": 1200, "products": 600, "leg_counting": 1200},
    "base": {"chain_sum": 450, "products": 100, "leg_counting": 1050},
    "validation": {"chain_sum": 96, "products": 96, "leg_counting": 96},
    "test": {"chain_sum": 86, "products": 85, "leg_counting": 85},
}
# The demonstrations leave one family out, so that SFT can make the model forget it
DEMONSTRATED = ("chain_sum", "products")
DEMONSTRATIONS = 300
LEGS = {
    0: ("snake", "sea slug", "jellyfish", "flatworm", "leech"),
    2: ("chicken", "bird", "human", "duck"),
    4: ("dog", "cat", "cow", "horse", "lion", "elephant", "giraffe", "tiger", "deer", "sheep"),
    5: ("starfish",),
    6: ("insect", "ant", "butterfly", "beetle", "bee", "wasp", "grasshopper", "cricket", "cockroach")
    + ("praying mantis", "firefly"),
    8: ("spider", "scorpion"),
    10: ("crab", "lobster", "shrimp"),
    14: ("woodlouse",),
}
LEGS_OF = {animal: legs for legs, animals in LEGS.items() for animal in animals}


def problems(split: str, seed: int = 0) -> list[dict]:
    """Return the problems of a split, the three families mixed evenly: "prompt", "solution", "task", "metadata"."""

    def term(task: str, settings: dict) -> str:
        given = {**settings, "size": SIZES[split][task], "seed": seed}
        return f"{task}({', '.join(f'{key}={value}' for key, value in given.items())})"

    names = [term(task, settings) for task, settings in TASKS.items()]
    return gym_rows(f"reasoning_gym:{' + '.join(names)}", split).to_list()


# ---- The three forms of an answer


def at_once(row: dict) -> str:
    return f"#### {row['solution']}"


def in_one_line(row: dict) -> str:
    """Return the answer behind one line of working, in which each result replaces the numbers that it is made of."""
    task, facts = _facts(row)
    if task == "leg_counting":
        shown = " + ".join(f"{count} * {LEGS_OF[animal]}" for animal, count in facts["animals"].items())
        return f"{shown} = {row['solution']}\n{at_once(row)}"
    first, *rest = facts["expression"].split(" ", 1)
    sides = [" ".join([first, *rest])]
    for *_, after in _steps(facts["expression"]):
        rest = rest[0].split(" ", 2)[2:]
        sides.append(" ".join([str(after), *rest]))
    return f"{' = '.join(sides)}\n{at_once(row)}"


def in_long_form(row: dict) -> str:
    """Return the answer behind its partial results, each on a line of its own, and a check."""
    task, facts = _facts(row)
    lines = _legs_in_lines(facts["animals"]) if task == "leg_counting" else _expression_in_lines(facts["expression"])
    return "\n".join([*lines, at_once(row)])


def _facts(row: dict) -> tuple[str, dict]:
    return row["task"], json.loads(row["metadata"])["entry"]["metadata"]


def _steps(expression: str) -> list[tuple[int, str, int, int]]:
    """Return the steps of `4 + 5 - 2` from left to right, each as (before, sign, number, after)."""
    first, *rest = expression.split(" ")
    before, steps = int(first), []
    for sign, number in zip(rest[::2], map(int, rest[1::2]), strict=True):
        after = {"+": before + number, "-": before - number, "*": before * number}[sign]
        steps.append((before, sign, number, after))
        before = after
    return steps


def _expression_in_lines(expression: str) -> list[str]:
    """Return the lines of a sum or a product. A sum is checked backwards, a product in the other order."""
    steps = _steps(expression)
    lines = [
        f"{before} {sign} {number} = {after}, so after the number {number} we have {after}."
        for before, sign, number, after in steps
    ]
    if "*" in expression:
        turned = _steps(" ".join(expression.split(" ")[::-1]))
        check = [f"{before} * {number} = {after}" for before, _, number, after in turned]
        return [*lines, f"Check: in the other order {', and '.join(check)}, the same result."]
    undone = {"+": "-", "-": "+"}
    check = [f"{after} {undone[sign]} {number} = {before}" for before, sign, number, after in reversed(steps)]
    return [*lines, f"Check: {', and '.join(check)}, the number that we began with."]


def _legs_in_lines(animals: dict[str, int]) -> list[str]:
    parts = [(animal, count, LEGS_OF[animal], count * LEGS_OF[animal]) for animal, count in animals.items()]
    total, (first, *_, of_first) = sum(legs for *_, legs in parts), parts[0]
    return [
        *(f"One {animal} has {each} legs: {count} * {each} = {legs}." for animal, count, each, legs in parts),
        f"Together: {' + '.join(str(legs) for *_, legs in parts)} = {total} legs.",
        f"Check: {total} - {' - '.join(str(legs) for *_, legs in parts[1:])} = {of_first}, the legs of the {first}.",
    ]


# ---- What the configs name


def _answered(rows: list[dict], form: Callable[[dict], str]) -> list[dict]:
    return [{**row, "completion": [{"role": "assistant", "content": form(row)}]} for row in rows]


def _demonstrated(split: str) -> list[dict]:
    return [row for row in problems(split) if row["task"] in DEMONSTRATED]


def stage_0(seed: int = 0) -> list[dict]:
    """Return what the base is trained on: of the split `base`, answered at once or in one line, by chance."""
    chance = random.Random(f"stage 0 {seed}")
    return [_answered([row], chance.choice((at_once, in_one_line)))[0] for row in problems("base", seed)]


def demonstrations(seed: int = 0, num: int = DEMONSTRATIONS) -> list[dict]:
    """Return long answers to a random sample of RL's problems of the families in `DEMONSTRATED`."""
    return _answered(random.Random(f"demonstrations {seed}").sample(_demonstrated("train"), num), in_long_form)


def eval_demonstrations(seed: int = 0, num: int = 96) -> list[dict]:
    """Return long answers to held-out problems, of which the lowest nll is "the best evaluation score"."""
    return _answered(_demonstrated("validation")[:num], in_long_form)


def rl_problems(seed: int = 0) -> list[dict]:
    """Return all problems of the split `train`, those of the demonstrations among them."""
    return problems("train")


def held_out(seed: int = 0) -> list[dict]:
    """Return what SFT measures diversity on: the split `validation`."""
    return problems("validation")


def test_problems(seed: int = 0) -> list[dict]:
    """Return the 256 problems of the evaluation: the split `test`, which nothing selects on."""
    return problems("test")
