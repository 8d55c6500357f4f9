"""From graded samples to the content of evaluation.json: pass@k, avg@k, maj@k, diversity, and their intervals.

Intervals resample problems, not samples.
"""

import importlib.metadata
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..diversity.figures import Group, by_prompt, entropy_estimator, measure, prompt_sums, right_counts
from ..diversity.intervals import bootstrap_interval, is_number
from ..diversity.passk import avg_at_k, pass_at_k, powers_of_two
from ..files import write_jsonl
from ..provenance import package_versions
from ..rewards.functions import reward_name, score_groups
from ..rewards.majority import count_votes, extract, maj_at_k


PROMPTS = "prompts"  # the name of `dataset_name`'s problems, beside those of the benchmarks


@dataclass(frozen=True)
class Task:
    """Problems that are sampled and graded alike; `source` says where those of a benchmark come from.

    `count_by` is the column whose values are counted as solved or not, each with a pass@1 of its own.
    """

    name: str
    rows: list[dict]
    reward_funcs: list
    source: dict | None = None
    count_by: str | None = None


def grade_task(task: Task, groups: list[Group], success_threshold: float, folder: Path) -> dict:
    """Grade the samples of a task and return their figures.

    Each problem's rewards, and on benchmarks its answers, are written to `<task>.graded.jsonl`.
    """
    reward = task.reward_funcs[0]
    groups = score_groups(groups, task.rows, task.reward_funcs)
    if task.source is not None:
        # A gold answer that cannot be read leaves NaN, but 0.0 where a sample broke the grader: no verdict counts.
        for index, group in enumerate(groups):
            if not all(is_number(sample[0]) for sample in group.rewards):
                groups[index] = replace(group, rewards=[[math.nan] for _ in group.completions])
    figures = figures_with_intervals(groups, success_threshold)
    if not_graded := sum(not num for num, _ in right_counts(groups)):
        figures["problems_not_graded"] = not_graded
    if task.count_by is not None:
        figures |= figures_by_value(groups, [str(row.get(task.count_by)) for row in task.rows], success_threshold)
    rows = [{"index": index, "rewards": group.rewards} for index, group in enumerate(groups)]
    if task.source is not None:
        texts = [text for group in groups for text in group.completions]
        extracted = iter(extract(texts, reward.grade, reward_name(reward)))
        answers = [[next(extracted) for _ in group.completions] for group in groups]
        figures |= benchmark_figures(groups, answers, reward, success_threshold)
        figures["answers_not_graded"] = reward.take_failures()
        for row, problem, of_problem in zip(rows, task.rows, answers, strict=True):
            row |= {"solution": problem["solution"], "answers": of_problem}
    write_jsonl(folder / f"{task.name}.graded.jsonl", rows)
    return figures


def figures_with_intervals(groups: list[Group], success_threshold: float) -> dict:
    """Return the figures of a line of diversity.jsonl, and `pass@k_interval`: [low, high] at 95% over problems."""
    sums = prompt_sums(groups, success_threshold=success_threshold)
    figures = {**measure(sums), "entropy_estimator": entropy_estimator(groups)}
    for name, values in by_prompt(sums).items():
        known = [value for value in values if value is not None]
        if name.startswith("pass@") and known:
            figures[f"{name}_interval"] = list(bootstrap_interval(known))
    return figures


def figures_by_value(groups: list[Group], values: list[str], success_threshold: float) -> dict[str, Any]:
    """Return how many `values`, one a problem, are solved, how many there are (`solved_of`), and `pass@1[value]`.

    A value is solved where at least half of the graded samples of its problems are right. Its pass@1 is a mean over
    its problems, with `pass@1[value]_interval`; a value of which nothing is graded has none.
    """
    counts: dict[str, list[tuple[int, int]]] = {value: [] for value in values}
    for value, (num, right) in zip(values, right_counts(groups, success_threshold), strict=True):
        counts[value] += [(num, right)] if num else []
    solved = sum(bool(of) and 2 * sum(right for _, right in of) >= sum(num for num, _ in of) for of in counts.values())
    figures: dict[str, Any] = {"solved": solved, "solved_of": len(counts)}
    for value, of in counts.items():
        if of:
            figures |= _mean_and_interval(f"pass@1[{value}]", [right / num for num, right in of])
    return figures


