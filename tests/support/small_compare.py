"""Comparisons whose cells are real chains of small fake stages: what compare's tests share, and what a cell runs.

A fake stage writes the files of the real one; its figures follow from the cold start's loss, the step and the seed.
`python small_compare.py --config chain.yaml` is such a chain.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import yaml

from aesl_trl.chain import chain as chains
from aesl_trl.chain.stages import BUILDERS, Chain, Stage


REAL = dict(BUILDERS)
STEPS = (0, 10, 20, 30, 40, 50, 60, 70, 80)
ENTROPY = (0.20, 0.25, 0.30, 0.28, 0.20, 0.15, 0.10, 0.08, 0.07)  # turns at step 20

ONE = {"nll": {"sft": {"cold_start_loss": "nll"}, "selections": ["last"]}}
TUNE = {"seeds": [7], "grid": {"learning_rate": [0.1, 0.2]}}

# argv: name, output, run, configs...; obeys `fail_<stage>` and `kill_<stage>` in the comparison's folder
STAGE = """
import json, os, pathlib, signal, sys
name, output, run, root = sys.argv[1], pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3]), pathlib.Path(sys.argv[4])
STEPS, ENTROPY = json.loads(sys.argv[5])
folder = output.parent.parent if output.parent.name == "_aesl" else output.parent  # of the stage
with open(root / "order.txt", "a") as file:
    print(json.dumps([name, str((folder if name == "sft" else run).relative_to(root)),
                      os.environ.get("CUDA_VISIBLE_DEVICES")]), file=file)
if (root / f"fail_{name}").exists() and (root / f"fail_{name}").read_text() in str(output):
    sys.exit(3)
if (root / f"kill_{name}").exists():  # the comparison itself dies while this stage is at work
    number = int((root / f"kill_{name}").read_text())
    (root / f"kill_{name}").unlink()
    parent = int(pathlib.Path(root / "pid").read_text())
    os.kill(parent, number)
    if number == signal.SIGKILL:
        import time
        time.sleep(60)
def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
def entropy_of(folder):
    weights = folder / "weights.json"
    return json.loads(weights.read_text()) if weights.exists() else {"entropy": 0.2, "quality": 0.1, "seed": 0}
