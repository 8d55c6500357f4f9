"""Errors that a user can mend, each told in one line."""

import difflib
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterable
from pathlib import Path


OTHER_RANK_S = 10.0  # a launcher looks several times a second, but a process of torch may take seconds to end
UNFINISHED = 3  # exit code: stopped before the last step; no stage may follow


class InputError(ValueError):
    """Unusable input: the message is one line that says what is wrong, where, and the nearest valid value."""


class Diverged(RuntimeError):
    """A loss or gradient that is not finite; the message is one line with the step, the rank and the rows."""


def nearest(name: str, options: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the option closest to `name`, or an empty string when none is close."""
    match = difflib.get_close_matches(str(name), list(options), n=1, cutoff=0.6)
    return f"; did you mean {match[0]!r}?" if match else ""


def nearest_sibling(path: Path, pattern: str = "*") -> str:
    """Return [`nearest`] for the name of a missing `path` among the files beside it that match `pattern`."""
    return nearest(path.name, [item.name for item in path.parent.glob(pattern)])


def in_one_line(error: Exception | str, limit: int = 300) -> str:
    """Return a message without line breaks, cut to `limit` characters: the libraries' own messages have many lines."""
    return textwrap.shorten(str(error), limit, placeholder=" ...")


def exit_on_input_error(command: str, main: Callable[[], None]) -> None:
    """Run `main`. Turn an [`InputError`] into one line on stderr and exit code 2, [`Diverged`] into a line and code 3.

    White space of the message is collapsed here, so the callers need not do it. With several processes, local rank 0
    prints at once. The others wait [`OTHER_RANK_S`] seconds: if all failed, the launcher has ended them by then; if
    only this one failed, its line still appears.
    """
    try:
        main()
    except (InputError, Diverged) as error:
        rank = os.environ.get("LOCAL_RANK", "0")
        if rank != "0":
            time.sleep(OTHER_RANK_S)
        say(f"{command}: {' '.join(str(error).split())}" + (f" (local rank {rank})" if rank != "0" else ""))
        sys.exit(2 if isinstance(error, InputError) else UNFINISHED)


def say(line: str) -> None:
    """Print a line of its own to stderr, also where a progress bar stands there."""
    if "tqdm" in sys.modules:
        sys.modules["tqdm"].tqdm.write(line, file=sys.stderr)
    else:
        print(line, file=sys.stderr)
    sys.stderr.flush()
