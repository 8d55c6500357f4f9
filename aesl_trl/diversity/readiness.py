"""From a model's own samples to a plain verdict: can reinforcement learning start from it, and if not, what to do.

Here are the figures of a probe, each with an interval over prompts; the thresholds, with their source; the verdict
with its reasons; and the choice of the best candidate. Nothing is sampled here (evaluation/probe_trainer.py), and the
result of a short RL run is taken as given (`rl` of an entry). docs/readiness.md discusses how the figures transfer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from .coverage import coverage_sums, lost_sentence
from .figures import Group, intervals, known_sum, measure, prompt_sums, right_counts
from .intervals import is_number, with_interval
from .passk import expected_group_variance
from .series import nearest_step, turning_point_of


READY, COLLAPSED, NOT_ABLE, NEVER_STOPS, SOLVED = "ready", "collapsed", "not yet able", "never stops", "solved"
UNREWARDED = "not rewarded"

# Own-sample entropy in nats per token at temperature 1 below which SFT checkpoints were flagged (arXiv 2606.18487, two
# code models of 3B and 6.7B). It says how spread the tokens are, not whether the rewards differ, and one of the two
# models did not follow it: so it is a caution here and decides nothing alone.
ENTROPY_FLAG = 0.18
# Share of groups whose rewards differ, below which GRPO throws away nine of ten groups that it samples. Ours.
MIN_SIGNAL = 0.1
# Share of samples cut off at the length limit, from which most of what RL learns from has no end. Ours.
MAX_TRUNCATED = 0.5
# A smaller fixed set is noise: at learning rate 0, two prompts a step "improve" as much as in training.
MIN_PROMPTS, MIN_SAMPLES = 64, 8

CAUTION = "caution: "  # opens a reason that did not decide


def expected_mixed(success_rate: float, group_size: int) -> float:
    """Return the expected share of mixed groups, `1 - p^g - (1 - p)^g`, if every sample were right with chance p.

    A mixed group is neither all right nor all wrong.
    """
    return 1 - success_rate**group_size - (1 - success_rate) ** group_size


def critical_rate(group_size: int) -> float:
    """Return p* below which most groups are all wrong, `1 - 2^(-1/g)` (arXiv 2606.18487): 0.083 for 8 samples.

    Above `1 - p*` most groups are all right.
    """
    return 1 - 0.5 ** (1 / group_size)


def figures_of(
    groups: Sequence[Group],
    *,
    success_threshold: float = 1.0,
    reward_weights: Sequence[float] | None = None,
    base: Sequence[Group] | None = None,
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Return the figures of graded groups, and their 95% intervals over prompts.

    A sample is right when its first reward gives at least `success_threshold`. `reward_weights` are those of GRPO's
    sum, by default 1 each. The figures are those of [`~figures.measure`], and
    - `signal`: share of groups whose summed rewards differ, the only groups with a gradient in GRPO (`1 -
      frac_reward_zero_std` in TRL's log); with one 0/1 reward it equals `groups_mixed`;
    - `reward_std`: standard deviation of the summed rewards within a group (divided by g - 1, as TRL's), mean over
      groups;
    - `variance`: variance of right and wrong (0/1) within a group, divided by g, mean over groups;
    - `variance_if_alike`, `mixed_if_alike`: the `variance` and `groups_mixed` to expect if every prompt were as hard
      as the mean, p = pass@1: [`~passk.expected_group_variance`] and [`expected_mixed`]. Both are concave in p: if
      prompts differ in difficulty, the observed value is lower, and the gap is the signal lost to prompts that are
      always right or wrong. (At each prompt's own p the predicted variance is the observed one.)
    - with `base`, its groups on the same prompts: `coverage_lost` and `coverage_gained`, see [`coverage`].
    """
    sums = prompt_sums(groups, success_threshold)
    rewards = [[_total(sample, reward_weights) for sample in group.rewards or []] for group in groups]
    totals = [[total for total in samples if total is not None] for samples in rewards]
    right = [[1.0] * right + [0.0] * (num - right) for num, right in right_counts(groups, success_threshold)]
    stds = [math.sqrt(_variance(values, lost=1)) if len(values) > 1 else None for values in totals]
    sums["signal"] = [known_sum([None if std is None else std > 1e-8]) for std in stds]
    sums["reward_std"] = [known_sum([std]) for std in stds]
    sums["variance"] = [known_sum([_variance(values) if values else None]) for values in right]
    if base is not None:
        sums |= coverage_sums(base, groups, success_threshold)
    figures, ends = measure(sums), intervals(sums)
    group_size = max(len(group.completions) for group in groups)
    rate, (low, high) = figures["pass@1"], ends["pass@1"]
    for name, expected in (("variance_if_alike", expected_group_variance), ("mixed_if_alike", expected_mixed)):
        # Both rise up to p = 0.5 and fall from there
        at = [low, high, 0.5] if low < 0.5 < high else [low, high]
        at_rate, *values = (math.nan if math.isnan(p) else expected(p, group_size) for p in (rate, *at))
        figures[name], ends[name] = at_rate, [min(values), max(values)]
    return figures, ends


