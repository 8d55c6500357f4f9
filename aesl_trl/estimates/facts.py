"""Read what a recipe's files say: kinds of files, first lines, launches, the model's public numbers.

A recipe is a folder with `sft/`, `grpo/`, `chain*.yaml`, `eval*.yaml`, `probe*.yaml`, `data*.yaml` and
`model_config.json`. The latter holds facts about the architecture and the tokenizer of the model, copied from its
public files, so that a recipe can be checked where the hub cannot be reached. The first line of a config is a comment
that names its hardware in a fixed form (see [`Hardware`]). `prepared` in model_config.json maps each folder of weights
that the recipe's own scripts write, and that is not committed, to the command that does.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..arguments import MODEL_CONFIG, parse, prepared_models
from ..errors import InputError, in_one_line
from ..files import read_json
from ..values import load_yaml
from .memory import Shape


ACCELERATE_CONFIGS = "accelerate_configs"
KINDS = ("chain", "compare", "eval", "probe", "data")  # by the start of the name; sft and grpo by their folder
SHARDING = {"FSDP": "fsdp", ("DEEPSPEED", 2): "zero2", ("DEEPSPEED", 3): "zero3"}


def kind_of(path: Path) -> str | None:
    """Return `sft`, `grpo`, `accelerate`, or one of KINDS; None for a YAML file of another name."""
    folder = {"sft": "sft", "grpo": "grpo", ACCELERATE_CONFIGS: "accelerate"}.get(path.absolute().parent.name)
    return folder or next((kind for kind in KINDS if path.name.startswith(kind)), None)


def first_comment(path: Path) -> str:
    """Return the first line without its mark if it is a comment, else an empty string."""
    with open(path, encoding="utf-8") as file:
        line = file.readline().strip()
    return line.lstrip("# ") if line.startswith("#") else ""


@dataclass(frozen=True)
class Hardware:
    """The parts of a first line: `# 8 x 80 GB, 4 of them for vLLM, fsdp2.yaml, global batch 64 = 8 prompts x 8: ...`.

    A recipe for the CPU has 0 `gpus`. `launch` names a file of accelerate_configs/; None means a single process.
    """

    gpus: int
    gpu_gb: float
    vllm_gpus: int = 0
    launch: str | None = None
    global_batch: int | None = None
    prompts: int | None = None
    generations: int | None = None


def hardware_of(path: Path) -> Hardware:
    """Read the hardware that the first line names; refuse a line without one."""
    line = first_comment(path)
    found = re.search(r"(\d+) x (\d+) GB", line)
    if found is None and re.search(r"CPU cores?\b", line) is None:
        raise InputError(
            f"{path}: the first line names no hardware: begin with '# 1 x 24 GB: ...' or '# One CPU core'"
        )
    vllm = re.search(r"(\d+) of them for vLLM", line)
    launch = re.search(r"\b([\w-]+\.yaml)", line)
    batch = re.search(r"global batch (\d+)(?: = (\d+) prompts x (\d+))?", line)
    total, prompts, generations = (text and int(text) for text in (batch.groups() if batch else [None] * 3))
    return Hardware(
        gpus=int(found[1]) if found else 0,
        gpu_gb=float(found[2]) if found else 0.0,
        vllm_gpus=int(vllm[1]) if vllm else 0,
        launch=launch[1] if launch else None,
        global_batch=total,
        prompts=prompts,
        generations=generations,
    )


@dataclass(frozen=True)
class Launch:
    """The settings of an accelerate config that sizes depend on."""

    processes: int = 1
    sharding: str = "none"
    saves_whole_weights: bool = True
    offloads: bool = False


def read_launch(path: Path) -> Launch:
    """Read the accelerate config in `path`; refuse a config that accelerate cannot read, or an unknown sharding."""
    from accelerate.commands.config.config_args import load_config_from_file

    values = load_yaml(path)
    try:
        config = load_config_from_file(str(path))
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: accelerate cannot read it: {in_one_line(error)}") from None
    kind = config.distributed_type.value
    engine = values.get("deepspeed_config") or {}
    key = (kind, engine.get("zero_stage")) if kind == "DEEPSPEED" else kind
    if kind in ("FSDP", "DEEPSPEED") and key not in SHARDING:
        raise InputError(f"{path}: zero_stage is {engine.get('zero_stage')}, but must be 2 or 3")
    if kind == "FSDP" and (values.get("fsdp_config") or {}).get("fsdp_version") != 2:
        raise InputError(f"{path}: fsdp_version must be 2: the fused head does not take FSDP1")
    offloads = [value for name, value in engine.items() if name.startswith("offload") and value not in (None, "none")]
    return Launch(
        processes=config.num_processes,
        sharding=SHARDING.get(key, "none"),
        saves_whole_weights=SHARDING.get(key) != "zero3" or engine.get("zero3_save_16bit_model") is True,
        offloads=bool(offloads),
    )


def find_launch(config: Path, name: str) -> Path:
    """Find accelerate_configs/`name` in the recipes that `config` belongs to; refuse a name that is not there."""
    folders = [folder / ACCELERATE_CONFIGS for folder in config.absolute().parents]
    folder = next((folder for folder in folders if folder.is_dir()), None)
    if folder is None:
        raise InputError(f"{config}: no folder {ACCELERATE_CONFIGS} above it, where {name} would be")
    if not (folder / name).is_file():
        raise InputError(f"{config}: {name} in the first line is not in {folder}")
    return folder / name


@dataclass(frozen=True)
class Facts:
    """The facts about a recipe's model that are known without its weights."""

    name: str
    source: Path  # where it was read
    config: dict[str, Any]
    eos_token: str | None
    eos_ids: frozenset[int]  # of generation config and tokenizer
    turn_end_token: str | None
    turn_end_id: int | None
    prepared: frozenset[str] = frozenset()  # absolute folders of the same architecture

    @property
    def context(self) -> int:
        if self.config.get("max_position_embeddings") is None:
            raise InputError(f"{self.source}: max_position_embeddings, the model's context, is missing")
        return self.config["max_position_embeddings"]


