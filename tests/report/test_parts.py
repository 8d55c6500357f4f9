"""Tables as text, rows of rings and dots, labels beside curves."""

import pytest
from matplotlib.figure import Figure

from aesl_trl.report.parts import Cell, Row, clip, figure_cell, margins_of, markdown_table, ring_dot_whisker, spread


def test_a_table_as_markdown():
    assert markdown_table(["row", "mean"], [["a", "0.5"]]) == "| row | mean |\n| --- | ---: |\n| a | 0.5 |"
    assert markdown_table(["row", "mean"], [], texts=2) == "| row | mean |\n| --- | --- |"


def test_a_figure_with_its_interval_as_the_note():
    assert figure_cell(0.961, [0.945, 0.975]) == Cell("0.96", "[0.94, 0.97]")
    assert figure_cell(0.5, [None, 0.6], digits=3) == Cell("0.500")
    assert figure_cell(None) == Cell("–")


def test_characters_that_would_change_the_page_are_made_visible():
    assert clip("a\n\t\x00\x1b\x7f\u202e\ud83d東 and more", 9) == ("a\n\t␀␛\ufffd\ufffd\ufffd東", 9)


@pytest.mark.parametrize("names", [False, True])
def test_a_ring_before_a_dot_after_its_whisker_and_small_dots_for_seeds(names):
    ax = Figure().add_subplot()
    rows = [Row("two seeds", "#000000", [0.1], [0.2, 0.4], [0.1, 0.5]), Row("not yet", "#000000", [0.3])]
    ring_dot_whisker(ax, rows, names)
    drawn = [(line.get_xdata().tolist(), line.get_markerfacecolor()) for line in ax.lines if line.get_marker() == "o"]
    assert [values for values, _ in drawn][:3] == [[0.1], [0.2, 0.4], [pytest.approx(0.3)]]
    assert drawn[0][1] != "#000000" and drawn[2][1] == "#000000"
    assert [line.get_xdata().tolist() for line in ax.lines if line.get_marker() == "|"] == [[0.1, 0.5]]
    bars = [line for line in ax.lines if line.get_marker() == "None"]
    assert len(bars) == 1
    beside = [("two seeds", (0, 0)), ("not yet", (0, 1))]
    assert [(text.get_text(), text.xy) for text in ax.texts] == (beside if names else [])


def test_margins_leave_room_for_the_longest_line():
    rows = [Row("a name of 20 letters\nshort", "#000000", text="0.25"), Row("x", "#000000")]
    left, right = margins_of(rows)
    assert 20 * 0.075 < left < 20 * 0.1 and 4 * 0.075 < right < 0.6  # 9 points of DejaVu Sans: some 0.075 inches


def test_labels_keep_apart_and_inside():
    assert spread([0.5, 0.5, 0.5], [0.1] * 3, 0, 1) == pytest.approx([0.5, 0.6, 0.7])
    assert spread([1.0, 1.0], [0.1] * 2, 0, 1) == pytest.approx([0.9, 1.0])
    assert spread([0.2, 0.9], [0.1] * 2, 0, 1) == pytest.approx([0.2, 0.9])