def _total(sample: Sequence[float | None], weights: Sequence[float] | None) -> float | None:
    """Return the weighted sum over the reward functions that apply, as GRPOTrainer's; None where no function does."""
    weights = weights or [1.0] * len(sample)
    known = [weight * value for weight, value in zip(weights, sample, strict=True) if is_number(value)]
    return math.fsum(known) if known else None


def _variance(values: Sequence[float], lost: int = 0) -> float:
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - lost)


@dataclass(frozen=True)
class History:
    """The measurements of the run that a checkpoint belongs to: rows of diversity.jsonl in order, and saved steps."""

    step: int
    rows: Sequence[dict] = ()
    candidates: Sequence[int] = ()


@dataclass(frozen=True)
class Verdict:
    """A verdict and its reasons. `name` is a constant from above; `go_back_to` a step, where it is "collapsed"."""

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
            UNREWARDED: "change the reward or the template",
        }
        return f"{self.name}: {advice[self.name]}" if self.name in advice else self.name


def judge(
    figures: dict,
    ends: dict,
    *,
    group_size: int,
    history: History | None = None,
    temperature: float = 1.0,
    unearnable: Sequence[str] = (),
) -> Verdict:
    """Return the verdict on a checkpoint's figures.

    In this order: "never stops" where at least half of the samples were cut off; "ready" where at least a tenth of the
    groups differ in reward; and without that signal "not rewarded" where a reward cannot be earned, "solved" where
    pass@1 is above `1 - p*`, "collapsed" where it is above p* (the prompts are split into always right and always
    wrong ones) or where an earlier step of the run had signal, else "not yet able".

    `figures` and `ends` are those of [`figures_of`], where None stands for unknown; `group_size` is the number of
    samples of a prompt, and `temperature` theirs (the entropy flag is for temperature 1). `history` is the run that
    the checkpoint belongs to, if any. `unearnable` says why rewards cannot be earned, whatever the model samples.
    """
    shown = {key: with_interval(figures.get(key), ends.get(key)) for key in figures}
    if figures["truncated"] >= MAX_TRUNCATED:
        reasons = [f"{shown['truncated']} of the samples were cut off, at most {MAX_TRUNCATED:g} may be"]
        if is_number(figures.get("eos_prob")):
            reasons.append(f"P(eos) where an answer is complete is {shown['eos_prob']}")
        reasons.append(
            "aesl handoff makes the files agree on eos; if answers are this long, raise max_completion_length"
        )
        return Verdict(NEVER_STOPS, reasons)
    cautions = _cautions(figures, ends, temperature, group_size)
    signal = f"{shown['signal']} of the groups differ in reward"
    if (figures["signal"] or 0.0) >= MIN_SIGNAL:
        return Verdict(READY, [f"{signal}; {MIN_SIGNAL:g} or more is enough to learn from", *cautions])
    reasons = [f"{signal}, less than {MIN_SIGNAL:g}: the advantages of the others are zero"]
    if unearnable:
        return Verdict(UNREWARDED, [*reasons, *unearnable, *cautions])
    rate, least = figures.get("pass@1"), critical_rate(group_size)
    if is_number(rate) and rate > 1 - least:
        return Verdict(SOLVED, [*reasons, f"pass@1 {rate:.2f} leaves nothing to learn on these prompts", *cautions])
    earlier = [row for row in history.rows if row["step"] < history.step] if history else []
    had_signal = [row["step"] for row in earlier if (row.get("groups_mixed") or 0.0) >= MIN_SIGNAL]
    if had_signal or (is_number(rate) and rate >= least):
        step, why = go_back(history) if history else (None, "the checkpoint belongs to no run that is known")
        return Verdict(COLLAPSED, [*reasons, _collapse(figures, had_signal), why, *cautions], step)
    wrong = f"pass@1 {shown.get('pass@1', '-')} is below {least:.3f}, where most groups of {group_size} are all wrong"
    return Verdict(NOT_ABLE, [*reasons, wrong, *cautions])


