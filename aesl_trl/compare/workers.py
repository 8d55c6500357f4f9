"""Several child processes at a time, each with devices of its own; signals are passed on to all of them.

What is run is left to the caller. A group's jobs run one after the other on one worker.
"""

import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any


POLL_S = 0.1
DEVICES = "CUDA_VISIBLE_DEVICES"


def visible_devices() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; empty without any."""
    named = os.environ.get(DEVICES)
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def split_devices(devices: list[str], workers: int) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each worker: equal shares, one device in turn where there are more workers.

    None, which leaves the variable alone, without devices and for a single worker.
    """
    if not devices or workers == 1:
        return [None] * workers
    share = max(1, len(devices) // workers)
    return [
        ",".join(devices[(worker * share + item) % len(devices)] for item in range(share)) for worker in range(workers)
    ]


class Workers:
    """`run` works through groups of jobs; SIGINT and SIGTERM reach every process, and nothing is started after them.

    Args:
        environments: of each worker's processes, one entry a worker.
        launch: job, environment -> its process in a session of its own, or None where there is nothing to run.
        ended: job, exit code -> whether the group goes on.
    """

    def __init__(
        self,
        environments: list[dict[str, str]],
        launch: Callable[[Any, dict[str, str]], subprocess.Popen | None],
        ended: Callable[[Any, int], bool],
    ):
        self._workers = [_Worker(environment) for environment in environments]
        self._launch, self._ended = launch, ended
        self.received: list[int] = []

    def __enter__(self):
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        # An error of our own must not leave processes behind that go on writing.
        for worker in self._workers:
            worker.send(signal.SIGTERM)
        for worker in self._workers:
            if worker.process is not None:
                worker.process.wait()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame) -> None:
        self.received.append(number)
        for worker in self._workers:
            worker.send(number)

    def run(self, groups: Iterable[list[Any]]) -> None:
        """Run every group to its end, or, after a signal, what is running to its end."""
        waiting = deque(deque(group) for group in groups)
        while True:
            for worker in self._workers:
                self._advance(worker, waiting)
            if all(worker.process is None for worker in self._workers):
                return
            time.sleep(POLL_S)

    def _advance(self, worker: "_Worker", waiting: deque) -> None:
        """Take note of a process that has ended, and start the next one."""
        if worker.process is not None:
            if worker.process.poll() is None:
                return
            code, worker.process = worker.process.returncode, None
            if not self._ended(worker.job, code):
                worker.group.clear()
        while worker.process is None and not self.received and (worker.group or waiting):
            if not worker.group:
                worker.group = waiting.popleft()
                continue
            worker.job = worker.group.popleft()
            worker.process = self._launch(worker.job, worker.environment)
            if self.received:  # while it was being started
                worker.send(self.received[0])


class _Worker:
    def __init__(self, environment: dict[str, str]):
        self.environment = environment
        self.group: deque = deque()
        self.job: Any = None
        self.process: subprocess.Popen | None = None

    def send(self, number: int) -> None:
        if self.process is not None:
            with suppress(ProcessLookupError):
                self.process.send_signal(number)
