"""The process that test_crashes.py kills: a server that forks one process for each run, and the points of a strike.

`python crash_script.py` reads a job a line from stdin (command, argv, env, log, and delay_s after which to kill it, or
null) and answers with its exit code. A fork spares the imports, which take longer than the training; it is a process
like any other to a signal. Some tests start the commands themselves.

A run is struck where its environment's CRASH says, e.g. "write:40:KILL", once the test's reward file has called
`install`:

- load: before the model loads
- write: as it is about to create, write, rename or delete its 40th file or folder in CRASH_FOLDER
- tear: in the middle of writing a checkpoint's 40th file of torch.save (optimizer, scheduler, random state)
- sample: in its 40th forward pass without gradients, which is sampling or evaluation
- step: in its 40th forward pass with gradients; each of them takes CRASH_SLEEP seconds more

"FULL:30000" in place of a signal is a disk that is full: from then on no file can grow beyond 30000 bytes.
"""

import contextlib
import io
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections import Counter


counts = Counter()  # what has happened so far, by event
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate")


def install() -> None:
    """Kill this process, or fill its disk, at the point that CRASH names."""
    import torch

    event, number, *blow = (os.environ.get("CRASH") or "none:0").split(":")
    folder = os.environ["CRASH_FOLDER"]

    def strike(happened: str, before=lambda: None) -> None:
        counts[happened] += 1
        if happened == event and counts[happened] == int(number):
            if blow[0] == "FULL":
                resource.setrlimit(resource.RLIMIT_FSIZE, (int(blow[1]), resource.RLIM_INFINITY))
                return
            before()
            os.kill(os.getpid(), getattr(signal, f"SIG{blow[0]}"))

    def audit(happened: str, arguments: tuple) -> None:
        if happened == "open":
            path, _, flags = arguments
            changes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            path, changes = arguments[0] if arguments else None, happened in CHANGES
        if changes and isinstance(path, str | os.PathLike) and os.fspath(path).startswith(folder):
            strike("write")

    def save(value, file, *args, **kwargs):
        written = io.BytesIO()
        real_save(value, written, *args, **kwargs)

        def half() -> None:
            with open(file, "wb") as torn:
                torn.write(written.getvalue()[: len(written.getvalue()) // 2])

        if "checkpoint-" in str(file):
            strike("tear", half)
        real_save(value, file, *args, **kwargs)

    def forward(module, _) -> None:
        if type(module).__name__.endswith("ForCausalLM"):
            is_step = torch.is_grad_enabled()
            time.sleep(float(os.environ.get("CRASH_SLEEP", 0)) if is_step else 0)
            strike("step" if is_step else "sample")

    real_save, torch.save = torch.save, save
    torch.nn.modules.module.register_module_forward_pre_hook(forward)
    sys.addaudithook(audit)
    strike("load")


def serve() -> None:
    from trl import GRPOTrainer  # noqa: F401 (imported before the forks, as all that follows)

    import aesl_trl.grpo
    import aesl_trl.sft
    import aesl_trl.training.trainer

    mains = {"sft": aesl_trl.sft.main, "grpo": aesl_trl.grpo.main}
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        job = json.loads(line)
        process = os.fork()
        if process == 0:
            os._exit(run(job, mains[job["command"]]))
        if job["delay_s"] is not None:
            time.sleep(job["delay_s"])
            os.kill(process, signal.SIGKILL)  # not waited for yet, so the id is still its own
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), file=answers, flush=True)
    os._exit(0)  # taking the imports down again would cost seconds


def run(job: dict, main) -> int:
    from aesl_trl.errors import exit_on_input_error

    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ.update(job["env"])
    try:
        exit_on_input_error(f"aesl {job['command']}", lambda: main(job["argv"]))
        code = 0
    except SystemExit as leaving:
        code = leaving.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    if "crash_script" in sys.modules:
        print(f"counts {json.dumps(sys.modules['crash_script'].counts)}")
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    return code


if __name__ == "__main__":
    serve()
