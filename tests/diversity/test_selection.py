"""Rules on rows, and `aesl select` on folders as a training leaves them."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aesl_trl import files
from aesl_trl.diversity.selection import main, select_checkpoint, select_run
from aesl_trl.errors import InputError


STEPS = [0, 10, 20, 40, 60, 100, 200, 800]
ENTROPY = [0.21, 0.25, 0.32, 0.25, 0.20, 0.12, 0.10, 0.07]
SELF_BLEU = [0.60, 0.55, 0.50, 0.42, 0.48, 0.58, 0.66, 0.75]  # its valley is one measurement later
PASS_1 = [0.15, 0.12, 0.11, 0.14, 0.26, 0.24, 0.27, 0.26]
EVAL_NLL = {10: 0.9, 40: 0.7, 60: 0.65, 100: 0.6, 200: 0.7, 800: 1.1}
CANDIDATES = [10, 20, 40, 200, 800]
TURNING = "docs/turning_point.md"


def diversity_rows(entropy=ENTROPY, self_bleu=SELF_BLEU):
    columns = zip(STEPS, entropy, self_bleu, PASS_1, strict=True)
    return [{"step": step, "entropy": e, "self_bleu": b, "pass@1": p} for step, e, b, p in columns]


def eval_rows():
    return [{"step": step, "eval_nll": value} for step, value in EVAL_NLL.items()]


def select(rule="turning_point", rows=None, evals=(), candidates=CANDIDATES, **options):
    return select_checkpoint(diversity_rows() if rows is None else rows, evals, candidates, rule=rule, **options)


def test_turning_point():
    chosen = select()
    assert (chosen["rule"], chosen["applied"], chosen["step"]) == ("turning_point", "turning_point", 20)
    assert (chosen["metric"], chosen["candidates"]) == ("entropy", CANDIDATES)
    assert chosen["evidence"]["measured"] == diversity_rows()[2]
    assert "wanted_step" not in chosen["evidence"]


def test_metrics_that_disagree_are_both_recorded():
    by_entropy, by_self_bleu = select(), select(metric="self_bleu")
    assert (by_entropy["step"], by_self_bleu["step"]) == (20, 40)
    for chosen in (by_entropy, by_self_bleu):
        points = chosen["evidence"]["turning_point"]
        assert {metric: point["step"] for metric, point in points.items()} == {"entropy": 20, "self_bleu": 40}
    assert by_entropy["reason"].endswith("self_bleu says step 40")
    assert by_self_bleu["reason"].endswith("entropy says step 20")


def test_undetermined_other_metric_is_said():
    assert "self_bleu says undetermined" in select(rows=diversity_rows(self_bleu=[0.5] * 8))["reason"]


# ---- Without a turning point

RISING = sorted(ENTROPY)
FALLING = [2.5, 1.0, 0.5, 0.3, 0.2, 0.15, 0.12, 0.1]


def graded_rows(entropy, mixed, prompts=None):
    """Rows with the share of mixed groups; and with pass@1 of each prompt, given which of the prompts are mixed."""
    rows = [row | {"groups_mixed": share} for row, share in zip(diversity_rows(entropy), mixed, strict=True)]
    rates = [[0.5 if is_mixed else 1.0 for is_mixed in row] for row in prompts or []]
    return (
        [row | {"by_prompt": {"pass@1": of_row}} for row, of_row in zip(rows, rates, strict=True)] if rates else rows
    )


@pytest.mark.parametrize("evals", [(), eval_rows()])
def test_undetermined_and_without_rewards_it_is_the_last_and_never_the_best_evaluation(evals):
    chosen = select(rows=diversity_rows(entropy=RISING), evals=evals)
    assert (chosen["rule"], chosen["applied"], chosen["step"]) == ("turning_point", "last", 800)
    assert "still rising" in chosen["reason"] and "falls back to last" in chosen["reason"]
    assert chosen["evidence"]["turning_point"]["entropy"]["verdict"] == "undetermined"


@pytest.mark.parametrize("entropy", [RISING, FALLING])
def test_with_rewards_it_is_the_candidate_with_the_most_mixed_groups(entropy):
    mixed = [0.9, 0.3, 0.5, 0.6, 0.8, 0.7, 0.6, 0.1]  # the base and step 60 are no candidates; 40 and 200 are equal
    chosen = select(rows=graded_rows(entropy, mixed), evals=eval_rows())
    assert (chosen["applied"], chosen["step"]) == ("mixed_groups", 40)
    assert "falls back to mixed_groups: most mixed groups, 0.60 at step 40" in chosen["reason"]


def test_equal_by_paired_intervals_is_the_earliest():
    # Of 40 prompts the best candidate, step 200, has 30 mixed. At step 20 the same but one are: the difference is 1/40
    # and a resample leaves that prompt out with chance (39/40)^40 = 0.36, so the interval begins at 0. At step 10 ten
    # prompts fewer are mixed: none of them is drawn with chance (3/4)^40 = 1e-5, so the interval lies above 0.
    best = [place < 30 for place in range(40)]
    near, far = [place < 29 for place in range(40)], [place < 20 for place in range(40)]
    prompts = [best, far, near, far, best, best, best, far]
    rows = graded_rows(RISING, [sum(row) / 40 for row in prompts], prompts)
    chosen = select(rows=rows)
    assert (chosen["applied"], chosen["step"]) == ("mixed_groups", 20)
    assert "0.72 at step 20, not told apart from 0.75 at step 200" in chosen["reason"]

    shares = [{key: value for key, value in row.items() if key != "by_prompt"} for row in rows]
    assert select(rows=shares)["step"] == 200  # older rows: only equal shares are equal


def test_no_mixed_group_says_as_little_as_no_rewards():
    chosen = select(rows=graded_rows(FALLING, [0.0] * 8), evals=eval_rows())
    assert (chosen["applied"], chosen["step"]) == ("half_fall", 40)


@pytest.mark.parametrize(
    ("candidates", "evals", "applied", "step"),
    [
        # From 0.9 to 0.6: half is 0.75, which step 40 (0.7) is the first to pass
        (CANDIDATES, eval_rows(), "half_fall", 40),
        ([10, 20, 200, 800], eval_rows(), "half_fall", 200),
        ([10, 20], eval_rows(), "last", 20),  # no candidate is that far
        (CANDIDATES, [{"step": 10, "eval_nll": 0.6}, {"step": 800, "eval_nll": 0.7}], "last", 800),  # no fall
        (CANDIDATES, [{"step": 10, "eval_nll": None}], "last", 800),
        (CANDIDATES, (), "last", 800),
    ],
)
def test_only_falling_and_without_rewards_it_is_where_half_is_learnt(candidates, evals, applied, step):
    chosen = select(rows=diversity_rows(entropy=FALLING), evals=evals, candidates=candidates)
    assert (chosen["applied"], chosen["step"]) == (applied, step)
    assert "entropy: only falls: diversity is highest at the first measurement, step 0" in chosen["reason"]
    assert chosen["evidence"]["turning_point"]["entropy"]["verdict"] == "only falls"
    assert select(rows=diversity_rows(entropy=RISING), evals=evals, candidates=candidates)["applied"] == "last"


FIGURES = st.none() | st.floats(0, 4)
RATES = st.none() | st.lists(st.none() | st.sampled_from([0.0, 0.25, 1.0]), max_size=4)


@settings(deadline=None)
@given(
    st.lists(st.tuples(FIGURES, FIGURES, st.none() | st.floats(0, 1), RATES), max_size=12),
    st.lists(st.tuples(st.integers(0, 12), FIGURES), max_size=6),
    st.sets(st.integers(1, 12), min_size=1),
    st.sampled_from(["turning_point", "last", "best_eval"]),
)
def test_the_step_is_always_a_candidate(columns, evals, candidates, rule):
    rows = [
        {"step": step, "entropy": entropy, "self_bleu": bleu, "groups_mixed": mixed, "by_prompt": {"pass@1": rates}}
        for step, (entropy, bleu, mixed, rates) in enumerate(columns)
    ]
    chosen = select(rule, rows, [{"step": step, "eval_nll": nll} for step, nll in evals], candidates)
    assert chosen["step"] in candidates
    assert chosen["applied"] in {rule, "mixed_groups", "half_fall", "last"}


@pytest.mark.parametrize(
    ("place", "out", "command"),
    [
        ("run", None, "aesl probe {sft} --config FILE, then aesl select {run} --rule readiness\n"),
        (
            "run",
            "chain",
            "aesl probe {sft} --config FILE, then aesl select {run} --rule readiness --output_dir {out}\n",
        ),
    ],
)
def test_the_last_for_want_of_a_reason_names_the_next_command(tmp_path, capsys, place, out, command):
    run = make_run(tmp_path / place, diversity_patience=7)
    out = out and str(tmp_path / out)
    main([str(run), *(["--out", out] if out else [])])
    said = capsys.readouterr()
    assert said.out.startswith("selected step 800 by last: entropy: undetermined: still rising") and len(said.err) > 0
    assert said.err.endswith(command.format(sft=run, run=run, out=out)) and said.err.count("\n") == 1
    main([str(run), "--rule", "last"])
    main([str(run), "--patience", "3"])
    assert capsys.readouterr().err == ""


def test_one_sentence_says_it_everywhere():
    root = Path(__file__).parents[2]
    texts = [select_checkpoint.__doc__, root.joinpath(TURNING).read_text()]
    start, end = "Then the candidate with the most", "that names the next command."
    said = [text[text.index(start) : text.index(end)].split() for text in texts]
    assert said[0] == said[1]


def test_last():
    chosen = select("last", evals=eval_rows())
    assert (chosen["applied"], chosen["step"]) == ("last", 800)
    assert chosen["evidence"]["turning_point"]["entropy"]["step"] == 20  # for the report


def test_best_eval_by_nll_and_by_pass():
    assert select("best_eval", evals=eval_rows())["step"] == 40
    chosen = select("best_eval", best_eval_metric="pass@1")
    assert chosen["step"] == 200
    assert chosen["evidence"]["evaluation"]["values"][200] == 0.27


def test_best_eval_ignores_nan():
    evals = [{"step": 10, "eval_nll": float("nan")}, {"step": 20, "eval_nll": 0.5}, {"step": 40, "eval_nll": None}]
    assert select("best_eval", evals=evals)["step"] == 20


def test_best_eval_without_evaluations_falls_back_to_last():
    chosen = select("best_eval")
    assert (chosen["rule"], chosen["applied"], chosen["step"]) == ("best_eval", "last", 800)
    assert "no candidate has eval_nll" in chosen["reason"]


# ---- By readiness


def probed(step, verdict="ready", signal=0.5, reward=None):
    rl = None if reward is None else {"steps": 20, "reward": reward}
    found = {"signal": signal, "variance": 0.1}
    return {"step": step, "verdict": verdict, "text": verdict, "figures": found, "intervals": {}, "rl": rl}


@pytest.mark.parametrize(
    "entries, applied, step, said",
    [
        ([(10, "ready", 0.4), (20, "ready", 0.6), (800, "collapsed", 0.9)], "readiness", 20, "of 2 ready candidates"),
        ([(10, "ready", 0.4, 0.9), (20, "ready", 0.6, 0.3)], "readiness", 10, "after 20 steps of RL, 0.900"),
        (
            [(10, "collapsed"), (20, "collapsed")],
            "turning_point",
            20,
            "(2 collapsed) (2 of 5 candidates were probed); f",
        ),
        ([(30, "ready"), (40, "ready")], "readiness", 40, "(1 of 5 candidates were probed)"),  # step 30 is not saved
    ],
)
def test_readiness(entries, applied, step, said):
    chosen = select("readiness", readiness={"checkpoints": [probed(*one) for one in entries]})
    assert (chosen["rule"], chosen["applied"], chosen["step"]) == ("readiness", applied, step)
    assert said in chosen["reason"]
    known = {one[0]: one[1] for one in entries if one[0] in CANDIDATES}
    assert chosen["evidence"]["verdicts"] == known


def test_readiness_falls_back_twice():
    entries = {"checkpoints": [probed(10, "never stops")]}
    chosen = select("readiness", rows=diversity_rows(entropy=RISING), readiness=entries)
    assert (chosen["applied"], chosen["step"]) == ("last", 800)
    assert (
        "(1 never stops)" in chosen["reason"] and "falls back to turning_point: entropy: undeter" in chosen["reason"]
    )
    rows = graded_rows(RISING, [0.1] * 6 + [0.2] * 2)
    assert select("readiness", rows=rows, readiness=entries)["step"] == 200  # by the same rule


@pytest.mark.parametrize(
    "content, said",
    [
        (None, "has no readiness.json, which the rule readiness reads: run aesl probe"),
        ("[1]", "is not what aesl probe writes"),
        ('{"checkpoints": [{"step": 10}]}', "is not what aesl probe writes"),
        ('{"checkpoints": []}', "no saved candidate has been probed: run aesl probe"),
        ("{", "readiness.json is not valid JSON"),
    ],
)
def test_select_by_readiness_needs_a_probe(tmp_path, capsys, content, said):
    run = make_run(tmp_path / "run")
    if content is not None:
        (run / files.READINESS).write_text(content)
    with pytest.raises(SystemExit) as stop:
        main([str(run), "--rule", "readiness"])
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and printed.count("\n") == 1 and said in printed
    assert not (run / files.SELECTED).exists()


def test_select_by_readiness_reads_what_the_probe_wrote(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    files.write_json(run / files.READINESS, {"checkpoints": [probed(10), probed(200, signal=0.7)]})
    main([str(run), "--rule", "readiness", "--out", str(tmp_path / "chain")])
    assert weights(tmp_path / "chain") == "weights of step 200"
    assert capsys.readouterr().out.startswith(
        "selected step 200 by readiness: largest share of groups that differ in reward, 0.70"
    )


# ---- By averages with the base


def mixed(*rows):
    """mix.json of step 800: rows are (weight, entropy, share of mixed groups)."""
    names = ("weight", "entropy", "groups_mixed")
    found = [{"candidate": f"mix-{row[0]:g}", **dict(zip(names, row, strict=False))} for row in rows]
    return {"step": 800, "asked": [row["candidate"] for row in found], "candidates": found}


@pytest.mark.parametrize(
    "rows, best, said",
    [
        (
            [(0.5, 0.30, 0.4), (0.7, 0.28, 0.6), (0.8, 0.2, 0.5)],
            "mix-0.7",
            "largest share of mixed groups, 0.60, of 3",
        ),
        ([(0.5, 0.28), (0.7, 0.30), (0.8, 0.2)], "mix-0.7", "largest entropy, 0.30, of 3 averages"),
        ([(0.5, 0.28, 0.2), (0.7, 0.30, None)], "mix-0.7", "largest entropy"),  # not every row has the share
        ([(0.8, 0.3, 0.5), (0.6, 0.2, 0.5)], "mix-0.6", "share of mixed groups"),  # of equals the nearest to the base
        ([(0.5, None, None), (0.7, 0.1, 0.2)], "mix-0.7", "of 1 averages"),  # a gap
    ],
)
def test_mix(rows, best, said):
    chosen = select("mix", mixes=mixed(*rows))
    assert (chosen["rule"], chosen["applied"], chosen["step"], chosen["candidate"]) == ("mix", "mix", 800, best)
    assert said in chosen["reason"] and chosen["evidence"]["measured"]["candidate"] == best
    assert select("last")["candidate"] == "step-800"


def test_mix_without_averages_is_refused_in_one_line():
    with pytest.raises(InputError, match="the rule mix reads mix.json, and there is none"):
        select("mix")


def test_select_takes_the_average_and_says_what_it_replaces(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    files.write_json(run / files.MIXES, mixed((0.5, 0.3, 0.5), (0.7, 0.2, 0.6)))
    for name in ("mix-0.5", "mix-0.7"):
        (run / files.CANDIDATES / name).mkdir()
        (run / files.CANDIDATES / name / "model.txt").write_text(f"weights of {name}")
    select_run(run, rule="last")
    main([str(run), "--rule", "mix"])
    out = capsys.readouterr().out
    assert out.startswith("selected mix-0.7 by mix: largest share of mixed groups, 0.60")
    assert "; replaces step 800, chosen by last" in out
    assert (run / files.SELECTED / "model.txt").read_text() == "weights of mix-0.7"
    main([str(run), "--rule", "last"])
    assert "; replaces mix-0.7, chosen by mix" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content, said",
    [
        (None, "has no mix.json, which the rule mix reads: run aesl mix"),
        ({"candidates": [{"candidate": "../x"}]}, "is not what aesl mix writes"),
        ({"candidates": 3}, "is not what aesl mix writes"),
        ({"candidates": [{"candidate": "mix-0.5"}], "step": 800, "asked": []}, "is not what aesl mix writes"),
        ({"candidates": [], "step": 800, "asked": [["mix-0.5"]]}, "is not what aesl mix writes"),
        (mixed((0.5, 0.3)), "lacks mix-0.5, aesl mix was cut off"),  # the weights are gone
        ({"step": 800, "asked": [], "candidates": []}, "no average in mix.json has been measured"),
    ],
)
def test_select_by_mix_needs_what_aesl_mix_writes(tmp_path, capsys, content, said):
    run = make_run(tmp_path / "run")
    if content is not None:
        files.write_json(run / files.MIXES, content)
    with pytest.raises(SystemExit) as stop:
        main([str(run), "--rule", "mix"])
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and printed.count("\n") == 1 and said in printed
    assert not (run / files.SELECTED).exists()


@pytest.mark.parametrize(("candidates", "nearest"), [([10, 60], 10), ([10, 30, 800], 10), ([25], 25), ([800], 800)])
def test_unsaved_step_takes_the_nearest_and_says_so(candidates, nearest):
    chosen = select(candidates=candidates)
    assert (chosen["step"], chosen["evidence"]["wanted_step"]) == (nearest, 20)
    assert f"step 20 was not saved, step {nearest} is the nearest" in chosen["reason"]


def test_step_measured_twice_counts_once():
    stale = [
        {**row, "entropy": 9.0} for row in diversity_rows()[5:]
    ]  # a resumed run measures again after its checkpoint
    chosen = select(rows=[*diversity_rows()[:5], *stale, *diversity_rows()[5:]])
    assert chosen["evidence"]["turning_point"]["entropy"]["values"] == ENTROPY
    assert chosen["step"] == 20


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rule": "turningpoint"}, "did you mean 'turning_point'"),
        ({"metric": "self-bleu"}, "did you mean 'self_bleu'"),
        ({"best_eval_metric": "eval_loss"}, "eval_nll"),
        ({"candidates": []}, "no saved candidates"),
        ({"patience": 0}, "patience"),
        ({"rows": [{"entropy": 1.0}]}, "row 1 has no whole number 'step'"),
    ],
)
def test_refuses_in_one_line(options, said):
    with pytest.raises(InputError, match=said) as error:
        select(**options)
    assert "\n" not in str(error.value)


def make_run(folder, candidates=CANDIDATES, **recorded):
    """An SFT folder as training leaves it."""
    files.write_json(folder / files.RUN, {"stage": "sft", "cold_start_loss": "nll"} | recorded)
    files.write_jsonl(folder / files.DIVERSITY, diversity_rows())
    history = [{"step": 10, "loss": 1.0}, *eval_rows(), {"step": 800, "train_runtime": 3.0}]
    files.write_json(folder / files.TRAINER_STATE, {"global_step": 800, "log_history": history})
    for step in candidates:
        target = folder / files.CANDIDATES / f"step-{step}"
        target.mkdir(parents=True)
        (target / "model.safetensors").write_text(f"weights of step {step}")
    return folder


def weights(folder):
    return (folder / files.SELECTED / "model.safetensors").read_text()


def test_select_run_writes_selection_and_weights(tmp_path):
    run = make_run(tmp_path / "run")
    chosen = select_run(run)
    assert chosen["step"] == 20 and weights(run) == "weights of step 20"
    written = files.read_json(run / files.SELECTION)
    said = {"weights": str(run / files.SELECTED), "replaces": None}
    assert {**written, **said} == json.loads(json.dumps(files.to_json(chosen)))
    assert (run / written["path"]).resolve() == run / files.SELECTED


def test_select_run_again_replaces(tmp_path):
    run = make_run(tmp_path)
    select_run(run)
    (run / files.SELECTED / "stale.txt").write_text("of an older selection")
    again = select_run(run, rule="last")
    assert (again["step"], again["replaces"]) == (800, "step 20, chosen by turning_point")
    assert weights(run) == "weights of step 800" and select_run(run, rule="last")["replaces"] is None
    assert sorted(os.listdir(run / files.SELECTED)) == ["identity.json", "model.safetensors"]
    assert (run / files.CANDIDATES / "step-20").exists()


@pytest.mark.parametrize(
    ("recorded", "options", "expected"),
    [
        ({"cold_start_loss": "aesl"}, {}, ("turning_point", "entropy", 20)),
        ({"cold_start_loss": "aesl", "selection": "last"}, {}, ("last", "entropy", 800)),
        ({"cold_start_loss": "aesl", "selection": "best_eval"}, {}, ("best_eval", "entropy", 40)),
        ({"diversity_metric": "self_bleu"}, {}, ("turning_point", "self_bleu", 40)),
        ({"diversity_metric": "self_bleu"}, {"metric": "entropy"}, ("turning_point", "entropy", 20)),
        ({"diversity_patience": 7}, {}, ("last", "entropy", 800)),
        ({"diversity_patience": 7}, {"patience": 3}, ("turning_point", "entropy", 20)),
        ({"selection": "best_eval", "best_eval_metric": "pass@1"}, {}, ("best_eval", "entropy", 200)),
    ],
)
def test_select_run_takes_what_the_run_recorded_unless_told(tmp_path, recorded, options, expected):
    chosen = select_run(make_run(tmp_path, **recorded), **options)
    assert (chosen["applied"], chosen["metric"], chosen["step"]) == expected


def test_select_run_takes_the_step_asked_for_by_no_rule(tmp_path):
    run = make_run(tmp_path)
    chosen = select_run(run, rule="best_eval", step=40)
    assert (chosen["rule"], chosen["applied"], chosen["step"]) == ("step", "step", 40)
    assert weights(run) == "weights of step 40" and chosen["evidence"]["measured"]["step"] == 40
    with pytest.raises(InputError, match="holds no step 70, the nearest is 40; raise max_candidates"):
        select_run(run, step=70)
    assert files.read_json(run / files.SELECTION)["step"] == 40


def test_select_run_of_a_bare_callback(tmp_path):
    run = make_run(tmp_path)
    (run / files.RUN).unlink()
    (run / files.TRAINER_STATE).unlink()
    assert select_run(run)["step"] == 20


def test_select_run_of_a_chain_writes_into_the_chain(tmp_path):
    make_run(tmp_path / "sft")
    files.write_json(tmp_path / files.CHAIN, {"sft_dir": "sft"})
    select_run(tmp_path)
    assert weights(tmp_path) == "weights of step 20"
    assert not (tmp_path / "sft" / files.SELECTION).exists()


def test_two_chains_select_from_one_sft_folder(tmp_path):
    shared = make_run(tmp_path / "shared")
    select_run(shared, tmp_path / "a", rule="turning_point")
    select_run(shared, tmp_path / "b" / "deep", rule="last")
    assert weights(tmp_path / "a") == "weights of step 20"
    assert weights(tmp_path / "b" / "deep") == "weights of step 800"
    assert not (shared / files.SELECTED).exists()


def test_moved_run_still_finds_its_weights(tmp_path):
    run = make_run(tmp_path / "before")
    select_run(run)
    moved = run.rename(tmp_path / "after")
    assert (moved / files.read_json(moved / files.SELECTION)["path"] / "model.safetensors").exists()


def test_what_lies_there_already_is_kept(tmp_path):
    run, out = make_run(tmp_path / "run"), tmp_path / "out"
    for name in (files.SELECTED + "/thesis.txt", files.SELECTION):
        files.write_text(out / name, '"mine"')
        with pytest.raises(InputError, match="--output_dir: .* would be replaced; name a new folder"):
            select_run(run, out)
        assert (out / name).read_text() == '"mine"' and not (out / files.SELECTED / "model.safetensors").exists()
        (out / name).unlink()
    select_run(run, out)
    select_run(run, out, rule="last")
    (run / files.SELECTED).symlink_to(out / files.SELECTED)
    with pytest.raises(InputError, match="selected is a symlink"):
        select_run(run)
    assert weights(out) == "weights of step 800"


def test_a_selection_of_an_older_version_is_replaced(tmp_path):
    """It has no identity: its selection.json shows that selected/ is ours, a torn one too; in _aesl its name does."""
    for place, said in ((tmp_path / "a", '{"applied": "last", "step": 40}'), (tmp_path / "b", '{"appl')):
        files.write_text(place / files.SELECTED / "model.safetensors", "old")
        files.write_text(place / files.SELECTION, said)
        select_run(make_run(place / "run"), place)
        assert weights(place) == "weights of step 20"
    own = make_run(tmp_path / "c" / files.OWN)
    files.write_text(own / files.SELECTED / "model.safetensors", "old")
    select_run(tmp_path / "c")
    assert weights(own) == "weights of step 20"


def test_a_run_of_version_0_1_0_that_goes_on_replaces_its_selected(tmp_path):
    """It was cut off before its selection.json. Only whole weights in the run's or a chain's folder are ours."""
    run, chain = make_run(tmp_path / "run"), tmp_path / "chain"
    files.write_json(chain / files.CHAIN, {"sft_dir": "../run"})
    for place, name in ((run, "config.json"), (chain, "adapter_config.json")):
        files.write_text(place / files.SELECTED / "model.safetensors", "old")
        with pytest.raises(InputError, match="selected holds other files"):
            select_run(run, place)
        files.write_text(place / files.SELECTED / name, "{}")
        select_run(run, place)
        assert weights(place) == "weights of step 20"


def test_verify_alone_makes_the_same_selection_again(tmp_path):
    run = make_run(tmp_path)
    for options in ({"step": 40}, {"rule": "best_eval"}, {"rule": "best_eval", "best_eval_metric": "pass@1"}):
        first = select_run(run, **options)
        again = select_run(run, verify=True)
        assert [first[key] for key in ("step", "rule", "applied")] == [
            again[key] for key in ("step", "rule", "applied")
        ]
        assert "sha256" in again["identity"] and again["replaces"] is None
    assert select_run(run, verify=True, rule="last")["step"] == 800


def test_what_to_run_next_inside_a_chain_is_the_chain(tmp_path, capsys):
    run, chain = make_run(tmp_path / "run", diversity_patience=7), tmp_path / "chain"
    select_run(run)
    assert f"then aesl select {run} --rule readiness" in capsys.readouterr().err
    files.write_json(chain / files.CHAIN, {"sft_dir": "../run"})
    select_run(run, chain)
    assert "set selection: {rule: readiness} in chain.yaml, run the chain again" in capsys.readouterr().err


def test_the_weights_say_which_step_they_are_of(tmp_path):
    run = make_run(tmp_path)
    written = select_run(run, step=40)["identity"]
    data = b"weights of step 40"
    facts = {"bytes": 18, "header": hashlib.sha256(data).hexdigest()}  # no header: what claims to be one is all of it
    assert written == {"step": 40, "candidate": "step-40", "files": {"model.safetensors": facts}}
    assert files.read_json(run / files.SELECTED / files.IDENTITY) == written
    assert files.read_json(run / files.SELECTION)["identity"] == written
    verified = select_run(run, step=40, verify=True)["identity"]
    assert verified == {**written, "sha256": {"model.safetensors": hashlib.sha256(data).hexdigest()}}


def test_half_saved_candidates_are_not_candidates(tmp_path):
    run = make_run(tmp_path, candidates=[10, 20])
    (run / files.CANDIDATES / ".step-40.tmp").mkdir()
    (run / files.CANDIDATES / "step-40.old").mkdir()
    (run / files.CANDIDATES / "step-60").write_text("not a folder")
    assert select_run(run)["candidates"] == [10, 20]


def test_no_candidates(tmp_path):
    with pytest.raises(InputError, match="no candidate"):
        select_run(make_run(tmp_path, candidates=[]))


def test_main_prints_one_line(tmp_path, capsys):
    run = make_run(tmp_path)
    main([str(run), "--metric", "self_bleu", "--patience", "2", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert printed.startswith("selected step 40 by turning_point: self_bleu: peak of diversity at step 40")
    assert weights(tmp_path / "out") == "weights of step 40"


@pytest.mark.parametrize(
    "arguments", [["nowhere"], ["{run}", "--rule", "turningpoint"], ["{run}", "--patience", "0"], ["{empty}"]]
)
def test_main_exits_2_with_one_line(tmp_path, capsys, arguments):
    make_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    places = {"run": tmp_path / "run", "empty": tmp_path / "empty"}
    with pytest.raises(SystemExit) as stop:
        main([argument.format(**places) for argument in arguments])
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("aesl select: ") and printed.count("\n") == 1
    assert not (tmp_path / "run" / files.SELECTED).exists()


def test_command_runs_alone(tmp_path):
    run = make_run(tmp_path)
    command = [sys.executable, "-m", "aesl_trl.diversity.selection", str(run), "--rule", "last"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    chosen = f"selected step 800 by last: the last candidate, step 800 -> {run / files.SELECTED}"
    chosen += f"; next: aesl handoff {run}\n"
    assert (result.returncode, result.stdout) == (0, chosen)
