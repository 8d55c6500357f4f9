"""A stand-in for vLLM, which the tests do not run.

TRL's classes are autospecced from the installed ones, so that a test fails when their signatures change. They draw
with transformers, from the weights that TRL's own syncing hands over.
"""

import copy
import inspect
import random
from unittest.mock import DEFAULT, MagicMock, create_autospec

import torch
from trl.distributed import DistributedBackend
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration

from aesl_trl.sampling import vllm_synced


class StandIn:
    """Takes the place of `VLLMGeneration` in sampling/vllm_synced.py.

    Attributes:
        made: the autospecced class; its calls are checked against the constructor's signature.
        generation: the instance that the class returns.
        client: an autospecced VLLMClient.
        served: the model as TRL's syncing has last brought it over, or None before that.
        events: names of the calls, in order.
        fail: name of an event -> the exception that it raises.
    """

    def __init__(self, monkeypatch):
        self.made = create_autospec(VLLMGeneration)
        self.made.side_effect = self._construct
        self.generation = self.made.return_value
        self.generation.generate.side_effect = self._generate
        self.generation.sync_weights.side_effect = self._sync
        self.client = create_autospec(VLLMClient, instance=True)
        self.client.generate.side_effect = self._answer
        self.client.check_server.side_effect = lambda *args: self._event("check_server")
        self.client.update_named_params.side_effect = lambda metadata, named: self._load(named)
        self.served, self.events, self.fail = None, [], {}
        monkeypatch.setattr(vllm_synced, "VLLMGeneration", self.made)

    def _event(self, name):
        self.events.append(name)
        if name in self.fail:
            raise self.fail[name]

    def _construct(self, *args, **kwargs):
        """Keep the arguments as attributes, as TRL does, and take over the random states, as vLLM does."""
        self._event("start")
        bound = inspect.signature(VLLMGeneration.__init__).bind(None, *args, **kwargs)
        bound.apply_defaults()
        for name, value in list(bound.arguments.items())[1:]:
            setattr(self.generation, name, value)
        self.generation._weight_metadata = None
        self.generation._dist = DistributedBackend(self.generation.accelerator)
        self.generation.vllm_client = self.client
        self.generation.llm = MagicMock()
        random.seed(0)
        torch.manual_seed(0)
        self.generation.accelerator.wait_for_everyone()  # as TRL's does at its end
        return DEFAULT

    # ---- Weights, by TRL's own code

    def _sync(self):
        real = VLLMGeneration.__new__(VLLMGeneration)
        names = ("model", "accelerator", "_dist", "mode", "_weight_metadata", "vllm_client", "llm")
        for name in names:
            setattr(real, name, getattr(self.generation, name))
        real.enable_sleep_mode = False
        runner = real.llm.llm_engine.model_executor.driver_worker.model_runner
        runner.model.load_weights.side_effect = self._load
        self._event("sync")
        real.sync_weights()

    def _load(self, named):
        if self.served is None:
            model = self.generation.model
            model = model.get_base_model() if hasattr(model, "get_base_model") else model
            with torch.random.fork_rng():
                self.served = type(model)(copy.deepcopy(model.config)).to(model.dtype).eval()
        parameters = dict(self.served.named_parameters())
        for name, value in named:
            self._event("load")
            parameters[name].data.copy_(value)

    # ---- Samples

    def _generate(self, prompts, images, num_generations, profiler=None):
        self._event("generate")
        assert images is None and len(prompts) % num_generations == 0
        samples = [self._sample(prompt, None) for prompt in prompts]
        return prompts, *_columns(samples)

    def _answer(self, prompts, features=None, n=1, generation_kwargs=None, **settings):
        self._event("generate")
        samples = []
        for prompt in prompts:
            for place in range(n):
                generator = torch.Generator().manual_seed(generation_kwargs["seed"] + place)
                samples.append(self._sample(prompt, generator))
        completion_ids, logprobs, token_ids = _columns(samples)
        return {
            "prompt_ids": prompts,
            "completion_ids": completion_ids,
            "logprobs": logprobs,
            "logprob_token_ids": token_ids,
        }

    @torch.no_grad()
    def _sample(self, prompt, generator):
        """Return (ids, log-probabilities) of one sample, at the temperature of the sampling ("processed")."""
        settings, ids, values = self.generation, [], []
        while len(ids) < settings.max_completion_length:
            logits = self.served(torch.tensor([prompt + ids])).logits[0, -1].float() / settings.temperature
            log_probs = logits.log_softmax(-1)
            token = torch.multinomial(log_probs.exp(), 1, generator=generator).item()
            ids.append(token)
            values.append(log_probs[token].item())
            if token in settings.generation_kwargs["stop_token_ids"]:
                break
        return ids, values


def _columns(samples):
    """Return the shapes of TRL: ids, and for each token the list of its alternatives, here one."""
    return (
        [ids for ids, _ in samples],
        [[[value] for value in values] for _, values in samples],
        [[[token] for token in ids] for ids, _ in samples],
    )
