"""Sentence BLEU of many texts at once: each against all others, or each against a set of references.

The numbers are sacrebleu's: its tokenizers and its formula are called. Only the n-gram counts come about differently:
one sort over all texts for each order, where sacrebleu counts every reference anew for every text.

Legend for shapes: N tokens of all texts, T texts, E pairs of an n-gram and a text that has it, G different n-grams.
"""

import math
from collections.abc import Hashable, Sequence
from functools import lru_cache
from itertools import chain

import numpy as np
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.tokenizers.tokenizer_re import TokenizerRegexp

from ..errors import InputError, in_one_line, nearest
from ..values import check_choice


def self_bleu(
    completions: Sequence[str],
    *,
    tokenize: str = "13a",
    smooth_method: str = "exp",
    smooth_value: float | None = None,
    effective_order: bool = True,
    max_ngram_order: int = 4,
) -> float:
    """Return how alike the samples of one prompt are: the mean BLEU of each against all others.

    The figure is Texygen's (arXiv 1802.01886), and equals

        mean(sacrebleu.sentence_bleu(text, the_others).score / 100)

    with sacrebleu's settings of the same names, to the last bits of a float. The time grows with the number of
    n-grams, not with its product with the number of samples.

    Self-BLEU grows with the number of samples, since each has more others to agree with, and with their length:
    compare figures of like numbers of samples only. An empty completion scores 0, even against another empty one: a
    model that falls silent looks diverse by this figure, and `unique` and `length` tell.

    Args:
        completions: the samples of one prompt.
        tokenize: one of sacrebleu's tokenizers.
        smooth_method: `"exp"`, `"floor"`, `"add-k"` or `"none"`.
        smooth_value: value of `"floor"` (in [0, 1], 0.1 by default) and `"add-k"` (at least 0, 1 by default).
        effective_order: whether orders that a text is too short for are left out.
        max_ngram_order: length of the longest n-grams, at least 1.

    Returns:
        A figure in [0, 1], 1 when all samples are equal (high is uniform); NaN below two completions.

    Raises:
        InputError: sacrebleu does not have a setting, or a completion is no text.
    """
    check_choice("smooth_method", smooth_method, BLEU.SMOOTH_DEFAULTS)
    high = 1 if smooth_method == "floor" else math.inf  # a floor above 1 is a precision above 1
    if smooth_value is not None and not (0 <= smooth_value <= high and math.isfinite(smooth_value)):
        allowed = "between 0 and 1" if high == 1 else "at least 0 and finite"
        raise InputError(f"smooth_value must be {allowed} for {smooth_method!r}, got {smooth_value}")
    if max_ngram_order < 1:
        raise InputError(f"max_ngram_order must be at least 1, got {max_ngram_order}")
    return self_bleu_of_tokens(
        tokenized(completions, tokenize),
        smooth_method=smooth_method,
        smooth_value=smooth_value,
        effective_order=effective_order,
        max_ngram_order=max_ngram_order,
    )


def self_bleu_of_tokens(texts: Sequence[Sequence[Hashable]], **settings) -> float:
    """Return [`self_bleu`] of texts that [`tokenized`] has split."""
    return mean_score(sentence_bleus(texts, **settings)) if len(texts) > 1 else math.nan


def mean_score(scores: Sequence[float]) -> float:
    """Return the mean of BLEU scores as a share in [0, 1]; NaN without any."""
    # sacrebleu's perfect score is 100.00000000000004
    return min(1.0, math.fsum(scores) / len(scores) / 100) if scores else math.nan


def tokenized(texts: Sequence[str], tokenize: str = "13a") -> list[list[str]]:
    """Return the words of each text, as sacrebleu splits them."""
    tokenizer = _tokenizer(tokenize)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"completions[{index}] is of type {type(text).__name__}, but must be a string")
    words = [tokenizer(text.rstrip()).split() for text in texts]  # sacrebleu strips the right end too
    for kind in (type(tokenizer), TokenizerRegexp):  # each keeps 65,536 texts, which do not fit into memory if long
        getattr(kind.__call__, "cache_clear", lambda: None)()
    return words


@lru_cache(maxsize=8)
def _tokenizer(name: str):
    if name not in BLEU.TOKENIZERS:
        raise InputError(f"tokenize={name!r} is not a sacrebleu tokenizer{nearest(name, BLEU.TOKENIZERS)}")
    try:
        return BLEU(tokenize=name).tokenizer
    except (ImportError, RuntimeError) as error:  # some need a package of their own
        raise InputError(f"tokenize={name!r} is not installed: {in_one_line(error)}") from None


