"""GPU memory of a stage, itemised: plain arithmetic on sizes, so that it can be read, doubted and tested.

GB are 10^9 bytes, and a card of "24 GB" counts as 24 of them: it has about 7% more, which stay in reserve. What a
layer keeps for its backward pass was counted on the models themselves (tests/test_memory.py counts it again); the
rest is the shapes of what is allocated. Left out: fragmentation, but for the item that stands for it; models other
than dense decoders with a gated MLP; tensor, context and pipeline parallelism.

Phases: `always` is there throughout; `train` (a training step), `generate` (sampling by transformers), `vllm` (by vLLM
on the same GPU) and `evaluate` take turns.
"""

from dataclasses import dataclass
from typing import Literal


GB = 1e9
ALWAYS, TRAIN, GENERATE, VLLM, EVALUATE = PHASES = "always", "train", "generate", "vllm", "evaluate"
CONTEXT_GB = 1.0  # CUDA context, cuBLAS workspaces, NCCL: about 0.5 to 1 GB in practice
FRAGMENTATION = 0.1  # of what a phase allocates for itself, our allowance
VLLM_OWN_GB = 2.0  # of vLLM's share that is neither weights nor cache: profiled activations, CUDA graphs
# Bytes a parameter in 4 bits: half a byte, and a float32 scale for 64 of them, itself in 8 bits when nested (QLoRA).
FOUR_BIT, FOUR_BIT_NESTED = 0.5 + 4 / 64, 0.5 + 1 / 64 + 4 / (64 * 256)
TILE_BYTES = 2**28  # of a head's tile of logits: what losses/head.py takes on a GPU, and TRL's own head in GRPO
TILE_MIN_ROWS = {True: 1024, False: 256}  # by whether the head is trained, as in losses/head.py

Sharding = Literal["none", "zero2", "zero3", "fsdp"]


@dataclass(frozen=True)
class Shape:
    """Sizes of a dense decoder: `heads * head_dim` is the width of the queries, `kv_heads * head_dim` of keys."""

    parameters: int
    linear_parameters: int  # in the layers' linear modules: what 4 bits hold and LoRA adapts
    linear_inputs: int  # sum of the input widths of one layer's linear modules
    linear_outputs: int
    linears: int  # linear modules of one layer
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool


@dataclass(frozen=True)
class Training:
    """How a model is trained, and on how many processes."""

    shape: Shape
    processes: int = 1
    sharding: Sharding = "none"
    weight_bytes: int = 2  # of the dtype that the weights are loaded in
    bits: int = 16  # 4 or 8: the frozen base is quantized
    nested: bool = False
    lora_rank: int | None = None
    lora_dropout: float = 0.0
    optimizer: str = "adamw_torch"
    checkpointing: bool = True
    rows: int = 1  # a process and micro-batch
    length: int = 1024  # tokens of a row
    masked: bool = False  # rows are padded, and attention takes a mask
    trl_head: bool = False  # GRPO scores with TRL's head, SFT with ours

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def trained(self) -> int:
        """Trained parameters."""
        shape, rank = self.shape, self.lora_rank
        if rank is None:
            return shape.parameters
        return rank * (shape.linear_inputs + shape.linear_outputs) * shape.layers

    @property
    def trained_bytes(self) -> int:
        """Bytes of a trained parameter: FSDP2 and PEFT train float32, TRL makes adapters of a quantized base bf16."""
        if self.sharding == "fsdp":
            return 4
        if self.lora_rank is not None:
            return 2 if self.bits < 16 or self.sharding.startswith("zero") else 4
        return 2 if self.sharding.startswith("zero") else self.weight_bytes

    @property
    def stream_bytes(self) -> int:
        """Bytes of an element between layers: float32 weights under autocast keep a float32 residual stream."""
        casts = self.sharding == "none" and self.weight_bytes == 4
        return 4 if casts else 2


@dataclass(frozen=True)
class Item:
    """One line of the sum: what, when, how much, and how it was derived."""

    name: str
    phase: str
    gb: float
    how: str


# ---- What every training needs


def training_items(run: Training) -> list[Item]:
    """Weights, gradients, optimizer and activations of one process."""
    return [*_weights(run), *_gradients(run), _optimizer(run), *_gathered(run), *_activations(run), *_head(run)]


def _weights(run: Training) -> list[Item]:
    shape, share = run.shape, run.processes if run.sharding in ("zero3", "fsdp") else 1
    if run.lora_rank is None:
        return [_item("weights", ALWAYS, shape.parameters * run.trained_bytes, share, f"{_b(run.trained_bytes)}", run)]
    adapter = Item("adapter", ALWAYS, run.trained * run.trained_bytes / share / GB, f"rank {run.lora_rank}")
    if run.bits == 16:
        return [
            _item("weights", ALWAYS, shape.parameters * run.weight_bytes, share, _b(run.weight_bytes), run),
            adapter,
        ]
    each = {8: 1.0, 4: FOUR_BIT_NESTED if run.nested else FOUR_BIT}[run.bits]
    size = shape.linear_parameters * each + (shape.parameters - shape.linear_parameters) * run.weight_bytes
    how = f"layers in {run.bits} bits ({each:.3f} bytes each), embeddings and head in {_b(run.weight_bytes)}"
    return [Item("weights", ALWAYS, size / share / GB, how), adapter]


