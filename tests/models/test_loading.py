"""An adapter on its base: its generation config comes along, or the folder is refused."""

import json
from pathlib import Path

import pytest
from adapters import make_adapter

from aesl_trl.errors import InputError
from aesl_trl.models import loading
from aesl_trl.models.loading import load_model, put_adapter


@pytest.mark.parametrize(("content", "eos"), [('{"eos_token_id": [7, 8]}', [7, 8]), (None, 256)])
def test_an_adapter_brings_its_generation_config(tmp_path, tiny_model_dir, content, eos):
    adapter = Path(make_adapter(tiny_model_dir, tmp_path / "adapter"))
    if content is not None:
        (adapter / "generation_config.json").write_text(content)
    model = put_adapter(load_model(tiny_model_dir, device="cpu"), str(adapter), tiny_model_dir)
    assert model.generation_config.eos_token_id == eos
    assert json.loads((Path(tiny_model_dir) / "generation_config.json").read_text())["eos_token_id"] == 256


def test_a_generation_config_that_is_no_json_is_refused(tmp_path, tiny_model_dir):
    adapter = Path(make_adapter(tiny_model_dir, tmp_path / "adapter"))
    (adapter / "generation_config.json").write_text("{")
    with pytest.raises(InputError, match="adapter: generation_config.json cannot be read: ") as caught:
        put_adapter(load_model(tiny_model_dir, device="cpu"), str(adapter), tiny_model_dir)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_serves_where_parts_of_the_processor_are_missing(tiny_model_dir, monkeypatch):
    def unavailable(*args, **kwargs):
        raise ImportError("it requires the Torchvision library")

    monkeypatch.setattr(loading.AutoProcessor, "from_pretrained", unavailable)
    assert loading.load_processing_class(tiny_model_dir)("a")["input_ids"]
    with pytest.raises(InputError, match="Torchvision"):
        loading.load_processing_class(str(Path(tiny_model_dir) / "nowhere"))
