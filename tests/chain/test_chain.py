"""chain: what is run, in which order, what is skipped, resumed or refused, and how it ends. Stages are small fakes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_chain import FAKE, run, started
from small_chains import ALL, checkpoint, cut, make

from aesl_trl import files
from aesl_trl.chain import chain as chains
from aesl_trl.chain.config import read_config
from aesl_trl.chain.stages import BUILDERS
from aesl_trl.errors import InputError
from aesl_trl.processes import MARK, lock, lock_beside
from aesl_trl.training.session import training_lock


ROOT = Path(__file__).parents[2]


# ---- Running


def test_the_whole_chain(project, fakes, capfd):
    path = project()
    assert run(path) == ALL
    out = capfd.readouterr().out
    folder = Path(read_config(path).output_dir)
    record = json.loads((folder / "chain.json").read_text())
    assert record["sft_dir"] == "sft" and record["seed"] == 0 and record["config"] == "../../chain.yaml"
    assert list(record["stages"]) == ALL
    for name in ALL:
        stage = record["stages"][name]
        assert (stage["status"], stage["returncode"]) == ("done", 0)
        assert stage["seconds"] >= 0 and len(stage["inputs"]) == 64 and stage["started"].startswith("20")
        assert str(folder.parent) not in stage["command"]
    assert "sft speaks" in out and "sft warns" in out
    assert (folder / "logs/sft.log").read_text() == "sft speaks\nsft warns\n"
    assert "stage 5 of 7: grpo" in out
    said = [f"model after RL -> {folder / 'grpo'}", f"report -> {folder / 'report.html'}; open it in a browser"]
    assert out.splitlines()[-2:] == said


def test_sft_dir_resolves_for_the_other_stages(project, fakes):
    path = project(sft={"config": "sft.yaml", "output_dir": "shared/sft"})
    run(path)
    config = read_config(path)
    assert files.RunFolder(config.output_dir).sft == Path(config.sft.output_dir)


def test_done_stages_are_skipped(project, fakes, capfd):
    path = project()
    run(path)
    assert run(path) == []
    assert capfd.readouterr().out.count("done with the same inputs: skipped") == 7


@pytest.mark.parametrize(
    "name, line, again",
    [
        ("sft.yaml", "learning_rate: 0.2", ALL),
        ("rows.jsonl", '{"text": "b"}', ALL),
        ("grpo.yaml", "learning_rate: 0.2", ALL[3:]),
        ("eval.yaml", "samples: 3", ALL[5:]),
        ("cpu.yaml", "num_processes: 2", ALL),
    ],
)
def test_a_changed_file_reruns_its_stage_and_what_follows(project, fakes, tmp_path, name, line, again):
    path = project()
    run(path)
    with open(tmp_path / name, "a") as file:
        file.write(f"{line}\n")
    assert run(path) == again
    assert run(path) == []


def test_another_spelling_reruns_nothing(project, fakes, tmp_path):
    (tmp_path / "sft.yaml").write_text("dataset_name: rows.jsonl\ndiversity_steps: 5\nlearning_rate: 1.0\n")
    run(project())
    spelled = "# as before\nlearning_rate: 1\n\ndiversity_steps: 5\ndataset_name: ./rows.jsonl\nmax_grad_norm: 1.0\n"
    (tmp_path / "sft.yaml").write_text(spelled)
    assert run(project()) == []
    (tmp_path / "sft.yaml").write_text(spelled.replace("max_grad_norm: 1.0", "max_grad_norm: 2.0"))
    assert run(project()) == ALL


def test_a_moved_or_copied_run_is_the_same_run(project, fakes, tmp_path):
    path = project()
    run(path)
    folder = Path(read_config(path).output_dir)
    shutil.copytree(folder, tmp_path / "far/away/runs/copy")
    assert run(project(output_dir="far/away/runs/copy")) == []
    # with its configs, and chain.yaml under another name
    moved = tmp_path.with_name(f"{tmp_path.name}_moved") / "deeper"
    shutil.copytree(tmp_path, moved)
    (moved / "chain.yaml").rename(moved / "runs/other.yaml")
    text = (moved / "runs/other.yaml").read_text().replace('"far/away/', '"../far/away/')
    for name in ("sft", "grpo", "eval", "cpu"):
        text = text.replace(f'"{name}.yaml"', f'"../{name}.yaml"')
    (moved / "runs/other.yaml").write_text(text)
    assert run(moved / "runs/other.yaml") == []


def test_a_changed_option_reruns(project, fakes):
    run(project())
    assert run(project(selection={"rule": "last"})) == ALL[1:]
    assert run(project(selection={"rule": "last"}, handoff={"mode": "merge"})) == ALL[2:]
    assert run(project(selection={"rule": "last"}, handoff={"mode": "merge"}), "--seed", "1") == ALL


def test_a_missing_output_reruns(project, fakes):
    path = project()
    run(path)
    (Path(read_config(path).output_dir) / files.HANDOFF).unlink()
    assert run(path) == ALL[2:]


def test_what_changed_starts_in_a_clean_folder(project, fakes, tmp_path):
    path = project()
    run(path)
    folder = Path(read_config(path).output_dir)
    (folder / "grpo/old.txt").write_text("x")
    (tmp_path / "grpo.yaml").write_text("model_name_or_path: base\nlearning_rate: 0.2\n")
    run(path)
    assert (folder / "grpo.old-1/old.txt").exists() and not (folder / "grpo/old.txt").exists()


@pytest.mark.parametrize("code, ours", [(2, 2), (3, 3), (125, 125), (130, 1), (255, 1)])
def test_a_failed_stage_stops_the_chain(project, fakes, capfd, code, ours):
    path = project()
    folder = Path(read_config(path).output_dir)
    folder.mkdir(parents=True)
    (folder / "fail_grpo").write_text(str(code))
    with pytest.raises(SystemExit) as leaving:
        run(path)
    assert leaving.value.code == ours
    assert run.started == ALL[:5]
    err = capfd.readouterr().err
    assert err == f"aesl chain: stage grpo failed with exit code {code}; its log is {folder / 'logs/grpo.log'}\n"
    stage = json.loads((folder / "chain.json").read_text())["stages"]["grpo"]
    assert (stage["status"], stage["returncode"]) == ("failed", code)
    (folder / "fail_grpo").unlink()
    assert run(path) == ALL[4:]


def test_a_stage_cut_off_goes_on_from_its_last_whole_checkpoint(project, fakes, capfd):
    path = project()
    folder = Path(read_config(path).output_dir)
    folder.mkdir(parents=True)
    (folder / "fail_grpo").write_text("1")
    with pytest.raises(SystemExit):
        run(path)
    (folder / "fail_grpo").unlink()
    checkpoint(folder / "grpo", 20)
    cut(checkpoint(folder / "grpo", 40) / "optimizer.pt", 9)
    assert run(path) == ALL[4:]
    flags = dict(started(folder / "order.txt"))["grpo"]
    assert flags[flags.index("--resume_from_checkpoint") + 1] == str(folder / "grpo/checkpoint-20")
    out = capfd.readouterr().out
    assert f"{folder}/grpo/checkpoint-40 is not whole (optimizer.pt is cut off): passed over" in out
    assert f"goes on from {folder}/grpo/checkpoint-20" in out
    assert (folder / "logs/grpo.log").read_text().count("grpo speaks") == 2


def test_no_resume_from_checkpoints_of_other_inputs(project, fakes, tmp_path):
    path = project()
    folder = Path(read_config(path).output_dir)
    checkpoint(folder / "sft", 20)
    run(path)
    assert "--resume_from_checkpoint" not in dict(started(folder / "order.txt"))["sft"]
    assert (folder / "sft.old-1/checkpoint-20").exists()


def test_a_shared_sft_is_trained_once(project, fakes):
    shared = {"config": "sft.yaml", "output_dir": "shared"}
    assert run(project(sft=shared)) == ALL
    second = project("second.yaml", sft=shared, output_dir="runs/two")
    assert run(second) == ALL[1:]
    assert files.RunFolder(read_config(second).output_dir).sft.name == "shared"


def test_a_shared_sft_of_other_inputs_is_refused(project, fakes, tmp_path):
    shared = {"config": "sft.yaml", "output_dir": "shared"}
    run(project(sft=shared))
    second = project("second.yaml", sft=shared, output_dir="runs/two", seed=1)
    with pytest.raises(InputError, match="shared holds an SFT run of other inputs.*name another folder"):
        run(second)
    assert run.started == [] and not (tmp_path / "shared.old-1").exists()


# ---- Readiness


@pytest.mark.parametrize("verdict", ["collapsed", "not yet able", "never stops", "solved"])
def test_no_rl_from_what_is_not_ready(project, fakes, capfd, verdict):
    path = project()
    folder = Path(read_config(path).output_dir)
    folder.mkdir(parents=True)
    (folder / "verdict").write_text(verdict)
    for again in (ALL[:4], []):  # a chain that is run again stops again, without probing again
        with pytest.raises(SystemExit) as leaving:
            run(path)
        assert (leaving.value.code, run.started) == (3, again)
        line = capfd.readouterr().err.splitlines()[-1]
        assert line.startswith(f"aesl chain: no RL: {verdict}: do this (signal 0.02); ignore_readiness: true in ")
    assert run(project(ignore_readiness=True)) == ALL[4:]
    assert f"{verdict}: do this (signal 0.02); ignore_readiness is set, going on" in capfd.readouterr().out


def test_a_probe_made_again_changes_only_the_report(project, fakes, tmp_path):
    (tmp_path / "probe.yaml").write_text("num_samples: 8\n")
    path = project(probe={"config": "probe.yaml"})
    assert run(path) == ALL
    (tmp_path / "probe.yaml").write_text("num_samples: 16\n")
    assert run(path) == ["probe", "report"]
    without = [name for name in ALL if name != "probe"]
    assert run(project(probe=None)) == []
    assert make(project(probe=None)).names == without


def test_by_readiness_the_candidates_are_probed_first(project, fakes, tmp_path):
    path = project(selection={"rule": "readiness"})
    order = ["sft", "candidates", *ALL[1:]]
    assert run(path) == order
    assert run(path) == []
    (tmp_path / "grpo.yaml").write_text("model_name_or_path: base\nlearning_rate: 0.2\n")  # the probe's config too
    assert run(path) == order[1:]


def test_averages_are_made_before_the_selection(project, fakes):
    order = ["sft", "mix", *ALL[1:]]
    assert run(project(selection={"rule": "mix"})) == order
    assert run(project(selection={"rule": "mix"})) == []
    assert run(project(selection={"rule": "mix"}, mix={"weights": [0.5]})) == order[1:]


def test_averages_of_another_chain_are_not_taken_for_its_own(project, fakes):
    path = project(selection={"rule": "mix"})
    run(path)
    mixes = make(path).sft_dir / files.OWN / files.MIXES
    before = mixes.read_text()
    files.write_json(mixes, {"candidates": []})  # of a chain that shares the SFT, say
    assert run(path)[0] == "mix" and mixes.read_text() == before
    assert run(path) == []
    record = files.read_json(make(path).run / files.CHAIN)
    record["stages"]["mix"].pop("wrote")  # as an older version recorded it
    files.write_json(make(path).run / files.CHAIN, record)
    files.write_json(mixes, {"candidates": []})
    assert run(path) == []


def test_two_chains_in_one_folder_are_refused(project, fakes):
    path = project()
    folder = Path(read_config(path).output_dir)
    with lock(lock_beside(folder), ""):
        with pytest.raises(InputError, match="another chain is at work"):
            run(path)
    assert run(path) == ALL


def test_a_chain_in_the_folder_by_another_name_is_refused(project, fakes, tmp_path):
    path = project()
    folder = Path(read_config(path).output_dir)
    folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(folder)
    with lock(lock_beside(folder), ""), pytest.raises(InputError, match="another chain is at work in .*link"):
        run(path, "--output_dir", str(tmp_path / "link"))


def trains_in(folder: Path) -> AbstractContextManager:
    return training_lock(SimpleNamespace(output_dir=str(folder), process_index=0))


@pytest.mark.parametrize("name", ["sft", files.GRPO_DIR])
def test_no_training_begins_in_a_chains_folder_at_a_later_stage(project, fakes, monkeypatch, name):
    """What RL and the evaluation start from would change. The stage itself trains under the chain's lock."""
    path, select = project(), chains._select
    folder = Path(read_config(path).output_dir) / name

    def select_while_another_trains(chain, log):
        with pytest.raises(InputError, match=f"^a chain is at work with {folder}: end it first, or name another"):
            with trains_in(folder):
                pass
        monkeypatch.setenv(MARK, str(folder))
        with trains_in(folder):
            return select(chain, log)

    monkeypatch.setattr(chains, "_select", select_while_another_trains)
    assert run(path) == ALL
    monkeypatch.delenv(MARK)
    with trains_in(folder), pytest.raises(InputError, match=f"another chain is at work in {folder}, or a training"):
        run(path)


