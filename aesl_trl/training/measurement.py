"""One measurement of a model under training: its size and engine, decided once; samples and a row, each time.

Writing, logging and deciding are callback.py's.
"""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from .. import files
from ..diversity.figures import Group, by_prompt, entropy_estimator, intervals, measure, prompt_sums
from ..diversity.selection import METRICS
from ..diversity.series import SETTINGS, base_completions, check_settings
from ..errors import InputError
from ..rewards.functions import score_groups
from ..sampling.backends import VLLMSettings, choose_backend
from ..sampling.draws import SamplingFailed, agree
from ..sampling.generate import GenerateEngine
from ..sampling.groups import sample_groups
from ..sampling.vllm_synced import SyncedVLLM


# Completion tokens a measurement. Of transformers' generate: 16 prompts x 8 samples x 256 tokens; vLLM decodes 4 times
# as many tokens in the same time
DEFAULT_BUDGETS = {"generate": 32_768, "vllm_colocate": 131_072, "vllm_server": 131_072}

# What gives way, in this order, and down to where. Prompts first: their number alone does not change what a figure
# means. Below 256 tokens most answers are cut off; below 4 samples there is no pass@4 and self-BLEU is mostly noise
FLOORS = {"num_prompts": 16, "max_new_tokens": 256, "num_samples": 4}


@dataclass(frozen=True)
class Size:
    """The size of a measurement."""

    num_prompts: int
    num_samples: int
    max_new_tokens: int

    @property
    def tokens(self) -> int:
        return self.num_prompts * self.num_samples * self.max_new_tokens

    def __str__(self) -> str:
        return f"{self.num_prompts} prompts x {self.num_samples} samples x {self.max_new_tokens} tokens"


class Measurement:
    """
    What is sampled, by what, and what a row says about it.

    Args:
        trainer: whose model is measured.
        rows: held-out prompts; as many are used as the token budget allows.
        samples, temperature, max_new_tokens, reward_funcs, backend, batch_size, token_budget, vllm:
            of [`~aesl_trl.DiversityCallback`].

    Raises:
        InputError: a backend that cannot be used here, or a budget below the smallest measurement.
    """

    def __init__(
        self,
        trainer,
        rows: list[dict],
        *,
        samples: int,
        temperature: float,
        max_new_tokens: int,
        reward_funcs: list,
        backend: str,
        batch_size: int,
        token_budget: int | None,
        vllm: VLLMSettings | None,
    ):
        vllm = vllm or VLLMSettings()
        self.trainer = trainer
        self.temperature = temperature
        self.reward_funcs = reward_funcs
        self.backend, self._why = choose_backend(backend, vllm, _vllm_obstacle(trainer, temperature))
        self.engine = (
            GenerateEngine(batch_size)
            if self.backend == "generate"
            else SyncedVLLM(self.backend, vllm, trainer.args.per_device_train_batch_size)
        )
        self.token_budget = budget_of(self.backend, token_budget)
        self.asked = Size(len(rows), samples, max_new_tokens)
        self.size = fit(self.asked, self.token_budget)
        self.rows = rows[: self.size.num_prompts]

    def announce(self) -> None:
        """Say what samples, and what the budget has changed."""
        say = self.trainer.accelerator.print
        say(f"aesl_trl: diversity samples come from {self.backend} ({self._why})")
        if self.size != self.asked:
            say(
                f"aesl_trl: {self.asked} exceed the budget of {self.token_budget} completion tokens a measurement: "
                f"measuring {self.size} (set diversity_token_budget, 0 is no limit)"
            )

    def settings(self) -> dict:
        """What a row says about how it was measured."""
        return {
            "num_prompts": self.size.num_prompts,
            "num_samples": self.size.num_samples,
            "temperature": self.temperature,
            "max_new_tokens": self.size.max_new_tokens,
            "backend": self.backend,
            "seed": self.trainer.args.seed,
            "token_budget": self.token_budget,
            **({"asked": asdict(self.asked)} if self.asked != self.size else {}),
        }

    def refuse_other_series(self, folder: Path, step: int) -> None:
        """A series that is resumed at `step` goes on as it began, or the training does not; on every process alike."""
        path, error = folder / files.DIVERSITY, None
        if self.trainer.args.should_save and step > 0 and path.exists():
            now = {name: value for name, value in self.settings().items() if name in SETTINGS}
            before = [row for row in files.read_jsonl(path) if row["step"] <= step]
            try:
                check_settings([*before, {"step": step, **now}], path)
            except InputError as refused:
                error = refused
        agree(error, self.trainer.accelerator)

    def take(self, step: int, folder: Path) -> tuple[dict | None, list[Group] | None]:
        """The row of `step`, without times, and the samples behind it; the row on the first process alone.

        Without samples the row is a gap: figures of nan, and the reason.
        """
        trainer = self.trainer
        try:
            groups = sample_groups(
                trainer.model_wrapped,
                trainer.processing_class,
                self.rows,
                samples=self.size.num_samples,
                temperature=self.temperature,
                max_new_tokens=self.size.max_new_tokens,
                seed=trainer.args.seed,
                accelerator=trainer.accelerator,
                gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
                engine=self.engine,
            )
        except SamplingFailed as error:
            return self._row(step, {**dict.fromkeys(METRICS, math.nan), "gap": str(error)}), None
        if not trainer.accelerator.is_main_process:
            return None, groups
        if self.reward_funcs:
            groups = score_groups(groups, self.rows, self.reward_funcs, trainer_state=trainer.state)
        base = base_completions(folder, [group.prompt for group in groups]) if step > 0 else None
        return self._row(step, _figures(groups, base)), groups

    def _row(self, step: int, figures: dict) -> dict:
        if "gap" in figures:
            self.trainer.accelerator.print(f"aesl_trl: step {step} is a gap in {files.DIVERSITY}: {figures['gap']}")
        return {"step": step, **self.settings(), "batch_size": self.engine.batch_size, **figures}


