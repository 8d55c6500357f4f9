"""A child process with its whole group: output copied as it comes, signals passed on, no process left behind.

What is run, and what its exit code means, is left to the caller. The lock keeps a second caller out of a folder.
"""

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

from .errors import InputError


GRACE_S = 120  # seconds that a stage has to end after SIGINT or SIGTERM, e.g. to save a checkpoint


class Interrupts:
    """SIGINT and SIGTERM while the chain runs: passed on to the stage, whose end is awaited; a second one kills it."""

    def __init__(self):
        self.process: subprocess.Popen | None = None
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
        if self.process is None:
            sys.exit(128 + number)
        self.deadline = time.monotonic() + GRACE_S
        kill_group(self.process, number if len(self.received) == 1 else signal.SIGKILL)

    def wait(self, process: subprocess.Popen, reader: threading.Thread) -> int:
        """The exit code, once every process of the stage is gone."""
        while process.poll() is None or (self.received and reader.is_alive()):
            reader.join(0.1) if process.returncode is not None else _wait_briefly(process)
            if time.monotonic() > self.deadline:
                kill_group(process, signal.SIGKILL)
        # What the stage left behind (a server, a worker) would hold the pipe, and the GPU, for ever.
        reader.join(10)
        if reader.is_alive():
            kill_group(process, signal.SIGKILL)
            reader.join()
        return process.returncode


def _wait_briefly(process: subprocess.Popen) -> None:
    try:
        process.wait(0.5)
    except subprocess.TimeoutExpired:
        pass


def kill_group(process: subprocess.Popen, number: int) -> None:
    try:
        # Its own session: the launcher does not pass a signal on to the processes that it started.
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass


def run_process(command: list[str], log: Path, interrupts: Interrupts, *, env: dict, append: bool = False) -> int:
    """Run `command`, its output on the terminal as it comes and in `log`; its exit code (negative: a signal)."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab" if append else "wb") as file:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )
        interrupts.process = process
        try:
            reader = threading.Thread(target=_copy_output, args=(process.stdout, file), daemon=True)
            reader.start()
            return interrupts.wait(process, reader)
        finally:
            interrupts.process = None
            process.stdout.close()


def _copy_output(source: IO[bytes], file: IO[bytes]) -> None:
    while chunk := os.read(source.fileno(), 65536):
        file.write(chunk)
        file.flush()
        sys.stdout.write(chunk.decode("utf-8", errors="replace"))
        sys.stdout.flush()


def locked(folder: Path) -> IO:
    """The folder's lock, held until it is closed; a second chain in the same folder would mix its files with ours."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the folder, which may be moved aside while the lock is held.
    file = open(folder.with_name(f".{folder.name}.lock"), "w")  # noqa: SIM115 (closed by the caller's stack)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise InputError(f"another chain is at work in {folder}") from None
    return file
