"""Errors that a user can mend, each told in one line."""

import difflib
import errno
import os
import signal
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TextIO


OTHER_RANK_S = 10.0  # a launcher looks several times a second, but a process of torch may take seconds to end
CLOSE = 0.65  # of difflib's ratio: `gtp` and `gpt` share 0.67, `num_processes` and `num_train_epochs` 0.61
UNFINISHED = 3  # exit code: stopped before the last step; no stage may follow
# transformers warns so at every start, because TRL and accelerate call it by old names, whatever a user's config says.
DEPRECATED = r"`(is_)?gradient_checkpointing\w*` is deprecated"
# The disk takes no more.
WRITE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
# A path of the user's cannot be used. Any other file error may be a mistake in the code, and keeps its traceback.
PATH_ERRORS = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}
# Control characters, lone surrogates, and marks that turn the direction of a text: a terminal obeys them, and a page
# reads otherwise than it is written.
VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
VISIBLE |= dict.fromkeys([*range(0x7F, 0xA0), *range(0xD800, 0xE000)], 0xFFFD)
VISIBLE |= dict.fromkeys([0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)
# JSON and YAML may name a character beyond 16 bits by two escapes. One of them alone is no text, and names no file.
HALF_A_CHARACTER = r"an escape of \ud800 to \udfff without its other half is no character"


class InputError(ValueError):
    """Unusable input: the message is one line that says what is wrong, where, and the nearest valid value."""


class Diverged(RuntimeError):
    """A loss or gradient that is not finite; the message is one line with the step, the rank and the rows."""


def nearest(name: str, options: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the option closest to `name`, or an empty string when none is close."""
    if not isinstance(name, str) or len(name) > 255:
        return ""
    match = difflib.get_close_matches(name, list(options), n=1, cutoff=CLOSE)
    return f"; did you mean {match[0]!r}?" if match else ""


def nearest_sibling(path: Path, pattern: str = "*") -> str:
    """Return [`nearest`] for the name of a missing `path` among the files beside it that match `pattern`."""
    return nearest(path.name, [item.name for item in path.parent.glob(pattern)])


def in_one_line(error: Exception | str, limit: int = 300) -> str:
    """Return a message without line breaks, cut to `limit` characters: the libraries' own messages have many lines."""
    return textwrap.shorten(str(error), limit, placeholder=" ...")


def exit_on_input_error(command: str, main: Callable[[], None]) -> None:
    """Run `main`, and turn an error that the user can mend into one line on stderr and an exit code.

    The code is 2 for an [`InputError`] and a path that cannot be used, 3 for [`Diverged`], 1 for a disk that takes no
    more. White space of the message is collapsed here, so the callers need not do it. With several processes, local
    rank 0 prints at once. The others wait [`OTHER_RANK_S`] seconds: if all failed, the launcher has ended them by
    then; if only this one failed, its line still appears.
    """
    form = warnings.formatwarning
    warnings.formatwarning = lambda *given, **options: visible(form(*given, **options))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=DEPRECATED, category=FutureWarning)
            main()
    except Exception as error:
        if (code := _exit_code(error)) is None:
            raise
        rank = os.environ.get("LOCAL_RANK", "0")
        if rank != "0":
            time.sleep(OTHER_RANK_S)
        say(f"{command}: {' '.join(_said(error).split())}" + (f" (local rank {rank})" if rank != "0" else ""))
        sys.exit(code)
    finally:
        warnings.formatwarning = form


def _exit_code(error: Exception) -> int | None:
    if isinstance(error, InputError) or (isinstance(error, OSError) and error.errno in PATH_ERRORS):
        return 2
    if isinstance(error, Diverged):
        return UNFINISHED
    return 1 if is_write_error(error) else None


def _said(error: Exception) -> str:
    if isinstance(error, OSError):
        return ": ".join(str(part) for part in (error.strerror, error.filename, error.filename2) if part)
    is_told = isinstance(error, InputError | Diverged)
    return str(error) if is_told else in_one_line(error)


def is_by_signal(error: BaseException) -> bool:
    """Say whether a signal ends this process, and the code that runs is only where it was."""
    return isinstance(error, SystemExit) and error.code in (128 + signal.SIGINT, 128 + signal.SIGTERM)


def is_write_error(error: BaseException) -> bool:
    """Recognise a full disk and the like, as Python, torch.save (in C++) and safetensors (in Rust) report it."""
    of_python = isinstance(error, OSError) and error.errno in WRITE_ERRORS
    of_torch = "inline_container.cc" in str(error) and "Reader" not in str(error)
    return of_python or of_torch or str(error).startswith("Error while serializing")  # the last is safetensors'


def visible(text: str) -> str:
    """Return `text` with its control characters made visible: no name and no completion commands the terminal."""
    return text.translate(VISIBLE)


def say(line: str) -> None:
    """Print a line of its own to stderr, also where a progress bar stands there."""
    _print_above_bars(line, sys.stderr)


def tell(text: str) -> None:
    """Print what a command found to stdout, at once, also where a progress bar stands on the terminal."""
    _print_above_bars(text, sys.stdout)


def _print_above_bars(text: str, stream: TextIO) -> None:
    if "tqdm" in sys.modules:
        sys.modules["tqdm"].tqdm.write(visible(text), file=stream)
    else:
        print(visible(text), file=stream)
    stream.flush()
