"""Several child processes at a time, each with devices of its own. All of them get the signals that this one gets.

The caller says what a job runs. A group's jobs run one after the other on one worker.
"""

import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

from ..processes import STOP_SIGNALS, handling


POLL_S = 0.1
DEVICES = "CUDA_VISIBLE_DEVICES"


def visible_devices() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; an empty list for none."""
    named = os.environ.get(DEVICES)
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def split_devices(devices: list[str], workers: int) -> list[str | None]:
    """Return CUDA_VISIBLE_DEVICES of each worker: equal shares, or one device in turn where there are more workers.

    A None leaves the variable alone: without devices, and for a single worker.
    """
    if not devices or workers == 1:
        return [None] * workers
    share = max(1, len(devices) // workers)
    return [
        ",".join(devices[(worker * share + item) % len(devices)] for item in range(share)) for worker in range(workers)
    ]


class Workers(ExitStack):
    """Works through groups of jobs. SIGINT and SIGTERM reach every process, and nothing is started after them.

    Args:
        environments: the environment of each worker's processes.
        launch: job, environment -> its process in a session of its own, or None where there is nothing to run.
        ended: job, exit code -> whether the group goes on.
    """

    def __init__(
        self,
        environments: list[dict[str, str]],
        launch: Callable[[Any, dict[str, str]], subprocess.Popen | None],
        ended: Callable[[Any, int], bool],
    ):
        super().__init__()
        self._workers = [_Worker(environment) for environment in environments]
        self._launch, self._ended = launch, ended
        self.received: list[int] = []

    def __enter__(self):
        self.enter_context(handling(STOP_SIGNALS, self._handle))
        self.callback(self._end)
        return self

    def _end(self) -> None:
        # An error of our own must not leave processes behind that go on writing.
        for worker in self._workers:
            worker.send(signal.SIGTERM)
        for worker in self._workers:
            if worker.process is not None:
                worker.process.wait()

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


@dataclass
class _Worker:
    environment: dict[str, str]
    group: deque = field(default_factory=deque)
    job: Any = None
    process: subprocess.Popen | None = None

    def send(self, number: int) -> None:
        if self.process is not None:
            with suppress(ProcessLookupError):
                self.process.send_signal(number)
