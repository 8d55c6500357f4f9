"""DiversityCallback: what it writes and selects, and that the training does not notice it.

Under two processes: test_trainer_processes.py.
"""

import itertools
import json
import math
import multiprocessing
import os
import random
import re
import time
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from datasets import Dataset
from monitored_runs import DIVERSITY, PEAKED, PROMPTS, monitored_trainer, plan
from peft import LoraConfig
from small_draws import ending_model
from small_runs import (
    assistant,
    cpu_settings,
    message_rows,
    prompt_completion_rows,
    small_config,
    steps_of,
    text_rows,
    trained_weights,
    user,
)
from tiny_models import build_model, build_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from aesl_trl import AESLSFTTrainer, DiversityCallback, files
from aesl_trl.diversity.coverage import GAINED, LOST, coverage
from aesl_trl.errors import InputError
from aesl_trl.sampling import generate
from aesl_trl.training import callback


def series(folder):
    rows = files.read_jsonl(folder / files.OWN / files.DIVERSITY)
    return [{key: value for key, value in row.items() if key not in ("seconds", "time_share")} for row in rows]


# ---- The training does not notice


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_training_is_bit_equal_with_and_without(gradient_checkpointing, tokenizer, tmp_path):
    """Dropout and shuffling draw from the global random states, which sampling draws from too."""
    runs = []
    for steps in (0, 1):
        trainer = monitored_trainer(
            tokenizer,
            tmp_path / str(steps),
            model=build_model(tokenizer, attention_dropout=0.3),
            prompts=PROMPTS if steps else None,
            diversity_steps=steps,
            gradient_checkpointing=gradient_checkpointing,
        )
        trainer.train()
        runs.append(trainer)
    assert runs[1].diversity_callback.seconds > 0
    weights = trained_weights(runs[0])
    assert all(torch.equal(weights[name], weight) for name, weight in trained_weights(runs[1]).items())
    figures = [[row for row in run.state.log_history if "loss" in row] for run in runs]
    assert figures[0] == figures[1] and len(figures[0]) == 4
    first, second = (tmp_path / name / files.OWN / files.POSITIONS for name in ("0", "1"))
    assert first.read_text() == second.read_text()


def idle(completions, **kwargs):
    return [0.0] * len(completions)


def reseeds(completions, **kwargs):
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return idle(completions)


def moves_and_forks(completions, **kwargs):
    os.chdir("/")
    os.environ.clear()
    with multiprocessing.get_context("fork").Pool(1) as pool:
        pool.map(abs, [-1])
    return idle(completions)


SECRETS = {"HF_TOKEN": "hf_mine", "WANDB_API_KEY": "wandb-mine", "AWS_SECRET_ACCESS_KEY": "aws-mine"}


def test_a_training_is_the_same_in_an_odd_world(tokenizer, tmp_path, monkeypatch, capfd):
    """Rewards that reseed, move and fork, a clock that runs backwards. No secret of the environment is written."""
    monkeypatch.chdir(tmp_path)  # so that it is put back
    endings = []
    with patch.dict(os.environ, SECRETS):
        for name, reward in {"plain": idle, "clock": idle, "seeds": reseeds, "moves": moves_and_forks}.items():
            with monkeypatch.context() as world:
                if name == "clock":
                    backwards = itertools.count(time.time(), -10_800)
                    world.setattr(time, "time", lambda times=backwards: next(times))
                folder = tmp_path / name
                trainer = monitored_trainer(
                    tokenizer, folder, reward_funcs=[reward], save_strategy="steps", save_steps=2
                )
                trainer.train()
            samples = [path.read_text() for path in sorted((folder / files.OWN / files.SAMPLES).iterdir())]
            endings.append((series(folder), samples, (folder / files.OWN / files.POSITIONS).read_text()))
            endings[-1] += ({key: weight.tolist() for key, weight in trained_weights(trainer).items()},)
    assert all(ending == endings[0] for ending in endings)
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    said = "".join(capfd.readouterr()).encode()
    assert not any(secret.encode() in written + said for secret in SECRETS.values())


# ---- What it writes


def strict_json(line):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(line, parse_constant=refuse)


