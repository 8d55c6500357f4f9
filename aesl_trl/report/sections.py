"""The report's chapters, in the order of the story. Each says what to look at, and names what is missing."""

import math
import re
from collections.abc import Sequence
from itertools import pairwise

from ..diversity.coverage import GAINED, LOST
from ..diversity.intervals import paired_interval
from .evidence import evidence
from .headline import headline
from .parts import Cell, Section, Table, figure_cell, mean
from .plots import coloured, curve_panels, curves, outcome_panels, position_panels
from .runs import Arm, series, turning_point
from .samples import samples


STOPPED = 0.05  # mean weight below which hardly anything is learnt


def sections_of(arms: list[Arm]) -> list[Section]:
    arms, k = coloured(arms), _largest_k(arms)
    start = [headline(arms, k), _diversity(arms, k), _loss(arms), _positions(arms[0])]
    every = [*start, *_readiness(arms), _rl(arms), samples(arms[0]), evidence(arms)]
    return [section for section in every if not section.is_empty]  # the last one names what is missing


def _largest_k(arms: list[Arm]) -> int:
    """Return the largest k of the first run that has a pass@k beyond 1; 8 when none has."""
    for run in (run for arm in arms for run in arm.runs):
        keys = {key for row in (run.final, run.start, *run.diversity) for key in row}
        largest = max((int(match[1]) for key in keys if (match := re.fullmatch(r"pass@(\d+)", key))), default=1)
        if largest > 1:
            return largest
    return 8


def _diversity(arms: list[Arm], k: int) -> Section:
    run, see = arms[0].runs[0], "No diversity was measured in these runs."
    for arm in reversed(arms):  # the first arm that measured is described; its curve does not need SFT to be over
        if known := _known(arm, "diversity", "entropy"):
            peak = max(known, key=lambda pair: pair[1])
            see = (
                f"The entropy of {arm.label}'s own samples starts at {known[0][1]:.2f} nats per token, is highest at "
                f"step {peak[0]} ({peak[1]:.2f}) and ends at {known[-1][1]:.2f} (step {known[-1][0]}). Compare where "
                "each curve ends with where pass@1 goes: a better score with fewer different samples leaves RL less "
                "to choose from."
            )
    last = [run.diversity[-1] for arm in arms for run in arm.runs if run.diversity]
    if shares := [row["time_share"] for row in last if row.get("time_share") is not None]:
        see += f" Measuring took {max(shares):.1%} of the wall time of SFT at most."
    turning = turning_point(run)
    found = "Dotted line: this run's diversity turning point; where it is early, steps are on a square-root scale. "
    if turning.step is None:
        found = f"No turning point in {arms[0].label}: {turning.reason}."
    table = changes(run.diversity, run.selected_step, k) if len(run.diversity) > 1 else None
    return Section(
        "diversity",
        "Diversity during SFT",
        see,
        gap=_gap(arms[0], "diversity", "diversity measurements"),
        first_table=table if table and table.rows else None,
        panels=curve_panels(arms, "diversity", "SFT step", turning.step, k) + outcome_panels(arms, turning.step),
        legend=_legend(arms, "diversity", "entropy"),
        reading=f"Dot: the step that went to RL, in its run's colour. Several seeds: faint lines, bold mean. {found}",
    )


