"""Command line and YAML config -> dataclasses: TRL's parser, behind a check that lets nothing pass silently.

`TrlParser` builds the dataclasses. Before it does, every key and value of the config is checked against them, because
by itself it accepts null, duplicate keys, values outside `choices` and abbreviated flags, and reads an `.args` file
that happens to lie beside the script. So are the ranges of the numbers that TRL and transformers take as they come.
Whatever is refused is one [`~aesl_trl.errors.InputError`] line.
"""

import argparse
import dataclasses
import importlib.util
import inspect
import math
import os
import sys
import types
from collections.abc import Callable, Collection, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from .errors import InputError, nearest, nearest_sibling


# PATH, LD_PRELOAD, PYTHONPATH and the like would change what runs: only variables of the libraries below.
ENV_PREFIXES = (
    *("HF_", "TRANSFORMERS_", "DATASETS_", "ACCELERATE_", "TORCH_", "PYTORCH_", "TRL_", "VLLM_", "TRITON_", "DS_"),
    *("NCCL_", "GLOO_", "CUDA_", "CUBLAS_", "OMP_", "MKL_", "TOKENIZERS_"),
    *("WANDB_", "TRACKIO_", "MLFLOW_", "COMET_", "SWANLAB_", "TENSORBOARD_"),
)
# A relative value of these is looked up beside the config; a name that is not there may be one on the hub.
INPUT_FIELDS = {
    *("model_name_or_path", "adapter_name_or_path", "reward_model_name_or_path", "start", "final", "run", "base"),
    *("dataset_name", "eval_dataset_name", "diversity_dataset_name", "data_dir", "reward_funcs"),
    *("decontaminate", "pass_rate_file"),
    *("resume_from_checkpoint", "deepspeed", "fsdp_config", "accelerator_config", "chat_template_path"),
}
OUTPUT_FIELDS = {"output_dir", "logging_dir", "output"}
DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
# Numbers below these train nothing, or another thing than is asked (`max_length: -1` cuts off the end of each row), or
# fail once the model has loaded.
AT_LEAST = {
    **dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "seed", "data_seed"), 0),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), 1),
    **dict.fromkeys(("max_length", "max_completion_length", "lora_r"), 1),
    "num_generations": 2,
}
ABOVE = dict.fromkeys(("num_train_epochs", "temperature", "logging_steps", "eval_steps", "save_steps"), 0)
# TRL takes booleans here although its annotations do not say so.
ALSO_BOOL = {"scale_rewards", "resume_from_checkpoint"}
# What a dataclass's __post_init__ raises for a value that it cannot use, or for a package that is not installed.
REFUSALS = (ValueError, TypeError, AttributeError, KeyError, ImportError, OSError)
CONFIG_FLAG = "--config"


def parse(dataclass_types: Sequence[type], argv: Sequence[str], *, prog: str, to_come: Collection[str] = ()) -> tuple:
    """Instances of `dataclass_types` from the config that `--config` names and the flags of `argv`, which win over it.

    Args:
        dataclass_types: the dataclasses to fill; no two share a field.
        argv: the arguments without the program's name; `--help` prints the fields and leaves with code 0.
        prog: the command, as the help shows it.
        to_come: absolute paths that the config may name although they are not there yet.

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
        where = f"{path}: " if path else ""
        # The libraries' own messages have many lines.
        raise InputError(f"{where}{' '.join(str(error).split())}") from error
    os.environ.update(env)
    return outputs


def split_config(argv: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The file that `--config FILE` or `--config=FILE` names, and the other arguments."""
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
    """The config in `path`, each value of the type that its field declares, paths absolute; `env` as it stands."""
    path = Path(path)
    config = load_yaml(path)
    fields = {field.name: field for kind in dataclass_types for field in dataclasses.fields(kind) if field.init}
    hints = {name: hint for kind in dataclass_types for name, hint in get_type_hints(kind).items()}
    env = _check_env(config.pop("env", {}), path)
    for key, value in config.items():
        if key not in fields:
            raise InputError(f"{path}: unknown key {key!r}{nearest(key, [*fields, 'env'])}")
        value = _check_value(value, hints[key], fields[key], path)
        config[key] = resolve(key, value, path.absolute().parent, to_come)
    return {**config, "env": env}


# ---- YAML


