"""The callbacks. They only wire: sampling, figures, the turning point, candidates and the selection live elsewhere."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from accelerate.utils import broadcast_object_list, is_peft_model
from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_callback import CallbackHandler
from trl import SFTTrainer

from .. import files
from ..data.prompts import prompt_rows
from ..data.rendered import check_rendered
from ..diversity.selection import LEFT_TO, RULES, select_run
from ..diversity.series import NOT_FIGURES, turning_point_of
from ..errors import InputError, tell
from ..models.chat import IMAGES
from ..models.vocabulary import let_head_run
from ..rewards.functions import load_reward_funcs
from ..sampling.backends import VLLMSettings
from ..values import check_bound, check_choice
from .candidates import Candidates
from .hub import check_parts, push_parts
from .measurement import Measurement, MeasurementSettings, summary
from .run_record import forget_after, write_log, write_record
from .session import training_lock
from .tracked import logged_figures, track
from .trained_with import refuse_other_training


FAIR_SHARE = 0.05  # of the time that monitoring may take before a line says how to make it less


class DiversityCallback(TrainerCallback):
    """Measures the diversity of a model's samples during SFT, finds its turning point, keeps and selects candidates.

    Before step 1 and every `steps` steps the model completes a fixed set of held-out prompts. Each measurement adds a
    line to `diversity.jsonl` and a file `samples/step-N.jsonl`. Its figures go through `Trainer.log` as
    `diversity/...`, the entropy as `diversity/own_entropy`; trackers get four summary charts and the samples besides
    (tracked.py). The files lie in the output folder's `_aesl`, which `push_to_hub` leaves out. The training stays
    bit for bit as it would be without measurements. The samples are the model's own: TRL's `entropy` is that of the
    demonstrations under teacher forcing, which can fall while diversity rises.

    Args:
        trainer ([`~trl.SFTTrainer`]): the trainer it is added to; a callback is not given it otherwise.
        prompts (`Dataset` or `list`): held-out prompts, or rows with a `"prompt"` and the columns that the rewards
            need.
        reward_funcs (`list`, *optional*): functions as for GRPOTrainer, or names as in a config, such as
            `"math_reward"`; the first one giving at least 1 makes a sample right.
        steps, num_samples, temperature, max_new_tokens, backend, metric, patience, batch_size, token_budget:
            as the fields `diversity_...` of [`AESLSFTConfig`]; `steps` is at least 1.
        vllm ([`~aesl_trl.sampling.backends.VLLMSettings`], *optional*): its fields `diversity_vllm_...`.
        stop (`bool`): its field `stop_at_turning_point`.
        selection, best_eval_metric, max_candidates: as its fields; without a selection no candidates are kept.
            `aesl select` repeats the rule that is given here.
        hub_include (`list[str]`, *optional*): as its field.
        chat_template_kwargs (`dict`, *optional*): as its field, for the prompts.
        samples (`int`, *optional*): the old name of `num_samples`.

    Raises:
        InputError: a value out of range, no prompts, or a backend that cannot be used here.
    """

    def __init__(
        self,
        trainer: SFTTrainer,
        prompts: Dataset | list,
        *,
        steps: int,
        num_samples: int = 8,
        temperature: float = 1.0,
        max_new_tokens: int = 512,
        reward_funcs: list[str | Callable] | None = None,
        backend: str = "auto",
        metric: str = "entropy",
        patience: int = 3,
        stop: bool = False,
        batch_size: int = 128,
        token_budget: int | None = None,
        vllm: VLLMSettings | None = None,
        selection: str | None = None,
        best_eval_metric: str = "eval_nll",
        max_candidates: int = 5,
        hub_include: Sequence[str] = (),
        chat_template_kwargs: dict | None = None,
        samples: int | None = None,
    ):
        self.settings = MeasurementSettings(
            steps=steps,
            num_samples=num_samples if samples is None else samples,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            backend=backend,
            metric=metric,
            patience=patience,
            batch_size=batch_size,
            token_budget=token_budget,
            vllm=vllm or VLLMSettings(),
        )
        self.settings.check()
        check_bound("steps", steps, whole=True, at_least=1)
        check_choice("selection", selection, (None, *RULES))
        check_parts(hub_include, trainer.args.push_to_hub)
        self.hub_include = hub_include
        self.candidates = Candidates(trainer, metric, best_eval_metric, max_candidates)
        self.trainer, self.stop, self.selection = trainer, stop, selection
        if is_peft_model(trainer.model):
            let_head_run(trainer.model)
        plugin = trainer.accelerator.state.deepspeed_plugin
        zero = {} if plugin is None else plugin.deepspeed_config.get("zero_optimization", {})
        saves_parts = zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save")
        if selection is not None and saves_parts:
            raise InputError(
                "ZeRO-3 would save candidates that nothing can load: set stage3_gather_16bit_weights_on_model_save "
                "(accelerate: zero3_save_16bit_model) to true"
            )
        rows = held_out_rows(prompts)
        if any(row.get(name) is not None for row in rows for name in IMAGES):
            raise InputError("prompts holds images: samples are drawn from text prompts only")
        check_rendered(rows, trainer.processing_class, field="the held-out prompts", defaults=chat_template_kwargs)
        rewards = load_reward_funcs(reward_funcs)
        self.measurement = Measurement(trainer, rows, self.settings, rewards, chat_template_kwargs)
        self.rows = self.measurement.rows  # those that are measured
        self.stopped = False  # at the turning point
        self.seconds = 0.0  # wall time spent measuring
        self._began = time.perf_counter()
        self._measured = 0
        self._held = ExitStack()  # the folder's locks, where the trainer does not take them itself

    @property
    def _folder(self) -> Path:
        return files.own_folder(self.trainer.args.output_dir)

    def measures_at(self, step: int, last_step: int) -> bool:
        """Say whether a measurement is due at the end of `step`."""
        return step % self.settings.steps == 0 or step == last_step

    def on_train_begin(self, args, state, control, **kwargs):
        """Measure the base, or on resume drop the measurements that came after the checkpoint.

        An [`InputError`] refuses a folder in which another training, or a chain, is at work.
        """
        self._began, self.seconds, self._measured = time.perf_counter(), 0.0, 0
        self.measurement.announce()
        self.measurement.refuse_other_series(self._folder, state.global_step)
        if not hasattr(type(self.trainer), "ingredients"):  # AESLSFTTrainer has done both before
            self._held.close()  # of a training that an error ended
            self._held.enter_context(training_lock(args, self.trainer.accelerator))
            if state.global_step > 0:
                refuse_other_training(self.trainer, Path(args.output_dir) / f"checkpoint-{state.global_step}")
        if state.global_step == 0:
            self._measure(state.global_step)  # drops old files once the rewards have proved to work
        elif args.should_save:
            forget_after(args.output_dir, state.global_step)
        if args.should_save:
            write_record(self.trainer, self.rule)

    @property
    def rule(self) -> dict:
        """What a selection goes by, as run.json names it."""
        return {
            "selection": self.selection,
            "diversity_metric": self.settings.metric,
            "diversity_patience": self.settings.patience,
            "best_eval_metric": self.candidates.best_eval_metric,
        }

    def on_push_begin(self, args, state, control, **kwargs):
        """Upload the parts that `hub_include` names."""
        push_parts(self.trainer, self.hub_include)

    def on_step_end(self, args, state, control, **kwargs):
        """Measure where a measurement is due, keep a candidate, and stop at the turning point if asked to."""
        if self.measures_at(state.global_step, state.max_steps):
            rows = self._measure(state.global_step)
            if self.selection is not None:
                self.candidates.keep(state.global_step, rows)
            found = turning_point_of(rows, self.settings.metric, self.settings.patience) if self.stop else None
            if found and found.step is not None:
                if state.is_world_process_zero:
                    tell(f"aesl_trl: diversity turned at step {found.step} ({found.reason}); stopping")
                self.stopped = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        """Log what measuring took, and select a candidate."""
        with self._held:
            self._finish(args)

    def _finish(self, args) -> None:
        trainer = self.trainer
        share = self.seconds / (time.perf_counter() - self._began)
        trainer.log_metrics(
            "diversity", {"diversity_seconds": round(self.seconds, 2), "diversity_time_share": round(share, 4)}
        )
        if self.selection is None or not self.candidates.folder.exists():
            return
        write_log(trainer)  # select_run reads log_history from the file
        if command := LEFT_TO.get(self.selection):  # a process of its own measures, once this one is gone
            if args.should_save:
                folder = args.output_dir
                tell(
                    f"aesl_trl: candidates kept for selection by {self.selection}: "
                    f"{command} {folder} --config FILE, then aesl select {folder} (or aesl chain)"
                )
        elif args.should_save:
            chosen = select_run(
                args.output_dir,
                rule=self.selection,
                metric=self.settings.metric,
                patience=self.settings.patience,
                best_eval_metric=self.candidates.best_eval_metric,
            )
            tell(f"aesl_trl: selected step {chosen['step']} ({chosen['reason']}); weights in {chosen['weights']}")
        trainer.accelerator.wait_for_everyone()

    def _measure(self, step: int) -> list[dict]:
        """Measure, write and log; return the whole series so far, the same on every process."""
        trainer, start = self.trainer, time.perf_counter()
        row, groups = self.measurement.measure_step(step, self._folder)
        series = self._write(row, groups, start) if trainer.accelerator.is_main_process else None
        series = broadcast_object_list([series])[0]
        self.seconds += time.perf_counter() - start
        self._measured += 1
        row = series[-1]
        figures = {name: value for name, value in row.items() if name not in NOT_FIGURES and value is not None}
        should_log = trainer.control.should_log
        with unprinted(trainer.callback_handler):
            # TRL's own log would hand out, and forget, the metrics of the steps since the last log
            Trainer.log(trainer, logged_figures(figures, row.get("intervals") or {}))
        trainer.control.should_log = should_log  # a log clears it, and this step's own is still to come
        if trainer.accelerator.is_main_process:
            track(trainer, row, groups)
            if "gap" not in row:
                tell(f"aesl_trl: {summary(row)}")
        return series

    def _write(self, row: dict, groups: list | None, start: float) -> list[dict]:
        """Write the row and its samples, and return the rows so far; the measurement began at `start`."""
        if row["step"] == 0:
            forget_after(self.trainer.args.output_dir, 0)
        if groups is not None:
            path = self._folder / files.SAMPLES / f"step-{row['step']}.jsonl"
            files.write_jsonl(path, self.measurement.sample_rows(groups))
        now = time.perf_counter()
        row["seconds"] = now - start
        row["time_share"] = (self.seconds + row["seconds"]) / (now - self._began)
        if self._measured == 2 and row["time_share"] > FAIR_SHARE:
            tell(_cost(row["time_share"], self.settings.steps, self.trainer.state.max_steps))
        files.append_jsonl(self._folder / files.DIVERSITY, row)
        return files.read_jsonl(self._folder / files.DIVERSITY)


def _cost(share: float, steps: int, last_step: int) -> str:
    """Return the line that follows the third measurement; the first measurement stood before any training."""
    needed = math.ceil(steps * share / (1 - share) * (1 - FAIR_SHARE) / FAIR_SHARE)
    remedy = f"diversity_steps {needed} would make it {FAIR_SHARE:.0%}"
    if needed >= last_step:
        remedy = f"in {last_step} steps only a smaller diversity_token_budget makes it less"
    return f"aesl_trl: diversity monitoring takes {share:.0%} of the time so far; {remedy}"


@contextmanager
def unprinted(handler: CallbackHandler) -> Iterator[None]:
    """Keep what is logged inside the block off the terminal: the trackers and the log get it all the same."""
    everyone = handler.callbacks
    handler.callbacks = [each for each in everyone if not isinstance(each, ProgressCallback | PrinterCallback)]
    try:
        yield
    finally:
        handler.callbacks = everyone


def held_out_rows(prompts, num: int | None = None) -> list[dict]:
    """Return the first `num` rows with a `"prompt"`, of a dataset, of rows, or of bare prompts."""
    if isinstance(prompts, list):
        prompts = [row if isinstance(row, dict) else {"prompt": row} for row in prompts]
    return prompt_rows(prompts, num, field="diversity_prompts")


def monitor_of(trainer) -> DiversityCallback | None:
    """Return the trainer's DiversityCallback, whoever added it, and of several the one that selects."""
    found = [each for each in trainer.callback_handler.callbacks if isinstance(each, DiversityCallback)]
    return min(found, key=lambda each: each.selection is None, default=None)


class RunCallback(TrainerCallback):
    """Writes run.json before the first step, and Trainer's log after the last."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if args.include_num_input_tokens_seen == "no":
            self.trainer._total_train_tokens = state.num_input_tokens_seen
        if not args.should_save:
            return
        monitor = monitor_of(self.trainer)
        if state.global_step == 0 and monitor is None:  # a monitor does so at its first measurement
            forget_after(args.output_dir, 0)
        positions = files.own_folder(args.output_dir) / files.POSITIONS
        rows = files.read_jsonl(positions) if positions.exists() and state.global_step > 0 else []
        files.write_jsonl(positions, [row for row in rows if row["step"] <= state.global_step])
        write_record(self.trainer, monitor and monitor.rule)

    def on_step_end(self, args, state, control, **kwargs):
        # TRL's count of tokens would restart on resume; Trainer saves its own, which is unused unless asked for
        if args.include_num_input_tokens_seen == "no":
            state.num_input_tokens_seen = int(self.trainer._total_train_tokens)

    def on_push_begin(self, args, state, control, **kwargs):
        push_parts(self.trainer, args.hub_include)

    def on_train_end(self, args, state, control, **kwargs):
        write_log(self.trainer)
