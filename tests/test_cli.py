"""cli: dispatch, help and one-line refusals of the `aesl` command."""

import importlib.util
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from aesl_trl import __version__, cli
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
    for module, _ in cli.COMMANDS.values():
        assert importlib.util.find_spec(f"aesl_trl.{module}") is not None, module


def test_help_waits_for_no_library():
    code = (
        "import sys; from aesl_trl import cli; cli.main(['--help']); cli.main(['--version'])\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'trl', 'transformers', 'datasets', 'yaml')))"
    )
    start = time.monotonic()
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0
    assert time.monotonic() - start < 5


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
    seen = []
    module = SimpleNamespace(main=seen.append)
    monkeypatch.setattr(cli, "import_module", lambda name, package: {f".{cli.COMMANDS[command][0]}": module}[name])
    cli.main([command, "--config", "x.yaml", "--seed", "3"])
    assert seen == [["--config", "x.yaml", "--seed", "3"]]


def test_refusal_is_one_line_and_exit_code_2(monkeypatch, capsys):
    def main(argv):
        raise InputError("two\nlines")

    monkeypatch.setattr(cli, "import_module", lambda name, package: SimpleNamespace(main=main))
    with pytest.raises(SystemExit) as leaving:
        cli.main(["grpo"])
    assert leaving.value.code == 2
    assert capsys.readouterr().err == "aesl grpo: two lines\n"


def test_a_stages_own_exit_code_passes(monkeypatch):
    monkeypatch.setattr(cli, "import_module", lambda name, package: SimpleNamespace(main=lambda argv: sys.exit(3)))
    with pytest.raises(SystemExit) as leaving:
        cli.main(["sft"])
    assert leaving.value.code == 3


@pytest.mark.slow
@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_every_commands_help_works(command):
    done = aesl(command, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
