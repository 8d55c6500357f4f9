"""StopSignals by itself: what a first, a repeated and a second signal do, also in forked processes.

With a training, and the exit codes of the commands: test_crashes.py.
"""

import os
import signal
import time

import pytest
import torch

from aesl_trl.training import signals
from aesl_trl.training.signals import StopSignals, spare_workers


def test_outside_of_a_step_the_process_leaves(capfd):
    before = signal.getsignal(signal.SIGTERM)
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        with pytest.raises(SystemExit) as leaving, StopSignals("aesl sft"):
            os.kill(os.getpid(), number)
        assert leaving.value.code == code
    assert signal.getsignal(signal.SIGTERM) == before
    assert capfd.readouterr().err.splitlines() == [
        f"aesl sft: {name}: nothing was being trained, nothing saved" for name in ("SIGTERM", "SIGINT")
    ]


def test_in_a_step_the_first_signal_is_noted(capfd):
    with StopSignals("aesl grpo") as handled:
        handled.is_deferred = True
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # at once after it: a launcher's, of the same event
        assert handled.received == signal.SIGTERM
    assert capfd.readouterr().err.startswith("aesl grpo: SIGTERM: a checkpoint is saved after this step; ")


def test_only_the_first_rank_of_a_machine_speaks(capfd, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit), StopSignals("aesl sft"):
        os.kill(os.getpid(), signal.SIGTERM)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(number, monkeypatch):
    monkeypatch.setattr(signals, "REPEAT_S", 0.0)
    process = os.fork()
    if process == 0:
        with StopSignals("aesl sft") as handled:
            handled.is_deferred = True
            for _ in range(2):
                os.kill(os.getpid(), number)
                time.sleep(0.01)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -number


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        return index


def test_a_loaders_worker_lives_on():
    """The whole group is sent the signal, and the step still needs its rows."""
    loader = torch.utils.data.DataLoader(Rows(), num_workers=1, multiprocessing_context="fork")
    with StopSignals("aesl sft"):
        spare_workers(loader)
        assert [int(row) for row in loader] == [0, 1, 2]


def test_another_forked_process_ends():
    """A pool ends its processes with SIGTERM; Ctrl-C in the terminal reaches them too and is the training's affair."""
    with StopSignals("aesl sft"):
        process = os.fork()
        if process == 0:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGTERM
