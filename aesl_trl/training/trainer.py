"""AESLSFTTrainer: TRL's SFTTrainer with the Adaptive Early-Stop Loss."""

import copy
import inspect
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object, is_peft_model
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from peft import PeftConfig
from transformers import (
    DataCollator,
    EvalPrediction,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import get_config_model_id

from .. import files
from ..data.tokenized import check_trainable
from ..errors import InputError
from ..losses.old_policy import OLD_LOG_PROBS, OldPolicy
from ..losses.rules import TOKEN_RULES, TokenRule, nll_rule
from ..losses.scoring import TokenScores, add_fused_head
from ..models.peft_settings import check_peft_config, list_as_written
from ..models.positions import num_positions
from ..models.skeleton import access_of, skeleton
from ..models.stripped import warn_of_stripped_tokens
from ..models.tokens import stop_ids
from ..models.vocabulary import let_head_run
from .calibration import Calibration
from .callback import DiversityCallback, RunCallback, held_out_rows, monitor_of
from .checkpoints import find_checkpoint
from .config import AUTO, AESLSFTConfig
from .finite_steps import SHOWN_ROWS, FiniteStepsMixin, rows_not_finite
from .packing_probe import architecture_of, check_documents_apart, packed_rows_collator
from .rows import RowsMixin
from .run_record import EFFECTIVE, FOUND, found_by
from .session import training_lock
from .token_sums import TokenSums
from .trained_with import peft_settings, refuse_other_training, trained_with


if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import BitsAndBytesConfig, PreTrainedModel


class AESLSFTTrainer(FiniteStepsMixin, RowsMixin, SFTTrainer):
    """Trains as [`~trl.SFTTrainer`] with the Adaptive Early-Stop Loss of "Getting Your LLMs Ready for Reinforcement
    Learning with Lightweight SFT" (ICLR 2026), for a cold start that keeps the diversity that RL explores with. Only
    [`compute_loss`] differs.

    Example:

    ```python
    >>> from aesl_trl import AESLSFTConfig, AESLSFTTrainer

    >>> trainer = AESLSFTTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     args=AESLSFTConfig(output_dir="cold-start", diversity_steps=50),
    ...     train_dataset=demonstrations,  # rows with a prompt and a completion
    ...     eval_dataset=held_out,
    ... )
    >>> trainer.train()
    ```

    Args:
        model, args, ..., formatting_func: as in [`~trl.SFTTrainer`]. `args` may be `None`,
            [`~transformers.TrainingArguments`] or [`~trl.SFTConfig`]: they are converted to [`AESLSFTConfig`].
        diversity_prompts (`Dataset` or `list`, *optional*): held-out prompts whose completions are sampled when
            `args.diversity_steps > 0`: strings, message lists, or rows with a `"prompt"` and the columns that the
            reward functions need. Default: the prompts of `eval_dataset`.
        reward_funcs (`list`, *optional*): functions as for [`~trl.GRPOTrainer`], or names as in a config, scored on
            the same samples (pass@1, pass@k, group signal). A sample is right when the first one gives at least 1.

    Raises:
        InputError: a setting that would silently train with another loss (docs/reference/support.md), by name and at
            construction.
    """

    _tag_names = ["trl", "sft", "aesl"]
    _name = "AESL"
    _paper = {
        "title": "Getting Your LLMs Ready for Reinforcement Learning with Lightweight SFT",
        "citation": textwrap.dedent("""\
            @inproceedings{li2026getting,
                title        = {{Getting Your LLMs Ready for Reinforcement Learning with Lightweight SFT}},
                author       = {Xinran Li and Guangda Huzhang and Siqi Shen and Qing-Guo Chen and Zhao Xu and
                                Weihua Luo and Kaifu Zhang and Jun Zhang},
                booktitle    = {International Conference on Learning Representations},
                year         = 2026,
                url          = {https://openreview.net/forum?id=yezWGJmODg}
            }"""),
    }

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        args: SFTConfig | TrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        quantization_config: "BitsAndBytesConfig | None" = None,
        peft_config: "PeftConfig | None" = None,
        formatting_func: Callable[[dict], str] | None = None,
        *,
        diversity_prompts: Dataset | list | None = None,
        reward_funcs: list[str | Callable] | None = None,
        **later: Any,
    ):
        args = _convert_args(args, model)
        given = {
            "data_collator": data_collator,
            "train_dataset": train_dataset,
            "eval_dataset": eval_dataset,
            "processing_class": processing_class,
            "compute_loss_func": compute_loss_func,
            "compute_metrics": compute_metrics,
            "callbacks": callbacks,
            "optimizers": optimizers,
            "optimizer_cls_and_kwargs": optimizer_cls_and_kwargs,
            "preprocess_logits_for_metrics": preprocess_logits_for_metrics,
            "quantization_config": quantization_config,
            "peft_config": peft_config,
            "formatting_func": formatting_func,
            **later,  # what a later TRL adds
        }
        given = {name: value for name, value in given.items() if value is not None}  # an older TRL may not know all
        inspect.signature(SFTTrainer.__init__).bind(self, model, args, **given)  # refuses a misspelt name at once
        _refuse_unsupported(model, args, compute_loss_func)
        access = access_of(args)
        if isinstance(peft_config, PeftConfig):
            network = skeleton(model, **access) if isinstance(model, str) else model
            check_peft_config(list_as_written(peft_config), network, prefix="peft_config.")
        # Before TRL prepares the rows and completes PEFT's settings
        is_name, has_adapter = isinstance(model, str), not isinstance(model, str) and is_peft_model(model)
        peft = peft_settings(model.active_peft_config if has_adapter else peft_config)
        name = model if is_name else getattr(model.config, "_name_or_path", None)
        self._given = {"model": name, "peft": peft, "rows": train_dataset, "revision": access["revision"]}
        _refuse_rows_that_leak(model, args, peft_config, data_collator)
        rows = _diversity_rows(args, diversity_prompts, eval_dataset) if args.diversity_steps else None
        super().__init__(model, args, **given)
        _refuse_parallelism(self.accelerator.parallelism_config)  # it may come from accelerate's own config file
        self.take_token_rule()
        self._old_policy = OldPolicy(self, args.psft_refresh_steps) if self._token_rule.old_policy else None
        if is_peft_model(self.model):
            let_head_run(self.model)
        add_fused_head(self.model.get_base_model() if is_peft_model(self.model) else self.model)
        self._warn_if_prompts_are_trained()
        self._sums = {"train": None, "eval": None}
        self._eos_ids = stop_ids(self._tokenizer, self.model.generation_config.eos_token_id)
        trained_ids = check_trainable(
            self.train_dataset,
            args.max_length,
            stops={index: self._tokenizer.convert_ids_to_tokens(index) for index in self._eos_ids},
            num_embeddings=self.model.config.get_text_config().vocab_size,
            num_positions=num_positions(self.model),
        )
        warn_of_stripped_tokens(self._tokenizer, trained_ids)
        self.diversity_callback = None
        if rows is not None:
            self.diversity_callback = DiversityCallback(
                self,
                rows,
                **vars(args.measurement),
                chat_template_kwargs=args.chat_template_kwargs,
                reward_funcs=reward_funcs,
                stop=args.stop_at_turning_point,
                selection=args.selection_rule,
                best_eval_metric=args.best_eval_metric,
                max_candidates=args.max_candidates,
            )
            self.add_callback(self.diversity_callback)
        # After the first measurement: until the rewards have proved to work, an earlier run's files stay as they are
        self.add_callback(RunCallback(self))
        self._calibration = Calibration(self)
        self.add_callback(self._calibration)

    @cached_property
    def ingredients(self) -> dict:
        """What run.json records that this training is trained with, of the rows as they were given."""
        return trained_with(self.args, **self._given)

    def train(self, resume_from_checkpoint=None, *positional, **kwargs):
        """Train, or go on from a checkpoint as `aesl sft` does: `True` and `"true"` ask for the last whole one.

        With other data, another loss, model or PEFT config than the steps so far had, an [`InputError`] says which.
        An [`InputError`] also refuses a folder in which another training, or a chain, is at work.
        """
        folder, say = Path(self.args.output_dir), self.accelerator.print
        with training_lock(self.args, self.accelerator):
            checkpoint = find_checkpoint(resume_from_checkpoint, folder, lambda line: say(f"aesl_trl: {line}"))
            if checkpoint is not None:
                refuse_other_training(self, checkpoint)
            return super().train(None if checkpoint is None else str(checkpoint), *positional, **kwargs)

    def create_token_rule(self) -> TokenRule:
        """Return the loss as a function of a token's statistics; override it for your own loss (losses/rules.py).

        `self.t_scaling` is the value that `t_scaling: auto` found, while `self.args.t_scaling` stays `"auto"`.
        """
        args = copy.copy(self.args)
        args.t_scaling = self.t_scaling
        return TOKEN_RULES[args.cold_start_loss].rule(args)

    def take_token_rule(self) -> None:
        """Use [`create_token_rule`] from here on, and plain nll until `t_scaling: auto` has found its value."""
        self.t_scaling = found_by(self.state).get(FOUND, self.args.t_scaling)
        self._token_rule = nll_rule() if self.t_scaling == AUTO else self.create_token_rule()

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        if self._old_policy is not None:
            epoch_iterator = self._old_policy.next_step(epoch_iterator, num_batches)
        epoch_iterator = self._calibration.next_step(epoch_iterator, num_batches)
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mode = "train" if self.model.training else "eval"
        inputs["use_cache"] = False  # a default of True would warn beside gradient checkpointing
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        old = {}  # in evaluation the model is its own old policy
        if self._old_policy is not None and mode == "train":
            old = {OLD_LOG_PROBS: inputs.pop(OLD_LOG_PROBS)}  # a batch without them would train with a ratio of 1
        scored = model(**inputs, **old, token_rule=self._token_rule)
        scores = scored.scores
        num_items = scores.label_mask.sum() if num_items_in_batch is None else num_items_in_batch
        loss = scored.loss_sum / torch.as_tensor(num_items, device=scored.loss_sum.device).clamp(min=1)
        # num_items_in_batch counts the tokens of every rank while DDP averages the gradients over them
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        self._record(mode, inputs, scores)
        if self.aux_loss_enabled:
            # A mean of each micro-batch, so it is averaged over the accumulation steps that Trainer leaves to the loss
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.router_aux_loss_coef * scored.aux_loss.to(loss.device) / steps
            aux_loss = self.accelerator.gather(scored.aux_loss.detach().reshape(1)).mean().item()
            self._metrics[mode]["aux_loss"].append(aux_loss)
        if not return_outputs:
            return loss
        with torch.no_grad():  # compute_metrics asks for the logits in evaluation only
            outputs = model(**{key: value for key, value in inputs.items() if key != "labels"})
        return loss, outputs

    @torch.no_grad()
    def _record(self, mode: str, inputs: dict, scores: TokenScores) -> None:
        """Add the batch, over all ranks, to the sums that `log` divides; TRL's own metrics go where TRL keeps them."""
        if mode == "eval":
            scores = self._without_repeated_rows(scores)
        sums = TokenSums.of_batch(scores, self._eos_ids).over_ranks(self.accelerator)
        self._sums[mode] = sums if self._sums[mode] is None else self._sums[mode] + sums
        if mode == "train" and not sums.nll.isfinite() and self.accelerator.scaler is None:  # a scaler skips the step
            input_ids = inputs["input_ids"][:, -scores.log_probs.size(1) - 1 :]
            log_probs = scores.log_probs[:, -input_ids.size(1) + 1 :]  # without prompt learning's virtual tokens
            rows = rows_not_finite(log_probs, input_ids, scores.sequence_ids, self._tokenizer.decode)
            here = [f"rank {self.accelerator.process_index}, {row}" for row in rows[:SHOWN_ROWS]]
            self.stop_diverged(f"the loss is not finite ({'; '.join(gather_object(here))})")
        for name, total in (("entropy", sums.entropy), ("mean_token_accuracy", sums.top1)):
            self._metrics[mode][name].append((total / sums.tokens).item() if sums.tokens else 0.0)
        if mode == "train":
            mask, device = inputs.get("attention_mask"), scores.label_mask.device
            num_tokens = torch.tensor(inputs["input_ids"].numel()) if mask is None else mask.sum()
            self._total_train_tokens += self.accelerator.gather(num_tokens.to(device)).sum().item()
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def _without_repeated_rows(self, scores: TokenScores) -> TokenScores:
        """Drop the rows that accelerate repeats to fill a rank's last batch. A padding-free batch, one row, stays."""
        state = self.accelerator.gradient_state
        has_repeated = self.accelerator.num_processes > 1 and state.end_of_dataloader and state.remainder > 0
        if self.padding_free or not has_repeated:
            return scores
        kept = max(0, state.remainder - self.accelerator.process_index * self.args.eval_batch_size)
        values = {name: value[:kept] for name, value in vars(scores).items() if value is not None}
        return replace(scores, **values)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        if self._sums[mode] is not None:
            # An evaluation logs its loss as "eval_loss", or as "eval_NAME_loss" for one dataset of several
            loss_name = next((key for key in logs if key.endswith("_loss")), "eval_loss")
            prefix = "" if mode == "train" else loss_name.removesuffix("loss")
            sums, with_temperature = self._sums[mode], self._token_rule.temperatures is not None
            figures = sums.figures(with_temperature)
            if self._token_rule.losses is not None:  # the loss is no weighted nll
                figures.pop(EFFECTIVE, None)
            logs.update({prefix + name: value for name, value in figures.items()})
            if mode == "train" and self.args.should_save:
                row = {"step": self.state.global_step, **sums.by_position(with_temperature)}
                files.append_jsonl(files.own_folder(self.args.output_dir) / files.POSITIONS, row)
            self._sums[mode] = None
        super().log(logs, start_time)

    def _warn_if_prompts_are_trained(self) -> None:
        """Warn where labels cover prompts and the loss reads the prefix; a label of -100 shows that they do not."""
        reads_prefix = TOKEN_RULES[self.args.cold_start_loss].reads_prefix
        if not reads_prefix or self.completion_only_loss or self.args.assistant_only_loss:
            return
        column_names = self.train_dataset.column_names or next(iter(self.train_dataset)).keys()
        if "labels" in column_names and -100 in next(iter(self.train_dataset))["labels"]:
            return
        if not self.accelerator.is_main_process:
            return
        warnings.warn(
            "the labels cover the prompt and the chat template, as they do for `messages` and plain text by default: "
            "the loss averages over those tokens too, and trains almost as plain nll. Give rows with `prompt` and "
            "`completion`, or set assistant_only_loss=True for `messages`.",
            stacklevel=3,
        )

    def create_model_card(self, *args, **kwargs):
        super().create_model_card(*args, **kwargs)
        config, path = self.args, Path(self.args.output_dir, "README.md")
        if not self.is_world_process_zero() or not path.exists():
            return
        monitor, chosen = monitor_of(self), files.read_object(files.own_folder(config.output_dir) / files.SELECTION)
        rule = chosen.get("rule") or (monitor.selection if monitor else "none (diversity_steps is 0)")
        lines = [
            path.read_text(encoding="utf-8").rstrip("\n"),
            "",
            "## Cold start",
            "",
            f"Trained with aesl_trl. Paper: [{self._paper['title']}]"
            "(https://openreview.net/forum?id=yezWGJmODg) (ICLR 2026).",
            "",
            f"- cold_start_loss: {config.cold_start_loss}",
            *(f"- {name}: {getattr(config, name)}" for name in TOKEN_RULES[config.cold_start_loss].fields),
            *(f"- {name}: {value:.3g}" for name, value in found_by(self.state).items()),
            f"- selection: {rule}",
        ]
        if chosen:
            lines.append(f"- selected step: {chosen['step']} ({chosen['reason']})")
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _convert_args(args: TrainingArguments | None, model) -> AESLSFTConfig:
    """Return an [`AESLSFTConfig`] with every value of `args`."""
    if isinstance(args, AESLSFTConfig):
        return args
    if args is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        return AESLSFTConfig(f"{name.rstrip('/').split('/')[-1]}-AESL")
    if not isinstance(args, TrainingArguments):
        raise InputError(f"args is a {type(args).__name__}, but must be AESLSFTConfig, SFTConfig or TrainingArguments")
    # Not args.to_dict(), which replaces every *_token by a placeholder and turns objects into text
    values = {field.name: getattr(args, field.name) for field in fields(args) if field.init}
    extra = sorted(set(values) - {field.name for field in fields(AESLSFTConfig) if field.init})
    if extra:
        raise InputError(
            f"args is a {type(args).__name__} with fields of its own ({', '.join(extra)}): "
            "derive it from AESLSFTConfig instead"
        )
    return AESLSFTConfig(**values)


