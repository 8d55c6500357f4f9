"""The report's first words and its first chapter: figures before and after RL, and their comparability."""

import math
from dataclasses import replace

from .. import files
from ..diversity.coverage import lost_sentence
from ..diversity.readiness import READY
from ..diversity.turning_point import TURNED
from .parts import Cell, Section, Table, figure_cell, mean
from .plots import headline_panels
from .runs import Arm, Run, turning_point, values_of


SETTINGS = ("num_prompts", "num_samples", "temperature", "max_new_tokens")  # of an evaluation


def advice(arms: list[Arm]) -> str:
    """Say where RL should start, by a probe's verdict, else the selection, else the turning point.

    Of several seeds the first one has its sentence, and each other one its start.
    """
    arm, runs = arms[0], [run for run in arms[0].runs if run.has_sft]
    if not runs:
        return ""
    seed = [f"seed {runs[0].seed}"] if len(arm.runs) > 1 else []
    whose = ", ".join([*([arm.label] if len(arms) > 1 else []), *seed])
    others = []
    for run in runs[1:]:
        start, verdict = files.chosen(run.selection) or "no start yet", _probed(run).get("text")
        others.append(f"seed {run.seed} {start}" + (f" ({verdict})" if verdict else ""))
    rest = f" The other seeds: {'; '.join(others)}." if others else ""
    return (f"{whose}: " if whose else "") + _advice_of(runs[0]) + rest


def _probed(run: Run) -> dict:
    """Return the probe's entry of what was selected; {} where that was not probed."""
    if run.selected_step is not None:
        return next((each for each in run.readiness if each.get("step") == run.selected_step), {})
    mix = files.chosen(run.selection)
    return next((each for each in run.readiness if mix and each.get("candidate") == mix), {})


def _advice_of(run: Run) -> str:
    start, probed = files.chosen(run.selection), _probed(run)
    reason = f"{run.selection.get('rule') or ''}: {run.selection.get('reason') or 'as asked'}"
    if probed.get("verdict") == READY:
        return f"Start RL from {start}, which the probe finds ready: {'; '.join(probed['reasons'])}."
    if probed:
        return f"Do not start RL from {start}, which the probe finds {probed.get('text')}."
    if start:
        return f"Start RL from {start}, chosen by {reason.replace('_', ' ')}."
    if len(run.diversity) < 2:
        return "Nothing says yet where RL should start: SFT did not measure diversity (diversity_steps)."
    found = turning_point(run)
    if found.step is None:
        return f"No step stands out as the start of RL: {found.reason}; aesl probe judges checkpoints."
    return f"Start RL from step {found.step}: {found.reason}."


def story(arms: list[Arm]) -> str:
    """Say each arm's pass@1 after RL, the best first, what its start had lost, and what a reader may not conclude."""
    after = [(mean(values_of((run.final for run in arm.runs), "pass@1")), arm) for arm in arms]
    ranked = sorted((pair for pair in after if math.isfinite(pair[0])), key=lambda pair: -pair[0])
    lost = _lost(arms[0])
    if not ranked:
        return f"{arms[0].label} has not been evaluated after RL; this page shows the story so far.{lost}"
    named = [f"{arm.label}{' (recorded)' if arm.recorded else ''} {value:.2f}" for value, arm in ranked]
    single = [arm.label for _, arm in ranked if len(arm.runs) == 1]
    caution = f" One seed only: {', '.join(single)}; an interval covers the problems drawn, not the seed."
    return f"pass@1 after RL: {', '.join(named)}.{lost}" + (caution if single and len(ranked) > 1 else "")


def _lost(arm: Arm) -> str:
    """Say what coverage the arm's first run had lost at the start of RL; "" where nothing is sure."""
    run = arm.runs[0]
    row = run.chosen_row
    if not row.get("num_samples"):
        return ""
    lost = lost_sentence(row, row.get("intervals") or {}, row["num_samples"])
    return f" {arm.label}, {files.chosen(run.selection)}: {lost}." if lost else ""


def warnings(arms: list[Arm]) -> list[str]:
    """Name the differences that make the figures of two runs incomparable."""
    lines = []
    for key, unsaid in {**dict.fromkeys(SETTINGS), "dtype": "auto"}.items():  # an older evaluation names no dtype
        given = {arm.label: arm.runs[0].evaluation.get(key, unsaid) for arm in arms if arm.runs[0].evaluation}
        if len(set(map(str, given.values()))) > 1:
            values = ", ".join(f"{name} {value}" for name, value in given.items())
            lines.append(f"The runs were not evaluated alike: {key} is {values}.")
    guessed = [arm.label for arm in arms if arm.runs[0].start and not arm.runs[0].evaluated("start")]
    if guessed:
        names = ", ".join(guessed)
        lines.append(f"Start of RL as measured during SFT, on its own prompts, not by the evaluation: {names}.")
    return lines


