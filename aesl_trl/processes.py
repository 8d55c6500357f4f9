"""A child process with all that it starts: output copied as it comes, signals passed on, no process left behind.

What is run, and what its exit code means, is left to the caller. The lock keeps a second caller out of a folder.
"""

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO

from .errors import InputError


GRACE_S = 300  # seconds that a stage has to end after SIGINT or SIGTERM: the rest of a step, and a checkpoint
# Where a stage writes. Whatever it starts inherits the variable, also in sessions of its own (torchrun's workers).
MARK = "AESL_STAGE_FOLDER"


class Interrupts:
    """SIGINT and SIGTERM while the chain runs: passed on to the stage, whose end is awaited; a second one kills it."""

    def __init__(self):
        self.process: subprocess.Popen | None = None
        self.folder: str | None = None  # the stage's, by which all of its processes are known
        self.received: list[int] = []
        self.deadline = float("inf")

    def __enter__(self):
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame) -> None:
        self.received.append(number)
        if self.folder is None:
            sys.exit(128 + number)
        self.deadline = time.monotonic() + GRACE_S
        self._send(number if len(self.received) == 1 else signal.SIGKILL)

    def _send(self, number: int) -> None:
        if self.process is None:  # it is just being started
            return
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)
        if number == signal.SIGKILL:
            end_processes(self.folder)

    def start(self, command: list[str], env: dict[str, str]) -> subprocess.Popen:
        """Start a stage in a session of its own: its launcher does not pass a signal on to what it started."""
        self.folder = env[MARK]  # a signal from here on is the stage's
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )
        if self.received:
            self._send(self.received[0])
        return self.process

    def wait(self, reader: threading.Thread) -> int:
        """The exit code, once every process of the stage is gone."""
        process = self.process
        while process.poll() is None or (self.received and reader.is_alive()):
            reader.join(0.1) if process.returncode is not None else _wait_briefly(process)
            if time.monotonic() > self.deadline:
                self._send(signal.SIGKILL)
        # What the stage left behind (a server, a worker) would hold the pipe, and the GPU, for ever.
        reader.join(10)
        if reader.is_alive():
            self._send(signal.SIGKILL)
            reader.join()
        return process.returncode

    def forget(self) -> None:
        self.process = self.folder = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """For a stage of milliseconds in this process: a signal is only noted."""
        self.folder = ""
        try:
            yield
        finally:
            self.forget()


def _wait_briefly(process: subprocess.Popen) -> None:
    try:
        process.wait(0.5)
    except subprocess.TimeoutExpired:
        pass


def end_processes(folder: str) -> list[int]:
    """Kill whatever a stage that writes to `folder` has started, wherever it is in the tree; the ids of what it was.

    Found by the environment that they inherit, which Linux shows; elsewhere nothing is found.
    """
    entry, ended = f"{MARK}={folder}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # gone by now, or somebody else's
            if entry in path.read_bytes().split(b"\0"):
                os.kill(int(path.parent.name), signal.SIGKILL)
                ended.append(int(path.parent.name))
    return ended


def run_process(command: list[str], log: Path, interrupts: Interrupts, *, env: dict, append: bool = False) -> int:
    """Run `command`, its output on the terminal as it comes and in `log`; its exit code (negative: a signal)."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab" if append else "wb") as file:
        process = interrupts.start(command, env)
        try:
            reader = threading.Thread(target=_copy_output, args=(process.stdout, file), daemon=True)
            reader.start()
            return interrupts.wait(reader)
        finally:
            interrupts.forget()
            process.stdout.close()


def _copy_output(source: IO[bytes], file: IO[bytes]) -> None:
    while chunk := os.read(source.fileno(), 65536):
        # A full disk or a closed terminal must not keep the pipe from being read: the stage would stand still.
        with suppress(OSError):
            file.write(chunk)
            file.flush()
        with suppress(OSError):
            sys.stdout.write(chunk.decode("utf-8", errors="replace"))
            sys.stdout.flush()


def locked(folder: Path) -> AbstractContextManager:
    """The folder's lock; a second chain in the same folder would mix its files with ours."""
    # Beside the folder, which may be moved aside while the lock is held.
    return lock(folder.with_name(f".{folder.name}.lock"), f"another chain is at work in {folder}")


@contextmanager
def lock(path: Path, message: str) -> Iterator[None]:
    """Hold the lock of the file `path`, which ends with the process however that ends; held by another: `message`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(message) from None
        except OSError as error:  # some network file systems have no locks
            print(f"aesl_trl: {path} cannot be locked ({error.strerror}): nothing keeps others out", file=sys.stderr)
        yield
