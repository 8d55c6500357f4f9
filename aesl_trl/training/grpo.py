"""RL with TRL's GRPOTrainer: its arguments, datasets, rewards and adapters, and the saving of what it trained."""

import shutil
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, TrainerCallback, set_seed
from trl import GRPOConfig, ModelConfig, get_quantization_config
from trl.scripts.grpo import GRPOScriptArguments as TRLScriptArguments

from ..data.checks import STREAMED_ROWS, check_prompts
from ..data.sampled import check_samples_of
from ..errors import InputError, tell
from ..files import RUN, TRAINED_WITH, own_folder, read_object, write_json
from ..models.chat import IMAGES
from ..models.folder import ADAPTER_CONFIG, GENERATION_CONFIG, ModelFolder, base_of
from ..models.loading import CHECKED_ROWS, check_model, check_tokenizer, put_adapter
from ..models.tokens import id_list, stop_ids
from ..processes import next_step
from ..provenance import package_versions
from ..rewards.functions import check_columns, load_reward_funcs
from ..values import option
from .finite_steps import FiniteStepsMixin
from .rehearsal import peft_config_of, refusals_in_one_line, rehearse
from .rows import RowTemplateMixin
from .session import check_quantization, load_train_and_eval, model_init_kwargs, revision_and_trust
from .trained_with import peft_settings, refuse_other_ingredients, rl_trained_with


NAME = "aesl grpo"
MODEL = "model_name_or_path"
ADAPTER = "adapter_name_or_path"
REF_ADAPTER = "ref"  # TRL's name for the frozen copy of the starting adapter


@dataclass
class GRPOScriptArguments(TRLScriptArguments):
    """TRL's script arguments and two more. `reward_funcs` also takes `path/file.py:function`."""

    adapter_name_or_path: str | None = option(
        None,
        "Folder or hub name of a trained adapter that RL continues to train. Its base is `model_name_or_path`, by "
        "default the one that the adapter names. Not together with `use_peft`.",
    )
    eval_dataset_name: str | None = option(
        None, "Evaluation prompts, where they are not the test split of `dataset_name`."
    )


ARGUMENT_TYPES = (GRPOScriptArguments, GRPOConfig, ModelConfig)


def find_model(script_args: GRPOScriptArguments, model_args: ModelConfig, training_args: GRPOConfig) -> None:
    """Fill an absent `model_name_or_path` from the adapter; refuse what TRL fails on late or gets wrong silently."""
    adapter, model = script_args.adapter_name_or_path, model_args.model_name_or_path
    if model and (Path(model) / ADAPTER_CONFIG).is_file():
        raise InputError(f"{MODEL}: {model} is an adapter: give it as {ADAPTER}, or `aesl handoff` it")
    if adapter:
        if model_args.use_peft:
            raise InputError(f"{ADAPTER} goes on training that adapter, use_peft adds a new one: drop one of the two")
        if Path(adapter).is_dir() and not (Path(adapter) / ADAPTER_CONFIG).is_file():
            raise InputError(f"{ADAPTER}: {adapter} holds no {ADAPTER_CONFIG}; a full model goes into {MODEL}")
        model_args.model_name_or_path = model or base_of(adapter, ADAPTER)
    if not model_args.model_name_or_path:
        raise InputError(f"{MODEL} is missing: the folder or hub name of the model that RL starts from")
    check_quantization(model_args)
    check_model(model_args.model_name_or_path, MODEL, **revision_and_trust(model_args, training_args))


def start_of(script_args: GRPOScriptArguments, model_args: ModelConfig) -> ModelFolder:
    """Return the model that RL starts from: full weights, or an adapter on its base."""
    adapter, model = script_args.adapter_name_or_path, model_args.model_name_or_path
    return ModelFolder(adapter, model) if adapter else ModelFolder(model)


def check_prompts_can_be_written(
    script_args: GRPOScriptArguments, model_args: ModelConfig, training_args: GRPOConfig, rows: Any
) -> None:
    """Refuse a tokenizer that cannot write the first prompts down."""
    start = start_of(script_args, model_args)
    rows = islice(rows, CHECKED_ROWS)
    field = ADAPTER if start.tokenizer_at == script_args.adapter_name_or_path else MODEL
    check_tokenizer(start, rows, field=field, **revision_and_trust(model_args, training_args))