def _figures(groups: list[Group], base: list[list[str]] | None) -> dict:
    """Figures of the samples; all nan, a gap in the series, where the model's logits were not finite."""
    sums = prompt_sums(groups, base_completions=base)
    figures = measure(sums)
    broken = sum(
        any(value is not None and not math.isfinite(value) for value in values)
        for group in groups
        for values in zip(group.entropy, group.neg_log_prob, strict=True)
    )
    if broken:
        return {**dict.fromkeys(figures, math.nan), "gap": f"the logits of {broken} samples are not finite"}
    return {
        **figures,
        "entropy_estimator": entropy_estimator(groups),
        "intervals": intervals(sums),
        "by_prompt": by_prompt(sums),
    }


def _vllm_obstacle(trainer, temperature: float) -> str | None:
    """Why vLLM cannot sample from the trainer's model, None where it can."""
    if getattr(trainer.model, "is_loaded_in_8bit", False):
        return "8-bit weights cannot be brought into vLLM"
    if not getattr(trainer.model, "name_or_path", None):
        return "the model has no name or folder that vLLM could load it from"
    if temperature != 1.0 and not hasattr(trainer, "create_token_rule"):
        return f"at temperature {temperature} the entropy needs AESLSFTTrainer's fused head"
    return None


def budget_of(backend: str, token_budget: int | None) -> int | None:
    """The budget in effect: None asks for the backend's default, 0 for no limit (None is returned)."""
    return DEFAULT_BUDGETS[backend] if token_budget is None else token_budget or None


def fit(asked: Size, budget: int | None) -> Size:
    """`asked`, made smaller until it costs at most `budget` completion tokens.

    Prompts go down to 16, then the length to 256 tokens, then samples to 4, each only as far as needed and never below
    its floor or below what is asked for.

    Raises:
        InputError: the floors alone cost more.
    """
    size = asked
    for name, floor in FLOORS.items():
        if budget is None or size.tokens <= budget:
            return size
        value = getattr(size, name)
        fitting = budget * value // size.tokens
        size = replace(size, **{name: max(min(floor, value), fitting)})
    if size.tokens > budget:
        raise InputError(
            f"the token budget is {budget}, but the smallest measurement, {size}, takes {size.tokens}: set "
            f"diversity_token_budget to {size.tokens} or more, or to 0 for no limit"
        )
    return size
