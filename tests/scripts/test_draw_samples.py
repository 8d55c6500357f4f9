"""The picture of one prompt's samples: which prompt it takes, what it says, and that it is drawn."""

import json
import sys

import draw_samples
import pytest

from aesl_trl import files
from aesl_trl.diversity.figures import Group


def group(completions, rewards):
    count = len(completions)
    return Group(
        "1 + 1?", list(completions), [1] * count, [False] * count, [0.0] * count, [[each] for each in rewards]
    )


MIXED = group("ab", (1.0, 0.0))


def test_what_grpo_makes_of_a_group():
    assert draw_samples.verdict(MIXED) == "2 different, 1 of 2 right: GRPO learns"
    assert draw_samples.verdict(group("aa", (1.0, 1.0))) == "1 different, 2 of 2 right: GRPO learns nothing"
    assert draw_samples.verdict(group("ab", (0.5, None))) == "2 different, 0 of 2 right: GRPO learns nothing"


def test_the_most_diverse_prompt_of_those_that_collapse():
    alike, first = group("cccc", (0.0,) * 4), {0: MIXED, 1: MIXED, 2: group("abcd", (1, 0, 0, 0)), 3: MIXED}
    assert draw_samples.collapsed([first, {0: MIXED, 1: alike, 2: alike}]) == 2
    assert draw_samples.collapsed([first, {0: MIXED, 1: alike, 3: alike}]) == 1
    with pytest.raises(files.InputError, match="--prompt N"):
        draw_samples.collapsed([{0: group("ab", (1.0, 1.0))}, {0: alike}])


def test_the_picture_of_a_run(tmp_path, monkeypatch, capsys):
    place = files.own_folder(tmp_path / "run") / files.SAMPLES
    place.mkdir(parents=True)
    (place.parent / files.RUN).write_text("{}", encoding="utf-8")
    for step, texts, rewards in ((30, "abcd", (1, 0, 0, 0)), (400, "bbbb", (0, 0, 0, 0))):
        row = {
            "prompt_index": 5,
            "prompt": "1 + 1?",
            "completions": list(texts),
            "rewards": [[each] for each in rewards],
        }
        row |= {"num_tokens": [1] * 4, "truncated": [False] * 4, "entropy": [0.1] * 4}
        (place / f"step-{step}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    given = ["draw_samples.py", str(tmp_path / "run"), "--output", str(tmp_path / "samples.png"), "--steps", "30"]
    monkeypatch.setattr(sys, "argv", [*given, "400"])
    draw_samples.main()
    assert "prompt 5: 1 + 1?" in capsys.readouterr().out
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(sys, "argv", [*given, "40"])
    with pytest.raises(files.InputError, match="no samples of step 40; it has 30, 400"):
        draw_samples.main()


def test_a_run_without_rewards_is_refused(tmp_path, monkeypatch):
    place = files.own_folder(tmp_path) / files.SAMPLES
    place.mkdir(parents=True)
    (place.parent / files.RUN).write_text("{}", encoding="utf-8")
    row = {"prompt_index": 0, "prompt": "1 + 1?", "completions": ["2"], "num_tokens": [1], "truncated": [False]}
    (place / "step-0.jsonl").write_text(
        json.dumps({**row, "entropy": [0.1], "rewards": None}) + "\n", encoding="utf-8"
    )
    given = ["draw_samples.py", str(tmp_path), "--steps", "0", "--prompt", "0", "--output", str(tmp_path / "x.png")]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(files.InputError, match="without rewards"):
        draw_samples.main()
