"""The report's chapters, in the order of the story: each says in one sentence what to see, and what is missing.

The figures before and after RL, the diversity of the model's own samples during SFT, the loss, the weights, readiness,
RL, samples side by side, the evidence. A chapter is a [`~report_parts.Section`]; report.py writes it as HTML and as
markdown.

Left out: the first chapter and the last two, each a file of its own (headline.py, samples.py,
evidence.py), and how panels are drawn (plots.py).
"""

import math
import re
from collections.abc import Sequence

from ..diversity.intervals import paired_interval
from .evidence import evidence
from .headline import headline
from .parts import Cell, Section, Table
from .plots import curves, diversity_panels, loss_panels, position_panels, rl_panels
from .runs import Arm, Run, mean, series, turning_point
from .samples import samples


METRICS = {"entropy": "entropy (nats)", "self_bleu": "self-BLEU", "pass@1": "pass@1"}

Shown = tuple[str, str]  # a figure, and its interval in brackets


def sections_of(arms: list[Arm]) -> list[Section]:
    k = _largest_k(arms)
    parts = (headline, _diversity, _loss, _positions, _readiness, _rl, samples, evidence)
    return [section for part in parts if (section := part(arms, k)) is not None]


def _largest_k(arms: list[Arm]) -> int:
    """The largest k of the first run that has a pass@k beyond 1; 8 when none has."""
    for run in (run for arm in arms for run in arm.runs):
        rows = [run.final, run.start, *run.diversity]
        found = [int(match[1]) for row in rows for key in row if (match := re.fullmatch(r"pass@(\d+)", key))]
        if max(found, default=1) > 1:
            return max(found)
    return 8


def _diversity(arms: list[Arm], k: int) -> Section:
    turning = turning_point(arms[0].runs[0])
    found = "Dotted line: this run's diversity turning point; where it is early, steps are on a square-root scale. "
    return Section(
        "diversity",
        "Diversity during SFT",
        _diversity_sentence(arms),
        gap=_gap(arms[0], "diversity", "diversity measurements"),
        first_table=_changes_table(arms[0].runs[0], k),
        panels=diversity_panels(arms, k, turning.step),
        legend=_legend(arms, "diversity", "entropy"),
        reading="Dot: the step that went to RL, in its run's colour. Several seeds: faint lines, bold mean. "
        + (found if turning.step is not None else f"No turning point in {arms[0].label}: {turning.reason}."),
    )


def _changes_table(run: Run, k: int) -> Table | None:
    """Of the run itself, in figures: base, what went to RL, last."""
    if len(run.diversity) < 2:
        return None
    head, lines = changes(run.diversity, run.selection.get("step"), k)
    rows = [[Cell(name), *(Cell(*shown) for shown in line)] for name, line in lines]
    caption = "In brackets: 95% intervals over prompts; those of a change are paired, each prompt with itself."
    return Table(["own samples", *head], rows, caption=caption) if rows else None


def _diversity_sentence(arms: list[Arm]) -> str:
    """How the entropy of the first arm that measured it moves; the curves do not need SFT to be over."""
    known = next((known for arm in arms if (known := _known(arm, "diversity", "entropy"))), [])
    if not known:
        return "No diversity was measured in these runs."
    name = next(arm.label for arm in arms if _known(arm, "diversity", "entropy"))
    peak = max(known, key=lambda pair: pair[1])
    return (
        f"The entropy of {name}'s own samples starts at {known[0][1]:.2f} nats per token, is highest at step "
        f"{peak[0]} ({peak[1]:.2f}) and ends at {known[-1][1]:.2f} (step {known[-1][0]}). Compare where each curve "
        "ends with where pass@1 goes: a better score with fewer different samples leaves RL less to choose from."
        + _monitoring_share(arms)
    )


def _monitoring_share(arms: list[Arm]) -> str:
    """What measuring cost, where the rows say so: the highest of the runs."""
    rows = [run.diversity[-1] for arm in arms for run in arm.runs if run.diversity]
    shares = [row["time_share"] for row in rows if isinstance(row.get("time_share"), int | float)]
    return f" Measuring took {max(shares):.1%} of the wall time of SFT at most." if shares else ""