def check_rl_samples(
    model: ModelFolder, rows: Any, reward_funcs: list, training_args: GRPOConfig, *, field: str, access: dict
) -> list[str]:
    """Check samples as GRPOTrainer will draw them, by [`~aesl_trl.data.sampled.check_samples`]."""
    has_images = {*IMAGES} & {*(getattr(rows, "column_names", None) or ())}  # decoded, they fill the memory
    return check_samples_of(
        model,
        list(rows if hasattr(rows, "__len__") and not has_images else islice(rows, STREAMED_ROWS)),
        reward_funcs,
        training_args.max_completion_length,
        field=field,
        setting="max_completion_length",
        template_defaults=training_args.chat_template_kwargs,
        access=access,
    )


def load_rewards(script_args: GRPOScriptArguments) -> list:
    """Load the reward functions. As in TRL's script, the name of a reward model stands before them."""
    functions = load_reward_funcs(script_args.reward_funcs)
    model = script_args.reward_model_name_or_path
    if not functions and not model:
        raise InputError("reward_funcs is missing: RL needs a reward, such as reward_funcs: [math_reward]")
    return [model, *functions] if model else functions


def load_datasets(script_args: GRPOScriptArguments, training_args: GRPOConfig, reward_funcs: list) -> tuple[Any, Any]:
    """Load and check the prompts to train on and to evaluate on; the second are None when nothing is evaluated."""
    return load_train_and_eval(
        script_args,
        partial(check_rows, reward_funcs=reward_funcs),
        contents="the prompts that RL trains on",
        seed=training_args.seed,
        evaluates=training_args.eval_strategy != "no",
        streams_eval=True,
    )


def check_rows(rows: Any, *, field: str, reward_funcs: list, start: int = 0) -> None:
    """Refuse what GRPOTrainer fails on once the model has loaded: no rows, no prompt, a reward's column missing."""
    check_prompts(rows, field=field, start=start)
    first = next(iter(rows))
    if "prompt" not in first:
        raise InputError(f"{field} has no column 'prompt'; columns: {', '.join(first)}")
    check_columns([function for function in reward_funcs if callable(function)], first, where=field)


def ingredients_of(
    script_args: GRPOScriptArguments, model_args: ModelConfig, training_args: GRPOConfig, rows: Any, rewards: list
) -> dict:
    """Return what the steps are trained with, as a resumed training compares it."""
    start, peft = start_of(script_args, model_args), peft_settings(peft_config_of(model_args))
    return rl_trained_with(training_args, start, peft, rows, rewards, model_args.model_revision)


def check_resumed(found: dict, checkpoint: Path, output_dir: str) -> None:
    """Refuse to go on from `checkpoint` with something else than its steps were trained with."""
    recorded = read_object(own_folder(checkpoint.absolute().parent) / TRAINED_WITH)
    refuse_other_ingredients(found, checkpoint, output_dir, recorded)


class Ingredients(TrainerCallback):
    """Writes what the steps are trained with beside the checkpoints. A training that saves none leaves no record."""

    def __init__(self, found: dict):
        self.found = found

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            write_json(own_folder(args.output_dir) / TRAINED_WITH, self.found)


def trainer_class() -> type:
    """Return GRPOTrainer that reads rows' columns for the template, and stops before a gradient that is not finite."""
    from trl import GRPOTrainer

    return type(GRPOTrainer.__name__, (FiniteStepsMixin, RowTemplateMixin, GRPOTrainer), {})


def build_trainer(
    script_args: GRPOScriptArguments,
    training_args: GRPOConfig,
    model_args: ModelConfig,
    reward_funcs: list,
    train_dataset: Any,
    eval_dataset: Any = None,
    kind: type | None = None,
) -> Any:
    """Build `kind`, by default [`trainer_class`], as TRL's script does or on the adapter that RL continues."""
    training_args.model_init_kwargs = model_init_kwargs(model_args, training_args)
    start, quantization = start_of(script_args, model_args), get_quantization_config(model_args)
    datasets = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
    common = {"reward_funcs": reward_funcs, "args": training_args, **datasets}
    peft_config = peft_config_of(model_args)
    if kind is None:  # a probe's settings are not the user's
        kind, scores = trainer_class(), [score if callable(score) else _no_reward for score in reward_funcs]
        told = {"eval_rows": eval_dataset, "peft_config": peft_config, "reward_funcs": scores}
        rehearse(kind, start.config_at, training_args, train_dataset, **told)
    if not start.is_adapter:
        with refusals_in_one_line():
            common |= {"quantization_config": quantization, "peft_config": peft_config}
            return stopping_at_turn_ends(kind(model=start.weights, **common))
    model = load_trainable(start, training_args, quantization)
    # The model is loaded, so GRPOTrainer would only warn that it ignores the keywords for loading it.
    training_args.model_init_kwargs = None
    tokenizer = None  # GRPOTrainer takes the base's
    if start.tokenizer_at == start.weights:
        sides = {"truncation_side": "left", "padding_side": "left"}  # as GRPOTrainer loads it
        trust = training_args.trust_remote_code
        tokenizer = AutoProcessor.from_pretrained(start.weights, trust_remote_code=trust, **sides)
    return stopping_at_turn_ends(kind(model=model, processing_class=tokenizer, **common))


