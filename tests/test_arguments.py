"""arguments: what TrlParser lets pass is refused in one line, and every field takes its own default back."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainingArguments
from trl import GRPOConfig, ModelConfig, ScriptArguments, SFTConfig

from aesl_trl import arguments
from aesl_trl.errors import InputError


CPU = {"use_cpu": True, "bf16": False}


CPU = {"use_cpu": True, "bf16": False}


@dataclass
class Small:
    """One field of each kind that the real dataclasses have."""

    needed: str
    learning_rate: float = 1e-4
    steps: int = 3
    packing: bool = False
    ratio: float | None = None
    mode: Literal["aesl", "nll"] = "aesl"
    side: str = field(default="left", metadata={"choices": ["left", "right"]})
    kwargs: dict | str | None = None
    names: list[str] | None = None
    numbers: list[float] | None = None
    model_name_or_path: str | None = None
    dataset_name: str | None = None
    reward_funcs: list[str] | None = None
    output_dir: str = "out"

    def __post_init__(self):
        if self.steps < 0:
            raise ValueError("steps must be 0\nor more")


@pytest.fixture
def config(tmp_path):
    def write(text: str, name: str = "config.yaml") -> Path:
        path = tmp_path / name
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return path

    return write


def parse_small(path, *flags):
    (small,) = arguments.parse([Small], ["--config", str(path), *flags], prog="aesl test")
    return small


def refusal(text, config, *flags) -> str:
    with pytest.raises(InputError) as error:
        parse_small(config(text), *flags)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_config_fills_and_flags_win(config):
    small = parse_small(config("needed: x\nsteps: 5\nlearning_rate: 1e-5\n"), "--steps", "7")
    assert (small.needed, small.steps, small.learning_rate) == ("x", 7, 1e-5)


def test_equals_form_of_config(config):
    path = config("needed: x\n")
    (small,) = arguments.parse([Small], [f"--config={path}", "--steps=4"], prog="aesl test")
    assert (small.needed, small.steps) == ("x", 4)


def test_without_config():
    (small,) = arguments.parse([Small], ["--needed", "x", "--packing"], prog="aesl test")
    assert small.packing is True and small.needed == "x"


@pytest.mark.parametrize(
    "line, value",
    [
        ("learning_rate: 1", 1.0),
        ("learning_rate: 1e-5", 1e-5),
        ("learning_rate: 1.0e-5", 1e-5),
        ("ratio: null", None),
        ("ratio: 2", 2.0),
        ("packing: yes", True),
        ("kwargs: {a: 1}", {"a": 1}),
        ("kwargs: '{\"a\": 1}'", '{"a": 1}'),
        ("kwargs: null", None),
        ("names: all-linear", ["all-linear"]),
        ("names: [a, b]", ["a", "b"]),
        ("numbers: [1, 2e-1, 0.5]", [1.0, 0.2, 0.5]),
        ("mode: nll", "nll"),
        ("side: right", "right"),
    ],
)
def test_accepted_values(line, value, config):
    small = parse_small(config(f"needed: x\n{line}\n"))
    got = getattr(small, line.partition(":")[0])
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "line, parts",
    [
        ("learning_rat: 1", ["config.yaml", "'learning_rat'", "did you mean 'learning_rate'"]),
        ("1: 2", ["unknown key 1"]),
        ("learning_rate: fast", ["learning_rate must be float", "'fast'"]),
        ("learning_rate: true", ["learning_rate must be float", "true"]),
        ("learning_rate: nan", ["learning_rate must be float", "'nan'"]),
        ("learning_rate: .nan", ["learning_rate must be float"]),
        ("learning_rate: null", ["learning_rate must be float", "null"]),
        ("steps: 2.0", ["steps must be int", "2.0"]),
        ("steps: true", ["steps must be int", "true"]),
        ("steps: '3'", ["steps must be int", "'3'"]),
        ("steps: [3]", ["steps must be int", "[3]"]),
        ("packing: 1", ["packing must be true or false", "1"]),
        ("packing: 'true'", ["packing must be true or false"]),
        ("packing:", ["packing must be true or false", "null"]),
        ("ratio: x", ["ratio must be float or null"]),
        ("mode: aesll", ["mode must be one of aesl, nll", "did you mean 'aesl'"]),
        ("side: rigt", ["side must be one of left, right", "did you mean 'right'"]),
        ("side: 2024-01-01", ["side must be str", "date"]),
        ("kwargs: 3", ["kwargs must be a mapping or str or null"]),
        ("names: {a: b}", ["names must be a list of str or null"]),
        ("names: [1]", ["names must be a list of str or null"]),
        ("numbers: [a]", ["numbers must be a list of float or null"]),
        ("needed: y", ["line 2", "duplicate key 'needed'", "first on line 1"]),
        ("kwargs: {a: 1, a: 2}", ["line 2", "duplicate key 'a'"]),
        ("kwargs: {a: 1", ["config.yaml, line"]),
        ("steps: -1", ["config.yaml", "steps must be 0 or more"]),
        ("env: {PATH: /x}", ["env may not set 'PATH'", "set it in your shell"]),
        ("env: {OMP_NUM_THREADS: 1}", ["env.OMP_NUM_THREADS must be a str", "quotes"]),
        ("env: [a]", ["env must be a mapping"]),
        ("dataset_name: ./rows", ["dataset_name: ./rows does not exist"]),
        ("dataset_name: rows.jsonl", ["dataset_name: rows.jsonl does not exist"]),
        ("dataset_name: make.py:rows", ["make.py:rows does not exist"]),
        ("model_name_or_path: /no/such/model", ["/no/such/model does not exist"]),
        ("reward_funcs: [a, no.py:reward]", ["reward_funcs: no.py:reward does not exist"]),
    ],
)
def test_refused_lines(line, parts, config):
    message = refusal(f"needed: x\n{line}\n", config)
    for part in parts:
        assert part in message


def test_merge_keys_may_be_overridden(config):
    small = parse_small(config("needed: x\nkwargs: {<<: &base {a: 1}, a: 2}\n"))
    assert small.kwargs == {"a": 2}


@pytest.mark.parametrize("argv", [["--config"], ["--config", "--steps", "3"], ["--config="]])
def test_config_needs_a_value(argv):
    with pytest.raises(InputError, match="--config needs a file"):
        arguments.parse([Small], argv, prog="aesl test")


def test_config_only_once(config):
    path = str(config("needed: x\n"))
    with pytest.raises(InputError, match="given twice"):
        arguments.parse([Small], ["--config", path, "--config", path], prog="aesl test")


@pytest.mark.parametrize(
    "flags, parts",
    [
        (["--learning_rat", "1"], ["unknown flag --learning_rat", "'--learning_rate'"]),
        (["--step", "4"], ["unknown flag --step", "'--steps'"]),
        (["--stepz=4"], ["unknown flag --stepz", "'--steps'"]),
        (["--conf", "x"], ["unknown flag --conf", "'--config'"]),
        (["extra"], ["unknown argument extra"]),
        (["--steps", "x"], ["--steps", "invalid int value: 'x'"]),
        (["--steps"], ["--steps", "expected one argument"]),
        (["--side", "up"], ["--side", "'up'", "left"]),
        (["--steps", "-1"], ["steps must be 0 or more"]),
        (["--dataset_name", "./nowhere"], ["./nowhere does not exist"]),
    ],
)
def test_refused_flags(flags, parts, config, capsys):
    message = refusal("needed: x\n", config, *flags)
    for part in parts:
        assert part in message
    assert capsys.readouterr().err == ""


def test_required_field_is_named():
    with pytest.raises(InputError, match="--needed"):
        arguments.parse([Small], [], prog="aesl test")


def test_args_file_beside_the_script_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "script.args").write_text("--steps 9")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "script.py")])
    (small,) = arguments.parse([Small], ["--needed", "x"], prog="aesl test")
    assert small.steps == 3


@pytest.mark.parametrize(("flag", "shows_all"), [("--help", False), ("--help_all", True)])
def test_help(flag, shows_all, capsys):
    with pytest.raises(SystemExit) as leaving:
        arguments.parse([ScriptArguments, SFTConfig, ModelConfig], [flag], prog="aesl sft")
    assert leaving.value.code == 0
    out = capsys.readouterr().out
    assert "usage: aesl sft" in out and ("--learning_rate" in out) is shows_all


def test_env_is_set_only_when_all_is_well(config, monkeypatch):
    monkeypatch.delenv("HF_HUB_VERBOSITY", raising=False)
    refusal("needed: x\nenv: {HF_HUB_VERBOSITY: '1'}\nsteps: -1\n", config)
    assert "HF_HUB_VERBOSITY" not in os.environ
    monkeypatch.setenv("HF_HUB_VERBOSITY", "0")
    parse_small(config("needed: x\nenv: {HF_HUB_VERBOSITY: '1'}\n"))
    assert os.environ["HF_HUB_VERBOSITY"] == "1"


def test_config_paths_are_relative_to_the_config(config, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    (tmp_path / "model").mkdir()
    (tmp_path / "rows.jsonl").write_text("")
    (tmp_path / "rewards.py").write_text("")
    small = parse_small(
        config("""
        needed: rows.jsonl
        model_name_or_path: model
        dataset_name: ./rows.jsonl
        reward_funcs: [accuracy_reward, rewards.py:length, my.module.reward]
        output_dir: ../runs/one
        """)
    )
    assert small.model_name_or_path == str(tmp_path / "model")
    assert small.dataset_name == str(tmp_path / "rows.jsonl")
    assert small.reward_funcs == ["accuracy_reward", f"{tmp_path / 'rewards.py'}:length", "my.module.reward"]
    assert small.output_dir == str(tmp_path.parent / "runs/one")
    assert small.needed == "rows.jsonl"


def test_hub_names_stay(config):
    small = parse_small(config("needed: x\nmodel_name_or_path: Qwen/Qwen2.5-7B\ndataset_name: org/rows\n"))
    assert (small.model_name_or_path, small.dataset_name) == ("Qwen/Qwen2.5-7B", "org/rows")


def test_flag_paths_are_relative_to_the_current_folder(config, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "model").mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    small = parse_small(config("needed: x\n"), "--model_name_or_path", "model", "--output_dir", "here")
    assert small.model_name_or_path == str(elsewhere / "model")
    assert small.output_dir == str(elsewhere / "here")


def test_missing_file_names_its_neighbour(config, tmp_path):
    (tmp_path / "demonstrations.jsonl").write_text("")
    message = refusal("needed: x\ndataset_name: demonstration.jsonl\n", config)
    assert str(tmp_path) in message and "did you mean 'demonstrations.jsonl'" in message


def test_json_text_is_no_path(config, tmp_path):
    text = json.dumps({"zero": "x.json"})
    assert arguments.resolve("deepspeed", text, tmp_path) == text


def defaults(kind) -> dict:
    """Return each field's default as YAML would hold it."""
    values = {}
    for item in dataclasses.fields(kind):
        if item.init:
            default = item.default if item.default is not dataclasses.MISSING else item.default_factory()
            values[item.name] = default.value if isinstance(default, Enum) else default
    return values


