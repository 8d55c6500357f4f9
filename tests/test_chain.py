"""chain: what is run, in which order, what is skipped, resumed or refused, and how it ends. Stages are small fakes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from aesl_trl import chain as chains
from aesl_trl import files
from aesl_trl.chain import Chain, Stage, fingerprint, is_whole, last_whole_checkpoint, read_config
from aesl_trl.errors import InputError


ROOT = Path(__file__).parents[1]

# Stands for every stage: notes its name and flags, obeys `fail` (an exit code) in the run folder, writes its output.
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
output.write_text(json.dumps({"mode": "full", "models": {}}))
"""


@pytest.fixture
def project(tmp_path):
    """A chain.yaml beside its configs; `write(**sections)` replaces parts of it."""
    for name in ("sft.yaml", "grpo.yaml", "eval.yaml"):
        (tmp_path / name).write_text("learning_rate: 0.1\n")
    (tmp_path / "grpo.yaml").write_text("model_name_or_path: base\n")
    (tmp_path / "sft.yaml").write_text("dataset_name: rows.jsonl\ndiversity_steps: 5\n")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "base").mkdir()
    (tmp_path / "cpu.yaml").write_text("use_cpu: true\n")
    values = {
        "output_dir": "runs/one",
        "sft": {"config": "sft.yaml", "accelerate_config": "cpu.yaml"},
        "grpo": {"config": "grpo.yaml", "accelerate_config": "cpu.yaml"},
        "eval": {"config": "eval.yaml"},
    }

    def write(name="chain.yaml", **changes) -> Path:
        sections = {key: value for key, value in {**values, **changes}.items() if value is not ...}
        (tmp_path / name).write_text(json.dumps(sections))
        return tmp_path / name

    return write


def make(path, **given) -> Chain:
    return Chain(read_config(path, **given), Path(path).absolute())


@pytest.fixture
def fakes(monkeypatch):
    """Every stage replaced by FAKE, with the real stage's folder, configs and output."""

    def fake(builder):
        def build(chain: Chain) -> Stage:
            real = builder(chain)
            # Not an argument: the fingerprint of a shared SFT must not see which chain trained it.
            monkeypatch.setenv("FAKE_RUN", str(chain.run))
            command = [sys.executable, "-c", FAKE, real.name, str(real.output), *real.command[1:]]
            return Stage(real.name, command, real.output, real.configs, real.folder)

        return build

    monkeypatch.setattr(chains, "BUILDERS", {name: fake(builder) for name, builder in chains.BUILDERS.items()})
    monkeypatch.setattr(chains, "check_in_child", lambda argv: None)

    def select(chain, log):
        files.write_json(chain.run / files.SELECTION, {"step": 3})
        with open(chain.run / "order.txt", "a") as file:
            print(json.dumps(["select", []]), file=file)
        return 0

    monkeypatch.setattr(chains, "_select", select)


def run(path, *flags) -> list[str]:
    """Run the chain; the stages that were started by this call."""
    order = Path(read_config(path).output_dir) / "order.txt"
    before = started(order)
    try:
        chains.main(["--config", str(path), *flags])
    finally:
        run.started = [name for name, _ in started(order)[len(before) :]]
    return run.started


def started(order: Path) -> list:
    return [json.loads(line) for line in order.read_text().splitlines()] if order.exists() else []


ALL = ["sft", "select", "handoff", "grpo", "eval", "report"]


# ---- chain.yaml


