"""How cost grows: the exponent on exact power laws, and each kind of work once at a tiny size."""

import json

import growth
import growth_work as work
import pytest
import record

from aesl_trl import files


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_law_is_its_power(power):
    sizes = [1, 10, 100, 1000]
    assert growth.exponent(sizes, [3 * size**power for size in sizes], 0.1) == pytest.approx(power)


def test_the_exponent_is_that_of_the_upper_half_and_of_three_sizes_at_least():
    # A constant part of 5 hides nothing of the three largest, among which the cost rises from 1 to 10,000 by a square
    assert growth.exponent([1, 10, 100, 1000], [5, 1, 100, 10_000], 0.1) == pytest.approx(2.0)
    # By hand: log2 of 8 / 2 over log2 of 16 / 4, and a middle size on the line
    assert growth.exponent([1, 2, 4, 8, 16], [9, 9, 2, 4, 8], 0.1) == pytest.approx(1.0)
    assert growth.exponent([1, 2, 4, 8], [1, 0.01, 1, 8], 0.1) is None  # too small to be told from noise
    assert [growth.num_fitted(list(range(count))) for count in (2, 3, 4, 5, 7)] == [2, 3, 3, 3, 4]


def test_every_curve_is_fitted_to_three_sizes_and_one_more_shows_its_beginning():
    assert all(len(curve.sizes) >= 4 for curves in growth.CURVES.values() for curve in curves)


def curve(seconds, bound=1.0, topic="head") -> dict:
    points = [{"size": 10**n, "seconds": [each], "peak_bytes": 2**20 * 10**n} for n, each in enumerate(seconds)]
    return {"topic": topic, "what": "w", "size": "rows", "bound": bound, "why": "", "points": points}


def test_the_table_judges_each_curve_by_its_bound():
    curves = [
        growth.judged(each) for each in (curve([1, 10, 100]), curve([1, 100, 10_000]), curve([1, 100, 10_000], 2.0))
    ]
    rows = growth.table_of([*curves, growth.judged(curve([0.001, 0.001, 0.002]))])["rows"]
    assert [row[3] for row in rows] == ["1.00", "2.00", "2.00", None]
    assert [row[5] for row in rows] == ["yes", "no", "yes", None]
    assert rows[0][2] == "1 to 100" and rows[0][6] == "1.00" and rows[0][7] == "100"


def test_topics_that_were_not_run_stay_as_recorded(tmp_path):
    path = tmp_path / "growth.json"
    assert [each["topic"] for each in growth.with_recorded({"data": [curve([1, 2])]}, path)] == ["data"]
    before = [growth.judged(curve([1, 10], topic=topic)) for topic in ("head", "data")]
    record.write(path, "growth", [growth.table_of(before)])
    now = growth.with_recorded({"data": [growth.judged(curve([7, 10]))]}, path)
    assert [(each["topic"], each["points"][0]["seconds"]) for each in now] == [("head", [1]), ("data", [7])]
    growth.draw(now, path.with_suffix(".png"))
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "start",
    [
        lambda folder: work.head(4, 16, 8),
        lambda folder: work.figures(2, 2, 5),
        lambda folder: work.measurement(2, 2, 3, folder),
        lambda folder: work.decontamination(3),
        lambda folder: work.statistics(3),
        lambda folder: work.selection(20, folder),
        lambda folder: work.asking(8),
    ],
    ids=["head", "figures", "measurement", "decontamination", "statistics", "selection", "asking"],
)
def test_the_work_runs(start, tmp_path):
    seconds, peak = growth.measured(lambda: start(tmp_path))
    assert seconds >= 0 and peak >= 0


def test_the_made_up_comparison_has_ended(tmp_path, monkeypatch):
    """Else its second start would run cells, and the table would lack them."""
    path = work.comparison(1, tmp_path / "comparison")
    monkeypatch.setattr("aesl_trl.compare.workers.Workers.run", lambda self, groups: pytest.fail("a cell was run"))
    work.compare_resume(path)()
    work.compare_table(path)()
    found = files.read_json(tmp_path / "comparison/runs/compare.json")
    assert len(found["cells"]) == 6 and not found["missing"] and not any(each["outdated"] for each in found["cells"])
    tuned = found["tuning"]["rows"]
    assert len(tuned) == 2 and all(row["chosen"] and row["finished"] == row["cells"] == 2 for row in tuned)
    assert len(found["cells"]) + sum(row["cells"] for row in tuned) == work.METHOD_CELLS


def test_the_made_up_run_is_whole_to_the_report(tmp_path):
    work.report_of_runs(1, tmp_path)()
    page = (tmp_path / "report/report.md").read_text()
    assert "own samples starts at" in page and "reward goes from" in page


@pytest.mark.slow
@pytest.mark.parametrize("topic", list(growth.CURVES))
def test_every_curve_at_its_quick_sizes(topic):
    curves = growth.in_own_process(topic, quick=True)
    assert len(curves) == len(growth.CURVES[topic])
    for found, known in zip(curves, growth.CURVES[topic], strict=True):
        assert [point["size"] for point in found["points"]] == list(known.quick)
        assert all(second > 0 for point in found["points"] for second in point["seconds"])
    json.dumps(growth.table_of(list(map(growth.judged, curves))))
