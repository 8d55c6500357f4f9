"""Samples side by side."""

from report_runs import fake_run, written_page

from aesl_trl.files import write_jsonl


def test_identical_completions_are_counted_and_marked(tmp_path, undrawn):
    run = fake_run(tmp_path / "aesl", "aesl")
    row = {"prompt_index": 0, "prompt": "sort", "completions": ["up 1", "down 2", "up 1", "up 1"]}
    row |= {"rewards": [[1.0], [0.0], [1.0], [1.0]], "truncated": [False, True, False, False]}
    for step in (0, 20, 100, 800):
        write_jsonl(run / f"sft/samples/step-{step}.jsonl", [row])
    words = written_page([run]).words
    assert "2 different of 4, 3 right ×3 ✓ up 1 ×1 ✗ down 2 cut at the length limit" in words
    assert "step 0: before SFT" in words and "step 800: selected, last measured" in words
