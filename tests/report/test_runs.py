"""Reading of run folders: arms, seeds, what is missing, and broken files."""

import shutil
from pathlib import Path

import pytest
from report_runs import FINAL, STEPS, fake_run, readiness, written_page

from aesl_trl.errors import InputError
from aesl_trl.files import append_jsonl, write_json
from aesl_trl.report.plots import coloured
from aesl_trl.report.runs import Run, read_arms
from aesl_trl.report.sections import sections_of


PARTS = {
    "sft/diversity.jsonl": "diversity measurements (diversity.jsonl)",
    "sft/trainer_state.json": "the SFT log (trainer_state.json)",
    "sft/positions.jsonl": "weights by position (positions.jsonl)",
    "sft/samples": "samples (samples/)",
    "sft/run.json": "the SFT settings (run.json)",
    "handoff.json": "the handoff (handoff.json)",
    "evaluation.json": "the evaluation (evaluation.json)",
    "grpo/trainer_state.json": "the RL log (grpo/trainer_state.json)",
}


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_is_named_and_the_rest_shown(tmp_path, part, undrawn):
    run = fake_run(tmp_path / "aesl", "aesl", weights=True)
    (shutil.rmtree if (run / part).is_dir() else Path.unlink)(run / part)
    assert f"Missing in aesl: {PARTS[part]}." in written_page([run]).words


def test_a_finished_run_without_weights_is_recorded_even_when_named_first(tmp_path):
    run = fake_run(tmp_path / "results/aesl/seed-0", "aesl")
    assert Run(run).recorded
    (run / "selected").mkdir()
    (run / "selected/model.safetensors").write_bytes(b"")
    assert not Run(run).recorded


def test_seeds_are_one_arm_and_arms_keep_their_colour(tmp_path):
    paths = {arm: [fake_run(tmp_path / arm / f"seed-{i}", arm, i) for i in (0, 1)] for arm in FINAL}
    arms = coloured(read_arms([path for runs in paths.values() for path in runs]))
    assert [(arm.name, len(arm.runs)) for arm in arms] == [(arm, 2) for arm in FINAL]
    expected = {"base": "base", "nll_turning_point": "stop", "nll_last": "nll", "aesl": "aesl"}
    assert {arm.name: arm.colour for arm in arms} == expected
    assert coloured(read_arms(paths["nll_last"]))[0].colour == "nll"


def test_a_run_under_way_is_read_from_its_newest_checkpoint(tmp_path):
    run = fake_run(tmp_path / "aesl", "aesl")
    (run / "grpo/trainer_state.json").unlink()
    for step in (9, 20, 100):
        history = [{"step": step, "reward": 0.5}]
        write_json(run / f"grpo/checkpoint-{step}/trainer_state.json", {"log_history": history})
    assert [row["step"] for row in Run(run).grpo_log] == [100]


def test_a_step_measured_again_after_a_resume_counts_once(tmp_path):
    run = fake_run(tmp_path / "aesl", "aesl")
    append_jsonl(run / "sft/diversity.jsonl", {"step": 20, "entropy": 0.5})
    rows = Run(run).diversity
    assert [row["step"] for row in rows] == STEPS
    assert next(row["entropy"] for row in rows if row["step"] == 20) == 0.5


@pytest.mark.parametrize(
    "content, part",
    [
        ({"checkpoints": 3}, "'checkpoints' is 3, not a list: run aesl probe again"),
        ({"checkpoints": [3]}, "'checkpoints', row 1 is 3, not an object"),
        (
            {"checkpoints": [{"figures": {}}]},
            "row 1 has no 'intervals': another version wrote it, or it was edited: run aesl probe again",
        ),
        (
            {"checkpoints": [{**readiness(1, 0.5), "figures": {"signal": "much"}}]},
            "'signal' is \"much\", not a number",
        ),
        ({"checkpoints": [{**readiness(1, 0.5), "intervals": {"signal": [1]}}]}, "'signal' is [1], not a pair"),
    ],
)
def test_a_broken_readiness_is_said(tmp_path, content, part):
    run = fake_run(tmp_path / "aesl", "aesl")
    write_json(run / "readiness.json", content)
    with pytest.raises(InputError) as error:
        Run(run)
    assert part in str(error.value) and "readiness.json" in str(error.value)


WRONG = [
    *("", "{", "[]", "3", '"x"', "{}", "\udcff", '{"models": 3}', '{"models": {"start": {"pass@1": "0.3"}}}'),
    *('{"log_history": {}}', '{"log_history": [{"step": "1"}]}', '{"log_history": [{"step": 1, "reward": "x"}]}'),
    *('{"step": 1, "entropy": "high"}', '{"step": 1.5}', '{"step": 3}', '{"step": true}', '{"versions": [1]}'),
    *('{"step": 1, "position": [1], "weight": ["a"], "temperature": [1]}', '{"completions": "abc"}'),
]


FILES = [*PARTS, "selection.json", "chain.json", "grpo/run.json", "sft/samples/step-800.jsonl"]


@pytest.mark.parametrize("file", [file for file in FILES if file != "sft/samples"])
def test_a_broken_file_is_one_line_that_names_it(tmp_path, file):
    run = fake_run(tmp_path / "aesl", "aesl")
    refused = 0
    for content in WRONG:
        (run / file).write_bytes(content.encode("utf-8", "surrogateescape"))
        try:
            sections_of(read_arms([run]))
        except InputError as error:
            refused += 1
            assert "\n" not in str(error) and Path(file).name in str(error)
    assert refused >= 5


@pytest.mark.parametrize("candidate", [None, "mix-0.7"])
def test_positions_of_other_lengths_are_one_line(tmp_path, candidate):
    """Of a step's run, and of one whose average with the base went to RL."""
    run = fake_run(tmp_path / "aesl", "aesl")
    append_jsonl(run / "sft/positions.jsonl", {"step": 999, "position": [1], "weight": [], "temperature": []})
    write_json(run / "selection.json", {"step": 30, "candidate": candidate})
    with pytest.raises(
        InputError, match=r"positions.jsonl, step 999: position, weight and temperature are not of one"
    ):
        Run(run)
