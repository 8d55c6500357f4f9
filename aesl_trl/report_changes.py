"""How a run's diversity changed between its first measurement, the selected one and the last, with intervals.

The measurements share their prompts, so that a change is the mean of each prompt's own change: its interval is
narrower than the two figures' intervals suggest. Rows without per-prompt values show the figures alone. Beside it, the
turning point of the run's own series.

Left out: the rule that finds a turning point (diversity/turning_point.py), the curves (report_plots.py).
"""

from collections.abc import Sequence

from .diversity.intervals import paired_interval
from .diversity.turning_point import Selection, find_turning_point
from .report_runs import Run, series


METRICS = {"entropy": "entropy (nats)", "self_bleu": "self-BLEU", "pass@1": "pass@1"}
Shown = tuple[str, str]  # a figure, and its interval in brackets


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


def turning_point(run: Run) -> Selection:
    """The diversity turning point of the run's own measurements, whatever rule then selected a checkpoint."""
    metric = "self_bleu" if run.selection.get("metric") == "self_bleu" else "entropy"
    steps, values = series(run.diversity, metric)
    patience = max(1, int(run.sft.get("diversity_patience") or 3))
    by_prompt = [row.get("by_prompt", {}).get(metric) for row in run.diversity if metric in row]
    mode = "min" if metric == "self_bleu" else "max"
    return find_turning_point(steps, values, mode=mode, patience=patience, by_prompt=by_prompt)