def find_facts(path: Path) -> Facts | None:
    """Read the facts of the recipe folder that `path` lies in; return None if it has no model_config.json."""
    start = path.absolute()
    for folder in [start, *start.parents][:3]:
        if (folder / MODEL_CONFIG).is_file():
            return read_facts(folder / MODEL_CONFIG)
    return None


def read_facts(path: Path) -> Facts:
    """Read model_config.json; refuse it if `model`, `sources` or a part of the others is missing."""
    values = read_json(path)
    try:
        tokenizer, stops = values["tokenizer"], values["generation_config"]["eos_token_id"]
        ids = {*(stops if isinstance(stops, list) else [stops]), tokenizer["eos_token_id"]}
        if not values["sources"]:
            raise KeyError("sources")
        return Facts(
            name=values["model"],
            source=path,
            config=values["config"],
            eos_token=tokenizer["eos_token"],
            eos_ids=frozenset(ids),
            turn_end_token=tokenizer["turn_end_token"],
            turn_end_id=tokenizer["turn_end_token_id"],
            prepared=frozenset(prepared_models(path.parent)),
        )
    except KeyError as error:
        raise InputError(f"{path}: {error.args[0]} is missing") from None


def local_facts(model: str) -> Facts | None:
    """Read the facts from the model's own files, in a folder or in the hub's cache; return None if there are none."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    from ..models.tokens import id_list, turn_end_id

    local = {"local_files_only": True}
    try:
        config, tokenizer = AutoConfig.from_pretrained(model, **local), AutoTokenizer.from_pretrained(model, **local)
    except (OSError, ValueError):
        return None
    try:
        stops = GenerationConfig.from_pretrained(model, **local).eos_token_id
    except OSError:
        stops = config.eos_token_id
    end = turn_end_id(tokenizer, strict=True)
    return Facts(
        name=model,
        source=Path(model),
        config=config.get_text_config().to_dict(),
        eos_token=tokenizer.eos_token,
        eos_ids=frozenset({*id_list(stops), *id_list(tokenizer.eos_token_id)}),
        turn_end_token=None if end is None else tokenizer.convert_ids_to_tokens(end),
        turn_end_id=end,
    )


def shape_of(facts: Facts) -> Shape:
    """Build the model on the meta device, which allocates nothing, and count its sizes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.for_model(**facts.config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{facts.source}: no model can be built of it: {in_one_line(error)}") from None
    head, modules = model.get_output_embeddings(), model.named_modules()
    linears = {name: module for name, module in modules if isinstance(module, torch.nn.Linear) and module is not head}
    first = [module for name, module in linears.items() if ".layers.0." in name]
    try:
        heads = config.num_attention_heads
        return Shape(
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            linear_parameters=sum(module.weight.numel() for module in linears.values()),
            linear_inputs=sum(module.in_features for module in first),
            linear_outputs=sum(module.out_features for module in first),
            linears=len(first),
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=heads,
            kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocab=config.vocab_size,
            tied=config.tie_word_embeddings,
        )
    except AttributeError as error:
        raise InputError(f"{facts.source}: no dense decoder with a gated MLP: {in_one_line(error)}") from None


@dataclass(frozen=True)
class Card:
    """A GPU as its maker describes it: memory, dense bf16 products with float32 sums, and its two bandwidths."""

    name: str
    gb: int
    tflops: float
    memory_gb_s: float
    link_gb_s: float  # to another card of the machine, one way
    source: str


# Of each size a slow and a fast card. A GeForce sums in float32 at half of its maker's boldest figure. The links of
# cards without NVLink are those of 16 lanes: PCIe 4.0 has 32 GB/s one way
GA102 = "not checked in NVIDIA's GA102 whitepaper"
ADA = "not checked in NVIDIA's Ada whitepaper"
TWICE_FLOAT32 = "not checked: twice the float32 rate"
CARDS = (
    Card("RTX 3060", 12, 25.5, 360, 32, TWICE_FLOAT32),
    Card("RTX 4070", 12, 58.3, 504, 32, TWICE_FLOAT32),
    Card("RTX 3090", 24, 71, 936, 32, GA102),
    Card("RTX 4090", 24, 165.2, 1008, 32, ADA),
    Card("A100 40 GB", 40, 312, 1555, 300, "NVIDIA's A100 datasheet"),
    Card("A40", 48, 149.7, 696, 32, "NVIDIA's A40 datasheet"),
    Card("L40S", 48, 362, 864, 32, "NVIDIA's L40S datasheet"),
    Card("A100", 80, 312, 2039, 300, "NVIDIA's A100 datasheet, SXM"),
    Card("H100", 80, 989, 3350, 450, "NVIDIA's H100 datasheet, SXM, without sparsity"),
    Card("H200", 141, 989, 4800, 450, "NVIDIA's H200 datasheet, without sparsity"),
)


def cards_of(gpu_gb: float) -> tuple[Card, Card]:
    """Return the fastest and the slowest card of that size; refuse a size that no card here has."""
    found = sorted((card for card in CARDS if card.gb == gpu_gb), key=lambda card: card.tflops)
    if not found:
        sizes = ", ".join(map(str, sorted({card.gb for card in CARDS})))
        raise InputError(f"no card of {gpu_gb:g} GB is known, whose hours could be told: there are {sizes} GB")
    return found[-1], found[0]


# Problems of each benchmark, as its page says
PROBLEMS = {
    "GSM8K": 1319,
    "AIME24": 30,
    "AIME25": 30,
    "AMC23": 40,
    "MATH-500": 500,
    "Minerva": 272,
    "OlympiadBench": 674,
}


@dataclass(frozen=True)
class Promise:
    """The limits in a data.yaml of the rows that it will write."""

    config: Path
    max_prompt: int | None
    max_length: int | None
    rows: int | None = None  # None: what is left of the data


def promised_files(folder: Path) -> dict[str, Promise]:
    """Map the absolute path of each file that the data*.yaml of a recipe will write to what is known of its rows.

    Models that the recipe's scripts will write are among the keys.
    """
    from ..data.config import DIFFICULTIES
    from ..data.output import HELD_OUT, RL, SFT
    from ..data.prepare import ARGUMENT_TYPES

    models = prepared_models(folder)
    files = {model: Promise(folder / MODEL_CONFIG, None, None) for model in models}
    for path in sorted(folder.glob("data*.yaml")):
        (args,) = parse(ARGUMENT_TYPES, ["--config", str(path)], prog="aesl recipes check", to_come=models)
        sizes = {SFT: args.num_demonstrations, RL: args.num_rl, HELD_OUT: args.num_held_out}
        sizes |= {f"sft_{size}.jsonl": size for size in args.subsets or []}
        sizes |= {f"sft_{name}.jsonl": args.difficulty_size for name in DIFFICULTIES} if args.has_pass_rates else {}
        for name, size in sizes.items():
            if args.output_dir:
                promise = Promise(path, args.max_prompt_length, args.max_length, size)
                files[str(Path(args.output_dir) / name)] = promise
    return files
