"""Estimate by arithmetic how long a stage takes: plain formulas, to be read, doubted and tested.

A time is a range. Its fast end is the fastest card of a size, used as well as we expect; its slow end is the slowest
card of that size, used as badly as we expect. `FAST` and `SLOW` hold what is expected, with sources. **No GPU has
measured any of it**, so every line that shows such a time calls it estimated. docs/several_gpus.md has the same
figures as tables, and docs/monitoring_cost.md those of one measurement.

Left out: loading, saving, the data, grading, the handoff, the report; models other than dense decoders with a gated
MLP; more than one machine.
"""

from collections.abc import Callable
from dataclasses import dataclass

from .facts import Card, cards_of
from .memory import GB, VLLM_OWN_GB, Shape, Training, cache_bytes


@dataclass(frozen=True)
class Shares:
    """What is expected of a card at one end of the range."""

    train: float  # of its peak products, in a training step
    sample: float  # of its peak products, in decoding
    memory: float  # of its memory's bandwidth, in decoding
    link: float  # of its link's bandwidth
    overlaps: bool  # traffic between cards hides behind products
    layer_s: float  # a layer of a decoding step of transformers' generate, which the CPU launches
    vllm_step_s: float  # of vLLM's own in a decoding step
    sync_s: float  # to wake vLLM and to give it the weights
    figures_s: float  # to turn one sample into figures, grading included
    quantized: float  # times longer with a base in 4 or 8 bits
    filled: float  # of its limit that a row or an answer is long, on average


# train: torchtitan's Llama-3.1-8B reached 33 to 39 % of an H100's peak with FSDP, recomputation not counted
# (pytorch/torchtitan, benchmarks/llama3_h100_202412_torchtitan.md); the slow end is half of the fast one.
# layer_s: Qwen2-0.5B decodes 49.94 tokens a second at batch 1 on an A100: 20 ms for 24 layers
# (qwen.readthedocs.io/en/v2.0, benchmark/speed_benchmark); the slow end has a CPU of two thirds of that speed.
# All others are assumed.
FAST = Shares(0.4, 0.6, 0.9, 0.8, True, 0.00083, 0.003, 3.0, 0.006, 1.25, 0.5)
SLOW = Shares(0.2, 0.3, 0.6, 0.4, False, 0.00125, 0.006, 10.0, 0.012, 1.75, 1.0)
HOW = "no GPU has measured it; docs/several_gpus.md has the arithmetic"  # goes with every estimate of several stages
LORA_LAYER = 1.5  # times longer a layer of generate with an unmerged adapter, whose small products are launched too
SOFTMAX_READS = 6  # of the float32 logits of a decoding step
VLLM_SEQUENCES = 256  # at once, vLLM's own default of max_num_seqs


@dataclass(frozen=True)
class End:
    """One end of the range: a card, and what is expected of it. All times are in seconds."""

    card: Card
    expected: Shares

    @property
    def training(self) -> float:
        """Products a second while training."""
        return self.card.tflops * 1e12 * self.expected.train

    @property
    def sampling(self) -> float:
        """Products a second while decoding."""
        return self.card.tflops * 1e12 * self.expected.sample

    @property
    def memory(self) -> float:
        """Bytes a second that decoding reads."""
        return self.card.memory_gb_s * GB * self.expected.memory

    @property
    def link(self) -> float:
        """Bytes a second between two cards."""
        return self.card.link_gb_s * GB * self.expected.link


SHORT = "under 1 min"


@dataclass(frozen=True)
class Span:
    """Seconds at the fast and at the slow end."""

    fast: float = 0.0
    slow: float = 0.0

    def __add__(self, other: "Span") -> "Span":
        return Span(self.fast + other.fast, self.slow + other.slow)

    def __mul__(self, times: float) -> "Span":
        return Span(self.fast * times, self.slow * times)

    def __str__(self) -> str:
        fast, slow = spelt(self.fast), spelt(self.slow)
        if fast == slow:
            return fast
        if fast == SHORT:
            return f"up to {slow}"
        number, unit = fast.rsplit(" ", 1)
        return f"{number} to {slow}" if slow.endswith(f" {unit}") else f"{fast} to {slow}"


def spelt(seconds: float) -> str:
    """Write a time: hours from one hour on, else minutes."""
    hours, minutes = seconds / 3600, seconds / 60
    if minutes < 0.95:
        return SHORT
    return f"{minutes:.0f} min" if round(minutes) < 60 else f"{hours:.1f} h" if hours < 9.95 else f"{hours:.0f} h"


def between(gpu_gb: float, seconds: Callable[[End], float]) -> Span:
    """Return the time at both ends for a card of `gpu_gb`, each by `seconds`."""
    fast, slow = cards_of(gpu_gb)
    return Span(seconds(End(fast, FAST)), seconds(End(slow, SLOW)))


# ---- Training


def multiplied(shape: Shape) -> int:
    """Count the parameters that a token is multiplied with: the layers' and the head's, not the embeddings' table."""
    return shape.linear_parameters + shape.vocab * shape.hidden


def forward_flops(shape: Shape, length: float) -> float:
    """Count a token's products of a forward pass in rows of `length`: 2 a parameter, and half of causal attention."""
    return 2 * multiplied(shape) + 2 * length * shape.heads * shape.head_dim * shape.layers


