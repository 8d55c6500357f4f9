"""Runs a script as two real processes over gloo, on the CPU, and reads what its ranks have saved."""

import os
import subprocess
import sys
from pathlib import Path

import torch


TESTS = Path(__file__).parent


def results_of_two(script, folder, *names, **env) -> list[dict]:
    """Run `script FOLDER NAMES...` under torchrun, and return what each rank R wrote to FOLDER/rank-R.pt.

    `accelerate launch --cpu` would silently start one process. No GPU is visible: FSDP2 and DeepSpeed would take one,
    whatever the trainer uses.
    """
    settings = {
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]),
    }
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*torchrun, script.__file__, str(folder), *names],
        env={**os.environ, **settings, **env},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in (0, 1)]
