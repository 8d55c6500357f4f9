"""A training goes on only with what its steps so far were trained with, and run.json says what that was."""

import json
import os

import pytest
from datasets import Dataset, load_dataset
from peft import LoraConfig
from small_runs import PAIRS, cpu_settings, prompt_completion_rows, trainer_for
from tiny_models import build_model
from trl import SFTConfig, SFTTrainer

from aesl_trl import DiversityCallback
from aesl_trl.errors import InputError
from aesl_trl.files import OWN, RUN
from aesl_trl.training.trained_with import data_digest


# ---- The rows, by content


def test_equal_rows_have_one_digest_wherever_they_lie(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": f"Frage {n} ü"}], "completion": f" {n}"} for n in range(1500)]
    given = Dataset.from_list(rows)
    given.to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    loaded = [
        load_dataset(kind, data_files=str(tmp_path / name), split="train", cache_dir=str(tmp_path / "cache"))
        for kind, name in (("parquet", "rows.parquet"), ("json", "rows.jsonl"))
    ]
    padded = Dataset.from_list([{**row, "tools": None} for row in rows])
    digests = {data_digest(one) for one in (given, *loaded, padded, given.select(range(1500)))}
    assert len(digests) == 1 and digests.pop().startswith("1500 rows, sha256 ")
    others = (rows[::-1], rows[:-1], [{**rows[0], "completion": "x"}, *rows[1:]])
    assert len({data_digest(Dataset.from_list(one)) for one in (rows, *others)}) == 4


def test_token_ids_and_streams():
    ids = [{"input_ids": [1, 2], "labels": [-100, 2]}, {"input_ids": [3], "labels": [3]}]
    moved = [{"input_ids": [1], "labels": [-100]}, {"input_ids": [2, 3], "labels": [2, 3]}]
    assert data_digest(Dataset.from_list(ids)) != data_digest(Dataset.from_list(moved))
    assert data_digest(Dataset.from_list(ids)) == data_digest(Dataset.from_list(moved + ids).select([2, 3]))
    assert data_digest(Dataset.from_list(ids).to_iterable_dataset()) is None


# ---- AESLSFTTrainer in a user's own script

RUN_SETTINGS = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "cold_start_loss": "nll"}


def lora(**changes):
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **changes})


@pytest.fixture(scope="module")
def run(tokenizer, tiny_model_dir, tmp_path_factory):
    """Train two steps of nll with LoRA, and return the folder."""
    folder = tmp_path_factory.mktemp("run")
    trainer_for(tokenizer, folder, tiny_model_dir, peft_config=lora(), **RUN_SETTINGS).train()
    return folder


def test_the_same_goes_on_and_the_record_keeps_what_earlier_steps_had(run, tokenizer, tiny_model_dir):
    rows = Dataset.from_list(list(prompt_completion_rows()))
    # The model is named by another path, and what does not change the steps so far may be another
    model = os.path.relpath(tiny_model_dir)
    changes = {**RUN_SETTINGS, "max_steps": 3, "logging_steps": 3, "save_steps": 5, "gradient_accumulation_steps": 2}
    resumed = trainer_for(tokenizer, run, model, rows, peft_config=lora(), **changes)
    resumed.train(resume_from_checkpoint="true")
    assert resumed.state.global_step == 3
    record = json.loads((run / OWN / RUN).read_text())
    assert record["gradient_accumulation_steps"] == 2 and record["max_steps"] == 3
    assert record["earlier"] == [{"until_step": 2, "gradient_accumulation_steps": 1, "max_steps": 2}]


def other_model(tokenizer, tmp_path):
    build_model(tokenizer, seed=5).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    return str(tmp_path / "other")


