"""Command lines and YAML configs become dataclasses, behind a check that lets nothing pass silently.

`TrlParser` builds the dataclasses of TRL and transformers. Before it does, we check every key and value of the config,
because TrlParser itself accepts null, duplicate keys, values outside `choices` and abbreviated flags, and reads an
`.args` file that happens to lie beside the script. We also check the ranges of numbers that TRL and transformers take
as they come. Every refusal is one [`~aesl_trl.errors.InputError`] line.
"""

import argparse
import dataclasses
import importlib.util
import inspect
import math
import operator
import os
import sys
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from .errors import InputError, in_one_line, nearest, nearest_sibling


# A config may set the variables of these libraries only: PATH, LD_PRELOAD, PYTHONPATH and the like change what runs.
ENV_PREFIXES = tuple(
    "HF_ TRANSFORMERS_ DATASETS_ ACCELERATE_ TORCH_ PYTORCH_ TRL_ VLLM_ TRITON_ DS_ NCCL_ GLOO_ CUDA_ CUBLAS_ OMP_ "
    "MKL_ TOKENIZERS_ WANDB_ TRACKIO_ MLFLOW_ COMET_ SWANLAB_ TENSORBOARD_".split()
)
# We look up a relative value of these fields beside the config. A name that is not there may be one on the hub.
INPUT_FIELDS = set(
    "model_name_or_path adapter_name_or_path reward_model_name_or_path start final run base dataset_name "
    "eval_dataset_name diversity_dataset_name data_dir reward_funcs decontaminate pass_rate_file "
    "resume_from_checkpoint deepspeed fsdp_config accelerator_config chat_template_path".split()
)
OUTPUT_FIELDS = {"output_dir", "logging_dir", "output"}
DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
# Bounds of TRL's and transformers' own numbers. Outside of them a run trains nothing, or another thing than was asked
# for (`max_length: -1` cuts off the end of each row), or fails once the model has loaded.
TRL_BOUNDS = {
    **dict.fromkeys("learning_rate weight_decay max_grad_norm warmup_steps seed data_seed".split(), {"at_least": 0}),
    **dict.fromkeys("per_device_train_batch_size per_device_eval_batch_size lora_r".split(), {"at_least": 1}),
    **dict.fromkeys("gradient_accumulation_steps max_length max_completion_length".split(), {"at_least": 1}),
    "num_generations": {"at_least": 2},
    **dict.fromkeys(("num_train_epochs", "temperature"), {"above": 0}),
    "logging_steps": {"above": 0, "hint": "logging_strategy: 'no' turns it off"},
    "eval_steps": {"above": 0, "hint": "eval_strategy: 'no' turns it off"},
    "save_steps": {"above": 0, "hint": "save_strategy: 'no' turns it off"},
}
BOUNDS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}
IN_METADATA = (*BOUNDS, "hint")  # what a field's metadata may say of its number, see check_bounds
# TRL takes booleans here although its annotations do not say so.
ALSO_BOOL = {"scale_rewards", "resume_from_checkpoint"}
# A dataclass's __post_init__ raises one of these for a value that it cannot use, or a package that is not installed.
REFUSALS = (ValueError, TypeError, AttributeError, KeyError, ImportError, OSError)
CONFIG_FLAG = "--config"


def parse(dataclass_types: Sequence[type], argv: Sequence[str], *, prog: str, to_come: Collection[str] = ()) -> tuple:
    """Build `dataclass_types` from the config that `--config` names and from the flags of `argv`, which win over it.

    No two of the dataclasses share a field. `--help` prints the fields, with `prog` as the command's name, and leaves
    with code 0. The config may name the absolute paths `to_come` although they do not exist yet.

    Raises:
        InputError: an unknown, duplicate or mistyped key or flag, a missing file, or a value that a dataclass refuses.
    """
    parser = _strict_parser(dataclass_types, prog)
    path, flags = split_config(argv)
    config = load_config(path, dataclass_types, to_come) if path else {}
    env = config.pop("env", {})
    parser.fill(config)
    try:
        outputs = parser.parse_args_into_dataclasses(args=flags, look_for_args_file=False)
    except InputError:
        raise
    except REFUSALS as error:
        raise InputError((f"{path}: " if path else "") + in_one_line(error, 2000)) from error
    os.environ.update(env)
    return outputs


