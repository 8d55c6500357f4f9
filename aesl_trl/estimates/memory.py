"""Sum the GPU memory of a stage, item by item: plain arithmetic on sizes, to be read, doubted and tested.

A GB is 10^9 bytes. A card of "24 GB" counts as 24 of them; it has about 7% more, which stay in reserve. The tensors
that a layer keeps for its backward pass were counted on the models themselves (tests/estimates/test_memory.py counts
them again); the other items follow from the shapes of the tensors. Left out: models other than dense decoders with a
gated MLP; tensor, context and pipeline parallelism.

Items of the phase `always` stay throughout. The other phases take turns: `train` (a training step), `generate`
(sampling by transformers), `vllm` (sampling by vLLM on the same GPU) and `evaluate`.
"""

from dataclasses import dataclass
from typing import Literal


GB = 1e9
ALWAYS, TRAIN, GENERATE, VLLM, EVALUATE = PHASES = "always", "train", "generate", "vllm", "evaluate"
CONTEXT_GB = 1.0  # CUDA context, cuBLAS workspaces, NCCL: about 0.5 to 1 GB in practice
FRAGMENTATION = 0.1  # our allowance, as a share of what a phase allocates for itself
VLLM_OWN_GB = 2.0  # the part of vLLM's share that is neither weights nor cache: profiled activations, CUDA graphs
# Bytes a parameter in 4 bits: half a byte, and a float32 scale for 64 of them, itself in 8 bits when nested (QLoRA).
FOUR_BIT, FOUR_BIT_NESTED = 0.5 + 4 / 64, 0.5 + 1 / 64 + 4 / (64 * 256)
TILE_BYTES = 2**28  # a head's tile of logits, in losses/head.py on a GPU and in TRL's own head in GRPO
TILE_MIN_ROWS = {True: 1024, False: 256}  # by whether the head is trained, as in losses/head.py


@dataclass(frozen=True)
class Shape:
    """Sizes of a dense decoder: `heads * head_dim` is the width of the queries, `kv_heads * head_dim` of the keys."""

    parameters: int
    linear_parameters: int  # in the layers' linear modules, which 4 bits hold and LoRA adapts
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
    sharding: Literal["none", "zero2", "zero3", "fsdp"] = "none"
    weight_bytes: int = 2  # of the dtype that the weights are loaded in
    bits: int = 16  # 4 or 8: the frozen base is quantized
    nested: bool = False
    lora_rank: int | None = None
    lora_dropout: float = 0.0
    optimizer: str = "adamw_torch"
    checkpointing: bool = True
    rows: int = 1  # of a micro-batch on one process
    micro_batches: int = 1  # of an optimizer step
    length: int = 1024  # tokens of a row
    masked: bool = False  # rows are padded, and attention takes a mask
    trl_head: bool = False  # GRPO scores with TRL's head, SFT with ours

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def trained(self) -> int:
        """Trained parameters."""
        if self.lora_rank is None:
            return self.shape.parameters
        return self.lora_rank * (self.shape.linear_inputs + self.shape.linear_outputs) * self.shape.layers

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
        return 4 if self.sharding == "none" and self.weight_bytes == 4 else 2


@dataclass(frozen=True)
class Item:
    """One line of the sum: its name, the phase that needs it, its size, and how the size was derived."""

    name: str
    phase: str
    gb: float
    how: str


def training_items(run: Training) -> list[Item]:
    """Return the items of training on one process: weights, gradients, optimizer and activations."""
    return [*_weights(run), *_gradients(run), _optimizer(run), *_copies(run), *_activations(run), *_head(run)]


