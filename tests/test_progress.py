"""Progress bars on a real terminal: drawn there alone, and never cut by a line of ours."""

import io
import os
import re
import subprocess
import sys

import pytest
from tqdm.notebook import tqdm_notebook

from aesl_trl import progress
from aesl_trl.progress import time_left


CODE = """
from aesl_trl.errors import say, tell
from aesl_trl.progress import bar
with bar(3, "step 0: own samples") as shown:
    for number in range(3):
        shown.update()
        tell(f"found {number}")
        say(f"warned {number}")
"""


def on_a_terminal(code: str) -> str:
    """Return what a program writes whose stdout and stderr are one terminal."""
    import pty  # Windows has neither of them
    import termios

    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    with subprocess.Popen([sys.executable, "-c", code], stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        written = b""
        try:
            while part := os.read(ours, 4096):
                written += part
        except OSError:  # Linux ends a terminal that nobody holds so
            pass
    os.close(ours)
    assert process.returncode == 0, written.decode()
    return written.decode()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pty")
def test_lines_stand_above_the_bar_on_a_terminal():
    written = on_a_terminal(CODE)
    assert "step 0: own samples: 100%" in written
    for number in range(3):
        for word in ("found", "warned"):  # the bar is wiped from its line before a text of ours takes it
            assert re.search(rf"\r *\r{word} {number}\r\n", written)


def test_no_bar_where_there_is_no_terminal():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout == "found 0\nfound 1\nfound 2\n"
    assert done.stderr == "warned 0\nwarned 1\nwarned 2\n"


def test_a_notebook_has_bars_without_a_terminal(monkeypatch):
    opened = []

    class Widget(tqdm_notebook):  # as the class that tqdm.auto gives in a notebook
        def __init__(self, **given):
            opened.append(given)

        def __del__(self):  # tqdm's own closes what was never opened
            pass

    assert not issubclass(progress.tqdm, tqdm_notebook)
    monkeypatch.setattr(sys, "stderr", io.StringIO())  # no terminal
    monkeypatch.setattr(progress, "tqdm", Widget)
    progress.bar(3, "step 0: own samples")
    progress.bar(3, "step 0: own samples", shown=False)
    assert ["disable" in given for given in opened] == [False, True]


def test_a_duration_in_the_unit_that_a_person_would_say():
    assert [time_left(seconds) for seconds in (0.4, 40, 90, 1800, 9000)] == ["0 s", "40 s", "2 min", "30 min", "2.5 h"]
