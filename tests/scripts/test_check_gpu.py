"""check_gpu: each part at tiny size, what is run again, a part that fails or takes too long, figures and goals."""

import json
import os
import shutil
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import check_gpu
import pytest
import record
import torch
from check_gpu import Figure, Part

from aesl_trl import processes


BENCHMARKS = [name for name, part in check_gpu.PARTS.items() if "scripts/bench/" in part.commands[-1]]
TESTED = "tests-kernels"  # the part of the default run


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    monkeypatch.setattr(check_gpu, "torch_build", lambda: ("torch 2.13, CUDA 13.0", True))


def run(monkeypatch, folder, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["check_gpu.py", "--output_dir", str(folder), *map(str, arguments)])
    return check_gpu.main()


def statuses(folder) -> dict[str, str]:
    parts = json.loads((folder / "gpu.json").read_text())["parts"]
    return {name: part["status"] for name, part in parts.items()}


def code(text: str) -> str:
    return f'-c "{text}"'


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != TESTED)) for name in check_gpu.PARTS]
)
def test_every_part_runs_through_at_tiny_size(name, tmp_path, monkeypatch, capfd):
    # The limits are a GPU's: a busy CPU is given more time
    assert run(monkeypatch, tmp_path, "--small", "--minutes", 240, "--parts", name) == 0, capfd.readouterr()
    parts = check_gpu.chosen([name])
    assert statuses(tmp_path) == {part: "skipped" if part == "vllm" else "done" for part in parts}
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["command"].startswith("bash scripts/check_gpu.sh --") and str(tmp_path) not in found["command"]
    assert found["name"] == "gpu" and found["hardware"] and found["tables"][0]["rows"][0][0] == parts[0]
    figures = [row for row in found["tables"][0]["rows"] if isinstance(row[2], float)]
    assert bool(figures) == (name in BENCHMARKS) and all(row[2] > 0 for row in figures)
    assert record.markdown(found["tables"][0]) in capfd.readouterr().out


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_benchmarks_take_the_arguments_for_a_gpu(name, tmp_path, monkeypatch):
    line = check_gpu.command_lines(check_gpu.PARTS[name], False, tmp_path, name)[-1]
    module = import_module(Path(line[1]).stem)
    monkeypatch.setattr(record, "show", lambda table: table)
    monkeypatch.setattr(module, "bench", lambda *given: record.table("a", ["b"], [["c"]]))
    if "--tune" in line:
        monkeypatch.setattr(module, "tune", lambda *given: (None, []))
    monkeypatch.setattr(sys, "argv", line[1:])
    module.main()
    assert json.loads((tmp_path / f"{name}.json").read_text())["tables"]


def test_the_parts_leave_half_a_minute_of_ten():
    assert sum(part.limit_s for part in check_gpu.PARTS.values()) <= 570


def test_without_a_gpu_nothing_runs(tmp_path):
    command = [sys.executable, check_gpu.ROOT / "scripts/check_gpu.py", "--output_dir", tmp_path / "runs"]
    done = subprocess.run(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and not list(tmp_path.iterdir())
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"check_gpu.py: no GPU to check (torch {torch.__version__}, ") and "--small" in line


# ---- Which parts run, and how they end


def test_a_part_that_is_done_is_not_run_again_and_one_that_failed_is(tmp_path, monkeypatch, capfd):
    """The second part fails until the file is there, and stops neither the first nor the third."""
    count, wanted = tmp_path / "count", tmp_path / "wanted"
    adds = code(f"open('{count}', 'a').write('x')")
    needs = code(f"open('{wanted}')")
    parts = {"a": Part((adds,), (), 60), "b": Part((needs, adds), (), 60), "c": Part((adds, adds), (), 60)}
    monkeypatch.setattr(check_gpu, "PARTS", parts)
    assert run(monkeypatch, tmp_path) == 1
    assert statuses(tmp_path) == {"a": "done", "b": "failed", "c": "done"} and count.read_text() == "xxx"
    assert "FileNotFoundError" in (tmp_path / "b.log").read_text()
    wanted.touch()
    assert run(monkeypatch, tmp_path) == 0
    assert statuses(tmp_path) == {"a": "done", "b": "done", "c": "done"} and count.read_text() == "xxxx"
    assert "a: done before" in capfd.readouterr().out
    whole = (tmp_path / "gpu.json").read_bytes()
    date = json.loads(whole)["date"]
    others = [(check_gpu, "code_digest", "other"), (check_gpu.provenance, "hardware", "other")]
    others += [(check_gpu, "torch_build", ("torch 3", True))]
    for owner, name, other in others:
        monkeypatch.setattr(owner, name, lambda other=other: other)
        assert run(monkeypatch, tmp_path, "--parts", "a") == 0
    assert count.read_text() == "xxxxxxx"
    aside = sorted(path.name for path in tmp_path.glob("gpu-*.json"))
    assert aside == [f"gpu-{date}-2.json", f"gpu-{date}-3.json", f"gpu-{date}.json"]
    assert (tmp_path / f"gpu-{date}.json").read_bytes() == whole


