"""AESLSFTConfig: the fields that aesl_trl adds to TRL's SFTConfig, validated."""

from argparse import SUPPRESS
from contextlib import suppress
from dataclasses import dataclass, fields

from trl import SFTConfig

from ..diversity.selection import DEFAULT_RULE, EVAL_METRICS, METRICS, RULES
from ..errors import InputError
from ..losses.definition import AESL_WEIGHTS, GEM_H, PREFIX_MODES
from ..losses.rules import TOKEN_RULES
from ..sampling.backends import TRAINING_BACKENDS, VLLMSettings, check_backend
from ..values import check_bound, check_bounds, option
from .hub import PARTS, check_parts
from .measurement import MeasurementSettings, fit


AUTO = "auto"  # of t_scaling

# MeasurementSettings bounds the other fields. These are no metadata of theirs: HfArgumentParser, which users of the
# config may run, hands every key of the metadata to argparse
BOUNDS = {
    **dict.fromkeys(("min_temperature", "psft_clip_high", "eaft_alpha"), {"above": 0}),
    "weight_threshold": {"above": 0, "below": 1, "hint": "1 releases nothing"},
    "gem_beta": {"above": 0, "at_most": 1, "hint": "1 with gem_h linear is the gradient of nll"},
    "psft_refresh_steps": {"at_least": 1},
    "eaft_top_k": {"at_least": 2},
    "diversity_num_prompts": {"at_least": 1},
    "max_candidates": {"at_least": 2},
}


