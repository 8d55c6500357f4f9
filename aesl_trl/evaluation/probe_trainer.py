"""What `aesl probe` measures of one checkpoint: samples through GRPOTrainer's own evaluation, and a short RL run.

GRPOTrainer itself samples and grades the prompts: with its generation (vLLM too), its rewards, its log-probabilities
and entropies. There is no optimizer, so the weights stay as they are.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ..diversity.figures import Group, by_prompt
from ..diversity.intervals import paired_interval
from ..diversity.readiness import figures_of
from ..training.grpo import trainer_class


ROW = "aesl_row"  # the column that says which prompt a sample belongs to; the reward functions do not see it


def sample(trainer: Any, rows: list[dict], num_samples: int) -> list[Group]:
    """Draw `num_samples` graded samples of each row by the trainer's evaluation; every process returns them all."""
    mask_truncated, trainer.mask_truncated_completions = trainer.mask_truncated_completions, False
    trainer.samples = []
    try:
        with at_temperature_1(trainer):
            trainer.evaluate(eval_dataset=[{**row, ROW: index} for index, row in enumerate(rows)])
        drawn = gather_object(trainer.samples) if trainer.accelerator.num_processes > 1 else trainer.samples
    finally:
        trainer.samples, trainer.mask_truncated_completions = None, mask_truncated
    of_row = defaultdict(list)
    for each in drawn:
        of_row[each["row"]].append(each)
    keys = ("completions", "num_tokens", "truncated", "entropy", "rewards", "neg_log_prob", "eos_prob")
    # Several processes fill their last batch up with the first prompts: those have more samples than asked for.
    kept = [of_row[index][:num_samples] for index in range(len(rows))]
    return [
        Group(prompt=row["prompt"], **{key: [each[key] for each in samples] for key in keys})
        for row, samples in zip(rows, kept, strict=True)
    ]


def short_rl(
    trainer: Any, before: list[Group], rows: list[dict], *, num_samples: int, success_threshold: float
) -> dict:
    """Train for `max_steps`, sample the same held-out prompts once more, and return the figures after it.

    `pass@1_change` is [difference, low, high] over the same prompts.
    """
    trainer.train()
    after = sample(trainer, rows, num_samples)
    figures, ends = figures_of(after, success_threshold=success_threshold, reward_weights=trainer.args.reward_weights)
    rates = [by_prompt(groups, success_threshold=success_threshold)["pass@1"] for groups in (before, after)]
    kept = ("reward", "pass@1", "signal", "entropy")
    return {
        "steps": trainer.state.global_step,
        **{key: figures[key] for key in kept},
        **{f"{key}_interval": ends[key] for key in kept},
        "pass@1_change": list(paired_interval(*rates)),
    }


def probe_class() -> type:
    """Return GRPOTrainer that keeps the samples of its evaluation.

    Its evaluation draws, grades and scores a batch in three private methods, and throws the samples away. We override
    the three to write down what passes through. Each returns what GRPOTrainer's own returns.
    """

    class ProbeTrainer(trainer_class()):
        samples: list[dict] | None = None  # of this process; None: nothing is kept
        _drawn: list[dict] | None = None  # the samples of the batch at hand

        def _generate_and_score_completions(self, inputs):
            """Note the prompt of each sample of the batch, and take our own column out of what the rewards see."""
            if self.samples is None:
                return super()._generate_and_score_completions(inputs)
            self._drawn = [{"row": row[ROW]} for row in inputs]
            rows = [{key: value for key, value in row.items() if key != ROW} for row in inputs]
            return super()._generate_and_score_completions(rows)

        def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
            """Note text, token ids and rewards of each sample."""
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
            if self.samples is not None:  # the rewards are those of all processes
                own = rewards[self.accelerator.process_index * len(prompts) :][: len(prompts)].tolist()
                noted = zip(self._drawn, completions, completion_ids_list, own, strict=True)
                for each, text, ids, values in noted:
                    if not isinstance(text, str):
                        text = str(text[-1].get("content") or "")
                    each |= {"completions": text, "ids": list(ids), "rewards": values}
            return rewards

        def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, **kwargs):
            """Note log-probability, entropy and P(eos) of each token: the batch's samples are complete by then."""
            score = super()._get_per_token_logps_and_entropies
            inputs = (input_ids, attention_mask, logits_to_keep)
            found = score(model, *inputs, **kwargs)
            if self.samples is not None and kwargs.get("compute_entropy"):
                # GRPOTrainer scores the tokens that were sampled, and never holds the logits of the others. So we
                # score once more for each stop token, with that token as the label of every position.
                kwargs |= {"compute_entropy": False, "compute_aux_loss": False}
                stops = [score(relabelled(model, token), *inputs, **kwargs)[0] for token in self.eos_token_ids]
                self._keep(found[0], found[1], torch.stack(stops).logsumexp(0).exp())
            return found

        def _keep(self, log_probs: Tensor, entropies: Tensor, eos_probs: Tensor) -> None:
            """Reduce the figures of each token, `[B, T]`, to those of a sample, and keep the batch."""
            ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}  # as GRPOTrainer finds samples cut off
            for place, each in enumerate(self._drawn):
                ids = each.pop("ids")
                length, is_cut = len(ids), ids[-1] not in ends
                own = eos_probs[place, :length]
                each |= {
                    "num_tokens": length,
                    "truncated": is_cut,
                    "entropy": entropies[place, :length].mean().item(),
                    "neg_log_prob": -log_probs[place, :length].mean().item(),
                    "eos_prob": (own.max() if is_cut else own[-1]).item(),
                }
            self.samples += self._drawn

    return ProbeTrainer


def relabelled(model: Any, token: int) -> Any:
    """Return `model` as a function that scores `token` at every position that has a label, whatever the label."""

    def forward(*, labels: Tensor, **inputs):
        return model(labels=labels.masked_fill(labels != -100, token), **inputs)

    return forward


@contextmanager
def at_temperature_1(trainer: Any) -> Iterator[None]:
    """Score at temperature 1 inside the block.

    GRPOTrainer's head always divides by its sampling temperature, so we put another head over it and take it off at
    the end.
    """
    from peft import PeftModel
    from trl.trainer.utils import add_fused_lm_head

    if trainer.temperature == 1.0:
        yield
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    before = model.forward
    add_fused_lm_head(model, cast_lm_head_to_fp32=trainer.args.cast_lm_head_to_fp32, outputs=("log_probs", "entropy"))
    try:
        yield
    finally:
        model.forward = before