def test_files_and_logs(tokenizer, tmp_path, capsys):
    trainer = monitored_trainer(
        tokenizer, tmp_path, diversity_max_new_tokens=1, disable_tqdm=False
    )  # one token: no word pair, so no distinct_2
    trainer.train()
    said = "".join(capsys.readouterr())
    line = r"^aesl_trl: step (\d+): entropy \d\.\d\d \[\S+ \S+\], self-BLEU \d\.\d\d$"
    assert re.findall(line, said, re.MULTILINE) == ["0", "2", "4"]
    assert "diversity/" not in said and "'loss'" in said  # Trainer's own logs are printed as ever
    rows = [strict_json(line) for line in (tmp_path / files.OWN / files.DIVERSITY).read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 2, 4]
    for row in rows:
        assert row["num_prompts"] == 3 and row["num_samples"] == 3 and row["max_new_tokens"] == 1
        assert row["temperature"] == 1.0 and row["backend"] == "generate" and row["seconds"] > 0
        assert 0 < row["entropy"] <= math.log(len(tokenizer)) and 0 <= row["self_bleu"] <= 1
        assert row["distinct_4"] is None
        assert "reward" not in row and "pass@1" not in row
    for row in rows:
        samples = files.read_jsonl(tmp_path / files.OWN / files.SAMPLES / f"step-{row['step']}.jsonl")
        assert [sample["prompt"] for sample in samples] == [prompt["prompt"] for prompt in PROMPTS]
        assert [sample["prompt_index"] for sample in samples] == [0, 1, 2]
        assert all(
            len(sample[key]) == 3
            for sample in samples
            for key in ("completions", "num_tokens", "truncated", "entropy", "token_ids")
        )
        assert all(sample["rewards"] is None for sample in samples)
    logged = [row for row in trainer.state.log_history if "diversity/own_entropy" in row]
    assert [(row["step"], row["diversity/own_entropy"]) for row in logged] == [
        (row["step"], row["entropy"]) for row in rows
    ]
    assert "diversity/distinct_4" not in logged[0] and "diversity/step" not in logged[0]
    assert logged[0]["diversity/intervals/own_entropy_low"] == rows[0]["intervals"]["entropy"][0]
    assert all(
        "nll" not in row and "weight_mean" not in row for row in logged
    )  # not handed out with the samples' figures
    assert len(steps_of(trainer, "nll")) == 4


def test_last_step_is_measured_even_off_the_interval(tokenizer, tmp_path):
    monitored_trainer(tokenizer, tmp_path, diversity_steps=3, max_steps=4).train()
    assert [row["step"] for row in series(tmp_path)] == [0, 3, 4]


def rewarding(prompts, completions, answer, **kwargs):
    return [1.0 if len(completion) % 2 else 0.0 for completion in completions]


def test_rewards_are_scored_on_the_same_samples(tokenizer, tmp_path, capsys):
    prompts = [{**row, "answer": "x"} for row in PROMPTS]
    trainer = monitored_trainer(tokenizer, tmp_path, prompts=prompts, reward_funcs=[rewarding], diversity_samples=4)
    trainer.train()
    base = files.read_jsonl(tmp_path / files.OWN / files.SAMPLES / "step-0.jsonl")
    for row in series(tmp_path):
        samples = files.read_jsonl(tmp_path / files.OWN / files.SAMPLES / f"step-{row['step']}.jsonl")
        if row["step"] == 0:
            assert LOST not in row and GAINED not in row
        else:
            pairs = [[sum(side["rewards"], []) for side in pair] for pair in zip(base, samples, strict=True)]
            lost, gained = zip(*(coverage(*pair, 2) for pair in pairs), strict=True)
            assert (row["by_prompt"][LOST], row["by_prompt"][GAINED]) == (list(lost), list(gained))
            assert (row[LOST], row[GAINED]) == pytest.approx((np.mean(lost), np.mean(gained)))
            assert row["intervals"][LOST][0] <= row[LOST] <= row["intervals"][LOST][1]
        rewards = [[float(len(text) % 2)] for sample in samples for text in sample["completions"]]
        assert [reward for sample in samples for reward in sample["rewards"]] == rewards
        assert row["pass@1"] == pytest.approx(np.mean(rewards))
        assert row["groups_all_right"] + row["groups_all_wrong"] + row["groups_mixed"] == pytest.approx(1)
        assert row["pass@1"] <= row["pass@2"] <= row["pass@4"] and "pass@8" not in row
    assert "diversity/pass@4" in trainer.state.log_history[0]
    line = r"^aesl_trl: step 2: entropy \S+ \[.*\], pass@1 \S+, mixed groups \S+$"
    assert re.search(line, capsys.readouterr().out, re.MULTILINE)


