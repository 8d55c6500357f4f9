"""`aesl eval MODEL... --config eval.yaml`: models measured on the same problems -> evaluation.json.

Each model answers every problem `samples` times, by vLLM or transformers, and the answers are graded by the RL
rewards: pass@k, avg@k, diversity, and on the benchmarks maj@k come from the same samples. Intervals resample problems,
not samples. The problems are those of `dataset_name`, or benchmarks (data/benchmarks.py). Samples are saved as they
are drawn (samples.py): the same command goes on where a killed one was.

`accelerate launch -m aesl_trl.cli eval` splits the problems over processes. Left out: greedy decoding and top-p; the
samples are of the distribution that GRPO samples from.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from ..arguments import check_folder, positionals, parse
from ..data.benchmarks import BENCHMARKS, check_names, load_benchmark
from ..data.checks import check_prompts
from ..data.prompts import prompt_rows
from ..data.rows import load_rows
from ..diversity.figures import Group
from ..errors import InputError, exit_on_input_error
from ..files import EVALUATION, write_json
from ..models.folder import ADAPTER_CONFIG, TOKENIZER_CONFIG, base_of
from ..models.loading import CHECKED_ROWS, check_model, check_tokenizer
from ..processes import lock
from ..provenance import package_versions
from ..rewards.functions import check_columns, load_reward_funcs
from ..sampling.backends import OFFLINE_BACKENDS, choose_engine
from ..sampling.draws import Piece
from ..sampling.offline import open_engine
from .figures import PROMPTS, Task, collected, grade_task, summaries
from .samples import SAMPLES_DIR, SamplesFile, assemble, draw_missing, folder_for, model_identity, pieces


SAVE_EVERY_VLLM = 2048  # answers: vLLM runs empty at the end of each piece


@dataclass
class EvalArguments:
    """What eval.yaml holds; the models are usually given as flags."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Prompts: a hub dataset, a local file or folder, or path/file.py:function."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_split: str | None = field(
        default=None, metadata={"help": "Split of `dataset_name`: by default test, or all rows of a local file."}
    )
    benchmarks: list[str] | None = field(
        default=None, metadata={"help": f"Instead of `dataset_name`: any of {', '.join(BENCHMARKS)}."}
    )
    data_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder with a copy of each benchmark (NAME.jsonl or NAME.parquet), read instead of the hub."
        },
    )
    prompt_template: str | None = field(
        default=None, metadata={"help": "Replaces the benchmarks' prompt; {problem} stands for the problem."}
    )
    system_prompt: str = field(default="", metadata={"help": "System message before each benchmark problem."})
    prompt_format: str = field(
        default="chat",
        metadata={
            "help": "Benchmark problems as chat messages, or as plain text for a model without a chat template.",
            "choices": ("chat", "text"),
        },
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Rewards as in GRPO's config. A sample is right when the first gives `success_threshold` or more. "
            "Benchmarks bring their own."
        },
    )
    success_threshold: float = field(default=1.0, metadata={"help": "Reward from which a sample counts as right."})
    num_prompts: int | None = field(
        default=None, metadata={"help": "The first prompts of the dataset, or of each benchmark, by default all."}
    )
    samples: int = field(default=8, metadata={"help": "Answers to each prompt: pass@k goes up to this k."})
    temperature: float = field(
        default=1.0, metadata={"help": "Sampling temperature, positive; 1 is what GRPO samples at."}
    )
    max_new_tokens: int = field(default=512, metadata={"help": "Length at which an answer is cut off."})
    batch_size: int = field(default=64, metadata={"help": "Answers generated at once on each process (transformers)."})
    save_every: int | None = field(
        default=None,
        metadata={
            "help": "Answers drawn from one seed and saved together: what a kill can cost. By default one batch, or "
            f"{SAVE_EVERY_VLLM} with vLLM."
        },
    )
    backend: str = field(
        default="auto",
        metadata={
            "help": "What samples: vllm, transformers, or auto, vLLM where it can run.",
            "choices": OFFLINE_BACKENDS,
        },
    )
    tensor_parallel_size: int = field(default=1, metadata={"help": "GPUs that share the model (vLLM)."})
    gpu_memory_utilization: float = field(default=0.9, metadata={"help": "Share of the GPU's memory for vLLM."})
    max_model_len: int | None = field(
        default=None, metadata={"help": "Longest prompt and answer together (vLLM), by default the model's own."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the samples and of a dataset that a function builds."})
    start: str | None = field(default=None, metadata={"help": "Model or adapter that RL began from."})
    final: str | None = field(default=None, metadata={"help": "Model or adapter that RL ended with."})
    output: str = field(default=EVALUATION, metadata={"help": "File to write, or the folder for evaluation.json."})
    use_cpu: bool = field(default=False, metadata={"help": "Stay on the CPU although there is a GPU."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run model code that lies in the model's repository."}
    )

    def __post_init__(self):
        counts = ("samples", "max_new_tokens", "batch_size", "save_every", "num_prompts", "tensor_parallel_size")
        for name in (*counts, "temperature", "max_model_len"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{name} must be positive, got {value}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise InputError(f"gpu_memory_utilization must lie in (0, 1], got {self.gpu_memory_utilization}")
        if self.prompt_template is not None and "{problem}" not in self.prompt_template:
            raise InputError("prompt_template must hold {problem}, where the problem goes")
        self._check_source()

    def _check_source(self):
        if self.benchmarks is not None:
            for name in ("dataset_name", "reward_funcs"):
                if getattr(self, name):
                    raise InputError(
                        f"benchmarks and {name} are both given: benchmarks bring their own problems and reward"
                    )
            check_names(self.benchmarks)
        if self.prompt_format == "text" and self.system_prompt:
            raise InputError("system_prompt has no place in prompt_format: text; put it into prompt_template")
        for name in ("data_dir", "prompt_template", "system_prompt"):
            if getattr(self, name) and not self.benchmarks:
                raise InputError(f"{name} is of benchmarks, and none is named: benchmarks: [{', '.join(BENCHMARKS)}]")


ARGUMENT_TYPES = (EvalArguments,)


def main(argv: list[str] | None = None) -> None:
    """Measure the models given as first arguments, `--start` and `--final`, and write evaluation.json.

    Raises:
        InputError: no model, an output that cannot be written, or problems, rewards or models that cannot be used;
            before any model loads.
    """
    names, flags = positionals(sys.argv[1:] if argv is None else argv)
    (args,) = parse(ARGUMENT_TYPES, flags, prog="aesl eval")
    models = {name: name for name in names}
    models |= {name: getattr(args, name) for name in ("start", "final") if getattr(args, name)}
    if not models:
        raise InputError("which model? aesl eval MODEL --config eval.yaml, or --start A --final B")
    target = Path(args.output) if Path(args.output).suffix == ".json" else Path(args.output) / EVALUATION
    check_folder("output", target.parent)
    tasks = load_tasks(args)
    for name, path in models.items():
        check_start(name, path, tasks[0].rows, args.trust_remote_code)
    result = evaluate(models, tasks, args, target.parent / SAMPLES_DIR)
    if result is not None:
        write_json(target, result)
        print("\n".join(summaries(result)))


def check_start(name: str, path: str, rows: list[dict], trust_remote_code: bool = False) -> None:
    """Refuse what cannot answer the prompts, before the first of several models is at work for hours."""
    folder, name = Path(path), "model" if name == path else name
    model, tokenizer = path, path
    if (folder / ADAPTER_CONFIG).is_file():
        model = base_of(path, name)
        tokenizer = path if (folder / TOKENIZER_CONFIG).is_file() else model
    field = name if model == path else f"{name}: the base of {path}"
    check_model(model, field, trust_remote_code=trust_remote_code)
    check_tokenizer(tokenizer, model, rows[:CHECKED_ROWS], field=name, trust_remote_code=trust_remote_code)


# ---- Problems


def load_tasks(args: EvalArguments) -> list[Task]:
    if not args.benchmarks:
        reward_funcs = load_reward_funcs(args.reward_funcs)
        return [Task(PROMPTS, load_prompts(args, reward_funcs), reward_funcs)]
    tasks = []
    for name in args.benchmarks:
        rows, source = load_benchmark(
            name,
            data_dir=args.data_dir,
            num=args.num_prompts,
            template=args.prompt_template,
            system=args.system_prompt,
            as_chat=args.prompt_format == "chat",
        )
        tasks.append(Task(name, rows, load_reward_funcs([BENCHMARKS[name].metric]), source))
    return tasks


def load_prompts(args: EvalArguments, reward_funcs: list) -> list[dict]:
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
    return rows


# ---- Sampling


def evaluate(models: dict[str, str], tasks: list[Task], args: EvalArguments, parent: Path) -> dict | None:
    """What evaluation.json holds; None on processes other than the first. One model is in memory at a time."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=args.use_cpu)
    chosen = {name: _backend(name, path, args, accelerator) for name, path in models.items()}
    figures = {task.name: {} for task in tasks}
    for name, path in models.items():
        sampling = Sampling(name, path, chosen[name], args, accelerator, parent)
        with sampling.locked():
            groups = sampling.draw(tasks)
            if accelerator.is_main_process:
                for task in tasks:
                    figures[task.name][name] = grade_task(
                        task, groups[task.name], args.success_threshold, sampling.folder
                    )
        accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return None
    return {**collected(tasks, figures, args), "backends": chosen, "num_processes": accelerator.num_processes}


def _backend(name: str, path: str, args: EvalArguments, accelerator) -> str:
    backend, why = choose_engine(args.backend, accelerator, is_adapter=(Path(path) / ADAPTER_CONFIG).is_file())
    if accelerator.is_main_process:
        print(f"{name}: sampled by {backend} ({why})")
    return backend


class Sampling:
    """A model's samples: those that are on disk, the others from an engine, which loads when one is missing."""

    def __init__(self, name: str, path: str, backend: str, args: EvalArguments, accelerator, parent: Path):
        self._path, self._backend, self._args, self._accelerator = path, backend, args, accelerator
        keys = ("samples", "temperature", "max_new_tokens", "batch_size", "seed")
        base = base_of(path, name) if (Path(path) / ADAPTER_CONFIG).is_file() else None
        self._settings = {
            "model": model_identity(path, base),
            "backend": backend,
            **{key: getattr(args, key) for key in keys},
            "save_every": self._answers,
            "num_processes": accelerator.num_processes,
            "device": accelerator.device.type,
            "versions": package_versions(),
        }
        self._engine, self._name = None, name
        self.folder = folder_for(parent, path, self._settings)

    @property
    def _answers(self) -> int:
        """Answers to a piece."""
        batch = self._args.batch_size * self._accelerator.num_processes
        return self._args.save_every or (SAVE_EVERY_VLLM if self._backend == "vllm" else batch)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps a second evaluation, on the first process, out of the same samples."""
        message = f"another evaluation is drawing samples in {self.folder}"
        held = lock(self.folder / ".lock", message) if self._accelerator.is_main_process else nullcontext()
        with held:
            yield

    def draw(self, tasks: list[Task]) -> dict[str, list[Group]]:
        """The groups of each task, on the first process; empty on the others."""
        groups = {task.name: self._draw_task(task) for task in tasks}
        if self._engine is not None:
            self._engine.close()
        return groups

    def _draw_task(self, task: Task) -> list[Group]:
        is_main = self._accelerator.is_main_process
        wanted = pieces(len(task.rows), self._args.samples, self._answers)
        file = SamplesFile(self.folder, task.name, [row["prompt"] for row in task.rows], self._settings)
        found = self._shared(set(file.read(wanted)) if is_main else None)
        if found and is_main:
            print(f"{self._name}: {task.name}: {len(found)} of {len(wanted)} pieces are drawn already ({file.path})")
        draw_missing(file, wanted, found, lambda piece: self._draw_piece(task, piece), is_main)
        return assemble(file.read(wanted), wanted) if is_main else []

    def _draw_piece(self, task: Task, piece: Piece) -> list[Group]:
        if self._engine is None:
            self._engine = open_engine(self._backend, self._path, self._args, self._accelerator)
        return self._engine.draw(task.rows[piece.first : piece.first + piece.num], piece)

    def _shared(self, found: set[Piece] | None) -> set[Piece]:
        """What the first process found, on every process."""
        if self._accelerator.num_processes == 1:
            return found
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([found])[0]


if __name__ == "__main__":
    exit_on_input_error("aesl eval", main)
