"""Every gradient of the trainer against the definition on plain logits, in each form in which TRL takes data."""

import copy

import pytest
import torch
from datasets import Dataset
from small_runs import (
    LONG_PAIR,
    PAIRS,
    assert_close_by_name,
    assistant,
    documents,
    double_model,
    gradients,
    message_rows,
    prompt_completion_rows,
    small_config,
    text_rows,
    true_gradients,
    user,
)

from aesl_trl import AESLSFTTrainer


# Qwen2's norms and rotary embedding round to float32 inside a float64 model, so a padded and an unpadded pass differ
# by that much
TOLERANCE = 1e-6
T_SCALING = 0.5  # temperatures around 1 for the model of these tests, so that weights take every value


def _conversational(pairs):
    return Dataset.from_list([{"prompt": user(prompt), "completion": assistant(answer)} for prompt, answer in pairs])


def _multi_turn(pairs):
    return Dataset.from_list(
        [
            {"messages": user(prompt) + assistant(answer) + user("again") + assistant(answer)}
            for prompt, answer in pairs
        ]
    )


def _from_value(pairs):
    turns = [[{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}] for prompt, answer in pairs]
    return Dataset.from_list([{"conversations": turn} for turn in turns])


def _token_ids(tokenizer, pairs, mask):
    rows = []
    for prompt, answer in pairs:
        prompt_ids, answer_ids = tokenizer(prompt)["input_ids"], tokenizer(answer + tokenizer.eos_token)["input_ids"]
        masks = {
            "labels": [-100] * len(prompt_ids) + answer_ids,
            "completion_mask": [0] * len(prompt_ids) + [1] * len(answer_ids),
        }
        rows.append({"input_ids": prompt_ids + answer_ids, mask: masks[mask]})
    return Dataset.from_list(rows)


LONG = [*PAIRS, LONG_PAIR]
# name: (rows from a tokenizer, changed settings)
MODES = {
    "prompt_completion": (lambda tokenizer: prompt_completion_rows(), {}),
    "prompt_completion_trained_whole": (lambda tokenizer: prompt_completion_rows(), {"completion_only_loss": False}),
    "conversational": (lambda tokenizer: _conversational(PAIRS), {}),
    "messages": (lambda tokenizer: message_rows(), {}),
    "from_value": (lambda tokenizer: _from_value(PAIRS), {}),
    "assistant_only": (lambda tokenizer: _multi_turn(PAIRS), {"assistant_only_loss": True}),
    "text": (lambda tokenizer: text_rows(), {}),
    "token_ids_and_labels": (lambda tokenizer: _token_ids(tokenizer, PAIRS, "labels"), {}),
    "token_ids_and_mask": (
        lambda tokenizer: _token_ids(tokenizer, PAIRS, "completion_mask"),
        {"completion_only_loss": True},
    ),
    "truncated": (lambda tokenizer: prompt_completion_rows(LONG), {"max_length": 32}),
    "truncated_keep_end": (
        lambda tokenizer: prompt_completion_rows(LONG),
        {"max_length": 32, "truncation_mode": "keep_end"},
    ),
    "padded_to_multiple": (lambda tokenizer: prompt_completion_rows(), {"pad_to_multiple_of": 16}),
    "padding_free": (lambda tokenizer: prompt_completion_rows(), {"padding_free": True, "max_length": None}),
    "padding_free_padded_to_multiple": (
        lambda tokenizer: prompt_completion_rows(),
        {"padding_free": True, "max_length": None, "pad_to_multiple_of": 64},
    ),
    "bfd": (lambda tokenizer: prompt_completion_rows(LONG), {"packing": True, "max_length": 48}),
    "bfd_messages": (lambda tokenizer: message_rows(), {"packing": True, "max_length": 128}),
    "bfd_split": (
        lambda tokenizer: prompt_completion_rows(LONG),
        {"packing": True, "packing_strategy": "bfd_split", "max_length": 48},
    ),
}
PACKED = [name for name, (_, changes) in MODES.items() if changes.get("packing") or changes.get("padding_free")]


