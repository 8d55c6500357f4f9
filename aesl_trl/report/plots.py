"""The report's plots: arms -> panels. A panel is a small drawing of one thing, so that it stays legible on a phone."""

import math
import textwrap
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import takewhile

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ..diversity.coverage import GAINED, LOST
from .parts import LIGHT, UNLABELLED, Panel, Row, margins_of, mean, name_ends, ring_dot_whisker, shorten, y_axis
from .runs import Arm, series, values_of


# One colour for each method, whatever else is on the page; another method takes the first colour that is free.
METHOD_COLOURS = {"base": "base", "aesl_turning_point": "aesl", "aesl_last": "aesl", "nll_last": "nll"}
METHOD_COLOURS |= {"nll_turning_point": "stop", "nll_best_eval": "eval"}
FREE_COLOURS = ("other1", "other2", "eval", "stop", "nll", "aesl", "base")


def coloured(arms: list[Arm]) -> list[Arm]:
    """Return the arms with their colours; a run and its recorded seeds (one method, one name) share theirs."""
    given: dict[tuple[str, str], str] = {}
    methods = [arm.runs[0].method for arm in arms]
    for method, arm in sorted(zip(methods, arms, strict=True), key=lambda pair: pair[0] not in METHOD_COLOURS):
        wanted = (METHOD_COLOURS.get(method), *FREE_COLOURS)
        free = (colour for colour in wanted if colour and colour not in given.values())
        given.setdefault((method, arm.name), next(free, "base"))
    return [replace(arm, colour=given[method, arm.name]) for method, arm in zip(methods, arms, strict=True)]


def headline_panels(arms: list[Arm], key: str) -> list[Panel]:
    """Return the panel of `key` at the start of RL and after it, an arm a row; none before an arm has finished RL."""
    rows = []
    for arm in arms:
        before = values_of((run.start for run in arm.runs), key)
        after = values_of((run.final for run in arm.runs), key)
        if before or after:
            interval = arm.runs[0].final.get(f"{key}_interval") if len(arm.runs) == 1 else None  # not one over seeds
            lines = textwrap.wrap(shorten(arm.label, 34), 18) + (["(recorded)"] if arm.recorded else [])
            name = "\n".join(lines)
            text = " → ".join(f"{mean(values):.2f}" if values else "?" for values in (before, after))
            rows.append(Row(name, LIGHT[arm.colour], before, after, interval, text))

    def draw(ax: Axes) -> None:
        ring_dot_whisker(ax, rows)
        ax.set_xlim(-0.02, 1.02)
        ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])

    title = f"{key}: start of RL (ring) and after RL (dot)"
    shape = {"margins": margins_of(rows), "height": 1 + 0.42 * len(rows), "wide": True}
    panel = Panel(title, draw, note="→ further right is better", **shape)
    return [panel] if any(row.after for row in rows) else []


# Rows of a run -> the figures that are drawn, their titles and which direction is good; {k}: the largest k of pass@k
DIVERSE, BETTER, WORSE = "↑ higher is more diverse", "↑ higher is better", "↓ lower is better"
TITLES = {
    "diversity": {
        "entropy": ("Entropy of own samples (nats per token)", DIVERSE),
        "self_bleu": ("Self-BLEU of own samples", "↓ lower is more diverse"),
        "distinct_2": ("Distinct 2-grams (share)", DIVERSE),
        "pass@1": ("pass@1", BETTER),
        "pass@{k}": ("pass@{k}", BETTER),
        LOST: ("Coverage lost against step 0", WORSE),
        GAINED: ("Coverage gained against step 0", BETTER),
    },
    "sft_log": {
        "nll": ("Plain nll (nats per token)", "↓ lower fits the demonstrations better"),
        "loss": ("Loss as trained", "only runs of one loss compare"),
        "eval_nll": ("Held-out nll (nats per token)", WORSE),
        "weight_effective": ("Effective weight (loss / nll)", "1 is plain nll, 0 trains nothing"),
        "weight_mean": ("Mean weight", "1 is plain nll, 0 trains nothing"),
        "weight_low_share": ("Share of weights under 0.1", "↑ higher: more tokens have stopped"),
        "temperature_mean": ("Mean temperature", "the lower, the earlier a token stops"),
        "weight_eos": ("Weight at the end-of-sequence token", "0: the end is learnt"),
    },
    "grpo_log": {
        "reward": ("Reward", BETTER),
        "reward_std": ("Standard deviation of the reward in a group", "↑ higher: more to learn from"),
        "frac_reward_zero_std": ("Share of groups with equal rewards", "↓ lower: more to learn from"),
        "entropy": ("Entropy (nats per token)", "↑ higher: more is left to explore"),
        "completions/clipped_ratio": ("Share of completions cut at the length limit", WORSE),
    },
}