@dataclass
class AESLSFTConfig(SFTConfig):
    r"""
    Configuration of [`AESLSFTTrainer`]: [`~trl.SFTConfig`] and the fields below, with their types and defaults.

    Args:
        cold_start_loss: `"aesl"` (Adaptive Early-Stop Loss, paper Eq. 4), `"nll"` (plain negative log-likelihood),
            `"dft"`, `"gem"`, `"psft"` or `"eaft"` (docs/losses.md). A field of another loss must keep its default.
        t_scaling: scale of AESL's temperature, positive: the temperature is 1 where the prefix's mean negative
            log-likelihood is `1 / t_scaling` nats. The paper does not state its value. `"auto"` finds, before step 1,
            the value at which AESL begins to act, in forward passes over the rows of the first 8 optimiser steps:
            0.9 / `nll_learnt`, within [0.1, 10] (docs/losses.md). It needs `prefix_mode="inclusive"`.
        min_temperature: lower clamp of the temperature, positive.
        prefix_mode: `"inclusive"` (paper): the prefix's mean includes the current token; `"exclusive"`: it does not;
            `"none"`: `t_scaling` is the temperature of every token (the token-level ablation).
        aesl_weight: `"adaptive"` (paper), or an ablation without prefix and temperature, with q the label's
            probability: `"linear"` is 1 - q, `"threshold"` is 1 where q < `weight_threshold`, else 0.
        weight_threshold: for `"threshold"`, above 0 and below 1.
        gem_beta: GEM's temperature, above 0 and at most 1: 1 with `"linear"` gives nll's gradient, a lower value keeps
            more diversity.
        gem_h: GEM's function h: `"linear"` or `"sigmoid"` ("logsigmoid" in the authors' code).
        psft_clip_high: a token whose probability rose by more than this share since the refresh is released. PSFT's
            lower clip has no field: with an advantage of 1 it changes nothing.
        psft_refresh_steps: optimiser steps after which the old policy becomes the current one. 1 gives nll's gradient.
        eaft_alpha: exponent of EAFT's weight, positive.
        eaft_top_k: number of most likely tokens over whose softmax EAFT takes its entropy, at least 2.
        diversity_steps: steps between two measurements of the diversity of the model's own samples; the first
            measurement comes before step 1. 0 turns measuring off.
        diversity_num_prompts: held-out prompts sampled at each measurement: the first ones given, the same each time.
        diversity_num_samples: completions sampled for each prompt, at least 2. `diversity_samples` is its old name.
        diversity_temperature: sampling temperature, positive.
        diversity_max_new_tokens: tokens after which a sample is cut off (and counted as truncated).
        diversity_batch_size: completions that `model.generate` draws at once on each process; halved when memory runs
            out.
        diversity_token_budget: completion tokens that a measurement may cost over all prompts and samples (prompts x
            samples x max_new_tokens). A larger measurement is made smaller, and a line says so: first its prompts,
            down to 16, then its length, down to 256, then its samples, down to 4. `None` is 32,768 with `"generate"`
            and 131,072 with vLLM, 0 no limit. Prompts count too: `model.generate` reads at most this many of their
            tokens at once (never less than 32,768; 131,072 without a limit), so that a batch of long ones is split.
        diversity_backend: how to sample: `"generate"` is `model.generate`; `"vllm_colocate"` shares the training's
            GPUs, `"vllm_server"` is a `vllm serve` of its own; `"auto"` takes a server where one is named, vLLM where
            it is installed and there is a GPU, else `"generate"`, and says which.
        diversity_vllm_server_base_url, diversity_vllm_server_host, diversity_vllm_server_port,
            diversity_vllm_server_timeout, diversity_vllm_group_port: the server, as in GRPOConfig's fields without
            `diversity_`.
        diversity_vllm_gpu_memory_utilization: share of the GPU's memory that a colocated vLLM may take, above 0 and
            below 1.
        diversity_vllm_enable_sleep_mode: a colocated vLLM frees its memory between measurements.
        diversity_metric: the series whose turning point is sought: `"entropy"` (its maximum) or `"self_bleu"` (its
            minimum).
        diversity_patience: measurements after the peak that must confirm the fall.
        stop_at_turning_point: end the training once the turning point is confirmed.
        selection: which checkpoint goes to RL: `"turning_point"` (default), `"last"`, `"best_eval"` (for comparison),
            `"readiness"` (the best checkpoint that `aesl probe` finds ready) or `"mix"` (the best average with the
            base that `aesl mix` wrote). The selection is made at the end of a training with `diversity_steps`; by
            readiness and mix it is made in the chain, or by `aesl probe` or `aesl mix`, and `aesl select`, afterwards.
        best_eval_metric: metric by which `"best_eval"` chooses: the lowest `"eval_nll"`, or the highest `"pass@1"` on
            the diversity prompts.
        packing_unverified: allow packing and padding_free, with a warning, where a small copy of the model cannot be
            made or run (code of its own, say), and so cannot show that the documents of a row do not see each other.
        max_candidates: weights-only candidates kept on disk at a time: the last measurement, the best evaluation, the
            most diverse one, the one with the most mixed groups, and then by diversity.
        chat_template_kwargs: keywords for the chat template, as GRPOConfig's, for the trained rows and the diversity
            prompts. Those of a row's column of this name come before them.
        hub_include: parts of the run that `push_to_hub` uploads beside the model, to `_aesl` in its repository:
            `"selected"`, `"selection"`, `"candidates"`, `"samples"`, `"diversity"`, `"positions"`, `"run"`, `"log"`.
            By default none of them leaves this machine.
    """

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "chat_template_kwargs"]

    # TOKEN_RULES itself, no copy: a loss of a user's own may join it before the config is made
    cold_start_loss: str = option("aesl", "Loss of the cold start.", choices=TOKEN_RULES)
    # TrlParser hands a union with str and None over as text
    t_scaling: float | str | None = option(
        3.0, "Scale of AESL's temperature, positive (paper, Eq. 4); auto finds it before step 1."
    )
    min_temperature: float = option(1e-2, "Lower clamp of AESL's temperature, positive.")
    prefix_mode: str = option("inclusive", "Prefix over which AESL averages.", choices=PREFIX_MODES)
    aesl_weight: str = option("adaptive", "AESL's weight, or a simpler one as an ablation.", choices=AESL_WEIGHTS)
    weight_threshold: float = option(0.5, "Probability, below 1, from which aesl_weight threshold releases a token.")
    gem_beta: float = option(0.7, "GEM's temperature, above 0 and at most 1 (1 with gem_h linear: nll's gradient).")
    gem_h: str = option("linear", "GEM's function h.", choices=GEM_H)
    psft_clip_high: float = option(0.28, "PSFT releases a token whose probability rose by more than this share.")
    psft_refresh_steps: int = option(8, "Steps from one old policy of PSFT to the next.")
    eaft_alpha: float = option(1.0, "Exponent of EAFT's weight, positive.")
    eaft_top_k: int = option(20, "Tokens over which EAFT takes its entropy, at least 2.")
    diversity_steps: int = option(0, "Steps between two measurements of the own samples' diversity; 0: never.")
    diversity_num_prompts: int = option(64, "Held-out prompts sampled at each measurement.")
    diversity_num_samples: int = option(8, "Completions sampled for each prompt, at least 2.")
    diversity_temperature: float = option(1.0, "Sampling temperature, positive.")
    diversity_max_new_tokens: int = option(512, "Tokens after which a sample is cut off.")
    diversity_batch_size: int = option(128, "Completions that model.generate draws at once on a process.")
    diversity_token_budget: int | None = option(
        None,
        "Completion tokens that a measurement may cost; a larger measurement is made smaller. Default: 32768 with "
        "model.generate, 131072 with vLLM; 0: no limit.",
    )
    diversity_backend: str = option("auto", "How to sample.", choices=TRAINING_BACKENDS)
    diversity_vllm_server_base_url: str | None = option(None, "vLLM server, such as http://localhost:8000.")
    diversity_vllm_server_host: str | None = option(None, "Host of a vLLM server, where the base url is not given.")
    diversity_vllm_server_port: int = option(8000, "Port of the vLLM server.")
    diversity_vllm_server_timeout: float = option(240.0, "Seconds to wait for the vLLM server to be up.")
    diversity_vllm_group_port: int = option(51216, "Port of the process group that sends weights to the server.")
    diversity_vllm_gpu_memory_utilization: float = option(0.3, "Share of GPU memory that a colocated vLLM may take.")
    diversity_vllm_enable_sleep_mode: bool = option(True, "A colocated vLLM frees its memory between measurements.")
    diversity_metric: str = option("entropy", "Series whose turning point is sought.", choices=METRICS)
    diversity_patience: int = option(3, "Measurements after the peak that must confirm the fall.")
    stop_at_turning_point: bool = option(False, "End the training once the turning point is confirmed.")
    selection: str | None = option(None, f"Checkpoint for RL. Default: {DEFAULT_RULE}.", choices=RULES)
    best_eval_metric: str = option("eval_nll", "Metric by which selection best_eval chooses.", choices=EVAL_METRICS)
    packing_unverified: bool = option(
        False, "Allow packing and padding_free where no probe can show that documents do not see each other."
    )
    max_candidates: int = option(5, "Weights-only candidates kept on disk at a time.")
    hub_include: list[str] = option([], f"Parts of the run that push_to_hub uploads too: {', '.join(PARTS)}.")

    chat_template_kwargs: dict | str | None = option(
        None, 'Keywords for the chat template, as GRPOConfig\'s, e.g. {"enable_thinking": false}.'
    )
    diversity_samples: int | None = option(None, SUPPRESS)  # the old name, also in Python and in other parsers

    def __post_init__(self):
        if self.diversity_samples is not None:
            self.diversity_num_samples, self.diversity_samples = self.diversity_samples, None
        if self.loss_type not in ("nll", "chunked_nll"):
            raise InputError(
                f"loss_type is {self.loss_type!r}, but the loss is chosen by cold_start_loss "
                f"({self.cold_start_loss!r}): leave loss_type at 'nll'"
            )
        check_bounds(self, bounds=BOUNDS)
        self._check_t_scaling()
        check_parts(self.hub_include, self.push_to_hub)
        self.measurement.check("diversity_")
        self._check_loss_fields()
        if self.diversity_steps:
            check_backend(self.diversity_backend, self.diversity_vllm, prefix="diversity_")
            fit(self.measurement.size(self.diversity_num_prompts), self.diversity_token_budget or None)
        elif self.selection is not None or self.stop_at_turning_point:
            name = "selection" if self.selection is not None else "stop_at_turning_point"
            raise InputError(f"{name} needs measurements: set diversity_steps to 1 or more, e.g. 50")
        if (self.metric_for_best_model or "").endswith("nll"):
            # Trainer takes every metric whose name does not end in "loss" for a score, and would keep the worst model
            self.greater_is_better = False
        super().__post_init__()

    @property
    def selection_rule(self) -> str:
        """`selection`, or its default."""
        return self.selection or DEFAULT_RULE

    @property
    def measurement(self) -> MeasurementSettings:
        """The fields `diversity_...` by the names that DiversityCallback has for them."""
        return MeasurementSettings(
            **{field.name: getattr(self, f"diversity_{field.name}") for field in fields(MeasurementSettings)}
        )

    @property
    def diversity_vllm(self) -> VLLMSettings:
        """The fields `diversity_vllm_...` by their names in TRL."""
        return VLLMSettings(
            **{field.name: getattr(self, f"diversity_vllm_{field.name}") for field in fields(VLLMSettings)}
        )

    def _check_t_scaling(self) -> None:
        if isinstance(self.t_scaling, str):
            with suppress(ValueError):
                self.t_scaling = float(self.t_scaling)
        if self.t_scaling != AUTO:
            check_bound("t_scaling", self.t_scaling, above=0, hint=f"{AUTO} finds it before step 1")
        elif self.prefix_mode != "inclusive":
            raise InputError(
                f"t_scaling is {AUTO!r}, but prefix_mode is {self.prefix_mode!r}, and the value is found for "
                "'inclusive': give a number, such as 1.0"
            )

    def _check_loss_fields(self) -> None:
        """Refuse a field that another loss reads, or that this loss does not read as it is set."""
        unread = [
            (name, "cold_start_loss", loss)
            for loss, row in TOKEN_RULES.items()
            for name in row.fields
            if name not in TOKEN_RULES[self.cold_start_loss].fields
        ]
        if self.aesl_weight != "adaptive":
            unread += [(name, "aesl_weight", "adaptive") for name in ("t_scaling", "min_temperature", "prefix_mode")]
        if self.aesl_weight != "threshold":
            unread.append(("weight_threshold", "aesl_weight", "threshold"))
        for name, chooser, needed in unread:
            value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            if value != default:
                raise InputError(
                    f"{name} is {value!r}, but {chooser} is {getattr(self, chooser)!r}, which does not read it: set "
                    f"{chooser} to {needed!r}, or leave {name} at {default!r}"
                )