@pytest.mark.parametrize("kind", [ScriptArguments, ModelConfig, SFTConfig, GRPOConfig, TrainingArguments])
def test_every_field_takes_its_default_from_yaml(kind, config):
    values = defaults(kind)
    path = config(yaml.safe_dump({**values, **(CPU if "use_cpu" in values else {})}))
    (got,) = arguments.parse([kind], ["--config", str(path)], prog="aesl test")
    plain = kind(**(CPU if "use_cpu" in values else {}))
    changed = {name for name in values if getattr(got, name) != getattr(plain, name)}
    # A default written out is that default, save that an output folder becomes absolute.
    assert changed <= {"output_dir", "logging_dir"}


def test_yaml_no_for_a_strategy_is_explained(config):
    path = config("eval_strategy: no\noutput_dir: x\n")
    with pytest.raises(InputError, match="eval_strategy must be one of no, .*write 'no' in quotes"):
        arguments.parse([SFTConfig], ["--config", str(path)], prog="aesl test")


def test_resume_takes_true(config):
    path = config("resume_from_checkpoint: true\nuse_cpu: true\nbf16: false\n")
    (args,) = arguments.parse([SFTConfig], ["--config", str(path)], prog="aesl test")
    assert args.resume_from_checkpoint is True
    argv = ["--config", str(path), "--resume_from_checkpoint", "false"]
    (args,) = arguments.parse([SFTConfig], argv, prog="aesl test")
    assert args.resume_from_checkpoint is False