def _known(arm: Arm, rows: str, key: str) -> list[tuple[int, float]]:
    """(step, value) where the mean over the arm's seeds is a number."""
    found = curves([arm], rows, key)
    return [(s, v) for s, v in zip(*found[0].mean, strict=True) if math.isfinite(v)] if found else []


def _loss(arms: list[Arm], k: int) -> Section:
    weights = [value for value in series(_rows(arms[0], "sft_log"), "weight_mean")[1] if math.isfinite(value)]
    see = "Plain nll is comparable between losses; the loss as trained is not."
    if weights and weights[-1] < 0.995:
        see += (
            f" The mean weight ends at {weights[-1]:.2f}, so the trained loss is smaller than nll by design: tokens "
            "that the model already predicts count less."
        )
    gap = _gap(arms[0], "sft_log", "the SFT log")
    reading = "Faint: logged values; bold: their running mean, or the mean over seeds."
    return Section(
        "loss",
        "Loss and weights",
        see,
        gap=gap,
        panels=loss_panels(arms),
        legend=_legend(arms, "sft_log", "loss"),
        reading=reading,
    )


def _positions(arms: list[Arm], k: int) -> Section:
    run = next((run for run in arms[0].runs if run.positions), None)
    panels = position_panels(run.positions, arms[0].colour) if run else []
    see = "Where in the completion the loss still has weight, and where it has stopped early."
    kept = [row for row in run.positions if any(w is not None for w in row["weight"])] if run else []
    if kept:
        known = [(p, w) for p, w in zip(kept[-1]["position"], kept[-1]["weight"], strict=True) if w is not None]
        plain = all(weight > 0.995 for _, weight in known)
        see = (
            "Every token weighs 1: this loss has no early stop."
            if plain
            else (
                f"At step {kept[-1]['step']} the mean weight is {known[0][1]:.2f} at position {known[0][0]} and "
                f"{known[-1][1]:.2f} at positions up to {known[-1][0]}: what still has weight is what is still learnt."
            )
        )
    gap = "" if panels else f"{arms[0].label} has no weights by position."
    reading = "The bolder the line, the later the step."
    return Section("positions", "Weights by position", see, gap=gap, panels=panels, reading=reading)


PROBED = {
    "entropy": "entropy",
    "pass@1": "pass@1",
    "signal": "groups with signal",
    "mixed_if_alike": "mixed if alike",
    "variance": "variance",
    "variance_if_alike": "variance if alike",
    "reward_std": "reward std",
    "truncated": "truncated",
    "eos_prob": "P(eos)",
}


def _readiness(arms: list[Arm], k: int) -> Section | None:
    """What aesl probe found; no chapter where nothing was probed."""
    probed = [(arm, entry) for arm in arms for entry in arm.runs[0].readiness]
    if not probed:
        return None
    rows = [_readiness_row(arm, entry) for arm, entry in probed]
    arm, first = probed[0]
    see = f"{arm.label}, {first.get('name', '?')}: {first.get('text', '?')}. {'; '.join(map(str, first['reasons']))}."
    caption = (
        "In brackets: 95% interval over prompts. Groups with signal are those whose rewards differ; variance is of "
        'right and wrong within a group; "if alike" is what is expected if every prompt were as hard as the mean.'
    )
    head = ["run", "checkpoint", "verdict", *PROBED.values()]
    return Section("readiness", "Readiness for RL", see, first_table=Table(head, rows, texts=3, caption=caption))


def _readiness_row(arm: Arm, entry: dict) -> list[Cell]:
    def cell(key: str) -> Cell:
        value, ends = entry["figures"].get(key), entry["intervals"].get(key)
        shown = ends is not None and None not in ends
        note = f"[{ends[0]:.2f}, {ends[1]:.2f}]" if shown else ""
        return Cell("–" if value is None else f"{value:.2f}", note)

    names = [Cell(arm.label, colour=arm.colour), Cell(str(entry.get("name", "?"))), Cell(str(entry.get("text", "?")))]
    return [*names, *map(cell, PROBED)]


