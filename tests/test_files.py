"""The files of a run folder: valid JSON, and never half of it."""

import json
import math
import os

import pytest

from aesl_trl import files
from aesl_trl.errors import InputError


def test_what_json_cannot_hold_becomes_null(tmp_path):
    files.write_json(tmp_path / "a.json", {"x": math.nan, "y": [math.inf, 1.5, (2,)], 3: "ä"})
    assert files.read_json(tmp_path / "a.json") == {"x": None, "y": [None, 1.5, [2]], "3": "ä"}


def test_lines_are_added(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    for step in range(3):
        files.append_jsonl(path, {"step": step, "nll": math.nan})
    assert files.read_jsonl(path) == [{"step": step, "nll": None} for step in range(3)]
    assert path.read_text().endswith("\n")


def test_a_failed_append_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    files.append_jsonl(path, {"step": 0})
    before = path.read_bytes()

    def full_disk(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        files.append_jsonl(path, {"step": 1})
    assert path.read_bytes() == before


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"step": 0}) + "\n{\n", encoding="utf-8")
    with pytest.raises(InputError, match="line 2 is not valid JSON"):
        files.read_jsonl(path)


def test_replace_dir_takes_the_place_of_an_older_folder(tmp_path):
    for name, text in (("source", "new"), ("target", "old")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(text)
    files.replace_dir(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target" / "weights").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_sft_dir(tmp_path):
    with pytest.raises(InputError, match="holds no SFT run"):
        files.sft_dir(tmp_path)
    files.write_json(tmp_path / "chain" / files.CHAIN, {"sft_dir": "../shared"})
    assert files.sft_dir(tmp_path / "chain") == (tmp_path / "shared").resolve()
    files.write_json(tmp_path / "run" / "sft" / files.RUN, {})
    assert files.sft_dir(tmp_path / "run") == tmp_path / "run" / "sft"
    files.write_json(tmp_path / "base" / files.CHAIN, {"sft_dir": None})
    with pytest.raises(InputError, match="without an SFT stage"):
        files.sft_dir(tmp_path / "base")
