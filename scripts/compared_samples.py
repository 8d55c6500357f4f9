"""Read each cell's completions before and after RL, for the scripts that look into a comparison's samples."""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from aesl_trl.compare.cells import source
from aesl_trl.files import read_json, read_jsonl


def compared_samples(comparison: Path) -> Iterator[tuple[dict, dict[str, list[dict]]]]:
    """Yield the row and seed of each cell of the table, and `{"before": groups, "after": groups}`.

    A group is a prompt and its completions: `{"prompt": messages, "completions": [str, ...]}`.
    """
    for cell in read_json(comparison / "compare.json")["cells"]:
        folder = source(comparison / cell["folder"]) / "evaluation_samples"
        after = {path for path in folder.iterdir() if path.name.startswith("grpo-")}
        (before,) = [path for path in folder.iterdir() if path not in after]
        yield {key: cell[key] for key in ("row", "seed")}, {"before": _groups(before), "after": _groups(*after)}


def _groups(samples: Path) -> list[dict]:
    (file,) = samples.glob("prompts-*.jsonl")
    return [group for line in read_jsonl(file) for group in line["groups"]]


def check_problems(groups: Sequence[dict], problems: Sequence[dict]) -> None:
    """Raise SystemExit unless the groups are of these problems, in this order."""
    if [group["prompt"] for group in groups] != [problem["prompt"] for problem in problems]:
        raise SystemExit("the comparison was not evaluated on the recipe's held-out problems")


def describe_comparison(
    doc: str, describe: Callable[[list[dict]], dict[str, float]], table: Callable[[list[dict]], str]
) -> None:
    """Run a script: `describe` gives a cell's figures from its groups, `table` a markdown table of all cells.

    The figures before and after RL go to the file `--output` as a JSON list with a line for each cell. Such a file may
    stand in place of the comparison.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("comparison", type=Path)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.comparison.is_file():
        cells = read_json(args.comparison)
    else:
        found = compared_samples(args.comparison)
        cells = [facts | {when: describe(groups) for when, groups in samples.items()} for facts, samples in found]
    if args.output:
        rows = ",\n".join(json.dumps(cell) for cell in cells)
        args.output.write_text(f"[\n{rows}\n]\n", encoding="utf-8")
    print(table(cells))
