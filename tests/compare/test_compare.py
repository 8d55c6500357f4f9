"""compare: no cell is run twice, whatever ends the comparison, and the results follow from the cells' folders."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small_compare
import yaml
from small_compare import ONE, result, run, started

from aesl_trl import files
from aesl_trl.chain.fingerprints import walk
from aesl_trl.chain.old_fingerprints import old_fingerprint
from aesl_trl.compare import compare
from aesl_trl.compare.cells import chain_of
from aesl_trl.compare.plots import step_lines
from aesl_trl.errors import InputError


ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes/skills-tiny"
OUTPUTS = ("compare.json", "compare.md", "compare_results.png", "compare_diversity.png")


def evaluation_of_another_run(home: Path) -> None:
    """What a kill leaves between RL that was repeated and its evaluation."""
    chain = files.read_json(home / files.CHAIN)
    for stage in ("eval", "report"):
        chain["stages"].pop(stage)
    files.write_json(home / files.CHAIN, chain)


@pytest.mark.parametrize(
    "flags, part",
    [
        (["--workers", "0"], "--workers is 0, but must be at least 1"),
        (["--methods", "nl"], "has no nl; did you mean 'nll'"),
        (["--seeds", "5"], "has no 5"),
        (["--sedes", "5"], "--sedes"),
    ],
)
def test_refused_flags(project, flags, part):
    with pytest.raises(InputError) as error:
        compare.main(["--config", str(project()), *flags])
    assert part in str(error.value)


# ---- Running


def test_a_comparison_from_end_to_end(project, fakes, capfd, monkeypatch):
    """Every cell once, at the figures that its loss, step and seed lead to; the same files again from the folders."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    path = project(seeds=[0, 3])
    assert run(path, "--workers", "2") == 0
    order = started(fakes)
    assert len(order) == len(set(order)) and [name for name, _ in order].count("sft") == 4
    devices = {json.loads(line)[2] for line in (fakes / "order.txt").read_text().splitlines()}
    assert devices == {"2", "5"}
    found = result(fakes)
    assert [row["row"] for row in found["rows"]] == ["base", "nll/turning_point", "nll/last", "aesl/last"]
    assert [row["steps"] for row in found["rows"]] == [[None, None], [20, 20], [80, 80], [80, 80]]
    # fake stages: quality 80 / 200 + learning rate, noise 0.00 and 0.01, and RL adds the start's entropy
    nll = found["rows"][2]
    assert (nll["before"]["pass@1"]["mean"], nll["after"]["pass@1"]["mean"]) == pytest.approx((0.505, 0.575))
    assert (
        nll["solved"] == {"right": 12, "mixed": 0, "of": 20, "by": None}
        and "| 12 of 20 |" in (fakes / "compare.md").read_text()
    )
    aesl = found["rows"][3]["differences"]["nll/last"]["after"]["pass@1"]
    assert aesl["mean"] == pytest.approx(0.05) and aesl["seeds"] == [0, 3]
    facts = found["cells"][0]["provenance"]
    assert facts["command"] == [f"aesl compare --config {path} --workers 2"] and "cores" in facts["hardware"][0]
    assert found["missing"] == [] and not any(cell["outdated"] for cell in found["cells"])
    assert "| nll/turning_point | 2 | 20 |" in capfd.readouterr().out
    kept = {name: (fakes / name).read_bytes() for name in OUTPUTS}
    for gone in (OUTPUTS, OUTPUTS[:1]):  # a user deletes compare.json to have the table made anew
        for name in gone:
            (fakes / name).unlink()
        assert run(path, "--table_only") == 0
        assert {name: (fakes / name).read_bytes() for name in OUTPUTS} == kept
    # finished cells are not run again
    assert run(path) == 0 and started(fakes) == order
    # a seed more: its cells alone
    assert run(project(seeds=[0, 3, 4], methods=ONE)) == 0
    assert {folder for _, folder in started(fakes)[len(order) :]} == {"sft/nll/seed-4", "nll_last/seed-4"}


def test_changed_inputs_are_refused_or_run_again(project, fakes, tmp_path):
    path = project(methods=ONE, seeds=[0])
    run(path)
    before = started(fakes)
    (tmp_path / "eval.yaml").write_text("samples: 4\n")
    run(path, "--table_only")
    assert result(fakes)["cells"][0]["outdated"] is True
    assert "Run from other configs" in (fakes / "compare.md").read_text()
    assert run(path) == 0
    assert [name for name, _ in started(fakes)[len(before) :]] == ["eval", "report"]
    assert result(fakes)["cells"][0]["outdated"] is False
    evaluation_of_another_run(fakes / "nll_last/seed-0")
    with pytest.raises(InputError, match="holds no finished cell"):
        run(path, "--table_only")
    before = started(fakes)
    assert run(path) == 0
    assert [name for name, _ in started(fakes)[len(before) :]] == ["eval", "report"]
    (tmp_path / "rows.jsonl").write_text('{"text": "b"}\n')
    with pytest.raises(InputError, match="sft/nll/seed-0 was trained from other inputs"):
        run(path)


