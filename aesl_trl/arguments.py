"""Command lines and configs become dataclasses, behind a check that lets nothing pass silently.

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
import os
import sys
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, get_type_hints

from .commands import CONFIG_FLAG, command_of
from .errors import InputError, in_one_line, is_by_signal, nearest, nearest_sibling, tell
from .files import read_object
from .flag_help import HelpFormatter, help_of
from .values import (
    ALSO_BOOL,
    IN_METADATA,
    OLD_NAMES,
    OLD_OUTPUTS,
    REFUSALS,
    SEED_BOUNDS,
    SHORT,
    bounds_of,
    check_bound,
    check_value,
    load_yaml,
    shown,
    with_new_names,
)


# The variables that a config may set. None of them names code, a program, a library, a server or a secret: whoever
# wrote the config must not thereby run code or be sent a token. A folder of caches is none of them: it may hold code.
ENV_NAMES = frozenset(
    """
    OMP_NUM_THREADS OMP_PROC_BIND OMP_PLACES MKL_NUM_THREADS MKL_DYNAMIC TOKENIZERS_PARALLELISM
    HF_HUB_OFFLINE HF_HUB_DISABLE_TELEMETRY HF_HUB_DISABLE_PROGRESS_BARS HF_HUB_DISABLE_XET HF_HUB_VERBOSITY
    HF_HUB_DOWNLOAD_TIMEOUT HF_HUB_ETAG_TIMEOUT HF_XET_HIGH_PERFORMANCE HF_DATASETS_OFFLINE DATASETS_VERBOSITY
    HF_DATASETS_IN_MEMORY_MAX_SIZE TRANSFORMERS_OFFLINE TRANSFORMERS_VERBOSITY TRANSFORMERS_NO_ADVISORY_WARNINGS
    TRL_EXPERIMENTAL_SILENCE ACCELERATE_LOG_LEVEL ACCELERATE_USE_CPU ACCELERATE_MIXED_PRECISION DS_SKIP_CUDA_CHECK
    CUDA_VISIBLE_DEVICES CUDA_DEVICE_ORDER CUDA_LAUNCH_BLOCKING CUDA_DEVICE_MAX_CONNECTIONS CUDA_MODULE_LOADING
    CUBLAS_WORKSPACE_CONFIG PYTORCH_ALLOC_CONF PYTORCH_CUDA_ALLOC_CONF PYTORCH_NO_CUDA_MEMORY_CACHING
    PYTORCH_NVML_BASED_CUDA_CHECK TORCH_DISTRIBUTED_DEBUG TORCH_CPP_LOG_LEVEL TORCH_SHOW_CPP_STACKTRACES
    TORCH_ALLOW_TF32_CUBLAS_OVERRIDE TORCH_COMPILE_DISABLE TORCH_NCCL_ASYNC_ERROR_HANDLING TORCH_NCCL_BLOCKING_WAIT
    TORCH_NCCL_AVOID_RECORD_STREAMS TORCH_NCCL_ENABLE_MONITORING TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC TRITON_INTERPRET
    NCCL_DEBUG NCCL_DEBUG_SUBSYS NCCL_ALGO NCCL_PROTO NCCL_BUFFSIZE NCCL_SOCKET_IFNAME NCCL_IB_DISABLE NCCL_IB_HCA
    NCCL_IB_GID_INDEX NCCL_IB_TIMEOUT NCCL_IB_RETRY_CNT NCCL_P2P_DISABLE NCCL_P2P_LEVEL NCCL_SHM_DISABLE
    NCCL_NET_GDR_LEVEL NCCL_CROSS_NIC NCCL_NVLS_ENABLE NCCL_CUMEM_ENABLE NCCL_IB_TC NCCL_IB_SL
    NCCL_IB_QPS_PER_CONNECTION NCCL_IB_PCI_RELAXED_ORDERING NCCL_MIN_NCHANNELS NCCL_MAX_NCHANNELS NCCL_NSOCKS_PERTHREAD
    NCCL_SOCKET_NTHREADS NCCL_SOCKET_FAMILY NCCL_IGNORE_CPU_AFFINITY GLOO_SOCKET_IFNAME TORCH_NCCL_TRACE_BUFFER_SIZE
    TORCH_NCCL_DUMP_ON_TIMEOUT TORCH_USE_CUDA_DSA PYTORCH_HIP_ALLOC_CONF PYTORCH_ENABLE_MPS_FALLBACK
    PYTORCH_MPS_HIGH_WATERMARK_RATIO HF_HUB_ENABLE_HF_TRANSFER HF_DATASETS_DISABLE_PROGRESS_BARS OMP_DYNAMIC
    OMP_WAIT_POLICY MKL_CBWR VLLM_FLASH_ATTN_VERSION VLLM_RPC_TIMEOUT
    VLLM_LOGGING_LEVEL VLLM_USE_V1 VLLM_ENABLE_V1_MULTIPROCESSING VLLM_WORKER_MULTIPROC_METHOD VLLM_NO_USAGE_STATS
    VLLM_ALLOW_LONG_MAX_MODEL_LEN VLLM_USE_FLASHINFER_SAMPLER VLLM_USE_DEEP_GEMM
    WANDB_PROJECT WANDB_ENTITY WANDB_NAME WANDB_NOTES WANDB_TAGS WANDB_RUN_GROUP WANDB_JOB_TYPE WANDB_MODE WANDB_SILENT
    WANDB_DISABLED WANDB_WATCH WANDB_LOG_MODEL WANDB_CONSOLE WANDB_RUN_ID WANDB_RESUME TRACKIO_PROJECT
    MLFLOW_EXPERIMENT_NAME MLFLOW_TAGS MLFLOW_NESTED_RUN MLFLOW_FLATTEN_PARAMS MLFLOW_MAX_LOG_PARAMS
    HF_MLFLOW_LOG_ARTIFACTS COMET_PROJECT_NAME COMET_WORKSPACE COMET_MODE SWANLAB_PROJECT SWANLAB_WORKSPACE
    SWANLAB_MODE TENSORBOARD_LOGGING_DIR
    """.split()
)
# We look up a relative value of these fields beside the config. A name that is not there may be one on the hub.
INPUT_FIELDS = set(
    "model_name_or_path adapter_name_or_path reward_model_name_or_path reference start final run base "
    "dataset_name eval_dataset_name diversity_dataset_name data_dir reward_funcs decontaminate pass_rate_file "
    "resume_from_checkpoint deepspeed fsdp_config accelerator_config chat_template_path".split()
)
OUTPUT_FIELDS = {"output_dir", "logging_dir", "output"}
DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
# Bounds of TRL's and transformers' own numbers. Outside of them a run trains nothing, or another thing than was asked
# for (`max_length: -1` cuts off the end of each row), or fails once the model has loaded.
TRL_BOUNDS = {
    **dict.fromkeys("learning_rate weight_decay max_grad_norm warmup_steps".split(), {"at_least": 0}),
    **dict.fromkeys(("seed", "data_seed"), SEED_BOUNDS),
    **dict.fromkeys("per_device_train_batch_size per_device_eval_batch_size lora_r".split(), {"at_least": 1}),
    **dict.fromkeys("gradient_accumulation_steps max_length max_completion_length".split(), {"at_least": 1}),
    "num_generations": {"at_least": 2},
    **dict.fromkeys(("num_train_epochs", "temperature"), {"above": 0}),
    "logging_steps": {"above": 0, "hint": "logging_strategy: 'no' turns it off"},
    "eval_steps": {"above": 0, "hint": "eval_strategy: 'no' turns it off"},
    "save_steps": {"above": 0, "hint": "save_strategy: 'no' turns it off"},
}
MODEL_CONFIG = "model_config.json"  # of a recipe: what is known of its model without weights
CONFIG_SUFFIXES = (".yaml", ".yml")
HELP_ALL = {"--help_all", "--help-all"}
# Keys and flags of TRL's and accelerate's commands that these commands do not have: what to do instead.
NOT_HERE = {
    "datasets": "aesl_trl reads no mixture of datasets: name one file or dataset as dataset_name",
    "num_processes": "accelerate launch --num_processes N -m aesl_trl.sft (or aesl_trl.grpo) starts several processes",
    "accelerate_config": "accelerate launch --config_file FILE -m aesl_trl.sft (or aesl_trl.grpo), or aesl chain",
    "config_file": "accelerate launch --config_file FILE -m aesl_trl.sft (or aesl_trl.grpo), or aesl chain",
    "dry_run": "aesl recipes check CONFIG.yaml checks a config; aesl chain and aesl compare have a dry run",
}
TAKE_A_FILE = ("aesl eval", "aesl probe")  # commands whose output_dir may be the file itself, NAME.json
MAX_NAME_BYTES = 255  # of a file or folder, on every common file system


def parse(dataclass_types: Sequence[type], argv: Sequence[str], *, prog: str, to_come: Collection[str] = ()) -> tuple:
    """Build `dataclass_types` from the config that `--config` names and from the flags of `argv`, which win over it.

    No two of the dataclasses share a field. `--help` prints our fields and `--help_all` those of TRL as well, with
    `prog` as the command's name; both leave with code 0. The config may name the absolute paths `to_come` although
    they do not exist yet.

    Raises:
        InputError: an unknown, duplicate or mistyped key or flag, a missing file, or a value that a dataclass refuses.
    """
    path, flags = split_config(with_config_flag(argv))
    flags = with_new_flags(flags, {field.name for kind in dataclass_types for field in dataclasses.fields(kind)})
    config = load_config(path, dataclass_types, to_come, flag_names(flags)) if path else {}
    env = config.pop("env", {})
    parser = _strict_parser(dataclass_types, prog, config)
    if HELP_ALL & {*flags}:
        tell(parser.format_help(shows_all=True))
        sys.exit(0)
    try:
        outputs = parser.parse_args_into_dataclasses(args=flags, look_for_args_file=False)
    except InputError:
        raise
    except REFUSALS as error:
        raise InputError((f"{path}: " if path else "") + in_one_line(error, 2000)) from error
    os.environ.update(env)
    return outputs


def with_config_flag(argv: Sequence[str]) -> list[str]:
    """Return `argv` with `--config FILE` in place of a bare FILE that ends in .yaml or .yml.

    After a flag whose name ends in config, such as `--fsdp_config`, the file is that flag's value.
    """
    found, flag = [], ""
    for argument in argv:
        is_bare = argument.endswith(CONFIG_SUFFIXES) and not argument.startswith("-") and not flag.endswith("config")
        found += [CONFIG_FLAG, argument] if is_bare else [argument]
        flag = argument if argument.startswith("--") and "=" not in argument else ""
    return found


def setting_of(argument: str) -> str:
    """Return the setting that a flag names; argparse knows each flag with - in place of _ too. "" for another word."""
    return argument.partition("=")[0][2:].replace("-", "_") if argument.startswith("--") else ""


def with_new_flags(flags: Sequence[str], known: Collection[str]) -> list[str]:
    """Return `flags` with today's names of settings, where an old name is none of the `known` settings."""
    found = []
    for argument in flags:
        _, equals, value = argument.partition("=")
        name = setting_of(argument)
        new = (OLD_NAMES | OLD_OUTPUTS).get(name)
        found.append(f"--{new}{equals}{value}" if name not in known and new in known else argument)
    return found


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


