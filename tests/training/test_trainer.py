"""AESLSFTTrainer as a whole: TRL's numbers under nll, logs, accumulation, evaluation, resume, model card."""

import copy
import inspect
import json
import math

import pytest
import torch
from small_runs import (
    LONG_PAIR,
    PAIRS,
    assert_close_by_name,
    cpu_settings,
    documents,
    double_model,
    message_rows,
    prompt_completion_rows,
    small_config,
    steps_of,
    text_rows,
    trained_weights,
    trainer_for,
)
from tiny_models import build_model, build_tokenizer
from transformers import Seq2SeqTrainingArguments, TrainingArguments
from trl import SFTConfig, SFTTrainer

from aesl_trl import AESLSFTConfig, AESLSFTTrainer, DiversityCallback, files
from aesl_trl.errors import InputError
from aesl_trl.losses.definition import aesl_scores, gold_log_probs


# ---- nll is TRL's own


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"packing": True, "max_length": 48},
        {"packing": True, "packing_strategy": "wrapped", "max_length": 48},
    ],
    ids=["padded", "accumulated", "bfd", "wrapped"],
)
def test_nll_trains_as_trl_does(changes, tokenizer, tmp_path):
    """Same seed, same batches: the same losses, metrics and weights, but for the order of the head's sums.

    SGD: Adam would turn a gradient's last digit into a step of full size where the gradient is near 0.
    """
    changes = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "max_steps": 4,
        "optim": "sgd",
        "learning_rate": 0.1,
        **changes,
    }
    model, rows = build_model(tokenizer), prompt_completion_rows([*PAIRS, LONG_PAIR])
    theirs = SFTTrainer(
        model=copy.deepcopy(model),
        args=SFTConfig(**cpu_settings(tmp_path / "trl", **changes)),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
    )
    theirs.train()
    ours = trainer_for(
        tokenizer, tmp_path / "aesl", model=model, rows=rows, eval_rows=rows, cold_start_loss="nll", **changes
    )
    ours.train()
    assert_close_by_name(trained_weights(ours), trained_weights(theirs), rtol=0, atol=1e-6)
    for key in ("num_tokens", "learning_rate"):
        assert steps_of(ours, key) == steps_of(theirs, key)
    metrics = ("loss", "eval_loss", "grad_norm", "entropy", "mean_token_accuracy", "eval_num_tokens")
    for key in (*metrics, "eval_entropy", "eval_mean_token_accuracy"):
        assert steps_of(ours, key) == pytest.approx(steps_of(theirs, key), abs=1e-6)
    assert steps_of(ours, "weight_mean") == [1.0] * 4


def test_aesl_trains_otherwise_than_nll(tokenizer, tmp_path):
    runs = {}
    for loss in ("aesl", "nll"):
        runs[loss] = trainer_for(tokenizer, tmp_path / loss, cold_start_loss=loss)
        runs[loss].train()
    assert steps_of(runs["aesl"])[0] < steps_of(runs["nll"])[0]
    assert steps_of(runs["aesl"], "nll")[0] == pytest.approx(steps_of(runs["nll"], "nll")[0], abs=1e-6)


# ---- Accumulation


@pytest.mark.parametrize("cold_start_loss", ["aesl", "nll"])
def test_two_accumulation_steps_equal_one(cold_start_loss, tokenizer, tmp_path):
    """Rows of very different lengths: a mean of means would be off by far more than the tolerance."""
    rows = prompt_completion_rows([PAIRS[0], LONG_PAIR, PAIRS[2], PAIRS[3]])
    weights = []
    for accumulation, batch in ((1, 4), (2, 2), (4, 1)):
        trainer = trainer_for(
            tokenizer,
            tmp_path / str(accumulation),
            rows=rows,
            cold_start_loss=cold_start_loss,
            gradient_accumulation_steps=accumulation,
            per_device_train_batch_size=batch,
            optim="sgd",
            learning_rate=0.1,
        )
        trainer.train()
        weights.append((trained_weights(trainer), steps_of(trainer), steps_of(trainer, "nll")))
    for others, losses, nlls in weights[1:]:
        assert losses == pytest.approx(weights[0][1], abs=1e-6)
        assert nlls == pytest.approx(weights[0][2], abs=1e-6)
        assert_close_by_name(others, weights[0][0], rtol=0, atol=1e-6)


# ---- What is logged