def test_other_spellings_and_old_records_run_no_cell_again(project, fakes, tmp_path):
    path = project(methods=ONE, seeds=[0])
    assert run(path) == 0
    before, home = started(fakes), fakes / "nll_last/seed-0"
    (tmp_path / "sft.yaml").write_text(
        "# why\nlearning_rate: 1.0e-1\ndiversity_steps: 10\ndataset_name: ./rows.jsonl\n"
    )
    run(path, "--table_only")
    assert result(fakes)["cells"][0]["outdated"] is False
    assert run(path) == 0 and started(fakes) == before
    # as the version before recorded it
    chain, previous = chain_of(home), None
    for stage, _ in walk(chain):
        previous = old_fingerprint(stage, stage.folder if stage.name == "sft" else chain.run, previous)
        facts = chain.recorded(stage.name)
        chain.note(stage.name, **{key: facts[key] for key in facts.keys() - {"settings"}} | {"inputs": previous})
    run(path, "--table_only")
    assert result(fakes)["cells"][0]["outdated"] is False
    assert run(path) == 0 and started(fakes) == before
    sft = files.read_json(chain.sft_dir / files.OWN / files.STAGE)
    renewed = [*files.read_json(home / files.CHAIN)["stages"].values(), sft]
    assert all("settings" in stage and stage["inputs"] != previous for stage in renewed)


def test_a_failed_cell_costs_only_itself_and_is_tried_again(project, fakes, capfd):
    path = project(methods={"nll": {"sft": {"cold_start_loss": "nll"}, "selections": ["turning_point", "last"]}})
    (fakes / "fail_grpo").write_text("nll_turning_point/seed-1")
    assert run(path) == 1
    out = capfd.readouterr()
    assert "nll/turning_point, seed 1 ended with exit code 3: not in the table" in out.err
    assert result(fakes)["missing"] == ["nll/turning_point, seed 1 (stage grpo failed with exit code 3)"]
    assert result(fakes)["rows"][0]["seeds"] == [0] and result(fakes)["rows"][1]["seeds"] == [0, 1]
    (fakes / "fail_grpo").unlink()
    before = started(fakes)
    assert run(path) == 0
    assert [name for name, _ in started(fakes)[len(before) :]] == ["grpo", "eval", "report"]


def test_a_cold_start_that_fails_is_not_tried_for_each_selection(project, fakes):
    path = project(
        seeds=[0], methods={"nll": {"sft": {"cold_start_loss": "nll"}, "selections": ["last", "best_eval"]}}
    )
    (fakes / "fail_sft").write_text("nll")
    with pytest.raises(InputError, match="holds no finished cell"):
        run(path)
    assert started(fakes) == [("sft", "sft/nll/seed-0")]


def test_selections_that_come_to_one_step_are_one_run(project, fakes):
    path = project(
        seeds=[0], methods={"nll": {"sft": {"cold_start_loss": "nll"}, "selections": ["last", "best_eval"]}}
    )
    assert run(path) == 0
    assert [folder for name, folder in started(fakes) if name == "grpo"] == ["nll_last/seed-0"]
    last, best = result(fakes)["cells"]
    assert (last["same_as"], best["same_as"], best["step"], best["applied"]) == (None, "nll_last", 80, "best_eval")
    assert best["after"] == last["after"]
    assert "2 cells are finished, 1 of them runs of their own" in (fakes / "compare.md").read_text()
    before = started(fakes)
    assert run(path) == 0 and started(fakes) == before


def test_an_average_with_the_base_is_a_row(project, fakes, tmp_path):
    """It is of the last step, and still another start than the last step."""
    chain = {**yaml.safe_load(project().read_text())["chain"], "mix": {"weights": [0.5, 0.7]}}
    methods = {"nll": {"sft": {"cold_start_loss": "nll"}, "selections": ["mix", "last"]}}
    path = project(seeds=[0], methods=methods, chain=chain)
    assert run(path) == 0
    assert [name for name, folder in started(fakes) if folder == "nll_mix/seed-0"][:3] == ["mix", "handoff", "grpo"]
    mixed, last = result(fakes)["cells"]
    assert (mixed["row"], mixed["step"], mixed["start"]) == ("nll/mix", 80, "mix-0.7")
    assert (last["step"], last["start"], last["same_as"]) == (80, "step 80", None)
    assert mixed["before"]["entropy"] == 0.35 and last["before"]["entropy"] == 0.07
    assert "mix" not in yaml.safe_load((fakes / "nll_last/seed-0/chain.yaml").read_text())
    assert all(item["cells"] == 2 for item in result(fakes)["correlations"])  # two starts, not one
    before = started(fakes)
    assert run(path) == 0 and started(fakes) == before


def test_rl_from_steps(project, fakes):
    methods = {"nll": {"sft": {"cold_start_loss": "nll"}, "selections": []}, "base": {"sft": None}}
    path = project(seeds=[0], methods=methods, reference=[], rl_from_steps=[10, 40, 80])
    assert run(path) == 0
    found = result(fakes)
    assert [row["steps"] for row in found["rows"]] == [[10], [40], [80], [None]]
    assert [step for step, _ in step_lines(found)["nll", ""]] == [0, 10, 40, 80]
    assert (fakes / "compare_steps.png").read_bytes()[1:4] == b"PNG"
    assert not (fakes / "compare_results.png").exists()  # the base alone, which the steps show
    assert [name for name, _ in started(fakes)].count("sft") == 1


