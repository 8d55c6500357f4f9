"""Diversity of a model's own samples: self-BLEU, distinct-n, entropy, and what goes with them.

Everything is measured on completions that the model sampled itself. The same figures on demonstrations say how
surprising the data is, not how varied the model is, and their course has no bearing on where reinforcement learning
should start (docs/entropy.md).

Every figure is a sum over prompts divided by another such sum, so its interval comes from resampling the prompts.
"""

import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np

from ..errors import InputError
from .bleu import mean_score, self_bleu_of_tokens, sentence_bleus, tokenized
from .intervals import LEVEL, is_number, ratio_intervals
from .passk import group_signal, pass_at_k, powers_of_two


@dataclass
class Group:
    """The samples of one prompt; one line of samples/step-N.jsonl. Lists have one entry a sample.

    Attributes:
        prompt: a string or a list of messages.
        completions: texts without special tokens.
        num_tokens: tokens sampled, the end token included.
        truncated: whether the sample ended at the length limit instead of an end token.
        entropy: nats per token, the mean over the sample's tokens of the exact entropy of the model's next-token
            distribution at temperature 1; None where the engine cannot give it.
        rewards: one number per reward function (None: the function does not apply), or None before grading.
        neg_log_prob: nats per token, the mean over the sample's tokens of `-log p` of the token sampled, p at
            temperature 1. For samples drawn at temperature 1 its mean is the entropy.
        eos_prob: probability of ending where the answer is complete: that of the stop tokens at the position where the
            sample ended by itself, for a truncated sample the largest over its positions; None where unknown.
        token_ids: tokens sampled, the end token included, from which `completions` were decoded. None where they were
            not kept: in files of older runs, and in evaluations, whose samples are many.
    """

    prompt: str | list[dict]
    completions: list[str]
    num_tokens: list[int]
    truncated: list[bool]
    entropy: list[float | None]
    rewards: list[list[float]] | None = None
    neg_log_prob: list[float] | None = None
    eos_prob: list[float | None] | None = None
    token_ids: list[list[int]] | None = None

    @classmethod
    def from_row(cls, row: dict, where: str, needs: Collection[str] = ("prompt",)) -> "Group":
        """Read a group from an object of samples/step-N.jsonl or of an evaluation's samples; `where` names its line.

        Beside `completions` the row must have the fields `needs`; a row without one, and a list without one entry for
        each completion, are refused. Other fields may be missing, and other keys (`prompt_index`) are left out.
        """
        completions = row.get("completions") if isinstance(row, dict) else None
        if not isinstance(completions, list) or not all(isinstance(text, str) for text in completions):
            raise InputError(f"{where} has no list of texts 'completions'")
        values = {field.name: row.get(field.name) for field in fields(cls)}
        for name, value in values.items():
            if value is None and name in needs:
                raise InputError(f"{where} has no {name!r}")
            one_each = value is None or (isinstance(value, list) and len(value) == len(completions))
            if name != "prompt" and not one_each:
                raise InputError(f"{where}: {name!r} is not one entry for each of the {len(completions)} completions")
        return cls(**values)

    def to_row(self) -> dict:
        """Return the group as the object that [`Group.from_row`] reads."""
        return asdict(self)


class PromptSums(dict[str, list[tuple[float, float]]]):
    """For each figure the (numerator, denominator) of each prompt; (0, 0) of a prompt that cannot give the figure."""


def distinct_n(completions: Iterable[str], n: int) -> float:
    """Return the number of different n-grams over that of all n-grams in the samples of one prompt.

    The figure is that of Li et al. (arXiv 1510.03055). Words are those of [`~bleu.self_bleu`] (13a), and no n-gram
    crosses from one sample into the next. Longer samples repeat more n-grams by chance: compare only at like length.

    Returns:
        A share in (0, 1]; NaN when no sample has `n` words.
    """
    if n < 1:
        raise InputError(f"n must be at least 1, got {n}")
    return _distinct_share(tokenized(list(completions)), n)


def _distinct_share(texts: list[list[str]], n: int) -> float:
    total, different = 0, set()
    for words in texts:
        total += max(0, len(words) - n + 1)
        different.update(zip(*(words[start:] for start in range(n)), strict=False))
    return len(different) / total if total else math.nan


def unique_share(completions: Sequence[str]) -> float:
    """Return the number of different texts over that of all texts, in (0, 1]; NaN without completions."""
    return len(set(completions)) / len(completions) if completions else math.nan


# The pattern reads a backslash with what it escapes: an escaped brace closes nothing, an escaped backslash escapes
# nothing.
_BRACES = re.compile(r"(\\boxed\s*\{)|\\(?:[{}]|\\(?!boxed))|\{|\}")


