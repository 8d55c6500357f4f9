"""Grade untrusted answers with `math_reward`, TRL's own reward functions and reasoning-gym's, in child processes.

A completion such as `5^(5^(5^(5^5)))` keeps sympy inside one long multiplication, where neither an alarm nor a thread
can stop it; another takes all memory. Here an answer that hangs, crashes or eats memory costs only itself: it scores
0.0 with the reason, its child is replaced, and the others are graded.

The parent kills a child at its answer's deadline. The child, once its imports are done, gives up everything that an
answer must not have: memory beyond a margin, CPU time beyond the deadline, the standard streams, files to write, other
processes, the network. A child dies with its parent, even inside a long multiplication.

math-verify runs no text as code: sympy's `eval` sees only the parts of a completion that the grammar took for numbers.
Against it this is a second fence. Four scorers of reasoning-gym do `eval` an answer: then it is the only one. It is
no sandbox for code that is meant to run.

macOS does not enforce a limit of memory, so there the parent looks at the memory of a child that grades. Windows has
none of these limits: a graded reward is refused.
"""

import importlib.util
import json
import math
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NamedTuple

import psutil

from ..errors import InputError
from ..processes import child_env
from ..provenance import num_cores
from . import gym
from .maths import math_answer, math_reward


try:
    import fcntl
    import resource
except ImportError:  # Windows
    fcntl = resource = None

MATH_GRADERS = ("math_reward", "accuracy_reward", "reasoning_accuracy_reward")  # they run math-verify
GYM_GRADERS = ("gym_reward", "gym_score")  # they run reasoning-gym's scorers
GRADERS = (*MATH_GRADERS, "think_format_reward")  # TRL's own, but for math_reward
# Graders of our own, which return the answer that a reward reads instead of the reward
EXTRACT = {"math_reward": "math_answer", "accuracy_reward": "accuracy_answer"}
MAX_CHILDREN = 4  # of one training process
MAX_CHARS = 1_000_000  # of a completion or a solution; longer texts are not parsed
MEMORY_MB = 512  # beyond the imports; ordinary answers take a few MB, most of it sympy's caches
READS = ("os.listdir", "os.scandir")  # audit events that imports cause
START_S = 300.0  # for the imports, which a slow disk delays
START_TRIES = 3  # for one batch, where something kills a child before its imports are done
KERNEL_LIMITS_MEMORY = sys.platform == "linux"
LOOK_S = 0.1  # between two looks at a child's memory
SELF_TEST = ("<think>\n1+1\n</think>\n\\boxed{2}", "$2$")  # worth 1.0 to every grader


class Answer(NamedTuple):
    """A completion to grade, and the solution to grade it by."""

    grader: str  # one of GRADERS or GYM_GRADERS, or of the values of EXTRACT
    completion: str
    solution: str | None  # for GYM_GRADERS the row's metadata


class Grade(NamedTuple):
    """A grader's verdict on an answer."""

    reward: float | str | None  # text where an answer is extracted; None where the grader does not apply, as in TRL
    failure: str | None = None  # why there was no verdict: too long, timeout, memory, crash, an exception's name


def check_grading(what: str) -> None:
    """Refuse, on Windows, `what` needs child processes with limits."""
    if resource is None:
        raise InputError(
            f"{what} needs child processes with limits of time and memory, which Windows does not have: use WSL, "
            "Linux or macOS, or a reward of your own (path/file.py:function)"
        )