def test_figures_of_a_step_are_those_of_the_definition(tokenizer, tmp_path):
    model = double_model()
    trainer = trainer_for(
        tokenizer, tmp_path, model=copy.deepcopy(model), max_steps=1, per_device_train_batch_size=len(PAIRS)
    )
    rows = documents(trainer.train_dataset)
    trainer.train()
    log_probs, weights, temperatures, labels, entropies, hits = [], [], [], [], [], []
    for input_ids, row_labels in rows:
        logits = model(input_ids=torch.tensor([input_ids])).logits[:, :-1].detach()
        label = torch.tensor([row_labels])[:, 1:]
        scores, mask = aesl_scores(logits, label), label != -100
        log_probs.append(gold_log_probs(logits, label)[mask])
        weights.append(scores.weights[mask])
        temperatures.append(scores.temperatures[mask])
        labels.append(label[mask])
        entropies.append(torch.distributions.Categorical(logits=logits[mask]).entropy())
        hits.append(logits[mask].argmax(-1) == label[mask])
    log_probs, weights, temperatures, labels = (torch.cat(part) for part in (log_probs, weights, temperatures, labels))
    eos = labels == tokenizer.eos_token_id
    assert eos.sum() == len(PAIRS)
    logged = trainer.state.log_history[0]
    assert {key: logged[key] for key in EXPECTED_FIGURES} == pytest.approx(
        {
            "loss": -(weights * log_probs).mean().item(),
            "nll": -log_probs.mean().item(),
            "weight_mean": weights.mean().item(),
            "weight_low_share": (weights < 0.1).double().mean().item(),
            "temperature_mean": temperatures.mean().item(),
            "weight_eos": weights[eos].mean().item(),
            "prob_eos": log_probs[eos].exp().mean().item(),
            "entropy": torch.cat(entropies).mean().item(),
            "mean_token_accuracy": torch.cat(hits).double().mean().item(),
            "num_tokens": sum(len(input_ids) for input_ids, _ in rows),
        },
        rel=1e-5,
        abs=1e-5,
    )


EXPECTED_FIGURES = (
    "loss",
    "nll",
    "weight_mean",
    "weight_low_share",
    "temperature_mean",
    "weight_eos",
    "prob_eos",
    "entropy",
    "mean_token_accuracy",
    "num_tokens",
)


@pytest.mark.parametrize("cold_start_loss", ["aesl", "nll"])
def test_every_step_logs_every_figure(cold_start_loss, tokenizer, tmp_path):
    trainer = trainer_for(tokenizer, tmp_path, cold_start_loss=cold_start_loss)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    wanted = set(EXPECTED_FIGURES) - ({"temperature_mean"} if cold_start_loss == "nll" else set())
    assert len(rows) == 3
    assert all(wanted <= row.keys() and all(math.isfinite(row[key]) for key in wanted) for row in rows)
    assert "temperature_mean" not in rows[0] or cold_start_loss == "aesl"


def test_positions_file_counts_each_trained_token(tokenizer, tmp_path):
    rows = prompt_completion_rows([LONG_PAIR, *PAIRS])
    trainer = trainer_for(tokenizer, tmp_path, rows=rows, per_device_train_batch_size=6)
    lengths = [sum(label != -100 for label in labels) for _, labels in documents(trainer.train_dataset)]
    trainer.train()
    lines = files.read_jsonl(tmp_path / files.OWN / files.POSITIONS)
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        lower = 0
        for upper, count in zip(line["position"], line["count"], strict=True):
            assert count == sum(min(length, upper) - min(length, lower) for length in lengths)
            lower = upper
        assert sum(line["count"]) == sum(lengths)
        assert all(0 <= weight <= 1 for weight in line["weight"])
        assert all(temperature >= 1e-2 for temperature in line["temperature"])


def test_positions_restart_with_each_packed_document(tokenizer, tmp_path):
    rows = prompt_completion_rows()
    counts = []
    for changes in ({}, {"padding_free": True, "max_length": None}):
        folder = tmp_path / str(len(counts))
        trainer = trainer_for(tokenizer, folder, rows=rows, per_device_train_batch_size=5, max_steps=1, **changes)
        trainer.train()
        counts.append(files.read_jsonl(folder / files.OWN / files.POSITIONS)[0]["count"])
    assert counts[0] == counts[1]


