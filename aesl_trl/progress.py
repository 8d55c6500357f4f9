"""Progress bars as a training draws them, on the terminal of the first process alone."""

import sys

from tqdm.auto import tqdm


def bar(
    total: int, title: str, *, done: int = 0, unit: str = "sample", shown: bool = True, leave: bool = True
) -> tqdm:
    """Open a bar that stands at `done` of `total`; it is silent without `shown`, and where stderr is no terminal.

    tqdm's own environment variables, such as TQDM_DISABLE, hold where the bar would be shown.
    """
    hidden = {} if shown and sys.stderr.isatty() else {"disable": True}
    return tqdm(total=total, desc=title, initial=done, unit=unit, leave=leave, dynamic_ncols=True, **hidden)


def step_on(shown: tqdm, title: str) -> None:
    """Move a bar of steps on by one, and name the step that begins."""
    shown.update()
    shown.set_description(title)


def time_left(seconds: float) -> str:
    """Return a duration in the unit that a person would say it in: `40 s`, `12 min` or `2.5 h`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