def split_config(argv: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Return the file that `--config FILE` or `--config=FILE` names, and the other arguments."""
    path, rest, argv = None, [], iter(argv)
    for argument in argv:
        flag, equals, value = argument.partition("=")
        if flag != CONFIG_FLAG:
            rest.append(argument)
            continue
        if path is not None:
            raise InputError(f"{CONFIG_FLAG} is given twice")
        value = value if equals else next(argv, "")
        if not value or value.startswith("--"):
            raise InputError(f"{CONFIG_FLAG} needs a file, as in {CONFIG_FLAG} config.yaml")
        path = Path(value)
    return path, rest


def load_config(path: str | Path, dataclass_types: Sequence[type], to_come: Collection[str] = ()) -> dict:
    """Return the config in `path`, each value of its field's type, paths absolute; `env` stays as it is."""
    path = Path(path)
    config = load_yaml(path)
    fields = {field.name: field for kind in dataclass_types for field in dataclasses.fields(kind) if field.init}
    hints = {name: hint for kind in dataclass_types for name, hint in get_type_hints(kind).items()}
    env = _check_env(config.pop("env", {}), path)
    for key, value in config.items():
        if key not in fields:
            raise InputError(f"{path}: unknown key {key!r}{nearest(key, [*fields, 'env'])}")
        value = _check_value(value, hints[key], fields[key], str(path))
        config[key] = resolve(key, value, path.absolute().parent, to_come)
    return {**config, "env": env}


def without_defaults(config: Mapping[str, Any], dataclass_types: Sequence[type]) -> dict[str, Any]:
    """Return the values of `config` as their fields type them, without those that equal their field's default.

    A value that no field can take, and a key without a field, stay as they are: only another run may have known them.
    """
    fields = {field.name: field for kind in dataclass_types for field in dataclasses.fields(kind)}
    hints = {name: hint for kind in dataclass_types for name, hint in get_type_hints(kind).items()}
    found = {}
    for key, value in config.items():
        if field := fields.get(key):
            with suppress(InputError):
                value = _check_value(value, hints[key], field, "")
            is_made = field.default_factory is not dataclasses.MISSING
            if value == (field.default_factory() if is_made else field.default):
                continue
        found[key] = value
    return found


def _check_env(env: Any, path: Path) -> dict[str, str]:
    if not isinstance(env, dict):
        raise InputError(f"{path}: env must be a mapping of variables, got {_shown(env)}")
    for key, value in env.items():
        if not str(key).startswith(ENV_PREFIXES):
            raise InputError(f"{path}: env may not set {key}; variables may begin with {', '.join(ENV_PREFIXES)}")
        if not isinstance(value, str):
            raise InputError(f"{path}: env.{key} must be a str, got {_shown(value)}; write it in quotes")
    return env


# ---- YAML


class _Loader(yaml.SafeLoader):
    """Reads YAML, and refuses duplicate keys, of which PyYAML silently takes the last."""

    def construct_mapping(self, node, deep=False):
        lines = {}
        for key_node, _ in node.value:
            # A merge (<<) is there so that keys of the mapping may override it.
            if key_node.value in lines and key_node.tag != "tag:yaml.org,2002:merge":
                problem = f"duplicate key {key_node.value!r}, first on line {lines[key_node.value]}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
            lines[str(key_node.value)] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep)