def _no_reward(completions: list, **columns: Any) -> list[float]:
    """Stand in for a reward model while a training is rehearsed."""
    return [0.0] * len(completions)


def stopping_at_turn_ends(trainer: Any) -> Any:
    """Let every token of [`~aesl_trl.models.tokens.stop_ids`] end a sample of GRPOTrainer, and return the trainer.

    GRPOTrainer stops at the tokenizer's eos and at what the generation config declares. A base model with a chat
    template declares no end of turn, and its samples would go on to the length limit. The user's `generation_kwargs`
    count too, and the model is saved with the tokens that ended its samples.
    """
    given, model = trainer.args.generation_kwargs or {}, trainer.model
    named = [index for key in ("eos_token_id", "stop_token_ids") for index in id_list(given.get(key))]
    stops = stop_ids(trainer._tokenizer, [*id_list(model.generation_config.eos_token_id), *named])
    if set(stops) <= set(trainer.eos_token_ids):
        return trainer
    model.generation_config.eos_token_id = trainer.eos_token_ids = stops
    if trainer.use_vllm:
        trainer.vllm_generation.generation_kwargs = {**given, "stop_token_ids": stops}
    else:
        trainer.generation_config.eos_token_id = trainer.generation_kwargs["eos_token_id"] = stops
    return trainer


def load_trainable(start: ModelFolder, training_args: GRPOConfig, quantization: Any = None) -> Any:
    """Load the adapter on its base, so that it can be trained.

    `is_trainable=True`: without it PEFT loads the adapter frozen, and training dies at the first backward pass.
    GRPOTrainer seeds and places the models that it loads itself, so we do both for this one.
    """
    from trl.trainer.utils import create_model_from_path

    set_seed(training_args.seed)
    kwargs = dict(training_args.model_init_kwargs)
    if quantization is not None:
        kwargs["quantization_config"] = quantization
    if training_args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        kwargs["device_map"] = None
    with refusals_in_one_line():
        base = create_model_from_path(start.base, **kwargs)
        return put_adapter(base, start.weights, start.base, is_trainable=True)


def save(trainer: Any, script_args: GRPOScriptArguments, model_args: ModelConfig) -> None:
    """Save model, trainer_state.json and run.json into `output_dir`, and push them to the hub when asked."""
    args, adapter = trainer.args, script_args.adapter_name_or_path
    folder = Path(args.output_dir)
    trainer.save_model(args.output_dir)
    trainer.save_state()
    if trainer.accelerator.is_main_process:
        # With beta above 0, save_model writes the frozen reference adapter too. Checkpoints keep theirs for resuming.
        if (folder / REF_ADAPTER / ADAPTER_CONFIG).is_file():
            shutil.rmtree(folder / REF_ADAPTER)
        # PEFT saves no generation config, which knows the tokens that end a sample.
        if adapter is not None and (Path(adapter) / GENERATION_CONFIG).is_file():
            shutil.copy2(Path(adapter) / GENERATION_CONFIG, folder)
        quantization = get_quantization_config(model_args)
        facts = {
            "stage": "grpo",
            "model": model_args.model_name_or_path,
            "adapter": adapter,
            "seed": args.seed,
            "num_processes": trainer.accelerator.num_processes,
            "max_steps": trainer.state.max_steps,
            "learning_rate": args.learning_rate,
            "num_generations": args.num_generations,
            "beta": args.beta,
            "quantization": None if quantization is None else quantization.to_dict(),
            "versions": package_versions(),
        }
        write_json(own_folder(folder) / RUN, facts)
        steps, after = trainer.state.global_step, next_step(f"aesl eval {folder} --config FILE")
        tell(f"{NAME}: trained {steps} steps; the weights are in {folder}{after}")
    trainer.accelerator.wait_for_everyone()
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