def test_a_librarys_refusal_is_one_line(config):
    path = config("use_cpu: true\nbf16: false\nper_device_train_batch_size: 2\nnum_generations: 3\n")
    with pytest.raises(InputError) as error:
        arguments.parse([GRPOConfig], ["--config", str(path)], prog="aesl test")
    assert "\n" not in str(error.value) and "num_generations" in str(error.value)


# ---- Bounds


@dataclass
class Bounded:
    size: int = field(metadata={"at_least": 1})
    rate: float = field(default=0.5, metadata={"above": 0, "below": 1, "hint": "1 keeps nothing"})
    sizes: list[int] | None = field(default=None, metadata={"at_least": 1})


@pytest.mark.parametrize(
    "flags", [["--size", "0"], ["--size", "1", "--sizes", "3", "0"], ["--size", "1", "--rate", "1"]]
)
def test_bounds_in_metadata_hold_on_the_command_line(flags, config):
    with pytest.raises(InputError, match="but must be"):
        arguments.parse([Bounded], flags, prog="aesl test")
    with pytest.raises(InputError, match="size is 0, but must be at least 1"):
        arguments.parse([Bounded], ["--config", str(config("size: 0"))], prog="aesl test")
    assert arguments.parse([Bounded], ["--size", "1", "--sizes", "3"], prog="aesl test") == (Bounded(1, sizes=[3]),)