def load_yaml(path: str | Path) -> dict:
    """Return the mapping in a YAML file, read safely.

    Raises:
        InputError: the file is missing, not UTF-8, not YAML, not a mapping, or has a key twice.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(
            f"{path} is a folder: name the config file in it{nearest_sibling(path / 'config.yaml', '*.y*ml')}"
        )
    if not path.is_file():
        raise InputError(f"config file {path} does not exist{nearest_sibling(path, '*.y*ml')}")
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        hint = "; indent with spaces" if "'\\t'" in error.problem else ""
        raise InputError(f"{path}, line {line}: {error.problem}{hint}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{path} is not YAML in UTF-8: {in_one_line(error)}") from None
    if not isinstance(config, dict):
        raise InputError(f"{path} must hold a mapping (key: value), got {_shown(config)}")
    return config


# ---- A mapping becomes a dataclass


class _Mismatch(Exception):
    """The value is not of the type that its field declares."""


def read_dataclass(kind: type, mapping: Any, where: str) -> Any:
    """Return an instance of the dataclass `kind` filled from `mapping`, as a YAML file gives it.

    Fields may be dataclasses themselves, also within `| None`, `list[...]` and `dict[str, ...]`.

    Args:
        where: the file, and the key in it, that hold the mapping. An error's message begins with it.

    Raises:
        InputError: an unknown, missing or mistyped key, a number out of its field's bounds (see [`check_bounds`]), or
            a value that the dataclass refuses.
    """
    if not isinstance(mapping, dict):
        raise InputError(f"{where} must be a mapping (key: value), got {_shown(mapping)}")
    fields, hints = {field.name: field for field in dataclasses.fields(kind) if field.init}, get_type_hints(kind)
    for key in mapping:
        if key not in fields:
            raise InputError(f"{where}: unknown key {key!r}{nearest(key, fields)}")
    for name, field in fields.items():
        if name not in mapping and field.default is field.default_factory is dataclasses.MISSING:
            raise InputError(f"{where}: {name} is missing")
    values = {key: _check_value(value, hints[key], fields[key], where) for key, value in mapping.items()}
    try:
        instance = kind(**values)
    except REFUSALS as error:
        raise InputError(f"{where}: {in_one_line(error, 2000)}") from error
    check_bounds(instance, f"{where}: ")
    return instance


def _check_value(value: Any, hint: Any, field: dataclasses.Field, where: str) -> Any:
    if field.name in ALSO_BOOL:
        hint = Union[hint, bool]  # noqa: UP007 (`|` would also do, but this reads alike for every form of hint)
    try:
        value = _convert(value, hint, f"{where}: {field.name}")
    except _Mismatch:
        wanted = f"must be {_kind_name(hint)}, got {_shown(value)}{_hint(value, hint)}"
        if value is None and field.default is not dataclasses.MISSING:  # often meant as "leave it alone"
            default = field.default.value if isinstance(field.default, Enum) else field.default
            wanted += f"; leave the line out for the default, {default!r}"
        raise InputError(f"{where}: {field.name} {wanted}") from None
    choices = field.metadata.get("choices")
    if choices and value is not None and value not in choices:
        wanted = f"must be one of {', '.join(map(str, choices))}, got {_shown(value)}{nearest(value, choices)}"
        raise InputError(f"{where}: {field.name} {wanted}")
    return value


def _convert(value: Any, hint: Any, where: str = "") -> Any:
    """Return `value` as the type `hint`: numeric strings become floats, a lone value becomes a list of one."""
    origin, args = get_origin(hint) or hint, get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(value, args, where)
    if origin is list:
        # A lone value, as in `lora_target_modules: all-linear`, means on the command line what a list of one means.
        item_hint, items = (args or (Any,))[0], value if isinstance(value, list) else [value]
        if value is not None and (dataclasses.is_dataclass(item_hint) or not isinstance(value, dict)):
            return [_convert(item, item_hint, f"{where}[{place}]") for place, item in enumerate(items)]
    elif origin is dict:
        key_hint, item_hint = args or (Any, Any)
        if isinstance(value, dict):
            return {_convert(k, key_hint): _convert(item, item_hint, f"{where}.{k}") for k, item in value.items()}
    elif dataclasses.is_dataclass(hint):
        if isinstance(value, dict):
            return read_dataclass(hint, value, where)
    elif hint is float:
        if type(value) in (int, float, str):  # YAML 1.1 reads 1e-5, without a point, as a string
            with suppress(ValueError, OverflowError):
                if not math.isnan(number := float(value)):
                    return number
    elif options := _options(hint):
        if any(value == option and type(value) is type(option) for option in options):
            return value
    elif type(value) is hint:  # not isinstance, to which a bool is an int
        return value
    raise _Mismatch


def _convert_union(value: Any, hints: Sequence[Any], where: str) -> Any:
    # float and list last: they convert, the others only compare.
    for hint in sorted(_meant(hints), key=lambda hint: (hint is float) + 2 * (get_origin(hint) is list)):
        with suppress(_Mismatch):
            return _convert(value, hint, where)
    raise _Mismatch


def _meant(hints: Sequence[Any]) -> list[Any]:
    """Drop str beside an enum: `SchedulerType | str` means the enum's values, and str is for the command line."""
    has_enum = any(isinstance(hint, type) and issubclass(hint, Enum) for hint in hints)
    return [hint for hint in hints if not (has_enum and hint is str)]


