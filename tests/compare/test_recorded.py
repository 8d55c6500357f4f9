"""scripts/record_compare.py: what it keeps of a comparison shows the same table, and lets the rest run elsewhere."""

import shutil

from record_compare import record
from small_compare import TUNE, result, run, started

from aesl_trl import files


def test_a_recorded_comparison_goes_on_where_its_weights_are_gone(project, fakes):
    """The record is put back: the table is the same, and only the new seed runs, at the points that were chosen."""
    path = project(seeds=[0], tune=TUNE)
    assert run(path) == 0
    before, ran = result(fakes), len(started(fakes))
    kept = fakes.with_name("kept")
    assert record(fakes, kept) == len(before["cells"]) + sum(row["finished"] for row in before["tuning"]["rows"])
    assert {file.suffix for file in kept.rglob("*") if file.is_file()} == {".json", ".yaml"}
    assert not list(kept.rglob("weights.json"))
    order = (fakes / "order.txt").read_text()
    shutil.rmtree(fakes)
    shutil.copytree(kept, fakes)
    (fakes / "order.txt").write_text(order)
    assert run(path, "--table_only") == 0
    after = result(fakes)
    assert after["rows"] == before["rows"] and not any(cell["outdated"] for cell in after["cells"])
    assert run(project(seeds=[0, 1], tune=TUNE)) == 0
    new = started(fakes)[ran:]
    assert new and all("seed-1" in folder for _, folder in new)
    assert {cell["seed"] for cell in result(fakes)["cells"]} == {0, 1}


def test_what_is_recorded_names_no_folder_of_this_machine(project, fakes, tmp_path):
    assert run(project(seeds=[0])) == 0
    record(fakes, tmp_path / "kept", checkout=tmp_path)
    texts = {file: file.read_text(encoding="utf-8") for file in (tmp_path / "kept").rglob("*") if file.is_file()}
    assert texts and [file for file, text in texts.items() if str(tmp_path) in text] == []
    assert files.read_json(next((tmp_path / "kept").rglob(files.EVALUATION)))
