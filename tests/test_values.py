"""values: what YAML holds becomes the field's type or is refused in one line, and numbers stay within their bounds."""

import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from typing import Any, get_type_hints

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from trl import GRPOConfig, ModelConfig, ScriptArguments, SFTConfig

from aesl_trl import values
from aesl_trl.errors import InputError


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words\n", "", "3\n"])
def test_a_file_must_hold_a_mapping(text, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match="must hold a mapping") as error:
        values.load_yaml(path)
    assert "\n" not in str(error.value)


def test_a_setting_is_read_by_its_old_name_too(tmp_path, recwarn):
    path = tmp_path / "config.yaml"
    path.write_text("samples: 3\ndiversity_samples: 4\nchat_template_kwargs: {samples: 5}\noutput: x\n")
    found = {"num_samples": 3, "diversity_num_samples": 4, "chat_template_kwargs": {"samples": 5}, "output": "x"}
    assert values.load_yaml(path) == found and not recwarn
    path.write_text("samples: 3\nnum_samples: 4\n")
    with pytest.raises(InputError, match="config.yaml: samples is the old name of num_samples, .* keep num_samples"):
        values.load_yaml(path)


def test_a_file_that_is_not_utf8(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(b"needed: \xff\xfe\n")
    with pytest.raises(InputError, match="not YAML in UTF-8"):
        values.load_yaml(path)


def test_a_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "config_aesl.yaml").write_text("needed: x\n")
    with pytest.raises(InputError, match="does not exist; did you mean 'config_aesl.yaml'"):
        values.load_yaml(tmp_path / "config_asl.yaml")


@pytest.mark.parametrize("kind", [ScriptArguments, ModelConfig, SFTConfig, GRPOConfig])
def test_no_field_takes_an_object_that_yaml_cannot_mean(kind):
    hints = get_type_hints(kind)
    for item in dataclasses.fields(kind):
        if item.init and hints[item.name] is not Any:
            with pytest.raises(InputError, match=item.name):
                values.check_value(object(), hints[item.name], item, "config.yaml")


@given(st.floats(allow_nan=False))
def test_any_float_survives_yaml(number):
    value = yaml.safe_load(yaml.safe_dump({"a": number}))["a"]
    assert values._convert(value, float) == number


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text())


@given(st.one_of(SCALARS, st.lists(SCALARS), st.dictionaries(st.text(), SCALARS)))
def test_int_takes_ints_only(value):
    if type(value) is int:
        assert values._convert(value, int) == value
    else:
        with pytest.raises(values._Mismatch):
            values._convert(value, int)


@dataclass
class Inner:
    size: int = field(metadata={"at_least": 1})
    rate: float = field(default=0.5, metadata={"above": 0, "below": 1, "hint": "1 keeps nothing"})
    sizes: list[int] | None = field(default=None, metadata={"at_least": 1})
    side: str = field(default="left", metadata={"choices": ("left", "right")})
    limit: int | None = field(default=None, metadata={"at_least": 1, "at_most": 9})


@dataclass
class Outer:
    needed: Inner
    name: str = "x"
    maybe: Inner | None = None
    filled: Inner = field(default_factory=lambda: Inner(size=7))
    several: list[Inner] = field(default_factory=list)
    named: dict[str, Inner | None] = field(default_factory=dict)

    def __post_init__(self):
        if self.name == "bad":
            raise ValueError("name\nis bad")


