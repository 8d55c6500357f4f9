"""What the scripts that look into a comparison's samples share: each cell's completions before and after RL."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from aesl_trl.compare_cells import source
from aesl_trl.files import read_json, read_jsonl


def compared_samples(comparison: Path) -> Iterator[tuple[dict, dict[str, list[dict]]]]:
    """Each cell of the table: its row and seed, and `{"before": groups, "after": groups}`.

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
    """Raises SystemExit where the groups are not of these problems, in this order."""
    if [group["prompt"] for group in groups] != [problem["prompt"] for problem in problems]:
        raise SystemExit("the comparison was not evaluated on the recipe's held-out problems")


def write_cells(path: Path, cells: Sequence[dict]) -> None:
    """A JSON list, a cell a line."""
    rows = ",\n".join(json.dumps(cell) for cell in cells)
    path.write_text(f"[\n{rows}\n]\n", encoding="utf-8")
