"""Tables as text, rows of rings and dots, labels beside curves."""

import pytest
from matplotlib.figure import Figure

from aesl_trl.report.parts import Cell, Row, clip, figure_cell, markdown_table, ring_dot_whisker, spread


def test_a_table_as_markdown():
    assert markdown_table(["row", "mean"], [["a", "0.5"]]) == "| row | mean |\n| --- | ---: |\n| a | 0.5 |"
    assert markdown_table(["row", "mean"], [], texts=2) == "| row | mean |\n| --- | --- |"


def test_a_figure_with_its_interval_as_the_note():
    assert figure_cell(0.961, [0.945, 0.975]) == Cell("0.96", "[0.94, 0.97]")
    assert figure_cell(0.5, [None, 0.6], digits=3) == Cell("0.500")
    assert figure_cell(None) == Cell("–")


def test_characters_that_would_change_the_page_are_made_visible():
    assert clip("a\n\t\x00\x1b\x7f\u202e\ud83d東 and more", 9) == ("a\n\t␀␛\ufffd\ufffd\ufffd東", 9)


@pytest.mark.parametrize("dense", [False, True])
def test_a_ring_before_a_dot_after_its_whisker_and_small_dots_for_seeds(dense):
    ax = Figure().add_subplot()
    rows = [Row("two seeds", "#000000", [0.1], [0.2, 0.4], [0.1, 0.5]), Row("not yet", "#000000", [0.3])]
    ring_dot_whisker(ax, rows, dense)
    drawn = [(line.get_xdata().tolist(), line.get_markerfacecolor()) for line in ax.lines if line.get_marker() == "o"]
    assert [values for values, _ in drawn][:3] == [[0.1], [0.2, 0.4], [pytest.approx(0.3)]]
    assert drawn[0][1] != "#000000" and drawn[2][1] == "#000000"
    assert [line.get_xdata().tolist() for line in ax.lines if line.get_marker() == "|"] == [[0.1, 0.5]]
    bars = [line for line in ax.lines if line.get_marker() == "None"]
    assert len(bars) == (0 if dense else 1)
    assert [text.get_text() for text in ax.texts] == ["two seeds", "not yet"]


def test_labels_keep_apart_and_inside():
    assert spread([0.5, 0.5, 0.5], [0.1] * 3, 0, 1) == pytest.approx([0.5, 0.6, 0.7])
    assert spread([1.0, 1.0], [0.1] * 2, 0, 1) == pytest.approx([0.9, 1.0])
    assert spread([0.2, 0.9], [0.1] * 2, 0, 1) == pytest.approx([0.2, 0.9])
