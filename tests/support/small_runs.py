"""For the trainer's tests: tiny demonstrations, settings for one CPU core, and the true loss from plain logits."""

import copy
from functools import cache

import torch
from datasets import Dataset
from tiny_models import build_model, build_tokenizer

from aesl_trl import AESLSFTConfig, AESLSFTTrainer
from aesl_trl.losses.definition import aesl_loss, dft_loss, eaft_loss, gem_loss, gold_log_probs, nll_loss, psft_loss


PAIRS = [("2+2=", "4"), ("Name a colour: ", "blue"), ("abc", " defghi jkl"), ("x", "y"), ("reverse 1 2 3: ", "3 2 1")]
LONG_PAIR = ("count: ", " ".join(str(number) for number in range(40)))


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


def prompt_completion_rows(pairs=PAIRS):
    return Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in pairs])


def message_rows(pairs=PAIRS):
    return Dataset.from_list([{"messages": user(prompt) + assistant(completion)} for prompt, completion in pairs])


def text_rows(pairs=PAIRS):
    return Dataset.from_list([{"text": prompt + completion} for prompt, completion in pairs])


def cpu_settings(folder, **changes):
    """Return arguments of an SFTConfig for three small steps on the CPU in float32, each logged, nothing saved."""
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "max_steps": 3,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
    }
    return {**settings, **changes}


def small_config(folder, **changes):
    return AESLSFTConfig(**cpu_settings(folder, **changes))


def trainer_for(
    tokenizer, folder, model=None, rows=None, *, eval_rows=None, peft_config=None, compute_loss_func=None, **changes
):
    return AESLSFTTrainer(
        model=build_model(tokenizer) if model is None else model,
        args=small_config(folder, **changes),
        train_dataset=prompt_completion_rows() if rows is None else rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        peft_config=peft_config,
        compute_loss_func=compute_loss_func,
    )


def documents(dataset):
    """Return the documents of a prepared dataset, packed or not, as a list of (input_ids, labels)."""
    found = []
    for row in dataset:
        start = 0
        for length in row.get("seq_lengths") or [len(row["input_ids"])]:
            found.append((row["input_ids"][start : start + length], row["labels"][start : start + length]))
            start += length
    return found


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


DEFINITIONS = {
    "aesl": aesl_loss,
    "nll": nll_loss,
    "dft": dft_loss,
    "gem": gem_loss,
    "psft": psft_loss,
    "eaft": eaft_loss,
}


def true_gradients(model, documents, cold_start_loss="aesl", old_model=None, **loss_arguments):
    """Return loss and gradients by the definition on plain logits, one document at a time: no padding, no packing."""
    num_items = sum(label != -100 for _, labels in documents for label in labels[1:])
    total = 0.0
    for input_ids, labels in documents:
        input_ids, labels = torch.tensor([input_ids]), torch.tensor([labels])[:, 1:]
        if old_model is not None:
            with torch.no_grad():
                loss_arguments["old_log_probs"] = gold_log_probs(old_model(input_ids=input_ids).logits[:, :-1], labels)
        logits = model(input_ids=input_ids).logits[:, :-1]
        total = total + DEFINITIONS[cold_start_loss](logits, labels, num_items=num_items, **loss_arguments)
    model.zero_grad()
    total.backward()
    return total.detach(), gradients(model)


def assert_close_by_name(found, expected, *, rtol, atol):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        difference = (found[name] - value).abs().max().item()
        assert torch.allclose(found[name], value, rtol=rtol, atol=atol), f"{name} is off by {difference}"


def trained_weights(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


@cache
def _fitted_model():
    """Train a model halfway: an untrained one is never right, and all its weights are near 1, which is plain nll."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    texts = [prompt + completion + "<|im_end|>" for prompt, completion in PAIRS]
    chats = [user(prompt) + assistant(completion) for prompt, completion in PAIRS]
    texts += [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.backward()
        optimizer.step()
    return model.double()


def double_model():
    """Return a model in float64 that is sure of some tokens and unsure of others."""
    model = copy.deepcopy(_fitted_model())
    model.zero_grad()
    return model


def steps_of(trainer, key="loss"):
    """Return the logged series of `key`."""
    return [row[key] for row in trainer.state.log_history if key in row]