def _options(hint: Any) -> list[Any]:
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [member.value for member in hint] if isinstance(hint, type) and issubclass(hint, Enum) else []


def _kind_name(hint: Any) -> str:
    """Return `hint` in words, such as `float or null`."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_kind_name, _meant(get_args(hint)))))
    if options := _options(hint):
        return "one of " + ", ".join(map(str, options))
    if get_origin(hint) is list:
        return f"a list of {_kind_name(get_args(hint)[0])}"
    if dict in (get_origin(hint), hint) or dataclasses.is_dataclass(hint):
        return "a mapping"
    return {type(None): "null", bool: "true or false"}.get(hint, getattr(hint, "__name__", str(hint)))


def _hint(value: Any, hint: Any) -> str:
    """Name the nearest valid value, where there is one."""
    options = [str(option) for item in (hint, *get_args(hint)) for option in _options(item)]
    if isinstance(value, bool):
        # YAML 1.1 reads no, off, yes and on as booleans.
        meant = ("yes", "on", "true") if value else ("no", "off", "none", "false")
        words = [word for word in meant if word in options]
        return f"; write {words[0]!r} in quotes" if words else ""
    return nearest(value, options) if isinstance(value, str) else ""


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return f"the {type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"


# ---- Bounds and choices


def option(default: Any, help: str, **metadata: Any) -> Any:
    """Return a dataclass field with its help, and the bounds or choices of its value as `metadata`."""
    source = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return dataclasses.field(**source, metadata={"help": help, **metadata})


def check_bound(name: str, value: float, *, whole: bool = False, hint: str = "", **bounds: float) -> None:
    """Refuse a `value` of the setting `name` that is no finite number, or lies outside of `bounds`.

    `bounds` are any of `at_least`, `above`, `at_most` and `below`. With `whole`, only whole numbers are accepted. The
    message is such as `patience is 0, but must be at least 1`; `hint` adds why, or what to do.
    """
    is_number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    is_number = is_number and (isinstance(value, int) or math.isfinite(value))
    if not is_number or not all(BOUNDS[key](value, bound) for key, bound in bounds.items()):
        kind = "" if is_number else f"a {'whole' if whole else 'finite'} number, "
        asked = " and ".join(f"{key.replace('_', ' ')} {bound}" for key, bound in bounds.items())
        raise InputError(f"{name} is {value!r}, but must be {kind}{asked}" + (f"; {hint}" if hint else ""))


def check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    """Refuse the value of the setting `name` where it is none of `choices`, and name the nearest."""
    if value not in choices:
        known = [str(choice) for choice in choices]
        raise InputError(f"{name} is {value!r}, but must be one of {', '.join(known)}{nearest(value, known)}")


def check_bounds(instance: Any, prefix: str = "", bounds: Mapping[str, Mapping] | None = None) -> None:
    """Refuse a dataclass's numbers outside of the bounds, and values outside of the choices, that its fields declare.

    A field declares them in its metadata, such as `{"at_least": 2, "hint": "why"}` (see [`check_bound`]) or
    `{"choices": ("vllm", "transformers")}`. None passes where the field's type allows it, and every item of a list is
    checked. [`parse`] and [`read_dataclass`] check by themselves; `__post_init__` checks what Python code builds.

    `prefix` precedes the field's name in a message. `bounds`, by the field's name, are for a dataclass such as
    AESLSFTConfig that a plain `HfArgumentParser` must be able to read, which hands on all metadata to argparse.
    """
    hints = get_type_hints(type(instance))
    for field in dataclasses.fields(instance):
        name, value = prefix + field.name, getattr(instance, field.name)
        if "choices" in field.metadata and value is not None:
            check_choice(name, value, field.metadata["choices"])
        limits, kinds = (bounds or {}).get(field.name) or _bounds_of(field), _leaf_types(hints[field.name])
        if limits and not (value is None and type(None) in kinds):
            for number in value if isinstance(value, list) else [value]:
                check_bound(name, number, whole=float not in kinds, **limits)


def _bounds_of(field: dataclasses.Field) -> dict[str, Any]:
    return {key: bound for key, bound in field.metadata.items() if key in IN_METADATA}


def _leaf_types(hint: Any) -> set:
    args = get_args(hint)
    return set().union(*map(_leaf_types, args)) if args else {hint}


# ---- Paths


def check_folder(name: str, path: str | Path) -> None:
    """Refuse a folder, given as the setting `name`, that cannot be made or written to. Nothing is made here."""
    path = Path(os.path.abspath(path))
    place = next(parent for parent in (path, *path.parents) if parent.exists())
    if not place.is_dir():
        problem = "is a file" if place == path else f"cannot be made, {place} is a file"
        raise InputError(f"{name}: {path} {problem}; name another folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"{name}: no permission to write in {place}; name another folder")


def check_replaceable(name: str, target: str | Path, mark: str, kept: Iterable[str | Path]) -> None:
    """Refuse a folder `target`, given as the setting `name`, that may not be swapped for a new one as a whole.

    It must not hold any of `kept`, the folders that the command reads. It may hold other files only if `mark` is among
    them, the file that an earlier run of the command has written.
    """
    check_folder(name, target)
    target = Path(target)
    for folder in map(Path, kept):
        if folder.resolve().is_relative_to(target.resolve()):
            is_target = folder.resolve() == target.resolve()
            problem = "is read from" if is_target else f"holds {folder}, which is read from"
            raise InputError(f"{name}: {target} {problem}, and would be replaced; name a new folder")
    if target.is_dir() and any(target.iterdir()) and not (target / mark).is_file():
        raise InputError(f"{name}: {target} holds other files, and would be replaced; name a new folder")


def resolve(name: str, value: Any, folder: Path, to_come: Collection[str] = ()) -> Any:
    """Return the value of the field `name`, made absolute against `folder` where it is a path.

    Names on the hub, and values of fields that hold no path, are returned unchanged.

    Raises:
        InputError: the value can only be a path (`./x`, `../x`, `/x`, a data file, `file.py:function`) and is missing.
    """
    if isinstance(value, list) and name in INPUT_FIELDS:
        return [resolve(name, item, folder, to_come) for item in value]
    if not isinstance(value, str) or not value:
        return value
    if name in OUTPUT_FIELDS:
        return os.path.abspath(folder / Path(value).expanduser())
    file, colon, function = value.rpartition(":")
    is_function = bool(colon) and file.endswith(".py")
    # A JSON text may stand where a path may, as in `deepspeed`; a reward may be a name.
    if name not in INPUT_FIELDS or value[0] == "{" or (name == "reward_funcs" and not is_function):
        return value
    target = Path(os.path.abspath(folder / Path(file if is_function else value).expanduser()))
    if target.exists() or str(target) in to_come:
        return f"{target}:{function}" if is_function else str(target)
    if is_function or value.startswith(("./", "../", "/", "~")) or value.endswith(DATA_SUFFIXES):
        raise InputError(f"{name}: {value} does not exist, looked for {target}{nearest_sibling(target)}")
    return value


# ---- Command lines


def _strict_parser(dataclass_types: Sequence[type], prog: str):
    # TRL takes seconds to import, and reading a YAML file (`aesl chain --help`) needs none of it.
    from trl import TrlParser

    class StrictParser(TrlParser):
        """TrlParser with one line instead of a usage dump, and paths checked against the current folder."""

        config: dict = {}

        def add_argument(self, *names, **options):
            for key in IN_METADATA:  # TrlParser hands on all metadata of a field, and argparse knows nothing of bounds
                options.pop(key, None)
            return super().add_argument(*names, **options)

        def error(self, message):
            raise InputError(message)

        def fill(self, config):
            """Take `config` for the values of its keys, as they are: a default would be parsed once more as text."""
            self.config = config
            for action in self._actions:
                action.required = action.required and action.dest not in config

        def parse_known_args(self, args=None, namespace=None):
            namespace, rest = super().parse_known_args(args, argparse.Namespace(**self.config))
            if rest:
                flag = rest[0].partition("=")[0]
                kind, known = "flag" if flag[0] == "-" else "argument", [CONFIG_FLAG, *self._option_string_actions]
                raise InputError(f"unknown {kind} {flag}{nearest(flag, known)}")
            values = vars(namespace)
            for name, value in values.items():
                # The config's values are resolved already, and a default is no path of the command line.
                if value != self.config.get(name, self.get_default(name)):
                    if name in ALSO_BOOL and isinstance(value, str):
                        value = {"true": True, "false": False}.get(value.lower(), value)
                    values[name] = resolve(name, value, Path.cwd())
            _check_numbers(values, dataclass_types)
            _check_output_dir(values)
            return namespace, rest

    return StrictParser(dataclass_types, prog=prog, allow_abbrev=False)


def _check_numbers(values: dict[str, Any], dataclass_types: Sequence[type]) -> None:
    """Check the parsed numbers before the dataclasses are built, whose own messages tell less."""
    own = {field.name: _bounds_of(field) for kind in dataclass_types for field in dataclasses.fields(kind)}
    bounds = TRL_BOUNDS | {name: limits for name, limits in own.items() if limits}
    if values.get("max_steps", -1) != -1:
        check_bound("max_steps", values["max_steps"], at_least=1, hint="-1 trains for num_train_epochs")
    for name, value in values.items():
        for number in value if isinstance(value, list) else [value]:
            is_number = isinstance(number, int | float) and not isinstance(number, bool)
            # An infinite max_grad_norm measures the norm and clips nothing.
            if name in bounds and is_number and (name, number) != ("max_grad_norm", math.inf):
                check_bound(name, number, **bounds[name])


def _check_output_dir(values: dict[str, Any]) -> None:
    folder = values.get("output_dir")
    if not isinstance(folder, str):
        return
    check_folder("output_dir", folder)
    for name in ("model_name_or_path", "adapter_name_or_path"):
        source = values.get(name)
        if isinstance(source, str) and os.path.isdir(source) and os.path.realpath(source) == os.path.realpath(folder):
            raise InputError(f"output_dir: {folder} is {name} too, and would be overwritten; name another folder")


class ArgumentParser(argparse.ArgumentParser):
    """The parser of the commands that take flags only: no abbreviations, and one line instead of a usage dump."""

    def __init__(self, prog: str, description: str | None = None, **options):
        super().__init__(prog=prog, description=description, allow_abbrev=False, **options)

    def error(self, message: str) -> None:
        raise InputError(f"{message} (see {self.prog} --help)")


def positionals(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the arguments into those before the first flag, and the rest."""
    count = next((place for place, argument in enumerate(argv) if argument.startswith("-")), len(argv))
    return list(argv[:count]), list(argv[count:])


