"""Which checkpoints are whole and which are torn, what training goes on from, and what is deleted."""

import json
import os
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_chains import checkpoint, cut

from aesl_trl import files
from aesl_trl.errors import InputError
from aesl_trl.training import checkpoints
from aesl_trl.training.checkpoints import (
    INCOMPLETE,
    MANIFEST,
    damage,
    find_checkpoint,
    is_whole,
    last_whole_checkpoint,
    mark_incomplete,
    numbered,
    rotate,
    sweep,
    write_manifest,
)


def test_the_newest_whole_checkpoint(tmp_path):
    for step in (5, 10, 100):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_whole_checkpoint(tmp_path) == (tmp_path / "checkpoint-100", [])
    cut(tmp_path / "checkpoint-100/model.safetensors", 100)
    assert last_whole_checkpoint(tmp_path) == (tmp_path / "checkpoint-10", [tmp_path / "checkpoint-100"])


def test_no_whole_checkpoint(tmp_path):
    assert last_whole_checkpoint(tmp_path) == (None, [])
    (tmp_path / "checkpoint-3").mkdir()
    assert last_whole_checkpoint(tmp_path) == (None, [tmp_path / "checkpoint-3"])


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_missing_file_is_torn(tmp_path, name):
    path = checkpoint(tmp_path, 1)
    assert is_whole(path)
    (path / name).unlink()
    assert not is_whole(path)


