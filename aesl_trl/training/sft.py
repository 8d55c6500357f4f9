"""The cold start: its arguments, its datasets, the trainer with the diversity callback, and the end of a run."""

from dataclasses import dataclass, field

from trl import ModelConfig, ScriptArguments, get_peft_config, get_quantization_config

from ..data.checks import check_demonstrations, check_trainable
from ..data.prompts import check_held_out, prompt_rows
from ..data.rows import load_rows
from ..errors import InputError
from .config import AESLSFTConfig
from .session import check_finished, end, model_init_kwargs, named_settings


NAME = "aesl sft"


MODEL = "model_name_or_path"


@dataclass
class SFTScriptArguments(ScriptArguments):
    """TRL's script arguments and the data beside the demonstrations."""

    eval_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Held-out demonstrations, where they are not the test split of `dataset_name`."},
    )
    diversity_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Held-out prompts to sample from. Default: those of the evaluation dataset."},
    )
    diversity_dataset_split: str | None = field(default=None, metadata={"help": "Split of `diversity_dataset_name`."})
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Rewards of the samples: a TRL reward's name, a dotted import path, or path/file.py:function."
        },
    )


ARGUMENT_TYPES = (SFTScriptArguments, AESLSFTConfig, ModelConfig)


def load_datasets(script_args: SFTScriptArguments, args: AESLSFTConfig):
    """Demonstrations, evaluation rows or None, and diversity prompts or None, checked."""
    name = script_args.dataset_name
    if not name:
        raise InputError("dataset_name is missing: name the demonstrations, a hub dataset or a local file")
    train = _load(script_args, args, "dataset_name", name, script_args.dataset_train_split)
    check_demonstrations(train, field="dataset_name", text_field=args.dataset_text_field)
    evaluation = None
    if script_args.eval_dataset_name or args.eval_strategy != "no":
        if script_args.eval_dataset_name:
            evaluation = _load(script_args, args, "eval_dataset_name", script_args.eval_dataset_name, None)
        else:
            evaluation = _load(script_args, args, "dataset_name", name, script_args.dataset_test_split)
        check_demonstrations(evaluation, field="eval_dataset_name", text_field=args.dataset_text_field)
    return train, evaluation, _held_out(script_args, args, train, evaluation) if args.diversity_steps else None


def _held_out(script_args: SFTScriptArguments, args: AESLSFTConfig, train, evaluation) -> list[dict]:
    """The prompts to sample from, none of which is trained on."""
    field, rows, given = "eval_dataset_name", evaluation, script_args.diversity_dataset_name
    if given:
        field = "diversity_dataset_name"
        rows = _load(script_args, args, field, given, script_args.diversity_dataset_split)
    if rows is None:
        raise InputError(
            f"diversity_steps is {args.diversity_steps}, but there are no held-out prompts: set "
            "diversity_dataset_name or eval_dataset_name"
        )
    prompts = prompt_rows(rows, args.diversity_num_prompts)
    check_held_out(train, prompts, field=field)
    return prompts


def _load(script_args: SFTScriptArguments, args: AESLSFTConfig, name: str, value: str, split: str | None):
    return load_rows(
        value,
        split=split,
        config=script_args.dataset_config if name == "dataset_name" else None,
        streaming=script_args.dataset_streaming and name == "dataset_name",
        seed=args.data_seed if args.data_seed is not None else args.seed,
        field=name,
    )


def build_trainer(args: AESLSFTConfig, model_args: ModelConfig, train, evaluation, prompts, reward_funcs: list):
    """AESLSFTTrainer built as TRL's script builds SFTTrainer."""
    from .trainer import AESLSFTTrainer

    args.model_init_kwargs = model_init_kwargs(model_args, args)
    with named_settings():
        trainer = AESLSFTTrainer(
            model=model_args.model_name_or_path,
            args=args,
            train_dataset=train,
            eval_dataset=evaluation if args.eval_strategy != "no" else None,
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args),
            diversity_prompts=prompts,
            reward_funcs=reward_funcs,
        )
    num_embeddings = trainer.model.config.get_text_config().vocab_size
    check_trainable(trainer.train_dataset, args.max_length, num_embeddings=num_embeddings)
    return trainer


def finish(trainer, script_args: SFTScriptArguments) -> None:
    """Save what was trained, unless it was cut off or is not a number."""
    state, args = trainer.state, trainer.args
    stopped = getattr(trainer, "diversity_callback", None) is not None and trainer.diversity_callback.stopped
    if not stopped:
        check_finished(trainer, NAME)
    trainer.save_model(args.output_dir)
    trainer.accelerator.print(f"{NAME}: trained {state.global_step} steps; the last weights are in {args.output_dir}")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    end(trainer)
