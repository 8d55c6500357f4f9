"""Diversity of a model's own samples: self-BLEU, distinct-n, entropy, and what goes with them.

Everything is measured on completions that the model sampled itself. The same figures on demonstrations say how
surprising the data is, not how varied the model is, and their course has no bearing on where reinforcement learning
should start.

Left out: sampling (sampling.py), grading (rewards.py), and what to conclude (turning_point.py, selection.py).
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.helpers import extract_all_word_ngrams

from .errors import InputError, nearest
from .passk import group_signal, pass_at_k, powers_of_two


@dataclass
class Group:
    """The samples of one prompt; one line of samples/step-N.jsonl. Lists have one entry a sample.

    Attributes:
        prompt: a string or a list of messages.
        completions: texts without special tokens.
        num_tokens: tokens sampled, the end token included.
        truncated: whether the sample ended at the length limit instead of an end token.
        entropy: nats per token, the mean over the sample's tokens of the entropy of the distribution sampled from.
        rewards: one number per reward function (None: the function does not apply), or None before grading.
    """

    prompt: str | list[dict]
    completions: list[str]
    num_tokens: list[int]
    truncated: list[bool]
    entropy: list[float]
    rewards: list[list[float]] | None = None


@lru_cache(maxsize=8)  # one tokenizer for all calls: sacrebleu caches tokenised texts by tokenizer
def _scorer(tokenize: str, smooth_method: str) -> BLEU:
    if tokenize not in BLEU.TOKENIZERS:
        raise InputError(f"tokenize={tokenize!r} is not a sacrebleu tokenizer{nearest(tokenize, BLEU.TOKENIZERS)}")
    if smooth_method not in BLEU.SMOOTH_DEFAULTS:
        options = list(BLEU.SMOOTH_DEFAULTS)
        raise InputError(f"smooth_method={smooth_method!r} is not one of {options}{nearest(smooth_method, options)}")
    return BLEU(tokenize=tokenize, smooth_method=smooth_method, effective_order=True)


def _words(text: str, tokenize: str = "13a") -> str:
    return _scorer(tokenize, "exp").tokenizer(text.rstrip())  # sacrebleu strips the right end too


def self_bleu(
    completions: Sequence[str],
    *,
    tokenize: str = "13a",
    smooth_method: str = "exp",
    smooth_value: float | None = None,
    effective_order: bool = True,
    max_ngram_order: int = 4,
) -> float:
    """How alike the samples of one prompt are: the mean BLEU of each against all others (Texygen, arXiv 1802.01886).

        mean(sacrebleu.sentence_bleu(text, the_others).score / 100)

    with sacrebleu's settings of the same names. Every text's n-grams are counted once instead of once per pair, and
    equal texts are scored once; the score itself is sacrebleu's. An empty completion scores 0 there, even against
    another empty one: a model that falls silent looks diverse by this figure, and `unique` and `length` tell.

    Returns:
        In [0, 1], 1 when all are equal (high is uniform); NaN below two completions.

    Raises:
        InputError: unknown `tokenize` or `smooth_method`.
    """
    _scorer(tokenize, smooth_method)
    if len(completions) < 2:
        return math.nan
    copies = Counter(completions)
    ngrams, lengths = {}, {}
    for text in copies:
        ngrams[text], lengths[text] = extract_all_word_ngrams(_words(text, tokenize), 1, max_ngram_order)
    top = _two_largest_counts(ngrams)
    scores = []
    for text, number in copies.items():
        # a copy among the references matches every n-gram and the length
        matched = ngrams[text] if number > 1 else _matches(text, ngrams[text], top)
        references = [text] if number > 1 else [other for other in copies if other != text]
        closest = min((abs(lengths[text] - lengths[other]), lengths[other]) for other in references)[1]
        score = BLEU.compute_bleu(
            _totals_by_order(matched, max_ngram_order),
            _totals_by_order(ngrams[text], max_ngram_order),
            lengths[text],
            closest,
            smooth_method=smooth_method,
            smooth_value=smooth_value,
            effective_order=effective_order,
            max_ngram_order=max_ngram_order,
        ).score
        scores += [score] * number
    return min(1.0, math.fsum(scores) / len(scores) / 100)  # sacrebleu's perfect score is 100.00000000000004


def _two_largest_counts(ngrams: dict[str, Counter]) -> dict[tuple, tuple[int, str | None, int]]:
    """For each n-gram: its largest count in one text, that text, and the largest count in any other text."""
    top = {}
    for text, counts in ngrams.items():
        for ngram, count in counts.items():
            first, owner, second = top.get(ngram, (0, None, 0))
            top[ngram] = (count, text, first) if count > first else (first, owner, max(second, count))
    return top


def _matches(text: str, counts: Counter, top: dict) -> dict[tuple, int]:
    """BLEU's clipped counts of `text` against all other texts."""
    matched = {}
    for ngram, count in counts.items():
        first, owner, second = top[ngram]
        matched[ngram] = min(count, second if owner == text else first)
    return matched