# ---- Functions by name


def load_function(name: str, base_dir: str | Path | None = None, *, field: str) -> Callable:
    """Return the function that `file.py:function`, the value of the setting `field`, names.

    A relative file is looked up in `base_dir`, by default the current folder. The file may import its neighbours.

    Raises:
        InputError: no such file or function, or the file cannot be imported.
    """
    file, _, function = name.rpartition(":")
    path = Path(os.path.abspath(Path(base_dir or ".") / Path(file).expanduser()))
    if not path.is_file():
        raise InputError(f"{field}: {file} does not exist, looked for {path}{nearest_sibling(path)}")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"{field}: {path} cannot be imported: {type(error).__name__}: {error}") from error
    return _function_of(module, function, f"{field}: {path}")


def import_function(
    name: str, base_dir: str | Path | None = None, *, field: str, known: Iterable[str] = ()
) -> Callable:
    """Return the function that an import path such as `package.module.function`, the value of `field`, names.

    Modules are also found in `base_dir`. Where there is none of that name, the message names the nearest of `known`.

    Raises:
        InputError: the module cannot be imported, or has no such function.
    """
    module_name, _, function = name.rpartition(".")
    for folder in (str(base_dir or os.getcwd()), os.getcwd()):  # TRL's script adds the current folder, too
        if folder not in sys.path:
            sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise InputError(f"{field}: cannot import {name!r}: {error}{nearest(name, known)}") from None
    except Exception as error:
        raise InputError(f"{field}: {module_name} cannot be imported: {type(error).__name__}: {error}") from error
    return _function_of(module, function, f"{field}: {module_name}")


def _function_of(module: types.ModuleType, name: str, where: str) -> Callable:
    function = getattr(module, name, None)
    if callable(function):
        return function
    options = [key for key, value in vars(module).items() if inspect.isfunction(value)]
    problem = "has no function" if function is None else f"holds a {type(function).__name__}, not a function, as"
    raise InputError(f"{where} {problem} {name!r}{nearest(name, options)}")
