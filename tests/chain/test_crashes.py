"""Runs that are killed at any moment, or told to stop, and started again: they end as an undisturbed run, bit for bit.

Where they are struck is in crash_script.py. How torn checkpoints are told is in test_checkpoints.py, the chain with
stages of milliseconds in test_chain.py.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from crash_runs import ROOT, SUPPORT, chained, crash_project, without_clock

from aesl_trl import files
from aesl_trl.training.checkpoints import INCOMPLETE, MANIFEST, is_whole, numbered, read_manifest


class Server:
    """Runs commands in forked processes of one crash_script.py."""

    def __init__(self, project: Path):
        self.project = project
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(SUPPORT / "crash_script.py")]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def argv(self, out: Path, command: str = "sft") -> list[str]:
        """The same of the first run and of all that go on."""
        config = str(self.project / f"{command}.yaml")
        return ["--config", config, "--output_dir", str(out), "--resume_from_checkpoint", "true"]

    def run(self, out: Path, *flags: str, crash: str = "", command: str = "sft", delay_s: float | None = None) -> int:
        """One run, killed after `delay_s` or struck at `crash`; its exit code."""
        argv = [*self.argv(out, command), *flags]
        env = {"CRASH": crash, "CRASH_FOLDER": str(out)}
        job = {"command": command, "argv": argv, "env": env, "log": f"{out}.log", "delay_s": delay_s}
        print(json.dumps(job), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())


def log_of(out: Path) -> str:
    return Path(f"{out}.log").read_text()


def wait_for(path: Path, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.05)


def counted(out: Path) -> dict:
    """How often each event of crash_script.py came in the last run that ended by itself."""
    return json.loads(re.findall(r"^counts (.*)$", log_of(out), re.M)[-1])


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_model_dir):
    return crash_project(tmp_path_factory.mktemp("crashes"), tiny_model_dir)


@pytest.fixture(scope="module")
def server(project):
    server = Server(project)
    yield server
    server.process.stdin.close()
    assert server.process.wait(60) == 0
    server.process.stdout.close()


@pytest.fixture(scope="module")
def whole(server):
    """The undisturbed run."""
    out, start = server.project / "whole", time.monotonic()
    assert server.run(out) == 0, log_of(out)
    server.seconds = time.monotonic() - start
    return out


# ---- What must be equal


def ending(out: Path) -> dict:
    """All that a run leaves for other stages, without clock times."""
    found = {
        "weights": (out / "model.safetensors").read_bytes(),
        "logs": without_clock(files.read_log(out)),
    }
    if (out / files.OWN / files.DIVERSITY).exists():
        selection = files.read_json(out / files.OWN / files.SELECTION)
        for name in ("seconds", "time_share"):
            selection["evidence"]["measured"].pop(name)
        series = files.read_jsonl(out / files.OWN / files.DIVERSITY)
        found |= {
            "diversity": without_clock(series),
            "positions": files.read_jsonl(out / files.OWN / files.POSITIONS),
            "selection": selection,
            "samples": {path.name: path.read_text() for path in (out / files.OWN / files.SAMPLES).iterdir()},
            "weights kept": {
                str(path.relative_to(out)): path.read_bytes()
                for folder in (files.CANDIDATES, files.SELECTED)
                for path in (out / files.OWN / folder).rglob("*.safetensors")
            },
            "leftovers": sorted(path.name for path in out.rglob(".*")),
        }
    return found


def assert_same_ending(out: Path, whole: Path) -> None:
    found, expected = ending(out), ending(whole)
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == expected[name], name


def run_to_the_end(server, out: Path, kills: list[dict], **common) -> None:
    """Kill one run after the other, each going on where the one before was struck; then leave one alone."""
    for kill in kills:
        code = server.run(out, **kill, **common)
        assert code in (0, -9), log_of(out)  # 0: over before it was struck
    assert server.run(out, **common) == 0, log_of(out)


# ---- SIGKILL


def test_the_undisturbed_run_does_what_a_kill_could_spoil(whole):
    assert [path.name for path in numbered(whole)] == ["checkpoint-9", "checkpoint-6"]
    assert all((path / MANIFEST).exists() for path in numbered(whole))
    assert [row["step"] for row in files.read_jsonl(whole / files.OWN / files.DIVERSITY)] == [0, 2, 4, 6, 8, 9]
    assert len(list((whole / files.OWN / files.CANDIDATES).iterdir())) == 2
    assert {"write", "tear", "sample", "step"} <= counted(whole).keys()


def test_three_kills_change_nothing(server, whole, tmp_path):
    """In the save of checkpoint-6, while sampling, and at any change of a file."""
    out, chance, most = tmp_path / "out", random.Random(0), counted(whole)
    kills = [
        {"crash": f"tear:{chance.randint(6, 8)}:KILL"},  # four files a checkpoint; training_args.bin may be torn
        {"crash": f"sample:{chance.randint(1, most['sample'] // 3)}:KILL"},
        {"crash": f"write:{chance.randint(1, most['write'] // 3)}:KILL"},
    ]
    run_to_the_end(server, out, kills)
    assert_same_ending(out, whole)
    assert f"aesl sft: {out}/checkpoint-6 is not whole (" in log_of(out)
    assert f"aesl sft: goes on from {out}/checkpoint-3" in log_of(out)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_twenty_kills_change_nothing(server, whole, tmp_path, seed):
    chance, most = random.Random(seed), counted(whole)
    kills = [{"delay_s": chance.uniform(0, server.seconds)} for _ in range(2)]
    events = chance.choices(("write", "write", "tear", "sample"), k=2)
    kills += [{"crash": f"{event}:{chance.randint(1, most[event])}:KILL"} for event in events]
    chance.shuffle(kills)
    run_to_the_end(server, tmp_path / "out", kills)
    assert_same_ending(tmp_path / "out", whole)


def test_a_kill_after_the_last_checkpoint_trains_no_further_step(server, whole, tmp_path):
    """The last step is inside an epoch, where Trainer by itself would go on."""
    out = tmp_path / "out"
    assert server.run(out, crash=f"write:{counted(whole)['write'] - 1}:KILL") == -9
    assert server.run(out) == 0, log_of(out)
    assert f"goes on from {out}/checkpoint-9" in log_of(out) and counted(out).get("step", 0) == 0
    assert_same_ending(out, whole)


# ---- Signals


def test_signals_in_a_step_while_sampling_and_while_loading(server, whole, tmp_path):
    out = tmp_path / "out"
    assert server.run(out, crash="step:5:TERM") == 143
    assert "aesl sft: SIGTERM: saved checkpoint-5; " in log_of(out) and is_whole(out / "checkpoint-5")
    assert not (out / files.OWN / files.SELECTION).exists()
    assert server.run(out, crash="sample:3:INT") == 130
    assert server.run(out, crash="load:1:TERM") == 143
    assert [path.name for path in numbered(out)] == ["checkpoint-5", "checkpoint-3"]
    assert server.run(out) == 0, log_of(out)
    assert log_of(out).count(f"goes on from {out}/checkpoint-5") == 3
    assert_same_ending(out, whole)


def test_a_signal_to_the_command_itself(server, whole, tmp_path):
    """From outside, to a process of its own; the next run goes on."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "aesl_trl.sft", *server.argv(out)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CRASH_FOLDER": str(out), "CRASH_SLEEP": "0.3"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
    wait_for(out / "checkpoint-3" / MANIFEST)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    (saved,) = re.findall(r"^aesl sft: SIGINT: saved checkpoint-(\d+)", errors, re.M)
    assert "Traceback" not in errors and is_whole(out / f"checkpoint-{saved}")
    assert server.run(out) == 0, log_of(out)
    assert_same_ending(out, whole)


