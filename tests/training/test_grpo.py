"""The GRPO main: one YAML file in, trained weights and run.json out; an adapter from SFT goes on training."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from adapters import make_adapter
from safetensors.torch import load_file
from small_draws import ending_model
from tiny_models import build_tokenizer

from aesl_trl import grpo
from aesl_trl.arguments import parse
from aesl_trl.errors import Diverged, InputError
from aesl_trl.rewards.grading import SHARED_GRADERS, Grade
from aesl_trl.training import grpo as training_grpo
from aesl_trl.training.grpo import ARGUMENT_TYPES, build_trainer, load_datasets, load_rewards


REWARD = """
def more_vowels(completions, **kwargs):
    return [sum(letter in "aeiou" for letter in text[0]["content"]) / 8 for text in completions]
"""
SETTINGS = {
    "max_steps": 2,
    "learning_rate": 0.01,
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "max_completion_length": 8,
    "save_strategy": "no",
    "logging_steps": 1,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
}


@pytest.fixture
def config(tmp_path, tiny_model_dir):
    """Writes a config with its data and reward beside it; keyword arguments override, None drops a key."""
    rows = [{"prompt": [{"role": "user", "content": f"say {letter}"}]} for letter in "abcdefgh"]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.py").write_text(REWARD)

    def write(**overrides) -> list[str]:
        values = {
            "model_name_or_path": tiny_model_dir,
            "dataset_name": "prompts.jsonl",
            "reward_funcs": ["own.py:more_vowels"],
            "output_dir": "out",
            **SETTINGS,
            **overrides,
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
        return ["--config", str(path)]

    return write


# ---- What ends a sample


@pytest.mark.parametrize("given", [None, {"eos_token_id": [258]}])
def test_samples_of_a_base_model_end_with_the_templates_turn(config, tmp_path, given):
    """Its files name <|endoftext|> alone. GRPOTrainer would let its samples run on to the length limit."""
    tokenizer = build_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    end, eos = map(tokenizer.convert_tokens_to_ids, ("<|im_end|>", "<|endoftext|>"))
    for part in (ending_model(tokenizer, end), tokenizer):
        part.save_pretrained(tmp_path / "base")
    flags = config(model_name_or_path=str(tmp_path / "base"), max_steps=1, generation_kwargs=given)
    script_args, args, model_args = parse(ARGUMENT_TYPES, flags, prog="aesl grpo")
    rewards = load_rewards(script_args)
    trainer = build_trainer(script_args, args, model_args, rewards, *load_datasets(script_args, args, rewards))
    stops = {eos, end, *(given or {}).get("eos_token_id", [])}
    assert set(trainer.eos_token_ids) == stops == set(trainer.model.generation_config.eos_token_id)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["completions/clipped_ratio"] == 0 and log["completions/max_length"] == 1


# ---- Training


@pytest.mark.slow
def test_two_steps_change_the_weights_and_leave_a_record(config, tmp_path, tiny_model_dir):
    grpo.main(config(seed=3))
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (tiny_model_dir, tmp_path / "out"))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    run = json.loads((tmp_path / "out/_aesl/run.json").read_text())
    expected = {
        "stage": "grpo",
        "model": tiny_model_dir,
        "adapter": None,
        "seed": 3,
        "num_processes": 1,
        "max_steps": 2,
    }
    assert expected.items() <= run.items()
    assert {"learning_rate": 0.01, "num_generations": 4, "beta": 0.0}.items() <= run.items()
    assert run["versions"]["trl"].startswith("1.")
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert [row["step"] for row in state["log_history"] if "rewards/more_vowels/mean" in row] == [1, 2]


@pytest.mark.slow
def test_two_processes_on_cpu_are_two(config, tmp_path):
    """`accelerate launch --cpu --num_processes 2` silently runs one process; torchrun with this variable runs two."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "aesl_trl.grpo",
    ]
    result = subprocess.run([*command, *config()], env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads((tmp_path / "out/_aesl/run.json").read_text())["num_processes"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_an_adapter_goes_on_training(config, tmp_path, tiny_model_dir, beta):
    adapter = make_adapter(tiny_model_dir, tmp_path / "adapter")
    (tmp_path / "adapter" / "generation_config.json").write_text('{"eos_token_id": [256, 258]}')
    grpo.main(config(model_name_or_path=None, adapter_name_or_path=adapter, beta=beta))
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"eos_token_id": [256, 258]}
    before, after = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "adapter", tmp_path / "out")
    )
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before if "lora_B" in name)
    # With beta TRL trains against a frozen copy of the adapter; what is handed on is one adapter.
    assert not (tmp_path / "out" / "ref").exists()
    run = json.loads((tmp_path / "out/_aesl/run.json").read_text())
    assert (run["adapter"], run["model"], run["beta"]) == (adapter, tiny_model_dir, beta)


