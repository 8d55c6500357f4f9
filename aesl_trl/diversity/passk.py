"""From counts of right samples to pass@k, avg@k, and the signal that is left for a group-relative reward.

A problem (a prompt) has `num_samples` samples of which `num_correct` are right. Nothing here samples or grades.
"""

import math
from collections.abc import Sequence

import numpy as np

from ..errors import InputError


def _check_counts(num_samples: int, num_correct: int) -> None:
    if num_samples < 1:
        raise InputError(f"num_samples must be at least 1, got {num_samples}")
    if not 0 <= num_correct <= num_samples:
        raise InputError(f"num_correct must lie between 0 and num_samples = {num_samples}, got {num_correct}")


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Return the chance that at least one of `k` samples is right, estimated without bias from `num_samples` samples.

        1 - C(num_samples - num_correct, k) / C(num_samples, k)

    This is the share of all k-subsets that hold a right sample (Chen et al., arXiv 2107.03374). The estimate `1 - (1 -
    p)^k` is biased low. Numbers stay whole up to the last division, so a tiny share keeps its digits.

    Returns:
        A probability in [0, 1].

    Raises:
        InputError: `k` lies outside 1..num_samples, or `num_correct` outside 0..num_samples.
    """
    _check_counts(num_samples, num_correct)
    if not 1 <= k <= num_samples:
        raise InputError(f"k must lie between 1 and num_samples = {num_samples}, got {k}")
    num_samples, num_correct, k = int(num_samples), int(num_correct), int(k)
    subsets = math.comb(num_samples, k)
    return (subsets - math.comb(num_samples - num_correct, k)) / subsets


def avg_at_k(num_samples: int, num_correct: int) -> float:
    """Return the share of one problem's samples that are right: avg@k for `k = num_samples`, equal to pass@1."""
    _check_counts(num_samples, num_correct)
    return num_correct / num_samples


def powers_of_two(limit: int) -> list[int]:
    """Return 1, 2, 4, ... up to `limit`: the values of k that we report."""
    return [2**exponent for exponent in range(int(limit).bit_length())]


def group_signal(num_samples: int | Sequence[int], num_correct: Sequence[int]) -> dict[str, float]:
    """Return how many groups can teach a group-relative method (GRPO) anything.

    The advantages of a group whose samples all earn the same reward are zero, so only mixed groups have a gradient.

    Args:
        num_samples: number of samples in each group, or one number for all groups.
        num_correct: number of right samples in each group.

    Returns:
        `{"all_right", "all_wrong", "mixed"}`: shares of groups, which sum to 1; NaN without groups.
    """
    if isinstance(num_samples, int | np.integer):
        num_samples = [num_samples] * len(num_correct)
    if len(num_samples) != len(num_correct):
        raise InputError(f"num_samples has {len(num_samples)} groups, num_correct {len(num_correct)}")
    for total, right in zip(num_samples, num_correct, strict=True):
        _check_counts(total, right)
    groups = len(num_correct)
    all_right = sum(right == total for total, right in zip(num_samples, num_correct, strict=True))
    all_wrong = sum(right == 0 for right in num_correct)
    counts = {"all_right": all_right, "all_wrong": all_wrong, "mixed": groups - all_right - all_wrong}
    return {name: count / groups if groups else math.nan for name, count in counts.items()}


def expected_group_variance(success_rate: float, group_size: int) -> float:
    """Return the expected variance of the 0/1 rewards inside a group, `p (1 - p) (g - 1) / g` (arXiv 2606.18487).

    p is the chance that a sample is right, in [0, 1], and g the number of samples. The variance divides by g.
    """
    if not 0 <= success_rate <= 1:
        raise InputError(f"success_rate must lie between 0 and 1, got {success_rate}")
    if group_size < 1:
        raise InputError(f"group_size must be at least 1, got {group_size}")
    return success_rate * (1 - success_rate) * (group_size - 1) / group_size
