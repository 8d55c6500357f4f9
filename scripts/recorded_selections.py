"""Which step each rule takes of the recorded series of skills-tiny, and what RL made of it, as a markdown table.

    python scripts/recorded_selections.py     # the table of docs/turning_point.md

A series is a cold start's diversity.jsonl with its log; all measured steps but the base's count as saved. It is read
whole, and cut so that only its rise, or only its fall, is seen. RL's result is the mean over seeds of pass@1 after RL
from that step of that cold start, where results/first/compare.json or results/first/steps/compare.json hold it.
"""

import math
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from aesl_trl import files
from aesl_trl.diversity.selection import select_checkpoint


RESULTS = Path(__file__).parents[1] / "recipes/skills-tiny/results/first"
SERIES = {"nll": "nll_last", "aesl": "aesl_last", "aesl_lora": "aesl_lora_last"}  # method -> folder of its series
CUTS = {"whole": (0, math.inf), "steps 0 to 30": (0, 30), "from step 40 on": (40, math.inf)}
RULES = {"default of 0.1.0": None, "default": "turning_point", "last": "last", "best_eval": "best_eval"}


def recorded_series() -> dict[str, list[tuple[int, list[dict], list[dict]]]]:
    """Return by name the seeds of each series with their rows and logs."""
    found = {}
    for method, arm in SERIES.items():
        runs = {path.name.removeprefix("seed-"): files.RunFolder(path) for path in sorted((RESULTS / arm).iterdir())}
        found[method] = [(int(seed), run.rows(files.DIVERSITY), run.log) for seed, run in runs.items()]
    for path in sorted((RESULTS / "by_prompt").iterdir()):
        known = files.read_json(path)
        rows = [{"step": step, "by_prompt": {}} for step in known["steps"]]
        for metric in ("entropy", "self_bleu"):
            for row, values in zip(rows, known[metric], strict=True):
                row["by_prompt"][metric], row[metric] = values, float(np.mean(values))
        log = files.RunFolder(RESULTS / SERIES[known["loss"]] / f"seed-{known['seed']}").log
        found[f"{known['loss']}, without rewards"] = [(known["seed"], rows, log)]
    return found


def results_of_rl() -> dict[tuple[str, int, int], float]:
    """Return pass@1 after RL by method, step and seed: the mean of the runs from that start."""
    runs = defaultdict(list)
    for path in (RESULTS / "compare.json", RESULTS / "steps/compare.json"):
        for cell in files.read_json(path)["cells"]:
            if cell["same_as"] is None:
                runs[cell["method"], cell["step"], cell["seed"]].append(cell["after"]["pass@1"])
    return {start: float(np.mean(values)) for start, values in runs.items()}


def chosen_by(rule: str | None, method: str, rows: list[dict], log: list[dict]) -> dict:
    """Select by a rule; None is the default of 0.1.0: AESL's last step, and best_eval of an undetermined series."""
    candidates = [row["step"] for row in rows if row["step"] > 0]
    if rule is None and method.startswith("aesl"):
        rule = "last"
    elif rule is None:
        chosen = select_checkpoint(rows, log, candidates, rule="turning_point")
        return chosen if chosen["applied"] == "turning_point" else chosen_by("best_eval", method, rows, log)
    return select_checkpoint(rows, log, candidates, rule=rule)


def counted(texts) -> str:
    """Join the texts of the seeds, each with its number where they differ."""
    counts = Counter(texts)
    return ", ".join(text if len(counts) == 1 else f"{text} ({count}x)" for text, count in counts.items())


def table_row(
    method: str, runs: list, first: float, last: float, after: dict[tuple[str, int, int], float]
) -> list[str]:
    """Return the verdict, and for each rule the steps and what RL made of them, at the seeds known to all rules."""
    chosen, verdicts = defaultdict(dict), []
    for seed, rows, log in runs:
        seen = [[row for row in each if first <= row["step"] <= last] for each in (rows, log)]
        for column, rule in RULES.items():
            chosen[column][seed] = chosen_by(rule, method, *seen)
        verdicts.append(chosen["default"][seed]["evidence"]["turning_point"]["entropy"]["verdict"])
    ends = {
        column: {seed: after.get((method, one["step"], seed)) for seed, one in of.items()}
        for column, of in chosen.items()
    }
    known = [seed for seed, *_ in runs if all(of[seed] is not None for of in ends.values())]
    cells = [counted(verdicts), str(len(known))]
    for column, of in chosen.items():
        is_named = column == "default" and "turning_point" not in {one["applied"] for one in of.values()}
        steps = counted(f"{one['step']}, by {one['applied']}" if is_named else str(one["step"]) for one in of.values())
        cells += [steps, f"{np.mean([ends[column][seed] for seed in known]):.2f}" if known else "-"]
    return cells


def main() -> None:
    after = results_of_rl()
    head = ["series", "seeds", "measured", "verdict", "seeds with RL"]
    head += [text for rule in RULES for text in (rule, "after RL")]
    print(f"| {' | '.join(head)} |")
    print("| --- " * len(head) + "|")
    for name, runs in recorded_series().items():
        for cut, (first, last) in CUTS.items():
            cells = [name, str(len(runs)), cut, *table_row(name.split(",")[0], runs, first, last, after)]
            print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
