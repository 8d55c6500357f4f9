"""Small trainings whose diversity is measured."""

import math

from small_runs import prompt_completion_rows, small_config
from tiny_models import build_model

from aesl_trl import AESLSFTTrainer
from aesl_trl.training import measurement


PROMPTS = [{"prompt": "2+3="}, {"prompt": "Name a colour: "}, {"prompt": "abc"}]
DIVERSITY = {
    "diversity_steps": 2,
    "diversity_samples": 3,
    "diversity_max_new_tokens": 6,
    "max_steps": 4,
    "eval_strategy": "no",
}
PEAKED = (1.0, 2.0, 3.0, 4.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.5, 0.4)  # measured at 0, 1, 2 ...: the peak is at step 4


def monitored_trainer(
    tokenizer, folder, *, model=None, prompts=PROMPTS, reward_funcs=None, peft_config=None, **changes
):
    return AESLSFTTrainer(
        model=build_model(tokenizer) if model is None else model,
        args=small_config(folder, **{**DIVERSITY, **changes}),
        train_dataset=prompt_completion_rows(),
        eval_dataset=prompt_completion_rows(),
        processing_class=tokenizer,
        peft_config=peft_config,
        diversity_prompts=prompts,
        reward_funcs=reward_funcs,
    )


def plan(monkeypatch, entropies):
    """Take the measured figures from a plan; everything behind them is real."""
    planned = iter(entropies)

    def measure(sums):
        entropy = next(planned)
        return {"entropy": entropy, "self_bleu": 1 - entropy / 10, "distinct_1": math.nan}

    monkeypatch.setattr(measurement, "measure", measure)