def benchmark_figures(groups: list[Group], answers: list, reward: Any, success_threshold: float) -> dict:
    """Return avg@k and maj@k with intervals, the share of ties, and the numbers of what could not be graded.

    Problems whose gold answer math-verify cannot read are left out and counted as `problems_not_graded`.
    """
    known = [index for index, group in enumerate(groups) if is_number(group.rewards[0][0])]
    right = [[sample[0] >= success_threshold for sample in groups[index].rewards] for index in known]
    votes = count_votes([answers[index] for index in known], right, reward.grade, reward_name(reward))
    num = len(groups[0].completions)
    figures = {
        **_mean_and_interval(f"avg@{num}", [avg_at_k(num, sum(flags)) for flags in right]),
        # pass@k for all samples, which powers of two may leave out
        **_mean_and_interval(f"pass@{num}", [pass_at_k(num, sum(flags), num) for flags in right]),
    }
    for k in sorted({*powers_of_two(num), num}):
        shares = [maj_at_k(problem, k) for problem in votes]
        figures |= _mean_and_interval(f"maj@{k}", [won for won, _ in shares])
        figures[f"maj@{k}_tied"] = _mean([tied for _, tied in shares])
    texts = [text for problem in answers for text in problem]
    figures["no_answer"] = sum(text is None for text in texts) / len(texts)
    figures["problems_not_graded"] = len(groups) - len(known)
    return figures


def _mean_and_interval(name: str, values: list[float]) -> dict:
    return {name: _mean(values), f"{name}_interval": list(bootstrap_interval(values))}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def describe(tasks: list[Task], figures: dict[str, dict], args: Any) -> dict:
    """Return the content of evaluation.json from the figures of each task and model.

    `models` holds the figures on the prompts, or their mean over benchmarks, in which each benchmark has one vote.
    """
    by_benchmark = {
        task.name: {"models": figures[task.name], "num_prompts": len(task.rows), "source": task.source}
        for task in tasks
        if task.source is not None
    }
    # The packages that decide a verdict or a sample
    installed = {item.metadata["Name"]: item.version for item in importlib.metadata.distributions()}
    deciding = [name for name in ("math-verify", "latex2sympy2_extended", "vllm") if name in installed]
    return {
        "models": mean_over(list(figures.values())) if by_benchmark else figures[PROMPTS],
        **({"benchmarks": by_benchmark} if by_benchmark else {}),
        "num_prompts": sum(len(task.rows) for task in tasks),
        "num_samples": args.num_samples,
        "reward_funcs": [reward_name(function) for function in tasks[0].reward_funcs],
        **{key: getattr(args, key) for key in ("temperature", "max_new_tokens", "seed", "success_threshold", "dtype")},
        **({"count_by": args.count_by} if args.count_by else {}),
        **({"chat_template_kwargs": args.chat_template_kwargs} if args.chat_template_kwargs else {}),
        "versions": {**package_versions(), **{name: installed[name] for name in deciding}},
    }


def mean_over(figures: list[dict[str, dict]]) -> dict[str, dict]:
    """Return for each model the mean over benchmarks of each number that every benchmark has, without intervals."""
    means = {}
    for name in figures[0]:
        rows = [by_model[name] for by_model in figures]
        numbers = [key for key, value in rows[0].items() if isinstance(value, int | float)]
        means[name] = {key: _mean([row[key] for row in rows]) for key in numbers if all(key in row for row in rows)}
    return means


def summary_lines(result: dict) -> list[str]:
    """Sum up each model in one line, and on benchmarks each model on each benchmark."""
    if "benchmarks" not in result:
        return [_summary(name, figures) for name, figures in result["models"].items()]
    return [
        _summary(f"{name}, {benchmark}", figures)
        for benchmark, facts in result["benchmarks"].items()
        for name, figures in facts["models"].items()
    ]


def _summary(name: str, figures: dict) -> str:
    keys = [key for key in figures if key.startswith(("avg@", "maj@")) and key.partition("@")[2].isdigit()]
    wanted = ("pass@1", *dict.fromkeys(["pass@8", *keys[:1], *keys[-1:]]), "entropy")
    parts = [f"{key} {figures[key]:.3f}" for key in wanted if key in figures]
    low, high = figures.get("pass@1_interval", (math.nan, math.nan))
    return f"{name}: {', '.join(parts)} (pass@1 between {low:.3f} and {high:.3f})"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Lay `rows` of texts out as a table for a terminal, each column as wide as its longest text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)