def sentence_bleus(
    texts: Sequence[Sequence[Hashable]],
    references: Sequence[Sequence[Hashable]] | None = None,
    *,
    smooth_method: str = "exp",
    smooth_value: float | None = None,
    effective_order: bool = True,
    max_ngram_order: int = 4,
) -> list[float]:
    """Return sacrebleu's sentence BLEU, in [0, 100], of each text against `references`, by default all other texts.

    Texts are lists of words or ids. At least two texts, or one reference, are needed.
    """
    everything = [*texts, *(references or ())]
    all_lengths = np.array([len(text) for text in everything], dtype=int)
    lengths, reference_lengths = np.split(all_lengths, [len(texts)])
    matched = _matches(everything, all_lengths, len(texts), max_ngram_order)
    closest = _closest_of_others(lengths) if references is None else _closest(lengths, reference_lengths)
    return [
        BLEU.compute_bleu(
            right,
            [max(0, length - order) for order in range(max_ngram_order)],
            length,
            reference_length,
            smooth_method=smooth_method,
            smooth_value=smooth_value,
            effective_order=effective_order,
            max_ngram_order=max_ngram_order,
        ).score
        for right, length, reference_length in zip(matched.T.tolist(), lengths.tolist(), closest.tolist(), strict=True)
    ]


def _closest_of_others(lengths_T: np.ndarray) -> np.ndarray:
    """Return for each text the nearest length among the other texts; of two equally near, the shorter."""
    order = np.argsort(lengths_T)
    ordered = lengths_T[order].astype(float)
    below = np.concatenate([[-np.inf], ordered[:-1]])
    above = np.concatenate([ordered[1:], [np.inf]])
    closest = np.empty_like(lengths_T)
    closest[order] = np.where(ordered - below <= above - ordered, below, above)
    return closest


def _closest(lengths_T: np.ndarray, reference_lengths: np.ndarray) -> np.ndarray:
    """Return for each text the nearest length among the references; of two equally near, the shorter."""
    ordered = np.sort(reference_lengths).astype(float)
    bounded = np.concatenate([[-np.inf], ordered, [np.inf]])
    place = np.searchsorted(ordered, lengths_T)  # ordered[place - 1] < length <= ordered[place]
    below, above = bounded[place], bounded[place + 1]
    return np.where(lengths_T - below <= above - lengths_T, below, above).astype(int)


def _matches(
    texts: Sequence[Sequence[Hashable]], lengths_T: np.ndarray, num_scored: int, max_ngram_order: int
) -> np.ndarray:
    """Return BLEU's clipped counts [order, T] of each text against all others, where all texts are scored.

    Where only the first `num_scored` texts are scored, the rest are the references of each.
    """
    num_texts, num_tokens = len(texts), int(lengths_T.sum())
    ids: dict[Hashable, int] = {}
    words_N = np.fromiter((ids.setdefault(word, len(ids)) for word in chain.from_iterable(texts)), int, num_tokens)
    owner_N = np.repeat(np.arange(num_texts), lengths_T)
    to_end_N = np.repeat(np.cumsum(lengths_T), lengths_T) - np.arange(num_tokens)
    matched = np.zeros((max_ngram_order, num_texts), dtype=int)
    # Places where n-grams begin that may still match, and a number for the n-gram of the last order at each place
    starts, prefixes = np.arange(num_tokens), np.zeros(num_tokens, dtype=int)
    for order in range(1, max_ngram_order + 1):
        fits = to_end_N[starts] >= order
        starts, prefixes = starts[fits], prefixes[fits]
        if starts.size == 0:
            break
        # The keys stay below 2^58 for a thousand texts of 16,000 different words
        keys = (prefixes * len(ids) + words_N[starts + order - 1]) * num_texts + owner_N[starts]
        by_key = np.argsort(keys)
        keys = keys[by_key]
        first_E = np.flatnonzero(np.diff(keys, prepend=-1))
        counts_E = np.diff(first_E, append=keys.size)
        ngrams_E, owners_E = np.divmod(keys[first_E], num_texts)
        is_new_E = np.diff(ngrams_E, prepend=-1) != 0
        first_G, ngrams_E = np.flatnonzero(is_new_E), np.cumsum(is_new_E) - 1
        if num_scored == num_texts:
            clip_E = _largest_of_others(counts_E, first_G, ngrams_E)
        else:
            clip_E = np.maximum.reduceat(np.where(owners_E < num_scored, 0, counts_E), first_G)[ngrams_E]
        matched[order - 1] = np.bincount(owners_E, np.minimum(counts_E, clip_E), num_texts)
        # An n-gram that only one text has matches nothing, nor does a longer n-gram that begins with it
        is_shared_E = (np.diff(first_G, append=ngrams_E.size) > 1)[ngrams_E]
        kept = np.repeat(is_shared_E, counts_E)
        starts, prefixes = starts[by_key][kept], np.repeat(ngrams_E, counts_E)[kept]
    return matched[:, :num_scored]


def _largest_of_others(counts_E: np.ndarray, first_G: np.ndarray, ngrams_E: np.ndarray) -> np.ndarray:
    """Return for each n-gram of each text its largest count in any other text."""
    largest_E = np.maximum.reduceat(counts_E, first_G)[ngrams_E]
    is_largest_E = counts_E == largest_E
    is_alone_E = is_largest_E & (np.add.reduceat(is_largest_E.astype(int), first_G) == 1)[ngrams_E]
    second_E = np.maximum.reduceat(np.where(is_largest_E, 0, counts_E), first_G)[ngrams_E]
    return np.where(is_alone_E, second_E, largest_E)
