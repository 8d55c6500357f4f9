"""PEFT settings against the model's own names: a name that matches nothing is refused, and a list stays a list.

PEFT itself raises an error when no target is found at all. It trains without a name that matches nothing beside others
that do. The names are known without weights ([`~aesl_trl.models.skeleton.skeleton`]).
"""

import copy
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ..errors import InputError, nearest


# Settings that name modules, and whether a name must be whole parts of the module's name, as PEFT compares them
MODULE_SETTINGS = {"target_modules": ".", "exclude_modules": ".", "feedforward_modules": ".", "modules_to_save": ""}
PATTERN_SETTINGS = ("rank_pattern", "alpha_pattern")
# Words that PEFT reads in place of module names
SHORTHANDS = ("all-linear", "dummy-target-modules")
# The number of a module's layer, as PEFT finds it
LAYER = r".*?\.[^.]*\.(\d+)\."


def list_as_written(peft_config: Any) -> Any:
    """Turn a lone module's name back into a list, in place, and return the config.

    TRL's ModelConfig makes a string of a list of one, and PEFT takes a string for a pattern that must match a module's
    name from its first letter on. A string with other characters than those of a name stays a pattern.
    """
    target = getattr(peft_config, "target_modules", None)
    if isinstance(target, str) and re.fullmatch(r"[\w.]+", target):
        peft_config.target_modules = {target}
    return peft_config


def check_peft_config(peft_config: Any, model: torch.nn.Module, *, prefix: str = "") -> None:
    """Refuse a PEFT config in which a setting, or one of the names in it, matches nothing in the model.

    The weights do not matter, so `model` may be a skeleton. `prefix` opens the settings' names in the message.

    Raises:
        InputError: one line with the setting, the name, and the nearest name that the model has.
    """
    peft_config = _with_names_of_today(peft_config, model)
    modules = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    name_of_model = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    for setting, name, options, kind in _unmatched(peft_config, modules, parameters):
        hint = (
            nearest(name, sorted(_endings(options, name.count(".") + 1), key=len)) or f"; there are {_some(options)}"
        )
        hint = "; it stands alone, not in a list" if name in SHORTHANDS else hint
        raise InputError(f"{prefix}{setting}: {name!r} matches no {kind} of {name_of_model}{hint}")
    _check_layers(peft_config, modules, f"{prefix}layers_to_transform", name_of_model)


def _with_names_of_today(peft_config: Any, model: torch.nn.Module) -> Any:
    """Return a copy in which names that transformers has changed are the present ones, as PEFT reads them."""
    from peft.utils.transformers_weight_conversion import (
        convert_peft_config_for_transformers,
        get_model_conversion_mapping,
    )

    peft_config = copy.deepcopy(peft_config)
    if hasattr(getattr(model, "config", None), "model_type"):
        conversions = get_model_conversion_mapping(model)
        convert_peft_config_for_transformers(peft_config, model=model, conversions=conversions)
    return peft_config


def _unmatched(
    peft_config: Any, modules: list[str], parameters: list[str]
) -> Iterator[tuple[str, str, list[str], str]]:
    """Yield each name that matches nothing: its setting, the name, what it may match, and what that is called."""
    for setting, dot in MODULE_SETTINGS.items():
        value = getattr(peft_config, setting, None) or ()
        if isinstance(value, str):
            if value.lower() not in SHORTHANDS and not any(re.fullmatch(value, module) for module in modules):
                yield setting, value, modules, "whole module name (a pattern begins at the first letter: put .* there)"
            continue
        for name in sorted(value):
            if not any(_ends_with(module, name, dot) for module in modules):
                yield setting, name, [*SHORTHANDS[:1], *modules], "module"
    for name in getattr(peft_config, "target_parameters", None) or ():
        if not any(_ends_with(parameter, name, ".") for parameter in parameters):
            yield "target_parameters", name, parameters, "parameter"
    for setting in PATTERN_SETTINGS:
        for pattern in getattr(peft_config, setting, None) or ():
            # PEFT itself adds patterns of the experts' parameters
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in (*modules, *parameters)):
                yield setting, pattern, modules, "module"
    tokens = getattr(peft_config, "trainable_token_indices", None)
    for name in tokens if isinstance(tokens, dict) else ():
        if not any(_ends_with(module, name, "") for module in modules):
            yield "trainable_token_indices", name, modules, "module"


def _check_layers(peft_config: Any, modules: list[str], setting: str, name_of_model: str) -> None:
    wanted = getattr(peft_config, "layers_to_transform", None)
    if wanted is None:
        return
    patterns = getattr(peft_config, "layers_pattern", None) or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    found = {
        int(match[1])
        for module in modules
        for pattern in ([rf"(?:^|.*?\.){name}\.(\d+)\." for name in patterns] or [LAYER])
        if (match := re.match(pattern, module))
    }
    if not found:
        raise InputError(f"{setting}: {name_of_model} has no layers named {', '.join(patterns) or 'by a number'}")
    for layer in [wanted] if isinstance(wanted, int) else wanted:
        if layer not in found:
            raise InputError(f"{setting}: {name_of_model} has no layer {layer}, its layers are 0 to {max(found)}")


def _ends_with(full: str, name: str, dot: str) -> bool:
    return full == name or full.endswith(dot + name)


def _endings(names: Iterable[str], parts: int) -> set[str]:
    """Return the last `parts` parts of each dotted name."""
    return {".".join(name.split(".")[-parts:]) for name in names}


def _some(names: Iterable[str]) -> str:
    """Return the last parts of the names, a few of them: numbers of layers left out."""
    endings = sorted(ending for ending in _endings(names, 1) if not ending.isdecimal())
    return ", ".join(endings[:12]) + (" ..." if len(endings) > 12 else "")
