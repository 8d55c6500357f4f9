"""The report's plots: arms -> panels, drawn once as inline SVG that follows the page's theme and once as PNG.

A panel is a small drawing of one thing, so that it stays legible on a phone; a PNG holds all panels of a section.
Colours are written as the light theme's and replaced by the page's variables in the SVG.
"""

import math
from dataclasses import dataclass, field

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from .parts import LIGHT, Panel, Row, name_ends, ring_dot_whisker, shorten, y_axis
from .runs import GROUP_KEYS, RL_KEYS, Arm, mean, series


@dataclass
class Curve:
    """One figure over steps, a line for each seed.

    Arms whose seeds hold the same numbers share it: one SFT run, two selections.
    """

    arms: list[Arm]
    seeds: list[tuple[list[int], list[float]]]
    marks: list[tuple[float, str]] = field(default_factory=list)  # (selected step, colour)

    @property
    def label(self) -> str:
        """The words that all its arms begin with, else all their names."""
        names = [arm.label.split() for arm in self.arms]
        shared = [words[0] for words in zip(*names, strict=False) if len(set(words)) == 1]
        return " ".join(shared) if shared else ", ".join(arm.label for arm in self.arms)

    @property
    def mean(self) -> tuple[list[int], list[float]]:
        """Mean over the seeds at the steps that all of them have; the first seed where they share none."""
        by_step = [dict(zip(*seed, strict=True)) for seed in self.seeds]
        steps = sorted(set.intersection(*map(set, by_step)))
        if not steps:
            return self.seeds[0]
        return steps, [float(np.mean([seed[step] for seed in by_step])) for step in steps]


def curves(arms: list[Arm], rows: str, key: str) -> list[Curve]:
    """The figure `key` of each arm that has it, read from the rows named `rows` of its runs."""
    found: list[Curve] = []
    for arm in arms:
        seeds = [series(getattr(run, rows), key) for run in arm.runs]
        seeds = [(steps, values) for steps, values in seeds if np.isfinite(values).any()]
        same = next((curve for curve in found if repr(curve.seeds) == repr(seeds)), None)
        if same:
            same.arms.append(arm)
        elif seeds:
            found.append(Curve([arm], seeds))
    return found


def headline_panels(arms: list[Arm], key: str) -> list[Panel]:
    """`key` at the start of RL and after it, an arm a line."""
    lines = [(arm, arm.figures(lambda run: run.start, key), arm.figures(lambda run: run.final, key)) for arm in arms]
    lines = [line for line in lines if line[1] or line[2]]
    if not any(after for _, _, after in lines):
        return []
    return [
        Panel(
            f"{key}: start of RL (ring) and after RL (dot)",
            lambda ax: _before_and_after(ax, lines, key),
            labelled=False,
        )
    ]


def diversity_panels(arms: list[Arm], k: int, turning_point: int | None) -> list[Panel]:
    titles = {
        "entropy": "Entropy of own samples (nats per token)",
        "self_bleu": "Self-BLEU of own samples (lower: more diverse)",
        "distinct_2": "Distinct 2-grams (share)",
        "pass@1": "pass@1",
        f"pass@{k}": f"pass@{k}",
    }
    panels = [
        panel
        for key, title in dict(titles).items()
        for panel in _curve_panels(arms, "diversity", key, title, "SFT step", turning_point, marked=True)
    ]
    return panels + _group_panels(arms, turning_point)


def loss_panels(arms: list[Arm]) -> list[Panel]:
    titles = {
        "nll": "Plain nll (nats per token)",
        "loss": "Loss as trained (weighted for AESL)",
        "eval_nll": "Held-out nll (nats per token)",
        "weight_mean": "Mean weight",
        "weight_low_share": "Share of weights under 0.1",
        "temperature_mean": "Mean temperature",
        "weight_eos": "Weight at the end-of-sequence token",
    }
    return [p for key, title in titles.items() for p in _curve_panels(arms, "sft_log", key, title, "SFT step")]


def rl_panels(arms: list[Arm]) -> list[Panel]:
    titles = (
        "Reward",
        "Standard deviation of the reward in a group",
        "Share of groups with equal rewards (no signal)",
        "Entropy (nats per token)",
        "Share of completions cut at the length limit",
    )
    pairs = zip(RL_KEYS, titles, strict=True)
    return [p for key, title in pairs for p in _curve_panels(arms, "grpo_log", key, title, "RL step")]