def test_infinity_is_refused_save_where_trl_takes_it(config):
    with pytest.raises(InputError, match="learning_rate is -inf, but must be a finite number, at least 0"):
        arguments.parse([SFTConfig], ["--learning_rate=-inf"], prog="aesl test")
    path = config(yaml.safe_dump({"max_grad_norm": math.inf, **CPU}))
    (args,) = arguments.parse([SFTConfig], ["--config", str(path)], prog="aesl test")
    assert args.max_grad_norm == math.inf


# ---- Folders


def test_a_folder_may_be_replaced_when_it_is_new_empty_or_our_own(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "model.safetensors").write_text("")
    for name in ("new/deep", "empty", "ours"):
        arguments.check_replaceable("output", tmp_path / name, name == "ours", [tmp_path / "run"])
    for name in ("new/a.txt", "ours/model.safetensors"):
        arguments.check_replaceable("output", tmp_path / name, name[:4] == "ours", is_file=True)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("run", "output: {0}/run is read from, and would be replaced; name a new folder"),
        (".", "output: {0} holds {0}/run, which is read from, and would be replaced; name a new folder"),
        ("notes", "output: {0}/notes holds other files, and would be replaced; name a new folder"),
        ("notes/a.txt", "output: {0}/notes/a.txt is a file; name another folder"),
        ("link", "output: {0}/link is a symlink, and would be replaced; name a new folder"),
        ("dangling", "output: {0}/dangling is a symlink, and would be replaced; name a new folder"),
    ],
)
def test_a_folder_that_may_not_be_replaced(target, message, tmp_path):
    for name in ("run", "notes", "empty"):
        (tmp_path / name).mkdir()
    for name in ("run", "notes"):
        (tmp_path / name / "a.txt").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError) as error:
        arguments.check_replaceable("output", tmp_path / target, False, [tmp_path / "run"])
    assert str(error.value) == message.format(tmp_path)


