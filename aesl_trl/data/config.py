"""Settings of `aesl data`, checked; what they do is prepare.py."""

from dataclasses import dataclass, field

from ..errors import InputError
from ..sampling.backends import OFFLINE_BACKENDS
from .problems import Problem


PLACEHOLDER = "{problem}"
DIFFICULTIES = ("hard", "medium", "easy")
PASS_RATE_SOURCES = ("pass_rate_samples", "pass_rate_file", "pass_rate_column")
POSITIVE = (
    *("num_demonstrations", "num_held_out", "num_rl", "max_prompt_length", "max_length", "ngram"),
    *("temperature", "max_new_tokens", "batch_size", "difficulty_size"),
)


@dataclass
class DataArguments:
    """What data.yaml holds."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "OpenR1-Math-46k or GSM8K: a hub dataset, a local file or folder, or path/file.py:function."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a hub dataset (GSM8K: main)."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of `dataset_name`."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder for the files."})
    overwrite: bool = field(default=False, metadata={"help": "Replace what another run has left in `output_dir`."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model that is trained: its tokenizer counts lengths, it is the base."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that lies in the model's repository."})
    seed: int = field(default=0, metadata={"help": "Seed of the order, and of sampled pass rates."})
    num_demonstrations: int = field(default=3000, metadata={"help": "Rows of sft.jsonl; 3000 is the paper's."})
    subsets: list[int] | None = field(
        default=None, metadata={"help": "Further sizes, each in sft_<size>.jsonl, the larger holding the smaller."}
    )
    num_rl: int | None = field(default=None, metadata={"help": "Rows of rl.jsonl, by default all that are left."})
    num_held_out: int = field(default=512, metadata={"help": "Rows of held_out.jsonl, trained on by nothing."})
    system_prompt: str | None = field(
        default=None, metadata={"help": "System prompt of every row, '' for none; by default that of the data."}
    )
    prompt_template: str = field(
        default=PLACEHOLDER, metadata={"help": f"The user's message; {PLACEHOLDER} stands for the problem."}
    )
    max_prompt_length: int | None = field(
        default=1024, metadata={"help": "Tokens of a prompt, template included; longer ones are dropped."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Tokens of prompt and demonstration; longer ones are no demonstrations."}
    )
    decontaminate: list[str] | None = field(
        default=None, metadata={"help": "Benchmarks whose problems are dropped: names, or local files of problems."}
    )
    ngram: int = field(default=13, metadata={"help": "Words in a row that count as the same problem (GPT-3: 13)."})
    ngram_share: float = field(
        default=0.0,
        metadata={"help": "Share of the benchmark problem that shared n-grams must exceed; 0: one is enough."},
    )
    verify: bool = field(
        default=True,
        metadata={"help": "Drop solutions that the first reward cannot grade, and demonstrations that it fails."},
    )
    reward_funcs: list[str] = field(
        default_factory=lambda: ["accuracy_reward"],
        metadata={"help": "Rewards as in GRPO's config; the first verifies and decides the pass rate."},
    )
    success_threshold: float = field(default=1.0, metadata={"help": "Reward from which an answer counts as right."})
    pass_rate_samples: int = field(
        default=0, metadata={"help": "Answers that the base samples for each demonstration's problem; 0: none."}
    )
    pass_rate_file: str | None = field(
        default=None, metadata={"help": "Or a file of known rates: columns pass_rate and id or problem."}
    )
    pass_rate_column: str | None = field(default=None, metadata={"help": "Or a column of `dataset_name`."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature of the pass rates."})
    max_new_tokens: int = field(default=4096, metadata={"help": "Length at which a sampled answer is cut off."})
    batch_size: int = field(default=64, metadata={"help": "Answers generated at once (transformers)."})
    backend: str = field(
        default="auto",
        metadata={
            "help": "What samples pass rates: vllm, transformers, or auto, vLLM where it can.",
            "choices": OFFLINE_BACKENDS,
        },
    )
    use_cpu: bool = field(default=False, metadata={"help": "Sample on the CPU although there is a GPU."})
    difficulty_bounds: list[float] = field(
        default_factory=lambda: [0.25, 0.75],
        metadata={"help": "sft_hard.jsonl: pass rate up to the first; sft_easy.jsonl: from the second on."},
    )
    difficulty_size: int | None = field(
        default=None, metadata={"help": "Rows of each difficulty, by default all of the largest subset."}
    )

    def __post_init__(self):
        _check_numbers(self)
        if PLACEHOLDER not in self.prompt_template:
            raise InputError(f"prompt_template must hold {PLACEHOLDER}, where the problem goes")
        sources = [name for name in PASS_RATE_SOURCES if getattr(self, name)]
        if len(sources) > 1:
            raise InputError(f"{' and '.join(sources)} both give pass rates: keep one")
        if self.difficulty_size and not sources:
            raise InputError(f"difficulty_size needs pass rates: set one of {', '.join(PASS_RATE_SOURCES)}")

    @property
    def largest(self) -> int:
        return max(self.num_demonstrations, *(self.subsets or [0]))

    @property
    def has_pass_rates(self) -> bool:
        return any(getattr(self, name) for name in PASS_RATE_SOURCES)


def _check_numbers(args: DataArguments) -> None:
    for name in POSITIVE:
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise InputError(f"{name} must be positive, got {value}")
    if args.pass_rate_samples < 0:
        raise InputError(f"pass_rate_samples must be 0 (none) or more, got {args.pass_rate_samples}")
    for size in args.subsets or ():
        if size < 1 or args.subsets.count(size) > 1:
            raise InputError(f"subsets must be different positive sizes, got {args.subsets}")
    if not 0 <= args.ngram_share < 1:
        raise InputError(f"ngram_share must be in [0, 1), got {args.ngram_share}")
    bounds = args.difficulty_bounds
    if len(bounds) != 2 or not 0 <= bounds[0] < bounds[1] <= 1:
        raise InputError(f"difficulty_bounds must be two rising pass rates in [0, 1], got {bounds}")


def prompt_of(problem: Problem, args: DataArguments) -> list[dict]:
    """The messages of a row: what the chat template of the model is applied to."""
    system = problem.system if args.system_prompt is None else args.system_prompt
    user = {"role": "user", "content": args.prompt_template.replace(PLACEHOLDER, problem.text)}
    return ([{"role": "system", "content": system}] if system else []) + [user]


def difficulty_of(pass_rate: float | None, bounds: list[float]) -> str:
    if pass_rate is None:
        return "unknown"
    return "hard" if pass_rate <= bounds[0] else "easy" if pass_rate >= bounds[1] else "medium"
