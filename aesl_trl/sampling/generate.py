"""Samples by transformers' `generate`, with the entropy, log-probability and end probability of every token.

All weights of a sharded model are gathered first, so that no rank waits for another while it decodes. When one rank
runs out of memory, all ranks try the same smaller batch.

transformers' continuous batching (`generate_batch`) would decode ragged lengths faster on a GPU. We do not use it: it
takes no logits processor from the caller, which the exact entropy and the end probability need. It also sizes its
cache to the memory that happens to be free, so the draw and the memory left to the training would vary.
"""

from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from trl.models.utils import unwrap_model_for_generation

from ..errors import InputError
from ..models.loading import release_memory
from ..models.tokens import left_pad, stop_ids
from .draws import PROMPT_TOKENS, Draw, Request, SamplingFailed, failure_on_any_rank, is_out_of_memory


class StepRecorder(LogitsProcessor):
    """Records the figures of each next-token distribution at temperature 1.

    transformers runs custom processors before the temperature's own. Logits that are not finite are recorded as nan
    and sampled as if all were equal: a draw from nan raises on CPU and kills the process on CUDA.
    """

    def __init__(self, stops: list[int]):
        self.stops = stops
        # One [B] a position
        self.entropy: list[Tensor] = []  # nats
        self.eos_prob: list[Tensor] = []  # of the stop tokens together
        self.log_prob: list[Tensor] = []  # nats, of the token then sampled; `record_sampled` adds the last one
        self._log_probs_BV = None

    def __call__(self, input_ids, scores):
        self.record_sampled(input_ids[:, -1])
        log_probs = scores.float().log_softmax(-1)  # nan where a logit is nan or +inf, or all are -inf
        is_broken = log_probs.isnan().any(-1)
        entropy = -(log_probs.exp() * log_probs).nan_to_num(0.0).sum(-1)
        self.entropy.append(entropy.masked_fill(is_broken, torch.nan))
        self.eos_prob.append(log_probs[:, self.stops].exp().sum(-1))
        self._log_probs_BV = log_probs.masked_fill(is_broken.unsqueeze(-1), torch.nan)
        return scores.masked_fill(is_broken.unsqueeze(-1), 0.0)

    def record_sampled(self, tokens: Tensor) -> None:
        """Add the log-probability of `tokens` `[B]`, which were sampled at the last position."""
        if self._log_probs_BV is not None:
            self.log_prob.append(self._log_probs_BV.gather(1, tokens.unsqueeze(1)).squeeze(1))
            self._log_probs_BV = None


class GenerateEngine:
    """Draws with `model.generate`, `batch_size` completions at once on each process, fewer where prompts are long.

    The prompts of a batch, padded, take at most `prompt_tokens` tokens; a longer prompt is a batch of its own. When
    memory runs out, `batch_size` is halved for this draw and for all later draws.
    """

    name = "generate"

    def __init__(self, batch_size: int = 64, prompt_tokens: int = PROMPT_TOKENS):
        self.batch_size = batch_size
        self.prompt_tokens = prompt_tokens

    def draw(self, request: Request) -> list[Draw]:
        """Draw as [`~aesl_trl.sampling.draws.Engine`] says, with smaller batches until the memory suffices."""
        batch_size = self.batch_size
        while True:
            drawn, error = _attempt(request, batch_size, self.prompt_tokens)
            failure = failure_on_any_rank(error, request.accelerator)
            if failure is None:
                break
            if not failure.is_memory or batch_size == 1:
                raise SamplingFailed(failure.reason) from error
            drawn = error = None
            release_memory()
            batch_size //= 2
        if batch_size < self.batch_size:
            request.say(
                f"out of memory: from here on {batch_size} completions are generated at once on each process, not "
                f"{self.batch_size}"
            )
        self.batch_size = batch_size
        return drawn


def _attempt(request: Request, batch_size: int, prompt_tokens: int) -> tuple[list[Draw], Exception | None]:
    """Return (draws, error)."""
    drawn, error = [], None
    try:
        with unwrapped_whole(request) as model:
            try:
                drawn = _draw_in_batches(model, request, batch_size, prompt_tokens)
            except Exception as caught:  # TRL's context leaves the model unusable when an error passes through it
                error = caught
    except Exception as caught:  # the weights could not be gathered
        error = caught
    # The frames of an error hold the tensors that there is no memory for
    return drawn, error.with_traceback(None) if error is not None and is_out_of_memory(error) else error


def batches_of(prompts: list[list[int]], batch_size: int, prompt_tokens: int) -> list[list[list[int]]]:
    """Split prompts, in their order, into batches that hold at most `prompt_tokens` tokens once they are padded."""
    batches, width = [], 0
    for prompt in prompts:
        width = max(width, len(prompt))
        if not batches or len(batches[-1]) == batch_size or (len(batches[-1]) + 1) * width > prompt_tokens:
            batches.append([])
            width = len(prompt)
        batches[-1].append(prompt)
    return batches