def broken_reward(completions, **kwargs):
    raise RuntimeError("no grader here")


def short_reward(completions, **kwargs):
    return [0.0]


@pytest.mark.parametrize(
    ("reward", "error", "message"),
    [
        (broken_reward, InputError, "broken_reward.* raised RuntimeError.*no grader here"),
        (short_reward, InputError, "'short_reward' returned 1 rewards for 9 completions"),
    ],
)
def test_a_failing_reward_ends_the_run_with_its_error(reward, error, message, tokenizer, tmp_path):
    trainer = monitored_trainer(tokenizer, tmp_path, reward_funcs=[reward])
    with pytest.raises(error, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


# ---- Prompts


@pytest.mark.parametrize(
    "prompts",
    [
        ["2+3=", "abc"],
        [user("2+3="), user("abc")],
        [{"prompt": "2+3="}, {"prompt": "abc"}],
        Dataset.from_list([{"prompt": "2+3="}, {"prompt": "abc"}]),
        Dataset.from_list([{"messages": user(text) + assistant("never seen")} for text in ("2+3=", "abc")]),
        Dataset.from_list([{"prompt": "2+3="}, {"prompt": "abc"}]).to_iterable_dataset(),
    ],
    ids=["strings", "messages", "rows", "dataset", "demonstrations", "stream"],
)
def test_forms_of_prompts(prompts, tokenizer, tmp_path):
    callback = monitored_trainer(tokenizer, tmp_path, prompts=prompts).diversity_callback
    texts = [
        row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"] for row in callback.rows
    ]
    assert texts == ["2+3=", "abc"]
    assert all(isinstance(row["prompt"], str) or row["prompt"][-1]["role"] == "user" for row in callback.rows)


def test_prompts_default_to_those_of_the_eval_dataset(tokenizer, tmp_path):
    trainer = monitored_trainer(tokenizer, tmp_path, prompts=None, diversity_num_prompts=2)
    assert [row["prompt"] for row in trainer.diversity_callback.rows] == ["2+2=", "Name a colour: "]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "empty"),
        ([{"question": "2+3="}], "has no prompts"),
        (text_rows(), "has no prompts"),
    ],
    ids=["none", "another_column", "plain_text"],
)
def test_unusable_prompts_are_refused(prompts, message, tokenizer, tmp_path):
    with pytest.raises(InputError, match=f"diversity_prompts.*{message}"):
        monitored_trainer(tokenizer, tmp_path, prompts=prompts)


def test_measuring_without_prompts_is_refused(tokenizer, tmp_path):
    args = small_config(tmp_path, **DIVERSITY)
    with pytest.raises(InputError, match="diversity_steps is 2, but there are no held-out prompts"):
        AESLSFTTrainer(
            build_model(tokenizer), args, train_dataset=prompt_completion_rows(), processing_class=tokenizer
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0, but must be at least 1"),
        ({"num_samples": 1}, "num_samples is 1, but must be at least 2"),
        ({"samples": 2.0}, "num_samples is 2.0, but must be a whole number, at least 2"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"patience": 0}, "patience is 0"),
        ({"temperature": 0.0}, "temperature is 0.0, but must be above 0"),
        ({"metric": "bleu"}, "metric is 'bleu', but must be one of entropy, self_bleu"),
        ({"backend": "sglang"}, "backend is 'sglang'"),
        ({"selection": "latest"}, "selection is 'latest'"),
        ({"best_eval_metric": "accuracy"}, "best_eval_metric is 'accuracy'"),
    ],
)
def test_unusable_settings_are_refused(changes, message, tokenizer, tmp_path):
    trainer = monitored_trainer(tokenizer, tmp_path, diversity_steps=0)
    with pytest.raises(InputError, match=message):
        DiversityCallback(trainer, PROMPTS, **{"steps": 1, **changes})


# ---- Other trainers


