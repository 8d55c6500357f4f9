"""Progress bars as a training draws them: in a notebook, or on a terminal, of the first process alone."""

import sys

from tqdm.auto import tqdm
from tqdm.notebook import tqdm_notebook


def bar(
    total: int, title: str, *, done: int = 0, unit: str = "sample", shown: bool = True, leave: bool = True
) -> tqdm:
    """Open a bar that stands at `done` of `total`; it is silent without `shown`.

    It is also silent where stderr is no terminal, except in a notebook, where tqdm draws a widget. tqdm's own
    environment variables, such as TQDM_DISABLE, hold where the bar would be shown.
    """
    can_draw = sys.stderr.isatty() or issubclass(tqdm, tqdm_notebook)
    hidden = {} if shown and can_draw else {"disable": True}
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
