"""The choice of an engine: which backends there are, and which one `auto` takes on this machine.

Nothing is loaded or started here.
"""

import importlib.util
from dataclasses import dataclass, field

import torch
from trl.import_utils import is_vllm_available

from ..errors import InputError


OFFLINE_BACKENDS = ("auto", "vllm", "transformers")  # of `aesl eval` and `aesl data`
TRAINING_BACKENDS = ("auto", "vllm_colocate", "vllm_server", "generate")  # of diversity monitoring
INSTALL = "pip install 'vllm>=0.31'"


@dataclass(frozen=True)
class VLLMSettings:
    """Arguments of TRL's `VLLMGeneration`, by its names; GRPOConfig has them with the prefix `vllm_`."""

    server_base_url: str | None = None  # such as http://localhost:8000; goes before host and port
    server_host: str | None = None
    server_port: int = field(default=8000, metadata={"at_least": 1})
    server_timeout: float = field(default=240.0, metadata={"above": 0})  # seconds to wait for the server to be up
    group_port: int = field(default=51216, metadata={"at_least": 1})  # of the processes that weights are sent through
    gpu_memory_utilization: float = field(default=0.3, metadata={"above": 0, "below": 1})  # of a colocated engine
    enable_sleep_mode: bool = True  # a colocated engine frees its memory between measurements

    @property
    def server(self) -> str | None:
        """The server's address, None where none is set."""
        return self.server_base_url or (self.server_host and f"http://{self.server_host}:{self.server_port}")


def _has_gpu() -> bool:
    return torch.cuda.is_available()


def check_backend(backend: str, vllm: VLLMSettings, *, prefix: str = "") -> None:
    """Refuse a backend that cannot work on this machine; no model is needed. `prefix` opens the settings' names.

    vLLM, asked for by name or by a server's address, has to be installed, and needs a GPU to share or an address.
    """
    name = f"{prefix}backend is {backend!r}"
    if backend == "auto" and vllm.server and not is_vllm_available():
        name, backend = f"{prefix}vllm_server_base_url is {vllm.server!r}", "vllm_server"
    if backend.startswith("vllm") and not is_vllm_available():
        raise InputError(f"{name}, but vLLM is not installed: {INSTALL}, or set {prefix}backend to 'generate'")
    if backend == "vllm_colocate" and not _has_gpu():
        raise InputError(f"{name}, but there is no CUDA GPU: set {prefix}backend to 'generate'")
    if backend == "vllm_server" and not vllm.server:
        raise InputError(f"{name}, but no server is named: set {prefix}vllm_server_base_url, or start with 'auto'")


def choose_backend(backend: str, vllm: VLLMSettings, obstacle: str | None = None) -> tuple[str, str]:
    """Return the backend of a training's samples, and why.

    `auto` takes a server where one is named, else a colocated engine where vLLM is installed and there is a GPU, else
    `model.generate`. `obstacle` says why vLLM cannot sample from this model (None: it can); then vLLM is refused.
    """
    check_backend(backend, vllm)
    if backend == "generate":
        return backend, "as set"
    if backend != "auto" or vllm.server:
        chosen = "vllm_server" if backend == "auto" else backend
        if obstacle:
            raise InputError(f"{chosen} cannot be used, {obstacle}: set the backend to 'generate'")
        return chosen, "as set" if backend != "auto" else f"auto: the server {vllm.server} is named"
    if not is_vllm_available():
        return "generate", f"auto: vLLM is not installed, {INSTALL} would sample faster"
    if not _has_gpu():
        return "generate", "auto: there is no CUDA GPU"
    if obstacle:
        return "generate", f"auto: vLLM cannot be used, {obstacle}"
    return "vllm_colocate", "auto: vLLM is installed and there is a GPU"


def choose_engine(asked: str, accelerator, *, is_adapter: bool = False) -> tuple[str, str]:
    """Return the engine for a model in a folder, `vllm` or `transformers`, and why; `asked` is in `OFFLINE_BACKENDS`.

    The accelerator's number of processes and its device decide. vllm is refused where it cannot run.
    """
    if asked == "transformers":
        return asked, "as asked"
    processes, reason = accelerator.num_processes, None
    if importlib.util.find_spec("vllm") is None:
        reason = f"it is not installed ({INSTALL})"
    elif accelerator.device.type != "cuda":
        reason = "there is no GPU, or use_cpu is set"
    elif processes > 1:
        reason = f"it runs in one process, not {processes}: start without accelerate, and set tensor_parallel_size"
    elif is_adapter:
        reason = "an adapter has to be merged first (aesl handoff RUN --mode merge)"
    if reason is None:
        return "vllm", "as asked" if asked == "vllm" else "it is installed, and there is a GPU"
    if asked == "vllm":
        raise InputError(f"backend: vllm cannot be used: {reason}")
    return "transformers", f"not vllm: {reason}"
