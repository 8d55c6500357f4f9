"""The `aesl` command hands its arguments to the module of the sub-command.

No module is imported before the sub-command is known: `aesl --help` must not wait for torch.
"""

import sys
from importlib import import_module

from . import __version__
from .errors import InputError, exit_on_input_error, nearest


# name: (module with main(argv), line of the help)
COMMANDS = {
    "data": ("data.prepare", "write demonstrations, RL prompts and held-out prompts from a dataset"),
    "sft": ("sft", "train the cold start, in this process"),
    "grpo": ("grpo", "train with RL from it, in this process"),
    "chain": ("chain.chain", "run the whole story: sft, select, handoff, probe, grpo, eval, report"),
    "select": ("diversity.selection", "choose the checkpoint of a cold start that goes to RL"),
    "handoff": ("models.handoff", "make the folder that RL starts from, and check it"),
    "mix": ("evaluation.mix", "average a cold start's checkpoint with its base (WiSE-FT), as candidates for RL"),
    "probe": ("evaluation.probe", "judge whether a checkpoint is ready for RL, with reasons"),
    "eval": ("evaluation.evaluate", "measure pass@k and diversity before and after RL"),
    "interpolate": ("models.interpolate", "average two checkpoints of one run (WiSE-FT)"),
    "compare": ("compare.compare", "run methods x seeds from cold start to RL: table with intervals, tuning, plots"),
    "report": ("report.report", "write a run's figures as HTML, PNG and markdown"),
    "recipes": ("recipes.recipes", "list the recipes, copy them to a folder of your own, or check them"),
}
USAGE = """\
usage: aesl COMMAND [--config FILE] [arguments]

The cold start for reinforcement learning, on TRL.

{commands}

aesl COMMAND --help lists a command's arguments; aesl --version prints the version.
On several GPUs: accelerate launch -m aesl_trl.sft (or aesl_trl.grpo), or aesl chain, which does that."""


def main(argv: list[str] | None = None) -> None:
    """Run a sub-command. Where its input is wrong, print one line on stderr and leave with exit code 2."""
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help", "help"):
        print(USAGE.format(commands="\n".join(f"  {name:11}  {line}" for name, (_, line) in COMMANDS.items())))
    elif command in ("-V", "--version"):
        print(f"aesl_trl {__version__}")
    else:
        exit_on_input_error(f"aesl {command}" if command in COMMANDS else "aesl", lambda: _run(command, rest))


def _run(command: str, argv: list[str]) -> None:
    if command not in COMMANDS:
        raise InputError(f"unknown command {command!r}{nearest(command, COMMANDS)} (one of {', '.join(COMMANDS)})")
    import_module(f".{COMMANDS[command][0]}", __package__).main(argv)


if __name__ == "__main__":
    main()
