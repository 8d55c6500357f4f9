"""Hashes of weights and tokenizers: the same wherever they lie, others for other contents."""

import shutil

import torch
from tiny_models import build_model
from transformers import AutoModelForCausalLM

from aesl_trl.models.digests import tokenizer_digest, weights_digest


def test_copies_and_dtypes_are_the_same_weights(tiny_model_dir, tmp_path):
    shutil.copytree(tiny_model_dir, tmp_path / "copy")
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half", max_shard_size="4KB")
    assert len(list((tmp_path / "half").glob("*.safetensors"))) > 1
    digests = {weights_digest(str(folder)) for folder in (tiny_model_dir, tmp_path / "copy", tmp_path / "half")}
    assert len(digests) == 1 and None not in digests


def test_other_weights_of_the_same_shape(tiny_model_dir, tmp_path, tokenizer):
    build_model(tokenizer, seed=7).save_pretrained(tmp_path)
    assert weights_digest(str(tmp_path)) != weights_digest(tiny_model_dir)


def test_another_template_is_another_tokenizer(tiny_model_dir, tmp_path):
    shutil.copytree(tiny_model_dir, tmp_path / "copy")
    assert tokenizer_digest(str(tmp_path / "copy")) == tokenizer_digest(tiny_model_dir)
    (tmp_path / "copy/chat_template.jinja").write_text("{{ messages }}")
    assert tokenizer_digest(str(tmp_path / "copy")) != tokenizer_digest(tiny_model_dir)
    assert weights_digest(str(tmp_path / "copy")) == weights_digest(tiny_model_dir)


def test_what_is_not_on_this_disk_has_no_hash(tmp_path):
    assert weights_digest(str(tmp_path)) is None and tokenizer_digest(str(tmp_path)) is None
    assert weights_digest("nobody/no-such-model") is None and tokenizer_digest("../nowhere") is None