# ---- A full disk


@pytest.mark.parametrize("bytes_, name", [(30_000, "model.safetensors"), (60_000, "optimizer.pt")])
def test_a_full_disk_keeps_the_checkpoint_before(server, whole, tmp_path, bytes_, name):
    out, sizes = tmp_path / "out", read_manifest(whole / "checkpoint-6")["files"]
    assert max(facts["bytes"] for other, facts in sizes.items() if other < name) < bytes_ < sizes[name]["bytes"]
    assert server.run(out, "--save_total_limit", "1", crash=f"step:6:FULL:{bytes_}") == 1
    assert "Traceback" not in log_of(out)
    (line,) = re.findall(r"^aesl sft: .* cannot be written: .*$", log_of(out), re.M)
    assert line.endswith(f"; the last whole checkpoint is {out}/checkpoint-3")
    assert server.run(out) == 0, log_of(out)
    assert_same_ending(out, whole)


# ---- GRPO


@pytest.mark.slow
def test_rl_cut_off_after_its_last_checkpoint(server, tmp_path):
    """It trains no further step, and its last row of the log has the figures of the steps since the row before."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert server.run(whole, command="grpo") == 0, log_of(whole)
    shutil.copytree(whole, out)
    for name in ("model.safetensors", files.TRAINER_STATE):
        (out / name).unlink()
    assert server.run(out, command="grpo") == 0, log_of(out)
    assert "reward" in files.read_log(whole)[-1]
    assert_same_ending(out, whole)


@pytest.mark.slow
@pytest.mark.parametrize("shared", [1, 2])
def test_grpo_struck_four_times(server, tmp_path, shared):
    """`shared`: steps that train on the samples of one generation, which a stop and a save must not come between."""
    flags = ("--steps_per_generation", str(shared), "--learning_rate", "0.01")
    common = {"command": "grpo"}
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert server.run(whole, *flags, **common) == 0, log_of(whole)
    assert server.run(out, *flags, crash="step:3:TERM", **common) == 143
    saved = 3 if shared == 1 else 4
    assert f"aesl grpo: SIGTERM: saved checkpoint-{saved}; " in log_of(out)
    for crash in ("load:1:INT", "tear:2:KILL", "sample:1:KILL"):
        assert server.run(out, *flags, crash=crash, **common) == (130 if "INT" in crash else -9)
    assert server.run(out, *flags, **common) == 0, log_of(out)
    assert_same_ending(out, whole)
    rewards = [row["reward"] for row in ending(whole)["logs"] if "reward" in row]
    assert len(rewards) == 2 and all(0 <= reward <= 1 for reward in rewards)


# ---- Two processes


def launched(server, out: Path, *flags: str, sleep_s: float = 0.0) -> subprocess.Popen:
    """The command in two processes, in a session of their own; loaders' workers get the signals of the group too."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "aesl_trl.sft"]
    command = [sys.executable, *launcher, *server.argv(out), "--dataloader_num_workers", "1", *flags]
    env = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CRASH_FOLDER": str(out), "CRASH_SLEEP": str(sleep_s)}
    return subprocess.Popen(
        [*command, "--per_device_train_batch_size", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **env},
        start_new_session=True,
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes(server, tmp_path):
    """The launcher is told to stop and passes it on; then all is killed; then it is left alone."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    undisturbed = launched(server, whole)
    printed, _ = undisturbed.communicate(timeout=280)
    assert undisturbed.returncode == 0, printed
    assert read_manifest(whole / "checkpoint-9")["num_processes"] == 2

    stopped = launched(server, out, sleep_s=1.0)
    wait_for(out / "checkpoint-3" / MANIFEST)
    stopped.send_signal(signal.SIGTERM)
    printed, _ = stopped.communicate(timeout=120)
    (saved,) = re.findall(r"^aesl sft: SIGTERM: saved checkpoint-(\d+)", printed, re.M)
    assert stopped.returncode != 0 and is_whole(out / f"checkpoint-{saved}") and int(saved) < 6, printed

    killed = launched(server, out, sleep_s=1.0)
    wait_for(out / "checkpoint-6" / INCOMPLETE)
    end_processes_of(killed)
    killed.communicate(timeout=60)
    assert not is_whole(out / "checkpoint-6")

    last = launched(server, out)
    printed, _ = last.communicate(timeout=280)
    assert last.returncode == 0, printed
    assert f"goes on from {out}/checkpoint-{saved}" in printed
    assert_same_ending(out, whole)


def end_processes_of(launcher: subprocess.Popen) -> None:
    """SIGKILL to the launcher and to all that it has started: torchrun gives its workers sessions of their own."""
    found = [launcher.pid]
    for process in found:
        children = Path(f"/proc/{process}/task/{process}/children")
        found += [int(child) for child in children.read_text().split()]
    for process in found:
        os.kill(process, signal.SIGKILL)


# ---- The whole chain


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_chain_told_to_stop_and_killed(project, tmp_path):
    chain_config = project / "chain.yaml"
    whole, out = tmp_path / "whole", tmp_path / "out"
    undisturbed = chained(chain_config, whole)
    printed, _ = undisturbed.communicate()
    assert undisturbed.returncode == 0, printed
    assert files.read_json(whole / "sft" / files.OWN / files.RUN)["num_processes"] == 2

    stopped = chained(chain_config, out, sleep_s=1.0)
    wait_for(out / "sft" / "checkpoint-3" / MANIFEST)
    stopped.send_signal(signal.SIGTERM)
    printed, _ = stopped.communicate(timeout=120)
    assert stopped.returncode == 143, printed
    assert "aesl sft: SIGTERM: saved checkpoint-" in printed and "run it again to go on" in printed
    assert files.read_json(out / files.CHAIN)["stages"]["sft"]["status"] == "interrupted"

    killed = chained(chain_config, out, sleep_s=1.0)
    wait_for(out / "grpo" / "checkpoint-2" / MANIFEST, seconds=300)
    killed.kill()  # the chain alone: its stage goes on
    killed.communicate(timeout=60)

    last = chained(chain_config, out)
    printed, _ = last.communicate()
    assert last.returncode == 0, printed
    assert "grpo was cut off" in printed and re.search("sft is done with the same inputs: skipped", printed)
    assert_same_ending(out / "sft", whole / "sft")
    assert_same_ending(out / "grpo", whole / "grpo")
    assert files.read_json(out / files.EVALUATION)["models"] == files.read_json(whole / files.EVALUATION)["models"]
