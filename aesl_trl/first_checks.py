"""What can be found wrong with a command line before torch is imported, which takes seconds.

A config that is missing, unreadable or another command's, folders that are not there, and settings that are not given:
the commands' own checks, of keys, types and ranges, come after the import.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .arguments import (
    check_folder,
    flag_names,
    output_folder,
    positionals,
    resolve,
    setting_of,
    split_config,
    with_config_flag,
)
from .commands import COMMANDS, CONFIG, CONFIG_FLAG, Command
from .errors import InputError, nearest_sibling
from .values import OLD_OUTPUTS, load_yaml


# Keys that no other command's config has.
MARKS = {
    "chain": "sft grpo handoff probe eval report mix ignore_readiness",
    "compare": "methods seeds chain settings bases rl_runs rl_from_steps tune estimate",
    "data": "num_demonstrations subsets num_rl num_held_out decontaminate ngram ngram_share pass_rate_samples "
    "pass_rate_file pass_rate_column difficulty_bounds difficulty_size",
    "sft": "cold_start_loss t_scaling prefix_mode aesl_weight diversity_steps diversity_num_prompts "
    "diversity_dataset_name diversity_num_samples diversity_temperature diversity_max_new_tokens diversity_metric "
    "diversity_patience stop_at_turning_point max_candidates assistant_only_loss completion_only_loss packing",
    "grpo": "num_generations max_completion_length num_iterations scale_rewards epsilon epsilon_high beta "
    "use_vllm vllm_mode mask_truncated_completions",
    "probe": "rl_steps",
    "eval": "benchmarks count_by start final prompt_format save_every",
    "accelerate": "compute_environment distributed_type machine_rank num_machines num_processes",
}
MARKS = {name: frozenset(keys.split()) for name, keys in MARKS.items()}
# Marks that nobody adds to another command's config by mistake: one of them says whose config it is.
DECISIVE = frozenset(
    "grpo methods num_demonstrations cold_start_loss rl_steps benchmarks compute_environment distributed_type".split()
)
READS = {"mix": ("sft",), "probe": ("probe", "grpo")}  # whose configs a command reads, where not its own alone
NOUNS = {
    "chain": "a chain",
    "compare": "a comparison",
    "data": "a config of aesl data",
    "sft": "a cold start's config",
    "grpo": "an RL config",
    "probe": "a probe's config",
    "eval": "an evaluation's config",
    "accelerate": "a config of accelerate",
}
HELP = {"-h", "--help", "--help_all", "--help-all"}
# The settings by which a command is given a model to load: a folder, or a name on the hub.
MODEL_FIELDS = {
    "data": ("model_name_or_path",),
    "sft": ("model_name_or_path",),
    "grpo": ("model_name_or_path", "adapter_name_or_path"),
    "probe": ("reference",),
    "eval": ("start", "final"),
    "handoff": ("base",),
}


def check(name: str, argv: Sequence[str]) -> None:
    """Refuse the arguments of the command `name` where they cannot be used; a call for help is left alone."""
    command = COMMANDS[name]
    if HELP & {*argv} or not command.reads_config:
        return
    names, rest = positionals(argv)
    path, flags = split_config(with_config_flag(rest))
    values = load_yaml(path) if path else {}
    if path:
        check_kind(name, path, values)
    of_config = {key: value for key, value in values.items() if key not in flag_names(flags)}
    resolved = [(key, resolve(key, value, path.absolute().parent)) for key, value in of_config.items()]
    resolved += [(key, resolve(key, value, Path.cwd())) for key, value in _values(flags)]
    revision = dict(resolved).get("model_revision")
    revision = revision if isinstance(revision, str) else None  # the command refuses one of another type
    for key, value in resolved:
        if key == "output_dir" and isinstance(value, str):
            check_folder(key, output_folder(value, f"aesl {name}"))
        elif key in MODEL_FIELDS.get(name, ()) and isinstance(value, str) and value:
            check_model_name(key, value, revision if key == "model_name_or_path" else None)
    _check_names(f"aesl {name}", command, names)
    found = {key for key, value in values.items() if value not in (None, "")} | flag_names(flags)
    found |= {OLD_OUTPUTS[key] for key in found & OLD_OUTPUTS.keys()}
    has_words = not all(argument.startswith("-") for argument in flags)
    _check_needs(f"aesl {name}", command, names, found | ({"config"} if path else set()), path, has_words)


def check_kind(name: str, path: str | Path, values: Mapping[str, Any], where: str = "") -> None:
    """Refuse the config of another command than `name`: it has marks of that command, and none of its own.

    One mark is enough where it is decisive. `where` is the place in a chain or a comparison that names the config;
    without one, the message names the command that reads it.
    """
    hits = {kind: [key for key in values if key in keys] for kind, keys in MARKS.items()}
    kind = max(hits, key=lambda kind: (len(DECISIVE & {*hits[kind]}), len(hits[kind])))
    own = READS.get(name, (name,))
    if any(hits.get(each) for each in own) or (len(hits[kind]) < 2 and not DECISIVE & {*hits[kind]}):
        return
    found = f"{NOUNS[kind]} (it has {', '.join(hits[kind][:3])})"
    if where:
        raise InputError(f"{where}: {path} is {found}; name {NOUNS[own[0]]}")
    command = (
        f"accelerate launch --config_file {path}" if kind == "accelerate" else f"aesl {kind} {CONFIG_FLAG} {path}"
    )
    raise InputError(f"{path}: this is {found}: {command}")


def _values(flags: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield each value on the command line with its setting's name."""
    name = ""
    for argument in flags:
        if argument.startswith("--"):
            _, equals, value = argument.partition("=")
            name = setting_of(argument)
            if equals:
                yield name, value
        elif name:
            yield name, argument


