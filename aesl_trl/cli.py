"""The `aesl` command hands its arguments to the module of the sub-command.

No module is imported before the sub-command is known: `aesl --help` must not wait for torch. Nor is torch imported for
arguments that cannot be used whatever the rest is (first_checks.py).
"""

import sys
from importlib import import_module

from . import __version__
from .commands import COMMANDS
from .errors import InputError, exit_on_input_error, nearest


USAGE = """\
usage: aesl COMMAND [CONFIG.yaml] [arguments]

The cold start for reinforcement learning, on TRL.

{commands}

aesl COMMAND --help lists a command's arguments; aesl --version prints the version.
On several GPUs: accelerate launch -m aesl_trl.sft (or aesl_trl.grpo), or aesl chain, which does that."""


def main(argv: list[str] | None = None) -> None:
    """Run a sub-command. Where its input is wrong, print one line on stderr and leave with exit code 2."""
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help", "help"):
        lines = (f"  {name:11}  {each.line}" for name, each in COMMANDS.items())
        print(USAGE.format(commands="\n".join(lines)))
    elif command in ("-V", "--version"):
        print(f"aesl_trl {__version__}")
    else:
        exit_on_input_error(f"aesl {command}" if command in COMMANDS else "aesl", lambda: _run(command, rest))


def _run(command: str, argv: list[str]) -> None:
    if command not in COMMANDS:
        raise InputError(f"unknown command {command!r}{nearest(command, COMMANDS)} (one of {', '.join(COMMANDS)})")
    from .first_checks import check  # it reads YAML, and the lines above wait for no library

    check(command, argv)
    import_module(f".{COMMANDS[command].module}", __package__).main(argv)


if __name__ == "__main__":
    main()
