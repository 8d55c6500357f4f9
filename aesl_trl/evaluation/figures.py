"""From graded samples to what evaluation.json holds: pass@k, avg@k, maj@k, diversity, and intervals over problems.

Nothing is sampled here. Answers are graded and compared in child processes (rewards/grading.py, rewards/majority.py).
"""

import importlib.metadata
import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..diversity.figures import Group, entropy_estimator, measure
from ..diversity.intervals import bootstrap_interval
from ..diversity.passk import avg_at_k, pass_at_k, powers_of_two
from ..files import write_jsonl
from ..provenance import package_versions
from ..rewards.functions import score_groups
from ..rewards.majority import Votes, count_votes, extract, maj_at_k


PROMPTS = "prompts"  # what the problems of `dataset_name` are called beside the benchmarks


@dataclass(frozen=True)
class Task:
    """Problems that are sampled and graded alike; `source` says where those of a benchmark come from."""

    name: str
    rows: list[dict]
    reward_funcs: list
    source: dict | None = None


def grade_task(task: Task, groups: list[Group], success_threshold: float, folder: Path) -> dict:
    """The figures of a task; each problem's rewards, and on benchmarks answers, go to `<task>.graded.jsonl`."""
    failed = Counter(getattr(task.reward_funcs[0], "failures", {}))  # of the models before
    groups = score_groups(groups, task.rows, task.reward_funcs)
    groups = groups if task.source is None else [_all_or_none(group) for group in groups]
    figures = with_intervals(groups, success_threshold)
    rows = [{"index": index, "rewards": group.rewards} for index, group in enumerate(groups)]
    if task.source is not None:
        answers = _answers(groups, task)
        figures |= benchmark_figures(groups, answers, task, success_threshold)
        figures["answers_not_graded"] = dict(task.reward_funcs[0].failures - failed)
        rows = [
            {**row, "solution": problem["solution"], "answers": texts}
            for row, problem, texts in zip(rows, task.rows, answers, strict=True)
        ]
    write_jsonl(folder / f"{task.name}.graded.jsonl", rows)
    return figures


def _all_or_none(group: Group) -> Group:
    """No verdict on any sample where the gold answer cannot be read: one that broke the grader has 0.0, not nan."""
    if all(sample[0] == sample[0] for sample in group.rewards):
        return group
    return replace(group, rewards=[[math.nan] for _ in group.completions])


def _answers(groups: list[Group], task: Task) -> list[list[str | None]]:
    reward = task.reward_funcs[0]
    texts = iter(extract([text for group in groups for text in group.completions], reward.graders, reward.deadline_s))
    return [[next(texts) for _ in group.completions] for group in groups]


def benchmark_figures(groups: list[Group], answers: list, task: Task, success_threshold: float) -> dict:
    """avg@k and maj@k with intervals, ties, and what could not be graded.

    Problems whose gold answer math-verify cannot read count for nothing: `problems_not_graded`.
    """
    reward = task.reward_funcs[0]
    known = [i for i, group in enumerate(groups) if group.rewards[0][0] == group.rewards[0][0]]
    right = [[sample[0] >= success_threshold for sample in groups[i].rewards] for i in known]
    votes = count_votes([answers[i] for i in known], right, reward.graders, reward.deadline_s)
    num = len(groups[0].completions)
    shares = [avg_at_k(num, sum(flags)) for flags in right]
    some_right = [pass_at_k(num, sum(flags), num) for flags in right]
    texts = [text for problem in answers for text in problem]
    return {
        f"avg@{num}": _mean(shares),
        f"avg@{num}_interval": list(bootstrap_interval(shares)),
        f"pass@{num}": _mean(some_right),  # also where it is no power of two
        f"pass@{num}_interval": list(bootstrap_interval(some_right)),
        **majority_figures(votes, num),
        "no_answer": sum(text is None for text in texts) / len(texts),
        "problems_not_graded": len(groups) - len(known),
    }