def test_no_chain_begins_where_a_training_is_at_work(project, fakes):
    """A folder that no chain has seen has no lock beside it; what is trained there must not be moved aside."""
    path = project()
    folder = Path(read_config(path).output_dir) / "sft"
    with trains_in(folder), pytest.raises(InputError, match=f"^a training is at work in {folder}: end it first"):
        run(path)
    assert run(path) == ALL


def test_select_calls_the_selection(project, monkeypatch, tmp_path):
    seen = {}

    def select_run(folder, out=None, **given):
        seen.update(folder=folder, out=out, **given)
        return {"step": 7, "applied": "last", "reason": "asked for", "replaces": "step 3, chosen by best_eval"}

    monkeypatch.setattr(chains, "select_run", select_run)
    chain = make(project(selection={"rule": "last", "patience": 2}))
    assert chains._select(chain, chain.run / "logs/select.log") == 0
    assert seen == {"folder": chain.sft_dir, "out": chain.run, "rule": "last", "patience": 2}
    said = "step 7 by last: asked for; replaces step 3, chosen by best_eval\n"
    assert (chain.run / "logs/select.log").read_text() == said


# ---- Signals

# The first stage starts a child of its own, as accelerate does, and the chain's process reports by its exit code.
# "alone" stands for torchrun: the worker has a session of its own, and here it heeds no signal.
DRIVER = """
import sys
from aesl_trl.chain import chain as chains
from aesl_trl.chain.stages import BUILDERS, Stage

STAGE = '''
import pathlib, signal, subprocess, sys, time
how = sys.argv[3]
worker = "import signal, sys, time, pathlib\\\\n"
worker += "def end(number, frame):\\\\n    pathlib.Path(sys.argv[1]).write_text(str(number)); sys.exit(0)\\\\n"
heed = "signal.SIG_IGN" if how == "alone" else "end"
worker += f"for number in (signal.SIGTERM, signal.SIGINT): signal.signal(number, {heed})\\\\n"
worker += "print(1, flush=True); time.sleep(60)\\\\n"
command = [sys.executable, "-c", worker, sys.argv[1]]
process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=how == "alone")
process.stdout.readline()
if how != "dies":
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
ready = pathlib.Path(sys.argv[2])
ready.with_suffix(".tmp").write_text(str(process.pid))
ready.with_suffix(".tmp").rename(ready)
process.wait()
'''

def build(name):
    def stage(chain):
        worker, ready = str(chain.run / f"worker_{name}"), str(chain.run / f"ready_{name}")
        return Stage(name, [sys.executable, "-c", STAGE, worker, ready, sys.argv[2]], chain.run / f"out_{name}")
    return stage

BUILDERS.update({name: build(name) for name in ("grpo", "report")})
chains.check_in_child = lambda command, argv: None
chains.main(["--config", sys.argv[1]])
"""