def test_a_file_of_somebody_else_may_not_be_replaced(tmp_path):
    (tmp_path / "report.html").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, problem in (("report.html", "was written by something else"), ("link", "is a symlink")):
        with pytest.raises(InputError, match=f"--output: .*{name} {problem}, and would be replaced; name a new fold"):
            arguments.check_replaceable("--output", tmp_path / name, False, is_file=True)


# ---- Parsers and functions by name


def test_the_argument_parser_refuses_in_one_line(capsys):
    parser = arguments.ArgumentParser("aesl test", "Test.")
    parser.add_argument("--patience", type=int)
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("copy").add_argument("target")
    assert parser.parse_args(["--patience", "3"]).patience == 3
    for argv, message in [
        (["--pat=3"], "unrecognized arguments: --pat=3 (see aesl test --help)"),
        (["--patience", "x"], "argument --patience: invalid int value: 'x' (see aesl test --help)"),
        (["copy"], "the following arguments are required: target (see aesl test copy --help)"),
    ]:
        with pytest.raises(InputError) as error:
            parser.parse_args(argv)
        assert str(error.value).endswith(message)
    assert capsys.readouterr() == ("", "")


@given(st.lists(st.text()))
def test_positionals_are_the_arguments_before_the_first_flag(argv):
    names, rest = arguments.positionals(argv)
    assert sorted(names + rest) == sorted(argv) and not any(name.startswith("-") for name in names)
    assert not rest or rest[0].startswith("-") or rest[0].endswith((".yaml", ".yml"))


@pytest.mark.parametrize(
    ("argv", "names", "rest"),
    [
        ("a b --flag c", "a b", "--flag c"),
        ("a x.yaml b", "a b", "x.yaml"),
        ("--config x b --flag y.yml", "b", "--config x --flag y.yml"),
        ("--flag a x.yaml", "", "--flag a x.yaml"),
        ("--config=x.yaml b --flag c", "b", "--config=x.yaml --flag c"),
    ],
)
def test_a_config_is_no_name(argv, names, rest):
    assert arguments.positionals(argv.split()) == (names.split(), rest.split())


@pytest.mark.parametrize(
    ("argv", "found"),
    [
        ("x.yaml --seed 3", "--config x.yaml --seed 3"),
        ("--seed 3 x.yml", "--seed 3 --config x.yml"),
        ("--dry_run x.yaml", "--dry_run --config x.yaml"),
        ("--config x.yaml", "--config x.yaml"),
        ("--run_name=my_config x.yaml", "--run_name=my_config --config x.yaml"),
        ("--fsdp_config x.yaml --run_name=y.yaml", "--fsdp_config x.yaml --run_name=y.yaml"),
        ("x.jsonl", "x.jsonl"),
    ],
)
def test_a_config_without_its_flag(argv, found):
    assert arguments.with_config_flag(argv.split()) == found.split()


def test_a_config_without_its_flag_is_read(config):
    path = config("needed: x\nsteps: 5\n")
    assert arguments.parse([Small], [str(path), "--packing"], prog="aesl test")[0] == Small("x", steps=5, packing=True)
    with pytest.raises(InputError, match="--config is given twice"):
        arguments.parse([Small], [str(path), "--config", str(path)], prog="aesl test")


@dataclass
class Renamed:
    """A command whose settings had other names before."""

    num_samples: int = field(default=8, metadata={"at_least": 1})
    output_dir: str = "."


@dataclass
class Kept:
    """A command with another `output`: its own setting beside TRL's `output_dir`."""

    output: str | None = None
    output_dir: str | None = None


def test_old_names_are_read_in_configs_and_flags(config, tmp_path, recwarn):
    path = config("samples: 3\noutput: there\n")
    (read,) = arguments.parse([Renamed], [str(path)], prog="aesl test")
    assert read == Renamed(3, str(tmp_path / "there"))
    (given,) = arguments.parse([Renamed], [str(path), "--samples=4", "--out", str(tmp_path / "o")], prog="aesl test")
    assert given == Renamed(4, str(tmp_path / "o")) and not recwarn
    (kept,) = arguments.parse([Kept], [str(config("output: a\n")), "--output_dir", "b"], prog="aesl test")
    assert (Path(kept.output).name, Path(kept.output_dir).name) == ("a", "b")
    with pytest.raises(InputError, match="num_samples is 0, but must be at least 1"):
        arguments.parse([Renamed], ["--samples", "0"], prog="aesl test")
    parser = arguments.ArgumentParser("aesl test")
    parser.add_argument("--output_dir")
    assert {parser.parse_args([flag, "x"]).output_dir for flag in ("--out", "--output", "--output-dir")} == {"x"}