@pytest.mark.parametrize(
    ("given", "changes", "part"),
    [
        (
            {"rows": prompt_completion_rows(PAIRS[::-1])},
            {},
            "training_data is 5 rows, sha256 .*, it was 5 rows",
        ),
        ({}, {"cold_start_loss": "dft"}, "cold_start_loss is dft, it was nll"),
        ({"model": other_model}, {}, "the model .*other has other weights than .* had"),
        ({"peft_config": lora(r=4)}, {}, "peft.r is 4, it was 2"),
        ({"peft_config": None}, {}, "peft is unset, it was LORA"),
        ({}, {"max_length": 7}, "max_length is 7, it was 1024"),
        ({}, {"learning_rate": 0.5}, "learning_rate is 0.5, it was 0.01"),  # the optimizer would keep its own
    ],
)
def test_something_else_is_refused(given, changes, part, run, tokenizer, tiny_model_dir, tmp_path):
    before = (run / OWN / RUN).read_text()
    given = {"model": tiny_model_dir, "peft_config": lora(), **given}
    if callable(given["model"]):
        given["model"] = given["model"](tokenizer, tmp_path)
    trainer = trainer_for(tokenizer, run, **given, **{**RUN_SETTINGS, **changes})
    with pytest.raises(InputError, match=f"checkpoint-2 was trained with something else: {part}.*another output_dir"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert trainer.state.global_step == 0 and (run / OWN / RUN).read_text() == before


def test_of_an_older_record_what_is_there_is_compared(tokenizer, tmp_path):
    settings = {**RUN_SETTINGS, "max_steps": 1, "save_steps": 1}
    trainer_for(tokenizer, tmp_path, **settings).train()
    path = tmp_path / OWN / RUN
    record = json.loads(path.read_text())
    path.write_text(json.dumps({name: record[name] for name in ("stage", "cold_start_loss", "model", "seed")}))
    with pytest.raises(InputError, match="cold_start_loss is dft, it was nll"):
        trainer_for(tokenizer, tmp_path, **{**settings, "cold_start_loss": "dft"}).train("true")
    other = trainer_for(tokenizer, tmp_path, rows=prompt_completion_rows(PAIRS[:3]), **{**settings, "max_steps": 2})
    other.train(True)
    assert other.state.global_step == 2


def test_a_stream_is_said_not_to_be_compared(tokenizer, tmp_path):
    settings = {**RUN_SETTINGS, "max_steps": 1, "save_steps": 1}
    rows = prompt_completion_rows().to_iterable_dataset()
    trainer_for(tokenizer, tmp_path, rows=rows, **settings).train()
    with pytest.warns(UserWarning, match="the training data are a stream"):
        trainer_for(tokenizer, tmp_path, rows=rows, **settings).train("true")


def test_true_without_a_checkpoint_starts_and_says_so(tokenizer, tmp_path, capsys):
    trainer = trainer_for(tokenizer, tmp_path, max_steps=1)
    trainer.train(resume_from_checkpoint="true")
    assert trainer.state.global_step == 1
    assert f"aesl_trl: no whole checkpoint in {tmp_path}: starts from the beginning" in capsys.readouterr().out


# ---- DiversityCallback beside TRL's own trainer


def monitored(tokenizer, model, folder, rows=None, prompts=("2+2=", "x"), **changes):
    settings = cpu_settings(folder, save_strategy="steps", save_steps=1, max_steps=1, **changes)
    rows = prompt_completion_rows() if rows is None else rows
    trainer = SFTTrainer(model, SFTConfig(**settings), train_dataset=rows, processing_class=tokenizer)
    trainer.add_callback(DiversityCallback(trainer, list(prompts), steps=1, samples=2, max_new_tokens=2))
    return trainer


def test_beside_trls_trainer(tokenizer, tiny_model_dir, tmp_path):
    monitored(tokenizer, tiny_model_dir, tmp_path).train()
    for given, part in (
        ({"prompts": ("2+2=", "y")}, "measured on other prompts: prompt 1 \\(from 0\\) is 'y', it was 'x'"),
        ({"rows": prompt_completion_rows(PAIRS[::-1])}, "training_data is 5 rows"),
        ({"loss_type": "dft"}, "loss_type is dft, it was nll"),
    ):
        with pytest.raises(InputError, match=part):
            monitored(tokenizer, tiny_model_dir, tmp_path, **given).train(resume_from_checkpoint=True)
    same = monitored(tokenizer, tiny_model_dir, tmp_path)
    same.args.max_steps = 2
    same.train(resume_from_checkpoint=True)
    assert same.state.global_step == 2