class _Loader(yaml.SafeLoader):
    """YAML without the silent last-one-wins of duplicate keys."""

    def construct_mapping(self, node, deep=False):
        lines = {}
        for key_node, _ in node.value:
            # A merge (<<) may be overridden by a key of the mapping: that is what it is for.
            if key_node.value in lines and key_node.tag != "tag:yaml.org,2002:merge":
                problem = f"duplicate key {key_node.value!r}, first on line {lines[key_node.value]}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
            lines[str(key_node.value)] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep)


def load_yaml(path: str | Path) -> dict:
    """The mapping in a YAML file, read safely.

    Raises:
        InputError: the file is missing, not UTF-8, not YAML, not a mapping, or has a key twice.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder: name the config file in it{_nearest_file(path / 'config.yaml')}")
    if not path.is_file():
        raise InputError(f"config file {path} does not exist{_nearest_file(path)}")
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        hint = "; indent with spaces" if "'\\t'" in error.problem else ""
        raise InputError(f"{path}, line {line}: {error.problem}{hint}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{path} is not YAML in UTF-8: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise InputError(f"{path} must hold a mapping (key: value), got {_shown(config)}")
    return config


def _nearest_file(path: Path) -> str:
    folder = path.absolute().parent
    return nearest(path.name, [item.name for item in folder.glob("*.y*ml")]) if folder.is_dir() else ""


def _check_env(env: Any, path: Path) -> dict[str, str]:
    if not isinstance(env, dict):
        raise InputError(f"{path}: env must be a mapping of variables, got {_shown(env)}")
    for key, value in env.items():
        if not str(key).startswith(ENV_PREFIXES):
            raise InputError(f"{path}: env may not set {key}; variables may begin with {', '.join(ENV_PREFIXES)}")
        if not isinstance(value, str):
            raise InputError(f"{path}: env.{key} must be a str, got {_shown(value)}; write it in quotes")
    return env


# ---- Values


class _Mismatch(Exception):
    """The value is not of the asked type."""


def check_fields(mapping: Any, kind: type, where: str) -> dict:
    """`mapping` with each value of the type that the dataclass `kind` declares; `where` opens an error's message."""
    if not isinstance(mapping, dict):
        raise InputError(f"{where} must be a mapping (key: value), got {_shown(mapping)}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = get_type_hints(kind)
    for key in mapping:
        if key not in fields:
            raise InputError(f"{where}: unknown key {key!r}{nearest(key, fields)}")
    required = [name for name, field in fields.items() if _has_no_default(field) and name not in mapping]
    if required:
        raise InputError(f"{where}: {required[0]} is missing")
    return {key: _check_value(value, hints[key], fields[key], where) for key, value in mapping.items()}


def _has_no_default(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _check_value(value: Any, hint: Any, field: dataclasses.Field, where: str | Path) -> Any:
    if field.name in ALSO_BOOL:
        hint = Union[hint, bool]  # noqa: UP007 (`|` would also do, but this reads alike for every form of hint)
    try:
        value = _convert(value, hint)
    except _Mismatch:
        wanted = f"must be {_kind_name(hint)}, got {_shown(value)}{_hint(value, hint)}{_default(value, field)}"
        raise InputError(f"{where}: {field.name} {wanted}") from None
    choices = field.metadata.get("choices")
    if choices and value is not None and value not in choices:
        wanted = f"must be one of {', '.join(map(str, choices))}, got {_shown(value)}{nearest(value, choices)}"
        raise InputError(f"{where}: {field.name} {wanted}")
    return value


def _convert(value: Any, hint: Any) -> Any:
    """`value` as the type `hint`: ints and numeric strings become floats, a lone value becomes a list of one."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(value, args)
    if origin is Literal:
        return _only_if(any(value == option and type(value) is type(option) for option in args), value)
    if origin is list or hint is list:
        return _convert_list(value, args[0] if args else Any)
    if origin is dict or hint is dict:
        _only_if(isinstance(value, dict), value)
        key_hint, value_hint = args or (Any, Any)
        return {_convert(key, key_hint): _convert(item, value_hint) for key, item in value.items()}
    if hint is float:
        return _convert_float(value)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _only_if(isinstance(value, str) and value in _enum_values(hint), value)
    if dataclasses.is_dataclass(hint):
        return check_fields(_only_if(isinstance(value, dict), value), hint, hint.__name__)
    # type(), not isinstance: a bool is an int to isinstance.
    return _only_if(type(value) is hint, value)


def _only_if(fits: bool, value: Any) -> Any:
    if not fits:
        raise _Mismatch
    return value


def _convert_union(value: Any, hints: Sequence[Any]) -> Any:
    if any(isinstance(hint, type) and issubclass(hint, Enum) for hint in hints):
        # `SchedulerType | str` means the enum's values; str is there for the command line.
        hints = [hint for hint in hints if hint is not str]
    # float and list last: they convert, the others only compare.
    for hint in sorted(hints, key=lambda hint: (hint is float) + 2 * (get_origin(hint) is list)):
        try:
            return _convert(value, hint)
        except _Mismatch:
            continue
    raise _Mismatch


def _convert_list(value: Any, hint: Any) -> list:
    # One value where a list is asked, as `lora_target_modules: all-linear`, is what one value is on the command line.
    items = value if isinstance(value, list) else [value]
    _only_if(value is not None and not (isinstance(value, dict) and not dataclasses.is_dataclass(hint)), value)
    return [_convert(item, hint) for item in items]


def _convert_float(value: Any) -> float:
    # YAML 1.1 reads 1e-5, without a point, as a string.
    _only_if(type(value) in (int, float, str), value)
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise _Mismatch from None
    return _only_if(not math.isnan(number), number)


def _enum_values(kind: type[Enum]) -> list[str]:
    return [member.value for member in kind]


def _kind_name(hint: Any) -> str:
    """`hint` in words, as `float or null`."""
    if get_origin(hint) in (Union, types.UnionType):
        hints = get_args(hint)
        enums = [item for item in hints if isinstance(item, type) and issubclass(item, Enum)]
        return " or ".join(dict.fromkeys(_kind_name(item) for item in hints if not (enums and item is str)))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "one of " + ", ".join(_enum_values(hint))
    if get_origin(hint) is list:
        return f"a list of {_kind_name(get_args(hint)[0])}"
    if get_origin(hint) is dict or hint is dict:
        return "a mapping"
    return {type(None): "null", bool: "true or false"}.get(hint, getattr(hint, "__name__", str(hint)))


def _hint(value: Any, hint: Any) -> str:
    """The nearest valid value, where one can be named."""
    options = [option for item in (hint, *get_args(hint)) for option in _options(item)]
    if isinstance(value, bool):
        # YAML 1.1 reads no, off, yes and on as booleans.
        meant = ("yes", "on", "true") if value else ("no", "off", "none", "false")
        words = [word for word in meant if word in options]
        return f"; write {words[0]!r} in quotes" if words else ""
    return nearest(value, options) if options and isinstance(value, str) else ""


def _default(value: Any, field: dataclasses.Field) -> str:
    """Null is often meant as "leave it alone"."""
    if value is not None or _has_no_default(field) or field.default is dataclasses.MISSING:
        return ""
    default = field.default.value if isinstance(field.default, Enum) else field.default
    return f"; leave the line out for the default, {default!r}"


def _options(hint: Any) -> list[str]:
    if get_origin(hint) is Literal:
        return [str(option) for option in get_args(hint)]
    return _enum_values(hint) if isinstance(hint, type) and issubclass(hint, Enum) else []


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return f"the {type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"


# ---- Ranges


def _check_range(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if name == "max_steps" and value != -1 and value < 1:
        raise InputError(f"max_steps is {value}, but must be at least 1, or -1 to train for num_train_epochs")
    if name in AT_LEAST and value < AT_LEAST[name]:
        raise InputError(f"{name} is {value}, but must be at least {AT_LEAST[name]}")
    if name in ABOVE and value <= ABOVE[name]:
        kind = name.removesuffix("_steps")
        hint = f"; {kind}_strategy: 'no' turns it off" if name.endswith("_steps") else ""
        raise InputError(f"{name} is {value}, but must be above {ABOVE[name]}{hint}")


# ---- Paths


def check_folder(name: str, path: str | Path) -> None:
    """Refuse a folder, given as the setting `name`, that cannot be made or written to; nothing is made here."""
    path = Path(os.path.abspath(path))
    place = next(parent for parent in (path, *path.parents) if parent.exists())
    if not place.is_dir():
        problem = "is a file" if place == path else f"cannot be made, {place} is a file"
        raise InputError(f"{name}: {path} {problem}; name another folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"{name}: no permission to write in {place}; name another folder")


def _check_output_dir(values: dict[str, Any]) -> None:
    folder = values.get("output_dir")
    if not isinstance(folder, str):
        return
    check_folder("output_dir", folder)
    for name in ("model_name_or_path", "adapter_name_or_path"):
        source = values.get(name)
        if isinstance(source, str) and os.path.isdir(source) and os.path.realpath(source) == os.path.realpath(folder):
            raise InputError(f"output_dir: {folder} is {name} too, and would be overwritten; name another folder")


def resolve(name: str, value: Any, folder: Path, to_come: Collection[str] = ()) -> Any:
    """`value` of the field `name` with a path made absolute against `folder`; a name on the hub and other fields stay.

    Raises:
        InputError: the value can only be a path (`./x`, `../x`, `/x`, a data file, `file.py:function`) and is missing.
    """
    if isinstance(value, list) and name in INPUT_FIELDS:
        return [resolve(name, item, folder, to_come) for item in value]
    if not isinstance(value, str) or not value:
        return value
    if name in OUTPUT_FIELDS:
        return os.path.abspath(folder / Path(value).expanduser())
    # A JSON text may stand where a path may, as in `deepspeed`.
    return _resolve_input(name, value, folder, to_come) if name in INPUT_FIELDS and value[0] != "{" else value


def _resolve_input(name: str, value: str, folder: Path, to_come: Collection[str]) -> str:
    file, colon, function = value.rpartition(":")
    is_function = bool(colon) and file.endswith(".py")
    if name == "reward_funcs" and not is_function:
        return value
    target = Path(os.path.abspath(folder / Path(file if is_function else value).expanduser()))
    if target.exists() or str(target) in to_come:
        return f"{target}:{function}" if is_function else str(target)
    if is_function or value.startswith(("./", "../", "/", "~")) or value.endswith(DATA_SUFFIXES):
        siblings = os.listdir(target.parent) if target.parent.is_dir() else []
        raise InputError(f"{name}: {value} does not exist, looked for {target}{nearest(target.name, siblings)}")
    return value


# ---- Command line


def _strict_parser(dataclass_types: Sequence[type], prog: str):
    # trl takes seconds to import; reading a YAML file (`aesl chain --help`) should not.
    from trl import TrlParser

    class StrictParser(TrlParser):
        """TrlParser with one line instead of a usage dump, and paths checked against the current folder."""

        config: dict = {}

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
                raise InputError(_unknown_argument(rest[0], [CONFIG_FLAG, *self._option_string_actions]))
            for name, value in vars(namespace).items():
                # The config's values are resolved already, and a default is no path of the command line.
                if value != self.config.get(name, self.get_default(name)):
                    setattr(namespace, name, resolve(name, _bool_word(name, value), Path.cwd()))
            for name, value in vars(namespace).items():
                _check_range(name, value)
            _check_output_dir(vars(namespace))
            return namespace, rest

    return StrictParser(dataclass_types, prog=prog, allow_abbrev=False)


def _bool_word(name: str, value: Any) -> Any:
    """`True` and `False` for the words, in the fields where TRL takes a boolean though it declares a str."""
    word = value.lower() if name in ALSO_BOOL and isinstance(value, str) else None
    return {"true": True, "false": False}.get(word, value)


def _unknown_argument(argument: str, flags: list[str]) -> str:
    flag = argument.partition("=")[0]
    return f"unknown {'flag' if flag.startswith('-') else 'argument'} {flag}{nearest(flag, flags)}"


def load_function(name: str, base_dir: str | Path | None = None, *, field: str) -> Callable:
    """The function of `file.py:function`; its file may import its neighbours.

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
    found = getattr(module, function, None)
    if not callable(found):
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise InputError(f"{field}: {path} has no function {function!r}{nearest(function, functions)}")
    return found


def leading_names(argv: list[str]) -> tuple[list[str], list[str]]:
    """The arguments before the first flag, and the rest."""
    count = next((index for index, argument in enumerate(argv) if argument.startswith("-")), len(argv))
    return list(argv[:count]), list(argv[count:])
