"""RL with TRL's GRPOTrainer: its arguments, datasets, rewards and adapters, and the saving of what it trained."""

import shutil
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from trl import GRPOConfig, ModelConfig
from trl.scripts.grpo import GRPOScriptArguments as TRLScriptArguments

from ..data.checks import check_prompts
from ..data.rows import load_rows
from ..errors import InputError
from ..files import RUN, write_json
from ..models.folder import ADAPTER_CONFIG, GENERATION_CONFIG, TOKENIZER_CONFIG, base_of
from ..models.loading import CHECKED_ROWS, check_model, check_tokenizer, put_adapter
from ..provenance import package_versions
from ..rewards.functions import check_columns, load_reward_funcs
from .session import check_quantization, model_init_kwargs, named_settings, source


NAME = "aesl grpo"


MODEL = "model_name_or_path"


REF_ADAPTER = "ref"


@dataclass
class GRPOScriptArguments(TRLScriptArguments):
    """TRL's script arguments and two more. `reward_funcs` also takes `path/file.py:function`."""

    adapter_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Folder or hub name of a trained adapter that RL continues to train. Its base is "
            "`model_name_or_path`, by default the one that the adapter names. Not together with `use_peft`."
        },
    )
    eval_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Evaluation prompts, where they are not the test split of `dataset_name`."},
    )


ARGUMENT_TYPES = (GRPOScriptArguments, GRPOConfig, ModelConfig)


def find_model(script_args: GRPOScriptArguments, model_args: ModelConfig, training_args: GRPOConfig) -> None:
    """Fill an absent `model_name_or_path` from the adapter; refuse what TRL fails on late or gets wrong silently."""
    adapter, model = script_args.adapter_name_or_path, model_args.model_name_or_path
    if model and (Path(model) / ADAPTER_CONFIG).is_file():
        raise InputError(
            f"model_name_or_path: {model} is an adapter: give it as adapter_name_or_path, or `aesl handoff` it"
        )
    if adapter:
        if model_args.use_peft:
            raise InputError(
                "adapter_name_or_path goes on training that adapter, use_peft adds a new one: drop one of the two"
            )
        if Path(adapter).is_dir() and not (Path(adapter) / ADAPTER_CONFIG).is_file():
            raise InputError(
                f"adapter_name_or_path: {adapter} holds no {ADAPTER_CONFIG}; a full model goes into model_name_or_path"
            )
        model_args.model_name_or_path = model or base_of(adapter, "adapter_name_or_path")
    if not model_args.model_name_or_path:
        raise InputError("model_name_or_path is missing: the folder or hub name of the model that RL starts from")
    check_quantization(model_args)
    check_model(model_args.model_name_or_path, MODEL, **source(model_args, training_args))


def check_prompts_can_be_written(
    script_args: GRPOScriptArguments, model_args: ModelConfig, training_args: GRPOConfig, rows: Any
) -> None:
    model, adapter = model_args.model_name_or_path, script_args.adapter_name_or_path
    beside = adapter is not None and (Path(adapter) / TOKENIZER_CONFIG).is_file()
    tokenizer, field = (adapter, "adapter_name_or_path") if beside else (model, MODEL)
    kwargs = source(model_args, training_args)
    check_tokenizer(tokenizer, model, islice(rows, CHECKED_ROWS), field=field, **kwargs)


def load_rewards(script_args: GRPOScriptArguments) -> list:
    """Reward model (its name, which GRPOTrainer loads) first, then the functions, as in TRL's script."""
    functions = load_reward_funcs(script_args.reward_funcs)
    model = script_args.reward_model_name_or_path
    if not functions and not model:
        raise InputError(
            "reward_funcs is missing: RL needs at least one reward, such as reward_funcs: [accuracy_reward]"
        )
    return [model, *functions] if model else functions


def load_datasets(script_args: GRPOScriptArguments, training_args: GRPOConfig, reward_funcs: list) -> tuple[Any, Any]:
    """Training and evaluation prompts, checked; the second is None where nothing is evaluated."""
    train = _load(
        script_args, training_args, "dataset_name", script_args.dataset_name, script_args.dataset_train_split
    )
    check_rows(train, reward_funcs, name="dataset_name")
    if training_args.eval_strategy == "no":
        return train, None
    if script_args.eval_dataset_name:
        evaluation = _load(script_args, training_args, "eval_dataset_name", script_args.eval_dataset_name, None)
    else:
        evaluation = _load(
            script_args, training_args, "dataset_name", script_args.dataset_name, script_args.dataset_test_split
        )
    check_rows(evaluation, reward_funcs, name="eval_dataset_name")
    return train, evaluation


def _load(
    script_args: GRPOScriptArguments, training_args: GRPOConfig, name: str, value: str | None, split: str | None
) -> Any:
    if not value:
        raise InputError(f"{name} is missing: the prompts that RL trains on")
    return load_rows(
        value,
        split=split,
        config=script_args.dataset_config if name == "dataset_name" else None,
        streaming=script_args.dataset_streaming,
        seed=training_args.seed,
        field=name,
    )


def check_rows(rows: Any, reward_funcs: list, *, name: str) -> None:
    """Refuse what GRPOTrainer fails on once the model has loaded: no rows, no prompt, a reward's column missing."""
    check_prompts(rows, field=name)
    first = next(iter(rows))
    if "prompt" not in first:
        raise InputError(f"{name} has no column 'prompt'; columns: {', '.join(first)}")
    check_columns([function for function in reward_funcs if callable(function)], first, where=name)