def _totals_by_order(counts: dict[tuple, int], max_ngram_order: int) -> list[int]:
    totals = [0] * max_ngram_order
    for ngram, count in counts.items():
        totals[len(ngram) - 1] += count
    return totals


def distinct_n(completions: Iterable[str], n: int) -> float:
    """Different n-grams over all n-grams in the samples of one prompt (Li et al., arXiv 1510.03055).

    Words are those of [`self_bleu`] (13a) and no n-gram crosses from one sample into the next. Longer samples repeat
    more n-grams by chance: compare only at like length.

    Returns:
        In (0, 1]; NaN when no sample has `n` words.
    """
    if n < 1:
        raise InputError(f"n must be at least 1, got {n}")
    total, different = 0, set()
    for text in completions:
        words = _words(text).split()
        ngrams = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
        total += len(ngrams)
        different.update(ngrams)
    return len(different) / total if total else math.nan


def unique_share(completions: Sequence[str]) -> float:
    """Different texts over all texts, in (0, 1]; NaN without completions."""
    return len(set(completions)) / len(completions) if completions else math.nan


def measure(groups: Sequence[Group], *, success_threshold: float = 1.0) -> dict[str, float]:
    """The figures of one line of diversity.jsonl. NaN stands for a figure that these samples cannot give.

    Self-BLEU, distinct-n and the share of different samples are taken per prompt and averaged over prompts, leaving
    out prompts that have none (a single sample has no self-BLEU). Entropy is a mean over tokens, length and
    truncation over samples.

    Args:
        groups: the samples of each prompt.
        success_threshold: a sample is right when its first reward function gives at least this.

    Returns:
        `entropy` (nats per token), `self_bleu`, `distinct_1` .. `distinct_4`, `unique`, `length` (tokens),
        `truncated` (share), and for graded groups those of [`reward_figures`].

    Raises:
        InputError: no groups.
    """
    if not groups:
        raise InputError("there are no samples to measure: the list of groups is empty")
    figures = {
        "entropy": token_entropy(groups),
        "self_bleu": _mean(self_bleu(group.completions) for group in groups),
        **{f"distinct_{n}": _mean(distinct_n(group.completions, n) for group in groups) for n in (1, 2, 3, 4)},
        "unique": _mean(unique_share(group.completions) for group in groups),
        "length": _mean(tokens for group in groups for tokens in group.num_tokens),
        "truncated": _mean(flag for group in groups for flag in group.truncated),
    }
    graded = [group for group in groups if group.rewards is not None]
    return figures | (reward_figures(graded, success_threshold=success_threshold) if graded else {})


def token_entropy(groups: Iterable[Group]) -> float:
    """Mean entropy in nats over all sampled tokens: a long sample counts for its length. NaN when no token has one."""
    known = [
        (tokens, entropy)
        for group in groups
        for tokens, entropy in zip(group.num_tokens, group.entropy, strict=True)
        if _is_number(entropy)
    ]
    total = sum(tokens for tokens, _ in known)
    return math.fsum(tokens * entropy for tokens, entropy in known) / total if total else math.nan


def reward_figures(groups: Sequence[Group], *, success_threshold: float = 1.0) -> dict[str, float]:
    """Figures of graded groups.

    A sample to which the first reward function does not apply (None) is left out of its group; pass@k averages over
    the prompts that have at least k graded samples.

    Returns:
        `reward` (mean over samples of the sum over functions, what TRL logs with unit weights), `pass@1`, `pass@2`,
        `pass@4` ... up to the largest group, and the shares `groups_all_right`, `groups_all_wrong`, `groups_mixed`.
    """
    sums = [[value for value in sample if _is_number(value)] for group in groups for sample in group.rewards]
    firsts = [[sample[0] for sample in group.rewards if _is_number(sample[0])] for group in groups]
    counts = [(len(rewards), sum(reward >= success_threshold for reward in rewards)) for rewards in firsts if rewards]
    signal = group_signal([samples for samples, _ in counts], [right for _, right in counts])
    ks = powers_of_two(max(len(group.rewards) for group in groups))
    return {
        "reward": _mean(math.fsum(values) for values in sums if values),
        **{f"pass@{k}": _mean(pass_at_k(samples, right, k) for samples, right in counts if samples >= k) for k in ks},
        **{f"groups_{name}": share for name, share in signal.items()},
    }


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _mean(values: Iterable[float]) -> float:
    known = [float(value) for value in values if _is_number(value)]
    return math.fsum(known) / len(known) if known else math.nan
