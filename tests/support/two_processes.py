"""Run a script as two real processes over gloo, on the CPU, and read what its ranks have saved."""

import socket
import time
from multiprocessing.connection import wait

import preloaded
import torch


def results_of_two(script, folder, *names, **env) -> list[dict]:
    """Run `script FOLDER NAMES...` on both ranks, and return what each rank R wrote to FOLDER/rank-R.pt.

    The environment is that of torchrun (`accelerate launch --cpu` would silently start one process). No GPU is
    visible: FSDP2 and DeepSpeed would take one, whatever the trainer uses.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    settings = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    settings |= {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    errors = [folder / f"rank-{rank}.err" for rank in (0, 1)]
    ranks = [
        preloaded.start(
            [script.__file__, folder, *names], err=errors[rank], **settings, RANK=rank, LOCAL_RANK=rank, **env
        )
        for rank in (0, 1)
    ]
    deadline = time.monotonic() + 280
    while any(rank.is_alive() for rank in ranks) and not any(rank.exitcode for rank in ranks):
        assert time.monotonic() < deadline
        wait([rank.sentinel for rank in ranks if rank.is_alive()], timeout=1)
    for rank in ranks:
        rank.kill()  # one that waits for a rank that failed
    codes = [rank.exitcode for rank in ranks]
    assert codes == [0, 0], "\n".join(path.read_text()[-3000:] for path in errors)
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in (0, 1)]