def wait_for(path: Path, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.05)


@pytest.mark.parametrize("how", ["dies", "saves"])
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_stage_and_chain(project, tmp_path, number, code, how):
    path = project(sft=..., eval=..., probe=None)
    folder = Path(read_config(path).output_dir)
    (tmp_path / "driver.py").write_text(DRIVER)
    command = [sys.executable, str(tmp_path / "driver.py"), str(path), how]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, text=True)
    wait_for(folder / "ready_grpo")
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == code, out
    # The launcher does not pass the signal on: the worker must have had it all the same.
    assert (folder / "worker_grpo").read_text() == str(int(number))
    assert not (folder / "ready_report").exists()
    assert json.loads((folder / "chain.json").read_text())["stages"]["grpo"]["status"] == "interrupted"
    assert signal.Signals(number).name in out


def driven(folder: Path, path: Path, how: str) -> subprocess.Popen:
    (folder / "driver.py").write_text(DRIVER)
    command = [sys.executable, str(folder / "driver.py"), str(path), how]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, text=True)


def is_running(process: str) -> bool:
    """Whether it is there and no zombie."""
    status = Path("/proc", process, "stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux's /proc")
def test_a_second_signal_kills_workers_in_sessions_of_their_own(project, tmp_path):
    path = project(sft=..., eval=..., probe=None)
    folder = Path(read_config(path).output_dir)
    process = driven(tmp_path, path, "alone")
    wait_for(folder / "ready_grpo")
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    assert is_running((folder / "ready_grpo").read_text())
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 143, out
    assert not is_running((folder / "ready_grpo").read_text())


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux's /proc")
def test_what_a_killed_chain_left_at_work_is_ended(project, tmp_path):
    """The stage of a chain that is killed goes on, and would write to the folder of the next one."""
    path = project(sft=..., eval=..., probe=None)
    folder = Path(read_config(path).output_dir)
    killed = driven(tmp_path, path, "alone")
    wait_for(folder / "ready_grpo")
    killed.kill()
    killed.communicate(timeout=30)
    orphan = (folder / "ready_grpo").read_text()
    assert is_running(orphan)
    (folder / "ready_grpo").unlink()
    process = driven(tmp_path, path, "dies")
    wait_for(folder / "ready_grpo")
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert f"ended 2 processes that a killed chain had left at work in {folder}" in out
    assert not is_running(orphan)


# A chain of FAKE stages that kills itself as it is about to rename its n-th file; 0: never.
KILLED = """
import os, signal, sys
from dataclasses import replace
from aesl_trl.chain import chain as chains; from aesl_trl import files
from aesl_trl.chain.stages import BUILDERS

def fake(builder):
    def build(chain):
        real = builder(chain)
        os.environ["FAKE_RUN"] = str(chain.run)
        command = [sys.executable, "-c", sys.argv[3], real.name, str(real.output)]
        return replace(real, command=command)
    return build

def select(chain, log):
    files.write_json(chain.run / files.SELECTION, {"step": 3})
    return 0

renamed = 0
def audit(event, arguments):
    global renamed
    renamed += event == "os.rename"
    if event == "os.rename" and renamed == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

BUILDERS.update({name: fake(builder) for name, builder in BUILDERS.items()})
chains.check_in_child = lambda command, argv: None
chains._select = select
sys.addaudithook(audit)
chains.main(["--config", sys.argv[1]])
"""


def killed_chain(folder: Path, path: Path, number: int) -> int:
    (folder / "killed.py").write_text(KILLED)
    command = [sys.executable, str(folder / "killed.py"), str(path), str(number), FAKE]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True).returncode


RENAMES = 17  # of a whole chain: before and after each of seven stages, for SFT two files each, and what select writes


