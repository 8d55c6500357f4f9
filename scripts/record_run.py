"""Record a finished chain run without its weights, so that a report can lay other runs over it.

    python scripts/record_run.py RUN... --output recipes/skills-tiny/results [--samples]

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
STATE_KEYS = ("global_step", "max_steps", "log_history")  # of trainer_state.json: what a report reads


def copy_json(source: Path, target: Path, run: Path) -> None:
    """A copy in which paths of this machine are relative to the run."""
    text = source.read_text(encoding="utf-8").replace(f"{run.resolve().parents[3]}{os.sep}", "")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")


def copy_state(source: Path, target: Path) -> None:
    state = files.read_json(source)
    rows = [{key: _short(value) for key, value in row.items()} for row in state["log_history"]]
    target.parent.mkdir(parents=True, exist_ok=True)
    kept = {**{key: state[key] for key in STATE_KEYS}, "log_history": rows}
    target.write_text(json.dumps(files.to_json(kept)) + "\n", encoding="utf-8")


def _short(value):
    return float(f"{value:.6g}") if isinstance(value, float) else value


def record(run: Path, target: Path, with_samples: bool) -> None:
    shutil.rmtree(target, ignore_errors=True)
    chain = files.read_json(run / files.CHAIN)
    unfinished = [name for name, stage in chain["stages"].items() if stage["status"] != "done"]
    if unfinished:
        raise SystemExit(f"{run}: not finished: {', '.join(unfinished)}")
    for name in RUN_FILES:
        if (run / name).exists():
            copy_json(run / name, target / name, run)
    for name in (files.RUN, files.TRAINER_STATE):
        copy = copy_json if name == files.RUN else lambda source, place, _: copy_state(source, place)
        copy(run / "grpo" / name, target / "grpo" / name, run)
    if chain["sft_dir"]:
        sft = run / chain["sft_dir"]
        for name in SFT_FILES:
            copy_json(sft / name, target / "sft" / name, run)
        copy_state(sft / files.TRAINER_STATE, target / "sft" / files.TRAINER_STATE)
        if with_samples:
            copy_samples(run, sft, target)
        chain["sft_dir"] = "sft"
    files.write_json(target / files.CHAIN, chain)
    copy_json(target / files.CHAIN, target / files.CHAIN, run)


def copy_samples(run: Path, sft: Path, target: Path) -> None:
    steps = sorted(int(path.stem.removeprefix("step-")) for path in (sft / files.SAMPLES).glob("step-*.jsonl"))
    for step in {steps[0], steps[-1], files.read_json(run / files.SELECTION)["step"]}:
        name = f"{files.SAMPLES}/step-{step}.jsonl"
        copy_json(sft / name, target / "sft" / name, run)


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
