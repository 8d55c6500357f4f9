"""Plots: which rows share a panel, and the methods' colours."""

from counted_work import Read

from aesl_trl.compare.plots import colours, result_panels
from aesl_trl.report.parts import LIGHT


def row(setting, method, selection="last"):
    name = f"{method}/{selection}"
    after = {"pass@1": {"mean": 0.5, "low": None, "high": None}}
    found = {"row": f"{setting}/{name}", "name": name, "setting": setting, "method": method}
    return {**found, "selection": selection, "before": after, "after": after, "differences": {}}


def test_a_panel_holds_rows_of_one_setting_and_no_more_than_it_has_room_for():
    rows = [row("few", f"m{number}") for number in range(11)] + [row("many", "m0"), row("many", "m0", "step-10")]
    panels = result_panels({"rows": rows, "metric": "pass@1", "reference": [], "cells": []})
    assert [panel.title.split(":")[0] for panel in panels] == ["few", "few", "many"]
    found = colours({"rows": rows[:2] + [row("", "aesl"), row("", "nll"), {**row("", "base"), "selection": None}]})
    assert (found["aesl"], found["nll"], found["base"]) == (LIGHT["aesl"], LIGHT["nll"], LIGHT["base"])
    assert len(set(found.values())) == 5  # a method of another name takes none of theirs


def test_the_panels_read_the_cells_once_however_many_rows_there_are():
    def reads(count: int) -> int:
        rows = [row("", f"m{number}") for number in range(count)]
        cells = Read({**each, "after": {"pass@1": 0.5}} for each in rows)
        result_panels({"rows": rows, "metric": "pass@1", "reference": [], "cells": cells})
        return cells.times

    assert reads(12) == reads(3) == 1
