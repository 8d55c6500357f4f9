"""Models measured on the same prompts: pass@k with intervals and diversity, from the same samples."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import build_model, build_tokenizer

from aesl_trl import evaluate
from aesl_trl.diversity import Group
from aesl_trl.errors import InputError


REWARD = """
def starts_high(completions, threshold, **kwargs):
    return [float(text[0]["content"][:1] >= limit) for text, limit in zip(completions, threshold, strict=True)]
"""


@pytest.fixture
def config(tmp_path):
    """Writes eval.yaml with its prompts and reward beside it; keyword arguments override, None drops a key."""
    rows = [{"prompt": [{"role": "user", "content": f"say {text}"}], "threshold": text} for text in "0Aaz!"]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.py").write_text(REWARD)

    def write(**overrides) -> list[str]:
        values = {
            "dataset_name": "problems.jsonl",
            "reward_funcs": ["own.py:starts_high"],
            "num_prompts": 4,
            "samples": 4,
            "max_new_tokens": 6,
            "use_cpu": True,
            "output": str(tmp_path / "out"),
            **overrides,
        }
        path = tmp_path / "eval.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
        return ["--config", str(path)]

    return write


def read(tmp_path) -> dict:
    return json.loads((tmp_path / "out" / "evaluation.json").read_text())


def save_constant_model(folder) -> str:
    """A model that always answers `~`, whatever it is asked: pass@k and diversity are known."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    with torch.no_grad():
        weight = model.model.embed_tokens.weight
        weight[:, 0] = 1.0  # every token carries this direction to the tied head
        weight[tokenizer("~")["input_ids"][0], 0] = 40.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_start_and_final_are_measured_on_the_same_prompts(config, tmp_path, tiny_model_dir):
    final = save_constant_model(tmp_path / "final")
    evaluate.main([*config(), "--start", tiny_model_dir, "--final", final])
    result = read(tmp_path)
    assert list(result["models"]) == ["start", "final"]
    settings = {
        "num_prompts": 4,
        "num_samples": 4,
        "temperature": 1.0,
        "max_new_tokens": 6,
        "seed": 0,
        "num_processes": 1,
    }
    assert settings.items() <= result.items()
    start, final = result["models"].values()
    assert (
        start.keys() == final.keys() >= {"entropy", "self_bleu", "distinct_1", "length", "truncated", "groups_mixed"}
    )
    # "~" is above every threshold: each answer is right, none differs, and resampled problems all agree.
    assert (final["pass@1"], final["pass@4"], final["pass@1_interval"]) == (1.0, 1.0, [1.0, 1.0])
    assert (final["unique"], final["groups_all_right"], final["length"]) == (0.25, 1.0, 6.0)
    assert final["entropy"] < 1e-3 < 5 < start["entropy"] < math.log(259)
    low, high = start["pass@1_interval"]
    assert low <= start["pass@1"] <= high and low < high
    assert start["pass@1"] <= start["pass@2"] <= start["pass@4"] <= 1


def test_models_given_first_keep_their_names_and_the_draw_is_the_seeds(config, tmp_path, tiny_model_dir):
    evaluate.main([tiny_model_dir, *config()])
    one = read(tmp_path)
    evaluate.main([tiny_model_dir, *config()])
    assert read(tmp_path) == one and list(one["models"]) == [tiny_model_dir]
    evaluate.main([tiny_model_dir, *config(seed=1)])
    assert read(tmp_path)["models"] != one["models"]


def test_an_adapter_is_measured_on_its_base(config, tmp_path, tiny_model_dir):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    base.model.norm.weight.data.mul_(20)  # far from uniform, so that the adapter shows
    base.save_pretrained(tmp_path / "base")
    build_tokenizer().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    build_tokenizer().save_pretrained(tmp_path / "merged")
    names = [str(tmp_path / name) for name in ("adapter", "merged", "base")]
    evaluate.main([*names, *config()])
    adapter, merged, base = (read(tmp_path)["models"][name] for name in names)
    assert adapter["entropy"] == pytest.approx(merged["entropy"], rel=1e-3)
    assert abs(adapter["entropy"] - base["entropy"]) > 0.1


@pytest.mark.slow
def test_two_processes_measure_every_prompt_once(config, tmp_path):
    """The constant model's figures are the same on one process, so a prompt lost or doubled would show."""
    model = save_constant_model(tmp_path / "model")
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "-m", "aesl_trl.evaluate", *config(num_prompts=3), "--final", model]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (read(tmp_path)["num_processes"], read(tmp_path)["num_prompts"]) == (2, 3)
    assert read(tmp_path)["models"]["final"]["pass@4"] == 1.0


def test_intervals_are_over_problems():
    """Two problems, one always right and one never: the mean of two resampled problems is 0, 1/2 or 1."""
    groups = [Group("p", ["a"] * 4, [1] * 4, [False] * 4, [0.0] * 4, [[reward]] * 4) for reward in (1.0, 0.0)]
    figures = evaluate.with_intervals(groups, 1.0)
    assert figures["pass@1"] == 0.5 and figures["pass@1_interval"] == [0.0, 1.0]
    assert figures["pass@4_interval"] == [0.0, 1.0]
    # an answer that the reward does not apply to counts for nothing
    groups[0].rewards[0] = [math.nan]
    assert evaluate.with_intervals(groups, 1.0)["pass@1"] == 0.5


@pytest.mark.parametrize(
    ("overrides", "flags", "message"),
    [
        ({}, [], "which model"),
        ({}, ["--final", "/no/such/model"], "final: /no/such/model"),
        ({"dataset_name": None}, ["org/model"], "dataset_name is missing"),
        ({"reward_funcs": None}, ["org/model"], "reward_funcs is missing"),
        ({"reward_funcs": ["accuracy_reward"]}, ["org/model"], "needs 'solution'"),
        ({"samples": 0}, ["org/model"], "samples must be positive, got 0"),
        ({"temperature": 0.0}, ["org/model"], "temperature is 0.0, but must be above 0"),
        ({"num_promts": 4}, ["org/model"], "did you mean 'num_prompts'"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_model_loads(config, monkeypatch, overrides, flags, message):
    monkeypatch.setattr(evaluate, "load", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    with pytest.raises(InputError, match=message) as caught:
        evaluate.main([*flags, *config(**overrides)])
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_model_is_refused(config, tmp_path):
    with pytest.raises(InputError, match="model: .* holds no config.json"):
        evaluate.main([str(tmp_path), *config()])
