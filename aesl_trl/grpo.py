"""`accelerate launch -m aesl_trl.grpo --config FILE`: RL, from one YAML file.

It adds to TRL's own grpo script: strict arguments, local data, rewards from files, `adapter_name_or_path` (an adapter
from SFT that RL continues to train), checks before the model loads, and `run.json`. Training itself is GRPOTrainer's,
and stops before a step whose gradient is not finite.
"""

import sys

from .arguments import parse
from .errors import exit_on_input_error
from .rewards.golds import check_golds
from .training import grpo
from .training.grpo import ARGUMENT_TYPES, NAME
from .training.session import (
    check_finished,
    end_trackers,
    guarded_training,
    resume_point,
    revision_and_trust,
    train,
)
from .training.signals import StopSignals


def main(argv: list[str] | None = None) -> None:
    """Train, save to `output_dir`, and write `run.json`. Unusable input is refused before any model loads.

    The exit code is 3 when the training ended before its last step, and 128 + signal when a signal ended it (resume
    with `--resume_from_checkpoint`).
    """
    with StopSignals(NAME) as signals:
        script_args, args, model_args = parse(ARGUMENT_TYPES, sys.argv[1:] if argv is None else argv, prog=NAME)
        grpo.find_model(script_args, model_args, args)
        checkpoint = resume_point(args, NAME)
        reward_funcs = grpo.load_rewards(script_args)
        train_rows, eval_rows = grpo.load_datasets(script_args, args, reward_funcs)
        grpo.check_prompts_can_be_written(script_args, model_args, args, train_rows)
        for setting, rows in (("dataset_name", train_rows), ("eval_dataset_name", eval_rows or [])):
            check_golds(reward_funcs, rows, where=setting)
            if rows:
                how = {"field": setting, "access": revision_and_trust(model_args, args)}
                grpo.check_rl_samples(grpo.start_of(script_args, model_args), rows, reward_funcs, args, **how)
        ingredients = grpo.ingredients_of(script_args, model_args, args, train_rows, reward_funcs)
        if checkpoint is not None:
            grpo.check_resumed(ingredients, checkpoint, args.output_dir)
        with guarded_training(args, signals):
            trainer = grpo.build_trainer(script_args, args, model_args, reward_funcs, train_rows, eval_rows)
            trainer.add_callback(grpo.Ingredients(ingredients))
            train(trainer, checkpoint, signals)
            check_finished(trainer, NAME)
            grpo.save(trainer, script_args, model_args)
            end_trackers(trainer)


if __name__ == "__main__":
    exit_on_input_error(NAME, main)
