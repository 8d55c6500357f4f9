"""A loss or a gradient that is not finite ends the training before the optimizer makes all weights so."""

import math

import pytest
import torch
from small_runs import LONG_PAIR, PAIRS, prompt_completion_rows, trained_weights, trainer_for
from tiny_models import build_model
from transformers import TrainerCallback

from aesl_trl import files
from aesl_trl.errors import Diverged, exit_on_input_error
from aesl_trl.sampling.draws import SamplingSettings
from aesl_trl.sampling.groups import sample_groups
from aesl_trl.training.finite_steps import SKIPPED_STEPS


class Poison(TrainerCallback):
    """Makes the embedding of one character nan after a step."""

    def __init__(self, trainer, step, character):
        self.trainer, self.step = trainer, step
        self.token = trainer._tokenizer(character)["input_ids"][0]

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.trainer.model.get_input_embeddings().weight.data[self.token] = torch.nan


ROWS = prompt_completion_rows([("abc", " de"), ("x", " yz")])


def poisoned(tokenizer, folder, *, character="x", step=2, **changes):
    """The head is not tied: the nan reaches only the row that holds the character."""
    model = build_model(tokenizer, tie_word_embeddings=False)
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "rows": ROWS, **changes}
    trainer = trainer_for(tokenizer, folder, model=model, **settings)
    trainer.add_callback(Poison(trainer, step, character))
    return trainer


@pytest.mark.parametrize("cold_start_loss", ["aesl", "nll"])
def test_a_loss_that_is_not_finite_names_step_rank_row_and_checkpoint(cold_start_loss, tokenizer, tmp_path):
    trainer = poisoned(tokenizer, tmp_path, cold_start_loss=cold_start_loss)
    with pytest.raises(Diverged) as raised:
        trainer.train()
    message = str(raised.value)
    assert message.startswith("step 3: the loss is not finite (rank 0, row ") and "('x yz" in message
    assert "abc" not in message and f"the last whole checkpoint is {tmp_path / 'checkpoint-2'}" in message
    finite = {name: weight.isfinite().all() for name, weight in trained_weights(trainer).items()}
    assert [name for name, good in finite.items() if not good] == ["model.embed_tokens.weight"]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2"]


def test_the_document_of_a_packed_row_is_named(tokenizer, tmp_path):
    trainer = poisoned(tokenizer, tmp_path, padding_free=True, max_length=None)
    with pytest.raises(Diverged, match=r"rank 0, row 0 \('x yz'\)"):
        trainer.train()


def test_without_a_checkpoint_the_message_says_so(tokenizer, tmp_path):
    trainer = poisoned(tokenizer, tmp_path, save_strategy="no", step=1)
    with pytest.raises(Diverged, match="step 2: .*no checkpoint was saved before it"):
        trainer.train()


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_gradient_that_is_not_finite(max_grad_norm, tokenizer, tmp_path):
    trainer = trainer_for(tokenizer, tmp_path, max_grad_norm=max_grad_norm)
    parameter = trainer.model.model.layers[0].mlp.up_proj.weight
    parameter.register_hook(lambda gradient: gradient * (math.inf if trainer.state.global_step == 1 else 1.0))
    with pytest.raises(Diverged, match="step 2: the gradient's norm is (inf|nan)"):
        trainer.train()
    assert all(weight.isfinite().all() for weight in trained_weights(trainer).values())
    assert trainer.state.global_step == 1


def test_evaluation_may_find_what_it_finds(tokenizer, tmp_path):
    """An evaluation trains nothing: its figure is nan, and the run goes on."""
    trainer = poisoned(tokenizer, tmp_path)
    trainer.model.get_input_embeddings().weight.data[tokenizer("x")["input_ids"][0]] = torch.nan
    assert math.isnan(trainer.evaluate(trainer.train_dataset)["eval_nll"])


def test_steps_that_an_fp16_scaler_skips_are_exempt_until_several_follow_each_other(tokenizer, tmp_path):
    trainer = trainer_for(tokenizer, tmp_path)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    infinite = torch.tensor(math.inf)
    for _ in range(3):
        for _ in range(SKIPPED_STEPS - 1):
            assert trainer._get_grad_norm(trainer.model, grad_norm=infinite) is infinite
        assert trainer._get_grad_norm(trainer.model, grad_norm=torch.tensor(1.0)) == 1.0
    for _ in range(SKIPPED_STEPS - 1):
        trainer._get_grad_norm(trainer.model, grad_norm=infinite)
    with pytest.raises(Diverged, match=f"fp16 gradients overflowed in {SKIPPED_STEPS} steps on end"):
        trainer._get_grad_norm(trainer.model, grad_norm=infinite)


def test_exit_code_and_one_line(capsys):
    def diverge():
        raise Diverged("step 3: the loss is\nnot finite")

    with pytest.raises(SystemExit) as left:
        exit_on_input_error("aesl sft", diverge)
    assert left.value.code == 3
    assert capsys.readouterr().err == "aesl sft: step 3: the loss is not finite\n"


def test_a_measurement_of_a_broken_model_is_a_gap(tokenizer, tmp_path, capsys):
    trainer = trainer_for(
        tokenizer,
        tmp_path,
        model=build_model(tokenizer, tie_word_embeddings=False),
        rows=prompt_completion_rows([*PAIRS[:3], LONG_PAIR]),
        eval_rows=prompt_completion_rows([("x", "y"), ("abc", "d")]),
        diversity_steps=1,
        diversity_samples=2,
        diversity_max_new_tokens=3,
        max_steps=1,
    )
    trainer.add_callback(Poison(trainer, 1, "x"))
    trainer.callback_handler.callbacks.insert(0, trainer.callback_handler.callbacks.pop())  # before the measurement
    trainer.train()
    first, gap = files.read_jsonl(tmp_path / files.OWN / files.DIVERSITY)
    assert first["entropy"] > 0 and first["self_bleu"] is not None
    assert gap["step"] == 1 and {gap[name] for name in ("entropy", "self_bleu", "length", "unique")} == {None}
    assert "step 1 is a gap in diversity.jsonl: the logits of 2 samples are not finite" in capsys.readouterr().out


def test_only_the_broken_samples_are_marked(tokenizer):
    model = build_model(tokenizer, tie_word_embeddings=False)
    model.get_input_embeddings().weight.data[tokenizer("x")["input_ids"][0]] = torch.nan
    rows = [{"prompt": "abc"}, {"prompt": "x"}]
    good, broken = sample_groups(model, tokenizer, rows, SamplingSettings(2, 1.0, 2))
    assert all(math.isfinite(value) for value in good.entropy) and all(math.isnan(value) for value in broken.entropy)
