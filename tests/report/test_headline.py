"""The report's first words and first chapter."""

import json

from report_runs import Page, fake_run, readiness, written_page

from aesl_trl.diversity.coverage import LOST
from aesl_trl.files import read_json, read_jsonl, write_json, write_jsonl
from aesl_trl.report.headline import advice
from aesl_trl.report.report import write_report
from aesl_trl.report.runs import Run, read_arms


def test_headline_table_holds_the_figures_of_the_files(chain):
    markdown = (chain / "report.md").read_text(encoding="utf-8")
    models = json.loads((chain / "evaluation.json").read_text())["models"]
    row = next(line for line in markdown.splitlines() if line.startswith("| aesl (this run)"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    start, final = models["start"], models["final"]
    low, high = final["pass@1_interval"]
    assert cells[1:3] == [r"AESL, 800 steps t\_scaling 3", "step 800 last"]
    assert cells[4:8] == [f"{start[key]:.2f}" for key in ("pass@8", "entropy", "self_bleu", "groups_mixed")]
    assert cells[8] == rf"{final['pass@1']:.2f} \[{low:.2f}, {high:.2f}\]"
    assert "| nll turning point (recorded) 2 seeds | nll, 800 steps | step 20 turning point |" in markdown


def test_recorded_runs_are_labelled_and_the_live_one_is_not(chain):
    words = Page((chain / "report.html").read_text(encoding="utf-8")).words
    assert "aesl this run" in words
    for name in ("base", "nll last", "nll turning point"):
        assert f"{name} recorded" in words
    assert "aesl recorded" not in words and "aesl (recorded)" not in words


def test_a_fall_back_is_named_with_the_verdict(tmp_path, undrawn):
    run = fake_run(tmp_path / "aesl", "aesl")
    selection = json.loads((run / "selection.json").read_text())
    write_json(run / "selection.json", {**selection, "rule": "turning_point", "applied": "mixed_groups"})
    rows = [{"step": step, "entropy": 2.5 * 0.5 ** (step / 10), "self_bleu": 0.5} for step in range(0, 80, 10)]
    write_jsonl(run / "sft/diversity.jsonl", rows)
    words = written_page([run]).words
    assert "step 800 mixed groups (asked: turning point; only falls)" in words
    assert "No turning point in aesl: only falls: diversity is highest at the first measurement, step 0" in words


def test_the_mean_over_seeds_stands_in_the_table(tmp_path, undrawn):
    runs = [fake_run(tmp_path / "aesl" / f"seed-{seed}", "aesl", seed) for seed in (0, 1, 2)]
    finals = [json.loads((run / "evaluation.json").read_text())["models"]["final"]["pass@1"] for run in runs]
    words = written_page(runs).words
    assert f"{sum(finals) / 3:.2f} {min(finals):.2f} to {max(finals):.2f}" in words
    assert "aesl recorded 3 seeds" in words


def test_a_start_that_lost_coverage_says_so(tmp_path, undrawn):
    run = fake_run(tmp_path / "nll", "nll_last")
    assert "coverage" not in written_page([run]).words
    step, path = read_json(run / "selection.json")["step"], run / "sft/diversity.jsonl"
    lost = {LOST: 0.25, "intervals": {LOST: [0.2, 0.3]}}
    write_jsonl(path, [row | lost if row["step"] == step else row for row in read_jsonl(path)])
    assert (
        f"nll, step {step}: coverage lost is 0.25 [0.20, 0.30]: share of prompts that the base solves"
        in written_page([run]).words
    )


def test_runs_evaluated_differently_are_pointed_out(tmp_path, undrawn):
    runs = [fake_run(tmp_path / name, name) for name in ("aesl", "base")]
    evaluation = json.loads((runs[1] / "evaluation.json").read_text())
    write_json(runs[1] / "evaluation.json", {**evaluation, "dtype": "auto"})
    assert "not evaluated alike" not in written_page(runs).words  # aesl's is of a version that named no dtype
    write_json(runs[1] / "evaluation.json", {**evaluation, "num_samples": 16, "dtype": "bfloat16"})
    words = written_page(runs).words
    assert "The runs were not evaluated alike: num_samples is aesl 8, base 16." in words
    assert "The runs were not evaluated alike: dtype is aesl auto, base bfloat16." in words


def test_an_average_with_the_base_is_no_step_of_the_series(tmp_path, undrawn):
    run = fake_run(tmp_path / "run", "nll_last")
    selection = json.loads((run / "selection.json").read_text())
    own = {"candidate": "mix-0.7", "entropy": 0.31}
    chosen = {"candidate": "mix-0.7", "rule": "mix", "applied": "mix", "evidence": {"measured": own}}
    write_json(run / "selection.json", {**selection, **chosen})
    words = written_page([run]).words
    assert "mix-0.7 mix" in words and "Why mix-0.7 went to RL" in words and "step 800 mix" not in words
    (run / "evaluation.json").unlink()
    assert (Run(run).selected_step, Run(run).start) == (None, own)


def test_the_page_opens_with_where_rl_should_start(tmp_path, undrawn):
    run = fake_run(tmp_path / "nll", "nll_turning_point", weights=True)

    def opening() -> str:
        write_report([run])
        return (run / "report.md").read_text(encoding="utf-8").split("\n\n")[1]

    assert opening().startswith("Start RL from step 20, chosen by turning point: ")
    write_json(run / "readiness.json", {"checkpoints": [readiness(20, 0.5)]})
    assert opening().startswith("Start RL from step 20, which the probe finds ready: 0.5 of the groups differ")
    late = "collapsed: go back to step 10"
    write_json(run / "readiness.json", {"checkpoints": [readiness(20, 0.04, late)]})
    assert opening() == f"Do not start RL from step 20, which the probe finds {late}."
    for path in run.rglob("selection.json"):
        path.unlink()
    assert opening().startswith("Start RL from step 20: peak of diversity")
    rows = read_jsonl(run / "sft/diversity.jsonl")
    write_jsonl(run / "sft/diversity.jsonl", [{**row, "entropy": 0.2} for row in rows])
    assert opening().startswith("No step stands out as the start of RL: ")
    write_jsonl(run / "sft/diversity.jsonl", rows[:1])
    assert "SFT did not measure diversity" in opening()


def opening_of(*runs) -> str:
    return advice(read_arms(runs))


def test_several_seeds_are_named_with_their_own_starts(tmp_path):
    runs = [fake_run(tmp_path / "nll" / f"seed-{seed}", "nll_turning_point", seed, weights=True) for seed in (0, 1, 2)]
    for run, step in zip(runs, (20, 40, None), strict=True):
        selection = read_json(run / "selection.json")
        for path in run.rglob("selection.json"):
            path.unlink()
        if step:
            write_json(run / "selection.json", {**selection, "step": step})
    write_json(runs[1] / "readiness.json", {"checkpoints": [readiness(40, 0.04, "collapsed: go back to step 10")]})
    words = opening_of(*runs)
    assert words.startswith("seed 0: Start RL from step 20, chosen by turning point: ")
    others = "The other seeds: seed 1 step 40 (collapsed: go back to step 10); seed 2 no start yet."
    assert words.endswith(others)
    words = opening_of(*runs, fake_run(tmp_path / "aesl", "aesl", weights=True))
    assert words.startswith("nll, seed 0: Start RL from step 20") and words.endswith(others)


def test_an_average_has_the_verdict_of_its_own_probe(tmp_path):
    run = fake_run(tmp_path / "run", "nll_last", weights=True)
    selection = read_json(run / "selection.json")
    write_json(run / "selection.json", {**selection, "candidate": "mix-0.7", "rule": "mix", "applied": "mix"})
    entry = {**readiness(0, 0.5), "step": None}
    base, other = {**entry, "name": "base"}, {**entry, "name": "mix-0.5", "candidate": "mix-0.5"}
    write_json(run / "readiness.json", {"checkpoints": [base, other]})
    assert opening_of(run).startswith("Start RL from mix-0.7, chosen by mix: ")
    own = {**entry, "name": "handoff", "candidate": "mix-0.7"}
    write_json(run / "readiness.json", {"checkpoints": [base, other, own]})
    assert opening_of(run).startswith("Start RL from mix-0.7, which the probe finds ready: 0.5 of the groups")
