"""AESLSFTConfig: the fields that aesl_trl adds to TRL's SFTConfig, validated."""

from dataclasses import dataclass, field, fields

from trl import SFTConfig

from ..arguments import check_bounds
from ..diversity.selection import EVAL_METRICS, METRICS, RULES, default_rule
from ..errors import InputError
from ..losses.definition import AESL_WEIGHTS, GEM_H, PREFIX_MODES
from ..losses.rules import TOKEN_RULES
from ..sampling.backends import TRAINING_BACKENDS, VLLMSettings, check_backend
from .measurement import MeasurementSettings, fit


# MeasurementSettings bounds the other fields. These are no metadata of theirs: HfArgumentParser, which users of the
# config may run, hands every key of the metadata to argparse
BOUNDS = {
    **dict.fromkeys(("t_scaling", "min_temperature", "psft_clip_high", "eaft_alpha"), {"above": 0}),
    "weight_threshold": {"above": 0, "below": 1},
    "gem_beta": {"above": 0, "at_most": 1},
    "psft_refresh_steps": {"at_least": 1},
    "eaft_top_k": {"at_least": 2},
    "diversity_num_prompts": {"at_least": 1},
    "max_candidates": {"at_least": 2},
}


@dataclass
class AESLSFTConfig(SFTConfig):
    r"""
    Configuration of [`AESLSFTTrainer`]: [`~trl.SFTConfig`] and the fields below.

    Args:
        cold_start_loss (`str`, *optional*, defaults to `"aesl"`):
            `"aesl"` (Adaptive Early-Stop Loss, paper Eq. 4), `"nll"` (plain negative log-likelihood), `"dft"`,
            `"gem"`, `"psft"` or `"eaft"` (docs/losses.md). A field of another loss must keep its default.
        t_scaling (`float`, *optional*, defaults to `3.0`):
            Scale of AESL's temperature, positive: the temperature is 1 where the prefix's mean negative log-likelihood
            is `1 / t_scaling` nats. The paper does not state its value.
        min_temperature (`float`, *optional*, defaults to `1e-2`):
            Lower clamp of the temperature, positive.
        prefix_mode (`str`, *optional*, defaults to `"inclusive"`):
            `"inclusive"` (paper): the prefix's mean includes the current token; `"exclusive"`: it does not; `"none"`:
            `t_scaling` is the temperature of every token (the token-level ablation).
        aesl_weight (`str`, *optional*, defaults to `"adaptive"`):
            `"adaptive"` (paper); the ablations without prefix and temperature, q the label's probability: `"linear"`,
            1 - q, or `"threshold"`, 1 where q < `weight_threshold`, else 0.
        weight_threshold (`float`, *optional*, defaults to `0.5`):
            Of `"threshold"`, above 0 and below 1.
        gem_beta (`float`, *optional*, defaults to `0.7`):
            GEM's temperature, above 0 and at most 1: 1 with `"linear"` gives nll's gradient, less keeps more
            diversity.
        gem_h (`str`, *optional*, defaults to `"linear"`):
            GEM's function h: `"linear"` or `"sigmoid"` ("logsigmoid" in the authors' code).
        psft_clip_high (`float`, *optional*, defaults to `0.28`):
            A token whose probability rose by more than this share since the refresh is released. PSFT's lower clip has
            no field: with an advantage of 1 it changes nothing.
        psft_refresh_steps (`int`, *optional*, defaults to `8`):
            Optimiser steps after which the old policy becomes the current one. 1 gives nll's gradient.
        eaft_alpha (`float`, *optional*, defaults to `1.0`):
            Exponent of EAFT's weight, positive.
        eaft_top_k (`int`, *optional*, defaults to `20`):
            EAFT's entropy is that of the softmax over so many tokens, at least 2.
        diversity_steps (`int`, *optional*, defaults to `0`):
            Measure the diversity of the model's own samples before step 1 and every that many steps. 0 turns it off.
        diversity_num_prompts (`int`, *optional*, defaults to `64`):
            Held-out prompts sampled at each measurement, the first ones given; always the same.
        diversity_samples (`int`, *optional*, defaults to `8`):
            Completions sampled for each prompt, at least 2.
        diversity_temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature, positive.
        diversity_max_new_tokens (`int`, *optional*, defaults to `512`):
            Tokens after which a sample is cut off (and counted as truncated).
        diversity_batch_size (`int`, *optional*, defaults to `128`):
            Completions that `model.generate` draws at once on each process; halved when memory runs out.
        diversity_token_budget (`int`, *optional*):
            Completion tokens that a measurement may cost over all prompts and samples (prompts x samples x
            max_new_tokens). More is made smaller, in this order and not below: prompts to 16, length to 256, samples
            to 4; a line says so. `None` is 32,768 with `"generate"` and 131,072 with vLLM, 0 no limit.
        diversity_backend (`str`, *optional*, defaults to `"auto"`):
            How to sample: `"generate"` is `model.generate`; `"vllm_colocate"` shares the training's GPUs,
            `"vllm_server"` is a `vllm serve` of its own; `"auto"` takes a server where one is named, vLLM where it is
            installed and there is a GPU, else `"generate"`, and says which.
        diversity_vllm_server_base_url (`str`, *optional*), diversity_vllm_server_host (`str`, *optional*),
        diversity_vllm_server_port (`int`, *optional*, defaults to `8000`), diversity_vllm_server_timeout (`float`,
        *optional*, defaults to `240.0`), diversity_vllm_group_port (`int`, *optional*, defaults to `51216`):
            The server, as GRPOConfig's fields without `diversity_`.
        diversity_vllm_gpu_memory_utilization (`float`, *optional*, defaults to `0.3`):
            Share of the GPU's memory that a colocated vLLM may take, above 0 and below 1.
        diversity_vllm_enable_sleep_mode (`bool`, *optional*, defaults to `True`):
            A colocated vLLM frees its memory between measurements.
        diversity_metric (`str`, *optional*, defaults to `"entropy"`):
            The series whose turning point is sought: `"entropy"` (its maximum) or `"self_bleu"` (its minimum).
        diversity_patience (`int`, *optional*, defaults to `3`):
            Measurements after the peak that must confirm the fall.
        stop_at_turning_point (`bool`, *optional*, defaults to `False`):
            End the training once the turning point is confirmed.
        selection (`str`, *optional*):
            Which checkpoint goes to RL: `"turning_point"` (default but for aesl), `"last"` (default for aesl: the
            loss itself is the early stop), `"best_eval"` (for comparison) or `"readiness"` (the best that `aesl probe`
            finds ready). Made at the end of training when `diversity_steps` is set; by readiness in the chain, or by
            `aesl probe` and `aesl select` afterwards.
        best_eval_metric (`str`, *optional*, defaults to `"eval_nll"`):
            What `"best_eval"` looks at: `"eval_nll"` (lowest) or `"pass@1"` on the diversity prompts (highest).
        max_candidates (`int`, *optional*, defaults to `5`):
            Weights-only candidates kept on disk at a time; the last measurement and the best evaluation are always
            among them.
    """

    cold_start_loss: str = field(
        default="aesl",
        metadata={"help": "Loss of the cold start.", "choices": list(TOKEN_RULES)},
    )
    t_scaling: float = field(default=3.0, metadata={"help": "Scale of AESL's temperature, positive (paper, Eq. 4)."})
    min_temperature: float = field(default=1e-2, metadata={"help": "Lower clamp of AESL's temperature, positive."})
    prefix_mode: str = field(
        default="inclusive",
        metadata={"help": "Prefix over which AESL averages.", "choices": list(PREFIX_MODES)},
    )
    aesl_weight: str = field(
        default="adaptive",
        metadata={"help": "AESL's weight, or a simpler one as an ablation.", "choices": list(AESL_WEIGHTS)},
    )
    weight_threshold: float = field(
        default=0.5, metadata={"help": "Of aesl_weight threshold: probability from which a token is released."}
    )
    gem_beta: float = field(default=0.7, metadata={"help": "GEM's temperature, above 0 and at most 1."})
    gem_h: str = field(default="linear", metadata={"help": "GEM's function h.", "choices": list(GEM_H)})
    psft_clip_high: float = field(
        default=0.28, metadata={"help": "PSFT releases a token whose probability rose by more than this share."}
    )
    psft_refresh_steps: int = field(default=8, metadata={"help": "Steps from one old policy of PSFT to the next."})
    eaft_alpha: float = field(default=1.0, metadata={"help": "Exponent of EAFT's weight, positive."})
    eaft_top_k: int = field(default=20, metadata={"help": "Tokens over which EAFT takes its entropy, at least 2."})
    diversity_steps: int = field(
        default=0, metadata={"help": "Measure the diversity of own samples every that many steps; 0: never."}
    )
    diversity_num_prompts: int = field(default=64, metadata={"help": "Held-out prompts sampled at each measurement."})
    diversity_samples: int = field(default=8, metadata={"help": "Completions sampled for each prompt, at least 2."})
    diversity_temperature: float = field(default=1.0, metadata={"help": "Sampling temperature, positive."})
    diversity_max_new_tokens: int = field(default=512, metadata={"help": "Tokens after which a sample is cut off."})
    diversity_batch_size: int = field(
        default=128, metadata={"help": "Completions that model.generate draws at once on a process."}
    )
    diversity_token_budget: int | None = field(
        default=None,
        metadata={
            "help": "Completion tokens that a measurement may cost; more is made smaller. Default: 32768 with "
            "model.generate, 131072 with vLLM; 0: no limit."
        },
    )
    diversity_backend: str = field(
        default="auto",
        metadata={"help": "How to sample.", "choices": list(TRAINING_BACKENDS)},
    )
    diversity_vllm_server_base_url: str | None = field(
        default=None, metadata={"help": "Address of a vLLM server, e.g. http://localhost:8000."}
    )
    diversity_vllm_server_host: str | None = field(
        default=None, metadata={"help": "Host of a vLLM server, where the base url is not given."}
    )
    diversity_vllm_server_port: int = field(default=8000, metadata={"help": "Port of the vLLM server."})
    diversity_vllm_server_timeout: float = field(
        default=240.0, metadata={"help": "Seconds to wait for the vLLM server to be up."}
    )
    diversity_vllm_group_port: int = field(
        default=51216, metadata={"help": "Port of the process group through which weights go to the vLLM server."}
    )
    diversity_vllm_gpu_memory_utilization: float = field(
        default=0.3, metadata={"help": "Share of the GPU's memory that a colocated vLLM may take."}
    )
    diversity_vllm_enable_sleep_mode: bool = field(
        default=True, metadata={"help": "A colocated vLLM frees its memory between measurements."}
    )
    diversity_metric: str = field(
        default="entropy",
        metadata={"help": "Series whose turning point is sought.", "choices": list(METRICS)},
    )
    diversity_patience: int = field(
        default=3, metadata={"help": "Measurements after the peak that must confirm the fall."}
    )
    stop_at_turning_point: bool = field(
        default=False, metadata={"help": "End the training once the turning point is confirmed."}
    )
    selection: str | None = field(
        default=None,
        metadata={
            "help": "Which checkpoint goes to RL. Default: last for aesl, turning_point for any other loss.",
            "choices": list(RULES),
        },
    )
    best_eval_metric: str = field(
        default="eval_nll",
        metadata={"help": "What selection best_eval looks at.", "choices": list(EVAL_METRICS)},
    )
    max_candidates: int = field(default=5, metadata={"help": "Weights-only candidates kept on disk at a time."})

    def __post_init__(self):
        check_bounds(self, bounds=BOUNDS)
        self.measurement.check("diversity_")
        self._check_loss_fields()
        if self.diversity_steps:
            check_backend(self.diversity_backend, self.diversity_vllm, prefix="diversity_")
            fit(self.measurement.size(self.diversity_num_prompts), self.diversity_token_budget or None)
        elif self.selection is not None or self.stop_at_turning_point:
            name = "selection" if self.selection is not None else "stop_at_turning_point"
            raise InputError(f"{name} needs measurements: set diversity_steps to 1 or more, e.g. 50")
        if self.loss_type not in ("nll", "chunked_nll"):
            raise InputError(
                f"loss_type is {self.loss_type!r}, but the loss is chosen by cold_start_loss "
                f"({self.cold_start_loss!r}): leave loss_type at 'nll'"
            )
        if (self.metric_for_best_model or "").endswith("nll"):
            # Trainer takes every metric whose name does not end in "loss" for a score, and would keep the worst model
            self.greater_is_better = False
        super().__post_init__()

    @property
    def selection_rule(self) -> str:
        """`selection`, or its default for the loss."""
        return self.selection or default_rule(self.cold_start_loss)

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

    def _check_loss_fields(self) -> None:
        """Refuse a field that another loss reads, or that this loss does not read as it is set."""
        read = TOKEN_RULES[self.cold_start_loss].fields
        for loss, row in TOKEN_RULES.items():
            for name in (name for name in row.fields if name not in read):
                self._refuse_unread(name, "cold_start_loss", loss)
        if self.aesl_weight != "adaptive":
            for name in ("t_scaling", "min_temperature", "prefix_mode"):
                self._refuse_unread(name, "aesl_weight", "adaptive")
        if self.aesl_weight != "threshold":
            self._refuse_unread("weight_threshold", "aesl_weight", "threshold")

    def _refuse_unread(self, name: str, chooser: str, needed: str) -> None:
        value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
        if value != default:
            raise InputError(
                f"{name} is {value!r}, but {chooser} is {getattr(self, chooser)!r}, which does not read it: set "
                f"{chooser} to {needed!r}, or leave {name} at {default!r}"
            )
