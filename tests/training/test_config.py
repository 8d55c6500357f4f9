"""AESLSFTConfig: its defaults, its checks, and TRL's own fields beside them."""

from dataclasses import fields, replace

import pytest
from small_runs import cpu_settings, small_config
from transformers import HfArgumentParser
from trl import GRPOConfig, SFTConfig, TrlParser

from aesl_trl import AESLSFTConfig
from aesl_trl.arguments import parse
from aesl_trl.diversity.selection import RULES
from aesl_trl.errors import InputError
from aesl_trl.losses.rules import TOKEN_RULES
from aesl_trl.sampling import backends
from aesl_trl.sampling.backends import VLLMSettings


def test_defaults_are_the_documented_ones(tmp_path):
    config = small_config(tmp_path)
    found = {
        name: getattr(config, name)
        for name in AESLSFTConfig.__dataclass_fields__
        if name not in SFTConfig.__dataclass_fields__
    }
    assert found == {
        "cold_start_loss": "aesl",
        "t_scaling": 3.0,
        "min_temperature": 1e-2,
        "prefix_mode": "inclusive",
        "aesl_weight": "adaptive",
        "weight_threshold": 0.5,
        "gem_beta": 0.7,
        "gem_h": "linear",
        "psft_clip_high": 0.28,
        "psft_refresh_steps": 8,
        "eaft_alpha": 1.0,
        "eaft_top_k": 20,
        "diversity_steps": 0,
        "diversity_num_prompts": 64,
        "diversity_num_samples": 8,
        "diversity_temperature": 1.0,
        "diversity_max_new_tokens": 512,
        "diversity_batch_size": 128,
        "diversity_token_budget": None,
        "diversity_backend": "auto",
        "diversity_vllm_server_base_url": None,
        "diversity_vllm_server_host": None,
        "diversity_vllm_server_port": 8000,
        "diversity_vllm_server_timeout": 240.0,
        "diversity_vllm_group_port": 51216,
        "diversity_vllm_gpu_memory_utilization": 0.3,
        "diversity_vllm_enable_sleep_mode": True,
        "diversity_metric": "entropy",
        "diversity_patience": 3,
        "stop_at_turning_point": False,
        "selection": None,
        "best_eval_metric": "eval_nll",
        "max_candidates": 5,
        "hub_include": [],
        "chat_template_kwargs": None,
        "packing_unverified": False,
        "diversity_samples": None,  # the old name of diversity_num_samples
    }


def test_settings_of_vllm_are_those_of_grpo_with_a_prefix(tmp_path):
    """Their defaults too, but for the host, of which None says that there is no server, and sleeping, which frees the
    memory for the training."""
    ours, theirs = AESLSFTConfig.__dataclass_fields__, GRPOConfig.__dataclass_fields__
    for setting in fields(VLLMSettings):
        default = ours[f"diversity_vllm_{setting.name}"].default
        assert f"vllm_{setting.name}" in theirs and default == setting.default
        if setting.name not in ("server_host", "enable_sleep_mode"):
            assert default == theirs[f"vllm_{setting.name}"].default, setting.name
    config = small_config(tmp_path, diversity_vllm_server_host="gpu-2", diversity_vllm_server_port=1)
    assert config.diversity_vllm == VLLMSettings(server_host="gpu-2", server_port=1)
    assert config.diversity_vllm.server == "http://gpu-2:1"


def test_vllm_is_looked_for_before_a_model_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "is_vllm_available", lambda: False)
    small_config(tmp_path, diversity_backend="vllm_colocate")  # nothing is measured
    with pytest.raises(InputError, match="'vllm_colocate', but vLLM is not installed: pip install 'vllm"):
        small_config(tmp_path, diversity_backend="vllm_colocate", diversity_steps=5)
    with pytest.raises(InputError, match="diversity_vllm_server_base_url is 'http://a:1', but vLLM is not installed"):
        small_config(tmp_path, diversity_vllm_server_base_url="http://a:1", diversity_steps=5)


def test_fields_of_trl_keep_their_defaults(tmp_path):
    ours, theirs = small_config(tmp_path), SFTConfig(**cpu_settings(tmp_path))
    for name, field in SFTConfig.__dataclass_fields__.items():
        if field.init:
            assert getattr(ours, name) == getattr(theirs, name), name


def test_every_added_field_has_help_that_argparse_takes(tmp_path, capsys):
    with pytest.raises(SystemExit):
        HfArgumentParser(AESLSFTConfig).parse_args_into_dataclasses(["--help"])
    shown = capsys.readouterr().out
    for name, field in AESLSFTConfig.__dataclass_fields__.items():
        if name not in (*SFTConfig.__dataclass_fields__, "diversity_samples"):
            assert field.metadata["help"] and f"--{name}" in shown
    assert "--diversity_samples" not in shown