def check_model_name(field: str, name: str, revision: str | None = None) -> None:
    """Refuse the name of a model, the value of `field`, that is no folder here and cannot be one on the hub.

    Where the hub may not be asked (HF_HUB_OFFLINE), the `revision`, by default main, must lie in the hub's cache.
    """
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        return
    if folder.is_file():
        raise InputError(f"{field}: {name} is a file: name a model's folder")
    if folder.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise InputError(f"{field}: {name} is not a folder{nearest_sibling(folder)}")
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        files = [
            try_to_load_from_cache(name, file, revision=revision) for file in ("config.json", "adapter_config.json")
        ]
    except HFValidationError:
        files = []
    if constants.HF_HUB_OFFLINE and not any(isinstance(file, str) for file in files):
        hint = nearest_sibling(folder) or "; HF_HUB_OFFLINE is set, so the hub is not asked"
        which = f"its revision {revision}" if revision else "it"
        raise InputError(f"{field}: there is no folder {name} here, and the hub's cache does not hold {which}{hint}")


def _check_names(prog: str, command: Command, names: Sequence[str]) -> None:
    """Refuse positionals that are too many, or that are no folders."""
    takes = command.names
    if len(names) > len(takes) and not (takes and takes[-1].endswith("...")):
        kind = " ".join(takes) or "no folder"
        hint = f"; a config's name ends in .yaml{nearest_sibling(Path(names[-1]), '*.y*ml')}" if not takes else ""
        raise InputError(f"unknown argument {names[len(takes)]}: {prog} takes {kind}{hint}")
    for place, name in enumerate(names):
        wanted = takes[min(place, len(takes) - 1)]
        if wanted in ("MODEL...", "CHECKPOINT..."):
            check_model_name("model", name)
        elif not Path(name).is_dir():
            problem = "is a file, not a folder" if Path(name).is_file() else "is not a folder"
            raise InputError(f"{wanted.removesuffix('...')}: {name} {problem}{nearest_sibling(Path(name))}")


def _check_needs(
    prog: str, command: Command, names: Sequence[str], found: set[str], path: Path | None, has_words: bool
) -> None:
    """Refuse a command line that lacks something, and name all that it lacks at once.

    With `has_words`, words stand after a flag, and a positional among them counts as the flag's value.
    """
    missing = [] if found & {*command.instead} else [*command.names[len(names) :]]
    missing += [
        CONFIG if needs == ("config",) else needs[0] + (f" (or {' or '.join(needs[1:])})" if needs[1:] else "")
        for needs in command.needs
        if not found & {*needs}
    ]
    if missing:
        where = f" in {path} and on the command line" if path and not {*missing} <= {*command.names} else ""
        hint = "; positionals come before the flags" if has_words and {*missing} & {*command.names} else ""
        raise InputError(f"missing{where}: {', '.join(missing)}; usage: {prog} {command.usage}{hint}")
