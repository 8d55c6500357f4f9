"""environment: what `aesl env` prints, by the real command, without torch; and GPUs as nvidia-smi tells of them."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from aesl_trl import __version__, environment
from aesl_trl.provenance import PACKAGES


def test_the_command_tells_versions_and_extras_without_torch():
    code = "import sys; from aesl_trl import cli; cli.main(['env']); sys.exit('torch' in sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    told = dict(line.removeprefix("- ").split(": ", 1) for line in done.stdout.splitlines())
    assert told["aesl_trl"].startswith(__version__)
    assert {*PACKAGES} <= {*told} and told["torch"] == torch.__version__
    assert told["CUDA of torch"] == (torch.version.cuda or "none (a build for the CPU)")
    assert told["extra vllm"].startswith("vllm ") and told["extra math"].startswith("math-verify ")
    assert {"Python", "platform", "hardware", "GPU driver", "extra qlora", "extra gym"} <= {*told}
    home = os.path.expanduser("~")
    assert home == "/" or home not in done.stdout


def test_gpus_are_those_that_nvidia_smi_tells_of(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.gpu_driver() == "no nvidia-smi"
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '570.1, 81559 MiB'\necho '570.1, 81559 MiB'\n")
    tool.chmod(0o755)
    assert environment.gpu_driver() == "570.1, 81559 MiB; 570.1, 81559 MiB"
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert environment.gpu_driver() == "nvidia-smi fails with exit code 9"
