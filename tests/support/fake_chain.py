"""A chain whose stages are fakes of milliseconds."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from small_chains import chain_project

from aesl_trl import files
from aesl_trl.chain import chain as chains
from aesl_trl.chain.config import read_config
from aesl_trl.chain.stages import BUILDERS, Chain, Stage


# This stands for every stage. It notes its name and flags, obeys `fail` (an exit code) in the run folder, and writes
# its output; a probe's output has the verdict in `verdict`.
FAKE = """
import json, os, pathlib, sys
name, output, *flags = sys.argv[1:]
run, output = pathlib.Path(os.environ["FAKE_RUN"]), pathlib.Path(output)
with open(run / "order.txt", "a") as file:
    print(json.dumps([name, flags]), file=file)
print(f"{name} speaks", flush=True)
print(f"{name} warns", file=sys.stderr, flush=True)
fail = run / f"fail_{name}"
if fail.exists():
    sys.exit(int(fail.read_text()))
output.parent.mkdir(parents=True, exist_ok=True)
verdict = (run / "verdict").read_text() if (run / "verdict").exists() else "ready"
probed = {"step": 3, "verdict": verdict, "text": f"{verdict}: do this", "reasons": ["signal 0.02", "caution: entropy"]}
output.write_text(json.dumps({"mode": "full", "models": {}, "checkpoints": [probed]}))
"""


@pytest.fixture
def project(tmp_path):
    return chain_project(tmp_path)


@pytest.fixture
def fakes(monkeypatch):
    """Replace every stage by FAKE, with the real stage's folder, configs and output."""

    def fake(builder):
        def build(chain: Chain) -> Stage:
            real = builder(chain)
            monkeypatch.setenv("FAKE_RUN", str(chain.run))
            command = [sys.executable, "-c", FAKE, real.name, str(real.output), *real.command[1:]]
            return replace(real, command=command)

        return build

    for name, builder in BUILDERS.items():
        monkeypatch.setitem(BUILDERS, name, fake(builder))
    monkeypatch.setattr(chains, "check_in_child", lambda command, argv: None)

    def select(chain, log):
        files.write_json(chain.run / files.SELECTION, {"step": 3})
        with open(chain.run / "order.txt", "a") as file:
            print(json.dumps(["select", []]), file=file)
        return 0

    monkeypatch.setattr(chains, "_select", select)


def run(path, *flags) -> list[str]:
    """Run the chain, and return the stages that this call started."""
    order = Path(read_config(path).output_dir) / "order.txt"
    before = started(order)
    try:
        chains.main(["--config", str(path), *flags])
    finally:
        run.started = [name for name, _ in started(order)[len(before) :]]
    return run.started


def started(order: Path) -> list:
    return [json.loads(line) for line in order.read_text().splitlines()] if order.exists() else []
