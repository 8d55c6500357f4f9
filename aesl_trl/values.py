"""A YAML mapping becomes typed fields of a dataclass, each number within its bounds and each choice a known one.

Every refusal is one [`~aesl_trl.errors.InputError`] line with the file, the key and the nearest valid value.
"""

import dataclasses
import math
import operator
import reprlib
import types
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from .errors import HALF_A_CHARACTER, InputError, in_one_line, nearest, nearest_sibling


BOUNDS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}
IN_METADATA = (*BOUNDS, "hint")  # what a field's metadata may say of its number, see check_bounds
# TRL takes booleans here although its annotations do not say so.
ALSO_BOOL = {"scale_rewards", "resume_from_checkpoint"}
# A dataclass's __post_init__ raises one of these for a value that it cannot use, or a package that is not installed.
REFUSALS = (ValueError, TypeError, AttributeError, KeyError, ImportError, OSError)
MAX_VALUES = 100_000  # of a config, an alias counted as all that it stands for
# Names that settings had before. Configs, command lines and Python's keywords may have them for good.
OLD_NAMES = {"samples": "num_samples", "diversity_samples": "diversity_num_samples"}
OLD_OUTPUTS = {"output": "output_dir", "out": "output_dir"}  # where a command's `output` is no other setting
SEED_BOUNDS = {"at_least": 0, "at_most": 2**32 - 1}  # numpy takes no other seed


class _Short(reprlib.Repr):
    """Shows any value in a few words."""

    def repr_int(self, number: int, level: int) -> str:
        is_long = number.bit_length() > 10_000  # Python writes no more than 4,300 digits
        return f"of {number.bit_length()} bits" if is_long else super().repr_int(number, level)


SHORT = _Short()
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 76


class _Loader(yaml.SafeLoader):
    """Reads YAML, and refuses duplicate keys, of which PyYAML silently takes the last.

    JSON writes a character beyond 16 bits as two escapes, which PyYAML leaves apart: they are joined.
    """

    def construct_scalar(self, node):
        value = super().construct_scalar(node)
        try:
            return value.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            raise yaml.MarkedYAMLError(problem=HALF_A_CHARACTER, problem_mark=node.start_mark) from None

    def construct_mapping(self, node, deep=False):
        lines = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a name", problem_mark=key_node.start_mark)
            # A merge (<<) is there so that keys of the mapping may override it.
            if key_node.value in lines and key_node.tag != "tag:yaml.org,2002:merge":
                problem = f"duplicate key {key_node.value!r}, first on line {lines[key_node.value]}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
            lines[str(key_node.value)] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep)


def load_yaml(path: str | Path) -> dict:
    """Return the mapping in a YAML file, with today's names; it must be UTF-8 and hold no key twice."""
    path = Path(path)
    if path.is_dir():
        hint = nearest_sibling(path / "config.yaml", "*.y*ml")
        raise InputError(f"{path} is a folder: name the config file in it{hint}")
    if not path.is_file():
        raise InputError(f"config file {path} does not exist{nearest_sibling(path, '*.y*ml')}")
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        _check_size(node, path)
        config = loader.construct_document(node) if node else None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        hint = "; indent with spaces" if "'\\t'" in error.problem else ""
        raise InputError(f"{path}, line {line}: {error.problem}{hint}") from None
    except RecursionError:
        raise InputError(f"{path} has too many levels of brackets or indentation") from None
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not YAML in UTF-8: {in_one_line(error)}") from None
    if not isinstance(config, dict):
        raise InputError(f"{path} must hold a mapping (key: value), got {shown(config)}")
    return with_new_names(config, str(path))


def with_new_names(values: Mapping[str, Any], where: str, names: Mapping[str, str] = OLD_NAMES) -> dict[str, Any]:
    """Return `values` by today's names; refuse a setting that `where` gives by its old and its new one."""
    for old, new in names.items():
        if old in values and new in values:
            raise InputError(f"{where}: {old} is the old name of {new}, which is there too: keep {new}")
    return {names.get(key, key): value for key, value in values.items()}


