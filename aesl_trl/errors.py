"""What a user did wrong, in one line."""

import difflib
import os
import sys
from collections.abc import Callable, Iterable


UNFINISHED = 3  # exit code: stopped before the last step; no stage may follow


class InputError(ValueError):
    """Unusable input: the message is one line that says what is wrong, where, and the nearest valid value."""


class Diverged(RuntimeError):
    """A loss or gradient that is not finite; the message is one line with the step, the rank and the rows."""


def nearest(name: str, options: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the option closest to `name`, or an empty string when none is close."""
    match = difflib.get_close_matches(str(name), list(options), n=1, cutoff=0.6)
    return f"; did you mean {match[0]!r}?" if match else ""


def exit_on_input_error(command: str, main: Callable[[], None]) -> None:
    """Run `main`; an [`InputError`] becomes one line on stderr (on the first local process only) and exit code 2.

    [`Diverged`] becomes one such line and exit code [`UNFINISHED`].
    """
    try:
        main()
    except (InputError, Diverged) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{command}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else UNFINISHED)