def trainer_class() -> type:
    """GRPOTrainer that stops before a step whose gradient is not finite."""
    from trl import GRPOTrainer

    from .finite_steps import FiniteStepsMixin

    return type(GRPOTrainer.__name__, (FiniteStepsMixin, GRPOTrainer), {})


def build_trainer(
    script_args: GRPOScriptArguments,
    training_args: GRPOConfig,
    model_args: ModelConfig,
    reward_funcs: list,
    train_dataset: Any,
    eval_dataset: Any = None,
    kind: type | None = None,
) -> Any:
    """GRPOTrainer as TRL's script builds it, or on the adapter that RL continues.

    `kind` is the trainer's class, by default that of [`trainer_class`].
    """
    from trl import get_peft_config, get_quantization_config

    kind = kind or trainer_class()
    training_args.model_init_kwargs = model_init_kwargs(model_args, training_args)
    quantization = get_quantization_config(model_args)
    common = {
        "reward_funcs": reward_funcs,
        "args": training_args,
        "train_dataset": train_dataset,
        "eval_dataset": eval_dataset,
    }
    if script_args.adapter_name_or_path is None:
        with named_settings():
            return kind(
                model=model_args.model_name_or_path,
                quantization_config=quantization,
                peft_config=get_peft_config(model_args),
                **common,
            )
    adapter = script_args.adapter_name_or_path
    model = load_trainable(model_args.model_name_or_path, adapter, training_args, quantization)
    # The model is an instance now: left in place, its kwargs would only make GRPOTrainer warn that it ignores them.
    training_args.model_init_kwargs = None
    return kind(model=model, processing_class=load_tokenizer(adapter, training_args), **common)


def load_trainable(base: str, adapter: str, training_args: GRPOConfig, quantization: Any = None) -> Any:
    """The adapter on its base, trainable, sampling with the generation config that lies beside the adapter.

    `is_trainable=True`: without it PEFT loads the adapter frozen, and training dies at the first backward pass.
    GRPOTrainer seeds and places the models that it loads itself, so both are done here for this one.
    """
    from transformers import GenerationConfig, set_seed
    from trl.trainer.utils import create_model_from_path

    set_seed(training_args.seed)
    kwargs = dict(training_args.model_init_kwargs)
    if quantization is not None:
        kwargs["quantization_config"] = quantization
    if training_args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        kwargs["device_map"] = None
    with named_settings():
        model = put_adapter(create_model_from_path(base, **kwargs), adapter, base, is_trainable=True)
    if (Path(adapter) / GENERATION_CONFIG).is_file():
        # The base's own file knows nothing of the tokens that end a turn of the trained model.
        model.base_model.model.generation_config = GenerationConfig.from_pretrained(adapter)
    return model


def load_tokenizer(adapter: str, training_args: GRPOConfig) -> Any:
    """The tokenizer beside the adapter; None (GRPOTrainer then takes the base's) where there is none."""
    from transformers import AutoProcessor

    if not (Path(adapter) / TOKENIZER_CONFIG).is_file():
        return None
    sides = {"truncation_side": "left", "padding_side": "left"}
    return AutoProcessor.from_pretrained(adapter, trust_remote_code=training_args.trust_remote_code, **sides)


def save(trainer: Any, script_args: GRPOScriptArguments, model_args: ModelConfig) -> None:
    """Model, trainer_state.json and run.json into `output_dir`, and to the hub when asked."""
    args = trainer.args
    trainer.save_model(args.output_dir)
    trainer.save_state()
    if trainer.accelerator.is_main_process:
        drop_reference_adapter(args.output_dir)
        keep_generation_config(script_args.adapter_name_or_path, args.output_dir)
        write_json(Path(args.output_dir) / RUN, describe(trainer, script_args, model_args))
    trainer.accelerator.wait_for_everyone()
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)


def drop_reference_adapter(folder: str) -> None:
    """Remove the frozen copy of the starting adapter that TRL trains against when beta is not 0 and that save_model
    writes along.

    Checkpoints keep theirs: resuming reads it.
    """
    if (Path(folder) / REF_ADAPTER / ADAPTER_CONFIG).is_file():
        shutil.rmtree(Path(folder) / REF_ADAPTER)


def keep_generation_config(adapter: str | None, folder: str) -> None:
    """Lay the adapter's generation config beside the trained one: PEFT saves none, and it knows what ends a sample."""
    if adapter is not None and (Path(adapter) / GENERATION_CONFIG).is_file():
        shutil.copy2(Path(adapter) / GENERATION_CONFIG, folder)


def describe(trainer: Any, script_args: GRPOScriptArguments, model_args: ModelConfig) -> dict:
    """What run.json holds: enough to tell runs apart in a report."""
    from trl import get_quantization_config

    args, quantization = trainer.args, get_quantization_config(model_args)
    return {
        "stage": "grpo",
        "model": model_args.model_name_or_path,
        "adapter": script_args.adapter_name_or_path,
        "seed": args.seed,
        "num_processes": trainer.accelerator.num_processes,
        "max_steps": trainer.state.max_steps,
        "learning_rate": args.learning_rate,
        "num_generations": args.num_generations,
        "beta": args.beta,
        "quantization": None if quantization is None else quantization.to_dict(),
        "versions": package_versions(),
    }
