"""`t_scaling: auto`, by hand and against plain logits, and the lines on whether AESL acts."""

import re

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from recipe_task import RECIPES, recipe_task
from small_runs import (
    LONG_PAIR,
    PAIRS,
    documents,
    double_model,
    prompt_completion_rows,
    steps_of,
    trained_weights,
    trainer_for,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from aesl_trl import files
from aesl_trl.errors import InputError
from aesl_trl.losses.definition import gold_log_probs
from aesl_trl.losses.rules import psft_rule
from aesl_trl.losses.scoring import TokenScores
from aesl_trl.training import calibration
from aesl_trl.training.calibration import acting_t_scaling
from aesl_trl.training.token_sums import TokenSums


ROWS = prompt_completion_rows([*PAIRS, LONG_PAIR, *PAIRS[:2]])  # 8 rows: 4 steps of 2 an epoch
SEQUENTIAL = {"train_sampling_strategy": "sequential"}


def nlls_of(model, rows):
    """Return the trained tokens' nll of each document, by plain logits."""
    found = []
    for input_ids, labels in rows:
        labels = torch.tensor([labels])[:, 1:]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([input_ids])).logits[:, :-1]
        found.append((-gold_log_probs(logits.double(), labels)[labels != -100]).tolist())
    return found


def nll_learnt(nlls):
    """Take the mean of the prefix's mean nll in a plain loop, each token counted by its nll."""
    total = weighted = 0.0
    for document in nlls:
        for end in range(1, len(document) + 1):
            weighted += document[end - 1] * sum(document[:end]) / end
            total += document[end - 1]
    return weighted / total


@pytest.mark.parametrize(
    ("nlls", "value"),
    [
        ([[2.0, 0.0, 1.0]], 0.9 / (5 / 3)),  # prefix means 2, 1, 1, counted 2, 0 and 1 times
        ([[0.3] * 7, [0.3] * 2], 3.0),  # the paper's regime
        (
            [[5.0] + [0.0] * 9, [0.0] * 4],
            0.18,
        ),  # one token holds all the nll; a plain mean over tokens would give 0.86
        ([[90.0]], 0.1),
        ([[0.01]], 10.0),
        ([[0.0]], 10.0),
    ],
)
def test_the_value_by_hand(nlls, value):
    log_probs = torch.zeros(len(nlls), max(map(len, nlls)), dtype=torch.float64)
    mask = torch.zeros_like(log_probs, dtype=torch.bool)
    for row, document in enumerate(nlls):
        log_probs[row, : len(document)], mask[row, : len(document)] = -torch.tensor(document), True
    ones = mask.double()
    scores = TokenScores(log_probs, mask, ones, mask, ones, None, mask.long(), None)
    assert acting_t_scaling(TokenSums.of_batch(scores, []).nll_learnt) == pytest.approx(value)


def auto(tokenizer, folder, model=None, rows=ROWS, **changes):
    trainer = trainer_for(tokenizer, folder, model or double_model(), rows, t_scaling="auto", **SEQUENTIAL, **changes)
    trainer.train()
    return trainer


# ---- The value


