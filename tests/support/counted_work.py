"""Work, counted: bytecodes that run, and how often a list is read. A clock would say what the machine was doing."""

import sys
from collections.abc import Callable
from pathlib import Path

import aesl_trl


PACKAGE = str(Path(aesl_trl.__file__).parent)


def bytecodes(work: Callable[[], object]) -> int:
    """Return how many bytecodes of the package's own functions run in `work`."""
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


class Read(list):
    """A list that counts how often somebody goes through it."""

    times = 0

    def __iter__(self):
        self.times += 1
        return super().__iter__()
