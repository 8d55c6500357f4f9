"""Plots: which rows share a panel, and the methods' colours."""

from aesl_trl.compare.plots import colours, result_panels
from aesl_trl.report.parts import LIGHT


def test_a_panel_holds_rows_of_one_setting_and_no_more_than_it_has_room_for():
    def row(setting, method, selection="last"):
        name = f"{method}/{selection}"
        after = {"pass@1": {"mean": 0.5, "low": None, "high": None}}
        found = {"row": f"{setting}/{name}", "name": name, "setting": setting, "method": method}
        return {**found, "selection": selection, "before": after, "after": after, "differences": {}}

    rows = [row("few", f"m{number}") for number in range(11)] + [row("many", "m0"), row("many", "m0", "step-10")]
    panels = result_panels({"rows": rows, "metric": "pass@1", "reference": [], "cells": []})
    assert [panel.title.split(":")[0] for panel in panels] == ["few", "few", "many"]
    found = colours({"rows": rows[:2] + [row("", "aesl"), row("", "nll"), {**row("", "base"), "selection": None}]})
    assert (found["aesl"], found["nll"], found["base"]) == (LIGHT["aesl"], LIGHT["nll"], LIGHT["base"])
    assert len(set(found.values())) == 5  # a method of another name takes none of theirs