def test_a_small_run_leaves_the_record_of_a_gpu_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(check_gpu, "ROOT", tmp_path)
    monkeypatch.setattr(check_gpu, "PARTS", {"a": Part((code("pass"),), (code("pass"),), 60)})
    for arguments in ([], ["--small"]):
        monkeypatch.setattr(sys, "argv", ["check_gpu.py", *arguments])
        assert check_gpu.main() == 0
    (whole,), (small,) = (list((tmp_path / "runs" / name).glob("*.json")) for name in ("gpu", "gpu-small"))
    read = [json.loads(path.read_text())["parts"]["a"]["small"] for path in (whole, small)]
    assert read == [False, True]


def test_a_part_beyond_its_limit_is_killed_with_all_that_it_started(tmp_path, monkeypatch):
    """The clock stands still until the part has started a process in a session of its own."""
    pids = tmp_path / "pids"
    child = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)"
    script = tmp_path / "starts.py"
    script.write_text(
        "import subprocess, sys\n"
        f"subprocess.run([sys.executable, '-c', {child!r}, {str(pids)!r}], start_new_session=True)\n"
    )
    parts = {"slow": Part((str(script),), (), 60), "next": Part((code("pass"),), (), 5000)}
    monkeypatch.setattr(check_gpu, "PARTS", parts)

    def monotonic() -> float:
        return 100.0 if pids.is_file() and pids.read_text() else 0.0

    for module in (check_gpu, processes):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=monotonic, sleep=time.sleep))
    assert run(monkeypatch, tmp_path) == 1
    assert statuses(tmp_path) == {"slow": "beyond its limit", "next": "done"}
    assert not processes.started_for(str(tmp_path / "slow"))


def test_a_part_that_lacks_what_it_needs_is_no_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(check_gpu, "PARTS", {"a": Part((code("raise SystemExit(2)"),), (), 60, skips=2)})
    assert run(monkeypatch, tmp_path) == 0 and statuses(tmp_path) == {"a": "skipped"}


def test_a_table_that_was_written_before_the_failure_is_kept(tmp_path, monkeypatch):
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"tables": [record.table("Title", ["a", "b"], [["x", 2.0]])]}))
    copies = code(f"import shutil; shutil.copy('{table}', '{{json}}'); raise SystemExit(1)")
    figures = lambda tables: [Figure("x", each["rows"][0][1], at_most=1.0) for each in tables]  # noqa: E731
    monkeypatch.setattr(check_gpu, "PARTS", {"a": Part((copies,), (), 60, figures)})
    assert run(monkeypatch, tmp_path) == 1
    first, second = json.loads((tmp_path / "gpu.json").read_text())["tables"]
    assert first["rows"][1] == ["a", "x", 2.0, "at most 1.00", "missed"] and second["title"] == "Title"


def test_names_of_parts_and_of_groups(tmp_path, monkeypatch):
    assert check_gpu.chosen([]) == list(check_gpu.PARTS)
    assert check_gpu.chosen(["vllm", "head"]) == ["head-0.5B", "head-7B", "head-8B", "vllm"]
    assert check_gpu.chosen(["monitoring"]) == ["build", "monitoring"]  # it reads what the other writes
    with pytest.raises(SystemExit, match="no part 'heads'"):
        run(monkeypatch, tmp_path, "--parts", "heads")


def test_the_shell_script_sets_up_and_hands_its_arguments_on(tmp_path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").write_text("echo activated\n")
    (tmp_path / "scripts/setup.sh").write_text("echo set up\n")
    (tmp_path / "scripts/check_gpu.py").write_text("import sys; print(sys.argv[1:], flush=True); sys.exit(1)\n")
    script = shutil.copy(check_gpu.ROOT / "scripts/check_gpu.sh", tmp_path / "scripts")
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    command = ["bash", script, "--parts", "head step"]
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "set up\nactivated\n['--parts', 'head step']\n")


# ---- Figures


def test_the_head_is_held_to_trl_and_to_the_floor():
    """Two turns of 8 s to 10 s and 7 s to 10 s: 0.75 on the median; the floor of 6 s in each is 0.80 of it."""
    seconds = {"bare products": [6.0, 6.0], "bare products, one read and write": [7.2, 6.3]}
    seconds |= {"AESL in one pass, tile float32": [8.0, 7.0], "TRL nll, default tiles": [10.0, 10.0]}
    tables = [
        record.table(f"{head} head, {shape} (hidden size 1)", ["a"], [], {"seconds": seconds})
        for head, shape in (("Full", "Qwen2.5-7B"), ("Frozen", "Qwen2.5-0.5B"))
    ]
    tables.append(record.table("Rows of a tile", ["a"], [], {"rows_seconds": {}}))
    found = check_gpu.head_figures(tables)
    assert [(figure.name, figure.goal, figure.verdict) for figure in found] == [
        ("full head: time to TRL nll, default tiles", "at most 0.80", "reached"),
        ("full head: bare products to it", "at least 0.85", "missed"),
        ("frozen head: time to TRL nll, default tiles", "at most 0.70", "missed"),
        ("frozen head: bare products, one read and write to it", "at least 0.85", "reached"),
    ]
    assert [figure.value for figure in found] == pytest.approx([0.75, (6 / 8 + 6 / 7) / 2, 0.75, 0.9])