def test_paths_are_relative_to_the_file(project, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    config = read_config(project())
    assert config.output_dir == str(tmp_path / "runs/one")
    assert config.sft.config == str(tmp_path / "sft.yaml")
    assert config.sft.accelerate_config == str(tmp_path / "cpu.yaml")
    assert (config.seed, config.handoff.mode, config.selection.rule) == (0, "auto", None)


def test_flags_win_and_are_relative_to_the_current_folder(project, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    config = read_config(project(seed=3), output_dir="out/{seed}", seed=5)
    assert (config.output_dir, config.seed) == (str(tmp_path / "here/out/5"), 5)
    assert read_config(project(output_dir=...), output_dir="out").output_dir == str(tmp_path / "here/out")


def test_seed_in_folders(project, tmp_path):
    (tmp_path / "recorded/seed-7").mkdir(parents=True)
    path = project(
        output_dir="runs/seed-{seed}",
        sft={"config": "sft.yaml", "output_dir": "shared/{seed}"},
        report={"compare": ["recorded/seed-{seed}"]},
    )
    config = read_config(path, seed=7)
    assert config.output_dir == str(tmp_path / "runs/seed-7")
    assert config.sft.output_dir == str(tmp_path / "shared/7")
    assert config.report.compare == [str(tmp_path / "recorded/seed-7")]


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"gpro": {}}, ["chain.yaml: unknown key 'gpro'", "'grpo'"]),
        ({"grpo": {"confg": "x"}}, ["chain.yaml: grpo: unknown key 'confg'", "'config'"]),
        ({"grpo": ...}, ["grpo is missing"]),
        ({"grpo": {}}, ["grpo: config is missing"]),
        ({"output_dir": ...}, ["output_dir is missing"]),
        ({"output_dir": 3}, ["output_dir must be str"]),
        ({"seed": True}, ["seed must be int"]),
        ({"seed": "1"}, ["seed must be int"]),
        ({"sft": None}, ["sft must be a mapping", "null"]),
        ({"sft": {"config": "stf.yaml"}}, ["sft.config: stf.yaml does not exist"]),
        ({"grpo": {"config": "grpo.yaml", "accelerate_config": "none.yaml"}}, ["accelerate_config: none.yaml"]),
        ({"handoff": {"mode": "merg"}}, ["mode must be one of auto, merge, continue", "'merge'"]),
        ({"selection": {"rule": "lst"}}, ["rule must be", "'last'"]),
        ({"selection": {"patience": 2.5}}, ["patience must be int or null"]),
        ({"report": {"compare": ["nowhere"]}}, ["report.compare", "nowhere", "is no run folder"]),
    ],
)
def test_refused_configs(project, changes, parts):
    with pytest.raises(InputError) as error:
        read_config(project(**changes))
    for part in parts:
        assert part in str(error.value)


# ---- Commands


def flags_of(stage: Stage) -> dict[str, str]:
    return {
        flag: value for flag, value in zip(stage.command, stage.command[1:], strict=False) if flag.startswith("--")
    }


