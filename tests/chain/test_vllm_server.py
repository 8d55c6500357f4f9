"""The wait for a vLLM server before GRPO: at once where it is up, one line where it is not."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import fake_chain
import pytest

from aesl_trl.chain import vllm_server
from aesl_trl.errors import InputError


class Health(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked += 1
        ready = self.path == "/health" and self.server.asked >= self.server.ready_after
        self.send_response(200 if ready else 503)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    """A server that is healthy from its `ready_after`-th answer on."""
    found = HTTPServer(("127.0.0.1", 0), Health)
    found.asked, found.ready_after = 0, 1
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


def config(folder, **changes):
    path = folder / "grpo.yaml"
    values = {"model_name_or_path": "base", "use_vllm": True, "vllm_mode": "server", "vllm_server_host": "127.0.0.1"}
    path.write_text(json.dumps({**values, **changes}))
    return str(path)


def closed_port():
    with HTTPServer(("127.0.0.1", 0), Health) as taken:
        return taken.server_port


@pytest.mark.parametrize("changes", [{"use_vllm": False}, {"vllm_mode": "colocate"}])
def test_without_a_server_nothing_is_waited_for(tmp_path, changes):
    said = []
    path = config(tmp_path, vllm_server_port=closed_port(), **changes)
    vllm_server.wait_for_server(path, "model", said.append)
    assert said == []


def test_a_healthy_server_is_not_mentioned(tmp_path, server):
    said = []
    vllm_server.wait_for_server(config(tmp_path, vllm_server_port=server.server_port), "model", said.append)
    assert said == [] and server.asked == 1


def test_a_server_that_comes_up_is_waited_for(tmp_path, server, monkeypatch):
    monkeypatch.setattr(vllm_server, "RETRY_S", 0.01)
    server.ready_after, said = 3, []
    url = f"http://127.0.0.1:{server.server_port}/"
    vllm_server.wait_for_server(config(tmp_path, vllm_server_base_url=url), "runs/a/handoff", said.append)
    assert server.asked == 3
    assert len(said) == 1 and "waits 240 s" in said[0]
    assert "VLLM_SERVER_DEV_MODE=1 vllm serve runs/a/handoff --weight-transfer-config" in said[0]


def test_no_server_in_time_is_one_line(tmp_path):
    path = config(tmp_path, vllm_server_port=closed_port(), vllm_server_timeout=0.01)
    with pytest.raises(InputError, match=r"no vLLM server at http://127.0.0.1:\d+/health after 0 s: start it"):
        vllm_server.wait_for_server(path, "model", lambda line: None)


def test_the_command_is_the_one_that_trl_builds():
    """Of the installed TRL, flag for flag, but for what TRL only passes on with vLLM's own defaults."""
    serve = pytest.importorskip("trl.scripts.vllm_serve")
    theirs = serve.build_command(serve.ScriptArguments(model="m", port=8001))
    ours = vllm_server.serve_command({"vllm_server_port": 8001}, "m")
    for flag in ("--weight-transfer-config", "--logprobs-mode", "--max-logprobs", "--port"):
        value = theirs[theirs.index(flag) + 1]
        assert f"{flag} {value}" in ours.replace("'", "")


def test_the_chain_stops_before_grpo_and_goes_on_once_the_server_is_there(project, fakes, tmp_path, server):  # noqa: F811
    config(tmp_path, vllm_server_port=closed_port(), vllm_server_timeout=0.01)
    path = project()
    with pytest.raises(InputError, match="no vLLM server"):
        fake_chain.run(path)
    assert fake_chain.run.started[-1] == "probe"
    config(tmp_path, vllm_server_port=server.server_port)
    assert "grpo" in fake_chain.run(path)