def test_plain_sft_trainer(tokenizer, tmp_path):
    runs = []
    for measured in (False, True):
        trainer = SFTTrainer(
            model=build_model(tokenizer, attention_dropout=0.3),
            args=SFTConfig(**cpu_settings(tmp_path / str(measured), max_steps=4)),
            train_dataset=prompt_completion_rows(),
            processing_class=tokenizer,
        )
        if measured:
            trainer.add_callback(
                DiversityCallback(trainer, PROMPTS, steps=2, samples=2, max_new_tokens=4, selection="last")
            )
        trainer.train()
        runs.append(trainer)
    assert [row["step"] for row in series(tmp_path / "True")] == [0, 2, 4]
    assert len(steps_of(runs[1], "diversity/own_entropy")) == 3
    rows = [[row for row in run.state.log_history if "loss" in row] for run in runs]
    assert rows[0] == rows[1]  # TRL's own figures too, which its log hands out once
    weights = trained_weights(runs[0])
    assert all(torch.equal(weights[name], weight) for name, weight in trained_weights(runs[1]).items())
    assert files.read_json(tmp_path / "True" / files.OWN / files.SELECTION)["step"] == 4


@pytest.mark.parametrize("kind", [SFTTrainer, AESLSFTTrainer])
def test_a_base_models_samples_end_with_the_templates_turn(kind, tmp_path):
    """Its files name <|endoftext|> alone; the figures are those of one answer, as in `aesl eval`."""
    base = build_tokenizer()
    base.eos_token = "<|endoftext|>"
    trainer = kind(
        model=ending_model(base, base.convert_tokens_to_ids("<|im_end|>")),
        args=small_config(tmp_path, max_steps=1, learning_rate=0.0, cold_start_loss="nll"),
        train_dataset=message_rows(),
        processing_class=base,
    )
    trainer.add_callback(DiversityCallback(trainer, [user("2+2=")], steps=1, samples=2, max_new_tokens=4))
    trainer.train()
    assert [(row["truncated"], row["length"]) for row in series(tmp_path)] == [(0, 1), (0, 1)]
    if kind is AESLSFTTrainer:
        assert steps_of(trainer, "prob_eos") and steps_of(trainer, "weight_eos")


def test_without_a_rule_nothing_is_saved(tokenizer, tmp_path):
    trainer = monitored_trainer(tokenizer, tmp_path, diversity_steps=0)
    trainer.add_callback(DiversityCallback(trainer, PROMPTS, steps=2, samples=2, max_new_tokens=4))
    trainer.train()
    assert len(series(tmp_path)) == 3
    own = tmp_path / files.OWN
    assert not (own / files.CANDIDATES).exists() and not (own / files.SELECTION).exists()


def test_lora(tokenizer, tmp_path, tiny_model_dir):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    trainer = monitored_trainer(tokenizer, tmp_path, model=model, peft_config=lora, selection="last")
    trainer.train()
    assert [row["step"] for row in series(tmp_path)] == [0, 2, 4]
    selected = tmp_path / files.OWN / files.SELECTED
    assert (selected / "adapter_config.json").exists() and not (selected / "model.safetensors").exists()
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), selected)
    state = {name: value for name, value in trainer.model.state_dict().items() if "lora" in name}
    assert state and all(torch.equal(loaded.state_dict()[name], value) for name, value in state.items())


# ---- Turning point, candidates, selection


def test_stops_once_the_fall_is_confirmed(tokenizer, tmp_path, monkeypatch):
    plan(monkeypatch, PEAKED)
    trainer = monitored_trainer(
        tokenizer, tmp_path, diversity_steps=1, max_steps=10, stop_at_turning_point=True, selection="turning_point"
    )
    trainer.train()
    assert trainer.diversity_callback.stopped and trainer.state.global_step == 7  # patience 3 after the peak at 4
    chosen = files.read_json(tmp_path / files.OWN / files.SELECTION)
    assert chosen["step"] == 4 and chosen["applied"] == "turning_point" and chosen["path"] == files.SELECTED
    assert series(tmp_path)[0]["distinct_1"] is None


def test_goes_on_without_stop(tokenizer, tmp_path, monkeypatch):
    plan(monkeypatch, PEAKED)
    trainer = monitored_trainer(tokenizer, tmp_path, diversity_steps=1, max_steps=10, cold_start_loss="nll")
    trainer.train()
    assert not trainer.diversity_callback.stopped and trainer.state.global_step == 10
    chosen = files.read_json(tmp_path / files.OWN / files.SELECTION)  # the default rule for nll
    assert (chosen["rule"], chosen["step"]) == ("turning_point", 4)