def test_steps_memory_and_monitoring():
    seconds = {"SFTTrainer, nll": [2.0], "AESLSFTTrainer, nll": [1.0], "AESLSFTTrainer, aesl": [3.0]}
    raw = {"seconds": seconds, "errors": {}, "tolerance": 0.01}
    steps = check_gpu.step_figures([record.table("t", ["a"], [], raw)])
    assert [(figure.value, figure.verdict) for figure in steps] == [(0.5, "reached"), (1.5, "missed")]
    raw["errors"] = {"AESLSFTTrainer, aesl": 0.5}
    steps = check_gpu.step_figures([record.table("t", ["a"], [], raw)])
    assert [(figure.name, figure.value, figure.goal, figure.verdict) for figure in steps] == [
        ("AESLSFTTrainer, nll: step to TRL's", 0.5, "at most 1.00", "reached"),
        ("AESLSFTTrainer, aesl: off its peers", 0.5, "at most 0.01", "missed"),
    ]
    rows = [["tensors", 8.0, 10.0, 0.8], ["GPU", 12.0, 11.0, 12 / 11]]
    memory = check_gpu.memory_figures([record.table("t", ["a", "b", "c", "d"], rows)])
    assert [(figure.name, figure.verdict) for figure in memory] == [
        ("tensors: peak 8.0 GB to the estimate", ""),
        ("GPU: peak 12.0 GB to the estimate", "missed"),
    ]
    raw = {"measurement_s": [5.0, 5.0], "step_s": [9.0, 1.9, 1.9]}
    (share,) = check_gpu.monitoring_figures([record.table("t", ["a"], [], raw)])
    assert share.value == 0.05 and share.verdict == "reached"  # 5 of 5 + 50 x 1.9


# ---- Tuning


def test_the_fastest_launch_is_taken_and_the_table_is_to_that_in_use(monkeypatch):
    import tuning

    times = {tuning.Launch(2048, 8, 1): [2.0], tuning.Launch(128, 4, 1): [1.0], tuning.Launch(128, 4, 2): [4.0]}
    monkeypatch.setattr(tuning, "seconds_of", lambda kernel, launch, *given: times[launch])
    best, table = tuning.tune(3, 200, "cpu")
    assert best == dict.fromkeys(("statistics", "rest_and_gradient"), tuning.Launch(128, 4, 1))
    assert table["rows"] == [["2048 x 8 x 1", 1.0, 1.0], ["128 x 4 x 1", 0.5, 0.5], ["128 x 4 x 2", 2.0, 2.0]]


def test_a_launch_that_gives_other_numbers_is_no_candidate(monkeypatch):
    import tuning

    run_kernel = tuning.run

    def wrong(kernel, launch, tile, gradient, tokens):
        run_kernel(kernel, launch, tile, gradient, tokens)
        if launch.stages == 2:
            tokens.entropy *= 1.001
            gradient[gradient > 0] = 0

    monkeypatch.setattr(tuning, "run", wrong)
    _, table = tuning.tune(3, 200, "cpu")
    assert [row[0] for row in table["rows"] if row[1] is not None] == ["2048 x 8 x 1", "128 x 4 x 1"]
    assert [row[0] for row in table["rows"] if row[1:] == [None, None]] == [
        "statistics 128 x 4 x 2: entropy: 1.0e-03 off the launch in use",
        "rest_and_gradient 128 x 4 x 2: others' gradient: 1.0e+00 off the launch in use",
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_may_differ_by_another_order_of_sums_and_not_by_a_thousandth(dtype):
    import tuning

    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(4, 5000, generator=generator).exp() * 1e-6  # as small as the entries of a gradient
    noise = 1e-6 * torch.randn(4, 5000, generator=generator)
    expected = {"gradient": truth.to(dtype)}
    tuning.refuse_other_numbers({"gradient": (truth * (1 + noise)).to(dtype)}, expected)
    for wrong in (1.001 * truth, torch.zeros_like(truth), truth * torch.nan):
        with pytest.raises(ValueError, match="gradient: .* off the launch in use"):
            tuning.refuse_other_numbers({"gradient": wrong.to(dtype)}, expected)


# ---- The model with random weights


def test_the_random_model_has_a_word_for_every_entry(tmp_path, monkeypatch):
    import build_random_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = build_random_model.words(26 + 26**2 + 1)
    assert [word[1:] for word in (words[0], words[25], words[26], words[-1])] == ["a", "z", "aa", "aaa"]
    monkeypatch.setattr(sys, "argv", ["build", str(tmp_path / "model"), "--small"])
    build_random_model.main()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert len(tokenizer) == model.config.vocab_size == 600
    assert tokenizer.convert_ids_to_tokens(tokenizer(" a ab")["input_ids"]) == [words[0], words[27]]
    assert model.config.eos_token_id == tokenizer.eos_token_id and not torch.isnan(model.lm_head.weight).any()
