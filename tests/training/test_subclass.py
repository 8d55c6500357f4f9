"""A user's subclass: a term of their own in the loss, their own collator, column and callback."""

import math
from dataclasses import dataclass, field

import pytest
import torch
from small_runs import cpu_settings, prompt_completion_rows, steps_of, trained_weights
from tiny_models import build_model
from transformers import TrainerCallback
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from aesl_trl import AESLSFTConfig, AESLSFTTrainer


@dataclass
class DecayingConfig(AESLSFTConfig):
    """AESLSFTConfig with a penalty on the embeddings."""

    penalty: float = field(default=0.0, metadata={"help": "Weight of the mean squared embedding in the loss."})


class WeightedCollator(DataCollatorForLanguageModeling):
    """Carries a column of the dataset through to the batch."""

    def torch_call(self, examples):
        batch = super().torch_call(examples)
        batch["importance"] = torch.tensor([example["importance"] for example in examples])
        return batch


class DecayingTrainer(AESLSFTTrainer):
    """AESLSFTTrainer whose loss is scaled by a column and has a penalty."""

    _tag_names = [*AESLSFTTrainer._tag_names, "decaying"]

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if "importance" not in self._signature_columns:
            self._signature_columns.append("importance")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        importance = inputs.pop("importance")
        loss = super().compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        loss, outputs = loss if return_outputs else (loss, None)
        self.seen = getattr(self, "seen", []) + importance.tolist()
        loss = importance.mean() * loss + self.args.penalty * model.get_input_embeddings().weight.square().mean()
        return (loss, outputs) if return_outputs else loss


class CountingCallback(TrainerCallback):
    def __init__(self):
        self.logged = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logged.append(logs)


def decaying_trainer(tokenizer, folder, *, importance=1.0, callbacks=None, rows=None, **changes):
    rows = prompt_completion_rows() if rows is None else rows
    rows = rows.map(lambda row: {"importance": importance})
    return DecayingTrainer(
        model=build_model(tokenizer),
        args=DecayingConfig(**cpu_settings(folder, **changes)),
        data_collator=WeightedCollator(pad_token_id=tokenizer.pad_token_id),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
        callbacks=callbacks,
    )


def test_extension_reaches_the_loss(tokenizer, tmp_path):
    plain = AESLSFTTrainer(
        model=build_model(tokenizer),
        args=AESLSFTConfig(**cpu_settings(tmp_path / "plain")),
        train_dataset=prompt_completion_rows(),
        processing_class=tokenizer,
    )
    plain.train()
    neutral = decaying_trainer(tokenizer, tmp_path / "neutral")
    neutral.train()
    assert all(torch.equal(trained_weights(plain)[name], weight) for name, weight in trained_weights(neutral).items())
    penalised = decaying_trainer(tokenizer, tmp_path / "penalised", importance=0.5, penalty=10.0)
    embedding = penalised.model.get_input_embeddings().weight.square().mean().item()
    penalised.train()
    assert steps_of(penalised)[0] == pytest.approx(0.5 * steps_of(plain)[0] + 10.0 * embedding, rel=1e-5)
    assert penalised.seen == [0.5] * 5  # each row once in an epoch of three batches


def test_everything_else_still_works(tokenizer, tmp_path):
    callback = CountingCallback()
    trainer = decaying_trainer(
        tokenizer, tmp_path, callbacks=[callback], penalty=0.1, save_strategy="steps", save_steps=3
    )
    trainer.train()
    logged = [logs for logs in callback.logged if "loss" in logs]
    assert len(logged) == 3 and all({"nll", "weight_mean", "entropy", "num_tokens"} <= logs.keys() for logs in logged)
    assert math.isfinite(trainer.evaluate()["eval_nll"])
    assert trainer.args.penalty == 0.1
    assert "decaying" in (tmp_path / "README.md").read_text(encoding="utf-8").split("---")[1]


def test_a_loss_of_ones_own(tokenizer, tmp_path):
    """A weight as a function of the token's statistics: the fused head does the rest."""

    class TopTrainer(AESLSFTTrainer):
        def create_token_rule(self):
            aesl = super().create_token_rule()
            return aesl._replace(weights=lambda stats: stats.rest * ~stats.is_top1)

    trainer = TopTrainer(
        model=build_model(tokenizer),
        args=AESLSFTConfig(**cpu_settings(tmp_path, max_steps=20)),
        train_dataset=prompt_completion_rows(),
        processing_class=tokenizer,
    )
    trainer.train()
    for row in trainer.state.log_history[:-1]:
        assert row["weight_low_share"] >= row["mean_token_accuracy"] - 1e-9
    assert steps_of(trainer, "mean_token_accuracy")[-1] > 0
