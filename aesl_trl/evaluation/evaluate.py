"""`aesl eval MODEL... --config eval.yaml`: models measured on the same problems -> evaluation.json.

Each model answers every problem `num_samples` times, by vLLM or transformers, and the RL rewards grade the answers.
The same samples give pass@k, avg@k, diversity, and on the benchmarks maj@k. The problems are those of `dataset_name`,
or benchmarks (data/benchmarks.py). Samples are saved as they are drawn (samples.py), so the same command goes on where
a killed one was.

`accelerate launch -m aesl_trl.cli eval` splits the problems over processes. Greedy decoding and top-p are left out:
the samples are of the distribution that GRPO samples from.
"""

import sys
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..arguments import check_replaceable, parse, positionals
from ..data.benchmarks import BENCHMARKS, check_names, load_benchmark
from ..data.checks import check_prompts
from ..data.prompts import prompt_rows
from ..data.rows import load_rows
from ..data.sampled import check_samples_of
from ..diversity.figures import Group
from ..errors import InputError, exit_on_input_error, nearest, tell
from ..files import CHAIN, EVALUATION, EVALUATION_SAMPLES, OWN, RUN, check_unlinked, write_json, wrote
from ..models.chat import template_columns
from ..models.folder import ModelFolder
from ..models.loading import CHECKED_ROWS, check_model, check_tokenizer
from ..processes import lock, next_step
from ..provenance import package_versions
from ..rewards.functions import check_columns, load_reward_funcs
from ..rewards.golds import check_golds
from ..rewards.grading import EXTRACT
from ..sampling.backends import OFFLINE_BACKENDS, choose_engine
from ..sampling.draws import Piece, SamplingSettings
from ..sampling.offline import open_engine
from ..values import option
from .figures import PROMPTS, Task, describe, grade_task, summary_lines
from .samples import SamplesFile, assemble, draw_missing, folder_for, pieces


DTYPES = ("auto", "bfloat16", "float16", "float32")
SAVE_EVERY_VLLM = 2048  # answers: vLLM runs empty at the end of each piece


@dataclass
class EvalArguments:
    """The keys of eval.yaml; the models are usually given as flags."""

    dataset_name: str | None = option(
        None, "Prompts: a hub dataset, a local file or folder, or path/file.py:function."
    )
    dataset_config: str | None = option(None, "Configuration of a hub dataset.")
    dataset_split: str | None = option(None, "Split of `dataset_name`: by default test, or all rows of a local file.")
    benchmarks: list[str] | None = option(None, f"Instead of `dataset_name`: any of {', '.join(BENCHMARKS)}.")
    data_dir: str | None = option(
        None, "Folder with a copy of each benchmark (NAME.jsonl or NAME.parquet), read instead of the hub."
    )
    prompt_template: str | None = option(None, "Replaces the benchmarks' prompt; {problem} stands for the problem.")
    system_prompt: str = option("", "System message before each benchmark problem.")
    prompt_format: str = option(
        "chat",
        "Benchmark problems as chat messages, or as plain text for a model without a chat template.",
        choices=("chat", "text"),
    )
    reward_funcs: list[str] = option(
        ["math_reward"],
        "Rewards as in GRPO's config. A sample is right when the first gives `success_threshold` or more. Benchmarks "
        f"take one of {', '.join(EXTRACT)}.",
    )
    success_threshold: float = option(1.0, "Reward from which a sample counts as right.")
    num_prompts: int | None = option(
        None, "The first prompts of the dataset, or of each benchmark, by default all.", at_least=1
    )
    count_by: str | None = option(
        None,
        "Column of `dataset_name` that says what a problem asks for: each value gets a pass@1 of its own, and those "
        "are counted as solved of whose problems at least half of the samples are right.",
    )
    num_samples: int = option(8, "Answers to each prompt: pass@k goes up to this k.", at_least=1)
    temperature: float = option(1.0, "Sampling temperature; 1 is what GRPO samples at.", above=0)
    max_new_tokens: int = option(512, "Length at which an answer is cut off.", at_least=1)
    batch_size: int = option(64, "Answers generated at once on each process (transformers).", at_least=1)
    save_every: int | None = option(
        None,
        "Answers drawn from one seed and saved together: what a kill can cost. By default one batch, or "
        f"{SAVE_EVERY_VLLM} with vLLM.",
        at_least=1,
    )
    backend: str = option(
        "auto", "What samples: vllm, transformers, or auto, vLLM where it can run.", choices=OFFLINE_BACKENDS
    )
    tensor_parallel_size: int = option(1, "GPUs that share the model (vLLM).", at_least=1)
    gpu_memory_utilization: float = option(0.9, "Share of the GPU's memory for vLLM.", above=0, at_most=1)
    max_model_len: int | None = option(
        None, "Longest prompt and answer together (vLLM), by default the model's own.", at_least=1
    )
    chat_template_kwargs: dict | None = option(
        None, "Keywords for the chat template, as GRPOConfig's, e.g. {enable_thinking: false}."
    )
    seed: int = option(0, "Seed of the samples and of a dataset that a function builds.")
    start: str | None = option(None, "Model or adapter that RL began from.")
    final: str | None = option(None, "Model or adapter that RL ended with.")
    output_dir: str = option(".", "Folder for evaluation.json; a name that ends in .json is the file itself.")
    dtype: str = option(
        "auto",
        "Dtype of the weights while sampling; auto: that of the files, but vLLM rounds float32 to 16 bits.",
        choices=DTYPES,
    )
    use_cpu: bool = option(False, "Stay on the CPU although there is a GPU.")
    trust_remote_code: bool = option(False, "Run model code that lies in the model's repository.")

    def __post_init__(self):
        if self.prompt_template is not None and "{problem}" not in self.prompt_template:
            raise InputError("prompt_template must hold {problem}, where the problem goes")
        if self.benchmarks is not None:
            if self.count_by:
                raise InputError("count_by names a column of dataset_name, and benchmarks bring their own problems")
            if self.dataset_name:
                raise InputError("benchmarks and dataset_name are both given: benchmarks bring their own problems")
            if len(self.reward_funcs) != 1 or self.reward_funcs[0] not in EXTRACT:
                given = ", ".join(self.reward_funcs) or "none"
                raise InputError(f"reward_funcs: benchmarks are graded by one of {', '.join(EXTRACT)}, got {given}")
            check_names(self.benchmarks)
        if self.prompt_format == "text" and self.system_prompt:
            raise InputError("system_prompt has no place in prompt_format: text; put it into prompt_template")
        for name in ("data_dir", "prompt_template", "system_prompt"):
            if getattr(self, name) and not self.benchmarks:
                raise InputError(f"{name} is for benchmarks, and none is named: benchmarks: [{', '.join(BENCHMARKS)}]")


