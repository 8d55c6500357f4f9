"""Measures a model under training: settings, size and engine are decided once, samples and a row come each time."""

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from accelerate.utils import is_peft_model
from tqdm.auto import tqdm

from .. import files
from ..diversity.coverage import coverage_sums
from ..diversity.figures import Group, by_prompt, entropy_estimator, intervals, measure, prompt_sums
from ..diversity.intervals import with_interval
from ..diversity.selection import METRICS
from ..diversity.series import base_groups, check_prompts, check_settings, prompts_digest
from ..errors import InputError, tell
from ..losses.scoring import has_fused_head
from ..models.chat import template_columns
from ..models.positions import check_prompt_tokens, check_room, num_positions
from ..models.tokens import row_prompt_ids
from ..progress import bar
from ..rewards.functions import score_groups
from ..sampling.backends import TRAINING_BACKENDS, VLLMSettings, choose_backend
from ..sampling.draws import PROMPT_TOKENS, SamplingFailed, SamplingSettings, failure_on_any_rank
from ..sampling.generate import GenerateEngine
from ..sampling.groups import sample_groups
from ..sampling.vllm_synced import SyncedVLLM
from ..values import check_bounds


# Completion tokens a measurement. For transformers' generate: 16 prompts x 8 samples x 256 tokens; vLLM decodes 4
# times as many tokens in the same time
DEFAULT_BUDGETS = {"generate": 32_768, "vllm_colocate": 131_072, "vllm_server": 131_072}

# Sizes that give way, in this order, and their floors. Prompts come first: their number alone does not change what a
# figure means. Below 256 tokens most answers are cut off; below 4 samples there is no pass@4 and self-BLEU is noise
FLOORS = {"num_prompts": 16, "max_new_tokens": 256, "num_samples": 4}


@dataclass(frozen=True)
class MeasurementSettings:
    """How diversity is measured and its turning point sought: AESLSFTConfig's fields `diversity_...`, checked once."""

    steps: int = field(metadata={"at_least": 0})
    num_samples: int = field(metadata={"at_least": 2})
    temperature: float = field(metadata={"above": 0})
    max_new_tokens: int = field(metadata={"at_least": 1})
    backend: str = field(metadata={"choices": TRAINING_BACKENDS})
    metric: str = field(metadata={"choices": tuple(METRICS)})
    patience: int = field(metadata={"at_least": 1})
    batch_size: int = field(metadata={"at_least": 1})
    token_budget: int | None = field(metadata={"at_least": 0})
    vllm: VLLMSettings

    def check(self, prefix: str = "") -> None:
        """Refuse a value out of range; `prefix` opens the settings' names."""
        check_bounds(self, prefix)
        check_bounds(self.vllm, f"{prefix}vllm_")

    def size(self, num_prompts: int) -> "Size":
        """Return the size of a measurement of `num_prompts`, as asked for."""
        return Size(num_prompts, self.num_samples, self.max_new_tokens)


@dataclass(frozen=True)
class Size:
    """The size of a measurement."""

    num_prompts: int
    num_samples: int
    max_new_tokens: int

    @property
    def tokens(self) -> int:
        """Completion tokens that a measurement can cost."""
        return self.num_prompts * self.num_samples * self.max_new_tokens

    def __str__(self) -> str:
        return f"{self.num_prompts} prompts x {self.num_samples} samples x {self.max_new_tokens} tokens"