def _weights(run: Training) -> list[Item]:
    shape, share = run.shape, run.processes if run.sharding in ("zero3", "fsdp") else 1
    each = run.trained_bytes if run.lora_rank is None else run.weight_bytes
    size = shape.parameters * each
    how = f"{shape.parameters / GB:.2f} B x {each} bytes" + (f", over {share} GPUs" if share > 1 else "")
    if run.lora_rank is not None and run.bits < 16:
        each = {8: 1.0, 4: FOUR_BIT_NESTED if run.nested else FOUR_BIT}[run.bits]
        size = shape.linear_parameters * each + (shape.parameters - shape.linear_parameters) * run.weight_bytes
        how = f"layers in {run.bits} bits ({each:.3f} bytes each), embeddings and head in {run.weight_bytes} bytes"
    weights = Item("weights", ALWAYS, size / share / GB, how)
    if run.lora_rank is None:
        return [weights]
    return [weights, Item("adapter", ALWAYS, run.trained * run.trained_bytes / share / GB, f"rank {run.lora_rank}")]


def _gradients(run: Training) -> list[Item]:
    size, share = run.trained * run.trained_bytes, 1 if run.sharding == "none" else run.processes
    items = [Item("gradients", ALWAYS, size / share / GB, f"{run.trained / GB:.3f} B x {run.trained_bytes} bytes")]
    if run.sharding == "none" and run.processes > 1:
        items.append(Item("buckets of DDP", ALWAYS, size / GB, "a copy of the gradients"))
    if run.sharding == "fsdp" and run.processes > 1 and run.micro_batches > 1:
        how = "whole in bf16, until the last of a step's micro-batches reduces them"
        items.append(Item("accumulated gradients", TRAIN, run.trained * 2 / GB, how))
    return items


def _optimizer(run: Training) -> Item:
    """Count two moments, in the dtype of the parameters; DeepSpeed adds float32 masters of bf16 weights."""
    if "8bit" in run.optimizer:
        each, how = 2.0, "8-bit moments"
    elif run.sharding.startswith("zero"):
        each, how = 12.0, "float32 masters and moments"
    else:
        each, how = 2.0 * run.trained_bytes, "two moments"
    share = 1 if run.sharding == "none" else run.processes
    return Item("optimizer", ALWAYS, run.trained * each / share / GB, f"{how}, {each:g} bytes each")


def _copies(run: Training) -> list[Item]:
    """Count the weights that training holds a second time: whole units where they are sharded, else casts to bf16."""
    shape = run.shape
    if run.sharding in ("zero3", "fsdp") and run.processes > 1:
        # Embeddings and head are one unit; of the layers one is in use and one is fetched ahead
        parameters = (shape.parameters - shape.linear_parameters) + 2 * shape.linear_parameters / shape.layers
        each, held = (6, "weights and gradients") if run.lora_rank is None else (2, "weights")
        return [Item("gathered", TRAIN, parameters * each / GB, f"embeddings, head and two layers, {held}")]
    if run.sharding == "none" and run.trained_bytes == 4:
        return [Item("bf16 copies", TRAIN, run.trained * 2 / GB, "autocast keeps one of each trained float32 weight")]
    return []


def saved_bytes(run: Training) -> int:
    """Count the bytes per token that one layer keeps for its backward pass (flash or memory-efficient attention).

    Each norm keeps a float32 input and two bf16 results. Attention keeps queries, keys, values, output and
    log-sum-exps, the gated MLP four tensors of its width. A float32 stream adds ten bytes per hidden unit. An adapter
    adds its inputs and low-rank results, with dropout a copy and a mask of every input.
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
    if run.checkpointing:
        inputs = shape.layers * shape.hidden * run.stream_bytes * tokens / GB
        kept = f"{shape.layers} layers' inputs x {run.stream_bytes} bytes"
        one_layer = Item("one layer, recomputed", TRAIN, layer + working, "what it saves, and the MLP's gradients")
    else:
        inputs, kept = shape.layers * layer, f"all that {shape.layers} layers save"
        one_layer = Item("one layer's gradients", TRAIN, working, "the MLP's")
    items = [Item("activations", TRAIN, inputs, f"{run.rows} x {run.length} tokens, {kept}"), one_layer]
    if run.masked:
        size = 3 * run.rows * run.length**2
        items.append(Item("attention mask", TRAIN, size / GB, "rows x length^2, bool and bf16"))
    return items


def _head(run: Training) -> list[Item]:
    """Count the tile of logits, the hidden states with their gradient, and a trained head's gradient in float32."""
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