@pytest.mark.parametrize(
    "changes",
    [
        {"max_steps": 12},
        {"max_steps": 3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
        {"max_steps": 3, "padding_free": True, "max_length": None},
        {"max_steps": 3, "packing": True, "max_length": 128},
        {"max_steps": 3, "peft_config": LoraConfig(r=2, target_modules="all-linear")},
    ],
    ids=["epoch", "accumulated", "padding_free", "packed", "lora"],
)
def test_the_value_is_that_of_plain_logits_over_the_first_steps(changes, tokenizer, tmp_path, capsys):
    model = double_model()
    trainer = auto(tokenizer, tmp_path, **changes)
    assert trainer._calibration._epoch is trainer._calibration._batches is None  # no data loader outlives the training
    rows = documents(trainer.train_dataset)
    seen = rows if changes["max_steps"] == 12 or "packing" in changes else rows[: 2 * changes["max_steps"]]
    expected = 0.9 / nll_learnt(nlls_of(model, seen))
    assert trainer.t_scaling == pytest.approx(expected, rel=1e-5) and 0.1 < expected < 10
    record = files.read_settings(tmp_path)
    assert record["t_scaling"] == "auto" and record["t_scaling_found"] == trainer.t_scaling
    assert trainer.state.log_history[0]["t_scaling_found"] == trainer.t_scaling
    assert f"aesl_trl: t_scaling auto is {trainer.t_scaling:.3g} (nll_learnt is " in capsys.readouterr().out


def test_a_run_with_the_value_given_is_the_same_bit_for_bit(tokenizer, tmp_path):
    """Neither the order of the batches nor the random state moves: dropout and shuffling are on, and epochs short."""
    settings = {"max_steps": 10, "train_sampling_strategy": "random", "lora_dropout": 0.3}
    trainers = []
    dropout = LoraConfig(r=4, target_modules="all-linear", lora_dropout=settings.pop("lora_dropout"))
    for scale in ("auto", None):
        folder = tmp_path / str(scale)
        scale = scale or trainers[0].t_scaling
        trainer = trainer_for(tokenizer, folder, rows=ROWS, peft_config=dropout, t_scaling=scale, **settings)
        trainer.train()
        trainers.append(trainer)
    one, other = map(trained_weights, trainers)
    assert all(torch.equal(one[name], weight) for name, weight in other.items())
    assert steps_of(trainers[0]) == steps_of(trainers[1])


def test_a_resumed_run_reads_the_value(tokenizer, tmp_path, monkeypatch):
    settings = {"rows": ROWS, "save_strategy": "steps", "save_steps": 2, "max_steps": 5, "t_scaling": "auto"}
    settings |= {"eval_rows": ROWS, "eval_strategy": "steps", "eval_steps": 5}
    whole = trainer_for(tokenizer, tmp_path, **settings)
    whole.train()
    resumed = trainer_for(tokenizer, tmp_path, **settings)
    monkeypatch.setattr(calibration, "score_batch", lambda *_: pytest.fail("scored again"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.t_scaling == whole.t_scaling == files.read_settings(tmp_path)["t_scaling_found"]
    one, other = map(trained_weights, (whole, resumed))
    assert all(torch.equal(one[name], weight) for name, weight in other.items())
    assert steps_of(resumed, "eval_loss") == steps_of(whole, "eval_loss")
    assert files.read_settings(tmp_path)["earlier"] == []


def test_the_loss_is_nll_until_the_value_is_found(tokenizer, tmp_path):
    trainer = trainer_for(tokenizer, tmp_path, double_model(), ROWS, eval_rows=ROWS, t_scaling="auto", max_steps=4)
    before = trainer.evaluate()
    assert before["eval_weight_effective"] == 1.0
    trainer.train()
    assert trainer.evaluate()["eval_weight_effective"] < 1.0


def test_skills_tiny_by_hand(tmp_path):
    """One token holds nearly all of the nll: a plain mean over tokens would never act on it."""
    base = RECIPES / "skills-tiny/base"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    rows = Dataset.from_list(recipe_task("skills-tiny").demonstrations(0))
    trainer = trainer_for(tokenizer, tmp_path, model, rows, per_device_train_batch_size=32, t_scaling="auto")
    trainer.state.max_steps = 400
    batches = trainer._calibration.next_step(iter(trainer.get_train_dataloader()), 1)
    nlls = nlls_of(model.eval(), documents(trainer.train_dataset))
    assert len(list(batches)) == 7  # an epoch
    assert trainer.t_scaling == pytest.approx(0.9 / nll_learnt(nlls), rel=1e-5)
    assert f"{trainer.t_scaling:.2f}" == "0.18"
    assert f"{0.9 * sum(map(len, nlls)) / sum(map(sum, nlls)):.1f}" == "1.4"


# ---- What is said


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"t_scaling": 300.0}, [1]),
        ({"t_scaling": 300.0, "logging_steps": 2}, [2]),
        ({"t_scaling": 300.0, "prefix_mode": "exclusive", "min_temperature": 300.0}, [1]),
        ({"t_scaling": 300.0, "prefix_mode": "none"}, []),
        ({"cold_start_loss": "nll"}, []),
        ({"t_scaling": 0.01}, []),
    ],
    ids=["high", "seldom", "exclusive", "none", "nll", "low"],
)
def test_a_line_says_that_aesl_does_not_act(changes, steps, tokenizer, tmp_path, capsys):
    trainer = trainer_for(tokenizer, tmp_path, double_model(), ROWS, max_steps=4, **changes)
    trainer.train()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("aesl_trl: AESL")]
    begins = "$" if "prefix_mode" in changes else r"; at this nll it begins at t_scaling 0\.\d+$"
    patterns = [f"AESL is not acting yet: weight_effective is 1.00 at step {step}{begins}" for step in steps]
    patterns += [rf"AESL has not acted: this was nll \(weight_effective stayed above 0.95\){begins}"] * len(steps)
    assert len(said) == len(patterns) and all(map(re.search, patterns, said))
    assert files.read_settings(tmp_path)["weight_effective"] == steps_of(trainer, "weight_effective")[-1]


def test_a_mean_that_is_no_number_gives_no_value(tokenizer, tmp_path):
    model = double_model()
    with torch.no_grad():
        model.get_output_embeddings().weight[:] = torch.nan
    trainer = trainer_for(tokenizer, tmp_path, model, ROWS, max_steps=2, t_scaling="auto")
    with pytest.raises(InputError, match=r"cannot find t_scaling.* nan before step 1.*: give a number"):
        trainer.train()


def test_a_rule_with_an_old_policy_needs_a_number(tokenizer, tmp_path):
    trainer = trainer_for(tokenizer, tmp_path, double_model(), ROWS, max_steps=2, t_scaling="auto")
    trainer.create_token_rule = psft_rule
    with pytest.raises(InputError, match="t_scaling is 'auto', but create_token_rule .* old_policy.* a number"):
        trainer.train()


@pytest.mark.parametrize("loss", ["gem", "psft"])
def test_no_effective_weight_where_the_loss_is_no_weighted_nll(loss, tokenizer, tmp_path):
    trainer = trainer_for(tokenizer, tmp_path, double_model(), ROWS, max_steps=1, cold_start_loss=loss)
    trainer.train()
    assert steps_of(trainer, "weight_mean") and not any("weight_effective" in row for row in trainer.state.log_history)
    assert "weight_effective" not in files.read_settings(tmp_path)


def test_the_model_card_says_what_was_found(tokenizer, tmp_path):
    trainer = auto(tokenizer, tmp_path, max_steps=1)
    trainer.create_model_card(model_name="cold-start")
    weight = steps_of(trainer, "weight_effective")[-1]
    lines = (tmp_path / "README.md").read_text().splitlines()
    assert "- t_scaling: auto" in lines and f"- t_scaling_found: {trainer.t_scaling:.3g}" in lines
    assert f"- weight_effective: {weight:.3g}" in lines


def test_where_it_begins_is_said_only_below_the_scale_at_work(tokenizer, tmp_path, capsys):
    """An untrained model gives the label no chance at any temperature."""
    trainer_for(tokenizer, tmp_path, rows=ROWS, max_steps=4, learning_rate=1e-9, t_scaling=0.15).train()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("aesl_trl: AESL")]
    assert len(said) == 2 and not any("begins" in line for line in said)
