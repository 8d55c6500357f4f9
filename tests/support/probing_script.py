"""The script that test_probe_trainer.py starts on two ranks: `python probing_script.py FOLDER FLAG...`.

Each rank probes FOLDER/model twice with the flags, and what the first probe has kept stays. The second rank sees other
times of the files. Each rank writes what it said in the second probe to FOLDER/rank-R.pt.
"""

import os
import sys
from pathlib import Path

import torch

from aesl_trl.evaluation import probe, probed
from aesl_trl.models.folder import ModelFolder


def main(folder: Path, flags: list[str]) -> None:
    rank, said, identity = os.environ["RANK"], [], ModelFolder.identity
    ModelFolder.identity = lambda self, revision=None: {**identity(self, revision), "rank": rank}
    probed.ProbedFile.remove = lambda self: None
    probe.tell = said.append
    for _ in range(2):
        said.clear()
        probe.main([str(folder / "model"), *flags])
    torch.save(said, folder / f"rank-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