def cache_bytes(shape: Shape, element_bytes: int = 2) -> int:
    """Count the bytes per token of the KV cache."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * element_bytes


def sampling_items(
    shape: Shape, *, samples: int, prompt: int, new_tokens: int, element_bytes: int = 2, name: str = "sampling"
) -> list[Item]:
    """Return the items of `generate` for `samples` completions at once on one process."""
    cache = cache_bytes(shape, element_bytes) * samples * (prompt + new_tokens)
    prefill = samples * prompt * element_bytes * (3 * shape.intermediate + 4 * shape.hidden)
    how = f"{samples} x ({prompt} + {new_tokens}) tokens x {cache_bytes(shape, element_bytes)} bytes"
    return [
        Item(f"{name}: KV cache", GENERATE, cache / GB, how),
        Item(f"{name}: prompts", GENERATE, prefill / GB, f"{samples} x {prompt} tokens through one layer"),
        Item(f"{name}: logits", GENERATE, 12 * samples * shape.vocab / GB, f"{samples} x {shape.vocab}, 3 in float32"),
    ]


def gathered_for_sampling(run: Training) -> list[Item]:
    """Count the whole model if it is sharded: it is gathered before `generate` samples from it."""
    if run.sharding not in ("zero3", "fsdp"):
        return []
    return [Item("gathered weights", GENERATE, 2 * run.shape.parameters / GB, "the whole model in bf16")]


def forward_item(shape: Shape, tokens: int, *, name: str = "evaluation", phase: str = EVALUATE) -> Item:
    """Count a forward pass of `tokens` without gradients: one layer's tensors at a time, and a tile of the head."""
    size = tokens * 2 * (3 * shape.intermediate + 6 * shape.hidden) + TILE_MIN_ROWS[False] * shape.vocab * 6
    return Item(name, phase, size / GB, f"{tokens} tokens through one layer")


def vllm_item(gpu_gb: float, utilization: float, sleeps: bool) -> Item:
    """Count vLLM's share, which it takes whole; an engine that sleeps gives it back while the model trains."""
    phase, how = (VLLM, "asleep while training") if sleeps else (ALWAYS, "held while training too")
    return Item("vLLM's share", phase, gpu_gb * utilization, f"{utilization:g} of the GPU, {how}")


def vllm_sequences(
    shape: Shape, share_gb: float, length: int, *, tensor_parallel: int = 1, weight_gb: float | None = None
) -> float:
    """Return how many sequences of `length` tokens vLLM's share can hold at once; below 1 it refuses to start."""
    weights = 2 * shape.parameters / GB if weight_gb is None else weight_gb
    room = share_gb - VLLM_OWN_GB - weights / tensor_parallel
    return room * tensor_parallel * GB / (cache_bytes(shape) * length)


@dataclass(frozen=True)
class Budget:
    """The items of one process, and the GPU that they have to fit on."""

    items: list[Item]
    gpu_gb: float

    @property
    def peaks(self) -> dict[str, float]:
        """GB of each phase that occurs, together with the items of `always`."""
        sizes = {phase: [item.gb for item in self.items if item.phase == phase] for phase in PHASES}
        phases = [phase for phase in PHASES[1:] if sizes[phase]]
        return {phase: sum(sizes[ALWAYS]) + sum(sizes[phase]) for phase in phases or [ALWAYS]}

    @property
    def peak_gb(self) -> float:
        return max(self.peaks.values())

    @property
    def fits(self) -> bool:
        return self.peak_gb <= self.gpu_gb


def budget(items: list[Item], gpu_gb: float) -> Budget:
    """Add CUDA's own memory and an allowance for fragmentation to the items."""
    own = [Item("CUDA, libraries", ALWAYS, CONTEXT_GB, "context, workspaces, NCCL")]
    for phase in PHASES[1:]:
        size = sum(item.gb for item in items if item.phase == phase and not item.name.startswith("vLLM"))
        if size:
            own.append(Item("fragmentation", phase, FRAGMENTATION * size, f"{FRAGMENTATION:.0%} of this phase"))
    return Budget([*items, *own], gpu_gb)