def _rl(arms: list[Arm], k: int) -> Section:
    see = "Look at where each start leads, and at how much entropy RL has left to work with."
    known = [value for _, value in _known(arms[0], "grpo_log", "reward")]
    if len(known) > 1:
        tenth = max(1, len(known) // 10)
        first, last = mean(known[:tenth]), mean(known[-tenth:])
        see = f"{arms[0].label}'s reward goes from {first:.2f} to {last:.2f} (first and last tenth of the log). {see}"
    return Section(
        "rl",
        "Reinforcement learning",
        see,
        gap=_gap(arms[0], "grpo_log", "the RL log"),
        panels=rl_panels(arms),
        legend=_legend(arms, "grpo_log", "reward"),
        reading="Faint: logged values or seeds; bold: running mean or mean over seeds.",
    )


def _legend(arms: list[Arm], rows: str, key: str) -> list[dict]:
    """An entry for each arm with a curve; an arm that shares another's SFT run has only its dot."""
    entries = []
    some_live = any(not arm.recorded for arm in arms)
    for curve in curves(arms, rows, key):
        for arm in curve.arms:
            notes = ["recorded"] * arm.recorded + [f"{len(arm.runs)} seeds"] * (len(arm.runs) > 1)
            notes += [f"same curve as {curve.arms[0].label}"] * (arm is not curve.arms[0])
            look = "dot" if arm is not curve.arms[0] else "dashed" if arm.recorded and some_live else "solid"
            entries.append({"label": arm.label, "colour": arm.colour, "look": look, "note": ", ".join(notes)})
    return entries


def _rows(arm: Arm, name: str) -> list[dict]:
    return next((getattr(run, name) for run in arm.runs if getattr(run, name)), [])


def _gap(arm: Arm, rows: str, what: str) -> str:
    if _rows(arm, rows):
        return ""
    why = " (it starts RL from the base model)" if rows != "grpo_log" and not arm.runs[0].has_sft else ""
    return f"{arm.label} has no {what.removeprefix('the ')}{why}."


def changes(rows: Sequence[dict], selected: int | None, k: int) -> tuple[list[str], list[tuple[str, list[Shown]]]]:
    """Headings, and a line for each metric that was measured.

    Args:
        rows: of diversity.jsonl, in order.
        selected: the step that went to RL, None where none was selected or it was not measured.
        k: the largest of pass@k.
    """
    by_step = {row["step"]: row for row in rows}
    steps = list(dict.fromkeys(step for step in (min(by_step), selected, max(by_step)) if step in by_step))
    head = [f"step {steps[0]}"]
    for before, after in zip(steps, steps[1:], strict=False):
        head += [f"step {after}", f"change from {before}"]
    metrics = METRICS | {f"pass@{k}": f"pass@{k}"}
    known = {key: name for key, name in metrics.items() if all(by_step[step].get(key) is not None for step in steps)}
    return head, [(name, _line([by_step[step] for step in steps], key)) for key, name in known.items()]


def _line(rows: Sequence[dict], key: str) -> list[Shown]:
    line = [_figure(rows[0], key)]
    for before, after in zip(rows, rows[1:], strict=False):
        line += [_figure(after, key), _change(before, after, key)]
    return line


def _figure(row: dict, key: str) -> Shown:
    ends = (row.get("intervals") or {}).get(key)
    return f"{row[key]:.3f}", _brackets(ends) if ends and None not in ends else ""


def _change(before: dict, after: dict, key: str) -> Shown:
    """Of the figure itself; the interval is that of the mean over prompts, from which entropy, a mean over tokens, may
    differ a little."""
    sides = [(row.get("by_prompt") or {}).get(key) for row in (before, after)]
    text = f"{after[key] - before[key]:+.3f}"
    if None in sides or len(sides[0]) != len(sides[1]):
        return text, ""
    _, low, high = paired_interval(*sides)
    return text, _brackets((low, high), "+.3f")


def _brackets(ends: Sequence[float], form: str = ".3f") -> str:
    return f"[{ends[0]:{form}}, {ends[1]:{form}}]"