MAX_POINTS = 2000  # of a curve: a panel is some 500 pixels wide


@dataclass
class Curve:
    """A figure over steps, a line for each seed. Two arms share it where one SFT run served two selections."""

    arms: list[Arm]
    seeds: list[tuple[list[int], list[float]]]

    @property
    def label(self) -> str:
        """The words that the names of all its arms begin with, else all names."""
        names = zip(*(arm.label.split() for arm in self.arms), strict=False)
        shared = [words[0] for words in takewhile(lambda words: len(set(words)) == 1, names)]
        return " ".join(shared) if shared else ", ".join(arm.label for arm in self.arms)

    @cached_property
    def mean(self) -> tuple[list[int], list[float]]:
        """Mean over the seeds at the steps that all of them have; the first seed where they share no step."""
        if len(self.seeds) == 1:
            return self.seeds[0]
        by_step = [dict(zip(*seed, strict=True)) for seed in self.seeds]
        steps = sorted(set.intersection(*map(set, by_step)))
        if not steps:
            return self.seeds[0]
        return steps, [float(np.mean([seed[step] for seed in by_step])) for step in steps]


def curves(arms: list[Arm], rows: str, key: str) -> list[Curve]:
    """Return the figure `key` of each arm that has it, from its runs' rows that are called `rows`."""
    found: dict[tuple, Curve] = {}  # by its seeds' numbers, so that no arm is compared with every other
    for arm in arms:
        seeds = [series(getattr(run, rows), key) for run in arm.runs]
        seeds = [(steps, values) for steps, values in seeds if np.isfinite(values).any()]
        if seeds:
            found.setdefault(_numbers(seeds), Curve([], seeds)).arms.append(arm)
    return list(found.values())


def _numbers(seeds: list[tuple[list[int], list[float]]]) -> tuple:
    """Return the steps and values of an arm's seeds as a key: a gap (nan) is like a gap, and -0.0 is 0.0."""
    return tuple((tuple(steps), (np.array(values) + 0.0).tobytes()) for steps, values in seeds)