# ---- Interrupted


def comparison(path, *flags):
    """The comparison as a process of its own, which its stages can kill."""
    command = [sys.executable, small_compare.__file__, "--compare", "--config", str(path), *flags]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=250)


@pytest.mark.parametrize(
    "number, code", [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_ends_the_cell_and_then_the_comparison(project, fakes, number, code):
    path = project(seeds=[0], methods=ONE)
    (fakes / "kill_grpo").write_text(str(int(number)))
    done = comparison(path)
    assert done.returncode == code, done.stderr
    assert f"stopped by {number.name}; run it again to go on" in done.stdout
    assert started(fakes)[-1][0] == "grpo"
    assert comparison(path).returncode == 0
    assert [name for name, _ in started(fakes)] == ["sft", "handoff", "grpo", "grpo", "eval", "report"]


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux's /proc")
def test_a_killed_comparison_goes_on_to_the_same_result(project, fakes, tmp_path):
    """Killed with SIGKILL while RL is at work, which goes on: the next run ends it, and repeats no finished stage."""
    path = project(methods=ONE)
    (fakes / "kill_grpo").write_text(str(int(signal.SIGKILL)))
    assert comparison(path).returncode == -signal.SIGKILL
    before = started(fakes)
    assert before[-1] == ("grpo", "nll_last/seed-0")
    done = comparison(path)
    assert done.returncode == 0, done.stderr
    assert "ended 1 processes that a killed comparison had left at work" in done.stdout
    assert started(fakes)[len(before)][0] == "grpo" and started(fakes).count(("sft", "sft/nll/seed-0")) == 1
    killed = result(fakes)
    for item in fakes.iterdir():
        shutil.rmtree(item) if item.is_dir() else item.unlink()
    assert comparison(path).returncode == 0
    undisturbed = result(fakes)
    assert killed["rows"] == undisturbed["rows"] and killed["correlations"] == undisturbed["correlations"]


def test_a_second_comparison_in_the_folder_is_refused(project, fakes):
    path = project(seeds=[0], methods=ONE)
    with compare.lock(fakes / ".compare.lock", ""):
        with pytest.raises(InputError, match="another comparison is at work in"):
            run(path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_real_comparison_killed_in_the_middle(tmp_path):
    """Two methods, two seeds, the tiny base: SIGKILL in the midst of RL, and the figures of an undisturbed cell."""
    path = real_comparison(tmp_path)
    command = [sys.executable, "-m", "aesl_trl.cli", "compare", "--config", str(path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 900
    while not (tmp_path / "runs/aesl_last/seed-0/grpo/checkpoint-2/manifest.json").exists():
        assert time.monotonic() < deadline and killed.poll() is None, killed.communicate()[0]
        time.sleep(0.1)
    killed.kill()
    killed.communicate()
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nll/last, seed 0: starts" not in done.stdout
    log = (tmp_path / "runs/aesl_last/seed-0/cell.log").read_text()
    assert "sft is done with the same inputs: skipped" in log and "goes on from" in log
    found = files.read_json(tmp_path / "runs/compare.json")
    assert [len(row["seeds"]) for row in found["rows"]] == [2, 2] and found["missing"] == []
    flags = ["--output_dir", str(tmp_path / "again"), "--methods", "aesl", "--seeds", "0"]
    assert subprocess.run([*command, *flags], env=env).returncode == 0
    again = files.read_json(tmp_path / "again/compare.json")["cells"]
    resumed = [cell for cell in found["cells"] if (cell["method"], cell["seed"]) == ("aesl", 0)]
    assert [(cell["before"], cell["after"]) for cell in again] == [(c["before"], c["after"]) for c in resumed]


def real_comparison(folder: Path) -> Path:
    """skills-tiny with a few steps of everything."""
    few = {"max_steps": 4, "diversity_steps": 2, "eval_steps": 2, "diversity_num_prompts": 8, "save_steps": 2}
    few |= {"max_candidates": 5}
    chain = {stage: {"config": str(RECIPE / stage / name)} for stage, name in (("sft", "config_nll.yaml"),)}
    chain |= {"grpo": {"config": str(RECIPE / "grpo/config.yaml")}, "eval": {"config": str(RECIPE / "eval.yaml")}}
    values = {
        "output_dir": "runs",
        "seeds": [0, 1],
        "reference": ["nll/last"],
        "chain": chain,
        "settings": {
            "": {
                "sft": few,
                "grpo": {"max_steps": 4, "save_steps": 1, "save_total_limit": 4, "per_device_train_batch_size": 16},
                "eval": {"num_prompts": 16, "samples": 2},
            }
        },
        "methods": {loss: {"sft": {"cold_start_loss": loss}, "selections": ["last"]} for loss in ("nll", "aesl")},
    }
    (folder / "compare.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return folder / "compare.yaml"
