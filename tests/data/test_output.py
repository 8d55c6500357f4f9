"""output: what data.json and the summary say, and what becomes of another run's files."""

import pytest
from small_problems import asked, contents_of, openr1_row, openr1_rows, problem_text, write_rows

from aesl_trl.data import output
from aesl_trl.errors import InputError
from aesl_trl.files import read_json
from aesl_trl.processes import lock


def test_data_json_describes_it(run, tmp_path):
    problems = [{"problem": problem_text(3)}, {"problem": "Something else altogether?"}]
    bench = write_rows(tmp_path / "bench.jsonl", problems)
    rows = openr1_rows()
    rows[7] = openr1_row(7, **asked(problem_text(5)))
    described = read_json(run(rows, decontaminate=["bench.jsonl"]) / "data.json")
    assert described["source"] | {"content": None} == {
        "dataset_name": str(tmp_path / "rows.jsonl"),
        "split": "train",
        "rows": 60,
        "schema": "openr1",
        "content": None,
    }
    assert {name: file["rows"] for name, file in described["files"].items()} == {
        "sft.jsonl": 12,
        "rl.jsonl": 38,
        "held_out.jsonl": 8,
        "dropped.jsonl": 2,
    }
    assert described["dropped"] == {"duplicate": 1, "in_benchmark": 1}
    assert described["benchmarks"] == {bench: {"problems": 2, "rows": 1}}
    assert described["settings"]["seed"] == 0 and described["versions"]["datasets"]


def test_counts_are_printed(run, capsys):
    run([openr1_row(0), *openr1_rows()])
    out = capsys.readouterr().out
    assert "61 rows" in out and "dropped: duplicate 1\n" in out
    assert "compared with no benchmark" in out
    assert "written: sft.jsonl 12, rl.jsonl 40, held_out.jsonl 8" in out


# ---- What another run left


def test_the_same_again_changes_nothing(run, capsys):
    out = run()
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.json*")}
    run()
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.json*")} == before
    assert "unchanged" in capsys.readouterr().out


def test_other_settings_are_refused_and_overwrite_replaces(run):
    out = run(subsets=[4])
    before = contents_of(out)
    with pytest.raises(InputError, match=r"holds the output of other settings \(seed 0, now 1\): --overwrite"):
        run(seed=1, subsets=[4])
    assert contents_of(out) == before
    run(None, "--overwrite", seed=1)
    assert not (out / "sft_4.jsonl").exists()
    assert contents_of(out) != before and read_json(out / "data.json")["settings"]["seed"] == 1


def test_what_a_killed_run_left_is_removed_and_nothing_else(run):
    out = run()
    for name in (".aesl-data.tmp", ".new-ideas"):
        (out / name).mkdir()
        (out / name / "a").write_text("")
    run(None, "--overwrite", seed=1)
    assert not (out / ".aesl-data.tmp").exists() and (out / ".new-ideas" / "a").exists()


def test_other_data_under_the_same_settings_is_refused(run):
    out = run()
    before = contents_of(out)
    with pytest.raises(InputError, match=r"sft.jsonl would change although the settings are the same"):
        run(openr1_rows()[20:])
    assert contents_of(out) == before
    run(openr1_rows()[20:], "--overwrite")
    assert contents_of(out) != before


def test_files_without_data_json_are_refused(run, tmp_path):
    (tmp_path / "out").mkdir()
    write_rows(tmp_path / "out" / "mine.jsonl", [{"a": 1}])
    with pytest.raises(InputError, match="holds mine.jsonl without data.json"):
        run()
    out = run(None, "--overwrite")
    assert (out / "mine.jsonl").exists() and (out / "data.json").exists()


@pytest.mark.parametrize(
    "content", ["[]", '{"files": {"../mine.jsonl": {}}}', '{"stage": "data", "files": {"../mine.jsonl": {}}}']
)
def test_somebody_elses_data_json_is_replaced_only_when_told(content, run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "data.json").write_text(content)
    write_rows(tmp_path / "mine.jsonl", [{"a": 1}])
    with pytest.raises(InputError, match="holds the output of other settings"):
        run()
    assert (tmp_path / "out" / "data.json").read_text() == content
    out = run(None, "--overwrite")
    assert read_json(out / "data.json")["stage"] == "data" and (tmp_path / "mine.jsonl").exists()


def test_a_failed_write_leaves_the_old_output(run, monkeypatch):
    out = run()
    before = contents_of(out)

    def full(path, rows):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output, "write_jsonl", full)
    with pytest.raises(OSError, match="No space"):
        run(None, "--overwrite", seed=1)
    assert contents_of(out) == before


def test_a_second_run_in_the_folder_is_kept_out(run, tmp_path):
    with lock(tmp_path / "out" / output.LOCK, ""), pytest.raises(InputError, match="another aesl data is at work"):
        run()