@pytest.mark.parametrize(
    "number", [pytest.param(n, marks=[] if n in (4, 7, 9, 15) else pytest.mark.slow) for n in range(1, RENAMES + 2)]
)
def test_a_chain_killed_between_stages_goes_on(project, tmp_path, number):
    path = project()
    folder = Path(read_config(path).output_dir)
    code = killed_chain(tmp_path, path, number)
    assert code == (0 if number > RENAMES else -signal.SIGKILL)
    record, sft = folder / files.CHAIN, folder / "sft" / files.OWN / files.STAGE
    stages = files.read_json(record)["stages"] if record.exists() else {}
    stages |= {"sft": files.read_json(sft)} if sft.exists() else {}  # written first
    done = [name for name, stage in stages.items() if stage["status"] == "done"]
    first = [name for name, _ in started(folder / "order.txt")]
    assert killed_chain(tmp_path, path, 0) == 0
    again = [name for name, _ in started(folder / "order.txt")][len(first) :]
    assert again == [name for name in ALL if name not in (*done, "select")]
    assert {stage["status"] for stage in files.read_json(record)["stages"].values()} == {"done"}
    assert not list(folder.rglob(".*.tmp"))


def test_leftovers_of_killed_stages_are_removed(project, fakes):
    path = project()
    folder = Path(read_config(path).output_dir)
    (folder / ".handoff.4194305.tmp").mkdir(parents=True)  # above the largest process id
    (folder / ".chain.json.4194305.tmp").write_text("{")
    (folder / ".mine").write_text("x")
    run(path)
    assert {item.name for item in folder.glob(".*")} == {".mine", ".sft.lock", ".grpo.lock"}