def flag_names(flags: Sequence[str]) -> set[str]:
    """Return the fields that the command line sets."""
    return {setting_of(flag) for flag in flags if flag.startswith("--")}


def load_config(
    path: str | Path, dataclass_types: Sequence[type], to_come: Collection[str] = (), given: Collection[str] = ()
) -> dict:
    """Return the config in `path`, each value of its field's type, paths absolute; `env` stays as it is.

    Fields that are `given` elsewhere are left out, so a path that is not used need not exist.
    """
    path = Path(path)
    config = load_yaml(path)
    fields = {field.name: field for kind in dataclass_types for field in dataclasses.fields(kind) if field.init}
    hints = {name: hint for kind in dataclass_types for name, hint in get_type_hints(kind).items()}
    if "output_dir" in fields and "output" not in fields:
        config = with_new_names(config, str(path), OLD_OUTPUTS)
    env, found = config.pop("env", {}), {}
    if not isinstance(env, dict):
        raise InputError(f"{path}: env must be a mapping of variables, got {shown(env)}")
    for key, value in env.items():
        if key not in ENV_NAMES:
            raise InputError(
                f"{path}: env may not set {SHORT.repr(key)}{nearest(key, ENV_NAMES)}; if you trust it, set it in your "
                "shell: a config sets only variables that name no code, program, server or secret"
            )
        if not isinstance(value, str):
            raise InputError(f"{path}: env.{key} must be a str, got {shown(value)}; write it in quotes")
    for key, value in config.items():
        if key in NOT_HERE and key not in fields:
            raise InputError(f"{path}: unknown key {key}: {NOT_HERE[key]}")
        if key not in fields:
            raise InputError(f"{path}: unknown key {SHORT.repr(key)}{nearest(key, [*fields, 'env'])}")
        value = check_value(value, hints[key], fields[key], str(path))
        if key not in given:
            found[key] = resolve(key, value, path.absolute().parent, to_come)
    _check_numbers(found, dataclass_types, f"{path}: ")
    return {**found, "env": env}


