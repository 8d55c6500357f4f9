"""The vLLM server that GRPO samples from: its command, and the wait for it before GRPO starts.

GRPO would wait as well, but with its GPUs taken and all processes up, and it would end in a traceback. We do not start
the server: it has its own GPUs and its own log, and it may outlive the run.
"""

import json
import shlex
import time
import urllib.request
from collections.abc import Callable
from typing import Any

from ..errors import InputError
from ..values import load_yaml


TIMEOUT_S = 240.0  # GRPOConfig's own default of vllm_server_timeout
RETRY_S = 2.0


def wait_for_server(config: str, model: str, say: Callable[[str], None]) -> None:
    """Return once the server that the GRPO config `config` names is healthy, or at once where it names none.

    The command that we show serves `model`. A server must answer within the config's `vllm_server_timeout`.
    """
    values = load_yaml(config)
    if not values.get("use_vllm") or values.get("vllm_mode", "colocate") != "server":
        return
    base, host = values.get("vllm_server_base_url"), values.get("vllm_server_host", "0.0.0.0")
    url = base.rstrip("/") if base else f"http://{host}:{values.get('vllm_server_port', 8000)}"
    timeout_s = float(values.get("vllm_server_timeout", TIMEOUT_S))
    if is_healthy(url):
        return
    command = serve_command(values, model)
    say(f"grpo waits {timeout_s:.0f} s for the vLLM server at {url}; on the GPUs that GRPO leaves free: {command}")
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        time.sleep(min(RETRY_S, timeout_s))
        if is_healthy(url):
            return
    raise InputError(f"no vLLM server at {url}/health after {timeout_s:.0f} s: start it, then run the chain again")


def serve_command(values: dict[str, Any], model: str) -> str:
    """Return the command with the flags of TRL 1.16 (trl.generation.vllm_client): NCCL weights, processed logprobs."""
    flags = ["--weight-transfer-config", json.dumps({"backend": "nccl"}), "--logprobs-mode", "processed_logprobs"]
    flags += ["--max-logprobs", "-1", "--port", str(values.get("vllm_server_port", 8000))]
    return f"VLLM_SERVER_DEV_MODE=1 {shlex.join(['vllm', 'serve', model, *flags])}"


def is_healthy(url: str) -> bool:
    """Ask the server whether it can serve."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return answer.status == 200
    except (OSError, ValueError):
        return False