def _item(name: str, phase: str, size: float, share: int, what: str, run: Training) -> Item:
    shared = f", over {share} GPUs" if share > 1 else ""
    return Item(name, phase, size / share / GB, f"{run.shape.parameters / GB:.2f} B x {what}{shared}")


def _b(size: float) -> str:
    return f"{size:g} bytes"


def _gradients(run: Training) -> list[Item]:
    size, share = run.trained * run.trained_bytes, 1 if run.sharding == "none" else run.processes
    items = [Item("gradients", ALWAYS, size / share / GB, f"{run.trained / GB:.3f} B x {_b(run.trained_bytes)}")]
    if run.sharding == "none" and run.processes > 1:
        items.append(Item("buckets of DDP", ALWAYS, size / GB, "a copy of the gradients"))
    return items


def _optimizer(run: Training) -> Item:
    """Two moments, in the dtype of the parameters; DeepSpeed adds float32 masters of bf16 weights."""
    if "8bit" in run.optimizer:
        each, how = 2.0, "8-bit moments"
    elif run.sharding.startswith("zero"):
        each, how = 12.0, "float32 masters and moments"
    else:
        each, how = 2.0 * run.trained_bytes, "two moments"
    share = 1 if run.sharding == "none" else run.processes
    return Item("optimizer", ALWAYS, run.trained * each / share / GB, f"{how}, {_b(each)} each")


def _gathered(run: Training) -> list[Item]:
    """What a sharded process holds whole for a moment: the unit of embeddings and head, and two layers."""
    if run.sharding not in ("zero3", "fsdp") or run.processes == 1:
        return _cast_copies(run)
    each = 2 + (4 if run.lora_rank is None else 0)
    how = f"embeddings, head and two layers, {'weights and gradients' if each == 6 else 'weights'}"
    return [Item("gathered", TRAIN, _units(run.shape) * each / GB, how)]


def _units(shape: Shape) -> float:
    """Parameters of the unit with embeddings and head, and of two layers: one at work, one fetched ahead."""
    return (shape.parameters - shape.linear_parameters) + 2 * shape.linear_parameters / shape.layers


def _cast_copies(run: Training) -> list[Item]:
    if run.trained_bytes != 4 or run.sharding != "none":
        return []
    return [Item("bf16 copies", TRAIN, run.trained * 2 / GB, "autocast keeps one of each trained float32 weight")]


# ---- Activations


def saved_bytes(run: Training) -> int:
    """Bytes a token that one layer keeps for its backward pass (flash or memory-efficient attention).

    Each norm keeps a float32 input and two bf16 results, attention its queries, keys, values, output and log-sum-exps,
    the gated MLP four tensors of its width. A float32 stream adds ten bytes a hidden unit; an adapter its inputs and
    low-rank results, with dropout a copy and a mask of every input.
    """
    shape, rank = run.shape, run.lora_rank
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    size = 16 * shape.hidden + 4 * queries + 4 * keys + 4 * shape.heads + 8 * shape.intermediate + 8
    size += 10 * shape.hidden if run.stream_bytes == 4 else 0
    if rank is not None:
        size += 4 * shape.hidden + 2 * rank * shape.linears
        size += 4 * shape.linear_inputs if run.lora_dropout else 0
    return size


def _activations(run: Training) -> list[Item]:
    shape, tokens = run.shape, run.tokens
    layer = saved_bytes(run) * tokens / GB
    working = 8 * shape.intermediate * tokens / GB
    what = f"{run.rows} x {run.length} tokens"
    if run.checkpointing:
        borders = shape.layers * shape.hidden * run.stream_bytes * tokens / GB
        items = [
            Item("activations", TRAIN, borders, f"{what}, {shape.layers} layers' inputs x {_b(run.stream_bytes)}"),
            Item("one layer, recomputed", TRAIN, layer + working, "what it saves, and the MLP's gradients"),
        ]
    else:
        items = [
            Item("activations", TRAIN, shape.layers * layer, f"{what}, all that {shape.layers} layers save"),
            Item("one layer's gradients", TRAIN, working, "the MLP's"),
        ]
    if run.masked:
        items.append(
            Item("attention mask", TRAIN, 3 * run.rows * run.length**2 / GB, "rows x length^2, bool and bf16")
        )
    return items


