"""soak: what it strikes, when it waits, how it counts; and ten kills of real chains."""

import random
import resource
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import soak
from crash_runs import contents

from aesl_trl import files


WAITS = "import sys; sys.stdin.read()"


@pytest.fixture
def chain(tmp_path):
    """A process that stands for a chain, with a stage that has started a rank."""
    stage = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {WAITS!r}, '-m', 'aesl_trl.sft'])"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {stage!r}])"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    found = psutil.Process(process.pid)
    while len(soak.family(found)) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    yield found
    for each in [*soak.family(found), found]:
        each.kill()
    process.communicate()


def test_each_kind_finds_its_processes(chain):
    stage, rank = soak.family(chain)
    found = {kind: find(chain) for kind, find in soak.TARGETS.items()}
    assert found["parent"] == [chain] and found["rank"] == [rank] and found["launcher"] == found["grader"] == []
    assert found["stage"] == [stage, rank] and found["full disk"] == [chain, stage, rank]


def test_a_stage_is_killed_as_a_whole_and_its_chain_left_alone(chain):
    struck = soak.family(chain)
    soak.strike("stage", struck, random.Random(0))
    psutil.wait_procs(struck, timeout=60)
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in struck)


def test_a_full_disk_is_full_for_all(chain):
    targets = soak.TARGETS["full disk"](chain)
    soak.strike("full disk", targets, random.Random(0))
    limits = {resource.prlimit(process.pid, resource.RLIMIT_FSIZE)[0] for process in targets}
    assert len(limits) == 1 and limits <= set(soak.FULL_AT)


def leave_chain(run, done, seconds=1.0):
    stages = {name: {"status": "done", "seconds": seconds} for name in done}
    files.write_json(run / files.CHAIN, {"stages": {**stages, "grpo": {"status": "running", "seconds": seconds}}})


def test_progress_is_what_a_chain_would_go_on_from(tmp_path):
    assert soak.progress(tmp_path) == [0, 0, 0]
    leave_chain(tmp_path, ["sft", "select"])
    (tmp_path / "grpo/checkpoint-2").mkdir(parents=True)  # torn
    assert soak.progress(tmp_path) == [2, 0, 0]
    leave_chain(tmp_path / "whole", ["sft", "select", "handoff"], 5.0)
    assert soak.seconds_left(tmp_path, tmp_path / "whole", "grpo") == soak.CHECK_S + 10.0  # handoff and RL are left
    assert soak.seconds_left(tmp_path, tmp_path / "whole", "handoff") == soak.CHECK_S + 5.0


def test_no_third_kill_comes_before_progress(tmp_path, monkeypatch):
    """After two kills without progress the next one waits for it, and its moment counts from there."""
    told = iter([[0, 0, 0]] * 5 + [[0, 3, 0]] * 99)
    monkeypatch.setattr(soak, "progress", lambda run: next(told))
    monkeypatch.setattr(soak, "seconds_left", lambda *given: 0.0)
    monkeypatch.setattr(soak, "LOOK_S", 0.0)
    monkeypatch.setattr(soak, "strike", lambda *given: None)
    monkeypatch.setitem(soak.TARGETS, "rank", lambda chain: [chain])
    work = soak.Soak(tmp_path, 0)
    work.record["kills"] = [{"chain": 0, "kind": kind, "progress": [0, 0, 0]} for kind in ("parent", "launcher")]
    process = SimpleNamespace(pid=psutil.Process().pid, poll=lambda: None, wait=lambda seconds: None)
    assert work.strike_once(process, tmp_path)
    assert work.record["kills"][2] == {"chain": 0, "kind": "rank", "progress": [0, 3, 0], "code": None}
    assert files.read_json(tmp_path / "soak.json") == work.record == soak.Soak(tmp_path, 0).record
    with pytest.raises(SystemExit, match="was begun with --seed 0"):
        soak.Soak(tmp_path, 1)


def test_a_chain_that_stands_still_ends_the_soak(tmp_path, monkeypatch):
    monkeypatch.setattr(soak, "seconds_left", lambda *given: 0.0)
    monkeypatch.setattr(soak, "LOOK_S", 0.0)
    monkeypatch.setattr(soak, "WAIT_S", 0.05)
    monkeypatch.setitem(soak.TARGETS, "parent", lambda chain: [])
    process = SimpleNamespace(pid=psutil.Process().pid, poll=lambda: None)
    with pytest.raises(SystemExit, match="stands still; its log is"):
        soak.Soak(tmp_path, 0).strike_once(process, tmp_path)


def test_what_differs_is_named_but_for_clocks_and_the_place_itself(tmp_path):
    for name, seconds in (("a", 1.0), ("b", 2.0)):
        run = tmp_path / name
        files.write_json(run / "chain.json", {"path": str(run / "sft"), "stages": [{"seconds": seconds, "code": 0}]})
        files.write_jsonl(run / "rows.jsonl", [{"step": 1, "train_runtime": seconds}])
        (run / "weights.safetensors").write_bytes(b"same")
        (run / "stage.log").write_text(name)
        sums = {"trainer_state.json": {"bytes": seconds}, "optimizer.pt": {"bytes": 9}}
        files.write_json(run / "checkpoint-2/manifest.json", {"files": sums})
        files.write_json(run / f"evaluation_samples/grpo-00000000000{name}/settings.json", {"time": seconds})
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    (tmp_path / "b/weights.safetensors").write_bytes(b"other")
    (tmp_path / "b/.left.tmp").write_text("")
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert {name for name in {*a, *b} if a.get(name, "missing") != b.get(name, "missing")} == {
        "weights.safetensors",
        ".left.tmp",
    }


def test_the_table_counts_chains_that_have_ended():
    record = {
        "kills": [{"kind": "parent", "chain": 0}, {"kind": "rank", "chain": 0}, {"kind": "parent", "chain": 1}],
        "chains": [{"kills": 2, "differs": ["x"], "orphans": 3}],
    }
    rows = {line.split("  ")[0]: line.split()[-4:] for line in soak.table(record).splitlines()}
    assert rows["parent"] == ["2", "1", "0", "3"] and rows["rank"] == ["1", "1", "0", "3"]
    assert rows["all"] == ["3", "1", "0", "3"] and rows["grader"] == ["0", "0", "0", "0"]


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_ten_kills_change_nothing(tmp_path, capsys):
    assert soak.main(["--kills", "10", "--seed", "0", "--output_dir", str(tmp_path)]) == 0, capsys.readouterr().out
    record = files.read_json(tmp_path / "soak.json")
    assert [kill["kind"] for kill in record["kills"]] == [*soak.TARGETS, *list(soak.TARGETS)[:4]]
    assert soak.main(["--kills", "10", "--seed", "0", "--output_dir", str(tmp_path)]) == 0  # nothing is left to do
    assert files.read_json(tmp_path / "soak.json") == record
