"""Untrusted answers, graded by TRL's own reward functions in child processes (Linux).

A completion such as `5^(5^(5^(5^5)))` keeps sympy inside one long multiplication, where neither an alarm nor a thread
can stop it; another takes all memory. Here an answer that hangs, crashes or eats memory costs itself alone: it scores
0.0 with the reason, its child is replaced, and the others are graded.

The parent kills a child at its answer's deadline. The child itself, once its imports are done, gives up what an answer
must not have: memory beyond a margin, CPU time beyond the deadline, the standard streams, files to write, other
processes, the network. It dies with its parent, even inside a long multiplication.

math-verify runs no text as code: of a completion, sympy's `eval` sees only what the grammar took for a number. So this
is a second fence, against a parser that changes, and no sandbox for code that is meant to run.
"""

import fcntl
import importlib.util
import json
import math
import os
import resource
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
from pathlib import Path
from typing import NamedTuple

from ..errors import InputError


EXTRACT = "extracted_answer"  # the name by which grading.py knows it


MATH_GRADERS = ("accuracy_reward", "reasoning_accuracy_reward")  # they run math-verify
GRADERS = (*MATH_GRADERS, "think_format_reward")
MAX_CHILDREN = 4  # of one training process
MAX_CHARS = 1_000_000  # of a completion or a solution; longer ones are not parsed
MEMORY_MB = 512  # beyond the imports; ordinary answers take a few MB, most of it sympy's caches
READS = ("os.listdir", "os.scandir")  # what an import does
START_S = 300.0  # for the imports, which a slow disk delays
SELF_TEST = ("<think>\n1+1\n</think>\n\\boxed{2}", "$2$")  # worth 1.0 to every grader


class Answer(NamedTuple):
    grader: str  # one of GRADERS, or extraction.EXTRACT
    completion: str
    solution: str | None


class Grade(NamedTuple):
    reward: float | str | None  # text where an answer is extracted; None where the grader does not apply, as in TRL
    # Why there was no verdict: too long, timeout, memory, crash, or the name of an exception
    failure: str | None = None


class Graders:
    """Child processes that grade a batch side by side, each answer under its own deadline.

    From any thread: batches take turns. A forked process starts children of its own. The first batch waits for the
    imports.

    Args:
        size: children at most; by default the cores that this process may use, divided by the training processes of
            this machine, [`MAX_CHILDREN`] at most. A smaller batch starts fewer.
        memory_mb: what a child may take beyond its imports.
    """

    def __init__(self, size: int | None = None, memory_mb: int = MEMORY_MB):
        self.size = size
        self.memory_mb = memory_mb
        self._children: list[_Child] = []
        self._lock = threading.Lock()
        _alive.add(self)
        weakref.finalize(self, _kill, self._children)

    def grade(self, answers: Iterable[Answer], deadline_s: float) -> list[Grade]:
        """One grade per answer, in their order.

        Raises:
            InputError: a child cannot start.
        """
        answers = list(answers)
        grades = [Grade(0.0, "too long") if _is_too_long(answer) else None for answer in answers]
        pending = deque(index for index, grade in enumerate(grades) if grade is None)
        with self._lock:
            self._drop(lambda child: child.process.poll() is not None)
            try:
                while pending or any(child.is_busy for child in self._children):
                    self._start(len(pending))
                    for child in self._children:
                        if pending and child.is_idle:
                            index = pending.popleft()
                            child.send(index, answers[index], deadline_s)
                    for child, is_late in self._wait():
                        index, grade = child.hear(is_late)
                        if grade is not None:
                            grades[index] = grade
                    self._drop(lambda child: child.is_spent)
            finally:  # after an exception no later batch may read what these still answer
                self._drop(lambda child: child.is_busy or child.is_spent)
        return grades

    def __reduce__(self) -> str | tuple:
        return "SHARED_GRADERS" if self is SHARED_GRADERS else (Graders, (self.size, self.memory_mb))

    def _start(self, num_pending: int) -> None:
        num_busy = sum(child.is_busy for child in self._children)
        while len(self._children) < min(self.size or _default_size(), num_busy + num_pending):
            self._children.append(_Child(self.memory_mb))

    def _wait(self) -> list[tuple["_Child", bool]]:
        """The children that said something or are past their deadline, and whether they are."""
        waiting = [child for child in self._children if not child.is_idle]
        with selectors.DefaultSelector() as selector:
            for child in waiting:
                selector.register(child.socket, selectors.EVENT_READ, child)
            patience = min(child.deadline for child in waiting) - time.monotonic()
            heard = {key.data for key, _ in selector.select(max(patience, 0))}
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
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(cores, MAX_CHILDREN))


def _is_too_long(answer: Answer) -> bool:
    return max(len(answer.completion), len(answer.solution or "")) > MAX_CHARS


# ---- The parent's end


