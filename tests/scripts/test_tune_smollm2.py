"""The rates of the real model: which trainings are run, which figure judges them, and what is recorded."""

import sys

import pytest
import tune_smollm2 as tune

from aesl_trl import files
from aesl_trl.errors import InputError


def test_a_rate_is_judged_by_the_last_evaluation_or_the_last_rewards():
    log = [{"eval_nll": 0.9, "step": 0}, {"eval_nll": 0.4, "step": 25}, {"train_loss": 0.5}]
    assert tune.figure("sft", log) == 0.4
    rewards = [{"step": step, "reward": reward} for step, reward in enumerate([9.0] * 50 + [0.25] * 5 + [0.75] * 5)]
    assert tune.figure("rl", [*rewards, {"train_loss": 0.1}]) == 0.5


@pytest.mark.parametrize(
    ("stage", "figures", "best"),
    [
        ("sft", {"2e-5": 0.5, "5e-5": 0.3, "1e-4": 0.4}, "5e-5"),
        ("rl", {"3e-6": 0.5, "1e-5": 0.3, "3e-5": 0.4}, "3e-6"),
        ("sft", {"1e-4": 0.3, "5e-5": 0.3, "2e-5": 0.4}, "5e-5"),  # of equals the lower rate
    ],
)
def test_sft_takes_the_lowest_nll_and_rl_the_highest_reward(stage, figures, best):
    assert tune.choose(stage, figures) == best


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Return the script's command, whose trainings only write their logs, and what it trained."""
    calls, base = [], tmp_path / "base"
    base.mkdir()

    def aesl(command, *flags):
        given = dict(zip(flags[::2], flags[1::2], strict=True))
        calls.append((command, given["--learning_rate"], given["--seed"], given.get("--num_train_epochs")))
        run, rate = given["--output_dir"], float(given["--learning_rate"])
        row = {"eval_nll": abs(rate - 5e-5)} if command == "sft" else {"reward": rate}
        own = files.own_folder(run) if command == "sft" else run
        files.write_json(own / files.TRAINER_STATE, {"log_history": [{"step": 25, **row}]})

    def run(*flags):
        argv = ["", "--base", base, "--work_dir", tmp_path / "work", "--record", tmp_path / "rates.json", *flags]
        monkeypatch.setattr(sys, "argv", [*map(str, argv)])
        tune.main()
        return files.read_json(tmp_path / "rates.json")

    monkeypatch.setattr(tune, "aesl", aesl)
    run.calls, run.base = calls, base
    return run


def test_each_rate_is_trained_once_and_the_best_recorded(command, capsys):
    (command.base / "model.safetensors").write_bytes(b"weights")
    record = command("--stages", "sft")
    assert command.calls == [("sft", rate, 100, "1") for rate in ("2e-5", "5e-5", "1e-4")]
    assert list(record) == ["sft"] and record["sft"]["chosen"] == "5e-5"
    assert "set learning_rate: 5e-5" in capsys.readouterr().out
    record = command()  # SFT's are there
    assert command.calls[3:] == [("grpo", rate, 100, None) for rate in ("3e-6", "1e-5", "3e-5")]
    assert (record["sft"]["chosen"], record["rl"]["chosen"]) == ("5e-5", "3e-5")
    (command.base / "model.safetensors").write_bytes(b"another base")
    command("--stages", "rl")
    assert len(command.calls) == 9
    record = command("--stages", "sft", "--num_train_epochs", "2")  # a flag of aesl sft comes after the script's own
    assert [call[3] for call in command.calls[9:]] == ["2"] * 3
    assert record["sft"]["flags"][-2:] == ["--num_train_epochs", "2"]


def test_a_missing_base_names_the_script_that_builds_it(command):
    with pytest.raises(InputError, match="holds no weights: first run python scripts/build_smollm2_base.py"):
        command()
