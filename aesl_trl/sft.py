"""`accelerate launch -m aesl_trl.sft --config FILE`: the cold start, from one YAML file.

It does what TRL's own sft script does, with AESLSFTTrainer, held-out prompts for the diversity, strict arguments, and
every check of the data before the model loads.
"""

import sys
from itertools import islice

from .arguments import parse
from .errors import InputError, exit_on_input_error
from .models.folder import ModelFolder
from .models.loading import CHECKED_ROWS, check_model, check_tokenizer
from .rewards.functions import check_columns, load_reward_funcs
from .training.session import check_quantization, guarded_training, resume_point, revision_and_trust, train
from .training.sft import (
    ARGUMENT_TYPES,
    MODEL,
    NAME,
    build_trainer,
    check_before_loading,
    check_resumed,
    finish,
    load_datasets,
)
from .training.signals import StopSignals


def main(argv: list[str] | None = None) -> None:
    """Train, select, and save the last weights to `output_dir`. Unusable input is refused before any model loads.

    The exit code is 3 when the training ended before its last step untold, and 128 + signal when a signal ended it.
    """
    with StopSignals(NAME) as signals:
        script_args, args, model_args = parse(ARGUMENT_TYPES, sys.argv[1:] if argv is None else argv, prog=NAME)
        model, access = model_args.model_name_or_path, revision_and_trust(model_args, args)
        if not model:
            raise InputError("model_name_or_path is missing: name the model to train, e.g. Qwen/Qwen2.5-1.5B-Instruct")
        check_quantization(model_args)
        check_model(model, MODEL, **access)
        checkpoint = resume_point(args, NAME)
        reward_funcs = load_reward_funcs(script_args.reward_funcs)
        train_rows, eval_rows, prompts = load_datasets(script_args, args)
        examples = [*islice(train_rows, CHECKED_ROWS), *(prompts or [])[:CHECKED_ROWS]]
        check_tokenizer(ModelFolder(model), examples, field=MODEL, settings=args, **access)
        if prompts is not None and reward_funcs:
            where = f"diversity prompts {script_args.diversity_dataset_name or ''}"
            check_columns(reward_funcs, prompts[0], where=where)
        if checkpoint is not None:
            check_resumed(args, model_args, train_rows, prompts, checkpoint)
        check_before_loading(args, model, train_rows, eval_rows, prompts, reward_funcs, access)
        with guarded_training(args, signals):
            trainer = build_trainer(args, model_args, train_rows, eval_rows, prompts, reward_funcs)
            train(trainer, checkpoint, signals, trainer.diversity_callback)
            finish(trainer, script_args)


if __name__ == "__main__":
    exit_on_input_error(NAME, main)
