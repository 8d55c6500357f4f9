#!/usr/bin/env python3
"""Draw the samples of one prompt at several steps of a cold start side by side: what collapse looks like.

    python scripts/draw_samples.py RUN --steps 30 400 --prompt 0 --output samples.png

RUN is the folder of an SFT run that measured diversity with a reward. Equal samples have one colour; the first reward
calls those with ✓ right. Without `--prompt` the script takes, of the prompts whose samples differ in reward at the
first step and are equal at the last one, the first with most different samples.
"""

import argparse
from collections import Counter
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from aesl_trl.diversity.figures import Group
from aesl_trl.errors import InputError, exit_on_input_error
from aesl_trl.files import RunFolder
from aesl_trl.report.parts import LIGHT, SHEET_INCHES, STYLE, clip
from aesl_trl.report.runs import read_samples
from aesl_trl.report.samples import SUCCESS, first_rewards


CHARACTERS = 44  # of a sample that are shown
HUES = ("aesl", "nll", "eval", "stop", "other2", "other1", "base")
LINE_INCHES = 0.26


def right(group: Group) -> list[bool]:
    """Return for each sample whether the first reward calls it right."""
    return [reward is not None and reward >= SUCCESS for reward in first_rewards(group)]


def collapsed(samples: list[dict[int, Group]]) -> int:
    """Return the most diverse prompt of the first step, with mixed rewards there and equal samples at the last."""

    def different(index: int) -> int:
        return len(set(samples[0][index].completions))

    indices = [
        index
        for index, first in sorted(samples[0].items())
        if len(set(right(first))) == 2 and (last := samples[-1].get(index)) and len(set(last.completions)) == 1
    ]
    if not indices:
        raise InputError(
            "no prompt's samples differ in reward at the first step and are equal at the last: --prompt N"
        )
    return max(indices, key=different)


def verdict(group: Group) -> str:
    """Say what GRPO makes of the group."""
    found = right(group)
    count = f"{len(set(group.completions))} different, {sum(found)} of {len(found)} right"
    return f"{count}: {'GRPO learns' if len(set(found)) == 2 else 'GRPO learns nothing'}"


def draw(columns: dict[int, Group], output: Path) -> None:
    """Draw a column a step, a line a sample; equal samples stand together, the most frequent one first."""
    matplotlib.rcParams.update(STYLE)
    num_samples = max(len(group.completions) for group in columns.values())
    height = LINE_INCHES * (num_samples + 3.2)
    figure = Figure(figsize=(SHEET_INCHES, height), facecolor=LIGHT["paper"])
    hues: dict[str, str] = {}
    for number, (step, group) in enumerate(columns.items()):
        lines = [
            (0.7, f"SFT step {step}", {"weight": "bold"}),
            (1.6, verdict(group), {"color": LIGHT["muted"], "size": 9}),
        ]
        often = Counter(group.completions)
        samples = sorted(
            zip(group.completions, right(group), strict=True), key=lambda each: (-often[each[0]], each[0])
        )
        for place, (text, is_right) in enumerate(samples, 3):
            hue = hues.setdefault(text, HUES[len(hues) % len(HUES)])
            shown, hidden = clip(" ".join(text.split()), CHARACTERS)
            sample = f"{'✓' if is_right else '✗'} {shown}{' …' if hidden else ''}"
            lines.append((place - 0.2, sample, {"color": LIGHT[hue], "size": 9, "family": "DejaVu Sans Mono"}))
        for place, text, look in lines:
            figure.text(0.01 + number / len(columns), 1 - LINE_INCHES * place / height, text, va="center", **look)
    figure.savefig(output, dpi=120, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, nargs="+", required=True, help="measured steps, a column each")
    parser.add_argument("--prompt", type=int, metavar="N", help="number of the prompt, from 0")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.png")
    args = parser.parse_args()
    files = RunFolder(args.run).sample_files
    if missing := [step for step in args.steps if step not in files]:
        raise InputError(
            f"--steps: {args.run} has no samples of step {missing[0]}; it has {', '.join(map(str, files))}"
        )
    samples = [read_samples(files[step]) for step in args.steps]
    index = collapsed(samples) if args.prompt is None else args.prompt
    if any(index not in found for found in samples):
        raise InputError(f"--prompt: there is no prompt {index} at each of the steps")
    if not all(found[index].rewards for found in samples):
        raise InputError(f"{args.run} was measured without rewards: give its training reward_funcs")
    draw({step: found[index] for step, found in zip(args.steps, samples, strict=True)}, args.output)
    print(f"prompt {index}: {samples[0][index].prompt} -> {args.output}")


if __name__ == "__main__":
    exit_on_input_error("draw_samples.py", main)