def test_by_readiness_the_selection_is_left_to_the_probe(tokenizer, tmp_path, capsys):
    files.write_json(tmp_path / files.OWN / files.READINESS, {"checkpoints": []})  # a former run's, in the same folder
    monitored_trainer(tokenizer, tmp_path, selection="readiness").train()
    own = tmp_path / files.OWN
    assert not (own / files.SELECTION).exists() and not (own / files.READINESS).exists()
    assert {path.name for path in (tmp_path / files.OWN / files.CANDIDATES).iterdir()} == {"step-2", "step-4"}
    assert f"aesl probe {tmp_path} --config FILE, then aesl select {tmp_path}" in capsys.readouterr().out


def test_selected_weights_load_and_are_those_of_their_step(tokenizer, tmp_path):
    trainer = monitored_trainer(tokenizer, tmp_path, selection="last")
    trainer.train()
    chosen = files.read_json(tmp_path / files.OWN / files.SELECTION)
    assert chosen["step"] == 4 and chosen["rule"] == chosen["applied"] == "last" and chosen["candidates"] == [2, 4]
    selected = tmp_path / files.OWN / chosen["path"]
    loaded = AutoModelForCausalLM.from_pretrained(selected)
    assert all(torch.equal(weight, trained_weights(trainer)[name]) for name, weight in loaded.named_parameters())
    assert AutoTokenizer.from_pretrained(selected).chat_template == tokenizer.chat_template
    names = {path.name for path in selected.iterdir()}
    assert not names & {"training_args.bin", "optimizer.pt", "scheduler.pt"}
    trainer.create_model_card()
    assert "selected step: 4" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_new_run_forgets_the_old_one(tokenizer, tmp_path):
    """Else a candidate of the old run could be selected, or crowd out those of the new one."""
    monitored_trainer(tokenizer, tmp_path, max_steps=6, diversity_steps=3).train()
    (tmp_path / files.OWN / files.CANDIDATES / ".step-5.tmp").mkdir()
    monitored_trainer(tokenizer, tmp_path, max_steps=4).train()
    own = tmp_path / files.OWN
    assert sorted(path.name for path in (own / files.CANDIDATES).iterdir()) == ["step-2", "step-4"]
    assert sorted(path.name for path in (own / files.SAMPLES).iterdir()) == [f"step-{n}.jsonl" for n in (0, 2, 4)]
    assert files.read_json(own / files.SELECTION)["candidates"] == [2, 4]


def as_by_an_older_version(folder):
    """Move what a training keeps in its own part to where version 0.1.0 kept it; its trainer took no lock."""
    (folder / files.OWN / files.TRAINING_LOCK).unlink()
    for path in (folder / files.OWN).iterdir():
        path.rename(folder / path.name)
    (folder / files.OWN).rmdir()


