"""Own samples -> figures, turning point, readiness, selection; numbers only, no torch."""

from .bleu import self_bleu
from .figures import Group, by_prompt, distinct_n, intervals, measure
from .intervals import paired_interval
from .passk import avg_at_k, group_signal, pass_at_k
from .selection import select_run
from .turning_point import Selection, find_turning_point


__all__ = [
    "Group",
    "Selection",
    "avg_at_k",
    "by_prompt",
    "distinct_n",
    "find_turning_point",
    "group_signal",
    "intervals",
    "measure",
    "paired_interval",
    "pass_at_k",
    "select_run",
    "self_bleu",
]