def test_run_file_says_what_was_trained(tokenizer, tmp_path):
    trainer_for(tokenizer, tmp_path, t_scaling=2.5, prefix_mode="exclusive").train()
    run = files.read_json(tmp_path / files.OWN / files.RUN)
    assert run["stage"] == "sft" and run["cold_start_loss"] == "aesl" and run["t_scaling"] == 2.5
    assert run["prefix_mode"] == "exclusive" and run["max_steps"] == 3 and run["num_processes"] == 1
    assert run["selection"] is None and run["versions"]["trl"]
    assert files.read_json(tmp_path / files.OWN / files.TRAINER_STATE)["global_step"] == 3


# ---- The warning about trained prompts

WARNING = "the labels cover the prompt and the chat template"


@pytest.mark.parametrize(
    ("rows", "changes", "warned"),
    [
        (text_rows, {}, True),
        (message_rows, {}, True),
        (prompt_completion_rows, {"completion_only_loss": False}, True),
        (lambda: text_rows().to_iterable_dataset(), {}, True),
        (text_rows, {"cold_start_loss": "nll"}, False),
        (message_rows, {"assistant_only_loss": True}, False),
        (prompt_completion_rows, {}, False),
        (lambda: prompt_completion_rows().to_iterable_dataset(), {}, False),
    ],
    ids=["text", "messages", "whole", "stream", "nll", "assistant_only", "prompt_completion", "masked_stream"],
)
def test_warning_when_prompts_are_trained(rows, changes, warned, tokenizer, tmp_path, recwarn):
    trainer_for(tokenizer, tmp_path, rows=rows(), **changes)
    said = [str(each.message) for each in recwarn if WARNING in str(each.message)]
    assert len(said) == warned
    assert all("`prompt` and `completion`" in line and "assistant_only_loss=True" in line for line in said)


# ---- Evaluation


@pytest.mark.parametrize("cold_start_loss", ["aesl", "nll"])
def test_eval_nll_is_the_mean_over_tokens(cold_start_loss, tokenizer, tmp_path):
    """Rows of different lengths in batches of two: `eval_loss` is a mean of batch means, `eval_nll` is not."""
    model, rows = double_model(), prompt_completion_rows([*PAIRS, LONG_PAIR, PAIRS[0]])
    trainer = trainer_for(
        tokenizer,
        tmp_path,
        model=copy.deepcopy(model),
        eval_rows=rows,
        per_device_eval_batch_size=2,
        cold_start_loss=cold_start_loss,
    )
    metrics = trainer.evaluate()
    log_probs = []
    for input_ids, labels in documents(trainer.eval_dataset):
        labels = torch.tensor([labels])[:, 1:]
        logits = model(input_ids=torch.tensor([input_ids])).logits[:, :-1]
        log_probs.append(gold_log_probs(logits, labels)[labels != -100])
    assert metrics["eval_nll"] == pytest.approx(-torch.cat(log_probs).mean().item(), abs=1e-5)
    assert {"eval_weight_mean", "eval_entropy", "eval_mean_token_accuracy", "eval_weight_eos"} <= metrics.keys()
    assert (metrics["eval_weight_mean"] == 1.0) == (cold_start_loss == "nll")


def test_each_of_several_eval_datasets_has_its_own_nll(tokenizer, tmp_path):
    eval_rows = {"short": prompt_completion_rows(PAIRS[:2]), "long": prompt_completion_rows([LONG_PAIR])}
    trainer = trainer_for(tokenizer, tmp_path, eval_rows=eval_rows)
    metrics = trainer.evaluate()
    assert metrics["eval_short_nll"] != metrics["eval_long_nll"]
    for name, rows in eval_rows.items():
        assert trainer.evaluate(rows, metric_key_prefix="test")["test_nll"] == metrics[f"eval_{name}_nll"]


def test_best_model_is_that_of_the_lowest_eval_nll(tokenizer, tmp_path):
    """A learning rate so high that nll rises; Trainer would take a name not ending in "loss" for a score."""
    trainer = trainer_for(
        tokenizer,
        tmp_path,
        eval_rows=prompt_completion_rows(),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        learning_rate=1.0,
        optim="sgd",
        max_steps=4,
        load_best_model_at_end=True,
        metric_for_best_model="eval_nll",
    )
    trainer.train()
    series = steps_of(trainer, "eval_nll")
    assert max(series) > min(series)
    assert trainer.state.best_metric == min(series)
    assert trainer.evaluate()["eval_nll"] == pytest.approx(min(series), abs=1e-6)