def without_defaults(config: Mapping[str, Any], dataclass_types: Sequence[type]) -> dict[str, Any]:
    """Return the values of `config` as their fields type them, without those that equal their field's default.

    A value that no field can take, and a key without a field, stay as they are: only another run may have known them.
    """
    fields = {field.name: field for kind in dataclass_types for field in dataclasses.fields(kind)}
    hints = {name: hint for kind in dataclass_types for name, hint in get_type_hints(kind).items()}
    config, found = {OLD_NAMES.get(key, key): value for key, value in config.items()}, {}
    for key, value in config.items():
        if field := fields.get(key):
            with suppress(InputError):
                value = check_value(value, hints[key], field, "")
            is_made = field.default_factory is not dataclasses.MISSING
            if value == (field.default_factory() if is_made else field.default):
                continue
        found[key] = value
    return found


def check_folder(name: str, path: str | Path) -> None:
    """Refuse a folder, given as the setting `name`, that cannot be made or written to. Nothing is made here."""
    path = Path(os.path.abspath(path))
    if long := [part for part in path.parts if len(os.fsencode(part)) > MAX_NAME_BYTES]:
        raise InputError(f"{name}: {SHORT.repr(long[0])} is longer than {MAX_NAME_BYTES} bytes; give a shorter name")
    place = next(parent for parent in (path, *path.parents) if parent.exists())
    if not place.is_dir():
        problem = "is a file" if place == path else f"cannot be made, {place} is a file"
        raise InputError(f"{name}: {path} {problem}; name another folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"{name}: no permission to write in {place}; name another folder")


def check_replaceable(
    name: str, target: str | Path, is_ours: bool, kept: Iterable[str | Path] = (), *, is_file: bool = False
) -> None:
    """Refuse a folder `target`, with `is_file` a file, that a command may not replace by a new one as a whole.

    `name` is the setting that names it. It may be there, and not empty, only if `is_ours`: an earlier run of the
    command has written it. It must be no symlink, and hold none of `kept`, the folders that the command reads.
    """
    target = Path(target)
    check_folder(name, target.parent if is_file else target)
    if target.is_symlink():
        raise InputError(f"{name}: {target} is a symlink, and would be replaced; name a new folder")
    for folder in map(Path, kept):
        if folder.resolve().is_relative_to(target.resolve()):
            is_target = folder.resolve() == target.resolve()
            problem = "is read from" if is_target else f"holds {folder}, which is read from"
            raise InputError(f"{name}: {target} {problem}, and would be replaced; name a new folder")
    is_there = not target.is_dir() and target.exists()
    with suppress(FileNotFoundError, NotADirectoryError):  # another process may just swap it
        is_there = bool(os.listdir(target))
    if is_there and not is_ours:
        problem = "holds other files" if target.is_dir() else "was written by something else"
        raise InputError(f"{name}: {target} {problem}, and would be replaced; name a new folder")


def output_folder(output_dir: str, prog: str) -> str:
    """Return the folder that `output_dir` names for the command `prog`; some commands take a file's name too."""
    is_file = prog in TAKE_A_FILE and output_dir.endswith(".json")
    return os.path.dirname(os.path.abspath(output_dir)) if is_file else output_dir


def resolve(name: str, value: Any, folder: Path, to_come: Collection[str] = ()) -> Any:
    """Return the value of the field `name`, made absolute against `folder` where it is a path.

    Names on the hub, and values of fields that hold no path, are returned unchanged. A value that can only be a path
    (`./x`, `../x`, `/x`, a data file, `file.py:function`) must exist.
    """
    if isinstance(value, list) and name in INPUT_FIELDS:
        return [resolve(name, item, folder, to_come) for item in value]
    if not isinstance(value, str) or not value:
        return value
    if name in OUTPUT_FIELDS:
        return os.path.abspath(folder / os.path.expanduser(value))
    file, colon, function = value.rpartition(":")
    is_function = bool(colon) and file.endswith(".py")
    # A JSON text may stand where a path may, as in `deepspeed`; a reward may be a name.
    if name not in INPUT_FIELDS or value[0] == "{" or (name == "reward_funcs" and not is_function):
        return value
    target = Path(os.path.abspath(folder / os.path.expanduser(file if is_function else value)))
    if target.exists() or str(target) in to_come:
        return f"{target}:{function}" if is_function else str(target)
    if is_function or value.startswith(("./", "../", "/", "~")) or value.endswith(DATA_SUFFIXES):
        hint = nearest_sibling(target) or _made_by(target, folder)
        raise InputError(f"{name}: {value} does not exist, looked for {target}{hint}")
    return value


def _made_by(target: Path, folder: Path) -> str:
    """Return the command that writes the missing `target`, where the recipe in or above `folder` names one."""
    for place in (folder, folder.parent):
        if command := prepared_models(place).get(str(target)):
            return f"; first make it: {command}"
    for path in (path for place in (folder, folder.parent) for path in sorted(place.glob("data*.yaml"))):
        with suppress(InputError):
            output = load_yaml(path).get("output_dir")
            if isinstance(output, str) and resolve("output_dir", output, path.parent) == str(target.parent):
                return f"; first make it: aesl data --config {os.path.relpath(path)}"
    return ""


def _strict_parser(dataclass_types: Sequence[type], prog: str, config: dict[str, Any]):
    # TRL takes seconds to import, and reading a YAML file (`aesl chain --help`) needs none of it.
    from trl import TrlParser

    class StrictParser(TrlParser):
        """TrlParser with one line instead of a usage dump, and paths checked against the current folder."""

        def add_argument(self, *names, **options):
            for key in IN_METADATA:  # TrlParser hands on all metadata of a field, and argparse knows nothing of bounds
                options.pop(key, None)
            return super().add_argument(*names, **options)

        def error(self, message):
            raise InputError(message)

        def format_help(self, shows_all: bool = False):
            return help_of(self, dataclass_types, shows_all)

        def parse_known_args(self, args=None, namespace=None):
            # The config's values enter as they are: a default would be parsed once more as text.
            namespace, rest = super().parse_known_args(args, argparse.Namespace(**config))
            if rest:
                _refuse_unknown(rest[0].partition("=")[0], [CONFIG_FLAG, *self._option_string_actions])
            values = vars(namespace)
            for name, value in values.items():
                # The config's values are resolved already, and a default is no path of the command line.
                if value != config.get(name, self.get_default(name)):
                    if name in ALSO_BOOL and isinstance(value, str):
                        value = {"true": True, "false": False}.get(value.lower(), value)
                    values[name] = resolve(name, value, Path.cwd())
            _check_numbers(values, dataclass_types)
            _check_output_dir(values, self.prog)
            return namespace, rest

    parser = StrictParser(dataclass_types, prog=prog, allow_abbrev=False, formatter_class=HelpFormatter)
    for action in parser._actions:
        action.required = action.required and action.dest not in config
    return parser


def _refuse_unknown(flag: str, known: Iterable[str]) -> None:
    name = flag.lstrip("-").replace("-", "_")
    if name in NOT_HERE:
        raise InputError(f"unknown flag {flag}: {NOT_HERE[name]}")
    raise InputError(f"unknown {'flag' if flag[0] == '-' else 'argument'} {flag}{nearest(flag, known)}")


def _check_numbers(values: dict[str, Any], dataclass_types: Sequence[type], prefix: str = "") -> None:
    """Check the parsed numbers before the dataclasses are built, whose own messages tell less."""
    own = {field.name: bounds_of(field) for kind in dataclass_types for field in dataclasses.fields(kind)}
    bounds = TRL_BOUNDS | {name: limits for name, limits in own.items() if limits}
    if values.get("max_steps", -1) != -1:
        check_bound(f"{prefix}max_steps", values["max_steps"], at_least=1, hint="-1 trains for num_train_epochs")
    for name, value in values.items():
        for number in value if isinstance(value, list) else [value]:
            is_number = isinstance(number, int | float) and not isinstance(number, bool)
            # An infinite max_grad_norm measures the norm and clips nothing.
            if name in bounds and is_number and (name, number) != ("max_grad_norm", math.inf):
                check_bound(prefix + name, number, **bounds[name])


def prepared_models(recipe: Path) -> dict[str, str]:
    """Map the absolute folder of each model that the scripts of a recipe write to the command that writes it."""
    prepared = read_object(recipe / MODEL_CONFIG).get("prepared", {})
    return {os.path.abspath(recipe / folder): command for folder, command in prepared.items()}


def _check_output_dir(values: dict[str, Any], prog: str) -> None:
    folder = values.get("output_dir")
    if not isinstance(folder, str):
        return
    check_folder("output_dir", output_folder(folder, prog))
    for name in ("model_name_or_path", "adapter_name_or_path"):
        source = values.get(name)
        if isinstance(source, str) and os.path.isdir(source) and os.path.realpath(source) == os.path.realpath(folder):
            raise InputError(f"output_dir: {folder} is {name} too, and would be overwritten; name another folder")


class ArgumentParser(argparse.ArgumentParser):
    """The parser of the commands that take flags only: no abbreviations, and one line instead of a usage dump.

    Its texts are those of commands.py. A flag may be written with - in place of _, and a config without its flag.
    """

    def __init__(self, prog: str, description: str | None = None, **options):
        if command := command_of(prog):
            options = {"usage": f"{prog} {command.usage}".strip(), "epilog": command.epilog, **options}
        description = command.description if command else description
        super().__init__(
            prog=prog, description=description, allow_abbrev=False, formatter_class=HelpFormatter, **options
        )

    def parse_known_args(self, args=None, namespace=None):
        args, known = list(sys.argv[1:] if args is None else args), self._option_string_actions
        if CONFIG_FLAG in known:
            args = with_config_flag(args)
        spelt = [argument.partition("=") for argument in args]
        named = ["--" + setting_of(flag) if flag.startswith("--") else flag for flag, _, _ in spelt]
        args = [
            name + equals + value if name in known else argument
            for name, (_, equals, value), argument in zip(named, spelt, args, strict=True)
        ]
        return super().parse_known_args(with_new_flags(args, {flag[2:] for flag in known}), namespace)

    def error(self, message: str) -> None:
        raise InputError(f"{message} (see {self.prog} --help)")


def positionals(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the arguments into the names before the first flag, and the rest. A config is no name, wherever it is."""
    names, configs, rest = [], [], list(argv)
    while rest and (not rest[0].startswith("-") or rest[0].partition("=")[0] == CONFIG_FLAG):
        length = 2 if rest[0] == CONFIG_FLAG else 1
        is_name = not rest[0].startswith("-") and not rest[0].endswith(CONFIG_SUFFIXES)
        (names if is_name else configs).extend(rest[:length])
        del rest[:length]
    return names, configs + rest


def load_function(name: str, base_dir: str | Path | None = None, *, field: str) -> Callable:
    """Return the function that `file.py:function`, the value of the setting `field`, names.

    A relative file is looked up in `base_dir`, by default the current folder. The file may import its neighbours.
    """
    file, _, function = name.rpartition(":")
    path = Path(os.path.abspath(Path(base_dir or ".") / os.path.expanduser(file)))
    if not path.is_file():
        raise InputError(f"{field}: {file} does not exist, looked for {path}{nearest_sibling(path)}")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # sys.exit(0) would pass for the end of the command
        if is_by_signal(error):
            raise
        raise InputError(f"{field}: {path} cannot be imported: {type(error).__name__}: {error}") from error
    return _function_of(module, function, f"{field}: {path}")


def import_function(name: str, base_dir: str | Path | None, *, field: str, known: Iterable[str] = ()) -> Callable:
    """Return the function that an import path such as `package.module.function`, the value of `field`, names.

    A module that is not installed is also found in `base_dir` and in the current folder, as TRL's script finds it. The
    folder may then be imported from, and no other folder may. Where there is none of that name, the message names the
    nearest of `known`.
    """
    module_name, _, function = name.rpartition(".")
    package = module_name.partition(".")[0]
    if not package:
        raise InputError(f"{field}: {name!r} names no module{nearest(name, known)}")
    try:
        if package not in sys.modules and importlib.util.find_spec(package) is None:
            places = (str(base_dir or os.getcwd()), os.getcwd())
            sys.path += [place for place in places if PathFinder.find_spec(package, [place])][:1]
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise InputError(f"{field}: cannot import {name!r}: {error}{nearest(name, known)}") from None
    except (Exception, SystemExit) as error:
        if is_by_signal(error):
            raise
        raise InputError(f"{field}: {module_name} cannot be imported: {type(error).__name__}: {error}") from error
    return _function_of(module, function, f"{field}: {module_name}")


def _function_of(module: types.ModuleType, name: str, where: str) -> Callable:
    function = getattr(module, name, None)
    if callable(function):
        return function
    options = [key for key, value in vars(module).items() if inspect.isfunction(value)]
    problem = "has no function" if function is None else f"holds a {type(function).__name__}, not a function, as"
    raise InputError(f"{where} {problem} {name!r}{nearest(name, options)}")
