"""Record a finished chain run without its weights, so that a report can lay other runs over it.

    python scripts/record_run.py RUN... --output recipes/skills-tiny/results/first [--samples]

Copies what the report reads (figures, selection, handoff, settings) of `.../<arm>/seed-<n>` to
`<output>/<arm>/seed-<n>`; with `--samples` also the samples of the base, the selected and the last step. A shared SFT
folder is copied into each record.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

from aesl_trl import files


SFT_FILES = (files.RUN, files.POSITIONS, files.DIVERSITY)
RUN_FILES = (files.SELECTION, files.HANDOFF, files.EVALUATION)
STATE_KEYS = ("global_step", "max_steps", "log_history")  # the keys of trainer_state.json that a report reads


def copy_json(source: Path, target: Path, run: Path) -> None:
    """Copy a file, with the paths of this machine made relative to the run."""
    text = source.read_text(encoding="utf-8").replace(f"{run.resolve().parents[3]}{os.sep}", "")
    files.write_text(target, text)


def copy_state(source: Path, target: Path) -> None:
    """Copy what a report reads of trainer_state.json, with six digits of each figure."""
    state = files.read_json(source)
    rows = [{key: _short(value) for key, value in row.items()} for row in state["log_history"]]
    kept = {**{key: state[key] for key in STATE_KEYS}, "log_history": rows}
    files.write_text(target, json.dumps(files.to_json(kept)) + "\n")


def _short(value):
    return float(f"{value:.6g}") if isinstance(value, float) else value


def record(path: Path, target: Path, with_samples: bool) -> None:
    shutil.rmtree(target, ignore_errors=True)
    run = files.RunFolder(path)
    chain = files.read_json(path / files.CHAIN)
    unfinished = [name for name, stage in chain["stages"].items() if stage["status"] != "done"]
    if unfinished:
        raise SystemExit(f"{path}: not finished: {', '.join(unfinished)}")
    copies = {path / name: target / name for name in RUN_FILES if (path / name).exists()}
    copies[files.own_folder(path / files.GRPO_DIR) / files.RUN] = target / files.GRPO_DIR / files.RUN
    copy_state(path / files.GRPO_DIR / files.TRAINER_STATE, target / files.GRPO_DIR / files.TRAINER_STATE)
    if chain["sft_dir"]:
        own = files.own_folder(run.sft)
        copies |= {own / name: target / "sft" / name for name in SFT_FILES}
        copy_state(own / files.TRAINER_STATE, target / "sft" / files.TRAINER_STATE)
        if with_samples:
            found = run.sample_files
            for step in {min(found), max(found), run.object(files.SELECTION)["step"]}:
                copies[found[step]] = target / "sft" / files.SAMPLES / found[step].name
        chain["sft_dir"] = "sft"
    for source, copy in copies.items():
        copy_json(source, copy, path)
    files.write_json(target / files.CHAIN, chain)
    copy_json(target / files.CHAIN, target / files.CHAIN, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--samples", action="store_true")
    args = parser.parse_args()
    for run in args.runs:
        target = args.output / run.resolve().parent.name / run.resolve().name
        record(run, target, args.samples)
        print(target)


if __name__ == "__main__":
    main()