@settings(deadline=None)
@given(
    st.sampled_from(["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]),
    st.floats(0, 1, exclude_max=True),
)
def test_a_file_cut_anywhere_is_torn(tmp_path_factory, name, share):
    path = checkpoint(tmp_path_factory.mktemp("torn"), 1)
    cut(path / name, int(share * (path / name).stat().st_size))
    assert not is_whole(path)


def test_a_missing_shard_is_torn(tmp_path):
    path = checkpoint(tmp_path, 1)
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert not is_whole(path)


def test_the_mark_of_an_unfinished_save(tmp_path):
    path = checkpoint(tmp_path, 1)
    (path / "checkpoint-is-incomplete.txt").write_text("x")
    assert not is_whole(path)


# ---- With a manifest


def listed_checkpoint(folder, step=1):
    path = checkpoint(folder, step)
    mark_incomplete(path, "being saved")
    assert not is_whole(path)
    write_manifest(path, step=step)
    return path


def test_a_manifest_lists_every_file(tmp_path):
    path = listed_checkpoint(tmp_path)
    (path / "README.md").write_text("mine")  # what is added later does no harm
    assert is_whole(path) and not (path / INCOMPLETE).exists()
    manifest = json.loads((path / MANIFEST).read_text())
    assert manifest["step"] == 1 and manifest["versions"]["torch"]
    present = {file.name for file in path.iterdir()} - {MANIFEST, "README.md"}
    assert manifest["files"].keys() == present
    assert manifest["files"]["optimizer.pt"]["bytes"] == (path / "optimizer.pt").stat().st_size


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    return listed_checkpoint(tmp_path_factory.mktemp("listed"))


@settings(deadline=None)
@given(
    st.sampled_from(["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]),
    st.floats(0, 1, exclude_max=True),
    st.sampled_from(["cut", "changed"]),
)
def test_a_small_file_cut_or_changed_anywhere_is_seen(listed, name, share, how):
    whole = (listed / name).read_bytes()
    place = int(share * len(whole))
    rest = b"" if how == "cut" else bytes([whole[place] ^ 1]) + whole[place + 1 :]
    (listed / name).write_bytes(whole[:place] + rest)
    assert damage(listed)
    (listed / name).write_bytes(whole)
    assert is_whole(listed)


def test_the_end_of_a_zip_of_several_disks_is_torn(tmp_path):
    """Python's zipfile raises on such bytes instead of saying no."""
    path = checkpoint(tmp_path, 1)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 1, 0, 2)
    (path / "optimizer.pt").write_bytes(locator + b"PK\x05\x06" + bytes(18))
    assert damage(path) == "optimizer.pt is cut off"


def test_both_ends_of_a_large_file_are_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "EDGE_BYTES", 100)
    path = checkpoint(tmp_path, 1)
    (path / "large").write_bytes(bytes(1000))
    write_manifest(path, step=1)
    for place, seen in ((0, True), (99, True), (500, False), (900, True), (999, True)):
        content = bytearray(1000)
        content[place] = 1
        (path / "large").write_bytes(content)
        assert is_whole(path) is not seen, place


def test_a_missing_file_is_named(tmp_path):
    path = listed_checkpoint(tmp_path)
    (path / "scheduler.pt").unlink()
    assert damage(path) == "scheduler.pt is missing"


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret"])
def test_a_manifest_cannot_point_outside(tmp_path, name):
    path = checkpoint(tmp_path, 1)
    (tmp_path / "secret").write_text("x")
    files.write_json(path / MANIFEST, {"files": {name: {"bytes": 1, "crc32": "8cdc1683"}}})
    assert damage(path) == f"{MANIFEST} lists {name}, which is outside of it"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"files": 1}', '{"files": {"optimizer.pt": {}}}'])
def test_a_manifest_that_cannot_be_read_is_torn(tmp_path, text):
    path = checkpoint(tmp_path, 1)
    (path / MANIFEST).write_text(text)
    assert damage(path) == f"{MANIFEST} cannot be read"


def test_a_shard_cannot_be_outside(tmp_path):
    path = checkpoint(tmp_path, 1)
    (tmp_path / "other.safetensors").write_text("x")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    assert damage(path) == "../other.safetensors is missing"


# ---- What training goes on from


def test_true_is_the_last_whole_one(tmp_path):
    listed_checkpoint(tmp_path, 3)
    torn = checkpoint(tmp_path, 6)
    (torn / "optimizer.pt").unlink()
    lines = []
    assert find_checkpoint(True, tmp_path, lines.append) == tmp_path / "checkpoint-3"
    assert lines == [
        f"{torn} is not whole (its optimizer is missing): passed over",
        f"goes on from {tmp_path}/checkpoint-3",
    ]


def test_true_without_a_whole_one_starts_from_the_beginning(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    lines = []
    assert find_checkpoint(True, tmp_path, lines.append) is None
    assert lines[-1] == f"no whole checkpoint in {tmp_path}: starts from the beginning"
    assert find_checkpoint(True, tmp_path / "new") is None
    assert find_checkpoint(None, tmp_path) is None and find_checkpoint(False, tmp_path) is None


def test_a_torn_one_asked_for_by_name_is_refused(tmp_path):
    listed_checkpoint(tmp_path, 3)
    torn = listed_checkpoint(tmp_path, 6)
    assert find_checkpoint(str(torn), tmp_path) == torn
    cut(torn / "trainer_state.json", 5)
    with pytest.raises(InputError) as refused:
        find_checkpoint(str(torn), tmp_path)
    assert str(refused.value) == (
        f"resume_from_checkpoint: training cannot go on from {torn}: trainer_state.json is missing or cut off; "
        f"the last whole one is {tmp_path}/checkpoint-3"
    )


# ---- What is deleted


def test_rotation_deletes_torn_ones_first_and_then_the_oldest(tmp_path):
    for step in (1, 2, 3, 4, 5):
        listed_checkpoint(tmp_path, step)
    mark_incomplete(tmp_path / "checkpoint-5", "of a former run")
    rotate(tmp_path, 3, {tmp_path / "checkpoint-4"})
    assert [path.name for path in numbered(tmp_path)] == ["checkpoint-4", "checkpoint-3", "checkpoint-2"]
    rotate(tmp_path, 1, {tmp_path / "checkpoint-4", tmp_path / "checkpoint-2"})
    assert [path.name for path in numbered(tmp_path)] == ["checkpoint-4", "checkpoint-2"]
    rotate(tmp_path, 5, {tmp_path / "checkpoint-4"})
    assert len(list(tmp_path.iterdir())) == 2


def test_what_is_swept_away(tmp_path):
    gone = [
        ".run.json.4194305.tmp",
        f".run.json.{os.getpid()}.tmp",
        ".selected.4194305.old",
        ".checkpoint-3.deleted",
        "_checkpoint-4.deleted",
        "_aesl/.handoff.4194305.tmp",
        "_aesl/.push-17.4194305.tmp",
        "_aesl/samples/.step-20.jsonl.4194305.tmp",
        "checkpoint-3/.manifest.json.4194305.tmp",
        "logs/.select.log.4194305.tmp",
        "evaluation_samples/grpo-1/.settings.json.4194305.tmp",
    ]
    kept = [f".run.json.{10**12}.tmp", ".training.lock", f".run.json.{os.getppid()}.tmp", "run.json.1.tmp", ".cache"]
    # of other programs, or where we write nothing
    kept += [".notes.deleted", ".cache.4194305.old", ".draft.4194305.tmp", "deep/er/.run.json.4194305.tmp"]
    kept += ["linked/.run.json.4194305.tmp"]
    for name in (*gone, *kept):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "checkpoint-9").symlink_to(tmp_path / "linked")
    sweep(tmp_path)
    assert all((tmp_path / name).exists() for name in kept)
    assert not any((tmp_path / name).exists() for name in gone)


@pytest.mark.slow
def test_checkpoints_that_trainer_writes_are_whole(tiny_model_dir, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    steps = {"max_steps": 2, "save_steps": 1, "logging_steps": 1}
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **steps)
    rows = Dataset.from_list([{"prompt": "a", "completion": "b"}] * 16)
    SFTTrainer(str(tiny_model_dir), args=args, train_dataset=rows).train()
    assert last_whole_checkpoint(tmp_path) == (tmp_path / "checkpoint-2", [])