class Graders:
    """Child processes that grade a batch side by side, each answer under its own deadline.

    Any thread may call: batches take turns. A forked process starts children of its own. The first batch waits for the
    imports.

    Args:
        size: the most children; by default the cores that this process may use, divided by the training processes of
            this machine, but no more than [`MAX_CHILDREN`]. A smaller batch starts fewer.
        memory_mb: the memory that a child may take beyond its imports.
        loads: which graders a child loads: `maths` for those of [`GRADERS`], `gym` for [`GYM_GRADERS`].
    """

    def __init__(self, size: int | None = None, memory_mb: int = MEMORY_MB, loads: str = "maths"):
        self.size = size
        self.memory_mb = memory_mb
        self.loads = loads
        self._children: list[_Child] = []
        self._lock = threading.Lock()
        _alive.add(self)
        weakref.finalize(self, _kill, self._children)

    def grade(self, answers: Iterable[Answer], deadline_s: float) -> list[Grade]:
        """Return one grade per answer, in their order.

        Raises:
            InputError: a child cannot start, or this is Windows.
        """
        check_grading("grading answers")
        answers = list(answers)
        lengths = [max(len(answer.completion), len(answer.solution or "")) for answer in answers]
        grades = [Grade(0.0, "too long") if length > MAX_CHARS else None for length in lengths]
        pending, tries = deque(index for index, grade in enumerate(grades) if grade is None), 0
        struck = set()
        with self._lock:
            self._drop(lambda child: child.process.poll() is not None)
            try:
                while pending or any(child.is_busy for child in self._children):
                    num_busy = sum(child.is_busy for child in self._children)
                    while len(self._children) < min(self.size or _default_size(), num_busy + len(pending)):
                        self._children.append(_Child(self.memory_mb, self.loads))
                    for child in self._children:
                        if pending and child.is_idle:
                            index = pending.popleft()
                            child.send(index, answers[index], deadline_s)
                    for child, is_late in self._wait():
                        index, grade = child.hear(is_late)
                        if child.was_struck and index not in struck:
                            struck.add(index)  # it is no fault of the answer's, unless that comes again
                            pending.appendleft(index)
                        elif grade is not None:
                            grades[index] = grade
                        if child.is_spent and not child.is_ready:
                            tries += 1  # where memory ran short the kernel killed it, and the next one may start
                            if is_late or child.process.returncode >= 0 or tries >= START_TRIES:
                                raise child.failed_start()
                    self._drop(lambda child: child.is_spent)
            finally:  # after an exception no later batch may read what these still answer
                self._drop(lambda child: child.is_busy or child.is_spent)
        return grades

    def __reduce__(self) -> tuple:
        """Pickle the settings alone, for children cannot travel; the shared graders stay the shared graders."""
        is_shared = self is _shared_graders(self.loads)
        return (_shared_graders, (self.loads,)) if is_shared else (Graders, (self.size, self.memory_mb, self.loads))

    def _wait(self) -> list[tuple["_Child", bool]]:
        """Wait for the children that said something or are past their deadline; say of each whether it is late."""
        waiting = [child for child in self._children if not child.is_idle]
        with selectors.DefaultSelector() as selector:
            for child in waiting:
                selector.register(child.socket, selectors.EVENT_READ, child)
            patience = max(0, min(child.deadline for child in waiting) - time.monotonic())
            patience = patience if KERNEL_LIMITS_MEMORY else min(patience, LOOK_S)
            heard = {key.data for key, _ in selector.select(patience)}
        if not KERNEL_LIMITS_MEMORY:
            for child in waiting:
                child.look_at_memory()
        now = time.monotonic()
        return [(child, child not in heard) for child in waiting if child in heard or child.deadline <= now]

    def _drop(self, condition: Callable[["_Child"], bool]) -> None:
        for child in [child for child in self._children if condition(child)]:
            self._children.remove(child)
            child.kill()

    def _forget(self) -> None:
        for child in self._children:
            child.close()
        self._children.clear()
        self._lock = threading.Lock()


def _default_size() -> int:
    cores = num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(cores, MAX_CHILDREN))


# ---- The parent's end


