"""Measure answers graded per second: in one child process, in a pool of them, and by math-verify in this process.

    python scripts/bench/grading.py [--answers 400] [--repeats 7] [--children 1 2] [--json FILE]

The answers are short and of 20 kinds. Twelve kinds are single numbers (fractions, roots, percentages, units), the
others are sets, intervals, equations, polynomials and matrices. The numbers differ from answer to answer, so that
no cache of math-verify helps. Half of the answers are right. Before anything is timed, all methods must give the same
rewards; otherwise the script stops without a table.

The floor is math-verify's own time: TRL's `accuracy_reward` called here, without protection. The methods take turns,
so that the noise of a shared machine hits all of them. Start-up, the time to a pool's first rewards, stands beside the
raw rates in the JSON, because a training pays it once.
"""

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path

import record
from trl.rewards import accuracy_reward

from aesl_trl.rewards.grading import Answer, Graders


DEADLINE_S = 10.0
FLOOR = "math-verify in process"
# (completion, solution) of a right answer; {a}, {b} and {c} are numbers that differ from answer to answer
NUMBERS = [
    (r"\boxed{{{a}}}", "${a}$"),
    (r"\boxed{{-{a}}}", "$-{a}$"),
    (r"So $x = {a}$. \boxed{{{a}}}", "${a}$"),
    (r"The final answer is $\boxed{{{a}}}$.", "{a}"),
    (r"\boxed{{\frac{{{a}}}{{{b}}}}}", r"$\frac{{{a}}}{{{b}}}$"),
    (r"\boxed{{{a}/{b}}}", r"$\frac{{{a}}}{{{b}}}$"),
    (r"\boxed{{{a}.{b}}}", "${a}.{b}$"),
    (r"\boxed{{{a}\%}}", "${a}\\%$"),
    (r"\boxed{{\sqrt{{{a}}}}}", r"$\sqrt{{{a}}}$"),
    (r"\boxed{{{a}\pi}}", r"${a}\pi$"),
    (r"\boxed{{{a}^{{\circ}}}}", r"${a}^\circ$"),
    (r"\boxed{{{a} \text{{ apples}}}}", "${a}$"),
]
KINDS = NUMBERS + [
    (r"\boxed{{{a}\sqrt{{{b}}}}}", r"${a} \sqrt{{{b}}}$"),
    (r"\boxed{{x={a}}}", "${a}$"),
    (r"\boxed{{x^2+{a}x+{b}}}", "${b} + {a}x + x^2$"),
    (r"\boxed{{({a}, {b})}}", "$({a},{b})$"),
    (r"\boxed{{\{{{a},{b},{c}\}}}}", r"$\{{{c},{b},{a}\}}$"),
    (r"\boxed{{[{a},\infty)}}", r"$[{a},\infty)$"),
    (r"\boxed{{{a}+{b}i}}", "${b}i+{a}$"),
    (r"\boxed{{\begin{{pmatrix}}{a}\\{b}\end{{pmatrix}}}}", r"$\begin{{pmatrix}}{a}\\{b}\end{{pmatrix}}$"),
]
SETS = {f"{len(NUMBERS)} kinds of numbers": NUMBERS, f"all {len(KINDS)} kinds": KINDS}


def make_answers(kinds: list[tuple[str, str]], num: int, seed: int) -> list[Answer]:
    draw = random.Random(seed)
    return [_answer(kinds[index % len(kinds)], draw, is_right=index // len(kinds) % 2 == 0) for index in range(num)]


def _answer(kind: tuple[str, str], draw: random.Random, is_right: bool) -> Answer:
    numbers = dict(zip("abc", draw.sample(range(11, 10_000), 3), strict=True))
    completion, solution = (text.format(**numbers) for text in kind)
    if not is_right:
        solution = kind[1].format(**{name: number + 1 for name, number in numbers.items()})
    return Answer("accuracy_reward", completion, solution)


def in_process(answers: list[Answer]) -> list[float | None]:
    messages = [[{"role": "assistant", "content": answer.completion}] for answer in answers]
    return accuracy_reward(messages, [answer.solution for answer in answers])


def in_children(graders: Graders) -> Callable[[list[Answer]], list[float | None]]:
    def grade(answers: list[Answer]) -> list[float | None]:
        grades = graders.grade(answers, DEADLINE_S)
        failed = [answer for answer, grade in zip(answers, grades, strict=True) if grade.failure]
        if failed:
            raise SystemExit(f"not graded: {failed[0]}")
        return [grade.reward for grade in grades]

    return grade


def time_methods(args: argparse.Namespace) -> list[dict]:
    """Return each method's start-up and its answers a second, by set and turn."""
    methods, starts = {FLOOR: in_process}, {}
    for num in args.children:
        name = "1 child" if num == 1 else f"pool of {num}"
        methods[name] = in_children(Graders(num))
        start = time.perf_counter()
        methods[name](make_answers(NUMBERS, num, seed=0))
        starts[name] = time.perf_counter() - start
    check(args, methods)
    rates = {(name, label): [] for label in SETS for name in methods}
    for turn in range(1, args.repeats + 1):
        for name, label in rates:
            answers = make_answers(SETS[label], args.answers, seed=turn)
            start = time.perf_counter()
            methods[name](answers)
            rates[name, label].append(args.answers / (time.perf_counter() - start))
    return [
        {"method": name, "start_s": starts.get(name), "answers_per_s": {label: rates[name, label] for label in SETS}}
        for name in methods
    ]


def check(args: argparse.Namespace, methods: dict[str, Callable]) -> None:
    answers = make_answers(KINDS, args.answers, seed=0)
    truth = in_process(answers)
    if sum(truth) != sum(index // len(KINDS) % 2 == 0 for index in range(args.answers)):
        raise SystemExit("math-verify in process finds another half right: nothing is timed")
    for name, method in methods.items():
        if method(answers) != truth:
            raise SystemExit(f"{name} gives other rewards than math-verify in process: nothing is timed")


def bench(args: argparse.Namespace) -> dict:
    """Return the table of the answers a second to those of math-verify in process."""
    methods = time_methods(args)
    floor = next(method for method in methods if method["method"] == FLOOR)["answers_per_s"]
    rows = [
        [method["method"], *(record.ratio(rates, floor[label]) for label, rates in method["answers_per_s"].items())]
        for method in methods
    ]
    title = f"Answers graded a second, to math-verify's in process; {args.answers} answers a turn"
    return record.table(title, ["graded by", *SETS], rows, methods)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--answers", type=int, default=400, help="answers of one turn")
    parser.add_argument("--repeats", type=int, default=7, help="turns")
    parser.add_argument("--children", type=int, nargs="+", default=[1, 2], help="sizes of pools")
    parser.add_argument("--json", type=Path, metavar="FILE", help="record every rate")
    args = parser.parse_args()
    record.write(args.json, "grading", [record.show(bench(args))])


if __name__ == "__main__":
    main()
