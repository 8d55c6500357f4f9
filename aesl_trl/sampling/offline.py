"""Answers of a model by vLLM, offline, one piece of an evaluation at a time; and which of the two engines is taken.

Written against vLLM's documented interface (https://docs.vllm.ai/en/latest/api/vllm/), in the names that TRL's own
`trl.generation.vllm_generation` uses: `LLM.generate` on prompts of token ids, a `SamplingParams` for each with its
own seed, and `RequestOutput.outputs`. Left out: LoRA requests (an adapter is merged first, or sampled by
transformers), data parallelism over processes, and the exact entropy, which vLLM does not return.
"""

import math
from pathlib import Path

from ..diversity.figures import Group
from ..models.folder import ADAPTER_CONFIG, TOKENIZER_CONFIG, base_of
from ..models.loading import load_model, put_adapter, release_memory
from ..models.tokens import end_of_turn, prompt_tokens, stop_at_turn_end
from .draws import Piece, draw_seed
from .groups import sample_groups


class TransformersEngine:
    """A loaded model; `close` frees its memory.

    Args:
        path: a folder or a name on the hub; an adapter comes on the base that it names.
        args: [`~evaluate.EvalArguments`].
        accelerator: splits the problems of a piece over its processes.
    """

    name = "transformers"

    def __init__(self, path: str, args, accelerator):
        self._args, self._accelerator = args, accelerator
        self._model, self._tokenizer = load(path, str(accelerator.device), trust_remote_code=args.trust_remote_code)

    def draw(self, rows: list[dict], piece: Piece) -> list[Group]:
        """The groups of `rows`, the problems of `piece`, on every process."""
        args = self._args
        if isinstance(rows[0]["prompt"], list):
            stop_at_turn_end(self._model, self._tokenizer)
        return sample_groups(
            self._model,
            self._tokenizer,
            rows,
            samples=piece.samples,
            temperature=args.temperature,
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
            seed=draw_seed(args.seed, piece.first, piece.chunk),
            accelerator=self._accelerator,
        )

    def close(self) -> None:
        del self._model
        release_memory()


def open_engine(backend: str, path: str, args, accelerator) -> "OfflineVLLM | TransformersEngine":
    """The engine that `choose_engine` named, its model loaded."""
    return OfflineVLLM(path, args) if backend == "vllm" else TransformersEngine(path, args, accelerator)


class OfflineVLLM:
    """A loaded model; `close` frees its memory.

    Args:
        path: a folder or a name on the hub.
        args: [`~evaluate.EvalArguments`].
    """

    name = "vllm"

    def __init__(self, path: str, args):
        from transformers import AutoTokenizer
        from vllm import LLM

        self._args = args
        self._llm = LLM(
            model=path,
            tensor_parallel_size=args.tensor_parallel_size,
            gpu_memory_utilization=args.gpu_memory_utilization,
            max_model_len=args.max_model_len,
            trust_remote_code=args.trust_remote_code,
            seed=args.seed,
            logprobs_mode="raw_logprobs",  # at temperature 1, whatever is sampled at
        )
        self._tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=args.trust_remote_code)
        self._eos = generation_stops(path, args.trust_remote_code)

    def draw(self, rows: list[dict], piece: Piece) -> list[Group]:
        """The groups of `rows`, the problems of `piece`; each problem's draw has its own seed."""
        prompts = [{"prompt_token_ids": prompt_tokens(self._tokenizer, row["prompt"])} for row in rows]
        stops = self._stops(rows)
        params = [self._sampling_params(piece, piece.first + offset, stops) for offset in range(len(rows))]
        outputs = self._llm.generate(prompts, sampling_params=params, use_tqdm=False)
        pairs = zip(rows, outputs, strict=True)
        return [as_group(row["prompt"], output.outputs, self._args.temperature) for row, output in pairs]

    def _sampling_params(self, piece: Piece, problem: int, stops: list[int]):
        from vllm import SamplingParams

        return SamplingParams(
            n=piece.samples,
            seed=draw_seed(self._args.seed, problem, piece.chunk),
            temperature=self._args.temperature,
            # Said in full, as for transformers: nothing comes from the model's own generation config
            top_p=1.0,
            top_k=0,
            min_p=0.0,
            repetition_penalty=1.0,
            max_tokens=self._args.max_new_tokens,
            stop_token_ids=stops,
            logprobs=0,  # those of the sampled tokens
        )

    def _stops(self, rows: list[dict]) -> list[int]:
        turn_end = end_of_turn(self._tokenizer) if isinstance(rows[0]["prompt"], list) else None
        return sorted({self._tokenizer.eos_token_id, turn_end, *self._eos} - {None})

    def close(self) -> None:
        del self._llm
        release_memory()


def generation_stops(path: str, trust_remote_code: bool) -> list[int]:
    """The end tokens that the model's generation config names, else those of its config."""
    from transformers import AutoConfig, GenerationConfig

    try:
        ids = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:
        ids = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code).get_text_config().eos_token_id
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def as_group(prompt: str | list[dict], outputs: list, temperature: float) -> Group:
    """The `CompletionOutput`s of one request as a group.

    The log-probabilities are the model's own, at temperature 1, and their mean estimates its entropy only on samples
    that were drawn at temperature 1.
    """
    outputs = sorted(outputs, key=lambda output: output.index)
    return Group(
        prompt=prompt,
        completions=[output.text for output in outputs],
        num_tokens=[len(output.token_ids) for output in outputs],
        truncated=[output.finish_reason == "length" for output in outputs],
        entropy=[None for _ in outputs],
        neg_log_prob=[_neg_log_prob(output) for output in outputs] if temperature == 1 else None,
    )


def _neg_log_prob(output) -> float:
    """Nats per token; of each position vLLM gives {token: Logprob}, the sampled token among them."""
    pairs = zip(output.token_ids, output.logprobs, strict=True)
    return -math.fsum(at[token].logprob for token, at in pairs) / max(len(output.token_ids), 1)


def load(path: str, device: str, *, trust_remote_code: bool = False) -> tuple:
    """Model and tokenizer at `path`; an adapter comes on the base that it names, with the files that lie beside it."""
    from transformers import AutoTokenizer, GenerationConfig

    if not (Path(path) / ADAPTER_CONFIG).is_file():
        model = load_model(path, device=device, trust_remote_code=trust_remote_code)
        return model, AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    base = base_of(path, "model")
    model = put_adapter(load_model(base, device=device, trust_remote_code=trust_remote_code), path, base).eval()
    if (Path(path) / "generation_config.json").is_file():
        model.base_model.model.generation_config = GenerationConfig.from_pretrained(path)
    beside = path if (Path(path) / TOKENIZER_CONFIG).is_file() else base
    return model, AutoTokenizer.from_pretrained(beside, trust_remote_code=trust_remote_code)