def curve_panels(arms: list[Arm], rows: str, xlabel: str, turning_point: int | None = None, k: int = 1) -> list[Panel]:
    """Return a panel of all arms' curves for each of the [`TITLES`] that some run has."""
    panels = []
    for key, (title, note) in TITLES[rows].items():
        if found := curves(arms, rows, key.format(k=k)):
            see = "; ".join(f"{curve.label} ends at {curve.mean[1][-1]:.3g}" for curve in found if curve.mean[1])

            def draw(ax: Axes, found: list[Curve] = found) -> None:
                some_live = any(not arm.recorded for curve in found for arm in curve.arms)
                ends = [_curve(ax, curve, some_live, marked=rows == "diversity") for curve in found]
                ax.set_xlabel(xlabel, loc="left")
                _step_axis(ax, max(steps[-1] for curve in found for steps, _ in curve.seeds), turning_point)
                y_axis(ax)
                if turning_point is not None:
                    ax.axvline(turning_point, color=LIGHT["muted"], linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
                    where = {"xycoords": ax.get_xaxis_transform(), "textcoords": "offset points", "xytext": (4, 0)}
                    look = {"color": LIGHT["muted"], "va": "bottom", "size": 9}
                    ax.annotate("turning point", (turning_point, 0.03), **where, **look)
                name_ends(ax, [end for end in ends if end])

            panels.append(Panel(title.format(k=k), draw, note=note, see=see))
    return panels


def _curve(ax: Axes, curve: Curve, some_live: bool, marked: bool) -> tuple | None:
    """Draw seeds or steps faintly, their mean boldly and a dot at the step that went to RL. Return the curve's end."""
    colour = LIGHT[curve.arms[0].colour]
    behind = some_live and all(arm.recorded for arm in curve.arms)
    steps, values = curve.mean
    smooth = running_mean(values)
    faint = {"color": colour, "linewidth": 0.8, "alpha": 0.3, "zorder": 2}
    if len(curve.seeds) > 1:
        for seed in curve.seeds:
            ax.plot(*thinned(seed[0], running_mean(seed[1])), **faint)
    elif not behind:
        ax.plot(*thinned(steps, values), **faint)
    dashed = {"linewidth": 1.6, "linestyle": (0, (3.2, 1.4)), "zorder": 2.5}
    ax.plot(*thinned(steps, smooth), color=colour, **(dashed if behind else {"linewidth": 2.2, "zorder": 3}))
    known = [(step, value) for step, value in zip(steps, smooth, strict=True) if math.isfinite(value)]
    for arm in curve.arms if marked else ():
        if (step := arm.runs[0].selected_step) is not None:
            y = np.interp(step, *zip(*known, strict=True)) if known else math.nan
            look = {"color": LIGHT[arm.colour], "markersize": 7, "markeredgecolor": LIGHT["paper"]}
            ax.plot([step], [y], "o", zorder=5, clip_on=False, **look)
    return (*known[-1], curve.label, colour) if known else None


def running_mean(values: list[float]) -> list[float]:
    """Return a centred mean over about a fifteenth of the values; `values` itself when there are few."""
    half, given = len(values) // 30, np.array(values)
    if half < 1:
        return values
    known = np.isfinite(given)
    sums, counts = (np.concatenate([[0], np.cumsum(part)]) for part in (np.where(known, given, 0.0), known))
    places = np.arange(len(values))
    first, end = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    number = counts[end] - counts[first]
    return np.where(number > 0, (sums[end] - sums[first]) / np.maximum(number, 1), math.nan).tolist()


def thinned(steps: list[int], values: list[float]) -> tuple[list[int], list[float]]:
    """Return at most [`MAX_POINTS`] points of a curve: the lowest and the highest of each stretch, and both ends."""
    if len(values) <= MAX_POINTS:
        return steps, values
    given, kept = np.array(values), [0, len(values) - 1]
    for stretch in np.array_split(np.arange(len(values)), MAX_POINTS // 2 - 1):
        part = given[stretch]
        some = np.isfinite(part).any()
        kept += [stretch[np.nanargmin(part)], stretch[np.nanargmax(part)]] if some else [stretch[0]]
    places = np.unique(kept)
    return [steps[place] for place in places], given[places].tolist()


def _step_axis(ax: Axes, last: float, turning_point: int | None) -> None:
    """Place steps by their square root where the turning point would be squeezed against the left edge."""
    if turning_point is not None and turning_point < last / 5:
        ax.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
        early = 10 ** math.floor(math.log10(max(turning_point, 1)))
        early *= next(factor for factor in (5, 2, 1) if factor * early <= max(turning_point, 1))
        ax.set_xticks(sorted({0, early, round(last * 0.25), round(last)}))
        ax.set_xticks([], minor=True)
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    else:
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    ax.set_xlim(0, max(last, 1))


def outcome_panels(arms: list[Arm], turning_point: int | None) -> list[Panel]:
    """Return for each SFT run how many prompts gave all wrong, mixed and all right samples."""
    panels = []
    for mixed in curves(arms, "diversity", "groups_mixed"):
        outcomes = ("all_wrong", "mixed", "all_right")
        shares = [curves(mixed.arms[:1], "diversity", f"groups_{outcome}") for outcome in outcomes]
        known = [dict(zip(*share[0].mean, strict=True)) for share in shares if share]
        steps = sorted(set.intersection(*map(set, known)))  # an edited row may lack one of the three
        if len(known) == len(outcomes) and steps:
            means, colour = [(steps, [by_step[step] for step in steps]) for by_step in known], mixed.arms[0].colour
            draw = partial(_stack, shares=means, colour=colour, turning_point=turning_point)
            title, see = f"Prompts by outcome: {shorten(mixed.label)}", f"mixed share ends at {means[1][1][-1]:.2f}"
            panels.append(Panel(title, draw, UNLABELLED, "↑ a larger middle is more to learn from", see=see))
    return panels


def _stack(ax: Axes, shares: list[tuple[list[int], list[float]]], colour: str, turning_point: int | None) -> None:
    """Stack shares of prompts to 1, each named inside its area where there is room."""
    steps = shares[0][0]
    bottom = np.zeros(len(steps))
    _step_axis(ax, steps[-1], turning_point)
    ends = ax.transScale.transform([(0, 0), (steps[-1], 0)])[:, 0]
    across = np.linspace(*ends, 101)  # evenly spaced on paper, whatever the scale of the axis
    places = ax.transScale.inverted().transform(np.column_stack([across, np.zeros(101)]))[:, 0]
    names = ("all wrong", "mixed: RL can learn", "all right")
    looks = zip(("wrong", colour, "right"), ("paper", "paper", "ink"), strict=True)
    for (_, values), name, (fill, ink) in zip(shares, names, looks, strict=True):
        top = bottom + np.nan_to_num(values)
        ax.fill_between(steps, bottom, top, color=LIGHT[fill], linewidth=0.6, edgecolor=LIGHT["paper"])
        low, high = np.interp(places, steps, bottom), np.interp(places, steps, top)
        half = round(1.2 * len(name)) + 1  # about half the name, in hundredths of the axis
        room = {i: (high - low)[i - half : i + half + 1].min() for i in range(half, 101 - half)}
        place = max(room, key=room.get, default=None)
        if place is not None and room[place] > 0.075:
            middle = (low[place] + high[place]) / 2
            ax.text(places[place], middle, name, ha="center", va="center", color=LIGHT[ink], size=9)
        bottom = top
    ax.set_ylim(0, 1)
    ax.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
    ax.set_xlabel("SFT step", loc="left")


def position_panels(rows: list[dict], colour: str) -> list[Panel]:
    """Return weight and temperature by position in the completion, at an early, a middle and a late step."""
    panels = []
    for key in ("weight", "temperature"):
        kept = [row for row in rows if any(value is not None for value in row[key])]
        picked = [kept[i] for i in sorted({0, len(kept) // 2, len(kept) - 1})] if kept else []
        if picked:
            draw = partial(_position_lines, rows=picked, key=key, colour=colour)
            note = "1 is plain nll, 0 trains nothing" if key == "weight" else "the lower, the earlier a token stops"
            panels.append(Panel(f"Mean {key} by position", draw, note=note))
    return panels


def _position_lines(ax: Axes, rows: list[dict], key: str, colour: str) -> None:
    """Draw a line for each step, the later the bolder; positions on a logarithmic axis, as their bins are."""
    ends = []
    for row, strength in zip(rows, (0.35, 0.65, 1.0)[-len(rows) :], strict=True):
        values = [math.nan if value is None else float(value) for value in row[key]]
        look = {"color": LIGHT[colour], "alpha": strength, "linewidth": 1 + 1.4 * strength}
        ax.plot(row["position"], values, marker="o", markersize=3, **look)
        known = [(x, y) for x, y in zip(row["position"], values, strict=True) if math.isfinite(y)]
        ends.append((*known[-1], f"step {row['step']}", LIGHT[colour]))
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    ax.set_xlabel("position in the completion, up to", loc="left")
    y_axis(ax)
    name_ends(ax, ends)