# ---- The end


def test_closing_table(project, tmp_path):
    recorded = tmp_path / "results/nll/seed-1"
    figures = {"pass@1": 0.25, "pass@8": 0.5, "entropy": None, "self_bleu": 0.125, "groups_mixed": 0.75}
    files.write_json(recorded / files.EVALUATION, {"models": {"start": figures, "final": {**figures, "pass@1": 0.8}}})
    chain = make(project(report={"compare": ["results/nll/seed-1"]}))
    files.write_json(chain.run / files.EVALUATION, {"models": {"start": figures, "final": figures}})
    files.write_json(chain.run / files.SELECTION, {"step": 30})
    header, *rows = (line.split("  ") for line in chains.closing_table(chain).splitlines())
    assert [cell.strip() for cell in header if cell] == ["run", "model", "step", *chains.COLUMNS]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert cells[0] == ["one", "start", "30", "0.250", "0.500", "-", "0.125", "0.750"]
    assert cells[2][0] == "nll/seed-1 (recorded)" and cells[3][1:3] == ["final", "0.800"]


# ---- The command


def aesl_chain(*argv):
    command = [sys.executable, "-m", "aesl_trl.cli", "chain", *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)


SKILLS = ROOT / "recipes/skills-tiny/chain.yaml"


@pytest.mark.parametrize(
    "argv, part",
    [
        (["--config"], "--config"),
        ([], "missing: CONFIG.yaml"),
        (["--config", "none.yaml"], "none.yaml does not exist"),
        (["--config", str(SKILLS), "--confg", "none"], "--confg"),
        (["--config", str(SKILLS), "--seed", "a"], "--seed"),
    ],
)
def test_refusals_are_one_line(argv, part):
    done = aesl_chain(*argv)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("aesl chain: ") and part in done.stderr


def real_project(project, tmp_path, sft="", grpo=""):
    cpu = "use_cpu: true\nbf16: false\n"
    (tmp_path / "sft.yaml").write_text(f"dataset_name: rows.jsonl\ndiversity_steps: 5\n{cpu}{sft}")
    (tmp_path / "grpo.yaml").write_text(f"{cpu}{grpo}")
    (tmp_path / "eval.yaml").write_text("samples: 4\n")
    return project()


