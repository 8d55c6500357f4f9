"""The report's first words and its first chapter: the evaluation before and after RL, and what may not be compared.

Left out: the diagrams of the figures (plots.py).
"""

import math
from collections.abc import Callable

from .parts import Cell, Section, Table
from .plots import headline_panels
from .runs import Arm, Run, mean


def story(arms: list[Arm]) -> str:
    """pass@1 after RL of each arm, the best first, and what a reader may not conclude."""
    after = {id(arm): mean(arm.figures(lambda run: run.final, "pass@1")) for arm in arms}
    ranked = sorted((arm for arm in arms if math.isfinite(after[id(arm)])), key=lambda arm: -after[id(arm)])
    if not ranked:
        return f"{arms[0].label} has not been evaluated after RL; this page shows the story so far."
    named = [f"{arm.label}{' (recorded)' if arm.recorded else ''} {after[id(arm)]:.2f}" for arm in ranked]
    single = [arm.label for arm in ranked if len(arm.runs) == 1] if len(ranked) > 1 else []
    caution = (
        f" One seed only: {', '.join(single)}; an interval covers the problems drawn, not the seed." if single else ""
    )
    return f"pass@1 after RL: {', '.join(named)}.{caution}"


def warnings(arms: list[Arm]) -> list[str]:
    """Differences that make the figures of two runs incomparable."""
    lines = []
    for key in ("num_prompts", "num_samples", "temperature", "max_new_tokens"):
        given = {arm.label: arm.runs[0].evaluation.get(key) for arm in arms if arm.runs[0].evaluation}
        if len(set(map(str, given.values()))) > 1:
            values = ", ".join(f"{name} {value}" for name, value in given.items())
            lines.append(f"The runs were not evaluated alike: {key} is {values}.")
    guessed = [arm.label for arm in arms if arm.runs[0].start and not arm.runs[0].start_is_evaluated]
    if guessed:
        lines.append(
            f"Start of RL as measured during SFT, on its own prompts, not by the evaluation: {', '.join(guessed)}."
        )
    return lines


def headline(arms: list[Arm], k: int) -> Section:
    evaluated = [arm for arm in arms if arm.figures(lambda run: run.final, "pass@1")]
    unfinished = [arm.label for arm in arms if arm not in evaluated]
    seeds = sum(len(arm.runs) for arm in arms) > len(arms)
    caption = "In brackets: 95% interval over problems. " + "Several seeds: mean, smallest to largest. " * seeds
    return Section(
        "headline",
        "Before and after RL",
        "Look for the start that RL takes furthest, and whether it is the one that scored best before RL.",
        gap=f"No evaluation after RL yet: {', '.join(unfinished)}." if unfinished else "",
        first_table=_headline_table(arms, k, caption + _evaluation_note(arms[0].runs[0])),
        panels=[panel for key in ("pass@1", f"pass@{k}") for panel in headline_panels(arms, key)],
        reading="Small dots: seeds. Whisker: a single run's 95% interval over its problems.",
        tables=[
            *([("Benchmarks", _benchmark_table(arms), True)] if any(map(_benchmarks, arms)) else []),
            *([("Each seed", _headline_table(_one_by_one(arms), k, ""), False)] if seeds else []),
        ],
    )


def _benchmark_table(arms: list[Arm]) -> Table:
    """A line for each run, benchmark and model; k is the number of samples."""
    head = ["run", "benchmark", "model", "problems", "avg@k", "pass@k", "maj@k", "tied", "no answer"]
    rows = [
        _benchmark_row(arm, name, model)
        for arm in arms
        for name, facts in _benchmarks(arm).items()
        for model in facts.get("models", {})
    ]
    caption = (
        "k: samples of each problem. avg@k: share that are right; pass@k: at least one is, without bias; maj@k: the "
        "majority is, a tie counted as a fair draw; tied: share of problems with a tie. In brackets: 95% interval "
        "over problems. The figures above are means over benchmarks, each counting the same."
    )
    return Table(head, rows, texts=3, caption=caption)


def _benchmarks(arm: Arm) -> dict[str, dict]:
    return next((run.evaluation["benchmarks"] for run in arm.runs if run.evaluation.get("benchmarks")), {})


