"""A process without what Linux has and another system has not: `python other_system.py SYSTEM CODE`.

It is a simulation: libraries of others are loaded first, as they have branches of their own for each system, and then
the names go away. The kernel stays Linux.
"""

import importlib
import os
import signal
import sys

import accelerate.commands.launch  # noqa: F401
import datasets  # noqa: F401
import math_verify  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import portalocker  # noqa: F401
import psutil  # noqa: F401
import sacrebleu  # noqa: F401
import torch  # noqa: F401
import transformers
import trl


MODULES = {"windows": ("fcntl", "resource", "pwd", "grp", "termios"), "macos": ()}
CALLS = {
    "windows": "fork forkpty getuid geteuid getpgid killpg setsid sched_getaffinity register_at_fork O_NOFOLLOW",
    "macos": "sched_getaffinity sched_setaffinity",
}
SIGNALS = {"windows": "SIGKILL SIGXCPU SIGIO SIGHUP SIGUSR1 SIGUSR2 SIGQUIT alarm setitimer", "macos": ""}


def become(system: str) -> None:
    """Remove what `system` does not have."""
    for name in ("AutoTokenizer", "TrainingArguments", "AutoModelForCausalLM"):
        getattr(transformers, name)
    for name in ("GRPOTrainer", "SFTTrainer", "ModelConfig", "TrlParser"):
        getattr(trl, name)
    for name in ("trl.generation.vllm_generation", "trl.rewards"):
        importlib.import_module(name)
    for name in MODULES[system]:
        sys.modules[name] = None
    for name in CALLS[system].split():
        delattr(os, name)
    for name in SIGNALS[system].split():
        delattr(signal, name)
    if system == "macos":
        from aesl_trl.rewards import grading

        grading.KERNEL_LIMITS_MEMORY = False
        if grading.resource is not None:
            grading.resource.RLIMIT_AS = None  # setrlimit would raise, as macOS's may
        grading._Child.COMMAND = (
            sys.executable,
            __file__,
            "macos",
            "from aesl_trl.rewards.grading import main; main()",
        )


def main() -> None:
    system, code = sys.argv[1:3]
    become(system)
    sys.argv = ["other_system", *sys.argv[3:]]
    exec(code, {"__name__": "other_system"})


if __name__ == "__main__":
    main()
