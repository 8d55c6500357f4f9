"""The chapters between the first and the last two: changes of diversity with their intervals, readiness."""

import shutil
from types import SimpleNamespace

import numpy as np
from report_runs import STEPS, Page, fake_run, readiness, written_page

from aesl_trl.diversity.coverage import GAINED, LOST
from aesl_trl.diversity.intervals import paired_interval
from aesl_trl.files import read_json, write_json, write_jsonl
from aesl_trl.report.parts import Cell
from aesl_trl.report.runs import Arm
from aesl_trl.report.sections import _positions, changes


def row(step, entropy, by_prompt=None, **more):
    measured = {} if by_prompt is None else {"by_prompt": {"entropy": by_prompt}}
    return {
        "step": step,
        "entropy": entropy,
        "intervals": {"entropy": [entropy - 0.1, entropy + 0.1]},
        **measured,
        **more,
    }


def test_base_selected_and_last():
    table = changes([row(0, 0.2), row(10, 0.5), row(20, 0.4), row(40, 0.1)], 20, 8)
    assert table.head == ["own samples", "step 0", "step 20", "change from 0", "step 40", "change from 20"]
    ((name, *line),) = table.rows
    assert name == Cell("entropy (nats)")
    assert line[:3] == [Cell("0.200", "[0.100, 0.300]"), Cell("0.400", "[0.300, 0.500]"), Cell("+0.200")]
    assert line[3:] == [Cell("0.100", "[0.000, 0.200]"), Cell("-0.300")]


def test_a_change_is_paired():
    """Prompts differ by 1, their changes by 0.01: only the paired interval sees a change of 0.1."""
    generator = np.random.default_rng(0)
    before = generator.normal(2.0, 1.0, 64)
    after = before + generator.normal(0.1, 0.01, 64)
    rows = [row(0, before.mean(), before.tolist()), row(10, after.mean(), after.tolist())]
    ((_, *line),) = changes(rows, None, 8).rows
    _, low, high = paired_interval(before, after)
    assert line[2].note == f"[{low:+.3f}, {high:+.3f}]" and 0.09 < low < high < 0.11


def test_what_is_not_there_is_left_out():
    rows = [row(0, 0.2, [0.2], **{"pass@1": 0.5}), row(10, 0.3, [0.2, 0.4], **{"pass@1": None})]
    ((name, *line),) = changes(rows, 10, 8).rows
    assert name == Cell("entropy (nats)")
    assert line[2] == Cell("+0.100")  # other prompts
    assert changes(rows[:1], 5, 8).head == ["own samples", "step 0"]


def test_coverage_against_step_0():
    """Step 0 is what the others are compared with. A version without coverage left no such lines."""
    figures = [{}, {LOST: 0.2, GAINED: 0.1}, {LOST: 0.3, GAINED: 0.05}]
    values = [{}, {LOST: [0.1, 0.3], GAINED: [0.0, 0.2]}, {LOST: [0.3, 0.3], GAINED: [0.1, 0.0]}]
    rows = [
        row(step, 0.2) | measured | ({"by_prompt": each} if each else {})
        for step, measured, each in zip((0, 10, 20), figures, values, strict=True)
    ]
    table = changes(rows, 10, 8)
    _, (name, *lost), (_, *gained) = table.rows
    assert name == Cell("coverage lost") and lost[:4] == [Cell("0.000"), Cell("0.200"), Cell("+0.200"), Cell("0.300")]
    _, low, high = paired_interval([0.1, 0.3], [0.3, 0.3])
    assert lost[4] == Cell("+0.100", f"[{low:+.3f}, {high:+.3f}]") and gained[4].text == "-0.050"
    assert "against step 0" in table.caption
    assert len(changes([row(0, 0.2), row(10, 0.5)], 10, 8).rows) == 1