def training_flops(run: Training, length: float) -> float:
    """Count a trained token's products.

    A forward pass is repeated where it is recomputed. A backward pass is one more to the activations, and one more to
    trained weights. Attention has no weights, and its backward pass is twice its forward pass. The head is never
    recomputed.
    """
    shape, to_weights = run.shape, run.lora_rank is None
    layers = 2 * shape.linear_parameters * (2 + run.checkpointing + to_weights)
    attention = 2 * length * shape.heads * shape.head_dim * shape.layers * (3 + run.checkpointing)
    return layers + attention + 2 * shape.vocab * shape.hidden * (2 + to_weights)


@dataclass(frozen=True)
class Traffic:
    """GB that a card sends, and receives: for each micro-batch, each optimizer step, each pass without gradients."""

    micro_gb: float
    step_gb: float
    forward_gb: float  # of a micro-batch's rows


def traffic(run: Training) -> Traffic:
    """Count the traffic of one machine's cards, in rings: each sends (N - 1) / N of what is gathered or reduced.

    DDP sums what is trained once a step, which a ring sends twice. DeepSpeed reduces bf16 gradients after every
    micro-batch. FSDP2 and ZeRO-3 gather bf16 weights for the forward pass and again for the backward pass. FSDP2
    reduces gradients at the last micro-batch of a step, since accelerate holds them whole until then. Both gather the
    weights once for a pass without gradients; under DDP and ZeRO-2 each card holds them.
    """
    share = (run.processes - 1) / run.processes
    weights, trained = share * 2 * run.shape.parameters / GB, share * 2 * run.trained / GB
    if run.sharding == "none":
        return Traffic(0.0, 2 * share * run.trained * run.trained_bytes / GB, 0.0)
    if run.sharding == "zero2":
        return Traffic(trained, trained, 0.0)
    if run.sharding == "zero3":
        return Traffic(2 * weights + trained, 0.0, weights)
    return Traffic(2 * weights, trained, weights)


def step_s(run: Training, end: End, *, forwards: float = 0) -> float:
    """Return the time of an optimizer step, with `forwards` more passes without gradients for each micro-batch.

    `forwards` is a mean: 0.5 where every second step has one.
    """
    length = run.length * end.expected.filled
    flops = training_flops(run, length) + forwards * forward_flops(run.shape, length)
    products = run.micro_batches * run.rows * length * flops / end.training
    products *= end.expected.quantized if run.bits < 16 else 1.0
    sent = traffic(run)
    travel = GB * (run.micro_batches * (sent.micro_gb + forwards * sent.forward_gb) + sent.step_gb) / end.link
    return max(products, travel) if end.expected.overlaps else products + travel


# ---- Sampling


@dataclass(frozen=True)
class Draw:
    """Samples that one card draws: `count` answers of up to `limit` tokens, at most `batch` of them at once."""

    count: int
    batch: int
    prompt: int  # tokens of the longest prompt
    limit: int
    per_prompt: int = 1
    adapter: bool = False  # unmerged
    weight_bytes: float = 2


def decoding_s(shape: Shape, end: End, batch: float, context: float, weight_bytes: float = 2) -> float:
    """Return a card's own work in a decoding step of `batch` sequences of `context` tokens.

    Its products hide behind the reading of the weights, or the reverse. Keys and values, and the logits in float32,
    are read besides.
    """
    weights = weight_bytes * multiplied(shape) / end.memory
    products = batch * forward_flops(shape, 0) / end.sampling
    cache = cache_bytes(shape) * batch * context / end.memory
    logits = 4 * SOFTMAX_READS * batch * shape.vocab / end.memory
    return max(weights, products) + cache + logits


def generate_s(shape: Shape, end: End, draw: Draw) -> float:
    """Return the time of transformers' generate: batch after batch, each until its longest sample is at the limit.

    A step takes as long as the CPU needs to launch it, or as the card to do it.
    """
    launched = shape.layers * end.expected.layer_s * (LORA_LAYER if draw.adapter else 1.0)
    total, left = 0.0, draw.count
    while left > 0:
        batch = min(left, draw.batch)
        own = decoding_s(shape, end, batch, draw.prompt * end.expected.filled + draw.limit / 2, draw.weight_bytes)
        total += draw.limit * max(launched, own)
        total += batch * draw.prompt * end.expected.filled * forward_flops(shape, draw.prompt) / end.sampling
        left -= batch
    return total


def vllm_s(shape: Shape, end: End, draw: Draw) -> float:
    """Return the time of vLLM, which fills a place as soon as a sample ends, until the last one is at the limit.

    A prompt is read once for all of its samples.
    """
    batch, prompt, mean = (
        min(draw.count, draw.batch),
        draw.prompt * end.expected.filled,
        draw.limit * end.expected.filled,
    )
    steps = draw.count * mean / batch + (draw.limit - mean)
    each = decoding_s(shape, end, batch, prompt + mean / 2, draw.weight_bytes) + end.expected.vllm_step_s
    return steps * each + draw.count / draw.per_prompt * prompt * forward_flops(shape, prompt) / end.sampling


def vllm_batch(shape: Shape, share_gb: float, length: float, *, weight_gb: float | None = None) -> int:
    """Return how many sequences of `length` tokens a share of the memory holds at once, at most vLLM's own limit."""
    weights = 2 * shape.parameters / GB if weight_gb is None else weight_gb
    room = (share_gb - VLLM_OWN_GB - weights) * GB / (cache_bytes(shape) * length)
    return max(1, min(VLLM_SEQUENCES, int(room)))
