"""Child processes with all that they start (output copied, signals passed on, nothing left behind), and locks."""

import codecs
import hashlib
import os
import re
import shutil
import signal
import site
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

import filelock
import psutil

from .errors import InputError, say, visible
from .files import in_place


GRACE_S = 300  # seconds that a stage has to end after SIGINT or SIGTERM: the rest of a step, and a checkpoint
LINGER_S = 10  # seconds that what a stage has started may outlive it
ORPHANS_S = 30  # seconds that we wait for a killed process, which may be in the midst of a write
# Holds the folder that a stage writes to. All that the stage starts inherits it, also in sessions of their own.
MARK = "AESL_STAGE_FOLDER"
# Back to the line's start; the cursor off or on; colour, a line up, the rest of the line erased
OF_PROGRESS_BARS = re.compile(r"(\r|\x1b\[(?:\?25[lh]|[0-9;]{0,32}[mAK]))")
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows ends a process at once on SIGTERM


@contextmanager
def handling(signals: Iterable[int], handler: Callable) -> Iterator[None]:
    """Handle `signals` by `handler` inside the block, and as before after it."""
    before = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class Interrupts(ExitStack):
    """Passes SIGINT and SIGTERM on to the stage that runs and waits for its end; a second signal kills the stage."""

    def __init__(self):
        super().__init__()
        self.process: subprocess.Popen | None = None
        self.folder: str | None = None  # the stage's, by which all of its processes are known
        self.received: list[int] = []
        self.deadline = float("inf")

    def __enter__(self):
        self.enter_context(handling(STOP_SIGNALS, self._handle))
        return self

    def _handle(self, number: int, _frame) -> None:
        self.received.append(number)
        if self.folder is None:
            sys.exit(128 + number)
        self.deadline = time.monotonic() + GRACE_S
        self._send(number if len(self.received) == 1 else KILL)

    def _send(self, number: int) -> None:
        if self.process is None:  # it is just being started
            return
        if hasattr(os, "killpg"):  # on Windows Ctrl-C reaches every process of the console, also the stage
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
        if number == KILL:
            end_processes(self.folder)

    def start(self, command: list[str], env: dict[str, str]) -> subprocess.Popen:
        """Start a stage in a session of its own, because its launcher does not pass signals on to what it started."""
        self.folder = env[MARK]  # a signal from here on is the stage's
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )
        if self.received:
            self._send(self.received[0])
        return self.process

    def wait(self, reader: threading.Thread) -> int:
        """Wait until every process of the stage is gone, and return the stage's exit code."""
        process = self.process
        while process.poll() is None or (self.received and reader.is_alive()):
            if process.returncode is not None:
                reader.join(0.1)
            else:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.5)
            if time.monotonic() > self.deadline:
                self._send(KILL)
        # What the stage left behind (a server, a worker) would hold the pipe, and the GPU, for ever.
        reader.join(LINGER_S)
        _, left = psutil.wait_procs(started_for(self.folder), LINGER_S)  # some have closed their streams
        if left or reader.is_alive():
            self._send(KILL)
            reader.join()
        return process.returncode

    def forget(self) -> None:
        self.process = self.folder = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Note signals inside the block without acting on them: it runs a stage of milliseconds in this process."""
        self.folder = ""
        try:
            yield
        finally:
            self.forget()


def child_env(**changes: str) -> dict[str, str]:
    """Return this environment, with `changes`, for a child process that runs Python.

    The child imports nothing from the current folder, which may hold a run or a recipe of somebody else: `python -m`
    and the launchers put that folder first. It finds this package where this process found it.
    """
    package = str(Path(__file__).resolve().parents[1])
    installed = package in (*site.getsitepackages(), site.getusersitepackages())  # then the child finds it by itself
    path = [] if installed else [package]
    path += filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))  # "" is the current folder
    return {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(dict.fromkeys(path)), **changes}


def run_process(command: list[str], log: Path, interrupts: Interrupts, *, env: dict, append: bool = False) -> int:
    """Run `command`, and copy its output to the terminal and to `log`. Return its exit code (negative: a signal)."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab" if append else "wb", opener=in_place) as file:
        process = interrupts.start(command, env)
        try:
            reader = threading.Thread(target=_copy_output, args=(process.stdout, file), daemon=True)
            reader.start()
            return interrupts.wait(reader)
        finally:
            interrupts.forget()
            process.stdout.close()


def _copy_output(source: IO[bytes], file: IO[bytes]) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    while chunk := os.read(source.fileno(), 65536):
        text = harmless(decoder.decode(chunk))
        # A full disk or a closed terminal must not keep the pipe from being read: the stage would stand still.
        with suppress(OSError):
            file.write(text.encode())
            file.flush()
        with suppress(OSError, UnicodeEncodeError):
            sys.stdout.write(text)
            sys.stdout.flush()


def harmless(output: str) -> str:
    """Return a program's output with only those control sequences that colours and progress bars are made of.

    The program may print what a model has written (`log_completions`), and others command the terminal.
    """
    return "".join(part if place % 2 else visible(part) for place, part in enumerate(OF_PROGRESS_BARS.split(output)))