def test_the_old_name_of_a_setting_is_read_without_a_warning(tmp_path, recwarn):
    config = small_config(tmp_path, diversity_samples=4)
    assert config.diversity_num_samples == config.measurement.num_samples == 4
    assert not [warning for warning in recwarn if "samples" in str(warning.message)]
    assert replace(config, diversity_num_samples=2).diversity_num_samples == 2
    (parsed,) = HfArgumentParser(AESLSFTConfig).parse_args_into_dataclasses(
        ["--diversity_samples", "3", "--use_cpu", "--bf16", "false"]
    )
    assert parsed.diversity_num_samples == 3


@pytest.mark.parametrize("loss", TOKEN_RULES)
def test_the_turning_point_is_selected_whatever_the_loss(loss, tmp_path):
    assert small_config(tmp_path, cold_start_loss=loss).selection_rule == "turning_point"
    for selection in RULES:
        chosen = small_config(tmp_path, cold_start_loss=loss, selection=selection, diversity_steps=5)
        assert chosen.selection_rule == selection


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"cold_start_loss": "aesll"},
            "cold_start_loss is 'aesll', but must be one of aesl, nll, dft, gem, psft, eaft; did you mean 'aesl'?",
        ),
        ({"cold_start_loss": "sed"}, "cold_start_loss is 'sed', but must be one of aesl, nll"),
        ({"aesl_weight": "linaer"}, "aesl_weight is 'linaer', .* did you mean 'linear'?"),
        ({"gem_h": "sigmoidal", "cold_start_loss": "gem"}, "gem_h is 'sigmoidal', .* did you mean 'sigmoid'?"),
        ({"gem_beta": 1.5, "cold_start_loss": "gem"}, "gem_beta is 1.5, but must be above 0 and at most 1"),
        ({"gem_beta": 0, "cold_start_loss": "gem"}, "gem_beta is 0, but must be above 0 and at most 1"),
        (
            {"weight_threshold": 1.0, "aesl_weight": "threshold"},
            "weight_threshold is 1.0, but must be above 0 and below 1",
        ),
        ({"psft_clip_high": -0.1, "cold_start_loss": "psft"}, "psft_clip_high is -0.1, but must be above 0"),
        ({"psft_refresh_steps": 0, "cold_start_loss": "psft"}, "psft_refresh_steps is 0, but must be at least 1"),
        ({"eaft_alpha": 0, "cold_start_loss": "eaft"}, "eaft_alpha is 0, but must be above 0"),
        ({"eaft_top_k": 1, "cold_start_loss": "eaft"}, "eaft_top_k is 1, but must be at least 2"),
        ({"gem_beta": 0.5}, "gem_beta is 0.5, but cold_start_loss is 'aesl', which does not read it: set .* 'gem'"),
        (
            {"t_scaling": 2.0, "cold_start_loss": "nll"},
            "t_scaling is 2.0, but cold_start_loss is 'nll', .* leave t_scaling at 3.0",
        ),
        ({"aesl_weight": "linear", "cold_start_loss": "dft"}, "aesl_weight is 'linear', but cold_start_loss is 'dft'"),
        ({"prefix_mode": "none", "aesl_weight": "linear"}, "prefix_mode is 'none', but aesl_weight is 'linear'"),
        ({"weight_threshold": 0.3}, "weight_threshold is 0.3, but aesl_weight is 'adaptive'"),
        ({"weight_threshold": 0.3, "aesl_weight": "linear"}, "weight_threshold is 0.3, but aesl_weight is 'linear'"),
        ({"prefix_mode": "inclusiv"}, "prefix_mode is 'inclusiv', .* did you mean 'inclusive'?"),
        ({"diversity_metric": "bleu"}, "diversity_metric is 'bleu'"),
        ({"diversity_backend": "sglang"}, "diversity_backend is 'sglang'"),
        ({"best_eval_metric": "eval_loss"}, "best_eval_metric is 'eval_loss', .* did you mean 'eval_nll'?"),
        ({"selection": "lst", "diversity_steps": 5}, "selection is 'lst', .* did you mean 'last'?"),
        ({"t_scaling": 0.0}, "t_scaling is 0.0, but must be above 0"),
        ({"t_scaling": -1}, "t_scaling is -1, but must be above 0"),
        ({"t_scaling": float("nan")}, "t_scaling is nan, but must be a finite number, above 0"),
        ({"t_scaling": "high"}, "t_scaling is 'high', but must be a finite number, above 0; auto finds it"),
        ({"t_scaling": "nan"}, "t_scaling is nan, but must be a finite number, above 0"),
        ({"t_scaling": "auto", "prefix_mode": "none"}, "t_scaling is 'auto', but prefix_mode is 'none', .* a number"),
        ({"t_scaling": "auto", "prefix_mode": "exclusive"}, "prefix_mode is 'exclusive', .* 'inclusive'.* a number"),
        ({"t_scaling": "auto", "cold_start_loss": "nll"}, "t_scaling is 'auto', but cold_start_loss is 'nll'"),
        ({"t_scaling": "auto", "aesl_weight": "linear"}, "t_scaling is 'auto', but aesl_weight is 'linear'"),
        ({"t_scaling": None}, "t_scaling is None, but must be a finite number"),
        ({"min_temperature": 0}, "min_temperature is 0, but must be above 0"),
        (
            {"diversity_temperature": float("inf")},
            "diversity_temperature is inf, but must be a finite number, above 0",
        ),
        ({"diversity_steps": -1}, "diversity_steps is -1, but must be at least 0"),
        ({"diversity_steps": 2.5}, "diversity_steps is 2.5, but must be a whole number, at least 0"),
        ({"diversity_steps": True}, "diversity_steps is True, but must be a whole number"),
        ({"diversity_samples": 1}, "diversity_num_samples is 1, but must be at least 2"),
        ({"diversity_num_prompts": 0}, "diversity_num_prompts is 0"),
        ({"diversity_max_new_tokens": 0}, "diversity_max_new_tokens is 0"),
        ({"diversity_batch_size": 0}, "diversity_batch_size is 0"),
        ({"diversity_patience": 0}, "diversity_patience is 0"),
        ({"diversity_token_budget": -1}, "diversity_token_budget is -1, but must be at least 0"),
        ({"diversity_token_budget": 99, "diversity_steps": 5}, "the token budget is 99, .* 16384 or more, or to 0"),
        (
            {"diversity_vllm_gpu_memory_utilization": 1.0},
            "gpu_memory_utilization is 1.0, but must be above 0 and below 1",
        ),
        ({"diversity_vllm_gpu_memory_utilization": 0}, "gpu_memory_utilization is 0, but must be above 0 and below 1"),
        ({"diversity_vllm_server_port": 0}, "diversity_vllm_server_port is 0"),
        ({"max_candidates": 1}, "max_candidates is 1, but must be at least 2"),
        ({"loss_type": "dft"}, "loss_type is 'dft', but the loss is chosen by cold_start_loss"),
        ({"selection": "last"}, "selection needs measurements: set diversity_steps"),
        ({"stop_at_turning_point": True}, "stop_at_turning_point needs measurements: set diversity_steps"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_unusable_values_are_refused_in_one_line(changes, message, tmp_path):
    with pytest.raises(InputError, match=message) as error:
        small_config(tmp_path, **changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("loss", TOKEN_RULES)
def test_whole_numbers_are_taken_for_numbers(loss, tmp_path):
    assert small_config(tmp_path, cold_start_loss=loss, t_scaling=3).t_scaling == 3


@pytest.mark.parametrize("name", ["eval_nll", "nll", "eval_held_out_nll"])
def test_a_lower_nll_is_better(name, tmp_path):
    """Trainer alone takes every metric whose name does not end in "loss" for a score."""
    assert small_config(tmp_path, metric_for_best_model=name).greater_is_better is False
    assert small_config(tmp_path, metric_for_best_model="eval_accuracy").greater_is_better is True


def test_each_field_of_a_loss_is_of_that_one_only():
    fields = [name for row in TOKEN_RULES.values() for name in row.fields]
    assert len(set(fields)) == len(fields) and set(fields) <= AESLSFTConfig.__dataclass_fields__.keys()


def test_t_scaling_is_a_number_or_auto_from_every_parser(tmp_path):
    """YAML 1.1 reads 1e-1 as text, and TrlParser hands on what stands on the command line as text."""
    types, file = [AESLSFTConfig], tmp_path / "config.yaml"
    for written, value in (("auto", "auto"), ("1e-1", 0.1), ("2", 2.0)):
        file.write_text(f"t_scaling: {written}\nuse_cpu: true\nbf16: false\n")
        flags = ["--t_scaling", written, "--use_cpu", "--bf16", "false"]
        for argv in (["--config", str(file)], flags):
            assert parse(types, argv, prog="aesl sft")[0].t_scaling == value
            assert TrlParser(types).parse_args_and_config(argv)[0].t_scaling == value
