"""Measure, before any RL, what cold starts do to SmolLM2-135M along SFT: nll, AESL at t_scaling 3, and at auto.

    python scripts/premise_curves.py [--base DIR] [--arms nll aesl_3 aesl_auto] [--seeds 0 1 2] [any flag of aesl sft]

Each cell, one arm at one seed, is a training by the recipe's own config. It is recorded as soon as it has finished, in
OUTPUT/DIGEST/<arm>-seed-<n>.json: loss / nll, held-out nll, and at each measured step entropy and self-BLEU of own
samples, pass@k, and the coverage lost against the base, beyond what two samplings of the base differ by. DIGEST stands
for the base, the configs, task.py and the flags, so other flags make another set and no record is overwritten. A
training that is there is not run again, and one that was cut off goes on. premises.md and premises.png show the
recorded cells of the set; nine make it whole.

The premises, which a seed needs all of (recipes/SmolLM2-135M-Instruct/DECISION.md): the nll of held-out demonstrations
begins at 0.6 or more, that of the trained ones ends below 0.15, AESL's loss / nll ends below 0.7, nll's last step has
lost at least 0.05 of the base's coverage, and of each start's samples at least 0.95 end within 96 tokens. The starts
are the base, each arm's turning point and each arm's last step. Where a recorded cell fails a premise, the exit code
is 1, except that AESL at t_scaling 3 may fail to act.
"""

import argparse
import subprocess
import sys
from functools import partial
from pathlib import Path

from check_premises import MAX_EFFECTIVE, MIN_LOST
from recipe_task import RECIPES, digest_of_files

from aesl_trl.diversity.coverage import GAINED, LOST
from aesl_trl.files import (
    DIVERSITY,
    SELECTION,
    TRAINER_STATE,
    RunFolder,
    own_folder,
    read_json,
    write_bytes,
    write_json,
    write_text,
)
from aesl_trl.report.parts import LIGHT, Panel, markdown_table, mean, name_ends, png, y_axis


RECIPE = RECIPES / "SmolLM2-135M-Instruct"
ARMS = {"nll": "config_nll.yaml", "aesl_3": "config_aesl.yaml", "aesl_auto": "config_aesl_auto.yaml"}
COLOURS = {"nll": "nll", "aesl_3": "aesl", "aesl_auto": "other1"}
START_NLL, END_NLL, MAX_CUT_OFF = 0.6, 0.15, 0.05
MAY_FAIL = {"aesl_3 acts"}  # that arm is told as "this was nll", and the others go on
LOGGED = ("step", "loss", "nll", "weight_effective")
MEASURED = ("step", "entropy", "self_bleu", "pass@1", "pass@2", "pass@4", "pass@8", LOST, GAINED, "truncated")
PANELS = {
    "weight_effective": "loss / nll",
    "nll": "nll of the demonstrations",
    "entropy": "entropy of own samples",
    "self_bleu": "self-BLEU",
    LOST: "coverage lost",
    "pass@1": "pass@1",
}


def digest_of(base: Path, flags: list[str]) -> str:
    """Return a digest of all that a cell depends on but its arm and seed: base, configs, task and flags."""
    configs = (RECIPE / "sft" / name for name in ARMS.values())
    return digest_of_files([*base.glob("*.safetensors"), *configs, RECIPE / "task.py"], flags)


def train(arm: str, base: Path, seed: int, run: Path, flags: list[str]) -> RunFolder:
    if not (own_folder(run) / TRAINER_STATE).exists():  # written at the end
        given = {"config": RECIPE / "sft" / ARMS[arm], "model_name_or_path": base, "output_dir": run, "seed": seed}
        given |= {"resume_from_checkpoint": "true"} if run.exists() else {}
        command = [sys.executable, "-m", "aesl_trl.cli", "sft"]
        command += [str(part) for name, value in given.items() for part in (f"--{name}", value)]
        subprocess.run([*command, *flags], check=True)
    return RunFolder(run)


def record(arm: str, seed: int, run: RunFolder, digest: str, flags: list[str]) -> dict:
    """Return a finished cell's curves, and what they were measured with."""
    kept = lambda row, names: {name: row[name] for name in names if row.get(name) is not None}  # noqa: E731
    return {
        "arm": arm,
        "seed": seed,
        "digest": digest,
        "flags": flags,
        **kept(run.settings, ("t_scaling_found",)),
        "logged": [kept(row, LOGGED) for row in run.log if "nll" in row],
        "evaluated": [kept(row, ("step", "eval_nll")) for row in run.log if "eval_nll" in row],
        "selected": run.object(SELECTION).get("step"),
        "measured": [{**kept(row, MEASURED), "intervals": row.get("intervals", {})} for row in run.rows(DIVERSITY)],
    }


