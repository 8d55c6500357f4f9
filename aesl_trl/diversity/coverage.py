"""Coverage lost and gained: the prompts that a base solves within k samples and a model does not, and the reverse.

For one prompt let P be the chance that k samples of the base hold a right one, and Q that of the model. A prompt that
the base solves and the model does not has the chance P (1 - Q). But a second sampling of the base differs from the
first as well, with the chance P (1 - P), up to 1/4. So the figures are the excess over that:

    lost   = P (1 - Q) - P (1 - P) = P (P - Q)
    gained = (1 - P) Q - (1 - P) P = (1 - P) (Q - P)

Both are 0 where the model solves a prompt as surely as the base, and `gained - lost` is the change of pass@k. A prompt
that the model solves more surely counts as negative loss. The figures of a model are means over prompts. Base and
model are compared prompt by prompt, so the bootstrap interval over prompts is a paired one.

P (1 - P) of one set of samples needs care. With the unbiased pass@k in place of P it comes out too small, by the
variance of pass@k. And base and model may be drawn from one seed: sample j of the one then shares its random numbers
with sample j of the other, and the two are not independent. So we take two disjoint sets A and B of k places in a
group. "The base's samples in A hold a right one, the model's in B hold none" estimates P (1 - Q), and the same with
the base's samples in both sets estimates P (1 - P). The mean over all such pairs of sets has a closed form. It needs
n >= 2 k samples, is unbiased with one seed and with two, and is exactly 0 for the same samples on both sides.
"""

import math
from collections import Counter
from collections.abc import Sequence

from ..errors import InputError
from .figures import Group, PromptSums, known_sum
from .intervals import is_number, with_interval
from .passk import powers_of_two


LOST, GAINED = "coverage_lost", "coverage_gained"


def coverage_k(num_samples: int) -> int:
    """Return the k of coverage: the largest power of two that is at most half of a prompt's samples, 4 for 8."""
    if num_samples < 2:
        raise InputError(f"coverage needs at least 2 samples of each prompt, got {num_samples}")
    return powers_of_two(num_samples // 2)[-1]


def coverage(base: Sequence[bool], own: Sequence[bool], k: int) -> tuple[float, float]:
    """Return one prompt's coverage (lost, gained) at `k`, estimated without bias as this file's first lines say.

    Args:
        base, own: whether the base's sample, and the model's, is right, for each place in the group.
        k: number of samples within which the prompt is to be solved.

    Returns:
        Two numbers in [-1, 1], whose expectations are at least -1/4.

    Raises:
        InputError: the lists differ in length, or hold fewer than 2 k samples.
    """
    if len(base) != len(own):
        raise InputError(f"the base has {len(base)} samples, the model {len(own)}: they must be as many")
    if not 1 <= k <= len(base) // 2:
        raise InputError(f"k must lie between 1 and half of the {len(base)} samples, got {k}")
    counts = Counter(zip(map(bool, base), map(bool, own), strict=True))
    both_wrong, own_wrong = counts[False, False], counts[False, False] + counts[True, False]
    base_wrong = both_wrong + counts[False, True]
    sets = math.comb(len(base), k)
    pairs = sets * math.comb(len(base) - k, k)
    # Of the pairs, those without a right sample: of the base in A and B; of the base in A and the model in B
    base_twice = math.comb(base_wrong, k) * math.comb(max(0, base_wrong - k), k)
    base_and_own = sum(
        math.comb(both_wrong, shared)
        * math.comb(own_wrong - both_wrong, k - shared)
        * math.comb(base_wrong - shared, k)
        for shared in range(min(both_wrong, k) + 1)
    )
    gained = (base_twice - base_and_own) / pairs
    return gained + (math.comb(own_wrong, k) - math.comb(base_wrong, k)) / sets, gained


def coverage_sums(base: Sequence[Group], groups: Sequence[Group], success_threshold: float = 1.0) -> PromptSums:
    """Return `coverage_lost` and `coverage_gained` as sums that [`~figures.measure`] takes; empty without rewards.

    A sample is right when its first reward gives at least `success_threshold`. A place without a reward on one side is
    left out of its prompt. A prompt with fewer than 2 k places is unknown, k being that of the largest group.

    Raises:
        InputError: base and model have different numbers of prompts.
    """
    if len(base) != len(groups):
        raise InputError(f"the base has {len(base)} prompts, but there are {len(groups)} groups")
    size = max(len(group.completions) for group in groups)
    if size < 2 or not all(any(group.rewards for group in side) for side in (base, groups)):
        return PromptSums()
    k, sums = coverage_k(size), PromptSums({LOST: [], GAINED: []})
    for before, after in zip(base, groups, strict=True):
        firsts = zip(*([sample[0] for sample in group.rewards or []] for group in (before, after)), strict=False)
        right = [[reward >= success_threshold for reward in pair] for pair in firsts if all(map(is_number, pair))]
        found = coverage(*zip(*right, strict=True), k) if len(right) >= 2 * k else (None, None)
        for values, value in zip(sums.values(), found, strict=True):
            values.append(known_sum([value]))
    return sums


def lost_sentence(figures: dict, ends: dict, num_samples: int) -> str | None:
    """Say how much coverage was lost where the interval of `coverage_lost` lies above 0; None elsewhere."""
    low, _ = ends.get(LOST) or (None, None)
    if not is_number(low) or low <= 0:
        return None
    shown, k = with_interval(figures.get(LOST), ends[LOST]), coverage_k(num_samples)
    what = f"share of prompts that the base solves within {k} samples and this model does not, beyond chance"
    return f"coverage lost is {shown}: {what}"
