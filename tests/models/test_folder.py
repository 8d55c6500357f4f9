"""A model's folder: where its parts lie, which weights they are, and whether they are whole."""

import builtins
import json
import os
import shutil

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from aesl_trl.errors import InputError
from aesl_trl.files import write_text
from aesl_trl.models.folder import ModelFolder, base_of, check_weights, first_difference, open_tensors


def write_adapter(folder, base, *files):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": base}))
    save_file({"w.lora_A.weight": torch.zeros(2, 2)}, folder / "adapter_model.safetensors")
    for name in files:
        (folder / name).write_text("{}")
    return str(folder)


def test_full_weights_have_all_beside_them(tmp_path):
    for name in (str(tmp_path), "org/on-the-hub"):
        found = ModelFolder.find(name)
        assert (found.weights, found.base, found.is_adapter, found.is_quantized) == (name, None, False, False)
        assert {found.config_at, found.tokenizer_at, found.generation_config_at} == {name}


def test_an_adapter_has_what_lies_beside_it_and_the_rest_from_its_base(tmp_path):
    bare = ModelFolder.find(write_adapter(tmp_path / "bare", "org/base"))
    assert (bare.is_adapter, bare.base, bare.config_at) == (True, "org/base", "org/base")
    assert bare.tokenizer_at == bare.generation_config_at == "org/base"
    path = write_adapter(tmp_path / "own", "org/base", "tokenizer_config.json", "generation_config.json")
    own = ModelFolder.find(path)
    assert own.tokenizer_at == own.generation_config_at == path and own.config_at == "org/base"
    assert ModelFolder("org/adapter", "org/base").tokenizer_at == "org/base"  # an adapter on the hub


def test_an_adapter_on_quantized_weights_is_quantized(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"quantization_config": {"load_in_4bit": True}}))
    assert ModelFolder(str(base)).is_quantized
    assert ModelFolder.find(write_adapter(tmp_path / "adapter", str(base))).is_quantized


def test_a_base_that_is_gone_is_refused(tmp_path):
    path = write_adapter(tmp_path / "adapter", str(tmp_path / "gone"))
    with pytest.raises(InputError, match="^start: the base of .*adapter is .*gone, which is not there: put it there"):
        ModelFolder.find(path, "start")
    with pytest.raises(InputError, match="does not name its base: add base_model_name_or_path"):
        base_of(write_adapter(tmp_path / "nameless", None), "start")


def test_an_adapter_is_another_on_another_base(tmp_path):
    path = write_adapter(tmp_path / "adapter", "org/base")
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    one, other = (ModelFolder(path, str(tmp_path / name)).identity() for name in ("one", "other"))
    assert one["files"] == other["files"] and one != other


def test_a_name_on_the_hub_is_told_by_the_commit_of_its_revision(tmp_path, monkeypatch):
    """The cache is as huggingface_hub lays it out. The model brings code of its own, which nobody is asked about."""
    cache = tmp_path / "models--org--base"
    commits = {"main": "a" * 40, "v1": "b" * 40}
    for revision, commit in commits.items():
        write_text(cache / "refs" / revision, commit)
        write_text(cache / "snapshots" / commit / "config.json", '{"auto_map": {"AutoConfig": "own.Config"}}')
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("asked"))
    found = ModelFolder.find("org/base")
    assert found.identity() == {"name": "org/base", "commit": commits["main"]}
    assert found.identity("v1") == {"name": "org/base", "commit": commits["v1"]}
    adapter = ModelFolder.find(write_adapter(tmp_path / "adapter", "org/base"))
    assert adapter.identity("v1")["base"] == found.identity("v1")


# ---- Weight files


def test_weights_that_are_cut_off_are_refused(tmp_path, tiny_model_dir):
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    check_weights(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    for length in (weights.stat().st_size - 1, 20, 0):
        os.truncate(weights, length)
        with pytest.raises(
            InputError, match="model.safetensors is cut off or no weights .*: download or copy it again"
        ):
            check_weights(tmp_path / "model")
    weights.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match="is a pointer of git-lfs, not the file itself: run git lfs pull"):
        check_weights(tmp_path / "model")
    weights.unlink()
    with pytest.raises(InputError, match="holds no weights, only their config"):
        check_weights(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "1-of-2"}}))
    with pytest.raises(InputError, match="lacks 1-of-2, one of 1 weight files"):
        check_weights(tmp_path / "model")


TENSORS = {"matrix": torch.arange(12.0).reshape(6, 2), "scale": torch.tensor(3.0), "vector": torch.arange(5.0)}


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, None),
        ({"matrix": TENSORS["matrix"].bfloat16()}, None),  # a copy in another dtype
        ({"vector": torch.tensor([0.0, 1, 2, 3, 9])}, "vector"),
        ({"scale": torch.tensor(4.0)}, "scale"),
        ({"matrix": torch.zeros(6, 3)}, "matrix"),
        ({"matrix": TENSORS["matrix"] + 1}, "matrix"),
        ({"bias": torch.zeros(1)}, "bias"),
    ],
)
def test_the_first_tensor_that_differs(tmp_path, changes, found):
    for name, tensors in (("one", TENSORS), ("other", {**TENSORS, **changes})):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    assert first_difference(tmp_path / "one", tmp_path / "other") == found
    assert torch.equal(open_tensors(tmp_path / "one")["matrix"][1:3], TENSORS["matrix"][1:3])