def _head(run: Training) -> list[Item]:
    """The tile of logits; where the head is trained, its gradient's float32 sum; the gradient of the hidden states."""
    shape, trained = run.shape, run.lora_rank is None
    if run.trl_head:
        items = [Item("head's tile", TRAIN, 3 * TILE_BYTES / GB, "TRL's head: no whole logits; bf16, float32")]
    else:
        row = 6 * shape.vocab
        rows = max(TILE_MIN_ROWS[trained], TILE_BYTES // row // 128 * 128)
        items = [Item("head's tile", TRAIN, rows * row / GB, f"{rows} tokens x {shape.vocab} x (float32 and bf16)")]
    if trained:
        size = shape.vocab * shape.hidden * 4
        items.append(Item("head's gradient", TRAIN, size / GB, f"{shape.vocab} x {shape.hidden} x 4 bytes, its sum"))
    items.append(Item("hidden states", TRAIN, 4 * run.tokens * shape.hidden / GB, "last ones and their gradient"))
    return items


# ---- Sampling


def cache_bytes(shape: Shape, element_bytes: int = 2) -> int:
    """Bytes a token of the KV cache."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * element_bytes


def sampling_items(
    shape: Shape, *, samples: int, prompt: int, new_tokens: int, element_bytes: int = 2, name: str = "sampling"
) -> list[Item]:
    """`generate` of `samples` completions at once on one process."""
    cache = cache_bytes(shape, element_bytes) * samples * (prompt + new_tokens)
    prefill = samples * prompt * element_bytes * (3 * shape.intermediate + 4 * shape.hidden)
    how = f"{samples} x ({prompt} + {new_tokens}) tokens x {cache_bytes(shape, element_bytes)} bytes"
    return [
        Item(f"{name}: KV cache", GENERATE, cache / GB, how),
        Item(f"{name}: prompts", GENERATE, prefill / GB, f"{samples} x {prompt} tokens through one layer"),
        Item(f"{name}: logits", GENERATE, 12 * samples * shape.vocab / GB, f"{samples} x {shape.vocab}, 3 in float32"),
    ]


def gathered_for_sampling(run: Training) -> list[Item]:
    """A sharded model is gathered whole before `generate` samples from it (sampling/generate.py; TRL for ZeRO-3)."""
    if run.sharding not in ("zero3", "fsdp"):
        return []
    return [Item("gathered weights", GENERATE, 2 * run.shape.parameters / GB, "the whole model in bf16")]


def forward_item(shape: Shape, tokens: int, *, name: str = "evaluation", phase: str = EVALUATE) -> Item:
    """So many tokens at once without gradients: one layer's tensors at a time, and a tile of the head."""
    size = tokens * 2 * (3 * shape.intermediate + 6 * shape.hidden) + TILE_MIN_ROWS[False] * shape.vocab * 6
    return Item(name, phase, size / GB, f"{tokens} tokens through one layer")


def vllm_item(gpu_gb: float, utilization: float, sleeps: bool) -> Item:
    """vLLM takes its share whole; asleep, it gives it back while the model trains."""
    phase, how = (VLLM, "asleep while training") if sleeps else (ALWAYS, "held while training too")
    return Item("vLLM's share", phase, gpu_gb * utilization, f"{utilization:g} of the GPU, {how}")


def vllm_sequences(
    shape: Shape, share_gb: float, length: int, *, tensor_parallel: int = 1, weight_gb: float | None = None
) -> float:
    """Sequences of `length` tokens that vLLM's share can hold at once; below 1 it refuses to start."""
    weights = 2 * shape.parameters / GB if weight_gb is None else weight_gb
    room = share_gb - VLLM_OWN_GB - weights / tensor_parallel
    return room * tensor_parallel * GB / (cache_bytes(shape) * length)


# ---- The sum


@dataclass(frozen=True)
class Budget:
    """Items of one process and the GPU that they have to fit on."""

    items: list[Item]
    gpu_gb: float

    @property
    def peaks(self) -> dict[str, float]:
        """GB of each phase that occurs, with what is always there."""
        phases = [phase for phase in PHASES[1:] if any(item.phase == phase for item in self.items)]
        return {phase: self._sum(ALWAYS) + self._sum(phase) for phase in phases or [ALWAYS]}

    @property
    def peak_gb(self) -> float:
        return max(self.peaks.values())

    @property
    def fits(self) -> bool:
        return self.peak_gb <= self.gpu_gb

    def _sum(self, phase: str) -> float:
        return sum(item.gb for item in self.items if item.phase == phase)


def budget(items: list[Item], gpu_gb: float) -> Budget:
    """The items with CUDA's own memory and an allowance for fragmentation."""
    own = [Item("CUDA, libraries", ALWAYS, CONTEXT_GB, "context, workspaces, NCCL")]
    for phase in PHASES[1:]:
        size = sum(item.gb for item in items if item.phase == phase and not item.name.startswith("vLLM"))
        if size:
            own.append(Item("fragmentation", phase, FRAGMENTATION * size, f"{FRAGMENTATION:.0%} of this phase"))
    return Budget([*items, *own], gpu_gb)
