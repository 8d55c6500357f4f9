"""Plots: what shares a colour, settings below each other, and ticks with room between them."""

from counted_work import Read
from matplotlib.figure import Figure

from aesl_trl.compare import plots
from aesl_trl.compare.plots import looks_of, results_sheet, step_panels
from aesl_trl.report.parts import LIGHT


def row(setting, method, selection="last"):
    name = f"{method}/{selection}" if selection else method
    after = {"pass@1": {"mean": 0.5, "low": None, "high": None}, "entropy": {"mean": 0.2, "low": None, "high": None}}
    found = {"row": f"{setting}/{name}", "name": name, "setting": setting, "method": method}
    return {**found, "selection": selection, "before": after, "after": after, "differences": {}}


def compared(rows):
    return {"rows": rows, "metric": "pass@1", "figures": ["entropy"], "reference": [], "cells": [], "correlations": []}


def test_each_start_has_a_colour_of_its_own():
    rows = [row("", "base", None), row("", "nll"), row("", "nll", "turning_point"), row("", "nll", "best_eval")]
    rows += [row("", "aesl")] + [row("", f"m{number}") for number in range(8)]
    looks = looks_of(compared(rows))
    assert [looks[name].colour for name in ("base", "nll/last", "nll/turning_point", "aesl/last")] == [
        LIGHT[name] for name in ("base", "nll", "stop", "aesl")
    ]
    assert len({look.colour for look in looks.values()}) == len(rows)
    many = looks_of(compared([row("", f"m{number}") for number in range(30)]))
    assert len({(look.colour, look.mark) for look in many.values()}) == 30


def test_rows_of_all_settings_share_their_axes(monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "ring_dot_whisker", lambda ax, rows, names: drawn.append([row.name for row in rows]))
    rows = [row("few", f"m{number}") for number in range(11)] + [row("many", "m0"), row("many", "m0", "step-10")]
    result = compared(rows)
    assert results_sheet(result, looks_of(result)).startswith(b"\x89PNG")
    assert drawn == [["few", *(f"m{number}/last" for number in range(11)), "many", "m0/last"]]
    assert results_sheet(compared(rows[-1:]), {}) is None


def test_ticks_of_steps_do_not_collide():
    rows = [row("", "nll", f"step-{step}") for step in (10, 20, 30, 40, 60, 100, 200, 400)]
    result = compared(rows)
    panel = step_panels(result, looks_of(result))[0]
    figure = Figure(figsize=(4, 2.8), dpi=100)
    ax = figure.add_axes((0.125, 0.2, 0.82, 0.6))
    panel.draw(ax)
    figure.canvas.draw()
    boxes = [label.get_window_extent() for label in ax.get_xticklabels() if label.get_text()]
    assert len(boxes) >= 3 and all(one.x1 < other.x0 for one, other in zip(boxes, boxes[1:], strict=False))
    assert ax.get_ylim()[0] == 0


def test_the_sheet_reads_the_cells_once_however_many_rows_there_are(monkeypatch):
    monkeypatch.setattr(plots, "ring_dot_whisker", lambda ax, rows, names: None)

    def reads(count: int) -> int:
        rows = [row("", f"m{number}") for number in range(count)]
        cells = Read({**each, "after": {"pass@1": 0.5}} for each in rows)
        result = {**compared(rows), "cells": cells}
        assert results_sheet(result, looks_of(result))
        return cells.times

    assert reads(12) == reads(3) == 1
