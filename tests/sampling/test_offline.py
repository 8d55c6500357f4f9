"""The vLLM engine against a stand-in that takes the names of vLLM's interface and no others.

vLLM itself is not run here. The names are those of its documentation, and of TRL's own calls wherever TRL makes them.
"""

import ast
import importlib.machinery
import importlib.util
import inspect
import shutil
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tiny_models import build_tokenizer
from transformers import GenerationConfig

from aesl_trl.sampling import offline
from aesl_trl.sampling.draws import Piece, SamplingSettings, draw_seed
from aesl_trl.sampling.offline import OfflineVLLM


# Of https://docs.vllm.ai/en/v0.8.3/api/inference_params.html; TRL leaves both to the user's generation_kwargs
DOCUMENTED_ONLY = {"seed", "stop_token_ids"}
CHAT = [{"role": "user", "content": "1+1?"}]


def called_with(tree: ast.AST, name: str) -> set[str]:
    """The keywords of the calls of `name`."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(name)]
    return {keyword.arg for call in calls for keyword in call.keywords if keyword.arg}


@pytest.fixture(scope="module")
def trl_source() -> ast.AST:
    spec = importlib.util.find_spec("trl.generation.vllm_generation")
    return ast.parse(Path(spec.origin).read_text())


def test_every_name_is_one_that_trl_uses(trl_source):
    ours = ast.parse(inspect.getsource(offline))
    imported = {
        alias.name for node in ast.walk(trl_source) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert {"LLM", "SamplingParams"} <= imported
    assert called_with(ours, "LLM") - called_with(trl_source, "LLM") == {"dtype"}  # documented, and not TRL's
    assert called_with(ours, ".generate") == called_with(trl_source, "self.llm.generate")
    settings = {
        key.value
        for node in ast.walk(trl_source)
        if isinstance(node, ast.Dict)
        for key in node.keys
        if isinstance(key, ast.Constant)
    }
    assert called_with(ours, "SamplingParams") - settings == DOCUMENTED_ONLY
    assert "prompt_token_ids" in settings  # the form of a prompt
    read = {node.attr for node in ast.walk(trl_source) if isinstance(node, ast.Attribute)}
    assert {"outputs", "token_ids", "logprobs", "logprob"} <= read


@dataclass
class SamplingParams:
    n: int
    seed: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    max_tokens: int
    stop_token_ids: list[int]
    logprobs: int


@dataclass
class Logprob:
    logprob: float


@dataclass
class Completion:
    index: int
    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[dict] = field(default_factory=list)


@dataclass
class RequestOutput:
    outputs: list[Completion]


class LLM:
    """Answers with the seed that it was given, the samples in reverse order."""

    made: list["LLM"] = []

    def __init__(
        self,
        *,
        model,
        tensor_parallel_size,
        gpu_memory_utilization,
        max_model_len,
        dtype,
        trust_remote_code,
        seed,
        logprobs_mode,
    ):
        self.settings = {
            "model": model,
            "max_model_len": max_model_len,
            "dtype": dtype,
            "logprobs_mode": logprobs_mode,
        }
        self.requests = []
        LLM.made.append(self)

    def generate(self, prompts, *, sampling_params, use_tqdm):
        self.requests += list(zip(prompts, sampling_params, strict=True))
        return [
            RequestOutput([self._answer(params, i) for i in reversed(range(params.n))]) for params in sampling_params
        ]

    def _answer(self, params, index):
        ids = [5] * (index + 1)
        reason = "length" if index == params.n - 1 else "stop"
        return Completion(
            index, f"{params.seed + index}", ids, reason, [{5: Logprob(-0.5 * (index + 1))} for _ in ids]
        )


@pytest.fixture
def vllm(monkeypatch):
    """`vllm` as an installed module."""
    module = types.ModuleType("vllm")
    module.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    module.LLM, module.SamplingParams = LLM, SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(LLM, "made", [])
    return module


def test_each_problem_is_drawn_from_its_own_seed(vllm, tiny_model_dir):
    settings = SamplingSettings(3, temperature=0.6, max_new_tokens=32, seed=5, max_model_len=128, dtype="bfloat16")
    engine = OfflineVLLM(tiny_model_dir, settings)
    groups = engine.sample([{"prompt": CHAT}, {"prompt": "2+2="}], Piece(3, 2, 1, 3))
    assert [group.prompt for group in groups] == [CHAT, "2+2="]
    for problem, group in zip((3, 4), groups, strict=True):
        assert group.completions == [str(draw_seed(5, problem, 1) + i) for i in range(3)]  # in order again
        assert group.num_tokens == [1, 2, 3] and group.truncated == [False, False, True]
    (llm,) = LLM.made
    given = {"model": tiny_model_dir, "max_model_len": 128, "dtype": "bfloat16", "logprobs_mode": "raw_logprobs"}
    assert llm.settings == given
    tokenizer = build_tokenizer()
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    prompts = [prompt["prompt_token_ids"] for prompt, _ in llm.requests]
    assert prompts == [tokenizer(text)["input_ids"], tokenizer("2+2=")["input_ids"]]
    params = llm.requests[0][1]
    assert (params.temperature, params.max_tokens, params.n) == (0.6, 32, 3)
    assert params.stop_token_ids == [tokenizer.eos_token_id]
    assert (params.top_p, params.top_k, params.min_p, params.repetition_penalty) == (1.0, 0, 0.0, 1.0)


def test_a_base_models_samples_end_with_the_templates_turn(vllm, tiny_model_dir, tmp_path):
    """Of texts too: the handoff writes down the same tokens, whatever the prompts are."""
    base = build_tokenizer()
    base.eos_token = "<|endoftext|>"
    shutil.copytree(tiny_model_dir, tmp_path / "base")
    base.save_pretrained(tmp_path / "base")
    GenerationConfig(eos_token_id=base.eos_token_id).save_pretrained(tmp_path / "base")
    OfflineVLLM(str(tmp_path / "base"), SamplingSettings(1, 1.0, 8)).sample([{"prompt": "2+2="}], Piece(0, 1, 0, 1))
    params = LLM.made[0].requests[0][1]
    assert params.stop_token_ids == base.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, [0.5, 1.0]), (0.6, [None, None])])
def test_entropy_is_estimated_where_samples_are_the_models_own(vllm, tiny_model_dir, temperature, expected):
    engine = OfflineVLLM(tiny_model_dir, SamplingSettings(2, temperature, max_new_tokens=8))
    (group,) = engine.sample([{"prompt": CHAT}], Piece(0, 1, 0, 2))
    assert group.neg_log_prob == expected and group.entropy == group.eos_prob == [None, None]