def majority_figures(votes: list[Votes], num: int) -> dict:
    """maj@k for k = 1, 2, 4 .. and `num`, its interval over problems, and the share of problems that are tied."""
    figures = {}
    for k in sorted({*powers_of_two(num), num}):
        pairs = [maj_at_k(problem, k) for problem in votes]
        figures[f"maj@{k}"] = _mean([won for won, _ in pairs])
        figures[f"maj@{k}_interval"] = list(bootstrap_interval([won for won, _ in pairs]))
        figures[f"maj@{k}_tied"] = _mean([tied for _, tied in pairs])
    return figures


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def with_intervals(groups: list[Group], success_threshold: float) -> dict:
    """The figures of a diversity.jsonl line, and `pass@k_interval`: [low, high], 95 %, over problems."""
    figures = measure(groups, success_threshold=success_threshold)
    figures["entropy_estimator"] = entropy_estimator(groups)
    firsts = [[sample[0] for sample in group.rewards if sample[0] == sample[0]] for group in groups]  # without nan
    counts = [(len(rewards), sum(reward >= success_threshold for reward in rewards)) for rewards in firsts]
    for k in powers_of_two(max(total for total, _ in counts)):
        values = [pass_at_k(total, right, k) for total, right in counts if total >= k]
        figures[f"pass@{k}_interval"] = list(bootstrap_interval(values))
    return figures


def collected(tasks: list[Task], figures: dict[str, dict], args: Any) -> dict:
    """evaluation.json: `models` holds the figures on the prompts, or their mean over benchmarks, one vote each."""
    by_benchmark = {
        task.name: {"models": figures[task.name], "num_prompts": len(task.rows), "source": task.source}
        for task in tasks
        if task.source is not None
    }
    models = mean_over(list(figures.values())) if by_benchmark else figures[PROMPTS]
    return {
        "models": models,
        **({"benchmarks": by_benchmark} if by_benchmark else {}),
        "num_prompts": sum(len(task.rows) for task in tasks),
        "num_samples": args.samples,
        **{key: getattr(args, key) for key in ("temperature", "max_new_tokens", "seed", "success_threshold")},
        "versions": {**package_versions(), **_grader_versions()},
    }


def _grader_versions() -> dict[str, str]:
    """Of the packages that decide a verdict or a sample, where they are installed."""
    found = {item.metadata["Name"]: item.version for item in importlib.metadata.distributions()}
    return {name: found[name] for name in ("math-verify", "latex2sympy2_extended", "vllm") if name in found}


def mean_over(figures: list[dict[str, dict]]) -> dict[str, dict]:
    """For each model the mean of each figure that every benchmark has as a number; no interval."""
    means = {}
    for name in figures[0]:
        rows = [by_model[name] for by_model in figures]
        numbers = [key for key, value in rows[0].items() if isinstance(value, int | float)]
        means[name] = {key: _mean([row[key] for row in rows]) for key in numbers if all(key in row for row in rows)}
    return means


def summaries(result: dict) -> list[str]:
    """A line a model, or a line a model and benchmark."""
    if "benchmarks" not in result:
        return [summary(name, figures) for name, figures in result["models"].items()]
    return [
        summary(f"{name}, {benchmark}", figures)
        for benchmark, facts in result["benchmarks"].items()
        for name, figures in facts["models"].items()
    ]


def summary(name: str, figures: dict) -> str:
    keys = [key for key in figures if key.startswith(("avg@", "maj@")) and key.partition("@")[2].isdigit()]
    wanted = ("pass@1", *dict.fromkeys(["pass@8", *keys[:1], *keys[-1:]]), "entropy")
    parts = [f"{key} {figures[key]:.3f}" for key in wanted if key in figures]
    low, high = figures.get("pass@1_interval", (float("nan"), float("nan")))
    return f"{name}: {', '.join(parts)} (pass@1 between {low:.3f} and {high:.3f})"