def premises(cells: dict[str, dict]) -> dict[str, bool]:
    """Return which premises hold at a seed, of whose arms `cells` has those that are recorded."""
    found = {}
    if "nll" in cells:
        at_start = [row["eval_nll"] for row in cells["nll"]["evaluated"] if row["step"] == 0]
        found["the demonstrations are new"] = bool(at_start) and at_start[0] >= START_NLL
        found["they are learnt"] = cells["nll"]["logged"][-1]["nll"] < END_NLL
        found["nll forgets"] = cells["nll"]["measured"][-1][LOST] >= MIN_LOST
    for arm, cell in cells.items():
        if arm != "nll":
            found[f"{arm} acts"] = cell["logged"][-1]["weight_effective"] < MAX_EFFECTIVE
        starts = {0, cell["selected"], cell["measured"][-1]["step"]}
        cut_off = [row["truncated"] for row in cell["measured"] if row["step"] in starts]
        found[f"{arm}'s samples end"] = max(cut_off) <= MAX_CUT_OFF
    return dict(sorted(found.items()))


def failing(cells: list[dict]) -> list[str]:
    """Return the premises that fail at some seed, but for those that may."""
    found = set()
    for seed in {cell["seed"] for cell in cells}:
        held = premises({cell["arm"]: cell for cell in cells if cell["seed"] == seed})
        found |= {name for name, holds in held.items() if not holds}
    return sorted(found - MAY_FAIL)


def table(cells: list[dict]) -> str:
    """Return each cell's last step as a markdown table, and below it what holds at each seed."""
    names = {"nll": "nll", "weight_effective": "loss / nll", "entropy": "entropy", "self_bleu": "self-BLEU"}
    names |= {LOST: "coverage lost", "pass@1": "pass@1", "pass@8": "pass@8"}
    lines = []
    for cell in cells:
        last = {**cell["logged"][-1], **cell["measured"][-1]}
        figures = [f"{last[name]:.2f}" if name in last else "" for name in names]
        lines.append([cell["arm"], str(cell["seed"]), *figures])
    text = [markdown_table(["arm", "seed", *names.values()], lines)]
    for seed in sorted({cell["seed"] for cell in cells}):
        held = premises({cell["arm"]: cell for cell in cells if cell["seed"] == seed})
        said = "; ".join(f"{name}: {'holds' if holds else '**fails**'}" for name, holds in held.items())
        text.append(f"Seed {seed}. {said}.")
    return "\n\n".join(text) + "\n"


def series(cell: dict, name: str) -> dict[int, float]:
    rows = cell["measured"] if any(name in row for row in cell["measured"]) else cell["logged"]
    return {row["step"]: row[name] for row in rows if name in row}


def draw(ax, name: str, cells: list[dict]) -> None:
    """Draw one figure along SFT: a thin line for each seed, a thick one for an arm's mean over its seeds."""
    ends = []
    for arm in [arm for arm in ARMS if any(cell["arm"] == arm for cell in cells)]:
        seeds, colour = [series(cell, name) for cell in cells if cell["arm"] == arm], LIGHT[COLOURS[arm]]
        steps = sorted(set.intersection(*map(set, seeds)))
        for seed in seeds:
            ax.plot(list(seed), list(seed.values()), color=colour, linewidth=0.8, alpha=0.4)
        means = [mean([seed[step] for seed in seeds]) for step in steps]
        ax.plot(steps, means, color=colour, linewidth=2)
        ends += [(steps[-1], means[-1], arm, colour)] if steps else []
    y_axis(ax)
    ax.set_xlabel("SFT step")
    name_ends(ax, ends)


def show(output: Path) -> list[dict]:
    """Write premises.md and premises.png of all cells in `output`, and return the cells."""
    cells = [read_json(path) for path in output.glob("*-seed-*.json")]
    cells.sort(key=lambda cell: (cell["seed"], list(ARMS).index(cell["arm"])))
    write_text(output / "premises.md", table(cells))
    panels = [Panel(title, partial(draw, name=name, cells=cells)) for name, title in PANELS.items()]
    write_bytes(output / "premises.png", png(panels))
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    runs = RECIPES.parent / "runs" / RECIPE.name
    parser.add_argument("--base", type=Path, default=runs / "base/seed-0", help="the base of build_smollm2_base.py")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="what is trained")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of data and training")
    parser.add_argument("--work_dir", type=Path, default=runs / "premises", help="folder of the trainings")
    parser.add_argument("--output", type=Path, default=RECIPE / "results/premises", help="folder of the records")
    given, flags = parser.parse_known_args()
    digest = digest_of(given.base, flags)
    output = given.output / digest
    output.mkdir(parents=True, exist_ok=True)
    for seed in given.seeds:
        for arm in given.arms:
            run = train(arm, given.base, seed, given.work_dir / digest / f"{arm}-seed-{seed}", flags)
            write_json(output / f"{arm}-seed-{seed}.json", record(arm, seed, run, digest, flags))
            cells = show(output)
    print((output / "premises.md").read_text(encoding="utf-8"))
    sys.exit(1 if failing(cells) else 0)


if __name__ == "__main__":
    main()