@pytest.mark.slow
def test_dry_run_prints_the_plan_and_starts_nothing(project, tmp_path):
    path = real_project(project, tmp_path)
    done = aesl_chain("--config", path, "--dry_run")
    assert done.returncode == 0, done.stderr
    *lines, hours = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[-7:]] == [f"{number}. {name}" for number, name in enumerate(ALL, 1)]
    assert "estimated" in hours
    assert not Path(read_config(path).output_dir).exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"sft": "cold_start_los: nll\n"}, ["sft.yaml", "'cold_start_los'", "'cold_start_loss'"]),
        ({"grpo": "num_generations: many\n"}, ["grpo.yaml", "num_generations must be int or null"]),
        ({"grpo": "per_device_train_batch_size: 2\nnum_generations: 3\n"}, ["grpo.yaml", "num_generations"]),
    ],
)
def test_a_stages_mistake_is_found_before_anything_starts(project, tmp_path, changes, parts):
    path = real_project(project, tmp_path, **changes)
    done = aesl_chain("--config", path)
    assert done.returncode == 2
    assert all(part in done.stderr for part in parts)
    assert not (Path(read_config(path).output_dir) / "chain.json").exists()


# ---- A stage that only looks done


LEAVES = "import sys; print('leaving early'); sys.exit(0)"


@pytest.mark.parametrize("name", ["sft", "handoff", "grpo"])
@pytest.mark.parametrize("is_there", [False, True])
def test_a_stage_that_leaves_with_0_and_no_output_has_failed(project, fakes, capfd, monkeypatch, name, is_there):
    """Its output of an earlier run does not count either."""
    if is_there:
        run(project())
    builder = BUILDERS[name]
    command = [sys.executable, "-c", LEAVES]
    monkeypatch.setitem(BUILDERS, name, lambda chain: replace(builder(chain), command=command, given={"again": True}))
    with pytest.raises(SystemExit) as leaving:
        run(project())
    assert leaving.value.code == 1
    assert run.started == ([] if is_there else ALL[: ALL.index(name)])
    folder = Path(read_config(project()).output_dir)
    record = json.loads((folder / "chain.json").read_text())["stages"]
    assert (record[name]["status"], record[name]["returncode"]) == ("failed", 0) and list(record)[-1] == name
    err = capfd.readouterr().err
    assert f"stage {name} ended with exit code 0 but has not written a whole" in err and f"{name}.log" in err


def test_a_torn_output_is_not_done(project, fakes):
    path = project()
    run(path)
    (Path(read_config(path).output_dir) / files.HANDOFF).write_text('{"mode": "fu')
    assert run(path) == ALL[2:]


# ---- Folders of somebody else


def test_no_log_and_no_lock_of_a_chain_follows_a_link(project, fakes, tmp_path):
    (tmp_path / "precious").write_text("mine")
    folder = Path(read_config(project()).output_dir)
    for link in (folder / "logs/report.log", folder / ".sft.lock", folder.parent / ".one.lock"):
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(tmp_path / "precious")
        with pytest.raises(InputError, match=f"{link.name} is a symlink"):
            run(project())
        link.unlink()
        assert (tmp_path / "precious").read_text() == "mine"
    run(project())


@pytest.mark.parametrize("name", ["sft", "grpo", "logs"])
def test_a_chain_writes_behind_no_link(project, fakes, tmp_path, name):
    folder = Path(read_config(project()).output_dir)
    folder.mkdir(parents=True)
    (folder / name).symlink_to(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=f"{name} leads by a symlink to"):
        run(project())
    assert sorted(tmp_path.iterdir()) == before


def test_a_chain_keeps_another_programs_chain_json(project, fakes):
    record = Path(read_config(project()).output_dir) / files.CHAIN
    files.write_text(record, '{"blocks": []}')
    with pytest.raises(InputError, match="output_dir: .*chain.json was written by something else"):
        run(project())
    assert record.read_text() == '{"blocks": []}'


def test_an_output_dir_that_is_not_used_is_not_judged(project, fakes, tmp_path):
    path = project(output_dir="rows.jsonl/x")
    with pytest.raises(InputError, match="output_dir: .*rows.jsonl is a file"):
        read_config(path)
    assert read_config(path, output_dir=str(tmp_path / "good")).output_dir == str(tmp_path / "good")
    with pytest.raises(InputError, match="output_dir: .*rows.jsonl is a file"):
        read_config(project(), output_dir=str(tmp_path / "rows.jsonl/y"))