def final_answer(completion: str) -> str:
    """Return what a completion gives as its answer, stripped; "" when it has none.

    The answer is the content of the last `\\boxed{...}` whose braces balance, else the last line that is not empty.
    Equal answers written differently (1/2 and 0.5) count as different: a reward is there to judge them.
    """
    last, content, opened = -1, "", []
    for match in _BRACES.finditer(completion):
        if match.group() == "}" and opened:
            start = opened.pop()
            if start > last:
                last, content = start, completion[start : match.start()]
        elif match.group().endswith("{") and (match[1] or match.group() == "{"):
            opened.append(match.end() if match[1] else -1)
    if last >= 0:
        return content.strip()
    return next((line.strip() for line in reversed(completion.split("\n")) if line.strip()), "")


def measure(
    groups: Sequence[Group] | PromptSums,
    *,
    success_threshold: float = 1.0,
    base_completions: Sequence[Sequence[str]] | None = None,
) -> dict[str, float]:
    """Return the figures of one line of diversity.jsonl. NaN stands for a figure that these samples cannot give.

    Self-BLEU, distinct-n, the share of different samples, BLEU to the base and pass@k are taken per prompt and
    averaged over the prompts that have them (a single sample has no self-BLEU; pass@k needs k graded samples).
    Entropy is a mean over tokens; length, truncation and `eos_prob` are means over samples.

    Args:
        groups: the samples of each prompt; or their [`prompt_sums`], so that several functions share them.
        success_threshold: a sample is right when its first reward function gives at least this. A sample to which that
            function does not apply (None) is left out of its group.
        base_completions: the base model's samples of each prompt.

    Returns:
        - `entropy`, nats per token: the exact one where every sample has it, else `entropy_sampled`
          ([`entropy_estimator`] tells which); `entropy_sampled`: the mean of `-log p` of the sampled tokens;
        - `self_bleu`, `distinct_1` .. `distinct_4`, `unique`: these depend on the number of samples; compare them only
          at the same number;
        - `length` (tokens), `truncated` (share), `eos_prob`;
        - with `base_completions` also `bleu_to_base`: the mean BLEU, in [0, 1], of each sample against all base
          samples of its prompt, with the settings of `self_bleu`;
        - for graded groups `reward` (mean over samples of the sum over functions, as TRL logs with unit weights),
          `pass@1`, `pass@2`, `pass@4` ... up to the largest group, the shares `groups_all_right`, `groups_all_wrong`
          and `groups_mixed`, and `distinct_answers` (different final answers in a group, see [`final_answer`]).

    Raises:
        InputError: there are no groups, or `base_completions` has another number of prompts.
    """
    figures = {}
    for name, pairs in prompt_sums(groups, success_threshold, base_completions).items():
        part, whole = map(math.fsum, zip(*pairs, strict=True))
        figures[name] = part / whole if whole else math.nan
    return figures