def test_nested_dataclasses_are_built():
    one, two = {"size": 1}, {"size": 2, "rate": "1e-1"}
    outer = values.read_dataclass(
        Outer, {"needed": one, "maybe": two, "several": [one, two], "named": {"a": one, "b": None}}, "x.yaml"
    )
    built = Inner(size=2, rate=0.1)
    assert outer == Outer(Inner(1), maybe=built, several=[Inner(1), built], named={"a": Inner(1), "b": None})
    assert values.read_dataclass(Outer, {"needed": one}, "x.yaml") == Outer(Inner(1))
    assert values.read_dataclass(Outer, {"needed": one, "several": one}, "x.yaml").several == [Inner(1)]


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ([], "x.yaml must be a mapping (key: value), got the list []"),
        ({}, "x.yaml: needed is missing"),
        ({"needed": {}}, "x.yaml: needed: size is missing"),
        ({"needed": None}, "x.yaml: needed must be a mapping, got null"),
        ({"needed": {"size": 1}, "mabye": {}}, "x.yaml: unknown key 'mabye'; did you mean 'maybe'?"),
        ({"needed": {"size": 1}, "maybe": 3}, "x.yaml: maybe must be a mapping or null, got the int 3"),
        ({"needed": {"sise": 1}}, "x.yaml: needed: unknown key 'sise'; did you mean 'size'?"),
        ({"needed": {"size": True}}, "x.yaml: needed: size must be int, got true"),
        ({"needed": {"size": 0}}, "x.yaml: needed: size is 0, but must be at least 1"),
        (
            {"needed": {"size": 1, "rate": 1}},
            "x.yaml: needed: rate is 1.0, but must be above 0 and below 1; 1 keeps nothing",
        ),
        ({"needed": {"size": 1, "sizes": [1, 0]}}, "x.yaml: needed: sizes is 0, but must be at least 1"),
        ({"needed": {"size": 1, "limit": 10}}, "x.yaml: needed: limit is 10, but must be at least 1 and at most 9"),
        (
            {"needed": {"size": 1, "side": "rigt"}},
            "x.yaml: needed: side must be one of left, right, got the str 'rigt'; did you mean 'right'?",
        ),
        ({"needed": {"size": 1}, "several": [{"size": 1}, {}]}, "x.yaml: several[1]: size is missing"),
        ({"needed": {"size": 1}, "named": {"a": {"size": "1"}}}, "x.yaml: named.a: size must be int, got the str '1'"),
        ({"needed": {"size": 1}, "name": "bad"}, "x.yaml: name is bad"),
    ],
)
def test_nested_refusals_say_where(mapping, message):
    with pytest.raises(InputError) as error:
        values.read_dataclass(Outer, mapping, "x.yaml")
    assert str(error.value) == message


INNERS = st.builds(
    Inner,
    size=st.integers(1),
    rate=st.floats(0, 1, exclude_min=True, exclude_max=True),
    sizes=st.none() | st.lists(st.integers(1)),
    side=st.sampled_from(["left", "right"]),
    limit=st.none() | st.integers(1, 9),
)


@given(st.builds(Outer, INNERS, maybe=st.none() | INNERS, several=st.lists(INNERS, max_size=3), filled=INNERS))
def test_a_nested_dataclass_survives_yaml(outer):
    text = yaml.safe_dump(dataclasses.asdict(outer))
    assert values.read_dataclass(Outer, yaml.safe_load(text), "x.yaml") == outer


def test_an_option_is_a_field_with_help_and_bounds():
    @dataclass
    class Options:
        size: int = values.option(8, "Size.", at_least=1)
        names: list[str] = values.option(["a"], "Names.")

    assert Options().names == ["a"] and Options().names is not Options().names
    assert dict(dataclasses.fields(Options)[0].metadata) == {"help": "Size.", "at_least": 1}


@given(st.floats() | st.integers(), st.integers(-3, 3), st.integers(-3, 3))
def test_a_number_within_its_bounds_passes_and_no_other(number, low, high):
    fits = math.isfinite(number) if isinstance(number, float) else True
    for bounds, is_inside in [
        ({"at_least": low}, number >= low),
        ({"above": low, "below": high}, low < number < high),
        ({"at_least": low, "at_most": high}, low <= number <= high),
    ]:
        if fits and is_inside:
            values.check_bound("size", number, **bounds)
        else:
            with pytest.raises(InputError, match="^size is .*, but must be "):
                values.check_bound("size", number, **bounds)


@pytest.mark.parametrize(
    ("value", "options", "message"),
    [
        (0, {"at_least": 1}, "size is 0, but must be at least 1"),
        (0.5, {"at_least": 1, "whole": True}, "size is 0.5, but must be a whole number, at least 1"),
        (True, {"at_least": 1, "whole": True}, "size is True, but must be a whole number, at least 1"),
        ("3", {"above": 0}, "size is '3', but must be a finite number, above 0"),
        (None, {"above": 0}, "size is None, but must be a finite number, above 0"),
        (math.inf, {"above": 0}, "size is inf, but must be a finite number, above 0"),
        (math.nan, {"below": 1}, "size is nan, but must be a finite number, below 1"),
        (2, {"below": 1, "hint": "1 releases nothing"}, "size is 2, but must be below 1; 1 releases nothing"),
    ],
)
def test_a_refused_number_is_told(value, options, message):
    with pytest.raises(InputError) as error:
        values.check_bound("size", value, **options)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("given", "bounds", "message"),
    [
        ({"size": 0}, {}, "own_size is 0, but must be at least 1"),
        ({"size": None}, {}, "own_size is None, but must be a whole number, at least 1"),
        ({"size": 2.0}, {}, "own_size is 2.0, but must be a whole number, at least 1"),
        ({"size": 1, "side": "up"}, {}, "own_side is 'up', but must be one of left, right"),
        ({"size": 1}, {"size": {"at_least": 2}}, "own_size is 1, but must be at least 2"),
    ],
)
def test_a_dataclass_made_in_python_is_checked(given, bounds, message):
    values.check_bounds(Inner(size=3, limit=9, sizes=[1, 2]))
    with pytest.raises(InputError) as error:
        values.check_bounds(Inner(**given), "own_", bounds)
    assert str(error.value) == message


