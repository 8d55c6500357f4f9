"""The cold start: its arguments, its datasets, the trainer with the diversity callback, and the end of a run."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from trl import ModelConfig, ScriptArguments, SFTTrainer, get_quantization_config

from ..data.checks import check_demonstrations
from ..data.prompts import check_held_out, prompt_rows
from ..data.sampled import check_rows_fit, check_samples, warn_of_unrewarded
from ..diversity.series import check_prompts
from ..errors import InputError, visible
from ..files import TRAINER_STATE, own_folder, read_object
from ..models.positions import num_positions_at
from ..processes import next_step
from ..values import option
from .callback import LEFT_TO
from .config import AESLSFTConfig
from .rehearsal import peft_config_of, refusals_in_one_line, rehearse
from .rows import RowsMixin, check_rows, processing_class_of, training_template
from .session import check_finished, end_trackers, load_split, load_train_and_eval, model_init_kwargs
from .trained_with import peft_settings, refuse_other_ingredients, trained_with


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
    args: AESLSFTConfig, model: str, train, evaluation, prompts: list[dict] | None, reward_funcs: list, access: dict
) -> None:
    """Refuse rows and held-out prompts that the template cannot write whole, or that are too long for the model.

    Warn of rewards that cannot be earned.
    """
    processing_class = processing_class_of(model, args, **access)
    check_rows(args, processing_class, {"dataset_name": train, "eval_dataset_name": evaluation})
    positions = num_positions_at(model, **access)
    check_rows_fit(processing_class, positions, train, args.max_length, args.dataset_text_field)
    unearnable = []
    if prompts:
        how = {"field": "the held-out prompts", "setting": "diversity_max_new_tokens"}
        asked = args.diversity_max_new_tokens
        how |= {"template_defaults": args.chat_template_kwargs}
        unearnable = check_samples(processing_class, positions, prompts, reward_funcs, asked, **how)
    if not unearnable:
        template = training_template(processing_class, args)
        warn_of_unrewarded(processing_class, train, reward_funcs, template, args.chat_template_kwargs)


class RehearsedTrainer(RowsMixin, SFTTrainer):
    """SFTTrainer whose rows are prepared as AESLSFTTrainer's are."""


def check_resumed(args: AESLSFTConfig, model_args: ModelConfig, train, prompts: list | None, checkpoint: Path) -> None:
    """Refuse to go on from `checkpoint` with something else than its steps were trained with and measured on."""
    model, revision = model_args.model_name_or_path, model_args.model_revision
    peft = peft_settings(peft_config_of(model_args))
    refuse_other_ingredients(trained_with(args, model, peft, train, revision), checkpoint, args.output_dir)
    if prompts:
        step = read_object(checkpoint / TRAINER_STATE)["global_step"]
        check_prompts(own_folder(checkpoint.absolute().parent), step, prompts)


def build_trainer(args: AESLSFTConfig, model_args: ModelConfig, train, evaluation, prompts, reward_funcs: list):
    """Build AESLSFTTrainer as TRL's script builds SFTTrainer."""
    from .trainer import AESLSFTTrainer

    args.model_init_kwargs = model_init_kwargs(model_args, args)
    model, evaluation = model_args.model_name_or_path, evaluation if args.eval_strategy != "no" else None
    with refusals_in_one_line():
        peft_config = peft_config_of(model_args)
        rehearse(RehearsedTrainer, model, args, train, eval_rows=evaluation, peft_config=peft_config)
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
    done = f"{NAME}: trained {steps} steps; the last weights are in {visible(args.output_dir)}"
    waits = diversity is not None and diversity.selection in LEFT_TO  # the line before has said how it is selected
    trainer.accelerator.print(done + ("" if waits else visible(next_step(f"aesl handoff {args.output_dir}"))))
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    end_trackers(trainer)
