"""Record a comparison's finished cells without their weights, so that it can be read, and go on, elsewhere.

    python scripts/record_compare.py runs/skills-chain-tiny/compare --output recipes/skills-chain-tiny/results/main
    cp -rn recipes/skills-chain-tiny/results/main/. runs/skills-chain-tiny/compare      # go on on another machine

Copies what `aesl compare` reads of each finished cell and of its cold start: configs, the record of the stages,
selection and evaluation. A comparison that finds them runs only the cells that are missing.
"""

import argparse
import os
from pathlib import Path

from aesl_trl import files
from aesl_trl.compare.cells import CELL, CHAIN_CONFIG, MIX_CONFIG, has_ended, source


CHECKOUT = Path(__file__).resolve().parents[1]
CELL_FILES = (CELL, CHAIN_CONFIG, MIX_CONFIG, files.CHAIN, files.SELECTION, files.EVALUATION)
STAGE_CONFIGS = ("grpo.yaml", "eval.yaml")  # of a base or a setting that changes them, beside its cells


def recorded(root: Path) -> list[Path]:
    """Return each file of the comparison in `root` that a table needs."""
    found = set()
    for home in (path.parent for path in root.rglob(CELL)):
        if not has_ended(home):
            continue
        found |= {home / name for name in CELL_FILES} | {home.parents[1] / name for name in STAGE_CONFIGS}
        sft_dir = files.read_object(source(home) / files.CHAIN).get("sft_dir")
        if sft_dir:
            run = (source(home) / sft_dir).resolve()
            found |= {run.parent.with_name(f"{run.parent.name}.yaml"), files.own_folder(run) / files.STAGE}
    return sorted(path for path in found if path.exists())


def record(root: Path, output: Path, checkout: Path = CHECKOUT) -> int:
    """Copy what is new, with paths relative to the checkout. Return the number of cells that are recorded now."""
    for path in recorded(root):
        text = path.read_text(encoding="utf-8").replace(f"{checkout}{os.sep}", "")
        files.write_text(output / path.relative_to(root), text)
    return sum(1 for _ in output.rglob(CELL))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("compare", type=Path, help="the comparison's output folder")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    print(f"{args.output}: {record(args.compare.resolve(), args.output)} cells")


if __name__ == "__main__":
    main()
