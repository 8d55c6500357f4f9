"""compare.json as markdown: the tables of a comparison, and what its intervals mean. Nothing is computed here."""

import math
from collections.abc import Iterable, Sequence
from typing import Any


TITLES = {"entropy": "entropy (nats)", "self_bleu": "self-BLEU", "groups_mixed": "groups with signal"}


def page(result: dict[str, Any], plots: Sequence[str]) -> str:
    """The tables and, below them, how to read them and where they come from."""
    rows = result["rows"]
    parts = [
        f"# Comparison: {result['metric']} after RL",
        _reading(result),
        "## Before RL",
        _figures_table(rows, "before", result),
        "## After RL",
        _figures_table(rows, "after", result),
        *_difference_parts(result),
        "## Score and diversity before RL, and the result after it",
        _correlation_table(result),
        *(f"![{name}]({name})" for name in plots),
        *_tuning_parts(result),
        "## Cells",
        _cells_part(result),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _reading(result: dict[str, Any]) -> str:
    return (
        f"Mean over seeds and, in brackets, its {result['level']:.0%} t interval (Student's t, n - 1 degrees of "
        "freedom; the unit is the seed, and the intervals are not adjusted for the number of rows). Before RL: the "
        "model that RL starts from; after: the one it ends with, on the same held-out problems."
    )


def markdown_table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [list(head), ["---"] + ["---:"] * (len(head) - 1), *map(list, lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def interval(found: dict[str, Any]) -> str:
    """`0.960 [0.945, 0.975]`, the brackets left out where one seed gives no interval."""
    if found["mean"] is None:
        return "-"
    brackets = "" if found["low"] is None else f" [{number(found['low'])}, {number(found['high'])}]"
    return number(found["mean"]) + brackets


def _figures_table(rows: list[dict], when: str, result: dict[str, Any]) -> str:
    names = result["figures"]
    steps = ["SFT step"] if when == "before" else []
    head = ["RL starts from", "seeds", *steps, *(TITLES.get(name, name) for name in names)]
    return markdown_table(
        head,
        (
            [
                row["row"],
                str(len(row["seeds"])),
                *([_steps(row["steps"])] if steps else []),
                *(interval(row[when][name]) for name in names),
            ]
            for row in rows
        ),
    )


def _steps(steps: list[int | None]) -> str:
    """`30` where all seeds agree, else `20..40`."""
    known = sorted({step for step in steps if step is not None})
    if not known:
        return "-"
    return str(known[0]) if len(known) == 1 else f"{known[0]}..{known[-1]}"


def _difference_parts(result: dict[str, Any]) -> list[str]:
    metric, parts = result["metric"], []
    for name in result["reference"]:
        lines = []
        for row in result["rows"]:
            if (found := row["differences"].get(name, {}).get("after", {}).get(metric)) is None:
                continue
            decided = {None: "-", True: "yes", False: "no"}[found["decided"]]
            needed = found["seeds_to_decide"]
            beyond = "-" if found["decided"] is None else "over 1000"
            seeds = str(found["n"])
            lines.append(
                [
                    row["row"],
                    interval(found),
                    number(found["sd"]),
                    seeds,
                    decided,
                    beyond if needed is None else str(needed),
                ]
            )
        head = ["RL starts from", "difference", "sd", "seeds", "decided", "seeds to decide"]
        parts += [f"## {metric} after RL: paired difference to {name}", markdown_table(head, lines)]
    if parts:
        parts.append(
            "Differences are taken seed by seed. Decided: the interval excludes zero. Seeds to decide: the smallest n "
            "with t(0.975, n - 1) * sd / sqrt(n) below the observed difference; at that n a difference of this size "
            "is found in about half of all repetitions."
        )
    return parts


def _correlation_table(result: dict[str, Any]) -> str:
    head = [f"before RL, against {result['metric']} after", "Spearman", "95% interval", "cells", "rows"]
    table = markdown_table(
        head,
        (
            [
                TITLES.get(found["figure"], found["figure"]),
                number(found["rho"], 2),
                "-" if found["low"] is None else f"[{number(found['low'], 2)}, {number(found['high'], 2)}]",
                str(found["cells"]),
                str(found["rows"]),
            ]
            for found in result["correlations"]
        ),
    )
    note = "Percentile bootstrap over rows, each with all its seeds. Selections that came to one step are one point."
    return f"{table}\n\n{note}"


def _tuning_parts(result: dict[str, Any]) -> list[str]:
    tuning = result["tuning"]
    if tuning is None:
        return []
    lines = []
    for line in tuning["rows"]:
        for point in line["points"]:
            values = " ".join(number(value) for value in point["values"]) or "-"
            mark = "chosen" if point["point"] == line["chosen"] else ""
            lines.append([line["row"], point["point"], number(point["mean"]), values, mark])
    seeds = ", ".join(map(str, tuning["seeds"]))
    going_on = f"; the best {tuning['keep']} of each went on to the next seed" if tuning.get("keep") else ""
    return [
        f"## Tuning: {tuning['by']} after RL on seeds {seeds}",
        markdown_table(["row", "point", "mean", "seeds", ""], lines),
        f"Every row tried the same number of points, on seeds that the tables above do not use{going_on}. A point of "
        "which a seed failed cannot be chosen.",
    ]


def _cells_part(result: dict[str, Any]) -> str:
    cells = result["cells"]
    own = [cell for cell in cells if cell["same_as"] is None]
    hours = sum(sum(_without_sft(cell).values()) for cell in own) / 3600 + _sft_hours(cells)
    lines = [
        f"{len(cells)} cells are finished, {len(own)} of them runs of their own: {hours:.2f} process-hours without "
        "tuning, cold starts counted once (compare.json has each cell's figures, seconds, command and commit)."
    ]
    for key, title in (("hardware", "Hardware"), ("commit", "Commit"), ("command", "Command")):
        known = sorted({one for cell in own for one in cell["provenance"][key] or [] if one})
        lines.append(f"{title}: {'; '.join(f'`{one}`' for one in known) or 'not recorded'}.")
    if result["missing"]:
        lines.append(f"**Not finished**, and not in the tables: {'; '.join(result['missing'])}.")
    if outdated := [f"{cell['row']}, seed {cell['seed']}" for cell in cells if cell["outdated"]]:
        lines.append(
            f"**Run from other configs, data or code than these are now**, and in the tables: {'; '.join(outdated)}."
        )
    return "\n\n".join(lines)


def _without_sft(cell: dict) -> dict[str, float]:
    return {name: seconds for name, seconds in cell["seconds"].items() if name != "sft"}


def _sft_hours(cells: list[dict]) -> float:
    shared = {
        (cell["setting"], cell["method"], cell["point"], cell["seed"]): cell["seconds"].get("sft", 0.0)
        for cell in cells
    }
    return sum(shared.values()) / 3600