def test_what_the_commands_of_others_have(config):
    assert "unknown key datasets: aesl_trl reads no mixture" in refusal("needed: x\ndatasets: []\n", config)
    for flag in ("--num_processes", "--accelerate-config"):
        assert f"unknown flag {flag}: accelerate launch" in refusal("needed: x\n", config, flag, "2")


def test_a_suggestion_is_made_only_where_it_is_close(config):
    assert refusal("needed: x\nlearning_rat: 1\n", config).endswith("did you mean 'learning_rate'?")
    assert refusal("needed: x\nlayers: 1\n", config).endswith("unknown key 'layers'")


def test_a_flag_with_a_dash_and_a_config_of_the_argument_parser():
    parser = arguments.ArgumentParser("aesl test")
    parser.add_argument("--config")
    parser.add_argument("--dry_run", action="store_true")
    parser.add_argument("--output_dir")
    given = parser.parse_args(["--dry-run", "x.yaml", "--output-dir=a-b"])
    assert (given.config, given.dry_run, given.output_dir) == ("x.yaml", True, "a-b")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_functions.rigth", "own_functions has no function 'rigth'; did you mean 'right'?"),
        ("own_functions.LIMIT", "own_functions holds a int, not a function, as 'LIMIT'"),
        ("no_such_module.right", "cannot import 'no_such_module.right': No module named 'no_such_module'"),
        ("own_broken.right", "own_broken cannot be imported: ZeroDivisionError: division by zero"),
    ],
)
def test_functions_by_import_path(name, message, tmp_path, monkeypatch):
    (tmp_path / "own_functions.py").write_text("LIMIT = 1\ndef right():\n    return 5\n")
    (tmp_path / "own_broken.py").write_text("1 / 0\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert arguments.import_function("own_functions.right", tmp_path, field="reward_funcs")() == 5
    with pytest.raises(InputError) as error:
        arguments.import_function(name, tmp_path, field="reward_funcs", known=["accuracy_reward"])
    assert str(error.value) == f"reward_funcs: {message}"
    monkeypatch.delitem(sys.modules, "own_functions")


def test_reading_a_config_does_not_import_trl():
    code = "import sys, aesl_trl.arguments; sys.exit('trl' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0


# ---- What a config may not do


CODE_OR_TOKENS = """
    PATH PYTHONPATH PYTHONSTARTUP LD_PRELOAD LD_LIBRARY_PATH BASH_ENV GIT_SSH_COMMAND HTTPS_PROXY
    CUDA_INJECTION64_PATH NCCL_NET_PLUGIN NCCL_TUNER_PLUGIN NCCL_PROFILER_PLUGIN NCCL_CONF_FILE OMP_TOOL_LIBRARIES
    TRITON_CACHE_DIR TRITON_PTXAS_PATH TRITON_LIBCUDA_PATH TORCH_LOGS TORCH_EXTENSIONS_DIR TORCHINDUCTOR_CACHE_DIR
    VLLM_PLUGINS VLLM_ALLOW_INSECURE_SERIALIZATION VLLM_CACHE_ROOT VLLM_NCCL_SO_PATH HF_ENDPOINT HF_HOME
    HF_MODULES_CACHE HF_TOKEN HF_HUB_CACHE HF_TOKEN_PATH HF_DATASETS_CACHE TRANSFORMERS_CACHE WANDB_BASE_URL
    WANDB_API_KEY WANDB_DIR COMET_URL_OVERRIDE MLFLOW_TRACKING_URI SWANLAB_API_HOST TRACKIO_SPACE_ID DS_ACCELERATOR
    ACCELERATE_DEEPSPEED_CONFIG_FILE
""".split()


@pytest.mark.parametrize("name", [*CODE_OR_TOKENS, "omp_num_threads", "OMP_NUM_THREADS\x00", "3"])
def test_no_variable_that_loads_code_or_moves_a_token(name, config):
    assert "set it in your shell" in refusal(f"needed: x\nenv: {{{json.dumps(name)}: '1'}}\n", config)


def test_a_variable_of_that_kind_is_never_let_in():
    """Hold the list against words that name code, programs, servers, secrets and the folders of caches."""
    words = "PATH PLUGIN LIBRAR PRELOAD URL URI ENDPOINT HOST _TOKEN KEY SECRET CACHE HOME INSECURE LOGS FILE PROXY"
    words = words.split()
    assert [name for name in arguments.ENV_NAMES if any(word in name for word in words)] == []
    assert [name for name in arguments.ENV_NAMES if name.endswith("_DIR")] == ["TENSORBOARD_LOGGING_DIR"]


def test_the_refusal_names_the_nearest_variable(config):
    assert "did you mean 'OMP_NUM_THREADS'?" in refusal("needed: x\nenv: {OMP_NUM_THREAD: '1'}\n", config)


def test_a_path_that_a_flag_replaces_need_not_exist(config, tmp_path):
    (tmp_path / "model").mkdir()
    text = "needed: x\nmodel_name_or_path: ./gone\ndataset_name: ./gone.jsonl\noutput_dir: /etc/passwd/x\n"
    flags = [
        "--model_name_or_path",
        str(tmp_path / "model"),
        "--dataset-name=name",
        "--output_dir",
        str(tmp_path / "o"),
    ]
    small = parse_small(config(text), *flags)
    assert small.model_name_or_path == str(tmp_path / "model") and small.dataset_name == "name"
    assert small.output_dir == str(tmp_path / "o")
    assert "model_name_or_path must be str" in refusal("needed: x\nmodel_name_or_path: 3\n", config, *flags[:2])


def test_a_seed_that_numpy_cannot_take_is_refused(config):
    for seed in (-1, 2**32, 2**64):
        with pytest.raises(InputError, match=rf"seed is {seed}, but must be at least 0 and at most 4294967295"):
            arguments.parse(
                [SFTConfig], ["--config", str(config(f"seed: {seed}\nuse_cpu: true\nbf16: false\n"))], prog="t"
            )
    with pytest.raises(InputError, match="config.yaml: data_seed is 4294967296"):
        arguments.load_config(config("data_seed: 4294967296\n"), [SFTConfig])


def test_a_name_that_no_file_system_takes(tmp_path):
    with pytest.raises(InputError, match="output_dir: 'aaa.*aaa' is longer than 255 bytes"):
        arguments.check_folder("output_dir", tmp_path / ("a" * 300) / "run")


def test_a_home_of_nobody_is_a_name(config):
    """`~nobody-here` is no home: pathlib would raise RuntimeError."""
    assert "does not exist" in refusal("needed: x\nmodel_name_or_path: ~nobody-here/model\n", config)


@pytest.mark.parametrize("text", ["import sys; sys.exit(0)", "raise SystemExit"])
def test_a_file_that_leaves_is_refused(text, tmp_path, monkeypatch):
    (tmp_path / "own_leaves.py").write_text(f"{text}\ndef right():\n    return 5\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(InputError, match="own_leaves.py cannot be imported: SystemExit"):
        arguments.load_function("own_leaves.py:right", tmp_path, field="reward_funcs")
    with pytest.raises(InputError, match="own_leaves cannot be imported: SystemExit"):
        arguments.import_function("own_leaves.right", tmp_path, field="reward_funcs")


def test_an_installed_module_wins_and_no_other_folder_is_imported_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "textwrap.py").write_text("def dedent(text):\n    return 'foreign'\n")
    (tmp_path / "wandb.py").write_text("raise SystemExit('foreign')\n")
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder != ""])
    before = list(sys.path)
    assert arguments.import_function("textwrap.dedent", None, field="reward_funcs")("  a") == "a"
    assert sys.path == before
