"""Settings of `aesl data`, checked, and how they word a prompt and name a difficulty."""

from dataclasses import dataclass

from ..errors import InputError
from ..sampling.backends import OFFLINE_BACKENDS
from ..values import option
from .problems import Problem


PLACEHOLDER = "{problem}"
DIFFICULTIES = ("hard", "medium", "easy")
PASS_RATE_SOURCES = ("pass_rate_samples", "pass_rate_file", "pass_rate_column")


@dataclass
class DataArguments:
    """The settings in data.yaml."""

    dataset_name: str | None = option(
        None, "OpenR1-Math-46k or GSM8K: a hub dataset, a local file or folder, or path/file.py:function."
    )
    dataset_config: str | None = option(None, "Configuration of a hub dataset (GSM8K: main).")
    dataset_split: str = option("train", "Split of `dataset_name`.")
    output_dir: str | None = option(None, "Folder for the files.")
    overwrite: bool = option(False, "Replace the files of another run in `output_dir`.")
    model_name_or_path: str | None = option(
        None, "Model to train: its tokenizer counts lengths, and pass rates are sampled from it."
    )
    trust_remote_code: bool = option(False, "Run code that lies in the model's repository.")
    seed: int = option(0, "Seed of the order, and of sampled pass rates.")
    num_demonstrations: int = option(3000, "Rows of sft.jsonl; the paper has 3000.", at_least=1)
    subsets: list[int] | None = option(
        None, "More sizes, each in sft_<size>.jsonl; a larger file holds the smaller ones."
    )
    num_rl: int | None = option(None, "Rows of rl.jsonl, by default all that are left.", at_least=1)
    num_held_out: int = option(512, "Rows of held_out.jsonl, which nothing trains on.", at_least=1)
    system_prompt: str | None = option(None, "System prompt of every row, '' for none; by default the data's own.")
    prompt_template: str = option(PLACEHOLDER, f"The user's message; {PLACEHOLDER} stands for the problem.")
    max_prompt_length: int | None = option(
        1024, "Most tokens of a prompt, template included; longer prompts are dropped.", at_least=1
    )
    max_length: int | None = option(
        None, "Most tokens of prompt and demonstration; longer rows are no demonstrations.", at_least=1
    )
    decontaminate: list[str] | None = option(
        None, "Benchmarks whose problems are dropped: names, or local files of problems."
    )
    ngram: int = option(13, "Words in a row that count as the same problem (GPT-3: 13).", at_least=1)
    ngram_share: float = option(
        0.0,
        "Share of the benchmark problem that shared n-grams must exceed; at 0 one n-gram is enough.",
        at_least=0,
        below=1,
    )
    verify: bool = option(True, "Drop solutions that the first reward cannot grade, and demonstrations that it fails.")
    reward_funcs: list[str] = option(
        ["math_reward"], "Rewards as in GRPO's config; the first verifies and decides the pass rate."
    )
    success_threshold: float = option(1.0, "Reward from which an answer counts as right.")
    pass_rate_samples: int = option(
        0, "Answers that the base samples for each demonstration's problem; 0 samples none.", at_least=0
    )
    pass_rate_file: str | None = option(None, "Or a file of known rates: columns pass_rate and id or problem.")
    pass_rate_column: str | None = option(None, "Or a column of `dataset_name`.")
    temperature: float = option(1.0, "Sampling temperature of the pass rates.", above=0)
    max_new_tokens: int = option(4096, "Tokens at which a sampled answer is cut off.", at_least=1)
    batch_size: int = option(64, "Answers generated at once (transformers).", at_least=1)
    backend: str = option(
        "auto",
        "Engine that samples pass rates: vllm, transformers, or auto, which takes vLLM where it can.",
        choices=OFFLINE_BACKENDS,
    )
    use_cpu: bool = option(False, "Sample on the CPU although there is a GPU.")
    difficulty_bounds: list[float] = option(
        [0.25, 0.75], "sft_hard.jsonl has pass rates up to the first, sft_easy.jsonl from the second on."
    )
    difficulty_size: int | None = option(
        None, "Rows of each difficulty, by default all of the largest subset.", at_least=1
    )

    def __post_init__(self):
        if any(size < 1 or self.subsets.count(size) > 1 for size in self.subsets or ()):
            raise InputError(f"subsets must be different positive sizes, got {self.subsets}")
        bounds = self.difficulty_bounds
        if len(bounds) != 2 or not 0 <= bounds[0] < bounds[1] <= 1:
            raise InputError(f"difficulty_bounds must be two rising pass rates in [0, 1], got {bounds}")
        if PLACEHOLDER not in self.prompt_template:
            raise InputError(f"prompt_template must hold {PLACEHOLDER}, where the problem goes")
        sources = [name for name in PASS_RATE_SOURCES if getattr(self, name)]
        if len(sources) > 1:
            raise InputError(f"{' and '.join(sources)} both give pass rates: keep one")
        if self.difficulty_size and not sources:
            raise InputError(f"difficulty_size needs pass rates: set one of {', '.join(PASS_RATE_SOURCES)}")

    @property
    def largest(self) -> int:
        """The size of the largest subset."""
        return max(self.num_demonstrations, *(self.subsets or [0]))

    @property
    def has_pass_rates(self) -> bool:
        return any(getattr(self, name) for name in PASS_RATE_SOURCES)

    def prompt_of(self, problem: Problem) -> list[dict]:
        """Return the messages of a row's prompt, to which the model's chat template is applied."""
        system = problem.system if self.system_prompt is None else self.system_prompt
        user = {"role": "user", "content": self.prompt_template.replace(PLACEHOLDER, problem.text)}
        return ([{"role": "system", "content": system}] if system else []) + [user]

    def difficulty_of(self, pass_rate: float | None) -> str:
        if pass_rate is None:
            return "unknown"
        hard, easy = self.difficulty_bounds
        return "hard" if pass_rate <= hard else "easy" if pass_rate >= easy else "medium"