class _Child:
    """A grading process and the socket to it; it has one answer at a time."""

    def __init__(self, memory_mb: int):
        package = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        self.socket, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                # -P: a file of the current folder must not pass for a module
                [sys.executable, "-P", "-m", "aesl_trl.rewards.grading", str(memory_mb)],
                stdin=theirs,
                stdout=theirs,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C in the terminal is the parent's affair
            )
        self._lines = self.socket.makefile("rb")
        self._index = None
        self.deadline = time.monotonic() + START_S
        self.is_ready = self.is_spent = False

    @property
    def is_busy(self) -> bool:
        return self._index is not None

    @property
    def is_idle(self) -> bool:
        return self.is_ready and not self.is_busy

    def send(self, index: int, answer: Answer, deadline_s: float) -> None:
        self._index, self.deadline = index, time.monotonic() + deadline_s
        self.socket.settimeout(deadline_s)
        with suppress(OSError):  # it died: what it does not answer tells
            self.socket.sendall(json.dumps([*answer, deadline_s]).encode("ascii") + b"\n")

    def hear(self, is_late: bool) -> tuple[int | None, Grade | None]:
        """The answer's index and grade; nothing when all it said is that its imports are done."""
        index, self._index = self._index, None
        line = b"" if is_late else self._readline()
        if line and not self.is_ready:
            self.is_ready = True
            return None, None
        if line:
            reward, failure, self.is_spent = json.loads(line)
            return index, Grade(reward, failure)
        self.is_spent = True
        self.process.kill()
        code = self.process.wait()
        if not self.is_ready:
            raise InputError(
                f"the process that grades answers did not start (exit code {code}), its own error is above; to see it "
                "alone: python -m aesl_trl.rewards.grading < /dev/null"
            )
        return index, Grade(0.0, "timeout" if is_late or code == -signal.SIGXCPU else "crash")

    def _readline(self) -> bytes:
        try:
            return self._lines.readline()
        except OSError:  # reset by a child that died before it had read its request
            return b""

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
    """In a forked process: the children answer the process that started them."""
    for graders in _alive:
        graders._forget()


os.register_at_fork(after_in_child=_forget_all)

SHARED_GRADERS = Graders()  # of all rewards in this process; starts nothing before the first batch


# ---- The child


def main() -> None:
    """Answer JSON lines `[grader, completion, solution, deadline_s]` with `[reward, failure, is this the last]`."""
    memory_mb = int(sys.argv[1]) if len(sys.argv) > 1 else MEMORY_MB
    channel = socket.socket(fileno=os.dup(0))
    requests = channel.makefile("rb")
    os.dup2(2, 1)  # what an import prints is no answer
    graders = _load()
    channel.sendall(b"ready\n")
    full = _address_space() + memory_mb * 2**19  # half of it: sympy's caches grow, and must not fail an answer
    _give_up(memory_mb)
    fcntl.fcntl(channel, fcntl.F_SETOWN, os.getpid())
    for line in requests:
        name, completion, solution, deadline_s = json.loads(line)
        _limit_cpu(deadline_s)
        _die_with_parent(channel, True)
        reward, failure = _grade(graders[name], completion, solution)
        _die_with_parent(channel, False)
        is_last = failure == "memory" or _address_space() > full
        channel.sendall(json.dumps([reward, failure, is_last]).encode("ascii") + b"\n")


def _load() -> dict[str, Callable]:
    """The graders that can run here, each warm from one answer."""
    from trl import rewards

    pass

    names = GRADERS if importlib.util.find_spec("math_verify") else set(GRADERS) - set(MATH_GRADERS)
    graders = {name: getattr(rewards, name) for name in names}
    for name, function in graders.items():
        grade = _grade(function, *SELF_TEST)
        if grade != Grade(1.0):
            sys.exit(f"{name} gave {grade} for the answer {SELF_TEST[0]!r} to {SELF_TEST[1]!r}: reinstall math-verify")
    if len(names) == len(GRADERS):  # math-verify is there
        graders[EXTRACT] = extracted_answer
    return graders


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
    _cap(resource.RLIMIT_AS, _address_space() + memory_mb * 2**20)
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
    """An audit hook: no other process, no network, nothing written. Imports still read."""
    if event == "open":
        is_refused = args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    else:
        is_refused = event.startswith(("os.", "subprocess.", "socket.", "shutil.", "ctypes.")) and event not in READS
    if is_refused:
        raise PermissionError(f"a grading process may not {event}")


def _limit_cpu(deadline_s: float) -> None:
    """For a child whose parent is stopped and cannot kill it; soft, as the next answer needs more."""
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = math.ceil(used + deadline_s) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _die_with_parent(channel: socket.socket, is_on: bool) -> None:
    """Have the kernel send SIGIO when the parent's end of the channel closes. While an answer is graded nothing else
    comes through it; between answers its end is read as usual."""
    flags = fcntl.fcntl(channel, fcntl.F_GETFL)
    fcntl.fcntl(channel, fcntl.F_SETFL, flags | os.O_ASYNC if is_on else flags & ~os.O_ASYNC)


def _address_space() -> int:
    pages = Path("/proc/self/statm").read_text().split()[0]
    return int(pages) * resource.getpagesize()


def extracted_answer(completions: list[list[dict]], **kwargs) -> list[str | None]:
    """The normalised LaTeX of the answer in each completion, with math-verify; None where it finds none.

    The settings are those of `trl.rewards.accuracy_reward`.
    """
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    config = LatexExtractionConfig(
        normalization_config=NormalizationConfig(units=True),
        boxed_match_priority=0,
        try_extract_without_anchor=False,
    )
    texts = [completion[0]["content"] for completion in completions]
    found = [
        parse(text, extraction_config=[config], extraction_mode="first_match", parsing_timeout=10) for text in texts
    ]
    # The last item is the text, whether or not math-verify could read it as mathematics
    return [" ".join(str(items[-1]).split()) or None if items else None for items in found]


if __name__ == "__main__":
    main()