def test_stage_commands(project, tmp_path):
    chain = make(project(handoff={"mode": "merge"}, report={"title": "-t"}), seed=4)
    sft, grpo = flags_of(chains.build_sft(chain)), flags_of(chains.build_grpo(chain))
    assert chains.build_sft(chain).command[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    assert sft["--config_file"] == grpo["--config_file"] == str(tmp_path / "cpu.yaml")
    assert (sft["--config"], sft["--output_dir"]) == (str(tmp_path / "sft.yaml"), str(chain.run / "sft"))
    assert sft["--seed"] == grpo["--seed"] == "4"
    assert grpo["--model_name_or_path"] == str(chain.run / "handoff")
    assert chains.build_handoff(chain).command[1:] == ["-m", "aesl_trl.handoff", str(chain.run), "--mode", "merge"]
    evaluation = flags_of(chains.build_eval(chain))
    assert (evaluation["--start"], evaluation["--final"]) == (str(chain.run / "handoff"), str(chain.run / "grpo"))
    assert chains.build_report(chain).command[-1] == "--title=-t"


def test_continued_adapter(project):
    chain = make(project())
    files.write_json(chain.run / files.HANDOFF, {"mode": "continue", "base": "org/base"})
    flags = flags_of(chains.build_grpo(chain))
    assert flags["--adapter_name_or_path"] == str(chain.run / "handoff")
    assert flags["--model_name_or_path"] == "org/base"


def test_without_sft_rl_starts_from_its_configs_model(project, tmp_path):
    chain = make(project(sft=...))
    assert chain.names == ["grpo", "eval", "report"]
    assert "--model_name_or_path" not in flags_of(chains.build_grpo(chain))
    assert flags_of(chains.build_eval(chain))["--start"] == str(tmp_path / "base")
    (tmp_path / "grpo.yaml").write_text("learning_rate: 1\n")
    with pytest.raises(InputError, match="model_name_or_path is missing"):
        chains.build_eval(chain)


def test_environment_of_a_stage(project, tmp_path, monkeypatch):
    monkeypatch.setenv("AESL_OUTER", "x")
    (tmp_path / "sft.yaml").write_text("env: {HF_TEST: '1', PATH: /nowhere}\n")
    env = chains.child_env(chains.build_sft(make(project())))
    assert (env["HF_TEST"], env["PYTHONUNBUFFERED"], env["AESL_OUTER"]) == ("1", "1", "x")
    assert env["PATH"] == os.environ["PATH"]


# ---- Fingerprints


def sft_print(path, **given) -> str:
    chain = make(path, **given)
    return fingerprint(chains.build_sft(chain), chain.sft_dir, None)


@pytest.mark.parametrize("name", ["sft.yaml", "cpu.yaml", "rows.jsonl"])
def test_fingerprint_sees_every_file(project, tmp_path, name):
    before = sft_print(project())
    assert sft_print(project()) == before
    with open(tmp_path / name, "a") as file:
        file.write("\n")
    assert sft_print(project()) != before


def test_fingerprint_sees_seed_and_the_stage_before(project):
    chain = make(project())
    stage = chains.build_grpo(chain)
    prints = {fingerprint(stage, chain.run, previous) for previous in (None, "a", "b")}
    assert len(prints) == 3
    assert sft_print(project(), seed=1) != sft_print(project())


def test_fingerprint_survives_a_move(project, tmp_path):
    before = sft_print(project())
    moved = tmp_path.with_name(tmp_path.name + "_moved")
    shutil.copytree(tmp_path, moved)
    assert sft_print(moved / "chain.yaml") == before


def test_chains_that_share_an_sft_agree_on_it(project):
    shared = {"config": "sft.yaml", "accelerate_config": "cpu.yaml", "output_dir": "shared"}
    assert sft_print(project(sft=shared)) == sft_print(project("b.yaml", sft=shared, output_dir="other/deep/two"))


# ---- Checkpoints


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    save_file({"a": torch.ones(4, 3), "b": torch.ones(2)}, path / "model.safetensors", metadata={"format": "pt"})
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        torch.save({"state": torch.ones(5)}, path / name)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return path


def cut(path: Path, size: int) -> None:
    with open(path, "r+b") as file:
        file.truncate(size)


def test_the_newest_whole_checkpoint(tmp_path):
    for step in (5, 10, 100):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_whole_checkpoint(tmp_path) == (tmp_path / "checkpoint-100", [])
    cut(tmp_path / "checkpoint-100/model.safetensors", 100)
    assert last_whole_checkpoint(tmp_path) == (tmp_path / "checkpoint-10", [tmp_path / "checkpoint-100"])


def test_no_whole_checkpoint(tmp_path):
    assert last_whole_checkpoint(tmp_path) == (None, [])
    (tmp_path / "checkpoint-3").mkdir()
    assert last_whole_checkpoint(tmp_path) == (None, [tmp_path / "checkpoint-3"])


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_missing_file_is_torn(tmp_path, name):
    path = checkpoint(tmp_path, 1)
    assert is_whole(path)
    (path / name).unlink()
    assert not is_whole(path)


@given(
    st.sampled_from(["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]),
    st.floats(0, 1, exclude_max=True),
)
def test_a_file_cut_anywhere_is_torn(tmp_path_factory, name, share):
    path = checkpoint(tmp_path_factory.mktemp("torn"), 1)
    cut(path / name, int(share * (path / name).stat().st_size))
    assert not is_whole(path)


def test_a_missing_shard_is_torn(tmp_path):
    path = checkpoint(tmp_path, 1)
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert not is_whole(path)


def test_the_mark_of_an_unfinished_save(tmp_path):
    path = checkpoint(tmp_path, 1)
    (path / "checkpoint-is-incomplete.txt").write_text("x")
    assert not is_whole(path)


@pytest.mark.slow
def test_checkpoints_that_trainer_writes_are_whole(tiny_model_dir, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    steps = {"max_steps": 2, "save_steps": 1, "logging_steps": 1}
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **steps)
    rows = Dataset.from_list([{"prompt": "a", "completion": "b"}] * 16)
    SFTTrainer(str(tiny_model_dir), args=args, train_dataset=rows).train()
    assert last_whole_checkpoint(tmp_path) == (tmp_path / "checkpoint-2", [])


# ---- Running


def test_the_whole_chain(project, fakes, capfd):
    path = project()
    assert run(path) == ALL
    out = capfd.readouterr().out
    folder = Path(read_config(path).output_dir)
    record = json.loads((folder / "chain.json").read_text())
    assert record["sft_dir"] == "sft" and record["seed"] == 0 and record["config"] == "../../chain.yaml"
    assert list(record["stages"]) == ALL
    for name in ALL:
        stage = record["stages"][name]
        assert (stage["status"], stage["returncode"]) == ("done", 0)
        assert stage["seconds"] >= 0 and len(stage["inputs"]) == 64 and stage["started"].startswith("20")
        assert str(folder.parent) not in stage["command"]
    assert "sft speaks" in out and "sft warns" in out
    assert (folder / "logs/sft.log").read_text() == "sft speaks\nsft warns\n"
    assert "stage 4 of 6: grpo" in out
    assert out.splitlines()[-1] == str(folder / "report.html")


def test_sft_dir_resolves_for_the_other_stages(project, fakes):
    path = project(sft={"config": "sft.yaml", "output_dir": "shared/sft"})
    run(path)
    config = read_config(path)
    assert files.sft_dir(config.output_dir) == Path(config.sft.output_dir)


def test_done_stages_are_skipped(project, fakes, capfd):
    path = project()
    run(path)
    assert run(path) == []
    assert capfd.readouterr().out.count("done with the same inputs: skipped") == 6


@pytest.mark.parametrize(
    "name, again",
    [("sft.yaml", ALL), ("rows.jsonl", ALL), ("grpo.yaml", ALL[3:]), ("eval.yaml", ALL[4:]), ("cpu.yaml", ALL)],
)
def test_a_changed_file_reruns_its_stage_and_what_follows(project, fakes, tmp_path, name, again):
    path = project()
    run(path)
    with open(tmp_path / name, "a") as file:
        file.write("\n")
    assert run(path) == again
    assert run(path) == []


def test_a_changed_option_reruns(project, fakes):
    run(project())
    assert run(project(selection={"rule": "last"})) == ALL[1:]
    assert run(project(selection={"rule": "last"}, handoff={"mode": "merge"})) == ALL[2:]
    assert run(project(selection={"rule": "last"}, handoff={"mode": "merge"}), "--seed", "1") == ALL


def test_a_missing_output_reruns(project, fakes):
    path = project()
    run(path)
    (Path(read_config(path).output_dir) / files.HANDOFF).unlink()
    assert run(path) == ALL[2:]


def test_what_changed_starts_in_a_clean_folder(project, fakes, tmp_path):
    path = project()
    run(path)
    folder = Path(read_config(path).output_dir)
    (folder / "grpo/old.txt").write_text("x")
    (tmp_path / "grpo.yaml").write_text("model_name_or_path: base\nlearning_rate: 0.2\n")
    run(path)
    assert (folder / "grpo.old-1/old.txt").exists() and not (folder / "grpo/old.txt").exists()


@pytest.mark.parametrize("code, ours", [(2, 2), (3, 3), (125, 125), (130, 1), (255, 1)])
def test_a_failed_stage_stops_the_chain(project, fakes, capfd, code, ours):
    path = project()
    folder = Path(read_config(path).output_dir)
    folder.mkdir(parents=True)
    (folder / "fail_grpo").write_text(str(code))
    with pytest.raises(SystemExit) as leaving:
        run(path)
    assert leaving.value.code == ours
    assert run.started == ALL[:4]
    err = capfd.readouterr().err
    assert err == f"aesl chain: stage grpo failed with exit code {code}; its log is {folder / 'logs/grpo.log'}\n"
    stage = json.loads((folder / "chain.json").read_text())["stages"]["grpo"]
    assert (stage["status"], stage["returncode"]) == ("failed", code)
    (folder / "fail_grpo").unlink()
    assert run(path) == ALL[3:]


def test_a_stage_cut_off_goes_on_from_its_last_whole_checkpoint(project, fakes, capfd):
    path = project()
    folder = Path(read_config(path).output_dir)
    folder.mkdir(parents=True)
    (folder / "fail_grpo").write_text("1")
    with pytest.raises(SystemExit):
        run(path)
    (folder / "fail_grpo").unlink()
    checkpoint(folder / "grpo", 20)
    cut(checkpoint(folder / "grpo", 40) / "optimizer.pt", 9)
    assert run(path) == ALL[3:]
    flags = dict(started(folder / "order.txt"))["grpo"]
    assert flags[flags.index("--resume_from_checkpoint") + 1] == str(folder / "grpo/checkpoint-20")
    out = capfd.readouterr().out
    assert "checkpoint-40 was cut off" in out and "goes on from checkpoint-20" in out
    assert (folder / "logs/grpo.log").read_text().count("grpo speaks") == 2


def test_no_resume_from_checkpoints_of_other_inputs(project, fakes, tmp_path):
    path = project()
    folder = Path(read_config(path).output_dir)
    checkpoint(folder / "sft", 20)
    run(path)
    assert "--resume_from_checkpoint" not in dict(started(folder / "order.txt"))["sft"]
    assert (folder / "sft.old-1/checkpoint-20").exists()


def test_a_shared_sft_is_trained_once(project, fakes):
    shared = {"config": "sft.yaml", "output_dir": "shared"}
    assert run(project(sft=shared)) == ALL
    second = project("second.yaml", sft=shared, output_dir="runs/two")
    assert run(second) == ALL[1:]
    assert files.sft_dir(read_config(second).output_dir).name == "shared"


def test_a_shared_sft_of_other_inputs_is_refused(project, fakes, tmp_path):
    shared = {"config": "sft.yaml", "output_dir": "shared"}
    run(project(sft=shared))
    second = project("second.yaml", sft=shared, output_dir="runs/two", seed=1)
    with pytest.raises(InputError, match="shared holds an SFT run of other inputs.*name another folder"):
        run(second)
    assert run.started == [] and not (tmp_path / "shared.old-1").exists()


def test_two_chains_in_one_folder_are_refused(project, fakes):
    path = project()
    with chains._locked(Path(read_config(path).output_dir)):
        with pytest.raises(InputError, match="another chain is at work"):
            run(path)
    assert run(path) == ALL


def test_select_calls_the_selection(project, monkeypatch, tmp_path):
    seen = {}

    def select_run(folder, out=None, **given):
        seen.update(folder=folder, out=out, **given)
        return {"step": 7, "applied": "last", "reason": "asked for"}

    monkeypatch.setattr("aesl_trl.selection.select_run", select_run)
    chain = make(project(selection={"rule": "last", "patience": 2}))
    assert chains._select(chain, chain.run / "logs/select.log") == 0
    assert seen == {"folder": chain.sft_dir, "out": chain.run, "rule": "last", "patience": 2}
    assert "step 7 by last" in (chain.run / "logs/select.log").read_text()


# ---- Signals

# The first stage starts a child of its own, as accelerate does, and the chain's process reports by its exit code.
DRIVER = """
import sys
from aesl_trl import chain as chains
from aesl_trl.chain import Stage

STAGE = '''
import pathlib, signal, subprocess, sys, time
worker = "import signal, sys, time, pathlib\\\\n"
worker += "def end(number, frame):\\\\n    pathlib.Path(sys.argv[1]).write_text(str(number)); sys.exit(0)\\\\n"
worker += "signal.signal(signal.SIGTERM, end); signal.signal(signal.SIGINT, end)\\\\n"
worker += "print(1, flush=True); time.sleep(60)\\\\n"
process = subprocess.Popen([sys.executable, "-c", worker, sys.argv[1]], stdout=subprocess.PIPE)
process.stdout.readline()
if sys.argv[3] == "saves":
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
pathlib.Path(sys.argv[2]).write_text("x")
process.wait()
'''

def build(name):
    def stage(chain):
        worker, ready = str(chain.run / f"worker_{name}"), str(chain.run / f"ready_{name}")
        return Stage(name, [sys.executable, "-c", STAGE, worker, ready, sys.argv[2]], chain.run / f"out_{name}")
    return stage

chains.BUILDERS = {name: build(name) for name in ("grpo", "report")}
chains.check_in_child = lambda argv: None
chains.main(["--config", sys.argv[1]])
"""


def wait_for(path: Path, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.05)


@pytest.mark.parametrize("how", ["dies", "saves"])
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_stage_and_chain(project, tmp_path, number, code, how):
    path = project(sft=..., eval=...)
    folder = Path(read_config(path).output_dir)
    (tmp_path / "driver.py").write_text(DRIVER)
    command = [sys.executable, str(tmp_path / "driver.py"), str(path), how]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, text=True)
    wait_for(folder / "ready_grpo")
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == code, out
    # The launcher does not pass the signal on: the worker must have had it all the same.
    assert (folder / "worker_grpo").read_text() == str(int(number))
    assert not (folder / "ready_report").exists()
    assert json.loads((folder / "chain.json").read_text())["stages"]["grpo"]["status"] == "failed"
    assert signal.Signals(number).name in out


# ---- The end


def test_closing_table(project, tmp_path):
    recorded = tmp_path / "results/nll/seed-1"
    figures = {"pass@1": 0.25, "pass@8": 0.5, "entropy": None, "self_bleu": 0.125, "groups_mixed": 0.75}
    files.write_json(recorded / files.EVALUATION, {"models": {"start": figures, "final": {**figures, "pass@1": 0.8}}})
    chain = make(project(report={"compare": ["results/nll/seed-1"]}))
    files.write_json(chain.run / files.EVALUATION, {"models": {"start": figures, "final": figures}})
    files.write_json(chain.run / files.SELECTION, {"step": 30})
    header, *rows = (line.split("  ") for line in chains.closing_table(chain).splitlines())
    assert [cell.strip() for cell in header if cell] == ["run", "model", "step", *chains.COLUMNS]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert cells[0] == ["one", "start", "30", "0.250", "0.500", "-", "0.125", "0.750"]
    assert cells[2][0] == "nll/seed-1 (recorded)" and cells[3][1:3] == ["final", "0.800"]


# ---- The command


def aesl_chain(*argv):
    command = [sys.executable, "-m", "aesl_trl.chain", *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)


@pytest.mark.parametrize(
    "argv, part",
    [
        (["--config"], "--config"),
        ([], "--config"),
        (["--config", "none.yaml"], "none.yaml does not exist"),
        (["--confg", "none.yaml"], "--config"),
        (["--config", "x", "--seed", "a"], "--seed"),
    ],
)
def test_refusals_are_one_line(argv, part):
    done = aesl_chain(*argv)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("aesl chain: ") and part in done.stderr


def real_project(project, tmp_path, sft="", grpo=""):
    cpu = "use_cpu: true\nbf16: false\n"
    (tmp_path / "sft.yaml").write_text(f"dataset_name: rows.jsonl\ndiversity_steps: 5\n{cpu}{sft}")
    (tmp_path / "grpo.yaml").write_text(f"{cpu}{grpo}")
    (tmp_path / "eval.yaml").write_text("samples: 4\n")
    return project()


@pytest.mark.slow
def test_dry_run_prints_the_plan_and_starts_nothing(project, tmp_path):
    path = real_project(project, tmp_path)
    done = aesl_chain("--config", path, "--dry_run")
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()[-6:]] == [
        f"{number}. {name}" for number, name in enumerate(ALL, 1)
    ]
    assert not Path(read_config(path).output_dir).exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"sft": "cold_start_los: nll\n"}, ["sft.yaml", "'cold_start_los'", "'cold_start_loss'"]),
        ({"grpo": "num_generations: many\n"}, ["grpo.yaml", "num_generations must be int or null"]),
        ({"grpo": "per_device_train_batch_size: 2\nnum_generations: 3\n"}, ["grpo.yaml", "num_generations"]),
    ],
)
def test_a_stages_mistake_is_found_before_anything_starts(project, tmp_path, changes, parts):
    path = real_project(project, tmp_path, **changes)
    done = aesl_chain("--config", path)
    assert done.returncode == 2
    assert all(part in done.stderr for part in parts)
    assert not (Path(read_config(path).output_dir) / "chain.json").exists()