def _benchmark_row(arm: Arm, name: str, model: str) -> list[Cell]:
    def of(run: Run) -> dict:
        return run.evaluation.get("benchmarks", {}).get(name, {}).get("models", {}).get(model) or {}

    num = next((run.evaluation.get("num_samples") for run in arm.runs if of(run)), None)
    problems = _benchmarks(arm)[name].get("num_prompts", "–")
    keys = (f"avg@{num}", f"pass@{num}", f"maj@{num}", f"maj@{num}_tied", "no_answer")
    figures = [_figure(arm, of, key) for key in keys]
    return [Cell(arm.label, f"k = {num}", "", arm.colour), Cell(name), Cell(model), Cell(str(problems)), *figures]


def _headline_table(arms: list[Arm], k: int, caption: str) -> Table:
    start = ["pass@1", f"pass@{k}", "entropy", "self-BLEU", "mixed groups"]
    head = ["run", "cold start", "to RL", *start, "pass@1", f"pass@{k}"]
    rows = [_headline_row(arm, k) for arm in arms]
    return Table(head, rows, texts=3, groups=[("", 3), ("start of RL", 5), ("after RL", 2)], caption=caption)


def _one_by_one(arms: list[Arm]) -> list[Arm]:
    return [Arm(arm.name, arm.recorded, arm.colour, [run]) for arm in arms for run in arm.runs]


def _headline_row(arm: Arm, k: int) -> list[Cell]:
    run = arm.runs[0]
    start = [
        _figure(arm, lambda r: r.start, key) for key in ("pass@1", f"pass@{k}", "entropy", "self_bleu", "groups_mixed")
    ]
    final = [_figure(arm, lambda r: r.final, key) for key in ("pass@1", f"pass@{k}")]
    seeds = f"{len(arm.runs)} seeds" if len(arm.runs) > 1 else f"seed {run.seed}" if run.seed else ""
    pill = "recorded" if arm.recorded else "this run" if len(arm.runs) == 1 else "these runs"
    return [Cell(arm.label, seeds, pill, arm.colour), _cold_start(run), _selected(arm), *start, *final]


def _cold_start(run: Run) -> Cell:
    if not run.has_sft:
        return Cell("none", "RL from the base model")
    steps = run.sft_log[-1]["step"] if run.sft_log else run.sft.get("max_steps")
    loss = run.sft.get("cold_start_loss", "SFT")
    length = f", {steps} steps" if steps else ""
    scaling = f"t_scaling {run.sft['t_scaling']:g}" if loss == "aesl" and run.sft.get("t_scaling") else ""
    return Cell({"aesl": "AESL"}.get(loss, str(loss)) + length, scaling)


def _selected(arm: Arm) -> Cell:
    steps = [run.selection["step"] for run in arm.runs if run.selection.get("step") is not None]
    if not steps:
        return Cell("–", "" if arm.runs[0].has_sft else "no SFT")
    asked, applied = (arm.runs[0].selection.get(key) for key in ("rule", "applied"))
    rule = f"{applied} (asked: {asked})" if asked and applied and asked != applied else str(applied or asked or "")
    name = "step " if len(set(steps)) == 1 else "steps "
    return Cell(name + ", ".join(map(str, dict.fromkeys(steps))), rule.replace("_", " "))


def _figure(arm: Arm, of: Callable[[Run], dict], key: str) -> Cell:
    """The mean over seeds with their range, or the one value with its interval."""
    values = arm.figures(of, key)
    if not values:
        return Cell("–")
    if len(values) > 1:
        return Cell(f"{mean(values):.2f}", f"{min(values):.2f} to {max(values):.2f}")
    ends = next((of(run).get(f"{key}_interval") for run in arm.runs if of(run).get(key) is not None), None)
    shown = bool(ends) and None not in ends
    return Cell(f"{values[0]:.2f}", f"[{ends[0]:.2f}, {ends[1]:.2f}]" if shown else "")


def _evaluation_note(run: Run) -> str:
    given = {key: run.evaluation.get(key) for key in ("num_prompts", "num_samples", "temperature", "max_new_tokens")}
    if not all(given.values()):
        return ""
    return (
        f"Evaluated on {given['num_prompts']} prompts with {given['num_samples']} samples each, temperature "
        f"{given['temperature']}, at most {given['max_new_tokens']} new tokens."
    )
