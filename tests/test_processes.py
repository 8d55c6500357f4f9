"""processes: a lock that ends with its process, and nothing left behind of what a killed stage had started."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time

import filelock
import psutil
import pytest
from held_locks import held_elsewhere

from aesl_trl import processes
from aesl_trl.errors import InputError


@pytest.fixture
def child():
    """Start Python code as a child process that is certain to end with the test."""
    started = []

    def start(code: str, *arguments, **options) -> subprocess.Popen:
        command = [sys.executable, "-c", code, *map(str, arguments)]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


# ---- The lock


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    path = tmp_path / "new" / ".lock"
    with held_elsewhere(path):
        for again in (False, True):  # a refusal takes nothing from the holder
            with (
                pytest.raises(InputError, match="^another one is at work$"),
                processes.lock(path, "another one is at work", again=again),
            ):
                pass
    with processes.lock(path, "it is taken"):
        assert path.is_file()


def test_a_process_that_asks_again_holds_the_lock_until_its_last_block_ends(tmp_path):
    path = tmp_path / ".lock"
    with processes.lock(path, "held", again=True):
        for _ in range(2):
            with processes.lock(path, "held", again=True):
                pass
        with pytest.raises(InputError, match="held"), processes.lock(path, "held"):
            pass
    with processes.lock(path, "held"):
        pass


def test_a_lock_is_released_and_its_file_stays(tmp_path):
    path = tmp_path / ".lock"
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), processes.lock(path, "held"):
            with pytest.raises(InputError, match="held"), processes.lock(path, "held"):
                pass
            raise ZeroDivisionError
        assert path.is_file()


def test_a_file_system_without_locks_is_told_and_work_goes_on(tmp_path, monkeypatch, capsys):
    def no_locks(self, *args, **kwargs):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "acquire", no_locks)
    with processes.lock(tmp_path / ".lock", "held"):
        pass
    assert capsys.readouterr().err == (
        f"aesl_trl: {tmp_path / '.lock'} cannot be locked (No locks available): nothing keeps others out\n"
    )


def test_a_folder_that_takes_no_files_is_no_matter_of_locks(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError), processes.lock(tmp_path / "file" / ".lock", "held"):
        pass


# ---- Processes left behind

SLEEP = "import time; print('up', flush=True); time.sleep(600)"
GRANDCHILD = f"""
import subprocess, sys
print(subprocess.Popen([sys.executable, "-c", {SLEEP!r}], start_new_session=True).pid, flush=True)
sys.stdin.read()
"""


def marked(folder) -> dict[str, str]:
    return {**os.environ, processes.MARK: str(folder)}


def test_marked_processes_are_ended_in_sessions_of_their_own_too(tmp_path, child):
    launcher = child(GRANDCHILD, env=marked(tmp_path), start_new_session=True)
    worker = int(launcher.stdout.readline())
    assert launcher.stdout.readline() == "up\n"
    other = child(SLEEP, env=marked(tmp_path / "other"))
    assert other.stdout.readline() == "up\n"
    assert set(processes.end_processes(str(tmp_path))) == {launcher.pid, worker}
    assert launcher.wait(30) == -signal.SIGKILL
    assert other.poll() is None
    deadline = time.monotonic() + 30
    while processes.end_processes(str(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes.end_processes(str(tmp_path)) == []


def test_orphans_are_ended_and_told(tmp_path, child):
    orphan, lines = child(SLEEP, env=marked(tmp_path)), []
    assert orphan.stdout.readline() == "up\n"
    processes.end_orphans(tmp_path, lines.append, "chain")
    assert not processes.is_at_work(psutil.Process(orphan.pid))  # its locks are free, not only its mark gone
    assert orphan.wait(30) == -signal.SIGKILL
    assert lines == [f"ended 1 processes that a killed chain had left at work in {tmp_path}"]
    processes.end_orphans(tmp_path, lines.append, "chain")
    assert len(lines) == 1


# ---- Running


@pytest.mark.parametrize(
    ("returncode", "code"), [(1, 1), (2, 2), (3, 3), (125, 125), (126, 1), (137, 1), (255, 1), (-9, 1), (-15, 1)]
)
def test_exit_code(returncode, code):
    assert processes.exit_code(returncode) == code


def test_a_check_runs_dry_in_a_child_and_its_refusal_is_the_exit_code(capfd):
    with pytest.raises(SystemExit) as leaving:
        processes.check_in_child("select", ["run"])
    assert leaving.value.code == 2
    assert capfd.readouterr().err == "aesl select: unrecognized arguments: --dry_run here (see aesl select --help)\n"


def test_output_goes_to_the_log_and_the_exit_code_comes_back(tmp_path, capsys):
    command = [sys.executable, "-c", "import sys; print('one'); print('two', file=sys.stderr); sys.exit(7)"]
    log, interrupts = tmp_path / "logs" / "stage.log", processes.Interrupts()
    assert processes.run_process(command, log, interrupts, env=marked(tmp_path)) == 7
    assert sorted(log.read_text().splitlines()) == ["one", "two"]
    assert sorted(capsys.readouterr().out.splitlines()) == ["one", "two"]
    processes.run_process(command, log, interrupts, env=marked(tmp_path), append=True)
    assert len(log.read_text().splitlines()) == 4


def test_a_signal_reaches_the_stage_and_handlers_are_put_back(tmp_path):
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))\n"
        "print('up', flush=True); time.sleep(600)"
    )
    before = signal.getsignal(signal.SIGTERM)
    log = tmp_path / "stage.log"

    def interrupt():
        while not (log.is_file() and log.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=interrupt, daemon=True)
    with processes.Interrupts() as interrupts:
        sender.start()
        assert processes.run_process([sys.executable, "-c", code], log, interrupts, env=marked(tmp_path)) == 5
    sender.join()
    assert interrupts.received == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_closed_its_streams_does_not_outlive_its_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "LINGER_S", 0.1)
    leave = f"""