def test_a_run_of_an_older_version_goes_on_where_it_lies(tokenizer, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    monitored_trainer(tokenizer, tmp_path, max_steps=2, **settings).train()
    as_by_an_older_version(tmp_path)
    monitored_trainer(tokenizer, tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [row["step"] for row in files.read_jsonl(tmp_path / files.DIVERSITY)] == [0, 2, 4]
    assert files.read_json(tmp_path / files.SELECTION)["candidates"] == [2, 4] and (tmp_path / files.SELECTED).is_dir()
    assert [path.name for path in (tmp_path / files.OWN).iterdir()] == [files.TRAINING_LOCK]


@pytest.mark.parametrize("steps", [2, 0])
def test_a_new_run_in_an_older_versions_folder_leaves_nothing_to_be_pushed(steps, tokenizer, tmp_path):
    """Nor what a training without measurements would find of it: a candidate that is not its own."""
    monitored_trainer(tokenizer, tmp_path).train()
    as_by_an_older_version(tmp_path)
    monitored_trainer(tokenizer, tmp_path, diversity_steps=steps, max_steps=2).train()
    assert [path.name for path in tmp_path.iterdir()] == [files.OWN]
    run = files.RunFolder(tmp_path)
    assert [row["step"] for row in run.rows(files.DIVERSITY)] == ([0, 2] if steps else [])
    assert list(run.sample_files) == ([0, 2] if steps else [])
    assert (run.own / files.SELECTED).exists() == bool(steps)
    assert [path.name for path in run.candidates_folder.glob("*")] == (["step-2"] if steps else [])


def test_resumed_series_is_that_of_an_uninterrupted_run(tokenizer, tmp_path):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    settings |= {"prompts": [{**row, "answer": "x"} for row in PROMPTS], "reward_funcs": [rewarding]}
    model = {"attention_dropout": 0.3}
    whole = monitored_trainer(tokenizer, tmp_path, model=build_model(tokenizer, **model), **settings)
    whole.train()
    before, chosen = series(tmp_path), files.read_json(tmp_path / files.OWN / files.SELECTION)
    samples = {path.name: path.read_text() for path in (tmp_path / files.OWN / files.SAMPLES).iterdir()}
    resumed = monitored_trainer(tokenizer, tmp_path, model=build_model(tokenizer, **model), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert series(tmp_path) == before and [row["step"] for row in before] == [0, 2, 4, 6]
    assert all(LOST in row and GAINED in row for row in before[1:])
    assert {path.name: path.read_text() for path in (tmp_path / files.OWN / files.SAMPLES).iterdir()} == samples
    assert all(torch.equal(trained_weights(whole)[name], weight) for name, weight in trained_weights(resumed).items())
    again = files.read_json(tmp_path / files.OWN / files.SELECTION)
    for one in (chosen, again):
        for name in ("seconds", "time_share"):
            one["evidence"]["measured"].pop(name)
    assert again == chosen


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ({"stage": 3}, True),
        ({"stage": 3, "stage3_gather_16bit_weights_on_model_save": False}, True),
        ({"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}, False),
        ({"stage": 2}, False),
    ],
)
def test_candidates_in_partitions_are_refused(tmp_path, settings, refused):
    trainer = AESLSFTTrainer(
        model=build_model(build_tokenizer()),
        args=small_config(tmp_path),
        train_dataset=prompt_completion_rows(),
        processing_class=build_tokenizer(),
    )
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": settings})
    with patch.object(type(trainer.accelerator.state), "deepspeed_plugin", plugin):
        DiversityCallback(trainer, ["2+2="], steps=1)
        if refused:
            with pytest.raises(InputError, match="stage3_gather_16bit_weights_on_model_save"):
                DiversityCallback(trainer, ["2+2="], steps=1, selection="last")
        else:
            DiversityCallback(trainer, ["2+2="], steps=1, selection="last")


# ---- What a measurement costs, and what happens when it cannot be taken


def test_a_budget_makes_the_measurement_smaller_and_says_so(tokenizer, tmp_path, capsys):
    settings = {"diversity_num_prompts": 3, "diversity_max_new_tokens": 300, "diversity_token_budget": 2304}
    monitored_trainer(tokenizer, tmp_path, max_steps=1, diversity_steps=1, **settings).train()
    out = capsys.readouterr().out
    asked, size = "3 prompts x 3 samples x 300 tokens", "3 prompts x 3 samples x 256 tokens"
    assert out.count(f"{asked} exceed the budget of 2304 completion tokens a measurement: measuring {size}") == 1
    assert out.count("diversity samples come from generate (auto: ") == 1
    for row in series(tmp_path):
        assert (row["num_prompts"], row["num_samples"], row["max_new_tokens"]) == (3, 3, 256)
        assert row["token_budget"] == 2304
        assert row["asked"] == {"num_prompts": 3, "num_samples": 3, "max_new_tokens": 300}


@pytest.mark.parametrize(("budget", "read"), [(None, 32_768), (2304, 32_768), (50_000, 50_000), (0, 131_072)])
def test_prompts_count_in_the_budget(budget, read, tokenizer, tmp_path):
    trainer = monitored_trainer(tokenizer, tmp_path, diversity_token_budget=budget)
    assert trainer.diversity_callback.measurement.engine.prompt_tokens == read


def test_a_prompt_beyond_any_length_is_one_line(tokenizer, tmp_path):
    with pytest.raises(InputError, match=r"^diversity_prompts: the prompt of row 1 .* 200000 tokens, and at most"):
        monitored_trainer(tokenizer, tmp_path, prompts=["2+3=", "9" * 200_000])


def test_share_of_the_time_is_logged_and_printed(tokenizer, tmp_path, capsys):
    trainer = monitored_trainer(tokenizer, tmp_path)
    trainer.train()
    rows = files.read_jsonl(tmp_path / files.OWN / files.DIVERSITY)
    assert all(0 < row["seconds"] and 0 < row["time_share"] <= 1 for row in rows)
    assert steps_of(trainer, "diversity/time_share") == [row["time_share"] for row in rows]
    assert "diversity_time_share" in capsys.readouterr().out


@pytest.mark.parametrize(("share", "expected"), [(0.5, 190), (0.1, 22), (0.2, 48)])
def test_the_interval_that_would_cost_less(share, expected):
    """With it a measurement of the same length takes 5%: share / (1 - share) of an interval, now spread wider."""
    line = callback._cost(share, 10, last_step=1000)
    assert line == (
        f"aesl_trl: diversity monitoring takes {share:.0%} of the time so far; diversity_steps {expected} would make "
        "it 5%"
    )
    measurement, step = share, (1 - share) / 10
    assert measurement / (measurement + expected * step) <= 0.05
    assert measurement / (measurement + (expected - 1) * step) > 0.05
    short = callback._cost(share, 10, last_step=expected)  # no interval of a training so short would do
    assert short.endswith(
        f"of the time so far; in {expected} steps only a smaller diversity_token_budget makes it less"
    )


def test_rows_say_how_they_were_measured(tokenizer, tmp_path):
    monitored_trainer(tokenizer, tmp_path, reward_funcs=[lambda completions, **_: [1.0] * len(completions)]).train()
    rows = series(tmp_path)
    for row in rows:
        assert row["entropy_estimator"] == "exact" and row["batch_size"] == 128 and "gap" not in row
        assert len(row["by_prompt"]["entropy"]) == len(row["by_prompt"]["pass@1"]) == 3
        low, high = row["intervals"]["entropy"]
        assert low <= row["entropy"] <= high
        assert 0 < row["eos_prob"] < 1 and row["entropy_sampled"] > 0
    assert "bleu_to_base" not in rows[0] and all(0 <= row["bleu_to_base"] <= 1 for row in rows[1:])
    samples = files.read_jsonl(tmp_path / files.OWN / files.SAMPLES / "step-2.jsonl")
    assert all(len(sample[key]) == 3 for sample in samples for key in ("neg_log_prob", "eos_prob"))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), ConnectionError("gone")])
