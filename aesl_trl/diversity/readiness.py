"""From a model's own samples to a plain verdict: can reinforcement learning start from it, and if not, what to do.

The figures of a probe, each with an interval over prompts; the thresholds, with their source; the verdict with its
reasons; and which of several candidates is best. Numbers in, numbers and words out: no torch, and nothing is sampled
here (evaluation/probe_trainer.py).

Left out: what a short RL run finds is taken as given (`rl` of an entry), and how the figures transfer between tasks,
which docs/readiness.md discusses.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .figures import Group, intervals, measure, prompt_sums
from .intervals import is_number, with_interval
from .passk import expected_group_variance
from .series import turning_point_of


READY, COLLAPSED, NOT_ABLE, NEVER_STOPS, SOLVED = "ready", "collapsed", "not yet able", "never stops", "solved"

# Own-sample entropy in nats per token at temperature 1 below which SFT checkpoints were flagged (arXiv 2606.18487, two
# code models of 3B and 6.7B). It says how spread the tokens are, not whether the rewards differ: one of their two
# models did not follow it, so that it is a caution here and decides nothing alone.
ENTROPY_FLAG = 0.18
# Share of groups whose rewards differ, below which GRPO throws away nine of ten groups that it samples. Ours.
MIN_SIGNAL = 0.1
# Share of samples cut off at the length limit, from which most of what RL learns from has no end. Ours.
MAX_TRUNCATED = 0.5
# A fixed set of fewer is noise: at learning rate 0, two prompts a step "improve" as much as in training.
MIN_PROMPTS, MIN_SAMPLES = 64, 8

CAUTION = "caution: "  # opens a reason that did not decide


# ---- What equal difficulty would give


def expected_mixed(success_rate: float, group_size: int) -> float:
    """Share of mixed groups, neither all right nor all wrong, if every sample were right with chance p: `1 - p^g -
    (1 - p)^g`."""
    return 1 - success_rate**group_size - (1 - success_rate) ** group_size


def critical_rate(group_size: int) -> float:
    """p* below which most groups are all wrong, `1 - 2^(-1/g)` (arXiv 2606.18487): 0.083 for 8 samples.

    `1 - p*` is its mirror, above which most are all right.
    """
    return 1 - 0.5 ** (1 / group_size)


# ---- Figures


def figures_of(
    groups: Sequence[Group], *, success_threshold: float = 1.0, reward_weights: Sequence[float] | None = None
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """The figures of graded groups, and their 95% intervals over prompts.

    Args:
        groups: the samples of each prompt, with rewards.
        success_threshold: a sample is right when its first reward gives at least this.
        reward_weights: of GRPO's sum over reward functions; 1 each by default.

    Returns:
        Those of [`~diversity.measure`], and
        - `signal`: share of groups whose summed rewards differ, the only ones with a gradient in GRPO (`1 -
          frac_reward_zero_std` in TRL's log); with one 0/1 reward the same as `groups_mixed`;
        - `reward_std`: standard deviation of the summed rewards within a group (divided by g - 1, as TRL's), mean over
          groups;
        - `variance`: variance of right and wrong (0/1) within a group, divided by g, mean over groups;
        - `variance_if_alike`, `mixed_if_alike`: what `variance` and `groups_mixed` would be expected to be if every
          prompt were as hard as the mean, p = pass@1: [`~passk.expected_group_variance`] and [`expected_mixed`]. Both
          are concave in p, so that prompts of different difficulty give less: the gap is what always-right and
          always-wrong prompts cost. (At each prompt's own p the prediction of the variance is the observation itself.)
    """
    sums = prompt_sums(groups, success_threshold=success_threshold)
    totals = [[_total(sample, reward_weights) for sample in group.rewards or []] for group in groups]
    totals = [[value for value in values if value is not None] for values in totals]
    right = [
        [float(sample[0] >= success_threshold) for sample in group.rewards or [] if is_number(sample[0])]
        for group in groups
    ]
    sums.sums["signal"] = [(float(_std(values) > 1e-8), 1.0) if len(values) > 1 else (0.0, 0.0) for values in totals]
    sums.sums["reward_std"] = [(_std(values), 1.0) if len(values) > 1 else (0.0, 0.0) for values in totals]
    sums.sums["variance"] = [(_variance(values), 1.0) if values else (0.0, 0.0) for values in right]
    figures, ends = measure(sums), intervals(sums)
    group_size = max(len(group.completions) for group in groups)
    for name, expected in (("variance_if_alike", expected_group_variance), ("mixed_if_alike", expected_mixed)):
        figures[name] = _at(expected, figures["pass@1"], group_size)
        ends[name] = _image(expected, ends["pass@1"], group_size)
    return figures, ends


def _total(sample: Sequence[float | None], weights: Sequence[float] | None) -> float | None:
    """The weighted sum over the reward functions that apply, as GRPOTrainer forms it; None where none applies."""
    weights = weights or [1.0] * len(sample)
    known = [weight * value for weight, value in zip(weights, sample, strict=True) if is_number(value)]
    return math.fsum(known) if known else None


def _variance(values: Sequence[float], lost: int = 0) -> float:
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - lost)


def _std(values: Sequence[float]) -> float:
    return math.sqrt(_variance(values, lost=1))


def _at(expected, rate: float, group_size: int) -> float:
    return math.nan if math.isnan(rate) else expected(rate, group_size)


def _image(expected, ends: Sequence[float], group_size: int) -> list[float]:
    """The range of `expected`, which rises to p = 0.5 and falls from there, over an interval of p."""
    low, high = ends
    values = [_at(expected, rate, group_size) for rate in (low, high, *([0.5] if low < 0.5 < high else []))]
    return [min(values), max(values)]


# ---- The verdict


@dataclass(frozen=True)
class History:
    """What the run that a checkpoint belongs to has measured: rows of diversity.jsonl in order, and saved steps."""

    step: int
    rows: Sequence[dict] = ()
    candidates: Sequence[int] = ()

    @property
    def earlier(self) -> list[dict]:
        return [row for row in self.rows if row["step"] < self.step]


@dataclass(frozen=True)
class Verdict:
    """`name` is one of the constants above; `go_back_to` a step of the run, for "collapsed" only."""

    name: str
    reasons: list[str] = field(default_factory=list)
    go_back_to: int | None = None

    @property
    def text(self) -> str:
        where = "an earlier step" if self.go_back_to is None else f"step {self.go_back_to}"
        advice = {
            COLLAPSED: f"go back to {where}",
            NOT_ABLE: "more SFT",
            NEVER_STOPS: "fix eos",
            SOLVED: "harder prompts",
        }
        return f"{self.name}: {advice[self.name]}" if self.name in advice else self.name


def judge(
    figures: dict, ends: dict, *, group_size: int, history: History | None = None, temperature: float = 1.0
) -> Verdict:
    """The verdict on a checkpoint's figures.

    In this order: "never stops" where at least half of the samples were cut off; "ready" where at least a tenth of the
    groups differ in reward; and without that signal "solved" where pass@1 is above `1 - p*`, "collapsed" where it is
    above p* (the prompts are split into always right and always wrong ones) or where an earlier step of the run had
    signal, else "not yet able".

    Args:
        figures, ends: of [`figures_of`]; null for unknown.
        group_size: samples of a prompt.
        history: the run that the checkpoint belongs to, if any.
        temperature: of the samples. The entropy flag is for temperature 1.
    """
    if figures["truncated"] >= MAX_TRUNCATED:
        return Verdict(NEVER_STOPS, _never_stops(figures, ends))
    cautions = _cautions(figures, ends, temperature)
    signal = f"{_shown(figures, ends, 'signal')} of the groups differ in reward"
    if (figures["signal"] or 0.0) >= MIN_SIGNAL:
        return Verdict(READY, [f"{signal}; {MIN_SIGNAL:g} or more is enough to learn from", *cautions])
    reasons = [f"{signal}, less than {MIN_SIGNAL:g}: the advantages of the others are zero"]
    rate, least = figures.get("pass@1"), critical_rate(group_size)
    had_signal = [row["step"] for row in history.earlier if _mixed(row) >= MIN_SIGNAL] if history else []
    if is_number(rate) and rate > 1 - least:
        return Verdict(SOLVED, [*reasons, f"pass@1 {rate:.2f} leaves nothing to learn on these prompts", *cautions])
    if had_signal or (is_number(rate) and rate >= least):
        step, why = go_back(history) if history else (None, "the checkpoint belongs to no run that is known")
        return Verdict(COLLAPSED, [*reasons, _collapse(figures, had_signal), why, *cautions], step)
    known = f"pass@1 {_shown(figures, ends, 'pass@1')} is below {least:.3f}, where most groups of {group_size} are all"
    return Verdict(NOT_ABLE, [*reasons, f"{known} wrong", *cautions])


def _mixed(row: dict) -> float:
    value = row.get("groups_mixed")
    return value if is_number(value) else 0.0


def _never_stops(figures: dict, ends: dict) -> list[str]:
    reasons = [f"{_shown(figures, ends, 'truncated')} of the samples were cut off, at most {MAX_TRUNCATED:g} may be"]
    if is_number(figures.get("eos_prob")):
        reasons.append(f"P(eos) where an answer is complete is {_shown(figures, ends, 'eos_prob')}")
    reasons.append("aesl handoff makes the files agree on eos; if answers are this long, raise max_completion_length")
    return reasons


def _collapse(figures: dict, had_signal: list[int]) -> str:
    if had_signal:
        return f"{len(had_signal)} earlier steps of the run had signal, step {had_signal[-1]} the last"
    alike = figures.get("mixed_if_alike")
    expected = f", where {alike:.2f} mixed ones are expected of prompts equally hard" if is_number(alike) else ""
    return (
        f"{figures.get('groups_all_right', math.nan):.2f} of the groups are all right and "
        f"{figures.get('groups_all_wrong', math.nan):.2f} all wrong{expected}"
    )


def _cautions(figures: dict, ends: dict, temperature: float) -> list[str]:
    """What does not decide, and should be seen."""
    cautions = []
    if temperature == 1.0 and is_number(figures.get("entropy")) and figures["entropy"] < ENTROPY_FLAG:
        shown = _shown(figures, ends, "entropy")
        cautions.append(f"{CAUTION}entropy {shown} nats is below {ENTROPY_FLAG:g}, the flag of arXiv 2606.18487")
    mixed, signal = figures.get("groups_mixed"), figures.get("signal")
    if is_number(mixed) and mixed < MIN_SIGNAL <= (signal or 0.0):
        cautions.append(f"{CAUTION}right and wrong differ in {mixed:.2f} of the groups only, other rewards in more")
    low, high = ends.get("signal") or (math.nan, math.nan)
    if is_number(low) and low < MIN_SIGNAL < high:
        cautions.append(f"{CAUTION}the interval of the signal includes {MIN_SIGNAL:g}; more prompts would tell")
    return cautions


def _shown(figures: dict, ends: dict, key: str) -> str:
    return with_interval(figures.get(key), ends.get(key))


def go_back(history: History) -> tuple[int | None, str]:
    """The step to go back to from a collapsed one, and why: the candidate nearest to the turning point before it, else
    the saved candidate before it with the most diverse samples."""
    turning = turning_point_of(history.rows, "entropy").step
    saved = [step for step in history.candidates if step < history.step]
    if turning is not None and turning < history.step:
        if not saved:
            return turning, f"diversity turned at step {turning}, of which no weights are saved"
        nearest = min(saved, key=lambda step: (abs(step - turning), step))
        return nearest, f"diversity turned at step {turning}" + (f", saved is {nearest}" * (nearest != turning))
    entropy = {row["step"]: row["entropy"] for row in history.rows if is_number(row.get("entropy"))}
    measured = [step for step in saved if step in entropy]
    if not measured:
        return None, "no earlier step of the run is both measured and saved: train again with diversity_steps"
    best = max(measured, key=lambda step: (entropy[step], -step))
    return best, f"step {best} has the most diverse samples of the saved ones before it ({entropy[best]:.2f} nats)"


# ---- Entries of readiness.json


def entry(
    name: str,
    groups: Sequence[Group],
    *,
    success_threshold: float = 1.0,
    reward_weights: Sequence[float] | None = None,
    temperature: float = 1.0,
    step: int | None = None,
    history: History | None = None,
) -> dict:
    """What readiness.json holds of one checkpoint, its `rl` left None."""
    figures, ends = figures_of(groups, success_threshold=success_threshold, reward_weights=reward_weights)
    size = max(len(group.completions) for group in groups)
    verdict = judge(figures, ends, group_size=size, history=history, temperature=temperature)
    return {
        "name": name,
        "step": step,
        "verdict": verdict.name,
        "text": verdict.text,
        "go_back_to": verdict.go_back_to,
        "reasons": verdict.reasons,
        "figures": figures,
        "intervals": ends,
        "rl": None,
    }


def rank(entries: Iterable[dict]) -> tuple[dict | None, str]:
    """The best of the entries that are ready, and why; None where none is.

    By the reward after the short RL run where every ready one had it, with equal budget; else by the share of groups
    with signal, of equal ones the larger variance within groups, then the earlier step.
    """
    entries = list(entries)
    ready = [one for one in entries if one["verdict"] == READY]
    if not ready:
        counts = {name: sum(one["verdict"] == name for one in entries) for name in _names(entries)}
        return None, "no candidate is ready (" + ", ".join(f"{count} {name}" for name, count in counts.items()) + ")"
    if all(one.get("rl") for one in ready) and len({one["rl"]["steps"] for one in ready}) == 1:
        best = max(ready, key=lambda one: (one["rl"]["reward"], *_signal(one)))
        after = f"highest reward after {best['rl']['steps']} steps of RL, {best['rl']['reward']:.3f}"
        return best, f"{after}, of {len(ready)} ready candidates"
    best = max(ready, key=_signal)
    shown = _shown(best["figures"], best["intervals"], "signal")
    return best, f"largest share of groups with signal, {shown}, of {len(ready)} ready candidates"


def _names(entries: list[dict]) -> list[str]:
    return list(dict.fromkeys(one["verdict"] for one in entries))


def _signal(one: dict) -> tuple[float, float, float]:
    figures = one["figures"]
    return figures["signal"], figures["variance"] or 0.0, -(one["step"] if one["step"] is not None else math.inf)


# ---- In words