def intervals(
    groups: Sequence[Group] | PromptSums,
    *,
    success_threshold: float = 1.0,
    base_completions: Sequence[Sequence[str]] | None = None,
    level: float = LEVEL,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Return the percentile bootstrap interval [low, high] over prompts of every figure of [`measure`].

    Prompts are resampled with all their samples, and every figure is taken anew as a ratio. The interval covers the
    choice of prompts together with the draw of their samples. A figure that depends on the number of samples
    (self-BLEU) is meant at that number. With few prompts the interval is too narrow.

    Returns:
        One pair for each figure; NaN twice where the figure is NaN.
    """
    sums = prompt_sums(groups, success_threshold, base_completions)
    pairs = np.array(list(sums.values()), dtype=float)  # [figure, prompt, 2]
    ends = ratio_intervals(pairs[..., 0].T, pairs[..., 1].T, level=level, resamples=resamples, seed=seed)
    return {name: list(pair) for name, pair in zip(sums, ends, strict=True)}


def by_prompt(
    groups: Sequence[Group] | PromptSums, *, success_threshold: float = 1.0
) -> dict[str, list[float | None]]:
    """Return `entropy`, `self_bleu`, and of graded groups every `pass@k` and coverage, of each prompt, or None.

    They serve [`~intervals.paired_interval`]: steps measured on the same prompts differ by less than their intervals
    suggest.
    """
    sums = prompt_sums(groups, success_threshold)
    kept = [name for name in sums if name in ("entropy", "self_bleu") or name.startswith(("pass@", "coverage_"))]
    return {name: [part / whole if whole else None for part, whole in sums[name]] for name in kept}


def prompt_sums(
    groups: Sequence[Group] | PromptSums,
    success_threshold: float = 1.0,
    base_completions: Sequence[Sequence[str]] | None = None,
) -> PromptSums:
    """Return the sums that [`measure`], [`intervals`] and [`by_prompt`] share; arguments and errors are theirs.

    `groups` that are such sums already are returned as they are.
    """
    if isinstance(groups, PromptSums):
        return groups
    if not groups:
        raise InputError("there are no samples to measure: the list of groups is empty")
    if base_completions is not None and len(base_completions) != len(groups):
        raise InputError(f"base_completions has {len(base_completions)} prompts, but there are {len(groups)} groups")
    exact = [_token_sums(group, group.entropy) for group in groups]
    sampled = [_token_sums(group, group.neg_log_prob) for group in groups]
    texts = [tokenized(group.completions) for group in groups]
    sums = {
        "entropy": exact if entropy_estimator(groups) == "exact" else sampled,
        "entropy_sampled": sampled,
        "self_bleu": [known_sum([self_bleu_of_tokens(words)]) for words in texts],
        **{f"distinct_{n}": [known_sum([_distinct_share(words, n)]) for words in texts] for n in (1, 2, 3, 4)},
        "unique": [known_sum([unique_share(group.completions)]) for group in groups],
        "length": [known_sum(group.num_tokens) for group in groups],
        "truncated": [known_sum(group.truncated) for group in groups],
        "eos_prob": [known_sum(group.eos_prob) for group in groups],
    }
    if base_completions is not None:
        sums["bleu_to_base"] = [
            known_sum([mean_score(sentence_bleus(words, tokenized(base))) if words and base else None])
            for words, base in zip(texts, base_completions, strict=True)
        ]
    if any(group.rewards is not None for group in groups):
        sums |= _reward_sums(groups, success_threshold)
    return PromptSums(sums)


def _reward_sums(groups: Sequence[Group], success_threshold: float) -> dict[str, list[tuple[float, float]]]:
    """Return the sums of graded groups; a group without rewards adds nothing."""
    rewards = [group.rewards or [] for group in groups]
    totals = [[[value for value in sample if is_number(value)] for sample in samples] for samples in rewards]
    counts = right_counts(groups, success_threshold)
    sums = {"reward": [known_sum([math.fsum(values) for values in samples if values]) for samples in totals]}
    for k in powers_of_two(max(map(len, rewards))):
        sums[f"pass@{k}"] = [known_sum([pass_at_k(num, right, k) if num >= k else None]) for num, right in counts]
    signals = [group_signal([num], [right]) if num else {} for num, right in counts]
    for name in ("all_right", "all_wrong", "mixed"):
        sums[f"groups_{name}"] = [known_sum([signal.get(name)]) for signal in signals]
    graded = [group.completions if group.rewards is not None else [] for group in groups]
    answers = [len({final_answer(text) for text in texts} - {""}) if texts else None for texts in graded]
    return sums | {"distinct_answers": [known_sum([number]) for number in answers]}


def right_counts(groups: Iterable[Group], success_threshold: float = 1.0) -> list[tuple[int, int]]:
    """Return for each group how many samples are graded, and how many of those are right.

    A sample is graded when the first reward function applies to it, and right when that reward reaches the threshold.
    """
    firsts = [[sample[0] for sample in group.rewards or [] if is_number(sample[0])] for group in groups]
    return [(len(values), sum(value >= success_threshold for value in values)) for values in firsts]


def entropy_estimator(groups: Iterable[Group]) -> str:
    """Return which estimate `entropy` is: `"exact"`, or `"sampled"` when a sample has only its `neg_log_prob`.

    The two are never mixed. A sample without either (its logits were not finite) decides nothing.
    """
    only_sampled = (
        is_number(sampled) and not is_number(exact)
        for group in groups
        if group.neg_log_prob is not None
        for exact, sampled in zip(group.entropy, group.neg_log_prob, strict=True)
    )
    return "sampled" if any(only_sampled) else "exact"


def _token_sums(group: Group, values: Sequence[float | None] | None) -> tuple[float, float]:
    """Return the sum over the tokens of all samples whose mean is known in `values`, and the number of tokens."""
    if values is None:
        return 0.0, 0.0
    pairs = zip(group.num_tokens, values, strict=True)
    known = [(tokens, value) for tokens, value in pairs if is_number(value)]
    return math.fsum(tokens * value for tokens, value in known), float(sum(tokens for tokens, _ in known))


def known_sum(values: Sequence[float | None] | None) -> tuple[float, float]:
    """Return the sum of the values that are known, and their number."""
    known = [float(value) for value in values or () if is_number(value)]
    return math.fsum(known), float(len(known))
