"""A model without weights, and how its config is read."""

import torch
from trl import SFTConfig

from aesl_trl.models.skeleton import access_of, skeleton


def test_a_skeleton_has_names_and_no_weights(tiny_model_dir):
    state = torch.get_rng_state()
    network = skeleton(tiny_model_dir)
    assert all(parameter.is_meta for parameter in network.parameters())
    assert "model.layers.1.self_attn.q_proj" in dict(network.named_modules())
    assert torch.equal(state, torch.get_rng_state())


def test_the_users_keywords_for_loading_come_first(tmp_path):
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    assert access_of(SFTConfig(**settings)) == {"revision": "main", "trust_remote_code": False}
    given = {"revision": "v1", "trust_remote_code": True, "cache_dir": "cache"}
    args = SFTConfig(**settings, model_init_kwargs={**given, "dtype": "float32"})
    assert access_of(args) == given
