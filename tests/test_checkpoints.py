"""Which checkpoints are whole, and which are torn."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_chains import checkpoint, cut

from aesl_trl.checkpoints import is_whole, last_whole_checkpoint


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


@pytest.mark.slow
def test_checkpoints_that_trainer_writes_are_whole(tiny_model_dir, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    steps = {"max_steps": 2, "save_steps": 1, "logging_steps": 1}
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **steps)
    rows = Dataset.from_list([{"prompt": "a", "completion": "b"}] * 16)
    SFTTrainer(str(tiny_model_dir), args=args, train_dataset=rows).train()
    assert last_whole_checkpoint(tmp_path) == (tmp_path / "checkpoint-2", [])