def _assert_gradients(trainer, model, rows, **loss_arguments):
    """Loss and each parameter's gradient of one batch of `rows`, as the dataloader would hand it over."""
    batch = trainer.data_collator([{key: row[key] for key in row if key in COLLATED} for row in rows])
    num_items = sum(label != -100 for _, labels in documents(rows) for label in labels[1:])
    truth, expected = true_gradients(model, documents(rows), **loss_arguments)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch), num_items_in_batch=num_items)
    loss.backward()
    found = gradients(trainer.model)
    assert found.keys() == dict(model.named_parameters()).keys()
    torch.testing.assert_close(loss.detach(), truth, rtol=TOLERANCE, atol=TOLERANCE, check_dtype=False)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 100 * TOLERANCE, f"{name} is not exercised"
    assert_close_by_name(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


COLLATED = ("input_ids", "labels", "seq_lengths")


def _trainer(tokenizer, model, folder, rows, **changes):
    return AESLSFTTrainer(
        model=model, args=small_config(folder, **changes), train_dataset=rows, processing_class=tokenizer
    )


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning")
@pytest.mark.parametrize("mode", MODES)
def test_gradients_equal_the_definition(mode, tokenizer, tmp_path):
    build, changes = MODES[mode]
    model = double_model()
    trainer = _trainer(tokenizer, copy.deepcopy(model), tmp_path, build(tokenizer), t_scaling=T_SCALING, **changes)
    _assert_gradients(trainer, model, list(trainer.train_dataset), t_scaling=T_SCALING)
    weights = trainer._sums["train"].weight / trainer._sums["train"].tokens
    assert 0.1 < weights < 0.95


@pytest.mark.parametrize("prefix_mode", ["exclusive", "none"])
@pytest.mark.parametrize("mode", ["prompt_completion", "padding_free", "bfd"])
def test_gradients_of_the_other_prefix_modes(mode, prefix_mode, tokenizer, tmp_path):
    build, changes = MODES[mode]
    settings = {"prefix_mode": prefix_mode, "t_scaling": 0.7, "min_temperature": 0.2}
    model = double_model()
    trainer = _trainer(tokenizer, copy.deepcopy(model), tmp_path, build(tokenizer), **changes, **settings)
    _assert_gradients(trainer, model, list(trainer.train_dataset), **settings)


@pytest.mark.parametrize("mode", ["prompt_completion", "padding_free", "bfd"])
def test_gradients_of_nll(mode, tokenizer, tmp_path):
    build, changes = MODES[mode]
    model = double_model()
    trainer = _trainer(tokenizer, copy.deepcopy(model), tmp_path, build(tokenizer), cold_start_loss="nll", **changes)
    _assert_gradients(trainer, model, list(trainer.train_dataset), cold_start_loss="nll")


RIVALS = {
    "dft": ({}, {}),
    "gem": ({"gem_beta": 0.5}, {"beta": 0.5}),
    "gem sigmoid": ({"gem_h": "sigmoid"}, {"h": "sigmoid"}),
    "eaft": ({"eaft_alpha": 2.0, "eaft_top_k": 10}, {"alpha": 2.0, "top_k": 10}),
}


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("mode", ["prompt_completion", "padding_free", "bfd"])
def test_gradients_of_the_rivals(mode, rival, tokenizer, tmp_path):
    build, changes = MODES[mode]
    settings, arguments = RIVALS[rival]
    loss, model = rival.split()[0], double_model()
    trainer = _trainer(
        tokenizer, copy.deepcopy(model), tmp_path, build(tokenizer), cold_start_loss=loss, **settings, **changes
    )
    _assert_gradients(trainer, model, list(trainer.train_dataset), cold_start_loss=loss, **arguments)


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning")
@pytest.mark.parametrize("mode", MODES)
def test_old_log_probs_stay_with_their_tokens(mode, tokenizer, tmp_path):
    """The second step after a refresh, however the rows are cut, packed and collated; the truth knows no batches."""
    build, changes = MODES[mode]
    old_model = double_model()
    settings = {"cold_start_loss": "psft", "psft_clip_high": 0.1, "max_steps": 2, **changes}
    trainer = _trainer(tokenizer, copy.deepcopy(old_model), tmp_path, build(tokenizer), **settings)
    rows = list(trainer.train_dataset)
    batch = trainer.data_collator([{key: row[key] for key in row if key in COLLATED} for row in rows])
    trainer.state.max_steps, trainer.callback_handler.train_dataloader = 2, [batch, batch]
    batches = iter([batch, batch])
    (first,), num_items = trainer.get_batch_samples(batches, 1, trainer.args.device)
    assert first["old_log_probs"] is None and trainer.model.training
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model = copy.deepcopy(double_model())
    model.load_state_dict(trainer.model.state_dict())
    (second,), _ = trainer.get_batch_samples(batches, 1, trainer.args.device)
    loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(second), num_items_in_batch=num_items)
    loss.backward()
    truth, expected = true_gradients(
        model, documents(rows), cold_start_loss="psft", old_model=old_model, clip_high=0.1
    )
    torch.testing.assert_close(loss.detach(), truth, rtol=TOLERANCE, atol=TOLERANCE, check_dtype=False)
    assert_close_by_name(gradients(trainer.model), expected, rtol=TOLERANCE, atol=TOLERANCE)
    low_share = trainer._sums["train"].low_weights / trainer._sums["train"].tokens
    assert 0.05 < low_share < 0.8  # tokens beyond the clip, and tokens within


