"""Engines that load a model from its folder and draw one piece of an evaluation at a time.

The vLLM engine is written against vLLM's documented interface (https://docs.vllm.ai/en/latest/api/vllm/), in the names
that TRL's own `trl.generation.vllm_generation` uses: `LLM.generate` on prompts of token ids, a `SamplingParams` for
each prompt with its own seed, and `RequestOutput.outputs`. It has no LoRA requests (an adapter is merged first, or
sampled by transformers), no data parallelism over processes, and no exact entropy, which vLLM does not return.
"""

import math
from dataclasses import replace

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from ..diversity.figures import Group
from ..models.folder import ModelFolder
from ..models.loading import load_model, load_processing_class, put_adapter, release_memory
from ..models.tokens import stop_ids
from .draws import Draw, Piece, Request, SamplingSettings, draw_seed
from .generate import GenerateEngine
from .groups import sample_groups


class OfflineEngine:
    """An engine with a model of its own, in memory from its construction until `close`."""

    batch_size = model = tokenizer = None

    def __init__(self, settings: SamplingSettings, accelerator):
        self.settings = settings
        self.accelerator = accelerator

    def sample(self, rows: list[dict], piece: Piece) -> list[Group]:
        """Return the groups of `rows`, the problems of `piece`, on every process; their token ids are not kept."""
        how = {"engine": self, "piece": piece, "accelerator": self.accelerator}
        groups = sample_groups(self.model, self.tokenizer, rows, self.settings, **how)
        return [replace(group, token_ids=None) for group in groups]

    def close(self) -> None:
        """Free the model's memory."""
        self.model = None
        release_memory()


def open_engine(backend: str, path: str, settings: SamplingSettings, accelerator) -> OfflineEngine:
    """Load the model `path` into the engine that `choose_engine` named."""
    return {"vllm": OfflineVLLM, "transformers": OfflineTransformers}[backend](path, settings, accelerator)


class OfflineTransformers(OfflineEngine):
    """A loaded model, or an adapter on the base that it names; `accelerator` splits the problems of a piece."""

    name = "transformers"

    def __init__(self, path: str, settings: SamplingSettings, accelerator):
        super().__init__(settings, accelerator)
        how = {"dtype": settings.dtype, "trust_remote_code": settings.trust_remote_code}
        self.model, self.tokenizer = load(path, str(accelerator.device), **how)

    def draw(self, request: Request) -> list[Draw]:
        """Draw with `model.generate`, each piece with the batch size that was asked for."""
        return GenerateEngine(self.settings.batch_size).draw(request)


class OfflineVLLM(OfflineEngine):
    """A model that vLLM has loaded, in one process."""

    name = "vllm"

    def __init__(self, path: str, settings: SamplingSettings, accelerator=None):
        from vllm import LLM

        super().__init__(settings, accelerator)
        self._llm = LLM(
            model=path,
            tensor_parallel_size=settings.tensor_parallel_size,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            max_model_len=settings.max_model_len,
            dtype=settings.dtype,
            trust_remote_code=settings.trust_remote_code,
            seed=settings.seed,
            logprobs_mode="raw_logprobs",  # at temperature 1, whatever the sampling's
        )
        self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=settings.trust_remote_code)
        try:
            declared = GenerationConfig.from_pretrained(path).eos_token_id
        except OSError:  # the model has no generation config: its own config names the end tokens
            config = AutoConfig.from_pretrained(path, trust_remote_code=settings.trust_remote_code)
            declared = config.get_text_config().eos_token_id
        self._stops = stop_ids(self.tokenizer, declared)

    def draw(self, request: Request) -> list[Draw]:
        """Draw all prompts in one call; each problem has its own seed."""
        from vllm import SamplingParams

        settings, piece = self.settings, request.piece
        params = [
            SamplingParams(
                n=piece.samples,
                seed=draw_seed(settings.seed, piece.first + index, piece.chunk),
                temperature=settings.temperature,
                # All are set, as for transformers: nothing comes from the model's own generation config
                top_p=1.0,
                top_k=0,
                min_p=0.0,
                repetition_penalty=1.0,
                max_tokens=settings.max_new_tokens,
                stop_token_ids=self._stops,
                logprobs=0,  # those of the sampled tokens alone
            )
            for index in request.indices
        ]
        prompts = [{"prompt_token_ids": ids} for ids in request.prompts]
        drawn = []
        for output in self._llm.generate(prompts, sampling_params=params, use_tqdm=False):
            for sample in sorted(output.outputs, key=lambda sample: sample.index):
                # For each position vLLM gives {token: Logprob}. The model's own log-probabilities, at temperature 1,
                # estimate its entropy only on samples that were drawn at temperature 1
                pairs = zip(sample.token_ids, sample.logprobs, strict=True)
                nats = -math.fsum(at[token].logprob for token, at in pairs) / max(len(sample.token_ids), 1)
                neg_log_prob = nats if settings.temperature == 1 else None
                stopped = sample.finish_reason != "length"
                drawn.append(Draw(list(sample.token_ids), stopped, None, neg_log_prob, None, sample.text))
        return drawn

    def close(self) -> None:
        """Free the model's memory."""
        del self._llm
        super().close()


def load(path: str, device: str, *, dtype: str = "auto", trust_remote_code: bool = False) -> tuple:
    """Return model and tokenizer at `path`; an adapter comes on the base that it names, with the files beside it."""
    found = ModelFolder.find(path)
    tokenizer = load_processing_class(found.tokenizer_at, trust_remote_code=trust_remote_code)
    model = load_model(found.config_at, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    return put_adapter(model, path, found.base).eval() if found.is_adapter else model, tokenizer