def _collapse(figures: dict, had_signal: list[int]) -> str:
    if had_signal:
        return f"{len(had_signal)} earlier steps of the run had enough mixed groups, step {had_signal[-1]} the last"
    alike = figures.get("mixed_if_alike")
    expected = f", where {alike:.2f} mixed ones are expected of prompts equally hard" if is_number(alike) else ""
    return (
        f"{figures.get('groups_all_right', math.nan):.2f} of the groups are all right and "
        f"{figures.get('groups_all_wrong', math.nan):.2f} all wrong{expected}"
    )


def _cautions(figures: dict, ends: dict, temperature: float, group_size: int) -> list[str]:
    """Return reasons that do not decide and should be seen."""
    lost = lost_sentence(figures, ends, group_size)
    cautions = [CAUTION + lost] if lost else []
    entropy, mixed, signal = (figures.get(key) for key in ("entropy", "groups_mixed", "signal"))
    if temperature == 1.0 and is_number(entropy) and entropy < ENTROPY_FLAG:
        shown = with_interval(entropy, ends.get("entropy"))
        cautions.append(f"{CAUTION}entropy {shown} nats is below {ENTROPY_FLAG:g}, the flag of arXiv 2606.18487")
    if is_number(mixed) and mixed < MIN_SIGNAL <= (signal or 0.0):
        cautions.append(f"{CAUTION}right and wrong differ in {mixed:.2f} of the groups only, other rewards in more")
    low, high = ends.get("signal") or (math.nan, math.nan)
    if is_number(low) and low < MIN_SIGNAL < high:
        cautions.append(f"{CAUTION}the interval of the signal includes {MIN_SIGNAL:g}; more prompts would tell")
    return cautions


def go_back(history: History) -> tuple[int | None, str]:
    """Return the step to go back to from a collapsed one, and why.

    It is the candidate nearest to the turning point before the collapse; without a turning point it is the saved and
    measured candidate before it with the most diverse samples.
    """
    turning = turning_point_of(history.rows, "entropy").step
    saved = [step for step in history.candidates if step < history.step]
    if turning is not None and turning < history.step:
        why = f"diversity turned at step {turning}"
        if not saved:
            return turning, f"{why}, of which no weights are saved"
        nearest = nearest_step(turning, saved)
        return nearest, why if nearest == turning else f"{why}, saved is {nearest}"
    entropy = {row["step"]: row["entropy"] for row in history.rows if is_number(row.get("entropy"))}
    measured = [step for step in saved if step in entropy]
    if not measured:
        return None, "no earlier step of the run is both measured and saved: train again with diversity_steps"
    best = max(measured, key=lambda step: (entropy[step], -step))
    return best, f"step {best} has the most diverse samples of the saved ones before it ({entropy[best]:.2f} nats)"


def entry(
    name: str,
    groups: Sequence[Group],
    *,
    success_threshold: float = 1.0,
    reward_weights: Sequence[float] | None = None,
    temperature: float = 1.0,
    step: int | None = None,
    history: History | None = None,
    unearnable: Sequence[str] = (),
    base: Sequence[Group] | None = None,
) -> dict:
    """Return the entry of one checkpoint in readiness.json, its `rl` left None; arguments are as above."""
    how = {"success_threshold": success_threshold, "reward_weights": reward_weights}
    figures, ends = figures_of(groups, base=base, **how)
    size = max(len(group.completions) for group in groups)
    how = {"group_size": size, "temperature": temperature}
    verdict = judge(figures, ends, **how, history=history, unearnable=unearnable)
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


def rank(entries: Sequence[dict]) -> tuple[dict | None, str]:
    """Return the best of the entries that are ready, and why; None where no entry is ready.

    Entries are compared by the reward after the short RL run where every ready one had it, with equal budget; else by
    the share of groups that differ in reward. Of equal entries the larger variance within groups wins, then the
    earlier step.
    """
    ready = [entry for entry in entries if entry["verdict"] == READY]
    if not ready:
        verdicts = [entry["verdict"] for entry in entries]
        counts = [f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts)]
        return None, f"no candidate is ready ({', '.join(counts)})"

    def by_signal(entry: dict) -> tuple[float, float, float]:
        step = math.inf if entry["step"] is None else entry["step"]
        return entry["figures"]["signal"], entry["figures"]["variance"] or 0.0, -step

    if all(entry.get("rl") for entry in ready) and len({entry["rl"]["steps"] for entry in ready}) == 1:
        best = max(ready, key=lambda entry: (entry["rl"]["reward"], *by_signal(entry)))
        why = f"highest reward after {best['rl']['steps']} steps of RL, {best['rl']['reward']:.3f}"
    else:
        best = max(ready, key=by_signal)
        shown = with_interval(best["figures"]["signal"], best["intervals"].get("signal"))
        why = f"largest share of groups that differ in reward, {shown}"
    return best, f"{why}, of {len(ready)} ready candidates"