def test_gradients_of_a_stream(tokenizer, tmp_path):
    model = double_model()
    rows = prompt_completion_rows().to_iterable_dataset()
    trainer = _trainer(tokenizer, copy.deepcopy(model), tmp_path, rows)
    taken = list(trainer.train_dataset)
    assert len(taken) == len(PAIRS)
    _assert_gradients(trainer, model, taken)


def test_gradients_of_formatted_rows(tokenizer, tmp_path):
    model = double_model()
    rows = Dataset.from_list([{"question": prompt, "answer": answer} for prompt, answer in PAIRS])
    trainer = AESLSFTTrainer(
        model=copy.deepcopy(model),
        args=small_config(tmp_path),
        train_dataset=rows,
        processing_class=tokenizer,
        formatting_func=lambda row: f"Q: {row['question']} A: {row['answer']}",
    )
    _assert_gradients(trainer, model, list(trainer.train_dataset))


@pytest.mark.parametrize("mode", PACKED)
def test_packed_batches_hold_several_documents(mode, tokenizer, tmp_path):
    """The modes above test isolation only if documents share a row."""
    build, changes = MODES[mode]
    trainer = _trainer(tokenizer, double_model(), tmp_path, build(tokenizer), **changes)
    rows = list(trainer.train_dataset)
    batch = trainer.data_collator([{key: row[key] for key in row if key in COLLATED} for row in rows])
    assert batch["input_ids"].size(0) == 1
    assert len(documents(rows)) >= 5
    assert "attention_mask" not in batch


def test_borders_without_seq_idx_are_found_from_positions(tokenizer, tmp_path):
    """TRL 1.15 hands over no seq_idx."""
    build, changes = MODES["bfd"]
    trainer = _trainer(tokenizer, double_model(), tmp_path, build(tokenizer), **changes)
    batch = trainer.data_collator([{key: row[key] for key in row if key in COLLATED} for row in trainer.train_dataset])
    older = {key: value for key, value in batch.items() if key != "seq_idx"}
    losses = [trainer.compute_loss(trainer.model, dict(inputs), num_items_in_batch=10) for inputs in (batch, older)]
    assert losses[0].item() == losses[1].item()


@pytest.mark.parametrize("cold_start_loss", ["aesl", "nll"])
def test_an_all_masked_batch_gives_a_differentiable_zero(cold_start_loss, tokenizer, tmp_path):
    trainer = _trainer(tokenizer, double_model(), tmp_path, prompt_completion_rows(), cold_start_loss=cold_start_loss)
    input_ids = torch.arange(12).reshape(2, 6)
    batch = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": torch.full_like(input_ids, -100),
    }
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(7))
    loss.backward()
    assert loss.item() == 0.0
    assert all(gradient.abs().max() == 0 for gradient in gradients(trainer.model).values())