def _check_size(root: yaml.Node | None, path: Path) -> None:
    """Refuse a config that its aliases make huge or endless: to print or to copy it would never end."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node | None) -> int:
        if not isinstance(node, yaml.CollectionNode):
            return 1
        if id(node) not in sizes:
            sizes[id(node)] = MAX_VALUES + 1  # of a node that holds itself
            pairs = [node.value] if isinstance(node, yaml.SequenceNode) else node.value
            sizes[id(node)] = 1 + sum(size(part) for pair in pairs for part in pair)
        return sizes[id(node)]

    if size(root) > MAX_VALUES:
        raise InputError(f"{path} holds more than {MAX_VALUES:,} values, counting each alias (*name) as what it names")


class _Mismatch(Exception):
    """The value is not of the type that its field declares."""


def read_dataclass(kind: type, mapping: Any, where: str) -> Any:
    """Return an instance of the dataclass `kind` filled from `mapping`, as a YAML file gives it.

    Fields may be dataclasses themselves, also within `| None`, `list[...]` and `dict[str, ...]`. Keys, types, bounds
    and choices are checked (see [`check_bounds`]). A message begins with `where`: the file, and the key in it.
    """
    if not isinstance(mapping, dict):
        raise InputError(f"{where} must be a mapping (key: value), got {shown(mapping)}")
    fields, hints = {field.name: field for field in dataclasses.fields(kind) if field.init}, get_type_hints(kind)
    for key in mapping:
        if key not in fields:
            raise InputError(f"{where}: unknown key {SHORT.repr(key)}{nearest(key, fields)}")
    for name, field in fields.items():
        if name not in mapping and field.default is field.default_factory is dataclasses.MISSING:
            raise InputError(f"{where}: {name} is missing")
    values = {key: check_value(value, hints[key], fields[key], where) for key, value in mapping.items()}
    try:
        instance = kind(**values)
    except REFUSALS as error:
        raise InputError(f"{where}: {in_one_line(error, 2000)}") from error
    check_bounds(instance, f"{where}: ")
    return instance


def check_value(value: Any, hint: Any, field: dataclasses.Field, where: str) -> Any:
    if field.name in ALSO_BOOL:
        hint = Union[hint, bool]  # noqa: UP007 (`|` would also do, but this reads alike for every form of hint)
    try:
        value = _convert(value, hint, f"{where}: {field.name}")
    except _Mismatch:
        wanted = f"must be {_kind_name(hint)}, got {shown(value)}{_hint(value, hint)}"
        if value is None and field.default is not dataclasses.MISSING:  # often meant as "leave it alone"
            default = field.default.value if isinstance(field.default, Enum) else field.default
            wanted += f"; leave the line out for the default, {default!r}"
        raise InputError(f"{where}: {field.name} {wanted}") from None
    choices = field.metadata.get("choices")
    if choices and value is not None and value not in choices:
        wanted = f"must be one of {', '.join(map(str, choices))}, got {shown(value)}{nearest(value, choices)}"
        raise InputError(f"{where}: {field.name} {wanted}")
    return value


def _convert(value: Any, hint: Any, where: str = "") -> Any:
    """Return `value` as the type `hint`: numeric strings become floats, a lone value becomes a list of one."""
    origin, args = get_origin(hint) or hint, get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        # float and list come last: they convert, and the others only compare.
        for option in sorted(_meant(args), key=lambda option: (option is float) + 2 * (get_origin(option) is list)):
            with suppress(_Mismatch):
                return _convert(value, option, where)
    elif origin is list:
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


def shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = SHORT.repr(value)
    return f"the {type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"


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
        raise InputError(f"{name} is {SHORT.repr(value)}, but must be {kind}{asked}" + (f"; {hint}" if hint else ""))


def check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    """Refuse the value of the setting `name` where it is none of `choices`, and name the nearest."""
    if value not in choices:
        known = [str(choice) for choice in choices]
        wanted = f"must be one of {', '.join(known)}{nearest(value, known)}"
        raise InputError(f"{name} is {SHORT.repr(value)}, but {wanted}")


def check_bounds(instance: Any, prefix: str = "", bounds: Mapping[str, Mapping] | None = None) -> None:
    """Refuse a dataclass's numbers outside of the bounds, and values outside of the choices, that its fields declare.

    A field declares them in its metadata, such as `{"at_least": 2, "hint": "why"}` (see [`check_bound`]) or
    `{"choices": ("vllm", "transformers")}`. None passes where the field's type allows it, and every item of a list is
    checked. `prefix` precedes the field's name in a message. `bounds`, by field name, are for a dataclass such as
    AESLSFTConfig that a plain `HfArgumentParser` must be able to read, which hands on all metadata to argparse.
    """
    hints = get_type_hints(type(instance))
    for field in dataclasses.fields(instance):
        name, value = prefix + field.name, getattr(instance, field.name)
        if "choices" in field.metadata and value is not None:
            check_choice(name, value, field.metadata["choices"])
        limits, kinds = (bounds or {}).get(field.name) or bounds_of(field), _leaf_types(hints[field.name])
        if limits and not (value is None and type(None) in kinds):
            for number in value if isinstance(value, list) else [value]:
                check_bound(name, number, whole=float not in kinds, **limits)


def bounds_of(field: dataclasses.Field) -> dict[str, Any]:
    return {key: bound for key, bound in field.metadata.items() if key in IN_METADATA}


def _leaf_types(hint: Any) -> set:
    args = get_args(hint)
    return set().union(*map(_leaf_types, args)) if args else {hint}


def without_none(value: Any) -> Any:
    """Drop the keys that hold None from mappings at any depth: Arrow adds each key of one row to all others."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value