ARGUMENT_TYPES = (EvalArguments,)


def main(argv: list[str] | None = None) -> None:
    """Measure the models given as first arguments, `--start` and `--final`, and write evaluation.json."""
    names, flags = positionals(sys.argv[1:] if argv is None else argv)
    (args,) = parse(ARGUMENT_TYPES, flags, prog="aesl eval")
    paths = {name: name for name in names}
    paths |= {name: getattr(args, name) for name in ("start", "final") if getattr(args, name)}
    if not paths:
        raise InputError("which model? aesl eval MODEL --config eval.yaml, or --start A --final B")
    target = Path(args.output_dir)
    target = target if target.suffix == ".json" else target / EVALUATION
    is_ours = wrote(target, "models", "success_threshold", torn=target.name == EVALUATION)
    check_replaceable("output_dir", target, is_ours, is_file=True)
    samples = check_unlinked(target.parent / EVALUATION_SAMPLES, target.parent)
    tasks = load_tasks(args)
    models = {}
    for name, path in paths.items():
        field = "model" if name == path else name
        models[name] = check_model_and_tokenizer(path, field, tasks[0].rows, args.trust_remote_code)
    how = {"setting": "max_new_tokens", "access": {"trust_remote_code": args.trust_remote_code}}
    how |= {"template_defaults": args.chat_template_kwargs}
    for task in tasks:
        where = task.name if task.source else "dataset_name"
        check_golds(task.reward_funcs, task.rows, where=where)
        for model in models.values():
            check_samples_of(model, task.rows, task.reward_funcs, args.max_new_tokens, field=where, **how)
    result = evaluate(models, tasks, args, samples)
    if result is not None:
        write_json(target, result)
        is_run = any((target.parent / name).exists() for name in (CHAIN, RUN, OWN))
        after = next_step(f"aesl report {target.parent}") if is_run else ""
        tell("\n".join([*summary_lines(result), f"figures -> {target}, answers -> {samples}{after}"]))


def check_model_and_tokenizer(path: str, field: str, rows: list[dict], trust_remote_code: bool = False) -> ModelFolder:
    """Find the model `path`, and refuse it if it cannot answer `rows`.

    This comes before the first of several models is at work for hours. `field` is the setting that names the model.
    """
    model, trust = ModelFolder.find(path, field), {"trust_remote_code": trust_remote_code}
    check_model(model.config_at, f"{field}: the base of {path}" if model.is_adapter else field, **trust)
    check_tokenizer(model, rows[:CHECKED_ROWS], field=field, **trust)
    return model


def load_tasks(args: EvalArguments) -> list[Task]:
    """Load the problems and the rewards: one task a benchmark, or one of `dataset_name`."""
    reward_funcs = load_reward_funcs(args.reward_funcs)
    if not args.benchmarks:
        return [Task(PROMPTS, load_prompts(args, reward_funcs), reward_funcs, count_by=args.count_by)]
    which = {"data_dir": args.data_dir, "num": args.num_prompts}
    as_chat = args.prompt_format == "chat"
    form = {"template": args.prompt_template, "system": args.system_prompt, "as_chat": as_chat}
    tasks = []
    for name in args.benchmarks:
        rows, source = load_benchmark(name, **which, **form)
        tasks.append(Task(name, rows, reward_funcs, source))
    return tasks