def test_compute_metrics_gets_the_logits(tokenizer, tmp_path):
    seen = {}

    def compute_metrics(prediction):
        seen["logits"], seen["labels"] = prediction.predictions.shape, prediction.label_ids.shape
        return {"positions": float(prediction.predictions.shape[1])}

    trainer = AESLSFTTrainer(
        model=build_model(tokenizer),
        args=small_config(tmp_path),
        train_dataset=prompt_completion_rows(),
        eval_dataset=prompt_completion_rows(),
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )
    metrics = trainer.evaluate()
    assert seen["logits"] == seen["labels"] and metrics["eval_positions"] == seen["labels"][1]
    assert math.isfinite(metrics["eval_nll"])


# ---- Resume


@pytest.mark.parametrize("cold_start_loss", ["aesl", "nll"])
def test_resumed_training_ends_where_uninterrupted_training_does(cold_start_loss, tokenizer, tmp_path):
    settings = {
        "cold_start_loss": cold_start_loss,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
    }
    whole = trainer_for(tokenizer, tmp_path, **settings)
    whole.train()
    logged, positions = list(whole.state.log_history), (tmp_path / files.OWN / files.POSITIONS).read_text()
    resumed = trainer_for(tokenizer, tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, weight in trained_weights(whole).items():
        assert torch.equal(trained_weights(resumed)[name], weight), name
    timeless = [
        [{k: v for k, v in row.items() if "train_" not in k} for row in rows if "loss" in row]
        for rows in (logged, resumed.state.log_history)
    ]
    assert timeless[0] == timeless[1]
    assert len(timeless[0]) == 6
    assert (tmp_path / files.OWN / files.POSITIONS).read_text() == positions


# ---- Arguments


def test_args_may_be_none(tokenizer, tmp_path, monkeypatch, tiny_model_dir):
    monkeypatch.chdir(tmp_path)
    if not torch.cuda.is_available():
        # TRL's own defaults ask for a GPU that knows bf16; nothing is trained here
        monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    trainer = AESLSFTTrainer(model=tiny_model_dir, train_dataset=prompt_completion_rows())
    assert isinstance(trainer.args, AESLSFTConfig)
    assert trainer.args.cold_start_loss == "aesl" and trainer.args.output_dir.endswith("-AESL")


@pytest.mark.parametrize("kind", [SFTConfig, TrainingArguments])
def test_other_arguments_are_converted_with_every_value(kind, tokenizer, tmp_path):
    changes = {
        "seed": 3,
        "lr_scheduler_type": "cosine",
        "optim": "sgd",
        "warmup_steps": 2,
        "hub_token": "secret",
        **({"eos_token": "<|im_end|>", "model_init_kwargs": {"dtype": torch.float32}} if kind is SFTConfig else {}),
        "run_name": "a name",
        "accelerator_config": {"even_batches": False},
    }
    args = kind(**cpu_settings(tmp_path, **changes))
    trainer = AESLSFTTrainer(
        model=build_model(tokenizer),
        args=args,
        train_dataset=prompt_completion_rows(),
        processing_class=tokenizer,
    )
    assert isinstance(trainer.args, AESLSFTConfig)
    assert trainer.args.cold_start_loss == "aesl" and trainer.args.t_scaling == 3.0
    for name, field in kind.__dataclass_fields__.items():
        if field.init and name not in ("logging_dir", "ddp_find_unused_parameters"):
            assert getattr(trainer.args, name) == getattr(args, name), name
    trainer.train()
    assert "weight_mean" in trainer.state.log_history[0]


def test_converted_sft_config_trains_as_the_same_aesl_config(tokenizer, tmp_path):
    weights = []
    for kind in (SFTConfig, AESLSFTConfig):
        trainer = AESLSFTTrainer(
            model=build_model(tokenizer),
            args=kind(**cpu_settings(tmp_path)),
            train_dataset=prompt_completion_rows(),
            processing_class=tokenizer,
        )
        trainer.train()
        weights.append(trained_weights(trainer))
    assert all(torch.equal(weights[0][name], weight) for name, weight in weights[1].items())


def test_arguments_with_fields_of_their_own_are_refused(tokenizer, tmp_path):
    args = Seq2SeqTrainingArguments(**cpu_settings(tmp_path))
    with pytest.raises(
        InputError, match="Seq2SeqTrainingArguments with fields of its own .*derive it from AESLSFTConfig"
    ):
        AESLSFTTrainer(
            build_model(tokenizer), args, train_dataset=prompt_completion_rows(), processing_class=tokenizer
        )


def test_something_else_as_arguments_is_refused(tokenizer):
    with pytest.raises(InputError, match="args is a dict"):
        AESLSFTTrainer(build_model(tokenizer), {}, train_dataset=prompt_completion_rows(), processing_class=tokenizer)


def test_positional_arguments_are_sfttrainers(tokenizer, tmp_path):
    rows = prompt_completion_rows()
    trainer = AESLSFTTrainer(build_model(tokenizer), small_config(tmp_path), None, rows, rows, tokenizer)
    assert "eval_nll" in trainer.evaluate()


# ---- Hub and model card


def test_model_card_cites_the_paper_and_states_the_settings(tokenizer, tmp_path):
    trainer = trainer_for(tokenizer, tmp_path, t_scaling=2.5)
    trainer.create_model_card(model_name="cold-start", dataset_name="pairs")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "Getting Your LLMs Ready for Reinforcement Learning with Lightweight SFT" in card
    assert "https://openreview.net/forum?id=yezWGJmODg" in card and "@inproceedings{li2026getting" in card
    assert "cold_start_loss: aesl" in card and "t_scaling: 2.5" in card and "prefix_mode: inclusive" in card
    assert "selection: none" in card
    assert "aesl" in card.split("---")[1]


def test_checkpoint_carries_the_model_card(tokenizer, tmp_path):
    trainer = trainer_for(tokenizer, tmp_path, save_strategy="steps", save_steps=3)
    trainer.train()
    assert "## Cold start" in (tmp_path / "README.md").read_text(encoding="utf-8")
    state = json.loads((tmp_path / "checkpoint-3" / files.TRAINER_STATE).read_text())
    assert state["log_history"][0]["nll"] > 0


def test_a_template_without_an_end_of_turn_is_refused_before_the_first_step(tmp_path):
    endless = build_tokenizer()
    endless.chat_template = endless.chat_template.replace("<|im_end|>", "")
    with pytest.raises(InputError, match=r"trains no token that ends a sample \(<\|im_end\|>\).*ends no turn"):
        trainer_for(endless, tmp_path, rows=message_rows())
    with pytest.raises(InputError, match="max_length=4 cuts 3 of 3 rows before their end: raise it"):
        trainer_for(endless, tmp_path, rows=text_rows(PAIRS[:3]), max_length=4)


# ---- What an editor shows


def test_the_signature_shows_trls_arguments():
    """TRL's come first, in TRL's order, with their types and defaults: a call by position stays right."""
    theirs = list(inspect.signature(SFTTrainer.__init__).parameters.values())
    ours = list(inspect.signature(AESLSFTTrainer.__init__).parameters.values())
    assert ours[: len(theirs)] == theirs
    added = [(each.name, each.kind) for each in ours[len(theirs) :]]
    only_by_name, rest = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD
    assert added == [("diversity_prompts", only_by_name), ("reward_funcs", only_by_name), ("later", rest)]


def test_an_argument_of_a_later_trl_reaches_it(monkeypatch, tmp_path, tokenizer):
    theirs, seen = SFTTrainer.__init__, {}

    def later(self, *positional, new=None, **rest):
        seen["new"] = new
        theirs(self, *positional, **rest)

    monkeypatch.setattr(SFTTrainer, "__init__", later)
    AESLSFTTrainer(
        build_model(tokenizer),
        small_config(tmp_path),
        train_dataset=prompt_completion_rows(),
        processing_class=tokenizer,
        new=3,
    )
    assert seen == {"new": 3}


def test_a_misspelt_argument_is_refused_before_the_model_is_looked_at(tmp_path):
    with pytest.raises(TypeError, match="train_data'"):
        AESLSFTTrainer("no/such-model", small_config(tmp_path), train_data=[])


def test_every_argument_of_the_callback_has_a_type():
    untyped = [
        each.name
        for each in inspect.signature(DiversityCallback.__init__).parameters.values()
        if each.annotation is each.empty and each.name != "self"
    ]
    assert untyped == []