def changes(rows: Sequence[dict], selected: int | None, k: int) -> Table:
    """Tabulate the figures of the first, the selected and the last step, and the change from each to the next."""
    by_step = {row["step"]: row for row in rows}
    steps = [step for step in dict.fromkeys([min(by_step), selected, max(by_step)]) if step in by_step]
    head = ["own samples", f"step {steps[0]}"]
    for before, after in pairwise(steps):
        head += [f"step {after}", f"change from {before}"]
    names = {"entropy": "entropy (nats)", "self_bleu": "self-BLEU", "pass@1": "pass@1", f"pass@{k}": f"pass@{k}"}
    names |= {LOST: "coverage lost", GAINED: "coverage gained"}
    shown, lines = [by_step[step] for step in steps], []
    if steps[0] == 0 and len(steps) > 1:
        shown[0] = {LOST: 0.0, GAINED: 0.0} | shown[0]  # step 0 is what the others are compared with
    for key, name in names.items():
        if all(row.get(key) is not None for row in shown):
            figures = [figure_cell(row[key], (row.get("intervals") or {}).get(key), 3) for row in shown]
            line = [Cell(name), figures[0]]
            for (before, after), cell in zip(pairwise(shown), figures[1:], strict=True):
                line += [cell, _change(before, after, key)]
            lines.append(line)
    caption = "In brackets: 95% intervals over prompts; those of a change are paired, each prompt with itself."
    if any(GAINED in row for row in shown[1:]):
        caption += " Coverage is against step 0, beyond what two samplings of step 0 differ by."
    return Table(head, lines, caption=caption)


def _change(before: dict, after: dict, key: str) -> Cell:
    """Return a figure's change, with the paired interval where the rows hold the same prompts.

    The interval is of the mean over prompts. Entropy is a mean over tokens and may differ from it a little.
    """
    text = f"{after[key] - before[key]:+.3f}"
    sides = [(row.get("by_prompt") or {}).get(key) for row in (before, after)]
    if None in sides or len(sides[0]) != len(sides[1]):
        return Cell(text)
    _, low, high = paired_interval(*sides)
    return Cell(text, f"[{low:+.3f}, {high:+.3f}]")


def _loss(arms: list[Arm]) -> Section:
    see = "Look at where the loss stops falling."
    if any(map(math.isfinite, series(_rows(arms[0], "sft_log"), "nll")[1])):
        see += " Plain nll is comparable between losses; the loss as trained is not."
    weights, effective = (
        [value for value in series(_rows(arms[0], "sft_log"), key)[1] if math.isfinite(value)]
        for key in ("weight_mean", "weight_effective")
    )
    if weights and weights[-1] < 0.995:
        see += (
            f" The mean weight ends at {weights[-1]:.2f}, so the trained loss is smaller than nll by design: tokens "
            "that the model already predicts count less."
        )
    if effective and arms[0].runs[0].sft.get("cold_start_loss") != "nll":
        see += (
            " The effective weight, loss / nll, counts each token by its nll; at 1 the step is that of plain nll. "
            f"It is {effective[0]:.2f} at first and {effective[-1]:.2f} at the end."
        )
    return Section(
        "loss",
        "Loss and weights",
        see,
        gap=_gap(arms[0], "sft_log", "SFT log"),
        panels=curve_panels(arms, "sft_log", "SFT step"),
        legend=_legend(arms, "sft_log", "loss"),
        reading="Faint: logged values; bold: their running mean, or the mean over seeds.",
    )


def _positions(arm: Arm) -> Section:
    rows = _rows(arm, "positions")
    see = "Where in the completion the loss still has weight, and where it has stopped early."
    if weighted := [row for row in rows if any(weight is not None for weight in row["weight"])]:
        last = weighted[-1]
        known = [(p, weight) for p, weight in zip(last["position"], last["weight"], strict=True) if weight is not None]
        place, most = max(known, key=lambda pair: pair[1])
        see = (
            f"At step {last['step']} the mean weight is {known[0][1]:.2f} at position {known[0][0]} and "
            f"{known[-1][1]:.2f} at positions up to {known[-1][0]}. "
        )
        if most < STOPPED:
            see += f"The largest is {most:.3f}: the loss has stopped nearly everywhere, and little is still learnt."
        else:
            see += f"It is largest at positions up to {place}, where the model still learns most."
        if all(weight > 0.995 for _, weight in known):
            see = "Every token weighs 1: this loss has no early stop."
    panels = position_panels(rows, arm.colour)
    gap = "" if panels else f"{arm.label} has no weights by position."
    reading = "The bolder the line, the later the step."
    return Section("positions", "Weights by position", see, gap=gap, panels=panels, reading=reading)


