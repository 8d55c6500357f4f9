"""macOS and Windows, simulated on Linux: what imports, what works, and one line where something cannot work.

No machine of either kind was at hand. The simulation takes away modules, calls and signals (support/other_system.py).
"""

import ast
import os
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import aesl_trl
from aesl_trl import processes, provenance
from aesl_trl.errors import InputError
from aesl_trl.rewards import functions, grading
from aesl_trl.training import checkpoints


PACKAGE = Path(aesl_trl.__file__).parent
SIMULATION = Path(__file__).parent / "support" / "other_system.py"
# Names that Windows or macOS does not have, with the files that ask first, or run where they are there
POSIX_MODULES = {"fcntl", "resource", "pwd", "grp", "termios", "pty", "crypt", "syslog"}
POSIX_NAMES = {
    *("killpg", "getpgid", "setsid", "fork", "sched_getaffinity", "register_at_fork", "getuid", "mkfifo", "setrlimit"),
    *("O_NOFOLLOW", "O_ASYNC", "SIGKILL", "SIGXCPU", "SIGIO", "SIGHUP", "SIGUSR1", "SIGUSR2", "alarm", "setitimer"),
}
ASKED = {
    "processes.py": {"killpg"},
    "provenance.py": {"sched_getaffinity"},
    "rewards/grading.py": {
        *("fcntl", "resource", "register_at_fork", "setrlimit", "O_ASYNC", "SIGXCPU", "SIGIO", "SIGKILL"),
    },
    "training/signals.py": {"alarm"},  # in a handler of SIGTERM, which Windows does not send
}


@cache
def nodes():
    """Return the syntax nodes of each file of the package."""
    return {path: list(ast.walk(ast.parse(path.read_text(encoding="utf-8")))) for path in PACKAGE.rglob("*.py")}


def posix_names(path):
    for node in nodes()[path]:
        if isinstance(node, ast.Import):
            yield from POSIX_MODULES & {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from POSIX_MODULES & {node.module}
        elif isinstance(node, ast.Attribute) and node.attr in POSIX_NAMES:
            yield node.attr


def test_only_these_files_use_what_another_system_lacks():
    found = {path.relative_to(PACKAGE).as_posix(): set(posix_names(path)) for path in nodes()}
    assert {name: names for name, names in found.items() if names} == ASKED


def test_text_files_are_utf_8_on_every_system():
    """Windows would read and write them in the user's code page. `files.write_text` writes UTF-8 always."""
    found = []
    for path, found_nodes in nodes().items():
        for node in found_nodes:
            if isinstance(node, ast.Call) and _handles_text(node):
                if all(keyword.arg != "encoding" for keyword in node.keywords):
                    found.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert not found


def _handles_text(call):
    if isinstance(call.func, ast.Attribute):
        return call.func.attr in ("read_text", "write_text") and ast.unparse(call.func.value) != "files"
    texts = [node.value for node in ast.walk(call) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    is_binary = any("b" in text and set(text) <= set("rwaxb+") for text in texts)  # its mode
    return isinstance(call.func, ast.Name) and call.func.id == "open" and not is_binary


def test_cores_without_affinity(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    assert provenance.num_cores() == os.cpu_count()
    assert grading._default_size() >= 1
    assert f"{os.cpu_count()} cores" in provenance.hardware()


def test_a_graded_reward_on_windows_is_one_line(monkeypatch):
    monkeypatch.setattr(grading, "resource", None)
    with pytest.raises(InputError, match="math_reward needs child processes with limits .* use WSL, Linux or macOS"):
        functions.load_reward_funcs(["math_reward"])
    with pytest.raises(InputError, match="which Windows does not have"):
        grading.Graders().grade([grading.Answer("math_reward", "1", "1")], 1.0)


def test_a_stage_is_ended_without_process_groups(monkeypatch, tmp_path):
    """On Windows a first Ctrl-C is the console's, and a second one ends the stage."""
    monkeypatch.delattr(os, "killpg")
    interrupts = processes.Interrupts()
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    process = interrupts.start(command, {**os.environ, processes.MARK: str(tmp_path)})
    interrupts._handle(signal.SIGINT, None)
    assert process.poll() is None
    interrupts._handle(signal.SIGINT, None)
    assert process.wait(30) != 0
    process.stdout.close()


def test_a_checkpoint_is_synced_where_folders_cannot_be_opened(monkeypatch, tmp_path):
    (tmp_path / "weights").write_bytes(b"1")
    flags, true_open = [], os.open

    def windows_open(path, flag, *more):
        if Path(path).is_dir():
            raise PermissionError(path)
        flags.append(flag)
        return true_open(path, flag, *more)

    monkeypatch.setattr(checkpoints.os, "open", windows_open)
    monkeypatch.setattr(checkpoints, "ON_WINDOWS", True)
    checkpoints._sync(tmp_path)
    checkpoints._sync(tmp_path / "weights")
    assert flags == [os.O_RDWR]


class _Greedy:
    """A child that has taken a gigabyte since it was ready."""

    pid = os.getpid()

    def kill(self):
        self.killed = True


def test_the_parent_looks_at_memory_where_the_kernel_does_not(monkeypatch):
    child = object.__new__(grading._Child)
    child.process, child._index, child.is_greedy, child._most_memory = _Greedy(), 0, False, 2**62
    child.look_at_memory()
    assert not child.is_greedy
    child._most_memory = 1
    child.look_at_memory()
    assert child.is_greedy and child.process.killed


def simulate(system, code, *argv, timeout=300):
    command = [sys.executable, str(SIMULATION), system, code, *argv]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


START = """
from aesl_trl import AESLSFTConfig, AESLSFTTrainer, DiversityCallback
import aesl_trl.sft, aesl_trl.grpo
from aesl_trl import cli
for command in cli.COMMANDS:
    try:
        cli.main([command, "--help"])
    except SystemExit as end:
        assert not end.code, command
print("all started")
"""
REWARD = """
from aesl_trl.rewards.functions import load_reward_funcs
(reward,) = load_reward_funcs(["accuracy_reward"])
print(reward(completions=[[{"role": "assistant", "content": "\\\\boxed{2}"}]], solution=["$2$"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("system", ["windows", "macos"])
def test_imports_and_every_command_start(system):
    assert simulate(system, START).endswith("all started\n")


@pytest.mark.slow
def test_graded_rewards_work_without_affinity_and_address_space_limits():
    assert simulate("macos", REWARD) == "[1.0]\n"
