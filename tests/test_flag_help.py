"""flag_help and commands: what a person reads who asks a command for help."""

import re

import pytest
from trl import SFTConfig

from aesl_trl import cli, first_checks
from aesl_trl.commands import COMMANDS, CONFIG


def help_of(command, capsys, flag="--help") -> str:
    with pytest.raises(SystemExit) as leaving:
        cli.main([command, flag])
    assert leaving.value.code in (0, None)
    return capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("recipes", "env")])
def test_each_help_has_a_description_a_usage_line_examples_and_exit_codes(name, capsys):
    command, text = COMMANDS[name], help_of(name, capsys)
    assert text.startswith(f"usage: aesl {name} ")
    assert " ".join(text[: text.index("\n\n")].split()) == f"usage: aesl {name} {command.usage}"
    assert command.line[1:] in text and all(f"\n  {example}\n" in text for example in command.examples)
    assert "exit codes:" in text and len(command.examples) == 2
    assert ("--config" in text) == command.reads_config
    assert text.count("\n") < 190


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_are_of_their_command_and_the_usage_names_its_positionals(name):
    command = COMMANDS[name]
    assert all(f"aesl {name} " in f"{line} " or f"aesl_trl.{name} " in line for line in command.examples)
    assert all(each in command.usage for each in command.names)
    assert (CONFIG in command.usage) == command.reads_config


def test_our_flags_come_first_and_trls_are_asked_for(capsys):
    text = help_of("sft", capsys)
    assert "--t_scaling" in text and "--diversity_steps" in text and "--learning_rate" not in text
    assert not re.search("--[a-z]+-[a-z]+", text), "a flag in two spellings"
    whole = help_of("sft", capsys, "--help_all")
    ours, theirs = whole.split("flags of TRL and transformers:")
    assert "--t_scaling" in ours and "--t_scaling" not in theirs
    assert all(f"--{name} " in theirs for name in ("learning_rate", "pad_token", "model_revision"))
    assert {*first_checks.MARKS["sft"]} - SFTConfig.__dataclass_fields__.keys() <= {*re.findall(r"--(\w+)", ours)}


def test_a_command_without_fields_of_trl_has_no_help_all(capsys):
    assert "--help_all" not in help_of("handoff", capsys)


@pytest.mark.parametrize("name", COMMANDS)
def test_no_help_shows_an_old_name(name, capsys):
    text = help_of(name, capsys, "--help_all" if {"sft", "grpo", "probe", "mix"} & {name} else "--help")
    assert not re.search(r"--(output|out|samples|diversity_samples)\b", text)


def test_the_probes_output_is_shown_as_it_is_given_and_rls_is_not(capsys):
    text = help_of("probe", capsys, "--help_all")
    assert text.count("--output_dir VALUE") == 1 and "Folder for readiness.json" in text


def test_a_default_of_0_is_shown(capsys):
    (line,) = re.findall(r"  --seed N +(.+)", help_of("eval", capsys))
    text = " ".join(help_of("eval", capsys).split())
    assert line and "Seed of the samples and of a dataset that a function builds. (default: 0)" in text
    assert "System message before each benchmark problem. --" in text, "an empty text says nothing"
