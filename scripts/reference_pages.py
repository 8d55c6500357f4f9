#!/usr/bin/env python3
"""Write the pages that repeat what the code says: every key of a config, and how each command is called.

    python scripts/reference_pages.py

docs/reference/config.md is written whole. In docs/commands/NAME.md what stands between the two marks is written, from
the command's entry in aesl_trl/commands.py. A test fails where a page is not what this script would write.
"""

import dataclasses
import json
import types
from argparse import SUPPRESS
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from trl import GRPOConfig, ScriptArguments, SFTConfig

from aesl_trl.chain.config import ChainConfig
from aesl_trl.compare.config import CompareConfig
from aesl_trl.data.config import DataArguments
from aesl_trl.evaluation.evaluate import EvalArguments
from aesl_trl.evaluation.mix import MixArguments
from aesl_trl.evaluation.probe import ProbeArguments
from aesl_trl.models.handoff import HandoffArguments
from aesl_trl.models.interpolate import InterpolateArguments
from aesl_trl.training.config import AESLSFTConfig
from aesl_trl.training.grpo import GRPOScriptArguments
from aesl_trl.training.sft import SFTScriptArguments


DOCS = Path(__file__).resolve().parents[1] / "docs"
CONFIG = DOCS / "reference" / "config.md"
BEGIN, END = "<!-- begin: scripts/reference_pages.py -->", "<!-- end -->"

# A heading, the command, the dataclasses whose fields are keys, and those whose fields are TRL's own
TABLES = (
    ("SFT", "aesl sft", (AESLSFTConfig, SFTScriptArguments), (SFTConfig, ScriptArguments)),
    ("GRPO", "aesl grpo", (GRPOScriptArguments,), (ScriptArguments,)),
    ("Probe", "aesl probe", (ProbeArguments,), (GRPOConfig, GRPOScriptArguments)),
    ("Averages", "aesl mix", (MixArguments,), (SFTScriptArguments,)),
    ("Evaluation", "aesl eval", (EvalArguments,), ()),
    ("Data", "aesl data", (DataArguments,), ()),
    ("Handoff", "aesl handoff", (HandoffArguments,), ()),
    ("Interpolation", "aesl interpolate", (InterpolateArguments,), ()),
)
TREES = (("Chain", "aesl chain", ChainConfig), ("Comparison", "aesl compare", CompareConfig))
HEAD = """# Config keys

Each key is also a flag: `diversity_steps: 50` in a YAML file is `--diversity_steps 50` on a command line.
A key that no stage knows, or a value of another type or out of range, ends in one line before a model loads.

A config may also have TRL's own keys, which are not repeated here: those of
[SFTConfig](https://huggingface.co/docs/trl/sft_trainer#trl.SFTConfig) for SFT, and of
[GRPOConfig](https://huggingface.co/docs/trl/grpo_trainer#trl.GRPOConfig) for GRPO and the probe.
"""


def default_of(field: dataclasses.Field) -> str:
    """Return a field's default as YAML has it; empty where the key must be given."""
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return ""
    if value is None or dataclasses.is_dataclass(value):
        return ""
    return f"`{json.dumps(value)}`" if not isinstance(value, str) or not value else f"`{value}`"


def escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def own_fields(classes: tuple, theirs: tuple) -> list[dataclasses.Field]:
    """Return the fields of `classes` that none of `theirs` has, each name once."""
    taken = {field.name for each in theirs for field in dataclasses.fields(each)}
    found = {field.name: field for each in classes for field in dataclasses.fields(each) if field.name not in taken}
    return list(found.values())


def table(fields: list[dataclasses.Field]) -> list[str]:
    """Return the rows of a table: key, default, what it says, and the choices where it has some."""
    lines = ["| key | default | what |", "| --- | --- | --- |"]
    for field in fields:
        if field.metadata.get("help") == SUPPRESS:  # an old name, which is read for good
            continue
        what = escaped(str(field.metadata.get("help") or ""))
        if choices := field.metadata.get("choices"):
            what += " One of " + ", ".join(f"`{choice}`" for choice in choices) + "."
        lines.append(f"| `{field.name}` | {default_of(field)} | {what} |")
    return lines


def in_words(kind: Any) -> str:
    """Return a type as a reader of YAML knows it."""
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(in_words(each) for each in get_args(kind) if each is not type(None))
    if get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(kind))
    if get_origin(kind) is list:
        return f"list of {in_words(get_args(kind)[0])}"
    names = {str: "text", int: "whole number", float: "number", bool: "`true` or `false`", Any: "any value"}
    return names.get(kind) or "mapping"


def tree(config: type, prefix: str = "") -> list[str]:
    """Return the rows of a nested config's keys, `sft.config` for a key of a section."""
    lines, kinds = [], get_type_hints(config)
    for field in dataclasses.fields(config):
        kind = kinds[field.name]
        parts = [each for each in (kind, *get_args(kind)) if dataclasses.is_dataclass(each)]
        if not parts:
            lines.append(f"| `{prefix}{field.name}` | {default_of(field)} | {in_words(kind)} |")
            continue
        inner = f"{prefix}{field.name}." + ("NAME." if get_origin(kind) is dict else "")
        lines += tree(parts[0], inner)
    return lines


def config_page() -> str:
    """Return docs/reference/config.md."""
    lines = [HEAD]
    for heading, command, classes, theirs in TABLES:
        lines += [f"## {heading}: `{command}`", "", *table(own_fields(classes, theirs)), ""]
    for heading, command, config in TREES:
        about = escaped(config.__doc__ or "")
        lines += [f"## {heading}: `{command}`", "", about, "", "| key | default | value |", "| --- | --- | --- |"]
        lines += [*tree(config), ""]
    return "\n".join(lines).rstrip() + "\n"


def call_of(name: str) -> str:
    """Return how a command is called, with examples and exit codes, from its entry."""
    from aesl_trl.commands import COMMANDS

    command = COMMANDS[name]
    rows = [line.split("  ", 1) for line in command.exits if "  " in line]
    others = [line for line in command.exits if "  " not in line]
    lines = ["## Usage", "", f"    aesl {name} {command.usage}".rstrip(), "", "## Examples", ""]
    lines += [f"    {example}" for example in command.examples]
    lines += ["", "## Exit codes", "", "| code | meaning |", "| --- | --- |"]
    lines += [f"| {code} | {escaped(meaning)} |" for code, meaning in rows]
    lines += [f"| other | {escaped(line)} |" for line in others]
    return "\n".join(lines)


def with_call(page: str, call: str) -> str:
    """Return a command's page with what stands between the marks replaced."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{call}\n\n{END}{rest.split(END, 1)[1]}"


def written() -> dict[Path, str]:
    """Return what each page should hold."""
    pages = {CONFIG: config_page()}
    for path in sorted((DOCS / "commands").glob("*.md")):
        if BEGIN in (text := path.read_text(encoding="utf-8")):
            pages[path] = with_call(text, call_of(path.stem))
    return pages


if __name__ == "__main__":
    for path, text in written().items():
        path.write_text(text, encoding="utf-8")