def position_panels(rows: list[dict], colour: str) -> list[Panel]:
    """Mean weight and temperature by position in the completion, at an early, a middle and a late step."""
    panels = []
    for key, title in (("weight", "Mean weight by position"), ("temperature", "Mean temperature by position")):
        kept = [row for row in rows if any(value is not None for value in row[key])]
        picked = [kept[i] for i in sorted({0, len(kept) // 2, len(kept) - 1})] if kept else []
        if picked:
            panels.append(Panel(title, lambda ax, picked=picked, key=key: _position_lines(ax, picked, key, colour)))
    return panels


def _curve_panels(arms, rows, key, title, xlabel, turning_point=None, marked=False) -> list[Panel]:
    """One panel of all arms' curves, or none when no run has the figure."""
    found = curves(arms, rows, key)
    if marked:
        for curve in found:
            steps = [(arm, arm.runs[0].selection.get("step")) for arm in curve.arms]
            curve.marks = [(step, arm.colour) for arm, step in steps if isinstance(step, int)]
    see = "; ".join(f"{curve.label} ends at {curve.mean[1][-1]:.3g}" for curve in found if curve.mean[1])
    panel = Panel(title, lambda ax: _curves(ax, found, xlabel, turning_point), see=see)
    return [panel] if found else []


def _curves(ax: Axes, found: list[Curve], xlabel: str, turning_point: int | None) -> None:
    some_live = any(not arm.recorded for curve in found for arm in curve.arms)
    ends = [_curve(ax, curve, some_live) for curve in found]
    ax.set_xlabel(xlabel, loc="left")
    last = max(steps[-1] for curve in found for steps, _ in curve.seeds)
    _step_axis(ax, last, turning_point)
    y_axis(ax)
    if turning_point is not None:
        _turning_point(ax, turning_point)
    name_ends(ax, [end for end in ends if end])


def _curve(ax: Axes, curve: Curve, some_live: bool) -> tuple | None:
    """Seeds (or noisy steps) faintly, their mean (or running mean) boldly; returns the end: (x, y, name, colour)."""
    colour = LIGHT[curve.arms[0].colour]
    recorded = all(arm.recorded for arm in curve.arms)
    steps, values = curve.mean
    smooth, behind = running_mean(values), recorded and some_live
    if len(curve.seeds) > 1:
        for seed in curve.seeds:
            ax.plot(seed[0], running_mean(seed[1]), color=colour, linewidth=0.8, alpha=0.3, zorder=2)
    elif not behind:
        ax.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3, zorder=2)
    look = (
        {"linewidth": 1.6, "linestyle": (0, (3.2, 1.4)), "zorder": 2.5} if behind else {"linewidth": 2.2, "zorder": 3}
    )
    ax.plot(steps, smooth, color=colour, **look)
    known = [(step, value) for step, value in zip(steps, smooth, strict=True) if math.isfinite(value)]
    for step, mark in curve.marks:
        y = np.interp(step, *zip(*known, strict=True)) if known else math.nan
        ax.plot(
            [step], [y], "o", color=LIGHT[mark], markersize=7, markeredgecolor=LIGHT["paper"], zorder=5, clip_on=False
        )
    return (*known[-1], curve.label, colour) if known else None


def running_mean(values: list[float]) -> list[float]:
    """A centred mean over about a fifteenth of the values; `values` itself when there are few."""
    half = len(values) // 30
    if half < 1:
        return values
    windows = [np.array(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
    return [float(w[np.isfinite(w)].mean()) if np.isfinite(w).any() else math.nan for w in windows]


def _step_axis(ax: Axes, last: float, turning_point: int | None) -> None:
    """Square-root steps where the turning point would be squeezed against the left edge."""
    if turning_point is not None and turning_point < last / 5:
        ax.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
        early = 10 ** math.floor(math.log10(max(turning_point, 1)))
        early *= next(factor for factor in (5, 2, 1) if factor * early <= max(turning_point, 1))
        ax.set_xticks(sorted({0, early, *(round(last * share) for share in (0.25, 1))}))
        ax.set_xticks([], minor=True)
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    else:
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    ax.set_xlim(0, max(last, 1))


def _turning_point(ax: Axes, step: int) -> None:
    ax.axvline(step, color=LIGHT["muted"], linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
    place = {"textcoords": "offset points", "xytext": (4, 0), "xycoords": ax.get_xaxis_transform()}
    ax.annotate("turning point", (step, 1.0), va="top", ha="left", size=8.5, color=LIGHT["muted"], **place)


def _before_and_after(ax: Axes, lines: list[tuple], key: str) -> None:
    """Draw a row for each arm; only the interval of a single run is shown, not one over seeds."""
    rows = []
    for arm, before, after in lines:
        interval = arm.runs[0].final.get(f"{key}_interval") if len(arm.runs) == 1 else None
        name = shorten(arm.label) + (" (recorded)" if arm.recorded else "")
        text = " → ".join(f"{mean(values):.2f}" if values else "?" for values in (before, after))
        rows.append(Row(name, LIGHT[arm.colour], before, after, interval, text))
    ring_dot_whisker(ax, rows)
    ax.set_xlim(-0.02, 1.02)
    ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])


def _group_panels(arms: list[Arm], turning_point: int | None) -> list[Panel]:
    """For each SFT run: how many prompts gave all wrong, mixed, all right samples, stacked."""
    panels = []
    for mixed in curves(arms, "diversity", "groups_mixed"):
        shares = [curves(mixed.arms[:1], "diversity", key) for key in GROUP_KEYS]
        if all(shares):
            means = [share[0].mean for share in shares]
            title = f"Prompts by outcome: {shorten(mixed.label)}"
            see = f"mixed share ends at {means[1][1][-1]:.2f}"
            panels.append(
                Panel(title, lambda ax, m=mixed, s=means: _stack(ax, m, s, turning_point), labelled=False, see=see)
            )
    return panels


def _stack(ax: Axes, curve: Curve, shares: list[tuple], turning_point: int | None) -> None:
    """Shares of prompts stacked to 1, each named inside its area where there is room."""
    steps = shares[0][0]
    bottom = np.zeros(len(steps))
    _step_axis(ax, steps[-1], turning_point)
    ends = ax.transScale.transform([(0, 0), (steps[-1], 0)])[:, 0]
    across = np.linspace(*ends, 101)  # even on paper, whatever the axis' scale
    places = ax.transScale.inverted().transform(np.column_stack([across, np.zeros(101)]))[:, 0]
    colours = (LIGHT["wrong"], LIGHT[curve.arms[0].colour], LIGHT["right"])
    inks = (LIGHT["paper"], LIGHT["paper"], LIGHT["ink"])
    names = ("all wrong", "mixed: RL can learn", "all right")
    for (_, values), colour, ink, name in zip(shares, colours, inks, names, strict=True):
        top = bottom + np.nan_to_num(values)
        ax.fill_between(steps, bottom, top, color=colour, linewidth=0.6, edgecolor=LIGHT["paper"])
        low, high = np.interp(places, steps, bottom), np.interp(places, steps, top)
        half = len(name)  # about half the name, in hundredths of the axis
        room = {i: (high - low)[i - half : i + half + 1].min() for i in range(half, 101 - half)}
        place = max(room, key=room.get, default=None)
        if place is not None and room[place] > 0.075:
            middle = (low[place] + high[place]) / 2
            ax.text(places[place], middle, name, ha="center", va="center", color=ink, size=9.5)
        bottom = top
    ax.set_ylim(0, 1)
    ax.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
    ax.set_xlabel("SFT step", loc="left")


def _position_lines(ax: Axes, rows: list[dict], key: str, colour: str) -> None:
    """A line a step, the later the bolder; positions on a logarithmic axis, as their bins are."""
    ends = []
    for row, strength in zip(rows, (0.35, 0.65, 1.0)[-len(rows) :], strict=True):
        values = [math.nan if value is None else float(value) for value in row[key]]
        look = {
            "color": LIGHT[colour],
            "alpha": strength,
            "linewidth": 1 + 1.4 * strength,
            "marker": "o",
            "markersize": 3,
        }
        ax.plot(row["position"], values, **look)
        known = [(x, y) for x, y in zip(row["position"], values, strict=True) if math.isfinite(y)]
        ends.append((*known[-1], f"step {row['step']}", LIGHT[colour]))
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    ax.set_xlabel("position in the completion, up to", loc="left")
    y_axis(ax)
    name_ends(ax, ends)