class _Child:
    """A grading process and the socket to it; it has one answer at a time."""

    COMMAND = (sys.executable, "-m", "aesl_trl.rewards.grading")

    def __init__(self, memory_mb: int, loads: str):
        self.memory_mb, self.loads, self._most_memory = memory_mb, loads, math.inf
        self.socket, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [*self.COMMAND, str(memory_mb), loads],
                stdin=theirs,
                stdout=theirs,
                env=child_env(),
                start_new_session=True,  # Ctrl-C in the terminal reaches the parent alone
            )
        self._lines = self.socket.makefile("rb")
        self._index = None
        self.deadline = time.monotonic() + START_S
        self.is_ready = self.is_spent = self.is_greedy = False
        self.was_struck = False  # killed by somebody else in the midst of an answer: by the kernel, for memory, say

    @property
    def is_busy(self) -> bool:
        return self._index is not None

    @property
    def is_idle(self) -> bool:
        return self.is_ready and not self.is_busy

    def send(self, index: int, answer: Answer, deadline_s: float) -> None:
        self._index, self.deadline = index, time.monotonic() + deadline_s
        self.socket.settimeout(deadline_s)
        with suppress(OSError):  # it died, which its missing answer will show
            self.socket.sendall(json.dumps([*answer, deadline_s]).encode("ascii") + b"\n")

    def hear(self, is_late: bool) -> tuple[int | None, Grade | None]:
        """Return the answer's index and grade, or two None of a child that is ready now, or that did not start."""
        index, self._index = self._index, None
        line = b""
        with suppress(OSError):  # reset by a child that died before it had read its request
            line = b"" if is_late else self._lines.readline()
        if line and not self.is_ready:
            self.is_ready = True
            self._most_memory = self._memory() + self.memory_mb * 2**20
            return None, None
        if line:
            reward, failure, is_last = json.loads(line)
            self.is_spent = is_last or self.is_greedy
            return index, Grade(reward, failure)
        self.is_spent = True
        self.process.kill()
        code = self.process.wait()
        if not self.is_ready:
            return None, None
        if self.is_greedy:
            return index, Grade(0.0, "memory")
        self.was_struck = not is_late and code == -signal.SIGKILL
        return index, Grade(0.0, "timeout" if is_late or code == -signal.SIGXCPU else "crash")

    def look_at_memory(self) -> None:
        """Kill the child where it has taken more memory than it may; its answer's grade then says so."""
        with suppress(psutil.Error):  # it is gone
            if self.is_busy and self._memory() > self._most_memory:
                self.is_greedy = True
                self.process.kill()

    def _memory(self) -> int:
        return psutil.Process(self.process.pid).memory_info().rss

    def failed_start(self) -> InputError:
        """Return the error of a child that has ended before its imports were done."""
        return InputError(
            f"the process that grades answers did not start (exit code {self.process.returncode}), its own error is "
            f"above; to see it alone: python -m aesl_trl.rewards.grading {self.memory_mb} {self.loads} < /dev/null"
        )

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.close()

    def close(self) -> None:
        self._lines.close()
        self.socket.close()


def _kill(children: list[_Child]) -> None:
    while children:
        children.pop().kill()


_alive: weakref.WeakSet[Graders] = weakref.WeakSet()


def _forget_all() -> None:
    """Drop the children in a forked process: they answer the process that started them."""
    for graders in _alive:
        graders._forget()


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=_forget_all)

# Of all rewards in this process; they start nothing before the first batch
SHARED_GRADERS = Graders()
SHARED_GYM_GRADERS = Graders(loads="gym")


def _shared_graders(loads: str) -> Graders:
    return SHARED_GYM_GRADERS if loads == "gym" else SHARED_GRADERS


# ---- The child


def main() -> None:
    """Answer JSON lines `[grader, completion, solution, deadline_s]` with `[reward, failure, is this the last]`."""
    memory_mb = int(sys.argv[1]) if len(sys.argv) > 1 else MEMORY_MB
    channel = socket.socket(fileno=os.dup(0))
    requests = channel.makefile("rb")
    os.dup2(2, 1)  # what an import prints is no answer
    graders = _load_gym() if sys.argv[2:] == ["gym"] else _load()
    channel.sendall(b"ready\n")
    full = _memory() + memory_mb * 2**19  # half the margin: sympy's caches grow, and must not fail an answer
    _give_up(memory_mb)
    fcntl.fcntl(channel, fcntl.F_SETOWN, os.getpid())
    for line in requests:
        name, completion, solution, deadline_s = json.loads(line)
        _limit_cpu(deadline_s)
        _die_with_parent(channel, True)
        reward, failure = _grade(graders[name], completion, solution)
        _die_with_parent(channel, False)
        is_last = failure == "memory" or _memory() > full
        channel.sendall(json.dumps([reward, failure, is_last]).encode("ascii") + b"\n")


