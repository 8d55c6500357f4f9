"""What both trainings share: one training at a time in a folder, how it may be left, how long it has left."""

import os
import re
from types import SimpleNamespace

import pytest
from held_locks import held_elsewhere
from small_runs import cpu_settings, prompt_completion_rows, trainer_for
from tiny_models import build_model
from transformers import TrainerState
from trl import SFTConfig, SFTTrainer

from aesl_trl import DiversityCallback, files
from aesl_trl.errors import InputError
from aesl_trl.processes import MARK, lock, lock_beside
from aesl_trl.training import session
from aesl_trl.training.session import TimeLeft


@pytest.fixture
def clock(monkeypatch):
    times = iter(range(0, 10**6, 30))  # 30 s a step
    monkeypatch.setattr(session.time, "monotonic", lambda: next(times))


def steps(callback, first, last, *, max_steps, main=True):
    callback.on_train_begin(None, None, None)
    for step in range(first, last + 1):
        state = TrainerState(global_step=step, max_steps=max_steps, is_world_process_zero=main)
        callback.on_step_end(None, state, None)


def test_the_pace_is_said_after_the_first_steps(clock, capsys):
    steps(TimeLeft("aesl sft"), 1, 12, max_steps=252)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].startswith("aesl sft: step 3 of 252, ")
    assert lines[1].startswith("aesl sft: step 11 of 252, ")
    assert lines[1].endswith(", 6 s a step, 24 min left")


def test_the_arithmetic(monkeypatch, capsys):
    now = {"s": 0.0}
    monkeypatch.setattr(session.time, "monotonic", lambda: now["s"])
    callback = TimeLeft("aesl grpo")
    for step, time_s in ((101, 50.0), (102, 100.0), (103, 170.0)):  # resumed: 60 s a step since step 101
        now["s"] = time_s
        state = TrainerState(global_step=step, max_steps=403, is_world_process_zero=True)
        callback.on_step_end(None, state, None)
    assert capsys.readouterr().out == "aesl grpo: step 103 of 403, 60 s a step, 5.0 h left\n"


def test_other_processes_and_the_last_step_are_silent(clock, capsys):
    steps(TimeLeft("x"), 1, 12, max_steps=252, main=False)
    steps(TimeLeft("x"), 1, 3, max_steps=3)
    assert capsys.readouterr().out == ""


def test_a_real_training_without_a_progress_bar_says_it(tokenizer, tmp_path, capsys):
    trainer = trainer_for(tokenizer, tmp_path, max_steps=4, disable_tqdm=True)
    trainer.add_callback(TimeLeft("aesl sft"))
    trainer.train()
    assert re.search(r"^aesl sft: step 3 of 4, \S+ s a step, \S+ s left$", capsys.readouterr().out, re.MULTILINE)


# ---- One training at a time in a folder


def own(tokenizer, folder):
    return trainer_for(tokenizer, folder, max_steps=1)


def plain_with_callback(tokenizer, folder):
    """TRL's trainer takes no lock: DiversityCallback does."""
    model = build_model(tokenizer)
    args = SFTConfig(**cpu_settings(folder, max_steps=1))
    trainer = SFTTrainer(model, args, train_dataset=prompt_completion_rows(), processing_class=tokenizer)
    trainer.add_callback(DiversityCallback(trainer, ["2+2="], steps=1, samples=2, max_new_tokens=2))
    return trainer


@pytest.mark.parametrize("build", [own, plain_with_callback])
def test_no_training_begins_where_another_process_trains(build, tokenizer, tmp_path):
    out = tmp_path / "out"
    trainer, taken = build(tokenizer, out), out / files.OWN / files.TRAINING_LOCK
    with held_elsewhere(taken), pytest.raises(InputError, match=f"^another training is at work in {out}: end it"):
        trainer.train()
    assert trainer.state.global_step == 0 and not (out / files.OWN / files.RUN).exists()
    trainer.train()  # the other one was killed
    assert trainer.state.global_step == 1 and os.listdir(tmp_path) == ["out"]
    with lock(taken, "it is still held"):
        pass


@pytest.mark.parametrize("build", [own, plain_with_callback])
def test_a_training_that_an_error_ends_leaves_the_folder_to_the_next(build, tokenizer, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise ZeroDivisionError

    trainer = build(tokenizer, tmp_path)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(trainer, "training_step", fail)
        trainer.train()
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_stage_trains_under_the_lock_of_its_chain_and_nobody_else_does(tokenizer, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with held_elsewhere(lock_beside(out)):
        with pytest.raises(InputError, match=f"^a chain is at work with {out}: end it first, or name another output_"):
            own(tokenizer, out).train()
        monkeypatch.setenv(MARK, str(out))
        own(tokenizer, out).train()


def test_only_the_first_process_takes_the_lock(tmp_path):
    with session.training_lock(SimpleNamespace(output_dir=str(tmp_path), process_index=1)):
        assert not os.listdir(tmp_path)


# ---- How a training may be left


def left(tmp_path, code):
    args = SimpleNamespace(output_dir=str(tmp_path), process_index=0)
    with session.guarded_training(args, SimpleNamespace(received=None, command="aesl sft")):
        raise SystemExit(code)


@pytest.mark.parametrize("code", [0, None])
def test_a_training_that_is_left_with_0_has_failed(tmp_path, code):
    """A package or a callback that calls sys.exit() ends the process as if all steps were done."""
    with pytest.raises(InputError, match=r"sys.exit at .*test_session.py:\d+ ended the training before its end"):
        left(tmp_path, code)


@pytest.mark.parametrize("code", [1, 3, 143])
def test_an_exit_with_a_code_keeps_it(tmp_path, code):
    with pytest.raises(SystemExit) as leaving:
        left(tmp_path, code)
    assert leaving.value.code == code
