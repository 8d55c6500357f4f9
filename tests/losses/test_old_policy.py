"""Each loss trained for some steps, and the old policy's refreshes in real training."""

import math
import re
from pathlib import Path

import pytest
import torch
from small_runs import (
    PAIRS,
    double_model,
    prompt_completion_rows,
    small_config,
    steps_of,
    trained_weights,
    trainer_for,
)
from tiny_models import build_model
from torch.utils.data import IterableDataset

from aesl_trl.losses import old_policy, rules
from aesl_trl.losses.rules import TOKEN_RULES


DOCUMENT = Path(__file__).parents[2] / "docs" / "losses.md"
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
ROWS = prompt_completion_rows(PAIRS * 4)  # 20 rows: 10 steps of 2 an epoch
ABLATIONS = {
    **{loss: {"cold_start_loss": loss} for loss in TOKEN_RULES},
    "linear": {"aesl_weight": "linear"},
    "threshold": {"aesl_weight": "threshold", "weight_threshold": 0.1},
    "none": {"prefix_mode": "none", "t_scaling": 1.0},
    "gem sigmoid": {"cold_start_loss": "gem", "gem_h": "sigmoid"},
}


def run(tokenizer, folder, model=None, rows=ROWS, **changes):
    trainer = trainer_for(tokenizer, folder, model or build_model(tokenizer), rows, **changes)
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", ABLATIONS)
def test_each_loss_trains_and_logs_nll_beside_it(name, tokenizer, tmp_path):
    trainer = run(
        tokenizer, tmp_path, max_steps=20, eval_rows=ROWS, eval_strategy="steps", eval_steps=20, **ABLATIONS[name]
    )
    nll = steps_of(trainer, "nll")
    assert len(nll) == 20 and sum(nll[-4:]) < 0.75 * sum(nll[:4])
    assert all(math.isfinite(value) for value in steps_of(trainer, "loss") + steps_of(trainer, "grad_norm"))
    assert all(0 <= value <= 1.29 for value in steps_of(trainer, "weight_mean"))
    assert steps_of(trainer, "eval_nll")[0] < nll[0]
    with_temperature = name in ("aesl", "none")
    assert bool(steps_of(trainer, "temperature_mean")) == with_temperature
    if name == "nll":
        assert steps_of(trainer, "loss") == pytest.approx(nll, rel=1e-5)
    else:
        assert abs(steps_of(trainer, "eval_loss")[0] / steps_of(trainer, "eval_nll")[0] - 1) > 1e-3


@pytest.fixture
def scored(monkeypatch):
    """The global step of each batch that is scored without gradients."""
    steps, original = [], old_policy.score_batch

    def score_batch(trainer, batch):
        steps.append(trainer.state.global_step)
        return original(trainer, batch)

    monkeypatch.setattr(old_policy, "score_batch", score_batch)
    return steps