if name == "sft":
    import yaml
    config = yaml.safe_load((pathlib.Path(sys.argv[6])).read_text())
    loss, seed = config["cold_start_loss"], int(sys.argv[7])
    write(output.parent / "run.json", {"stage": "sft", "cold_start_loss": loss})
    shift = 0.05 if loss == "aesl" else 0.0
    rows = [{"step": s, "entropy": e + shift, "self_bleu": 1 - e, "pass@1": s / 200} for s, e in zip(STEPS, ENTROPY)]
    (output.parent / "diversity.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
    for row in rows[1:]:
        write(output.parent / "candidates" / f"step-{row['step']}" / "weights.json",
              {"entropy": row["entropy"], "quality": row["pass@1"] + config["learning_rate"], "seed": seed})
    history = [{"step": s, "eval_nll": 1 - s / 100} for s in STEPS[1:]]
    write(output, {"log_history": history})
elif name == "mix":
    rows = [{"candidate": f"mix-{w}", "weight": w, "entropy": e} for w, e in ((0.5, 0.3), (0.7, 0.35))]
    for row in rows:
        write(output.parent / "candidates" / row["candidate"] / "weights.json",
              {"entropy": row["entropy"], "quality": row["weight"], "seed": int(sys.argv[6])})
    write(output, {"step": STEPS[-1], "asked": [row["candidate"] for row in rows], "candidates": rows})
elif name == "handoff":
    write(run / "handoff" / "weights.json", entropy_of(run / "selected"))
    write(output, {"mode": "full"})
elif name == "grpo":
    start = entropy_of(run / "handoff")
    luck = int(sys.argv[6]) // 10_000 / 50  # of RL runs after the first
    write(folder / "weights.json", {**start, "entropy": 0.01, "quality": start["quality"] + start["entropy"] + luck})
    write(output, {"stage": "grpo"})
elif name == "eval":
    def figures(found, seed):
        noise = (seed * 7 % 5) / 100
        p = found["quality"] + noise
        return {"pass@1": p, "pass@8": 2 * p, "entropy": found["entropy"], "self_bleu": 1 - found["entropy"],
                "groups_mixed": found["entropy"] * 2, "groups_all_right": round(10 * p) / 10,
                "pass@1_interval": [0, 1]}
    seed = int(sys.argv[6])
    write(output, {"models": {"start": figures(entropy_of(run / "handoff"), seed),
                              "final": figures(entropy_of(run / "grpo"), seed)}, "num_prompts": 10})
else:
    write(output, {})
"""


def fake(builder: Callable[[Chain], Stage]) -> Callable[[Chain], Stage]:
    """Keep the real stage's folder, output and configs, and replace its command by one that takes milliseconds."""

    def build(chain: Chain) -> Stage:
        real = builder(chain)
        root = Path(os.environ["FAKE_ROOT"])
        run = real.folder if real.name == "sft" else chain.run
        seed = str(real.given.get("seed", chain.config.seed))
        more = [chain.config.sft.config, seed] if real.name == "sft" else [seed]
        numbers = json.dumps([STEPS, ENTROPY])
        command = [sys.executable, "-c", STAGE, real.name, str(real.output), str(run), str(root), numbers, *more]
        return replace(real, command=command)

    return build


def install() -> None:
    """Replace every stage but the selection, which is real, in the table that chains look builders up in."""
    BUILDERS.update({name: fake(builder) for name, builder in REAL.items() if name != "select"})
    chains.check_in_child = lambda command, argv: None


def uninstall() -> None:
    BUILDERS.update(REAL)


def compare_project(folder: Path) -> Callable[..., Path]:
    """Write configs to `folder`. Return `write(**changes)`, which adds a compare.yaml with these keys replaced."""
    (folder / "sft.yaml").write_text("dataset_name: rows.jsonl\ndiversity_steps: 10\nlearning_rate: 0.1\n")
    (folder / "grpo.yaml").write_text("model_name_or_path: base\n")
    (folder / "eval.yaml").write_text("samples: 8\n")
    (folder / "cpu.yaml").write_text("use_cpu: true\n")
    (folder / "rows.jsonl").write_text('{"text": "a"}\n')
    for base in ("base", "other"):
        (folder / base).mkdir(exist_ok=True)
    values = {
        "output_dir": "runs",
        "seeds": [0, 1],
        "reference": ["nll/last"],
        "chain": {
            "sft": {"config": "sft.yaml", "accelerate_config": "cpu.yaml"},
            "grpo": {"config": "grpo.yaml", "accelerate_config": "cpu.yaml"},
            "eval": {"config": "eval.yaml"},
        },
        "methods": {
            "base": {"sft": None},
            "nll": {"sft": {"cold_start_loss": "nll"}, "selections": ["turning_point", "last"]},
            "aesl": {"sft": {"cold_start_loss": "aesl"}, "selections": ["last"]},
        },
    }

    def write(name="compare.yaml", **changes) -> Path:
        sections = {key: value for key, value in {**values, **changes}.items() if value is not ...}
        (folder / name).write_text(yaml.safe_dump(sections, sort_keys=False))
        return folder / name

    return write


def run(path: Path, *flags: str) -> int:
    """Run the comparison here; its exit code."""
    from aesl_trl.compare import compare  # a cell's process does without

    try:
        compare.main(["--config", str(path), *flags])
    except SystemExit as leaving:
        return leaving.code
    return 0


def result(root: Path) -> dict:
    return json.loads((root / "compare.json").read_text())


def started(root: Path) -> list[tuple[str, str]]:
    """Return (stage, folder) of every stage that was started, in order."""
    path = root / "order.txt"
    return [tuple(json.loads(line)[:2]) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    install()
    if "--compare" in sys.argv:  # a whole comparison, which its stages may kill
        from aesl_trl.compare import compare

        sys.argv.remove("--compare")
        Path(os.environ["FAKE_ROOT"], "pid").write_text(str(os.getpid()))
        compare.CHAIN = [sys.executable, __file__]
        compare.check_in_child = lambda command, argv: None
        signal.signal(signal.SIGINT, signal.default_int_handler)
        compare.main(sys.argv[1:])
    else:
        chains.main(sys.argv[1:])