class Measurement:
    """Measures on the same prompts each time: the first of `rows`, as far as the budget allows.

    A backend that cannot be used here, and a budget below the smallest measurement, are refused.
    """

    def __init__(self, trainer, rows: list[dict], settings: MeasurementSettings, reward_funcs: list, template=None):
        self.trainer = trainer
        self.reward_funcs = reward_funcs
        obstacle = _vllm_obstacle(trainer.model, settings.temperature)
        self.backend, self._why = choose_backend(settings.backend, settings.vllm, obstacle)
        self.token_budget = budget_of(self.backend, settings.token_budget)
        if self.backend == "generate":
            prompt_tokens = max(self.token_budget or PROMPT_TOKENS, DEFAULT_BUDGETS["generate"])
            self.engine = GenerateEngine(settings.batch_size, prompt_tokens)
        else:
            self.engine = SyncedVLLM(self.backend, settings.vllm, trainer.args.per_device_train_batch_size)
        self.asked = settings.size(len(rows))
        self.size = size = fit(self.asked, self.token_budget)
        self.rows = rows[: size.num_prompts]
        prompts = [row_prompt_ids(trainer.processing_class, row, template) for row in self.rows]
        check_prompt_tokens(prompts, PROMPT_TOKENS, field="diversity_prompts")
        if (positions := num_positions(trainer.model)) is not None:
            where = {"field": "diversity_prompts", "setting": "max_new_tokens"}
            check_room(positions, prompts, settings.max_new_tokens, **where)
        seed = trainer.args.seed
        how = {"seed": seed, "chat_template_kwargs": template}
        self.sampling = SamplingSettings(size.num_samples, settings.temperature, size.max_new_tokens, **how)

    def announce(self) -> None:
        """Say which engine samples, and what the budget has changed."""
        if not self.trainer.accelerator.is_main_process:
            return
        tell(f"aesl_trl: diversity samples come from {self.backend} ({self._why})")
        if self.size != self.asked:
            tell(
                f"aesl_trl: {self.asked} exceed the budget of {self.token_budget} completion tokens a measurement: "
                f"measuring {self.size} (set diversity_token_budget, 0 is no limit)"
            )

    def recorded_settings(self) -> dict:
        """Return what a row says about how it was measured."""
        return {
            "num_prompts": self.size.num_prompts,
            "num_samples": self.size.num_samples,
            "temperature": self.sampling.temperature,
            "max_new_tokens": self.size.max_new_tokens,
            "backend": self.backend,
            "prompts": prompts_digest(self.rows),
            "seed": self.sampling.seed,
            "token_budget": self.token_budget,
            **({"asked": asdict(self.asked)} if self.asked != self.size else {}),
        }

    def refuse_other_series(self, folder: Path, step: int) -> None:
        """Refuse, on every process, to resume at `step` a series that was measured with other settings."""
        path, error = folder / files.DIVERSITY, None
        if self.trainer.args.should_save and step > 0 and path.exists():
            before = [row for row in files.read_jsonl(path) if row["step"] <= step]
            try:
                now = self.recorded_settings()
                check_settings([*before, {"step": step, **now, "prompts": None}], path)
                check_prompts(folder, step, self.rows)
            except InputError as refused:
                error = refused
        failure_on_any_rank(error, self.trainer.accelerator)

    def sample_rows(self, groups: list[Group]) -> list[dict]:
        """Return the rows of a samples file: each group, and what its prompt said of the chat template."""
        columns = [template_columns(row, self.sampling.chat_template_kwargs) for row in self.rows]
        return [
            {"prompt_index": index, **asdict(group), **own}
            for index, (group, own) in enumerate(zip(groups, columns, strict=True))
        ]

    def measure_step(self, step: int, folder: Path) -> tuple[dict | None, list[Group] | None]:
        """Return the row of `step`, without times, and its samples; the first process alone gets the row.

        When nothing could be drawn the row is a gap: figures of nan and the reason, without samples.
        """
        trainer = self.trainer
        try:
            with self._bar(step) as shown:
                groups = sample_groups(
                    trainer.model_wrapped,
                    trainer.processing_class,
                    self.rows,
                    self.sampling,
                    engine=self.engine,
                    accelerator=trainer.accelerator,
                    gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
                    bar=shown,
                )
        except SamplingFailed as error:
            groups, figures = None, {**dict.fromkeys(METRICS, math.nan), "gap": str(error)}
        else:
            if not trainer.accelerator.is_main_process:
                return None, groups
            if self.reward_funcs:
                groups = score_groups(groups, self.rows, self.reward_funcs, trainer_state=trainer.state)
            base = base_groups(folder, [group.prompt for group in groups]) if step > 0 else None
            figures = _figures(groups, base)
        if "gap" in figures and trainer.accelerator.is_main_process:
            tell(f"aesl_trl: step {step} is a gap in {files.DIVERSITY}: {figures['gap']}")
        row = {"step": step, **self.recorded_settings(), "batch_size": self.engine.batch_size, **figures}
        return row, groups

    def _bar(self, step: int) -> tqdm:
        """Open the bar over the first process's share of the samples; it vanishes once they are drawn."""
        accelerator = self.trainer.accelerator
        num = -(-self.size.num_prompts // accelerator.num_processes) * self.size.num_samples
        shown = accelerator.is_main_process and not self.trainer.args.disable_tqdm
        return bar(num, f"step {step}: own samples", shown=shown, leave=False)


def summary(row: dict) -> str:
    """Say a row of diversity.jsonl in one short line: its entropy, and what the rewards give, else self-BLEU."""
    others = {"pass@1": "pass@1", "groups_mixed": "mixed groups"} if "pass@1" in row else {"self_bleu": "self-BLEU"}
    parts = [f"entropy {with_interval(row['entropy'], row['intervals'].get('entropy'))}"]
    parts += [f"{name} {with_interval(row.get(key), None)}" for key, name in others.items()]
    return f"step {row['step']}: {', '.join(parts)}"


def _figures(groups: list[Group], base: list[Group] | None) -> dict:
    """Return the figures of the samples; all are nan, a gap, where the model's logits were not finite."""
    sums = prompt_sums(groups, base_completions=base and [group.completions for group in base])
    if base:
        sums |= coverage_sums(base, groups)
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


def _vllm_obstacle(model, temperature: float) -> str | None:
    """Return why vLLM cannot sample from the model; None where it can."""
    if getattr(model, "is_loaded_in_8bit", False):
        return "8-bit weights cannot be brought into vLLM"
    if not getattr(model, "name_or_path", None):
        return "the model has no name or folder that vLLM could load it from"
    if temperature != 1.0 and not has_fused_head(model.get_base_model() if is_peft_model(model) else model):
        return f"at temperature {temperature} the entropy needs AESLSFTTrainer's fused head"
    return None


def budget_of(backend: str, token_budget: int | None) -> int | None:
    """Return the budget in effect: None asks for the backend's default, 0 for no limit, which is None here."""
    return DEFAULT_BUDGETS[backend] if token_budget is None else token_budget or None


def fit(asked: Size, budget: int | None) -> Size:
    """Return `asked`, made smaller until it costs at most `budget` completion tokens.

    The sizes in FLOORS shrink in turn, each as far as needed and not below its floor. If the floors alone cost more,
    the budget is refused.
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
