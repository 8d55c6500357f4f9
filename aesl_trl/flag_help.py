"""The help of a command: its texts (commands.py), our flags first, and those of TRL and transformers if asked for."""

import argparse
import dataclasses
from collections.abc import Sequence

from .commands import CONFIG_FLAG, command_of


# A field under another flag: the probe's `output`, as its config's output_dir is RL's (see probe.main).
SHOWN_AS = {"--output": "--output_dir"}
THEIRS = ("trl.", "transformers.")  # the modules whose fields are not ours


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults that say something, and each flag in one spelling, with _."""

    def __init__(self, prog: str, **options):
        super().__init__(prog, max_help_position=34, **options)

    def _get_default_metavar_for_optional(self, action):
        return {int: "N", float: "X"}.get(action.type, "VALUE")

    def _format_action_invocation(self, action):
        spellings, action.option_strings = action.option_strings, _shown_spellings(action.option_strings)
        text = super()._format_action_invocation(action)
        action.option_strings = spellings
        return text

    def _get_help_string(self, action):
        says_nothing = action.default is None or action.default is False or action.default in ("", [])
        return action.help if says_nothing else super()._get_help_string(action)


def _shown_spellings(flags: Sequence[str]) -> list[str]:
    """Drop a flag with - where its spelling with _ is there too, and name a flag as it is given."""
    return [
        SHOWN_AS.get(flag, flag)
        for flag in flags
        if "-" not in flag[2:] or f"--{flag[2:].replace('-', '_')}" not in flags
    ]


def help_of(parser: argparse.ArgumentParser, dataclass_types: Sequence[type], shows_all: bool) -> str:
    """Return a command's help: what it needs, our flags, and with `shows_all` those of TRL and transformers."""
    command, formatter = command_of(parser.prog), parser._get_formatter()
    formatter.add_usage(f"{parser.prog} {command.usage}", [], [])
    formatter.add_text(command.description)
    ours = set().union(*map(_own_fields, dataclass_types))
    needed = {CONFIG_FLAG[2:], "help", "help_all", *(name for needs in command.needs for name in needs)}
    actions = [argparse.Action([CONFIG_FLAG], CONFIG_FLAG[2:], metavar="FILE", help="YAML file; flags win over it")]
    if ours != {field.name for kind in dataclass_types for field in dataclasses.fields(kind)}:
        text = "show the flags of TRL and transformers too"
        actions.append(argparse.Action(["--help_all"], "help_all", nargs=0, help=text))
    hidden = {SHOWN_AS[flag][2:] for flag in SHOWN_AS if flag[2:] in ours}  # TRL's flags that ours stand before
    actions += [each for each in parser._actions if each.help != argparse.SUPPRESS and each.dest not in hidden]
    groups = {
        "what it needs": [action for action in actions if action.dest in needed],
        "flags of aesl_trl": [action for action in actions if action.dest in ours - needed],
        "flags of TRL and transformers": [action for action in actions if action.dest not in ours | needed],
    }
    for title, group in groups.items():
        if group and (shows_all or not title.endswith("transformers")):
            formatter.start_section(title)
            formatter.add_arguments(group)
            formatter.end_section()
    formatter.add_text(command.epilog)
    return formatter.format_help()


def _own_fields(kind: type) -> set[str]:
    """Return the names of the fields that aesl_trl adds to a dataclass of TRL's, or all of its own dataclass."""
    theirs = [base for base in kind.__mro__ if dataclasses.is_dataclass(base) and base.__module__.startswith(THEIRS)]
    known = {field.name for base in theirs for field in dataclasses.fields(base)}
    return {field.name for field in dataclasses.fields(kind)} - known