def test_readiness_of_the_start_and_of_the_candidates(tmp_path, undrawn):
    run, other = fake_run(tmp_path / "aesl", "aesl", weights=True), fake_run(tmp_path / "base", "base")
    assert "Readiness" not in written_page([run], [other]).words
    write_json(run / "readiness.json", {"checkpoints": [readiness(800, 0.3)]})
    late = readiness(800, 0.04, "collapsed: go back to step 20")
    write_json(run / "sft/readiness.json", {"checkpoints": [readiness(20, 0.5), late]})
    words = written_page([run], [other]).words
    assert "aesl, step-800: ready. 0.3 of the groups differ <in> reward." in words
    lines = (run / "report.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "step-" in line and "|" in line]
    rows = [row for row in rows if row[1].startswith("step-")]
    rows, more = rows[:3], rows[3:]  # the verdicts, and the figures behind them
    assert [row[1] for row in more] == ["step-800", "step-20", "step-800"]
    assert [row[1:3] for row in rows] == [
        ["step-800", "ready"],
        ["step-20", "ready"],
        ["step-800", "collapsed: go back to step 20"],
    ]
    assert rows[1][4] == r"0.50 \[0.40, 0.60\]" and rows[1][-1] == "–"
    with_reference = readiness(800, 0.3)
    with_reference["figures"] |= {LOST: 0.25, GAINED: 0.0}
    write_json(run / "readiness.json", {"checkpoints": [with_reference], "reference": "base"})
    words = written_page([run], [other]).words
    assert "coverage lost coverage gained" in words and "Coverage is against the probe's reference." in words


def test_a_turning_point_is_marked_whatever_rule_selected(chain, tmp_path, undrawn):
    assert "Dotted line: this run's diversity turning point" in Page((chain / "report.html").read_text("utf-8")).words
    flat = fake_run(tmp_path / "aesl", "aesl")
    write_jsonl(flat / "sft/diversity.jsonl", [{"step": step, "entropy": 0.2} for step in STEPS])
    assert "No turning point in aesl:" in written_page([flat]).words


def test_what_aesl_was_set_to_and_whether_it_acted(tmp_path, undrawn):
    run = fake_run(tmp_path / "aesl", "aesl", weights=True)
    settings = read_json(run / "sft/run.json")
    write_json(run / "sft/run.json", settings | {"t_scaling": "auto", "t_scaling_found": 0.17842})
    words = written_page([run]).words
    assert "AESL, 800 steps t_scaling 0.178" in words
    assert "loss / nll, counts each token by its nll; at 1 the step is that of plain nll. It is 0.94 at first" in words
    assert "effective weight" not in written_page([fake_run(tmp_path / "nll", "nll_last")]).words


def test_what_a_plain_sft_run_has_nothing_of_is_left_out(tmp_path, undrawn):
    run = fake_run(tmp_path / "mine", "nll_last")
    names = ("positions.jsonl", "evaluation.json", "chain.json", "handoff.json", "selection.json")
    for path in [path for path in run.rglob("*.json*") if path.name in names]:
        path.unlink()
    for name in ("grpo", "sft/samples"):
        shutil.rmtree(run / name)
    state = read_json(run / "sft/trainer_state.json")  # TRL's own trainer logs the loss alone
    plain = [{key: row[key] for key in ("step", "loss") if key in row} for row in state["log_history"]]
    write_json(run / "sft/trainer_state.json", {**state, "log_history": plain})
    page = written_page([run / "sft"])
    sections = [value for tag, name, value in page.attributes if (tag, name) == ("section", "id")]
    assert sections == ["diversity", "loss", "evidence"]
    assert "Plain nll" not in page.words and "Missing in mine: weights by position" in page.words


def test_positions_without_weight_say_that_the_loss_has_stopped():
    def see(weights) -> str:
        row = {"step": 400, "position": [1, 2, 8], "weight": weights, "temperature": [None] * 3}
        return _positions(Arm("aesl", False, [SimpleNamespace(positions=[row])], "aesl")).see

    assert see([0.004, 0.001, 0.002]).endswith(
        "The largest is 0.004: the loss has stopped nearly everywhere, and little is still learnt."
    )
    assert see([0.3, 0.7, None]).endswith("It is largest at positions up to 2, where the model still learns most.")
    assert see([1.0, 1.0, 1.0]) == "Every token weighs 1: this loss has no early stop."