def _readiness(arms: list[Arm]) -> list[Section]:
    """Return the chapter on what aesl probe found; none where nothing was probed."""
    probed = [(arm, entry) for arm in arms for entry in arm.runs[0].readiness]
    if not probed:
        return []
    more = ["mixed_if_alike", "variance", "variance_if_alike", "reward_std"]
    more += [LOST, GAINED] if any(LOST in entry["figures"] for _, entry in probed) else []
    caption = "In brackets: 95% interval over prompts. Rewards differ in the groups that GRPO learns from."
    first = _readiness_table(probed, ["pass@1", "signal", "entropy", "truncated", "eos_prob"], caption)
    caption = (
        'Variance is of right and wrong within a group; "if alike" is what to expect if every prompt were as hard as '
        "the mean."
    )
    caption += " Coverage is against the probe's reference." if LOST in more else ""
    arm, entry = probed[0]
    see = f"{arm.label}, {entry.get('name', '?')}: {entry.get('text', '?')}. {'; '.join(entry['reasons'])}."
    tables = [("More figures of the probe", _readiness_table(probed, more, caption, verdict=False), False)]
    return [Section("readiness", "Readiness for RL", see, first_table=first, tables=tables)]


def _readiness_table(probed: list, keys: list[str], caption: str, verdict: bool = True) -> Table:
    """Return a row for each checkpoint that was probed."""
    titles, rows = {"signal": "rewards differ", "eos_prob": "P(eos)"}, []
    for arm, entry in probed:
        name, text = (str(entry.get(key, "?")) for key in ("name", "text"))
        cells = [figure_cell(entry["figures"].get(key), entry["intervals"].get(key)) for key in keys]
        rows.append([Cell(arm.label, colour=arm.colour), Cell(name), *([Cell(text)] if verdict else []), *cells])
    head = ["run", "checkpoint", *(["verdict"] if verdict else [])]
    head += [titles.get(key, key.replace("_", " ")) for key in keys]
    return Table(head, rows, texts=3 if verdict else 2, caption=caption)


def _rl(arms: list[Arm]) -> Section:
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
        gap=_gap(arms[0], "grpo_log", "RL log"),
        panels=curve_panels(arms, "grpo_log", "RL step"),
        legend=_legend(arms, "grpo_log", "reward"),
        reading="Faint: logged values or seeds; bold: running mean or mean over seeds.",
    )


def _known(arm: Arm, rows: str, key: str) -> list[tuple[int, float]]:
    """Return (step, value) where the mean over the arm's seeds is a number."""
    found = curves([arm], rows, key)
    return [(s, v) for s, v in zip(*found[0].mean, strict=True) if math.isfinite(v)] if found else []


def _rows(arm: Arm, name: str) -> list[dict]:
    """Return the rows called `name` of the arm's first run that has them."""
    return next((rows for run in arm.runs if (rows := getattr(run, name))), [])


def _gap(arm: Arm, rows: str, name: str) -> str:
    why = " (it starts RL from the base model)" if rows != "grpo_log" and not arm.runs[0].has_sft else ""
    return "" if _rows(arm, rows) else f"{arm.label} has no {name}{why}."


def _legend(arms: list[Arm], rows: str, key: str) -> list[dict]:
    """Return an entry for each arm with a curve; an arm that shares another's SFT run has only its dot."""
    entries, some_live = [], not all(arm.recorded for arm in arms)
    for curve in curves(arms, rows, key):
        for arm in curve.arms:
            shares = arm is not curve.arms[0]
            seeds, same = f"{len(arm.runs)} seeds", f"same curve as {curve.arms[0].label}"
            notes = {"recorded": arm.recorded, seeds: len(arm.runs) > 1, same: shares}
            note = ", ".join(text for text, holds in notes.items() if holds)
            look = "dot" if shares else "dashed" if arm.recorded and some_live else "solid"
            entries.append({"label": arm.label, "colour": arm.colour, "look": look, "note": note})
    return entries