def test_a_measurement_that_fails_is_a_gap_and_the_training_is_the_same(
    error, tokenizer, tmp_path, monkeypatch, capsys
):
    plain = monitored_trainer(tokenizer, tmp_path / "plain", diversity_steps=0, prompts=None)
    plain.train()
    capsys.readouterr()

    def fail(*args):
        raise error

    monkeypatch.setattr(generate, "_generate", fail)
    measured = monitored_trainer(tokenizer, tmp_path / "gaps", selection="turning_point")
    measured.train()
    weights = trained_weights(plain)
    assert all(torch.equal(weights[name], weight) for name, weight in trained_weights(measured).items())
    rows = series(tmp_path / "gaps")
    reason = f"{type(error).__name__}: {error}"
    assert [(row["step"], row["gap"], row["entropy"], row["self_bleu"]) for row in rows] == [
        (step, reason, None, None) for step in (0, 2, 4)
    ]
    out, err = capsys.readouterr()
    assert all(out.count(f"step {step} is a gap in diversity.jsonl: {reason}\n") == 1 for step in (0, 2, 4))
    assert (
        f"aesl probe {tmp_path / 'gaps'} --config FILE, then aesl select {tmp_path / 'gaps'} --rule readiness" in err
    )
    chosen = files.read_json(tmp_path / "gaps" / files.OWN / files.SELECTION)  # undetermined: the last one
    assert (chosen["applied"], chosen["step"]) == ("last", 4)
    assert not (tmp_path / "gaps" / files.OWN / files.SAMPLES).exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"diversity_samples": 4}, "num_samples is 3 at step 0 and 4 at step 2"),
        ({"diversity_max_new_tokens": 7}, "max_new_tokens is 6 at step 0 and 7 at step 2"),
        ({"diversity_temperature": 0.5}, "temperature is 1.0 at step 0 and 0.5 at step 2"),
        ({"prompts": PROMPTS[:2]}, "num_prompts is 3 at step 0 and 2 at step 2"),
    ],
)
def test_resuming_with_other_settings_is_refused(changes, message, tokenizer, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    monitored_trainer(tokenizer, tmp_path, max_steps=2, **settings).train()
    before = (tmp_path / files.OWN / files.DIVERSITY).read_text()
    resumed = monitored_trainer(tokenizer, tmp_path, **{**settings, **changes})
    with pytest.raises(InputError, match=message):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert (tmp_path / files.OWN / files.DIVERSITY).read_text() == before
