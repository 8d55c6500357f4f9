"""The cold start: its arguments, its datasets, the trainer with the diversity callback, and the end of a run."""

from dataclasses import dataclass
from functools import partial

from trl import ModelConfig, ScriptArguments, get_peft_config, get_quantization_config

from ..data.checks import check_demonstrations, check_trainable
from ..data.prompts import check_held_out, prompt_rows
from ..errors import InputError
from ..values import option
from .config import AESLSFTConfig
from .session import check_finished, end_trackers, load_split, load_train_and_eval, model_init_kwargs, named_settings


NAME = "aesl sft"
MODEL = "model_name_or_path"


@dataclass
class SFTScriptArguments(ScriptArguments):
    """TRL's script arguments, and the data beside the demonstrations."""

    eval_dataset_name: str | None = option(
        None, "Held-out demonstrations, where they are not the test split of `dataset_name`."
    )
    diversity_dataset_name: str | None = option(
        None, "Held-out prompts to sample from. Default: those of the evaluation dataset."
    )
    diversity_dataset_split: str | None = option(None, "Split of `diversity_dataset_name`.")
    reward_funcs: list[str] | None = option(
        None, "Rewards of the samples: a TRL reward's name, a dotted import path, or path/file.py:function."
    )


ARGUMENT_TYPES = (SFTScriptArguments, AESLSFTConfig, ModelConfig)


def load_datasets(script_args: SFTScriptArguments, args: AESLSFTConfig):
    """Load and check the demonstrations, the evaluation rows or None, and the diversity prompts or None."""
    seed = args.data_seed if args.data_seed is not None else args.seed
    train, evaluation = load_train_and_eval(
        script_args,
        partial(check_demonstrations, text_field=args.dataset_text_field),
        contents="the demonstrations",
        seed=seed,
        evaluates=bool(script_args.eval_dataset_name) or args.eval_strategy != "no",
        streams_eval=False,
    )
    if not args.diversity_steps:
        return train, evaluation, None
    setting, rows = "eval_dataset_name", evaluation
    if script_args.diversity_dataset_name:
        setting = "diversity_dataset_name"
        rows = load_split(script_args, setting, script_args.diversity_dataset_split, seed=seed, streaming=False)
    if rows is None:
        where = "set diversity_dataset_name or eval_dataset_name"
        raise InputError(f"diversity_steps is {args.diversity_steps}, but there are no held-out prompts: {where}")
    prompts = prompt_rows(rows, args.diversity_num_prompts)
    check_held_out(train, prompts, field=setting)
    return train, evaluation, prompts


def build_trainer(args: AESLSFTConfig, model_args: ModelConfig, train, evaluation, prompts, reward_funcs: list):
    """Build AESLSFTTrainer as TRL's script builds SFTTrainer."""
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
    """Save the last weights; exit instead when the training was cut off before its last or its turning point."""
    diversity, args = trainer.diversity_callback, trainer.args
    if diversity is None or not diversity.stopped:
        check_finished(trainer, NAME)
    trainer.save_model(args.output_dir)
    steps = trainer.state.global_step
    trainer.accelerator.print(f"{NAME}: trained {steps} steps; the last weights are in {args.output_dir}")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    end_trackers(trainer)