def exit_code(returncode: int) -> int:
    """Return the code to leave with for a child's `returncode`: 1 to 125 stay, and all else, a signal too, is 1."""
    return returncode if 1 <= returncode <= 125 else 1


HERE = "here"
# The option of a command that plans. A run checks itself by `--dry_run here`: then this machine must be able to.
DRY_RUN = {
    "nargs": "?",
    "const": "anywhere",
    "choices": ("anywhere", HERE),
    "metavar": HERE,
    "help": "check all configs, print the plan, run nothing; this needs no GPU, while `here` refuses what needs one",
}


def next_step(command: str) -> str:
    """Return the end of a command's last line: what comes next. In a chain the next stage comes by itself."""
    return "" if MARK in os.environ else f"; next: {command}"


def check_in_child(command: str, argv: list[str]) -> None:
    """Run `aesl COMMAND ARGV --dry_run here` in a child process, and leave with its exit code where it fails.

    The checks build TrainingArguments, which take hold of the GPU until their process ends.
    """
    command_line = [sys.executable, "-m", "aesl_trl.cli", command, *argv, "--dry_run", HERE]
    code = subprocess.run(command_line, env=child_env()).returncode
    if code != 0:
        sys.exit(exit_code(code))


def end_processes(folder: str) -> list[int]:
    """Kill all that a stage which writes to `folder` has started, wherever it is in the tree; return process ids."""
    return [process.pid for process in killed_for(folder)]


def killed_for(folder: str) -> list[psutil.Process]:
    """Kill the processes of [`started_for`], and return those that were still there."""
    killed = []
    for process in started_for(folder):
        with suppress(psutil.Error):  # it is gone by now
            process.kill()
            killed.append(process)
    return killed


def started_for(folder: str) -> list[psutil.Process]:
    """Return the processes at work for a stage that writes to `folder`: by [`MARK`], which they inherit."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):  # it is gone by now, or somebody else's
            if process.environ().get(MARK) == folder:
                found.append(process)
    return found


def is_at_work(process: psutil.Process) -> bool:
    """Say whether a process is there and may hold files; a zombie holds none."""
    with suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def end_orphans(folder: Path, say: Callable[[str], None], what: str) -> None:
    """End what a killed `what` (such as "chain") has left running, which would write to the same folder as ours.

    Its locks are free at the end: a process loses its environment, by which we find it, before its open files.
    """
    ended, deadline = set(), time.monotonic() + ORPHANS_S
    while time.monotonic() < deadline:
        killed = killed_for(str(folder))
        ended |= set(killed)
        if not killed and not any(map(is_at_work, ended)):
            break
        time.sleep(0.1)
    if ended:
        say(f"ended {len(ended)} processes that a killed {what} had left at work in {folder}")


def lock_beside(folder: Path) -> Path:
    """Return the file whose lock a chain holds for `folder`: it lies beside it, as the folder may be moved aside."""
    folder = folder.resolve()
    return folder.parent / f".{folder.name}.lock"


def is_stage_of(folder: Path) -> bool:
    """Say whether a chain, which holds the lock beside `folder`, has started this process to work there."""
    return MARK in os.environ and Path(os.environ[MARK]).resolve() == folder.resolve()


@contextmanager
def scratch(name: str) -> Iterator[Path]:
    """Give a temporary folder inside the block, and remove those that killed processes have left under `name`.

    The folder for them may be shared with hosts or containers that count processes anew: a mark keeps theirs.
    """
    space = "/proc/self/ns/pid"  # on Linux: its number tells containers apart
    host = f"{socket.gethostname()} {os.stat(space).st_ino if os.path.exists(space) else ''}"
    prefix = f"aesl-{name}-{hashlib.sha256(host.encode()).hexdigest()[:8]}-"
    for path in Path(tempfile.gettempdir()).glob(f"{prefix}*-*"):
        writer = path.name.removeprefix(prefix).split("-")[0]
        if re.fullmatch(r"\d{1,9}", writer) and not psutil.pid_exists(int(writer)):
            shutil.rmtree(path, ignore_errors=True)  # which leaves what is a link, or another user's
    with tempfile.TemporaryDirectory(prefix=f"{prefix}{os.getpid()}-") as folder:
        yield Path(folder)


@contextmanager
def lock(path: Path, message: str, *, again: bool = False) -> Iterator[None]:
    """Hold the lock of the file `path` inside the block, or raise InputError(message) where another process holds it.

    It ends with this process, however that ends. With `again` a block may stand inside another of the same process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    open(path, "ab", opener=in_place).close()  # in a folder that takes no files the error is not about locks
    # filelock's fallback, a file that marks the lock by being there, would outlive a killed process.
    held = filelock.FileLock(path, timeout=0, fallback_to_soft=False, is_singleton=again)
    try:
        held.acquire()
    except filelock.Timeout:
        raise InputError(message) from None
    except OSError as error:  # some network file systems have no locks
        say(f"aesl_trl: {path} cannot be locked ({error.strerror}): nothing keeps others out")
    try:
        yield
    finally:
        held.release()