def load_prompts(args: EvalArguments, reward_funcs: list) -> list[dict]:
    """Load the prompts of `dataset_name` with the columns that the rewards need."""
    if not args.dataset_name:
        raise InputError("dataset_name is missing: the prompts to evaluate on (or name benchmarks)")
    if not reward_funcs:
        raise InputError("reward_funcs is missing: without a reward no answer is right or wrong")
    # A file has one split, which datasets calls train.
    split = args.dataset_split or (None if Path(args.dataset_name).is_file() else "test")
    dataset = load_rows(args.dataset_name, split=split, config=args.dataset_config, seed=args.seed)
    check_prompts(dataset, field="dataset_name")
    rows = prompt_rows(dataset, args.num_prompts)
    check_columns(reward_funcs, rows[0], where="dataset_name", absent=("completion_ids",))
    if args.count_by and args.count_by not in rows[0]:
        raise InputError(f"count_by: dataset_name has no column {args.count_by!r}{nearest(args.count_by, rows[0])}")
    return rows


def evaluate(models: dict[str, ModelFolder], tasks: list[Task], args: EvalArguments, parent: Path) -> dict | None:
    """Return the content of evaluation.json, on processes other than the first None; one model at a time is loaded."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=args.use_cpu)
    is_main, backends = accelerator.is_main_process, {}
    for name, model in models.items():
        backends[name], why = choose_engine(args.backend, accelerator, is_adapter=model.is_adapter)
        if is_main:
            tell(f"{name}: sampled by {backends[name]} ({why})")
    figures = {task.name: {} for task in tasks}
    for name, model in models.items():
        samples = ModelSamples(name, model, backends[name], args, accelerator, parent)
        message = f"another evaluation is drawing samples in {samples.folder}"
        with lock(samples.folder / ".lock", message) if is_main else nullcontext():
            groups = samples.draw(tasks)
            if is_main:
                for task in tasks:
                    tell(f"{name}: {task.name}: grading {len(task.rows) * args.num_samples} answers")
                    graded = grade_task(task, groups[task.name], args.success_threshold, samples.folder)
                    figures[task.name][name] = graded
        accelerator.wait_for_everyone()
    if not is_main:
        return None
    return {**describe(tasks, figures, args), "backends": backends, "num_processes": accelerator.num_processes}


class ModelSamples:
    """A model's samples: those on disk, and the missing ones from an engine that loads when the first is drawn."""

    def __init__(self, name: str, model: ModelFolder, backend: str, args: EvalArguments, accelerator, parent: Path):
        self._name, self._model, self._backend, self._accelerator = name, model, backend, accelerator
        self._engine = None
        self._sampling = SamplingSettings(**{each.name: getattr(args, each.name) for each in fields(SamplingSettings)})
        batch = args.batch_size * accelerator.num_processes
        self._answers = args.save_every or (SAVE_EVERY_VLLM if backend == "vllm" else batch)  # of one piece
        keys = ("temperature", "max_new_tokens", "batch_size", "seed")
        self._settings = {  # all that the samples depend on
            "model": model.identity(),
            "backend": backend,
            "samples": args.num_samples,  # by its old name: the folders of samples drawn before are found by it
            **{key: getattr(args, key) for key in keys},
            **({"chat_template_kwargs": template} if (template := args.chat_template_kwargs) else {}),
            **({"dtype": args.dtype} if args.dtype != "auto" else {}),
            "save_every": self._answers,
            "num_processes": accelerator.num_processes,
            "device": accelerator.device.type,
            "versions": package_versions(),
        }
        self.folder = folder_for(parent, model.weights, self._settings)

    def draw(self, tasks: list[Task]) -> dict[str, list[Group]]:
        """Return the groups of each task on the first process, and no groups on the others."""
        groups = {task.name: self._draw_task(task) for task in tasks}
        if self._engine is not None:
            self._engine.close()
        return groups

    def _draw_task(self, task: Task) -> list[Group]:
        from accelerate.utils import broadcast_object_list

        is_main = self._accelerator.is_main_process
        wanted = pieces(len(task.rows), self._sampling.num_samples, self._answers)
        file = SamplesFile(self.folder, task.name, list(map(_prompt_of, task.rows)), self._settings)
        (found,) = broadcast_object_list([set(file.read(wanted)) if is_main else None])
        if found and is_main:
            tell(f"{self._name}: {task.name}: {len(found)} of {len(wanted)} pieces are drawn already ({file.path})")

        def draw(piece: Piece) -> list[Group]:
            if self._engine is None:
                weights = self._model.weights
                self._engine = open_engine(self._backend, weights, self._sampling, self._accelerator)
            return self._engine.sample(task.rows[piece.first : piece.first + piece.num], piece)

        draw_missing(file, wanted, found, draw, is_main, f"{self._name}: {task.name}")
        return assemble(file.read(wanted), wanted) if is_main else []


def _prompt_of(row: dict) -> Any:
    """Return what the samples of a row depend on: its prompt, and what the row says of its chat template."""
    columns = template_columns(row)
    return [row["prompt"], columns] if columns else row["prompt"]


if __name__ == "__main__":
    exit_on_input_error("aesl eval", main)