# ---- Configs that somebody made to do harm


def write_config(folder, text):
    (folder / "config.yaml").write_text(text)
    return folder / "config.yaml"


def bomb(levels, name):
    """Return a text of some 50 bytes a level, of which `name` holds ten to the power of `levels` values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join([*lines, f"{name}: *a{levels - 1}"]) + "\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (bomb(10, "output_dir"), "holds more than 100,000 values"),
        ("a: &a [*a]\n", "holds more than 100,000 values"),
        ("a: &a {b: *a}\n", "holds more than 100,000 values"),
        ("a: " + "[" * 5000 + "]" * 5000, "too many levels"),
        ("a: " + "{b: " * 3000 + "1" + "}" * 3000, "too many levels"),
        ("? [a, b]\n: 1\n", "line 1: a key must be a name"),
        ("? {a: b}\n: 1\n", "line 1: a key must be a name"),
        ("a: {? [a, b] : 1}\n", "line 1: a key must be a name"),
        (f"a: {'9' * 5000}\n", "not YAML in UTF-8"),
        ('a: 1\nb: "\\ud83d"\n', "line 2: an escape of .* without its other half is no character"),
        ('"\\ude00": 1\n', "line 1: an escape of .* without its other half is no character"),
    ],
    ids=[
        *("bomb", "list of itself", "mapping of itself", "brackets", "braces", "list", "mapping", "inner", "digits"),
        *("half a character", "half a character as key"),
    ],
)
def test_a_hostile_config_is_one_line(text, says, tmp_path):
    with pytest.raises(InputError, match=says) as error:
        values.load_yaml(write_config(tmp_path, text))
    assert "\n" not in str(error.value) and len(str(error.value)) < 300 + len(str(tmp_path))


def test_escapes_of_a_character_are_joined_as_json_joins_them(tmp_path):
    value = {"output_dir": "runs/\U0001f600", "\U00010000": ["\n\uffff\ufeff", "é"]}
    assert values.load_yaml(write_config(tmp_path, json.dumps(value))) == value


def test_aliases_of_a_sane_size_stay(tmp_path):
    config = values.load_yaml(write_config(tmp_path, bomb(4, "b")))
    assert config["b"] is config["a3"] and len(config["b"]) == 10


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (["x" * 1000] * 1000, "the list ['xxx"),
        ({"a": [[[[[[[[1]]]]]]]]}, "the dict {'a': "),
        (16**5000, "the int of 20001 bits"),
        ("x" * 10**6, "the str 'xxx"),
    ],
    ids=["list", "dict", "int", "str"],
)
def test_a_value_is_shown_in_a_few_words(value, text):
    assert values.shown(value).startswith(text) and len(values.shown(value)) < 100


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\xef\xbb\xbfa: 1\r\nb: 2\r\n", None),  # as Windows writes it
        ("a: 1\nb: 2\n".encode("utf-16"), "not YAML in UTF-8"),
        ("a: caf\xe9\n".encode("latin-1"), "not YAML in UTF-8"),
        (b"a: 1\0\nb: 2\n", "not YAML in UTF-8"),
        (b"a: 1\n---\nb: 2\n", "line 2: but found another document"),
        (b"a: !!python/object/apply:os.getpid []\n", "could not determine a constructor"),
        (None, "does not exist"),
    ],
    ids=["BOM and CRLF", "UTF-16", "Latin-1", "NUL", "two documents", "tag", "pipe"],
)
def test_a_config_of_other_bytes_is_read_or_one_line(content, says, tmp_path):
    path = tmp_path / "config.yaml"
    if content is None:
        os.mkfifo(path)  # to read it would be to wait for ever
    else:
        path.write_bytes(content)
    if says is None:
        assert values.load_yaml(path) == {"a": 1, "b": 2}
        return
    with pytest.raises(InputError, match=says) as error:
        values.load_yaml(path)
    assert "\n" not in str(error.value)