def _load() -> dict[str, Callable]:
    """Return the graders that can run here, each warmed up by one answer."""
    from trl import rewards

    has_math_verify = importlib.util.find_spec("math_verify") is not None
    names = [name for name in GRADERS if has_math_verify or name not in MATH_GRADERS]
    graders = {name: math_reward if name == "math_reward" else getattr(rewards, name) for name in names}
    _warm_up(graders, SELF_TEST, "math-verify")
    return {**graders, "math_answer": math_answer, "accuracy_answer": accuracy_answer} if has_math_verify else graders


def _load_gym() -> dict[str, Callable]:
    graders = {name: getattr(gym, name) for name in GYM_GRADERS}
    _warm_up(graders, gym.SELF_TEST, "reasoning-gym")
    return graders


def _warm_up(graders: dict[str, Callable], answer: tuple[str, str], package: str) -> None:
    for name, function in graders.items():
        grade = _grade(function, *answer)
        if grade != Grade(1.0):
            sys.exit(f"{name} gave {grade} for the answer {answer[0]!r} to {answer[1]!r}: reinstall {package}")


def _grade(function: Callable, completion: str, solution: str | None) -> Grade:
    try:
        (reward,) = function(completions=[[{"role": "assistant", "content": completion}]], solution=[solution])
        return Grade(reward)
    except MemoryError:
        return Grade(0.0, "memory")
    except BaseException as error:  # math-verify's TimeoutException is no Exception
        return Grade(0.0, type(error).__name__)


def _give_up(memory_mb: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    sys.dont_write_bytecode = True
    if KERNEL_LIMITS_MEMORY:
        _cap(resource.RLIMIT_AS, _memory() + memory_mb * 2**20)
    _cap(resource.RLIMIT_CORE, 0)
    _cap(resource.RLIMIT_FSIZE, 0)
    for ends in (signal.SIGXCPU, signal.SIGIO):  # by the kernel, in the middle of whatever Python does
        signal.signal(ends, signal.SIG_DFL)
    sys.addaudithook(_refuse)


def _cap(limit: int, value: int) -> None:
    _, hard = resource.getrlimit(limit)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(limit, (value, value))


def _refuse(event: str, args: tuple) -> None:
    """Refuse, as an audit hook, other processes, the network and writing. Imports can still read."""
    if event == "open":
        is_refused = args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    else:
        is_refused = event.startswith(("os.", "subprocess.", "socket.", "shutil.", "ctypes.")) and event not in READS
    if is_refused:
        raise PermissionError(f"a grading process may not {event}")


def _limit_cpu(deadline_s: float) -> None:
    """Limit the CPU time, in case the parent is stopped and cannot kill; the limit is soft, for the next answer's."""
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = math.ceil(used + deadline_s) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _die_with_parent(channel: socket.socket, is_on: bool) -> None:
    """Let the kernel end this process by SIGIO once the parent's end closes; on while an answer is graded."""
    flags = fcntl.fcntl(channel, fcntl.F_GETFL)
    fcntl.fcntl(channel, fcntl.F_SETFL, flags | os.O_ASYNC if is_on else flags & ~os.O_ASYNC)


def _memory() -> int:
    """Return the bytes that this process has: of address space where the kernel limits that, else in memory."""
    found = psutil.Process().memory_info()
    return found.vms if KERNEL_LIMITS_MEMORY else found.rss


def accuracy_answer(completions: list[list[dict]], **kwargs) -> list[str | None]:
    """Return the text of each completion's answer as TRL's accuracy_reward reads it; None where there is none."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    config = LatexExtractionConfig(
        normalization_config=NormalizationConfig(units=True),
        boxed_match_priority=0,
        try_extract_without_anchor=False,
    )
    settings = {"extraction_config": [config], "extraction_mode": "first_match", "parsing_timeout": 10}
    found = [parse(completion[0]["content"], **settings) for completion in completions]
    # The last item is the text, whether or not math-verify could read it as mathematics
    return [" ".join(str(items[-1]).split()) or None if items else None for items in found]


if __name__ == "__main__":
    main()