def test_a_training_is_resumed_only_with_what_its_steps_had(config, tmp_path):
    common = {"save_strategy": "steps", "save_steps": 1}
    grpo.main(config(max_steps=1, **common))
    common |= {"max_steps": 2, "resume_from_checkpoint": "true"}
    rows = (tmp_path / "prompts.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "fewer.jsonl").write_text("".join(rows[:-1]))
    (tmp_path / "copy.jsonl").write_text("".join(rows))
    (tmp_path / "own.py").write_text(REWARD + REWARD.replace("more_vowels", "other"))
    for changes, message in (
        ({"dataset_name": "fewer.jsonl"}, "training_data is 7 rows, sha256 .*, it was 8 rows"),
        ({"beta": 0.1}, "beta is 0.1, it was 0.0"),
        ({"reward_funcs": ["own.py:other"]}, r"reward_funcs is \['other'\], it was \['more_vowels'\]"),
        ({"use_peft": True, "lora_target_modules": ["q_proj"]}, "peft is LORA, it was unset"),
    ):
        with pytest.raises(InputError, match=message):
            grpo.main(config(**common, **changes))
    grpo.main(config(**common, dataset_name="copy.jsonl"))
    assert json.loads((tmp_path / "out/_aesl/run.json").read_text())["max_steps"] == 2


@pytest.mark.slow
def test_resuming_an_adapter_with_a_reference_gives_the_uninterrupted_run(config, tmp_path, tiny_model_dir):
    adapter = make_adapter(tiny_model_dir, tmp_path / "adapter")
    common = {"adapter_name_or_path": adapter, "beta": 0.1, "save_strategy": "steps", "save_steps": 1}
    grpo.main(config(output_dir="whole", **common))
    checkpoint = tmp_path / "whole" / "checkpoint-1"
    assert (checkpoint / "ref" / "adapter_model.safetensors").is_file()
    grpo.main(config(output_dir="resumed", resume_from_checkpoint=str(checkpoint), **common))
    whole, resumed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_adapter_is_trainable_and_brings_its_files(config, tmp_path, tiny_model_dir):
    from aesl_trl.arguments import parse

    adapter = make_adapter(tiny_model_dir, tmp_path / "adapter")
    (tmp_path / "adapter" / "generation_config.json").write_text('{"eos_token_id": [256, 258]}')
    script_args, training_args, model_args = parse(ARGUMENT_TYPES, config(adapter_name_or_path=adapter), prog="test")
    train, _ = load_datasets(script_args, training_args, [])
    rewards = load_rewards(script_args)
    trainer = build_trainer(script_args, training_args, model_args, rewards, train)
    trainable = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert trainable and all("lora" in name for name in trainable)
    assert set(trainer.eos_token_ids) == {256, 258}


@pytest.mark.slow
def test_a_signal_is_no_success(config, tmp_path):
    """SIGTERM saves and leaves with 143, with enable_jit_checkpoint too; a chain must not go on to the next stage."""
    arguments = config(max_steps=5000, enable_jit_checkpoint=True)
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "aesl_trl.grpo", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "rewards/more_vowels/mean" in line and len(lines) < 10_000:
            process.send_signal(signal.SIGTERM)
            break
    rest, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, "".join(lines)[-2000:] + rest[-2000:]
    assert "go on with --resume_from_checkpoint true" in rest
    assert not (tmp_path / "out/_aesl/run.json").exists()


# ---- Refusals, before any model loads


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model_name_or_path": None}, "model_name_or_path is missing"),
        ({"model_name_or_path": "/no/such/model"}, "/no/such/model does not exist"),
        ({"reward_funcs": None}, "reward_funcs is missing"),
        ({"reward_funcs": ["acuracy_reward"]}, "did you mean 'accuracy_reward'"),
        ({"reward_funcs": ["accuracy_reward"]}, "needs 'solution'"),
        ({"dataset_name": None}, "dataset_name is missing"),
        ({"num_generations": 3}, r"generation_batch_size \(4\) must be divisible by num_generations \(3\)"),
        ({"learning_rat": 0.1}, "did you mean 'learning_rate'"),
        ({"load_in_4bit": True}, "need the package bitsandbytes"),
    ],
)
def test_a_config_that_cannot_run_is_refused_in_one_line(config, monkeypatch, overrides, message):
    monkeypatch.setattr(training_grpo, "build_trainer", lambda *args: pytest.fail("a model was loaded"))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    with pytest.raises(InputError, match=message) as caught:
        grpo.main(config(**overrides))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ('{"question": "a"}\n', "prompt"),
        ('{"prompt": "a"}\n{"prompt": ""}\n', "row 1"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', "no column 'prompt'"),
    ],
)
def test_prompts_that_cannot_be_used_are_refused(config, tmp_path, monkeypatch, text, message):
    monkeypatch.setattr(training_grpo, "build_trainer", lambda *args: pytest.fail("a model was loaded"))
    arguments = config()
    (tmp_path / "prompts.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        grpo.main(arguments)


def test_an_adapter_in_the_wrong_place_is_refused(config, tmp_path, tiny_model_dir):
    adapter = make_adapter(tiny_model_dir, tmp_path / "adapter")
    with pytest.raises(InputError, match="is an adapter: give it as adapter_name_or_path"):
        grpo.main(config(model_name_or_path=adapter))
    with pytest.raises(InputError, match="drop one of the two"):
        grpo.main(config(adapter_name_or_path=adapter, use_peft=True))
    with pytest.raises(InputError, match="holds no adapter_config.json"):
        grpo.main(config(adapter_name_or_path=tiny_model_dir))


def test_a_gradient_that_is_not_finite_ends_the_training(config, monkeypatch):
    build = build_trainer

    def build_poisoned(*arguments):
        trainer = build(*arguments)
        next(trainer.model.parameters()).register_hook(lambda gradient: gradient * float("nan"))
        return trainer

    monkeypatch.setattr(training_grpo, "build_trainer", build_poisoned)
    with pytest.raises(Diverged, match="step 1: the gradient's norm is nan; stopped before the optimizer's step"):
        grpo.main(config())


@pytest.mark.slow
def test_main_as_a_process_prints_one_line_and_leaves_with_2(config):
    result = subprocess.run(
        [sys.executable, "-m", "aesl_trl.grpo", *config(learning_rat=1.0)], capture_output=True, text=True, timeout=280
    )
    assert result.returncode == 2
    lines = result.stderr.splitlines()
    assert [line for line in lines if line.startswith("aesl grpo: ")] == lines[-1:]


def test_golds_that_no_answer_can_earn_are_refused(config, tmp_path, monkeypatch):
    monkeypatch.setattr(SHARED_GRADERS, "grade", lambda answers, deadline_s: [Grade(0.0)] * len(answers))
    monkeypatch.setattr("aesl_trl.training.grpo.build_trainer", lambda *_: pytest.fail("a model was loaded"))
    rows = [{"prompt": [{"role": "user", "content": f"say {letter}"}], "solution": letter} for letter in "abc"]
    (tmp_path / "golds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=r"dataset_name: 3 of 3 golds .* cannot be earned with math_reward"):
        grpo.main(config(dataset_name="golds.jsonl", reward_funcs=["math_reward"]))
