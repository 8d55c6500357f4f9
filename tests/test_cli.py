"""cli: dispatch, help, what a command loads, and one-line refusals; the names that the package exports."""

import importlib
import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

import aesl_trl
import aesl_trl.diversity
import aesl_trl.losses
from aesl_trl import __version__, cli, files
from aesl_trl.errors import InputError


ROOT = Path(__file__).parents[1]


def aesl(*argv):
    command = [sys.executable, "-m", "aesl_trl.cli", *argv]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_command(argv, capsys):
    cli.main(argv)
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in cli.COMMANDS)


def test_every_command_has_its_module():
    for command in cli.COMMANDS.values():
        assert importlib.util.find_spec(f"aesl_trl.{command.module}") is not None, command.module


def loaded_by(*argv) -> set[str]:
    """Run a command in a process of its own, and return the names of the libraries that it loaded."""
    code = (
        "import sys; from aesl_trl import cli; cli.main(sys.argv[1:])\n"
        "print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, *map(str, argv)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines()[-1].split())


@pytest.fixture
def run_folder(tmp_path) -> Path:
    """Write a cold start's folder with three measurements and two candidates, and the evaluation of a chain."""
    series = [
        {"step": step, "entropy": entropy, "self_bleu": 0.5} for step, entropy in ((0, 1.0), (5, 2.0), (10, 1.5))
    ]
    samples = [{"prompt": "1 + 1 =", "completions": ["2", "3"], "num_tokens": [1, 1], "entropy": [0.1, 0.2]}]
    figures = {"start": {"pass@1": 0.1, "pass@8": 0.4}, "final": {"pass@1": 0.3, "pass@8": 0.5}}
    files.write_json(tmp_path / files.RUN, {"stage": "sft", "cold_start_loss": "nll", "selection": "last"})
    files.write_jsonl(tmp_path / files.DIVERSITY, series)
    files.write_jsonl(tmp_path / files.SAMPLES / "step-10.jsonl", samples)
    files.write_json(tmp_path / files.TRAINER_STATE, {"log_history": [{"step": 5, "loss": 2.0, "entropy": 1.0}]})
    files.write_json(tmp_path / files.EVALUATION, {"models": figures})
    for step in (5, 10):
        files.write_text(tmp_path / files.CANDIDATES / f"step-{step}" / "model.safetensors", "")
    return tmp_path


HEAVY = {"torch", "trl", "transformers", "accelerate", "datasets"}


def test_help_waits_for_no_library():
    for flag in ("--help", "--version"):
        assert not loaded_by(flag) & {*HEAVY, "yaml", "numpy", "matplotlib"}


def test_selection_and_report_load_no_torch(run_folder):
    assert not loaded_by("select", run_folder) & HEAVY
    assert files.read_json(run_folder / files.SELECTION)["step"] == 10
    assert not loaded_by("report", run_folder) & HEAVY
    assert (run_folder / files.REPORT).stat().st_size > 10000


# ---- The names that users import


@pytest.mark.parametrize("room", [aesl_trl, aesl_trl.losses, aesl_trl.diversity])
def test_each_public_name_is_there(room):
    for name in room.__all__:
        value = getattr(importlib.import_module(room.__name__), name)
        assert not inspect.ismodule(value), name


def test_public_names_by_from_import():
    from aesl_trl import AESLSFTConfig, AESLSFTTrainer, DiversityCallback
    from aesl_trl.diversity import find_turning_point, self_bleu
    from aesl_trl.losses import TokenRule, aesl_weights

    assert issubclass(AESLSFTConfig, SFTConfig) and issubclass(AESLSFTTrainer, SFTTrainer)
    assert issubclass(DiversityCallback, TrainerCallback)
    assert all(map(callable, (find_turning_point, self_bleu, TokenRule, aesl_weights)))


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'aesl_trl' has no attribute 'AESLTrainer'"):
        aesl_trl.AESLTrainer  # noqa: B018


def test_version(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out == f"aesl_trl {__version__}\n"


def test_unknown_command():
    done = aesl("sfft", "--config", "x")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("aesl: unknown command 'sfft'; did you mean 'sft'?")


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_dispatch(command, monkeypatch):
    seen, path = [], f".{cli.COMMANDS[command].module}"
    module = SimpleNamespace(main=seen.append)
    monkeypatch.setattr(cli, "import_module", lambda name, package: {path: module}[name])
    cli.main([command, "--seed", "3", "--help"])
    assert seen == [["--seed", "3", "--help"]]


def test_refusal_is_one_line_and_exit_code_2(monkeypatch, capsys):
    def main(argv):
        raise InputError("two\nlines")

    monkeypatch.setattr(cli, "import_module", lambda name, package: SimpleNamespace(main=main))
    with pytest.raises(SystemExit) as leaving:
        cli.main(["grpo", "--help"])
    assert leaving.value.code == 2
    assert capsys.readouterr().err == "aesl grpo: two lines\n"


def test_a_stages_own_exit_code_passes(monkeypatch):
    monkeypatch.setattr(cli, "import_module", lambda name, package: SimpleNamespace(main=lambda argv: sys.exit(3)))
    with pytest.raises(SystemExit) as leaving:
        cli.main(["sft", "--help"])
    assert leaving.value.code == 3


@pytest.mark.slow
@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_every_commands_help_works(command):
    done = aesl(command, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


@pytest.mark.parametrize("command", ["select", "report"])
def test_the_command_imports_nothing_from_the_current_folder(command, tmp_path):
    for name in ("yaml.py", "psutil.py", "matplotlib.py", "aesl_trl.py"):
        (tmp_path / name).write_text("open('foreign', 'w')\n")
    line = [Path(sys.executable).with_name("aesl"), command, "no-such-run"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "no-such-run is not a folder" in done.stderr, done.stderr
    assert not (tmp_path / "foreign").exists()
