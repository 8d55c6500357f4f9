"""Samples of a model under training by vLLM, through TRL's `VLLMGeneration`: its engine, weight syncing, sleep mode.

TRL brings the weights over, also those of FSDP2, of ZeRO-3 and of adapters. It merges adapters into the base for that
and takes them out again. In bf16 that changes the base by rounding, and an error in between leaves adapters merged. We
undo both, so that the training goes on with the bits that it had.

A colocated engine runs in this process and draws from its random states, which we seed for each rank and restore. A
server gets a seed with each prompt. With one seed for all prompts of a call (`generation_kwargs`), sample i of every
prompt would have the same noise: prompts would not be independent, and the intervals over them too narrow.

Not handled: a rank that fails inside TRL's syncing of *sharded* weights, with the others in the same gather, is ended
by the process group's own timeout. An engine that could not be started is not tried again.
"""

import math
import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from trl.distributed import DistributedBackend
from trl.generation.vllm_generation import VLLMGeneration

from ..models.loading import release_memory
from ..models.tokens import stop_ids
from .backends import VLLMSettings
from .draws import Draw, Request, SamplingFailed, failure_on_any_rank, is_out_of_memory
from .generate import release_parameters
from .rescoring import rescore


CONCURRENT_REQUESTS = 64  # to a server, which batches them
MAX_NUM_SEQS = 256  # that a colocated engine decodes at once: more prompts wait, and take no more memory


