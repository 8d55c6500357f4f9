"""What `aesl probe` measures of one checkpoint: samples through GRPOTrainer's own evaluation, and a short RL run.

Prompts are sampled and graded by GRPOTrainer itself: its generation (vLLM too), its rewards, its log-probabilities and
entropies, and no optimizer, so that the weights stay as they are.

Left out: the settings and prompts, which are checked before (probe.py), and what the figures mean
(diversity/readiness.py).
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
from ..training.grpo import build_trainer, trainer_class


ROW = "aesl_row"  # column that tells which prompt a sample belongs to; the reward functions do not see it


def build(script_args, training_args, model_args, reward_funcs: list, train: Any) -> Any:
    from transformers import PrinterCallback

    trainer = build_trainer(script_args, training_args, model_args, reward_funcs, train, kind=probe_class())
    trainer.remove_callback(PrinterCallback)
    return trainer


def short_rl(
    trainer: Any, before: list[Group], rows: list[dict], *, num_samples: int, success_threshold: float
) -> dict:
    """Train for `max_steps`, and sample the same held-out prompts once more.

    Returns:
        `steps`, figures after it such as `reward`, each with its `_interval` over prompts, and `pass@1_change`:
        [difference, low, high] over the same prompts.
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


# ---- Samples


def probe_class() -> type:
    """GRPOTrainer that keeps the samples of its evaluation. Three methods are overridden, each to look on."""

    class ProbeTrainer(trainer_class()):
        samples: list[dict] | None = None  # of this process; None: nothing is kept
        _drawn: list[dict] | None = None  # the batch at hand

        def _generate_and_score_completions(self, inputs):
            if self.samples is None:
                return super()._generate_and_score_completions(inputs)
            self._drawn = [{"row": row[ROW]} for row in inputs]
            rows = [{key: value for key, value in row.items() if key != ROW} for row in inputs]
            return super()._generate_and_score_completions(rows)

        def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
            if self.samples is not None:  # the rewards are those of all processes
                own = rewards[self.accelerator.process_index * len(prompts) :][: len(prompts)].tolist()
                for sample, completion, ids, values in zip(
                    self._drawn, completions, completion_ids_list, own, strict=True
                ):
                    sample |= {"completion": _text(completion), "ids": list(ids), "rewards": values}
            return rewards

        def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, **kwargs):
            arguments = (input_ids, attention_mask, logits_to_keep)
            found = super()._get_per_token_logps_and_entropies(model, *arguments, **kwargs)
            if self.samples is not None and kwargs.get("compute_entropy"):
                kwargs |= {"compute_entropy": False, "compute_aux_loss": False}
                stops = [
                    super(ProbeTrainer, self)._get_per_token_logps_and_entropies(
                        asked_for(model, token), *arguments, **kwargs
                    )[0]
                    for token in self.eos_token_ids
                ]
                self._keep(found[0], found[1], torch.stack(stops).logsumexp(0).exp())
            return found

        def _keep(self, log_probs: Tensor, entropies: Tensor, stops: Tensor) -> None:
            """Add what is known of each token, each `[B, T]`, to the samples of the batch."""
            ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}  # as GRPOTrainer tells that one was cut off
            for place, sample in enumerate(self._drawn):
                ids = sample.pop("ids")
                length = len(ids)
                is_cut = ids[-1] not in ends
                own = stops[place, :length]
                sample |= {
                    "num_tokens": length,
                    "truncated": is_cut,
                    "entropy": entropies[place, :length].mean().item(),
                    "neg_log_prob": -log_probs[place, :length].mean().item(),
                    "eos_prob": (own.max() if is_cut else own[-1]).item(),
                }
            self.samples += self._drawn

    return ProbeTrainer


def _text(completion: str | list[dict]) -> str:
    return completion if isinstance(completion, str) else str(completion[-1].get("content") or "")


def asked_for(model: Any, token: int) -> Any:
    """`model`, scoring `token` at every position that has a label: its probability there, without any logits."""

    def forward(*, labels: Tensor, **inputs):
        return model(labels=labels.masked_fill(labels != -100, token), **inputs)

    return forward


@contextmanager
def at_temperature_1(trainer: Any) -> Iterator[None]:
    """Log-probabilities and entropies of the model itself inside, whatever the temperature that it samples at.

    GRPOTrainer divides by its temperature in the head that scores, for good; a head for the time being is put over it.
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


def sample(trainer: Any, rows: list[dict], num_samples: int) -> list[Group]:
    """`num_samples` graded samples of each row, on every process the same, by the trainer's evaluation."""
    mask_truncated, trainer.mask_truncated_completions = trainer.mask_truncated_completions, False
    trainer.samples = []
    try:
        with at_temperature_1(trainer):
            trainer.evaluate(eval_dataset=[{**row, ROW: index} for index, row in enumerate(rows)])
        drawn = gather_object(trainer.samples) if trainer.accelerator.num_processes > 1 else trainer.samples
    finally:
        trainer.samples, trainer.mask_truncated_completions = None, mask_truncated
    of_row = defaultdict(list)
    for one in drawn:
        of_row[one["row"]].append(one)
    # The last batch of several processes is filled up with prompts from the beginning: more samples than asked for.
    return [_group(row["prompt"], of_row[index][:num_samples]) for index, row in enumerate(rows)]


def _group(prompt: Any, drawn: list[dict]) -> Group:
    return Group(
        prompt=prompt,
        completions=[one["completion"] for one in drawn],
        **{
            key: [one[key] for one in drawn]
            for key in ("num_tokens", "truncated", "entropy", "rewards", "neg_log_prob", "eos_prob")
        },
    )
