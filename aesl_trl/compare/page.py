"""compare.json as markdown: the tables of a comparison, and what its intervals mean. Nothing is computed here."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from ..diversity.intervals import with_interval
from ..report.parts import markdown_table


TITLES = {"entropy": "entropy (nats)", "self_bleu": "self-BLEU", "groups_mixed": "mixed groups"}
NAMED = 12  # cells; where there are more, they are counted by row


def page(result: dict[str, Any], plots: Sequence[str]) -> str:
    """Return the tables, with how to read them and where they come from."""
    rows = result["rows"]
    unit = _unit(result)
    parts = [
        f"# Comparison: {result['metric']} after RL",
        f"Mean over {unit}s and, in brackets, its {result['level']:.0%} t interval (Student's t, n - 1 degrees of "
        f"freedom, of shares on the scale of log-odds; the unit is the {unit}, and the intervals are not adjusted for "
        "the number of rows). Before RL: the model that RL starts from; after: the one it ends with, on the same "
        "held-out problems.",
        "## Before RL",
        _figures_table(rows, "before", result),
        "## After RL",
        _figures_table(rows, "after", result),
        *_notes(rows, result),
        *_base_parts(result),
        *_difference_parts(result),
        "## Score and diversity before RL, and the result after it",
        _correlation_table(result),
        *(f"![{name}]({name})" for name in plots),
        *_tuning_parts(result),
        "## Cells",
        _cells_part(result),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def interval(found: dict[str, Any]) -> str:
    """Return `0.960 [0.945, 0.975]`, without the brackets where one seed gives no interval."""
    return with_interval(found["mean"], (found["low"], found["high"]), 3)


def number(value: float | None) -> str:
    """Return a figure with three decimals."""
    return with_interval(value, None, 3)


def _unit(result: dict[str, Any]) -> str:
    return "start" if _bases(result) else "seed"


def _bases(result: dict[str, Any]) -> list[str]:
    """Return the names of the base models; none where there is only that of the configs."""
    return list(dict.fromkeys(base for row in result["rows"] for base in row.get("bases", {}) if base))


def _figures_table(rows: list[dict], when: str, result: dict[str, Any]) -> str:
    names, lines = result["figures"], []
    noise, counts = _has(rows, "rl_noise", "sd"), _has(rows, "solved", "of")
    for row in rows:
        known = sorted({step for step in row["steps"] if step is not None})
        ends = dict.fromkeys([*known[:1], *known[-1:]])  # one number where all seeds agree
        steps = ["..".join(map(str, ends)) or "-"] if when == "before" else []
        more = []
        if when == "after":
            more += [number(row["rl_noise"]["sd"]), str(sum(row["runs"]))] if noise else []
            more += [_solved(row["solved"])] if counts else []
        figures = [interval(row[when][name]) for name in names]
        lines.append([row["row"], str(len(row["seeds"])), *steps, *figures, *more])
    head = ["RL starts from", f"{_unit(result)}s", *(["SFT step"] if when == "before" else [])]
    head += [TITLES.get(name, name) for name in names]
    if when == "after":
        head += ["RL's own sd", "RL runs"] if noise else []
        head += [f"{_counted(rows)} solved"] if counts else []
    return markdown_table(head, lines)


def _has(rows: list[dict], key: str, inner: str) -> bool:
    """Return whether any row knows a figure; comparisons of older versions lack these keys."""
    return any((row.get(key) or {}).get(inner) for row in rows)


def _counted(rows: list[dict]) -> str:
    """Return what is counted as solved: the values of a column, which give it its name, or problems."""
    return next((row["solved"]["by"] for row in rows if row["solved"] and row["solved"]["by"]), "problems")


def _solved(found: dict[str, int] | None) -> str:
    if found is None:
        return "-"
    mixed = f", {found['mixed']} mixed" if found["mixed"] else ""
    return f"{found['right']} of {found['of']}{mixed}"


def _notes(rows: list[dict], result: dict[str, Any]) -> list[str]:
    notes = []
    if _has(rows, "rl_noise", "sd"):
        notes.append(
            f"RL was run several times from each start: a {_unit(result)}'s figure is the mean of its runs. RL's own "
            f"sd is that of {result['metric']} over runs from one start, pooled over the starts of the row."
        )
    if _has(rows, "solved", "of"):
        by = _counted(rows)
        is_solved = "all of their samples are right, of mixed ones only some are"
        is_solved = is_solved if by == "problems" else "at least half of the samples of its problems are right"
        notes.append(f"{by.capitalize()} solved after RL, counted over all RL runs: {is_solved}.")
    return [" ".join(notes)] if notes else []


def _base_parts(result: dict[str, Any]) -> list[str]:
    bases, metric = _bases(result), result["metric"]
    if not bases:
        return []
    lines = []
    for row in result["rows"]:
        found = [row["bases"].get(base) for base in bases]
        lines.append([row["row"], *(f"{interval(each)} ({each['n']})" if each else "-" for each in found)])
    return [
        f"## {metric} after RL by base model",
        markdown_table(["RL starts from", *bases], lines),
        "In parentheses: the number of seeds. The bases are those that the config names, and no sample of others: the "
        "intervals say how other seeds of these would come out.",
    ]


def _difference_parts(result: dict[str, Any]) -> list[str]:
    metric, parts, unit = result["metric"], [], _unit(result)
    words = {None: "-", True: "yes", False: "no"}
    for name in result["reference"]:
        lines = []
        for row in result["rows"]:
            if (found := row["differences"].get(name, {}).get("after", {}).get(metric)) is None:
                continue
            needed, adjusted = found["seeds_to_decide"], found.get("p_holm")
            beyond = "-" if found["decided"] is None else "over 1000"
            to_decide = beyond if needed is None else str(needed)
            decided = [words[found["decided"]], words[None if adjusted is None else adjusted < 1 - result["level"]]]
            p_values = [number(found.get(key)) for key in ("permutation_p", "permutation_p_holm")]
            figures = [interval(found), number(found["sd"]), str(found["n"])]
            lines.append([row["row"], *figures, *decided, *p_values, to_decide])
        head = ["RL starts from", "difference", "sd", f"{unit}s", "decided", "decided, Holm", "permutation p"]
        head += ["p, Holm", f"{unit}s to decide"]
        parts += [f"## {metric} after RL: paired difference to {name}", markdown_table(head, lines)]
    if parts:
        parts.append(
            f"Differences are taken {unit} by {unit}. Decided: the interval excludes zero. Decided, Holm: the p of "
            "its t test is below 0.05 after Holm's adjustment for the number of rows in the table, in which rows "
            "that are the same runs count once. Permutation p: unpaired and two-sided, the share of the ways to hand "
            f"out both rows' values, of the {unit}s that both have, whose means differ as much; beside it the same "
            "after Holm. "
            f"{unit.capitalize()}s to decide: the smallest n with t(0.975, n - 1) * sd / sqrt(n) below the observed "
            "difference; at that n a difference of this size is found in about half of all repetitions."
        )
    return parts


def _correlation_table(result: dict[str, Any]) -> str:
    head = [f"before RL, against {result['metric']} after", "Spearman", "95% interval", "cells", "rows"]
    lines = []
    for found in result["correlations"]:
        rho, _, brackets = with_interval(found["rho"], (found["low"], found["high"])).partition(" ")
        name = TITLES.get(found["figure"], found["figure"])
        lines.append([name, rho, brackets or "-", str(found["cells"]), str(found["rows"])])
    unit = _unit(result)
    note = (
        f"Percentile bootstrap over rows, each with all its {unit}s. Selections that came to one step are one point."
    )
    return f"{markdown_table(head, lines)}\n\n{note}"


def _tuning_parts(result: dict[str, Any]) -> list[str]:
    tuning = result["tuning"]
    if tuning is None:
        return []
    lines = []
    for line in tuning["rows"]:
        for point in line["points"]:
            values = " ".join(number(value) for value in point["values"]) or "-"
            mark = "chosen" if point["point"] == line["chosen"] else ""
            mark += f", {line['edge']} rate tried" if mark and line.get("edge") else ""
            lines.append([line["row"], point["point"], number(point["mean"]), values, mark])
    seeds = ", ".join(map(str, tuning["seeds"]))
    going_on = f"; the best {tuning['keep']} of each went on to the next seed" if tuning.get("keep") else ""
    base = f" of base {tuning['base']}" if tuning.get("base") else ""
    unused = "a base and seeds" if base else "seeds"
    added = [f"{line['row']} ({len(line['added'])})" for line in tuning["rows"] if line.get("added")]
    edges = [line["row"] for line in tuning["rows"] if line.get("edge")]
    notes = [
        f"Every row's grid had the same number of points, on {unused} that the tables above do not use{going_on}. "
        "A point of which a seed failed cannot be chosen."
    ]
    if added:
        notes.append(f"Points beyond the edge of the grid, where the best lay, were added for {', '.join(added)}.")
    if edges:
        notes.append(f"**The best still lies at an edge** for {', '.join(edges)}: a better rate may lie beyond.")
    return [
        f"## Tuning: {tuning['by']} after RL on seeds {seeds}{base}",
        markdown_table(["row", "point", "mean", "seeds", ""], lines),
        " ".join(notes),
    ]


def _cells_part(result: dict[str, Any]) -> str:
    cells = result["cells"]
    own = [cell for cell in cells if cell["same_as"] is None]
    # Cells that share a cold start say its seconds again.
    place = ("base", "setting", "method", "point", "seed")
    shared = {tuple(cell.get(key) for key in place): cell["seconds"] for cell in cells}
    seconds = sum(stages.get("sft", 0.0) for stages in shared.values())
    seconds += sum(value for cell in own for name, value in cell["seconds"].items() if name != "sft")
    lines = [
        f"{len(cells)} cells are finished, {len(own)} of them runs of their own: {seconds / 3600:.2f} process-hours "
        "without tuning, cold starts counted once (compare.json has each cell's figures, seconds, command and commit)."
    ]
    for key, title in (("hardware", "Hardware"), ("commit", "Commit"), ("command", "Command")):
        known = sorted({text for cell in own for text in cell["provenance"][key] or [] if text})
        lines.append(f"{title}: {'; '.join(f'`{text}`' for text in known) or 'not recorded'}.")
    if result["missing"]:
        lines.append(f"**Not finished**, and not in the tables: {_named(result['missing'])}.")
    if outdated := [cell.get("label") or f"{cell['row']}, seed {cell['seed']}" for cell in cells if cell["outdated"]]:
        lines.append(
            f"**Run from other configs, data or code than these are now**, and in the tables: {_named(outdated)}."
        )
    return "\n\n".join(lines)


def _named(labels: Sequence[str]) -> str:
    """Return the labels of cells; where they are many, those with a reason, and the others counted by row."""
    if len(labels) <= NAMED:
        return "; ".join(labels)
    failed = [label for label in labels if label.endswith(")")]
    counts = Counter(label.split(",")[0] for label in labels if label not in failed)
    return "; ".join([*failed, *(f"{row} x {count}" for row, count in counts.items())])