def headline(arms: list[Arm], k: int) -> Section:
    unfinished = [arm.label for arm in arms if not values_of((run.final for run in arm.runs), "pass@1")]
    seeds = [replace(arm, runs=[run]) for arm in arms for run in arm.runs] if any(arm.runs[1:] for arm in arms) else []
    caption = "In brackets: 95% interval over problems. "
    if seeds:
        caption += "Several seeds: mean, smallest to largest. "
    evaluation = arms[0].runs[0].evaluation
    if all(evaluation.get(key) for key in SETTINGS):
        caption += (
            "Evaluated on {num_prompts} prompts with {num_samples} samples each, temperature {temperature}, at most "
            "{max_new_tokens} new tokens."
        ).format_map(evaluation)
    title, see = (
        "Before and after RL",
        "Look for the start that RL takes furthest, and whether it scored best before RL.",
    )
    if len(unfinished) == len(arms):
        title, see = "Before RL", "This is what RL would start from."
    tables = [("Benchmarks", _benchmark_table(arms), True)]
    is_measured = any(run.start or run.final for arm in arms for run in arm.runs)
    if is_measured:
        tables.append(("Each seed", _headline_table(seeds, k), False))
    else:
        title, see = "Evaluation", "These are the models that were evaluated."
    return Section(
        "headline",
        title,
        see,
        gap=f"No evaluation after RL yet: {', '.join(unfinished)}." if unfinished else "",
        first_table=_headline_table(arms, k, caption) if is_measured else None,
        panels=[panel for key in ("pass@1", f"pass@{k}") for panel in headline_panels(arms, key)],
        reading="Small dots: seeds. Whisker: a single run's 95% interval over its problems.",
        tables=[(name, table, is_open) for name, table, is_open in tables if table.rows],
    )


def _headline_table(arms: list[Arm], k: int, caption: str = "") -> Table:
    scores = {"pass@1": "pass@1", f"pass@{k}": f"pass@{k}"}
    after = scores if any(run.final for arm in arms for run in arm.runs) else {}
    before = scores | {"entropy": "entropy", "self_bleu": "self-BLEU", "groups_mixed": "mixed groups"}
    rows = []
    for arm in arms:
        many, seed = len(arm.runs) > 1, arm.runs[0].seed
        pill = "recorded" if arm.recorded else "these runs" if many else "this run"
        note = f"{len(arm.runs)} seeds" if many else f"seed {seed}" if seed else ""
        start = [_figure([run.start for run in arm.runs], key) for key in before]
        final = [_figure([run.final for run in arm.runs], key) for key in after]
        name = Cell(arm.label, note, pill, arm.colour)
        rows.append([name, _cold_start(arm.runs[0]), _selected(arm), *start, *final])
    head = ["run", "cold start", "to RL", *before.values(), *after.values()]
    groups = [("", 3), ("start of RL", len(before)), *([("after RL", len(after))] if after else [])]
    return Table(head, rows, texts=3, groups=groups, caption=caption)


def _cold_start(run: Run) -> Cell:
    if not run.has_sft:
        return Cell("none", "RL from the base model")
    steps = run.sft_log[-1]["step"] if run.sft_log else run.sft.get("max_steps")
    loss = run.sft.get("cold_start_loss", "SFT")
    name = "AESL" if loss == "aesl" else str(loss)
    scale = run.sft.get("t_scaling_found", run.sft.get("t_scaling")) if loss == "aesl" else None
    scaling = f"t_scaling {scale if isinstance(scale, str) else format(scale, '.3g')}" if scale else ""
    return Cell(f"{name}, {steps} steps" if steps else name, scaling)


def _selected(arm: Arm) -> Cell:
    starts = dict.fromkeys(filter(None, (files.chosen(run.selection) for run in arm.runs)))
    if not starts:
        return Cell("–", "" if arm.runs[0].has_sft else "no SFT")
    asked, applied = (arm.runs[0].selection.get(key) for key in ("rule", "applied"))
    rule = str(applied or asked or "")
    if asked and applied and asked != applied:
        verdict = turning_point(arm.runs[0]).evidence["verdict"]
        rule = f"{applied} (asked: {asked}" + (")" if verdict == TURNED else f"; {verdict})")
    steps = [start.removeprefix("step ") for start in starts]
    word = "" if any(map(files.is_mix, starts)) else "steps " if len(steps) > 1 else "step "
    return Cell(f"{word}{', '.join(steps)}", rule.replace("_", " "))


def _figure(rows: list[dict], key: str) -> Cell:
    """Return the mean over seeds with their range, or the one value with its interval."""
    found = [row for row in rows if row.get(key) is not None]
    values = values_of(found, key)
    if len(values) > 1:
        return Cell(f"{mean(values):.2f}", f"{min(values):.2f} to {max(values):.2f}")
    return figure_cell(found[0][key], found[0].get(f"{key}_interval")) if found else Cell("–")


def _benchmark_table(arms: list[Arm]) -> Table:
    """Return a row for each arm, benchmark and model."""
    rows = []
    for arm in arms:
        run = next((run for run in arm.runs if run.benchmarks), arm.runs[0])
        k = run.evaluation.get("num_samples")
        for name, facts in run.benchmarks.items():
            for model in (facts or {}).get("models") or {}:
                found = [run.evaluated(model, name) for run in arm.runs]
                keys = (f"avg@{k}", f"pass@{k}", f"maj@{k}", f"maj@{k}_tied", "no_answer")
                start = [Cell(arm.label, f"k = {k}", colour=arm.colour), Cell(name), Cell(model)]
                problems = Cell(str(facts.get("num_prompts", "–")))
                rows.append([*start, problems, *(_figure(found, key) for key in keys)])
    caption = (
        "k: samples of each problem. avg@k: share that are right; pass@k: at least one is, without bias; maj@k: the "
        "majority is, a tie counted as a fair draw; tied: share of problems with a tie. In brackets: 95% interval "
        "over problems. The figures above are means over benchmarks, each counting the same."
    )
    head = ["run", "benchmark", "model", "problems", "avg@k", "pass@k", "maj@k", "tied", "no answer"]
    return Table(head, rows, texts=3, caption=caption)