import subprocess, sys
null = {{name: subprocess.DEVNULL for name in ("stdin", "stdout", "stderr")}}
print(subprocess.Popen([sys.executable, "-c", {SLEEP!r}], start_new_session=True, **null).pid)
"""
    log = tmp_path / "stage.log"
    assert processes.run_process([sys.executable, "-c", leave], log, processes.Interrupts(), env=marked(tmp_path)) == 0
    deadline = time.monotonic() + 30  # it was killed, and is gone in a moment
    while processes.started_for(str(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes.started_for(str(tmp_path)) == []


def test_what_killed_processes_left_of_their_scratch_is_removed(tmp_path, monkeypatch, child):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with processes.scratch("check") as folder:
        mark = folder.name.split("-")[2]  # of this host
    ours = f"aesl-check-{mark}"
    others = [f"{ours}-1-x", f"{ours}-me-x", f"{ours}-{10**12}-x"]  # 1 is alive, and no system counts so far
    others += [f"aesl-probe-{mark}-4194305-x", "aesl-check-0badcafe-4194305-x", "check-4194305-x"]
    for name in (*others, f"{ours}-4194305-x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "grpo.yaml").write_text("env: {}")
    with processes.scratch("check") as folder:
        assert folder.parent == tmp_path and list(folder.iterdir()) == []
        assert {path.name for path in tmp_path.iterdir()} == {*others, folder.name}
    assert {path.name for path in tmp_path.iterdir()} == set(others)


# ---- What a child imports, and what it prints


def hostile_folder(folder):
    """Write modules that note in `ran` that they were imported: our package's name, an optional one, the library's."""
    for name in ("aesl_trl/__init__", "wandb", "h2", "random", "sitecustomize"):
        path = folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"open({str(folder / 'ran')!r}, 'a').write({name!r} + '\\n')\n")
    return folder


def test_a_child_imports_nothing_from_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(hostile_folder(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f":{tmp_path / 'own'}:")  # an empty entry stands for the current folder
    code = "import aesl_trl, random, sys, importlib.util; print(importlib.util.find_spec('h2')); print(sys.path)"
    for command in (["-c", code], ["-m", "aesl_trl.cli", "--version"]):
        done = subprocess.run([sys.executable, *command], env=processes.child_env(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert not (tmp_path / "ran").exists()
        if command[0] == "-c":
            assert str(tmp_path / "own") in done.stdout  # what the user's PYTHONPATH names stays


def test_the_checks_import_nothing_from_the_current_folder(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(hostile_folder(tmp_path))
    with pytest.raises(SystemExit) as leaving:
        processes.check_in_child("select", ["run"])
    assert leaving.value.code == 2 and "unrecognized arguments: --dry_run" in capfd.readouterr().err
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_ranks_behind_accelerate_import_nothing_from_the_current_folder(tmp_path, monkeypatch):
    from aesl_trl.chain.stages import launch

    monkeypatch.chdir(hostile_folder(tmp_path))
    (tmp_path / "two.yaml").write_text("use_cpu: true\ndistributed_type: MULTI_CPU\nnum_processes: 2\n")
    command = launch(str(tmp_path / "two.yaml"), "aesl_trl.cli", "--version")
    done = subprocess.run(command, env=processes.child_env(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "aesl_trl 0" in done.stdout and not (tmp_path / "ran").exists()


def test_a_stage_cannot_command_the_terminal(tmp_path, capsys):
    """What colours and progress bars need passes; a title, a cleared screen and the clipboard's write do not."""
    said = "\x1b[32m 5%|#\x1b[0m\r\x1b[A\x1b[K done\x1b]0;owned\x07\x1b[2J\x1b]52;c;eA==\x07\x9b2J\n"
    command = [sys.executable, "-c", f"import sys; sys.stdout.write({said!r})"]
    log = tmp_path / "stage.log"
    assert processes.run_process(command, log, processes.Interrupts(), env=marked(tmp_path)) == 0
    shown = "\x1b[32m 5%|#\x1b[0m\r\x1b[A\x1b[K done\u241b]0;owned\u2407\u241b[2J\u241b]52;c;eA==\u2407\ufffd2J\n"
    assert capsys.readouterr().out == shown
    assert log.read_bytes().decode() == shown


# ---- Links


def test_no_lock_and_no_log_follows_a_link(tmp_path, capsys):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    before = precious.stat().st_mtime_ns
    for name in (".sft.lock", "stage.log"):
        (tmp_path / name).symlink_to(precious)
    with pytest.raises(InputError, match=r"\.sft\.lock is a symlink"), processes.lock(tmp_path / ".sft.lock", "held"):
        pytest.fail("nothing is locked")
    for append in (True, False):
        with pytest.raises(InputError, match=r"stage\.log is a symlink"):
            command = [sys.executable, "-c", "print('never started')"]
            processes.run_process(
                command, tmp_path / "stage.log", processes.Interrupts(), env=marked(tmp_path), append=append
            )
    assert precious.read_text() == "mine" and precious.stat().st_mtime_ns == before
    assert capsys.readouterr().out == ""


def test_a_lock_keeps_what_its_file_holds(tmp_path):
    (tmp_path / ".lock").write_text("mine")
    with processes.lock(tmp_path / ".lock", "held"):
        pass
    assert (tmp_path / ".lock").read_text() == "mine"
