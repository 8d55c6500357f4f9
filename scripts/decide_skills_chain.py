"""Answer what recipes/skills-chain-tiny/DECISION.md asks, from the table of its comparison.

    python scripts/decide_skills_chain.py runs/skills-chain-tiny/compare/compare.json

Prints the contrasts with their verdicts, and the start that is recommended. A unit is a start, one base and one seed,
with the mean of its RL runs. Intervals are those of `aesl compare`: paired, Student's t. p is that of the permutation
of units inside each base. Holm's correction is over the four contrasts; for the recommendation it is over all pairs of
rows, so that it is the stricter one. Where a unit lacks a run, the script names it, decides nothing, and ends with
exit code 1.
"""

import argparse
import itertools
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from aesl_trl import files
from aesl_trl.compare.table import paired, starts_of
from aesl_trl.diversity.intervals import holm, permutation_p, with_interval
from aesl_trl.errors import exit_on_input_error


METRIC = "pass@1"
MARGIN, LEVEL = 0.02, 0.05
UNITS = [(f"base-{base}", seed) for base in range(3) for seed in range(3)]
NAMES = {
    "base": "direct RL",
    "nll/last": "nll, last",
    "nll/turning_point": "nll, turning point",
    "nll/mix": "WiSE-FT",
    "aesl/last": "AESL 3, last",
    "aesl/turning_point": "AESL 3, turning point",
    "aesl_auto/last": "AESL auto, last",
}


def better(mean: float, low: float, high: float, p: float | None) -> str:
    """Return the verdict on a claim that the first row ends higher."""
    if is_higher(mean, p):
        return "supported"
    return "refuted at this scale" if high < MARGIN else "not decided by nine units"


def as_good(mean: float, low: float, high: float, p: float | None) -> str:
    """Return the verdict on a claim that the first row ends as high."""
    if low > -MARGIN:
        return "supported, and better" if low > 0 else "supported"
    return "refuted at this scale" if high < 0 else "not decided by nine units"


def is_higher(mean: float, p: float | None) -> bool:
    return p is not None and p < LEVEL and mean >= MARGIN


CONTRASTS = [
    ("nll/turning_point", "nll/last", "stopping by diversity helps", better),
    ("aesl_auto/last", "nll/turning_point", "AESL is as good as stopping", as_good),
    ("aesl/turning_point", "aesl/last", "AESL too wants to be stopped", better),
    ("nll/mix", "nll/turning_point", "averaging beats stopping", better),
]
RECOMMENDABLE = ["nll/last", "nll/turning_point", "aesl_auto/last", "aesl/turning_point", "nll/mix"]  # in this order


@dataclass
class Difference:
    """What one row ends above another."""

    mean: float
    low: float
    high: float
    p: float | None  # None where both rows are the same runs

    def __str__(self) -> str:
        return with_interval(self.mean, (self.low, self.high))


def units_of(cells: list[dict]) -> dict[str, dict[tuple, float]]:
    """Return the figure of each unit, by row."""
    found: dict[str, dict[tuple, float]] = {row: {} for row in NAMES}
    for start in starts_of(cells):
        found[start["row"]][start["base"], start["seed"]] = start["after"][METRIC]
    return found


def missing(cells: list[dict], runs: int) -> list[str]:
    """Return what is left to run, row by row."""
    counts = dict.fromkeys(itertools.product(NAMES, UNITS), 0)
    for cell in cells:
        counts[cell["row"], (cell["base"], cell["seed"])] += 1
    return [f"{row} {base} seed {seed}" for (row, (base, seed)), count in counts.items() if count < runs]


def difference(ours: dict[tuple, float], theirs: dict[tuple, float]) -> Difference:
    found = paired(ours, theirs)
    bases = dict.fromkeys(base for base, _ in UNITS)
    strata = [tuple([row[unit] for unit in UNITS if unit[0] == base] for row in (ours, theirs)) for base in bases]
    p = None if ours == theirs else permutation_p(strata)
    return Difference(found["mean"], found["low"], found["high"], p)


def corrected(units: dict[str, dict[tuple, float]], pairs: Iterable[tuple[str, str]]) -> dict[frozenset, float | None]:
    """Return Holm's adjusted p of each pair of rows, which are one family; two rows of the same runs do not count."""
    values = {frozenset(pair): difference(*(units[row] for row in pair)).p for pair in pairs}
    family = {pair: p for pair, p in values.items() if p is not None}
    return values | dict(zip(family, holm(list(family.values())), strict=True))


def contrasts(units: dict[str, dict[tuple, float]]) -> str:
    adjusted = corrected(units, [(ours, theirs) for ours, theirs, *_ in CONTRASTS])
    lines = ["| contrast | difference | p | corrected | claim | verdict |", "| --- | ---: | ---: | ---: | --- | --- |"]
    for ours, theirs, claim, verdict in CONTRASTS:
        found, p = difference(units[ours], units[theirs]), adjusted[frozenset((ours, theirs))]
        lines.append(
            f"| {NAMES[ours]} - {NAMES[theirs]} | {found} | {shown(found.p)} | {shown(p)} | {claim} "
            f"| {verdict(found.mean, found.low, found.high, p)} |"
        )
    return "\n".join(lines)


def shown(p: float | None) -> str:
    return "-" if p is None else f"{p:.4f}"


def recommended(units: dict[str, dict[tuple, float]]) -> tuple[str, list[str]]:
    """Return the row that is recommended, and why each one before it in the list is not."""
    adjusted = corrected(units, itertools.combinations(NAMES, 2))
    reasons = []
    for row in RECOMMENDABLE:
        above = [
            NAMES[other]
            for other in NAMES
            if other != row and is_higher(difference(units[other], units[row]).mean, adjusted[frozenset((other, row))])
        ]
        if not above:
            return row, reasons
        reasons.append(f"{NAMES[row]}: these ended higher: {'; '.join(above)}")
    return "base", reasons  # direct RL ended higher than every cold start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("compare", type=Path, help="compare.json, which aesl compare writes")
    parser.add_argument("--runs", type=int, default=2, help="RL runs of each start")
    args = parser.parse_args()
    cells = files.read_json(args.compare)["cells"]
    if lacking := missing(cells, args.runs):
        print(f"nothing is decided, runs are missing: {'; '.join(lacking)}")
        sys.exit(1)
    units = units_of(cells)
    row, reasons = recommended(units)
    print(f"{contrasts(units)}\n\nRecommended: {NAMES[row]}")
    print("\n".join(f"  - {reason}" for reason in reasons))


if __name__ == "__main__":
    exit_on_input_error("decide_skills_chain.py", main)