def _draw_in_batches(model, request: Request, batch_size: int, prompt_tokens: int) -> list[Draw]:
    torch.manual_seed(request.rank_seed)
    tokenizer = request.tokenizer
    generation_config = GenerationConfig(
        do_sample=True,
        temperature=request.settings.temperature,
        # All are set, as GRPOTrainer does: transformers fills a None from the model's own generation config
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        max_new_tokens=request.settings.max_new_tokens,
        eos_token_id=stop_ids(tokenizer, model.generation_config.eos_token_id),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    drawn = []
    for batch in batches_of(request.prompt_of_each_sample, batch_size, prompt_tokens):
        drawn += _generate(model, batch, generation_config)
        request.show(len(drawn))
    return drawn


def _generate(model, prompts: list[list[int]], generation_config: GenerationConfig) -> list[Draw]:
    """Draw one sample for each prompt."""
    input_ids, attention_mask = left_pad(prompts, generation_config.pad_token_id, model.device)
    stops = generation_config.eos_token_id
    recorder = StepRecorder(stops)
    sequences = model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        generation_config=generation_config,
        logits_processor=LogitsProcessorList([recorder]),
        synced_gpus=False,  # every rank has whole weights, and its own number of batches
    )
    recorder.record_sampled(sequences[:, -1])
    completions_BT = sequences[:, input_ids.size(1) :]
    is_stop = torch.isin(completions_BT, torch.tensor(stops, device=completions_BT.device))
    stopped = is_stop.any(1)
    lengths = torch.where(stopped, is_stop.int().argmax(1) + 1, completions_BT.size(1))
    is_kept = torch.arange(completions_BT.size(1), device=lengths.device) < lengths.unsqueeze(1)
    # `where`, not a product: the numbers behind the end of a sample need not be finite
    entropy, log_prob, eos_prob = (
        torch.stack(values, 1).where(is_kept, 0.0)  # [B, T]
        for values in (recorder.entropy, recorder.log_prob, recorder.eos_prob)
    )
    last = eos_prob.gather(1, lengths.unsqueeze(1) - 1).squeeze(1)
    end = torch.where(stopped, last, eos_prob.amax(1))
    columns = (completions_BT, lengths, stopped, entropy.sum(1) / lengths, -log_prob.sum(1) / lengths, end)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [Draw(ids[:length], *figures) for ids, length, *figures in rows]


@contextmanager
def unwrapped_whole(request: Request):
    """Yield the model without its distributed wrapper, all weights gathered, its gradient checkpointing off."""
    model, accelerator = request.model, request.accelerator
    if accelerator is None:
        yield model
        return
    if any(isinstance(module, FSDP1) for module in model.modules()):
        raise InputError(
            "FSDP1 cannot sample while each rank has its own number of prompts: set fsdp_config to version 2, or "
            "diversity_backend to a vLLM backend"
        )
    bare = accelerator.unwrap_model(model)
    was_checkpointing, kwargs = bare.is_gradient_checkpointing, request.gradient_checkpointing_kwargs
    try:
        with unsharded(bare), _without_forward_check(model), unwrap_model_for_generation(model, accelerator) as whole:
            try:
                yield whole
            finally:
                release_parameters(bare)
    finally:
        # TRL turns it on again with default arguments (up to 1.15), and not at all after an error
        if was_checkpointing and (kwargs or not bare.is_gradient_checkpointing):
            bare.gradient_checkpointing_enable(kwargs)


def release_parameters(model) -> None:
    """Let ZeRO-3 take weights back: a forward pass without a backward pass leaves them marked as in use."""
    for parameter in model.parameters():
        getattr(parameter, "ds_active_sub_modules", set()).clear()


@contextmanager
def _without_forward_check(engine):
    """Take off the hook by which ZeRO-3 compares, at the start of a forward pass, what its ranks have run so far.

    TRL takes off the other hooks. In this hook a rank would wait for a rank that failed or has nothing to decode.
    """
    offload = getattr(getattr(engine, "optimizer", None), "parameter_offload", None)
    if getattr(offload, "fwd_pre_hook", None) is None:
        yield
        return
    hooks = offload.module._forward_pre_hooks
    before = dict(hooks)
    hooks.pop(offload.fwd_pre_hook.id, None)
    try:
        yield
    finally:
        hooks.clear()
        hooks.update(before)  # in their order


@contextmanager
def unsharded(model):
    """Keep all units of an FSDP2 model whole inside the block, as TRL does with ZeRO-3; leave other models alone.

    Otherwise decoding would gather every layer for every token, and wait for the rank with the longest samples.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not units:
        yield
        return
    states = [unit._get_fsdp_state() for unit in units]
    states[0]._lazy_init()  # as the first forward does; it decides whether the root is sharded after its forward
    groups = [group for state in states for group in state._fsdp_param_groups]
    kept = [group.post_forward_mesh_info for group in groups]
    try:
        for unit in units:
            unit.unshard()
        for group in groups:
            group.post_forward_mesh_info = None  # the unit stays whole after a forward
        yield
    finally:
        for group, mesh_info in zip(groups, kept, strict=True):
            group.post_forward_mesh_info = mesh_info
        for unit in units:
            unit.reshard()