def _refuse_rows_that_leak(model, args: AESLSFTConfig, peft_config, collator) -> None:
    """Refuse to put several documents into a row where they would see each other."""
    packs = args.packing and args.packing_strategy != "wrapped"  # wrapped rows have no borders, and promise none
    if packs or args.padding_free:
        if not isinstance(model, str) and is_peft_model(model):
            peft_config = model.active_peft_config
        check_documents_apart(
            architecture_of(model, args, peft_config),
            packed_rows_collator(args) if collator is None else collator,
            args.device,
            setting="packing" if packs else "padding_free",
            unverified=args.packing_unverified,
        )


def _refuse_unsupported(model, args: AESLSFTConfig, compute_loss_func) -> None:
    """Refuse settings that would train with another loss than the one asked for, or with none."""
    _refuse_parallelism(args.parallelism_config)
    if (getattr(model, "_tp_size", None) or 1) > 1:
        raise InputError("tensor parallelism is not supported by AESLSFTTrainer: load the model without tp_plan")
    if compute_loss_func is not None:
        raise InputError("compute_loss_func would replace the cold-start loss: override compute_loss in a subclass")
    if value := args.label_smoothing_factor:
        raise InputError(f"label_smoothing_factor is {value}, but label smoothing is not supported: leave it at 0")
    if args.eval_packing and not args.packing:
        # TRL's collator then builds a full attention mask, and the packed documents see each other
        raise InputError(
            "eval_packing=True with packing=False loses the borders of the packed sequences: leave eval_packing unset"
        )
    if args.packing and args.packing_strategy == "wrapped" and TOKEN_RULES[args.cold_start_loss].reads_prefix:
        raise InputError(
            "packing_strategy is 'wrapped', which loses the borders of the sequences that AESL averages over: "
            "use 'bfd' or 'bfd_split'"
        )


def _refuse_parallelism(parallelism_config) -> None:
    for name, feature in (
        ("sp_enabled", "sequence parallelism (DeepSpeed Ulysses)"),
        ("cp_enabled", "context parallelism"),
        ("tp_enabled", "tensor parallelism"),
    ):
        if getattr(parallelism_config, name, False):
            raise InputError(f"{feature} is not supported by AESLSFTTrainer: use DDP, FSDP or ZeRO")


def _diversity_rows(args: AESLSFTConfig, diversity_prompts, eval_dataset):
    """Return the rows to sample from."""
    prompts = eval_dataset if diversity_prompts is None else diversity_prompts
    if prompts is None or (diversity_prompts is None and isinstance(prompts, dict)):
        raise InputError(
            f"diversity_steps is {args.diversity_steps}, but there are no held-out prompts: "
            "pass diversity_prompts, or one eval_dataset"
        )
    return held_out_rows(prompts, args.diversity_num_prompts)
