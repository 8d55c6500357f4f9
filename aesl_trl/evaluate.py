"""`aesl eval --config eval.yaml --start A --final B`: models measured on the same prompts -> evaluation.json.

Each model answers every prompt `samples` times; the answers are graded by the RL rewards, and pass@k and diversity
come from the same samples. Intervals resample problems, not samples. `accelerate launch -m aesl_trl.evaluate` splits
the prompts over processes.
"""

import gc
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .arguments import check_folder, parse
from .data import check_prompts, load_rows, prompt_rows
from .diversity import Group, measure
from .errors import InputError, exit_on_input_error
from .files import EVALUATION, package_versions, write_json
from .handoff_source import ADAPTER_CONFIG, TOKENIZER_CONFIG
from .loading import base_of, check_model, check_tokenizer, load_model, put_adapter
from .passk import bootstrap_interval, pass_at_k, powers_of_two
from .rewards import check_columns, load_reward_funcs, score_groups
from .sampling import sample_groups


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
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Rewards as in GRPO's config. A sample is right when the first gives `success_threshold` or more."
        },
    )
    success_threshold: float = field(default=1.0, metadata={"help": "Reward from which a sample counts as right."})
    num_prompts: int | None = field(
        default=None, metadata={"help": "The first prompts of the dataset, by default all."}
    )
    samples: int = field(default=8, metadata={"help": "Answers to each prompt: pass@k goes up to this k."})
    temperature: float = field(
        default=1.0, metadata={"help": "Sampling temperature, positive; 1 is what GRPO samples at."}
    )
    max_new_tokens: int = field(default=512, metadata={"help": "Length at which an answer is cut off."})
    batch_size: int = field(default=64, metadata={"help": "Answers generated at once on each process."})
    seed: int = field(default=0, metadata={"help": "Seed of the samples and of a dataset that a function builds."})
    start: str | None = field(default=None, metadata={"help": "Model or adapter that RL began from."})
    final: str | None = field(default=None, metadata={"help": "Model or adapter that RL ended with."})
    output: str = field(default=EVALUATION, metadata={"help": "File to write, or the folder for evaluation.json."})
    use_cpu: bool = field(default=False, metadata={"help": "Stay on the CPU although there is a GPU."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run model code that lies in the model's repository."}
    )

    def __post_init__(self):
        for name in ("samples", "max_new_tokens", "batch_size", "num_prompts", "temperature"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{name} must be positive, got {value}")


ARGUMENT_TYPES = (EvalArguments,)


def main(argv: list[str] | None = None) -> None:
    """Measure the models given as first arguments, `--start` and `--final`, and write evaluation.json.

    Raises:
        InputError: no model, an output that cannot be written, or prompts, rewards or models that cannot be used;
            before any model loads.
    """
    names, flags = leading_names(sys.argv[1:] if argv is None else argv)
    (args,) = parse(ARGUMENT_TYPES, flags, prog="aesl eval")
    models = {name: name for name in names}
    models |= {name: getattr(args, name) for name in ("start", "final") if getattr(args, name)}
    if not models:
        raise InputError("which model? aesl eval MODEL --config eval.yaml, or --start A --final B")
    target = Path(args.output) if Path(args.output).suffix == ".json" else Path(args.output) / EVALUATION
    check_folder("output", target.parent)
    reward_funcs = load_reward_funcs(args.reward_funcs)
    rows = load_prompts(args, reward_funcs)
    for name, path in models.items():
        check_start(name, path, rows, args.trust_remote_code)
    result = evaluate(models, rows, reward_funcs, args)
    if result is not None:
        write_json(target, result)
        print("\n".join(summary(name, figures) for name, figures in result["models"].items()))


def leading_names(argv: list[str]) -> tuple[list[str], list[str]]:
    """The arguments before the first flag, and the rest."""
    count = next((index for index, argument in enumerate(argv) if argument.startswith("-")), len(argv))
    return list(argv[:count]), list(argv[count:])


def check_start(name: str, path: str, rows: list[dict], trust_remote_code: bool = False) -> None:
    """Refuse what cannot answer the prompts, before the first of several models is at work for hours."""
    folder, name = Path(path), "model" if name == path else name
    model, tokenizer = path, path
    if (folder / ADAPTER_CONFIG).is_file():
        model = base_of(path, name)
        tokenizer = path if (folder / TOKENIZER_CONFIG).is_file() else model
    field = name if model == path else f"{name}: the base of {path}"
    check_model(model, field, trust_remote_code=trust_remote_code)
    check_tokenizer(tokenizer, model, rows[:8], field=name, trust_remote_code=trust_remote_code)


def load_prompts(args: EvalArguments, reward_funcs: list) -> list[dict]:
    if not args.dataset_name:
        raise InputError("dataset_name is missing: the prompts to evaluate on")
    if not reward_funcs:
        raise InputError("reward_funcs is missing: without a reward no answer is right or wrong")
    # A file has one split, which datasets calls train.
    split = args.dataset_split or (None if Path(args.dataset_name).is_file() else "test")
    dataset = load_rows(args.dataset_name, split=split, config=args.dataset_config, seed=args.seed)
    check_prompts(dataset, field="dataset_name")
    rows = prompt_rows(dataset, args.num_prompts)
    check_columns(reward_funcs, rows[0], where="dataset_name", absent=("completion_ids",))
    return rows


def evaluate(models: dict[str, str], rows: list[dict], reward_funcs: list, args: EvalArguments) -> dict | None:
    """What evaluation.json holds; None on processes other than the first. One model is in memory at a time."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=args.use_cpu)
    figures = {}
    for name, path in models.items():
        groups = answer(path, rows, args, accelerator)
        if accelerator.is_main_process:
            groups = score_groups(groups, rows, reward_funcs)
            figures[name] = with_intervals(groups, args.success_threshold)
        accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return None
    return {
        "models": figures,
        "num_prompts": len(rows),
        "num_samples": args.samples,
        **{key: getattr(args, key) for key in ("temperature", "max_new_tokens", "seed", "success_threshold")},
        "num_processes": accelerator.num_processes,
        "versions": package_versions(),
    }


def answer(path: str, rows: list[dict], args: EvalArguments, accelerator) -> list[Group]:
    """Samples of the model or adapter at `path` for each row."""
    model, tokenizer = load(path, str(accelerator.device), trust_remote_code=args.trust_remote_code)
    groups = sample_groups(
        model,
        tokenizer,
        rows,
        samples=args.samples,
        temperature=args.temperature,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        seed=args.seed,
        accelerator=accelerator,
    )
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return groups


def load(path: str, device: str, *, trust_remote_code: bool = False) -> tuple:
    """Model and tokenizer at `path`; an adapter comes on the base that it names, with the files that lie beside it."""
    from transformers import AutoTokenizer, GenerationConfig

    if not (Path(path) / ADAPTER_CONFIG).is_file():
        model = load_model(path, device=device, trust_remote_code=trust_remote_code)
        return model, AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    base = base_of(path, "model")
    model = put_adapter(load_model(base, device=device, trust_remote_code=trust_remote_code), path, base).eval()
    if (Path(path) / "generation_config.json").is_file():
        model.base_model.model.generation_config = GenerationConfig.from_pretrained(path)
    beside = path if (Path(path) / TOKENIZER_CONFIG).is_file() else base
    return model, AutoTokenizer.from_pretrained(beside, trust_remote_code=trust_remote_code)


def with_intervals(groups: list[Group], success_threshold: float) -> dict:
    """The figures of a diversity.jsonl line, and `pass@k_interval`: [low, high], 95 %, over problems."""
    figures = measure(groups, success_threshold=success_threshold)
    firsts = [[sample[0] for sample in group.rewards if sample[0] == sample[0]] for group in groups]  # without nan
    counts = [(len(rewards), sum(reward >= success_threshold for reward in rewards)) for rewards in firsts]
    for k in powers_of_two(max(total for total, _ in counts)):
        values = [pass_at_k(total, right, k) for total, right in counts if total >= k]
        figures[f"pass@{k}_interval"] = list(bootstrap_interval(values))
    return figures


def summary(name: str, figures: dict) -> str:
    parts = [f"{key} {figures[key]:.3f}" for key in ("pass@1", "pass@8", "entropy") if key in figures]
    low, high = figures.get("pass@1_interval", (float("nan"), float("nan")))
    return f"{name}: {', '.join(parts)} (pass@1 between {low:.3f} and {high:.3f})"


if __name__ == "__main__":
    exit_on_input_error("aesl eval", main)