class SyncedVLLM:
    """Draws with a vLLM that is started at the first draw and gets the model's weights before each draw.

    `name` is `"vllm_colocate"` or `"vllm_server"`; [`~aesl_trl.sampling.rescoring.rescore`] scores
    `rescore_batch_size` samples at once. When memory runs out, a smaller batch would not help: a colocated engine
    takes its memory in advance (`gpu_memory_utilization`), whatever the number of prompts.
    """

    batch_size = None

    def __init__(self, name: str, settings: VLLMSettings, rescore_batch_size: int = 1):
        self.name = name
        self.settings = settings
        self.rescore_batch_size = rescore_batch_size
        self.generation: VLLMGeneration | None = None
        self._broken: str | None = None  # why the engine could not be started

    def draw(self, request: Request) -> list[Draw]:
        """Draw as [`~aesl_trl.sampling.draws.Engine`] says.

        At temperature 1 `neg_log_prob` is known and `entropy` is not. At another temperature the model itself scores
        the samples, which gives both.
        """
        if self._broken:
            raise SamplingFailed(self._broken)
        bare = request.accelerator.unwrap_model(request.model)
        if self.generation is None:
            self._start(bare, request)
        self.generation.model = bare
        # Each step ends in an agreement: a rank must not be in the next step's collective while another has failed
        if self.name == "vllm_server":
            with self._failing_together(request):  # a server may be gone: found out before ranks gather weights
                if request.accelerator.is_main_process:
                    self.generation.vllm_client.check_server()
        with self._failing_together(request):
            release_parameters(bare)
            with preserved_base(bare):
                self.generation.sync_weights()
        answers = self._from_server(request) if self.name == "vllm_server" else self._colocated(request)
        temperature = request.settings.temperature
        stops = set(stop_ids(request.tokenizer, bare.generation_config.eos_token_id))
        with self._failing_together(request):
            drawn = _as_draws(answers, stops, temperature)
        if temperature != 1.0:
            with self._failing_together(request):
                drawn = self._rescore(bare, drawn, request)
        return drawn

    @contextmanager
    def _failing_together(self, request: Request):
        """Raise [`SamplingFailed`] on all ranks at the end of the block when one of them failed inside it."""
        error = None
        try:
            yield
        except Exception as caught:
            error = caught.with_traceback(None) if is_out_of_memory(caught) else caught
        failure = failure_on_any_rank(error, request.accelerator)
        if failure is None:
            return
        if self.name == "vllm_colocate" and self.generation.enable_sleep_mode:
            # The training needs the engine's memory; it may be asleep already, or beyond sleeping
            with suppress(Exception):
                self.generation.llm.sleep(level=2)
                self.generation._llm_weights_sleeping = True
        release_memory()
        hint = "; lower vllm_gpu_memory_utilization" if failure.is_memory and self.name == "vllm_colocate" else ""
        raise SamplingFailed(failure.reason + hint) from error

    def _start(self, bare, request: Request) -> None:
        request.say(f"aesl_trl: starting {self.name} for the diversity samples")
        error = None
        try:
            self.generation = VLLMGeneration(**self._arguments(bare, request))
        except Exception as caught:
            error = caught.with_traceback(None) if is_out_of_memory(caught) else caught
            # The constructor ends with a barrier, where ranks that succeeded are waiting for this one
            request.accelerator.wait_for_everyone()
        failure = failure_on_any_rank(error, request.accelerator)
        if failure is not None:
            self.generation = None
            self._broken = f"{self.name} could not be started: {failure.reason}"
            release_memory()
            raise SamplingFailed(self._broken) from error

    def _arguments(self, bare, request: Request) -> dict:
        """Return the arguments of `VLLMGeneration` by name; TRL's defaults fill in the others."""
        settings, max_new_tokens = self.settings, request.settings.max_new_tokens
        arguments = {
            "model": bare,
            "accelerator": request.accelerator,
            "processing_class": request.tokenizer,
            "temperature": request.settings.temperature,
            # All are set: an engine takes a setting that it is not given from the model's generation config
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "max_completion_length": max_new_tokens,
            "logprobs": 0,  # of the sampled token alone
            "generation_kwargs": {"stop_token_ids": stop_ids(request.tokenizer, bare.generation_config.eos_token_id)},
        }
        if self.name == "vllm_server":
            address = {"server_base_url": settings.server, "group_port": settings.group_port}
            return {**arguments, **address, "mode": "server", "server_timeout": settings.server_timeout}
        limit = getattr(bare.config.get_text_config(), "max_position_embeddings", None) or math.inf
        return {
            **arguments,
            "mode": "colocate",
            "gpu_memory_utilization": settings.gpu_memory_utilization,
            "enable_sleep_mode": settings.enable_sleep_mode,
            "max_model_length": int(min(request.longest + max_new_tokens, limit)),
            "max_num_seqs": MAX_NUM_SEQS,
        }

    def _colocated(self, request: Request) -> list[tuple]:
        """Return (token ids, log-probabilities) of each sample."""
        random.seed(request.rank_seed)
        np.random.seed(request.rank_seed % 2**32)
        torch.manual_seed(request.rank_seed)
        # A rank without prompts takes part with a prompt whose samples are thrown away
        prompts = request.prompt_of_each_sample or [[0]]
        with self._failing_together(request):
            _, completion_ids, logprobs, _ = self.generation.generate(
                prompts=prompts, images=None, num_generations=request.piece.samples
            )
        answers = list(zip(completion_ids, logprobs, strict=True))
        request.show(len(request.prompt_of_each_sample))
        return answers[: len(request.prompt_of_each_sample)]

    def _from_server(self, request: Request) -> list[tuple]:
        """Return the same; the first rank asks for the prompts of all ranks and hands the answers out."""
        accelerator, own = request.accelerator, list(zip(request.indices, request.prompts, strict=True))
        of_all_ranks = gather_object(own) if accelerator.num_processes > 1 else own
        answers, num = None, len(request.prompt_of_each_sample)
        with self._failing_together(request):
            if accelerator.is_main_process:
                answers = {}
                with ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
                    found = pool.map(lambda item: self._ask(*item, request), of_all_ranks)
                    for (index, _), answer in zip(of_all_ranks, found, strict=True):
                        answers[index] = answer
                        request.show(num * len(answers) // len(of_all_ranks))
        if accelerator.num_processes > 1:
            answers = broadcast_object_list([answers])[0]
        return [sample for index in request.indices for sample in answers[index]]

    def _ask(self, index: int, prompt: list[int], request: Request) -> list[tuple]:
        """Return the server's answers to one prompt."""
        generation, samples = self.generation, request.piece.samples
        # vLLM gives sample i of a request the seed + i
        seed = (request.seed * 1_000_003 + index * samples) % 2**31
        output = generation.vllm_client.generate(
            prompts=[prompt],
            n=samples,
            repetition_penalty=generation.repetition_penalty,
            temperature=generation.temperature,
            top_p=generation.top_p,
            top_k=generation.top_k,
            min_p=generation.min_p,
            max_tokens=generation.max_completion_length,
            logprobs=generation.logprobs,
            generation_kwargs={**generation.generation_kwargs, "seed": seed},
        )
        return list(zip(output["completion_ids"], output["logprobs"], strict=True))

    def _rescore(self, bare, drawn: list[Draw], request: Request) -> list[Draw]:
        """Score the samples, through the wrapper where it shards: its forward gathers the weights on all ranks."""
        accelerator, size = request.accelerator, self.rescore_batch_size
        sharded = DistributedBackend(accelerator).is_zero3 or isinstance(bare, FSDPModule)
        most = -(-request.num_prompts // accelerator.num_processes) if sharded else len(request.prompts)
        prompts = request.prompt_of_each_sample
        if not drawn and sharded:  # this rank takes part with a sample that is thrown away
            drawn, prompts = [Draw([0], False, None, None, None)], [[0]]
        scored = rescore(
            request.model if sharded else bare,
            prompts,
            drawn,
            batch_size=size,
            num_batches=-(-most * request.piece.samples // size),
            pad_id=request.tokenizer.eos_token_id,
            device=accelerator.device,
        )
        return scored[: len(request.prompt_of_each_sample)]


def _as_draws(answers: list[tuple], stops: set[int], temperature: float) -> list[Draw]:
    """Turn vLLM's answers into draws.

    vLLM's log-probabilities are those at the temperature of the sampling, so we use them only where that is 1.
    """
    drawn = []
    for ids, logprobs in answers:
        if not ids:
            raise RuntimeError("vLLM returned a sample without a token")
        stopped, neg_log_prob, end = ids[-1] in stops, None, None
        if temperature == 1.0:
            values = [math.nan if alternatives[0] is None else alternatives[0] for alternatives in logprobs]
            neg_log_prob, end = -math.fsum(values) / len(values), math.exp(values[-1]) if stopped else None
        drawn.append(Draw(list(ids), stopped, None, neg_log_prob, end))
    return drawn


@contextmanager
def preserved_base(model):
    """Restore, bit for bit, the weights under adapters and the adapters' state at the end of the block.

    Copies lie in the machine's memory, not the GPU's. ZeRO-3 merges in gathered copies, which are dropped: its weights
    are empty here, and only the adapters' state is put back.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    kept = [
        (owner, name, parameter, None if parameter.numel() == 0 else _local(parameter).to("cpu", copy=True))
        for layer in layers
        for owner in layer.get_base_layer().modules()
        for name, parameter in owner.named_parameters(recurse=False)
    ]
    merged = [list(layer.merged_adapters) for layer in layers]
    try:
        yield
    finally:
        for layer, adapters in zip(layers, merged, strict=True):
            layer.merged_adapters[:] = adapters
        with torch.no_grad():
            for owner, name, parameter, copy in kept:
                owner._parameters[name] = parameter  # quantized weights are replaced by others when they are merged
                if copy is not None:
                    _local(parameter).copy_(copy)


def _local(parameter):
    """Return this rank's part of a parameter."""
    tensor = parameter.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
