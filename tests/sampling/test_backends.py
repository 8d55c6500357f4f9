"""The choice of an engine, for a training's samples and for a model in a folder."""

import importlib.machinery
import importlib.util
import sys
import types

import pytest

from aesl_trl.errors import InputError
from aesl_trl.sampling import backends
from aesl_trl.sampling.backends import VLLMSettings, check_backend, choose_backend, choose_engine


SERVER = VLLMSettings(server_base_url="http://localhost:8000")


# ---- A training's samples


@pytest.mark.parametrize(
    ("backend", "vllm", "gpu", "settings", "obstacle", "expected"),
    [
        ("auto", True, True, VLLMSettings(), None, "vllm_colocate"),
        ("auto", True, True, SERVER, None, "vllm_server"),  # named by the user
        ("auto", True, False, SERVER, None, "vllm_server"),
        ("auto", True, False, VLLMSettings(), None, "generate"),
        ("auto", False, True, VLLMSettings(), None, "generate"),
        ("auto", True, True, VLLMSettings(), "8-bit", "generate"),
        ("generate", True, True, SERVER, None, "generate"),
        ("vllm_colocate", True, True, VLLMSettings(), None, "vllm_colocate"),
        ("vllm_server", True, False, SERVER, None, "vllm_server"),
    ],
)
def test_choice(backend, vllm, gpu, settings, obstacle, expected, monkeypatch):
    monkeypatch.setattr(backends, "is_vllm_available", lambda: vllm)
    monkeypatch.setattr(backends, "_has_gpu", lambda: gpu)
    chosen, why = choose_backend(backend, settings, obstacle)
    assert chosen == expected
    assert why == "as set" if backend != "auto" else why.startswith("auto: ")


@pytest.mark.parametrize(
    ("backend", "vllm", "gpu", "settings", "message"),
    [
        ("vllm_colocate", False, True, VLLMSettings(), "vLLM is not installed: pip install 'vllm>=0.31'"),
        ("vllm_server", False, True, SERVER, r"diversity_backend is 'vllm_server', but vLLM is not installed"),
        ("auto", False, True, SERVER, r"diversity_vllm_server_base_url is 'http://localhost:8000', but vLLM is not"),
        ("vllm_colocate", True, False, VLLMSettings(), "there is no CUDA GPU"),
        ("vllm_server", True, True, VLLMSettings(), "no server is named: set diversity_vllm_server_base_url"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(backend, vllm, gpu, settings, message, monkeypatch):
    monkeypatch.setattr(backends, "is_vllm_available", lambda: vllm)
    monkeypatch.setattr(backends, "_has_gpu", lambda: gpu)
    with pytest.raises(InputError, match=message) as error:
        check_backend(backend, settings, prefix="diversity_")
    assert "\n" not in str(error.value)


def test_an_obstacle_is_refused_where_vllm_is_asked_for(monkeypatch):
    monkeypatch.setattr(backends, "is_vllm_available", lambda: True)
    monkeypatch.setattr(backends, "_has_gpu", lambda: True)
    with pytest.raises(InputError, match="vllm_colocate cannot be used, 8-bit: set the backend to 'generate'"):
        choose_backend("vllm_colocate", VLLMSettings(), "8-bit")


# ---- A model in a folder


@pytest.fixture
def vllm(monkeypatch):
    """`vllm` as an installed module."""
    module = types.ModuleType("vllm")
    module.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    monkeypatch.setitem(sys.modules, "vllm", module)


def accelerator(num_processes=1, device="cuda"):
    return types.SimpleNamespace(num_processes=num_processes, device=types.SimpleNamespace(type=device))


@pytest.mark.parametrize(
    ("asked", "facts", "taken", "why"),
    [
        ("auto", {}, "vllm", "there is a GPU"),
        ("vllm", {}, "vllm", "as asked"),
        ("transformers", {}, "transformers", "as asked"),
        ("auto", {"device": "cpu"}, "transformers", "no GPU"),
        ("auto", {"num_processes": 2}, "transformers", "one process, not 2"),
    ],
)
def test_the_engine_that_is_taken(vllm, asked, facts, taken, why):
    engine, reason = choose_engine(asked, accelerator(**facts))
    assert engine == taken and why in reason
    if facts:
        with pytest.raises(InputError, match=f"backend: vllm cannot be used: .*{why}"):
            choose_engine("vllm", accelerator(**facts))


def test_an_adapter_is_sampled_by_transformers(vllm):
    engine, reason = choose_engine("auto", accelerator(), is_adapter=True)
    assert engine == "transformers" and "merged first" in reason
    with pytest.raises(InputError, match="backend: vllm cannot be used: an adapter has to be merged first"):
        choose_engine("vllm", accelerator(), is_adapter=True)


def test_without_vllm_transformers_samples(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert choose_engine("auto", accelerator())[0] == "transformers"
    with pytest.raises(InputError, match="not installed"):
        choose_engine("vllm", accelerator())