@pytest.mark.parametrize(
    ("refresh", "accumulation", "expected"),
    [
        (8, 1, [0] * 7 + [8] + [10] * 7 + [18] * 1),  # 10 steps an epoch: refreshes at 0, 8, 10, 18
        (4, 1, [0] * 3 + [4] * 3 + [8] + [10] * 3 + [14] * 3 + [18]),
        (1, 1, []),
        (
            4,
            2,
            [0] * 6 + [5] * 6 + [10] * 6 + [15] * 6,
        ),  # 5 steps an epoch: 0, 4, 5, 9; the last step of each is alone
    ],
)
def test_refreshes_come_within_the_epoch_and_score_each_batch_once(
    refresh, accumulation, expected, scored, tokenizer, tmp_path
):
    settings = {"max_steps": 20, "gradient_accumulation_steps": accumulation, "psft_refresh_steps": refresh}
    trainer = trainer_for(tokenizer, tmp_path, rows=ROWS, cold_start_loss="psft", **settings)
    trainer.train()
    assert scored == expected
    firsts = [loss for loss in steps_of(trainer, "loss") if abs(loss + 1) < 1e-6]
    assert len(firsts) == len({step for step in range(20) if step % (10 // accumulation) % refresh == 0})


def test_no_batch_is_scored_that_is_not_trained(scored, tokenizer, tmp_path):
    trainer = trainer_for(tokenizer, tmp_path, rows=ROWS, cold_start_loss="psft", max_steps=3)
    trainer.train()
    assert scored == [0, 0]


def test_a_refresh_at_every_step_is_nll(tokenizer, tmp_path):
    psft = run(tokenizer, tmp_path / "a", cold_start_loss="psft", psft_refresh_steps=1, max_steps=12)
    nll = run(tokenizer, tmp_path / "b", cold_start_loss="nll", max_steps=12)
    assert steps_of(psft, "nll") == steps_of(nll, "nll") and steps_of(psft) == [-1.0] * 12
    for name, value in trained_weights(psft).items():
        assert torch.equal(value, trained_weights(nll)[name]), name


def test_batches_come_in_the_same_order_as_without(tokenizer, tmp_path):
    """Taking batches ahead changes neither order nor number: with a tiny rate nll is the same at each step."""
    settings = {"max_steps": 25, "learning_rate": 1e-12}
    psft = run(tokenizer, tmp_path / "a", cold_start_loss="psft", **settings)
    nll = run(tokenizer, tmp_path / "b", cold_start_loss="nll", **settings)
    assert steps_of(psft, "nll") == pytest.approx(steps_of(nll, "nll"), rel=1e-6)
    assert len(set(steps_of(nll, "nll"))) > 5


def test_accumulation_gives_the_weights_of_one_batch(tokenizer, tmp_path):
    settings = {"cold_start_loss": "psft", "max_steps": 8, "optim": "sgd", "learning_rate": 0.3, "max_grad_norm": 0}
    sequential = {"train_sampling_strategy": "sequential"}
    one = run(tokenizer, tmp_path / "a", double_model(), per_device_train_batch_size=4, **settings, **sequential)
    two = run(tokenizer, tmp_path / "b", double_model(), gradient_accumulation_steps=2, **settings, **sequential)
    for name, value in trained_weights(one).items():
        torch.testing.assert_close(value, trained_weights(two)[name], atol=1e-6, rtol=0)
    assert min(steps_of(one, "weight_mean")) < 0.98  # the clip was met


@pytest.mark.parametrize(("stop", "equal"), [(8, True), (10, True), (4, False)])
def test_resuming_at_a_refresh_is_bit_for_bit(stop, equal, tokenizer, tmp_path):
    """Between two refreshes a resumed run starts with one of its own, and is another run from there on."""
    settings = {"cold_start_loss": "psft", "save_strategy": "steps", "save_steps": stop, "max_steps": 16}
    whole = run(tokenizer, tmp_path, **settings)
    resumed = trainer_for(tokenizer, tmp_path, rows=ROWS, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert resumed.state.global_step == 16
    same = all(torch.equal(value, trained_weights(resumed)[name]) for name, value in trained_weights(whole).items())
    assert same == equal
    refreshes = {8: [8, 10], 10: [10], 4: [4, 8, 10]}[stop]
    resumed_losses = steps_of(resumed)[stop:]
    assert [stop + i for i, loss in enumerate(resumed_losses) if abs(loss + 1) < 1e-6] == refreshes


def test_a_stream_without_length(scored, tokenizer, tmp_path):
    rows = ROWS.to_iterable_dataset()
    assert isinstance(rows, IterableDataset)
    trainer = trainer_for(tokenizer, tmp_path, rows=rows, cold_start_loss="psft", max_steps=13)
    trainer.train()
    # One pass is 10 steps; what a new pass gives up to the next multiple of 8
    assert trainer.state.global_step == 13 and scored == [0] * 7 + [8] + [10] * 2


def test_dropout_is_off_while_the_old_policy_is_scored(tokenizer, tmp_path, monkeypatch):
    model = build_model(tokenizer, attention_dropout=0.5)
    trainer = trainer_for(tokenizer, tmp_path, model, ROWS, cold_start_loss="psft", max_steps=4)
    seen, original = [], old_policy.score_batch

    def twice(trainer, batch):
        first, second = original(trainer, batch), original(trainer, batch)
        seen.append((first.log_probs, second.log_probs))
        assert trainer.model.training
        return first

    monkeypatch.setattr(old_policy, "score_batch", twice)
    trainer.train()
    assert len(seen) == 3 and all(torch.equal(*pair) for pair in seen)


def test_a_batch_without_old_log_probs_is_an_error(tokenizer, tmp_path):
    """The ratio would silently be 1."""
    trainer = trainer_for(tokenizer, tmp_path, rows=ROWS, cold_start_loss="psft")
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    with pytest.raises(KeyError, match="old_log_probs"):
        trainer.compute_loss(trainer.model, batch)


# ---- The examples of docs/losses.md


@pytest.fixture
def examples(monkeypatch):
    """The names that the Python blocks about own losses define; the table is put back afterwards."""
    monkeypatch.setattr(rules, "TOKEN_RULES", rules.TOKEN_RULES)
    before, names = dict(rules.TOKEN_RULES), {}
    for block in PYTHON_BLOCKS[1:]:
        exec(compile(block, "docs/losses.md", "exec"), names)
    yield names
    rules.TOKEN_RULES.clear()
    rules.TOKEN_RULES.update(before)


def test_the_documented_losses_train(examples, tokenizer, tmp_path):
    model, rows = build_model(tokenizer), prompt_completion_rows()
    trainer = examples["FocalTrainer"](
        model, small_config(tmp_path / "a"), train_dataset=rows, processing_class=tokenizer
    )
    trainer.train()
    by_name = run(tokenizer, tmp_path / "b", rows=rows, cold_start_loss="focal")
    assert steps_of(trainer) == steps_of(by_name)
    assert by_name.args.selection_rule == "turning_point"
    bonus = run(tokenizer, tmp_path / "c", rows=rows, cold_start_loss="entropy_bonus")
    first = [steps_of(bonus, key)[0] for key in ("loss", "nll", "entropy")]
    assert first[0] == pytest.approx(first[1] - 0.01 * first[2], rel=1e-5)


def test_the_documented_mean_temperature(tokenizer, tmp_path, monkeypatch):
    trainer = run(tokenizer, tmp_path / "run" / "sft", max_steps=5, logging_steps=5)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(PYTHON_BLOCKS[0], "docs/losses.md", "exec"), names)
    assert names["mean_temperature"] == pytest.approx(steps_of(trainer, "temperature_mean")[0], rel=1e-9)


def test_the_documented_defaults_are_those_of_the_config(tmp_path):
    """Each field of a loss stands in the table with its default."""
    text, config = DOCUMENT.read_text(encoding="utf-8"), small_config(tmp_path)
    for row in TOKEN_RULES.values():
        for name in set(row.fields) - {"aesl_weight", "weight_threshold"}:
            value = getattr(config, name)
            assert f"`{name}` {f'{value:g}' if isinstance(value, float) else value}" in text, name
