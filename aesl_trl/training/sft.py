"""The cold start: its arguments, its datasets, the trainer with the diversity callback, and the end of a run."""

from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from trl import ModelConfig, ScriptArguments, SFTTrainer, get_peft_config, get_quantization_config
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from ..data.checks import check_demonstrations
from ..data.prompts import check_held_out, prompt_rows
from ..data.sampled import check_rows_fit, check_samples, warn_of_unrewarded
from ..errors import InputError
from ..models.loading import load_processing_class
from ..models.peft_settings import list_as_written
from ..models.positions import num_positions_at
from ..values import option
from .config import AESLSFTConfig
from .rehearsal import refusals_in_one_line, rehearse
from .session import check_finished, end_trackers, load_split, load_train_and_eval, model_init_kwargs


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


def check_before_loading(
    args: AESLSFTConfig, model: str, train, prompts: list[dict] | None, reward_funcs: list, access: dict
) -> None:
    """Refuse rows and held-out prompts that are too long for the model; warn of rewards that cannot be earned."""
    processing_class = load_processing_class(model, **access)
    if path := args.chat_template_path:  # as TRL does: a file, or another tokenizer with its tokens
        is_file = path.endswith(".jinja")
        processing_class = processing_class if is_file else load_processing_class(path, **access)
        processing_class.chat_template = Path(path).read_text() if is_file else processing_class.chat_template
    positions = num_positions_at(model, **access)
    check_rows_fit(processing_class, positions, train, args.max_length, args.dataset_text_field)
    unearnable = []
    if prompts:
        how = {"field": "the held-out prompts", "setting": "diversity_max_new_tokens"}
        asked = args.diversity_max_new_tokens
        unearnable = check_samples(processing_class, positions, prompts, reward_funcs, asked, **how)
    if not unearnable:
        warn_of_unrewarded(processing_class, train, reward_funcs, _training_template(processing_class, args))


def _training_template(processing_class, args: AESLSFTConfig) -> str | None:
    """Return the template of TRL that takes the place of the model's, where it does."""
    if not args.assistant_only_loss or has_generation_markers(processing_class.chat_template):
        return None
    with suppress(ValueError):  # TRL has none for this template, and refuses it when the trainer is built
        return get_training_chat_template(processing_class)


def build_trainer(args: AESLSFTConfig, model_args: ModelConfig, train, evaluation, prompts, reward_funcs: list):
    """Build AESLSFTTrainer as TRL's script builds SFTTrainer."""
    from .trainer import AESLSFTTrainer

    args.model_init_kwargs = model_init_kwargs(model_args, args)
    model, evaluation = model_args.model_name_or_path, evaluation if args.eval_strategy != "no" else None
    with refusals_in_one_line():
        peft_config = list_as_written(get_peft_config(model_args))
        rehearse(SFTTrainer, model, args, train, eval_rows=evaluation, peft_config=peft_config)
        trainer = AESLSFTTrainer(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=evaluation,
            quantization_config=get_quantization_config(model_args),
            peft_config=peft_config,
            diversity_prompts=prompts,
            reward_funcs=reward_funcs,
        )
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
