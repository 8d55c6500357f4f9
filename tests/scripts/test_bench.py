"""The benchmarks: each runs through at a tiny size, records one form, and the page is what the records give."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import bench
import page
import preloaded
import pytest
import record
import where_time_goes


SCRIPTS = Path(bench.__file__).parent / "bench"
TINY = {
    "head": "--shape tiny --tokens 40 --repeats 2 --head full --no-peaks",
    "step": "--model MODEL --rows ROWS --labels all masked --length 48 --rows_per_step 2 --blocks 1 --block_steps 2 "
    "--mode full",
    "self_bleu": "--completions 3 --words 20 --repeats 2 --hypotheses 2",
    "sampling": "--model MODEL --rows ROWS --prompts 2 --samples 2 --max_new_tokens 6 --repeats 2",
    "monitoring": "--model MODEL --steps 5 --diversity_steps 2 --batch 2 --length 16 --num_prompts 2 --samples 2 "
    "--max_new_tokens 4 --token_budget 0",
    "where_time_goes": "--model MODEL --rows ROWS --steps 1 --batch 2 --length 48 --prompts 2 --samples 2 "
    "--max_new_tokens 4",
    "grading": "--answers 20 --repeats 1 --children 1",
    "startup": "--commands select recipes --repeats 1",
}
SLOW = ("grading", "startup")  # they start processes that load math-verify or TRL


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    row = {"question": "How many eggs are two and three eggs?", "answer": "Two and three are 5.\n#### 5"}
    path.write_text(f"{json.dumps(row)}\n" * 4)
    return str(path)


def check_record(found: dict) -> None:
    """Hold a record to the form that record.py promises."""
    texts = ("name", "command", "date", "hardware")
    assert all(found[key] and isinstance(found[key], str) for key in texts) and found["load"] > 0
    assert {"python", "torch", "trl"} <= set(found["versions"])
    assert found["command"].startswith("python scripts/bench/") and "/" not in found["command"].split(".py", 1)[1]
    for table in found["tables"]:
        assert table["title"] and table["raw"] and table["rows"]
        for row in table["rows"]:
            assert isinstance(row[0], str) and len(row) == len(table["columns"])
            for cell in row[1:]:
                if isinstance(cell, dict):
                    assert 0 < cell["low"] <= cell["median"] <= cell["high"]


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in TINY])
def test_each_runs_through(name, tmp_path, tiny_model_dir, rows):
    arguments = TINY[name].replace("MODEL", tiny_model_dir).replace("ROWS", rows).split()
    result = preloaded.run([SCRIPTS / f"{name}.py", *arguments, "--json", tmp_path / "out.json"], timeout=240)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads((tmp_path / "out.json").read_text())
    check_record(found)
    assert found["name"] == name
    for table in found["tables"]:
        assert record.markdown(table) in result.stdout


@pytest.mark.slow
def test_the_heads_peaks_are_those_of_a_fresh_process(tmp_path):
    arguments = TINY["head"].replace("--no-peaks", "").split()
    result = preloaded.run([SCRIPTS / "head.py", *arguments, "--json", tmp_path / "out.json"], timeout=240)
    assert result.returncode == 0, result.stderr[-2000:]
    (table,) = json.loads((tmp_path / "out.json").read_text())["tables"]
    assert set(table["raw"]["peak_bytes"]) == set(table["raw"]["seconds"])


RISE = """
import record, torch
torch.ones(8 * 2**20)  # 32 MiB, freed: nothing of it may serve the block
with record.resident_rise() as rise:
    torch.ones(4 * 2**20)  # 16 MiB, freed before the block ends
print(rise[0])
"""


def test_a_rise_is_that_of_the_block_alone():
    """In a process of its own: what a test process gives back in the meantime would hide it."""
    environment = {**os.environ, "PYTHONPATH": str(Path(record.__file__).parent)}
    done = subprocess.run([sys.executable, "-c", RISE], env=environment, capture_output=True, text=True, check=True)
    assert 15 * 2**20 < int(done.stdout) < 20 * 2**20


@pytest.mark.parametrize("quick", [True, False])
def test_the_scripts_take_the_arguments_that_the_command_gives(quick, tmp_path, tiny_model_dir, rows, monkeypatch):
    real = {} if quick else {"model": Path(tiny_model_dir), "rows": Path(rows)}
    args = SimpleNamespace(names=[], quick=quick, output_dir=tmp_path, **{"model": None, "rows": None, **real})
    names = bench.chosen(args)
    left_out = {name for name, benchmark in bench.BENCHMARKS.items() if benchmark.real_model and quick}
    assert set(names) == set(bench.BENCHMARKS) - left_out and {"step", "startup"} <= set(names)
    monkeypatch.setattr(record, "show", lambda table: table)
    for name in names:
        _, script, *arguments = bench.command(name, args)
        module = import_module(Path(script).stem)
        monkeypatch.setattr(module, "bench", lambda *given: record.table("a", ["b"], [["c"]]))
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        module.main()
        assert json.loads((tmp_path / f"{name}.json").read_text())["tables"]


def run(monkeypatch, *arguments) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["bench.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        bench.main()
    return left.value.code


def test_what_cannot_run_is_refused(monkeypatch, capsys, tiny_model_dir, rows):
    assert run(monkeypatch, "heads") == 2 and "there is no benchmark 'heads'" in capsys.readouterr().err
    assert run(monkeypatch, "--model", tiny_model_dir) == 2 and "go together" in capsys.readouterr().err
    assert run(monkeypatch, "--model", rows, "--rows", rows) == 2 and "folder of a model" in capsys.readouterr().err
    assert "step_real wants a real model" in run(monkeypatch, "step_real")


def test_a_benchmark_that_fails_is_named_and_the_others_run(monkeypatch, tmp_path, capfd):
    both = {"a": bench.Benchmark("self_bleu", "--words 0", ""), "b": bench.Benchmark("self_bleu", "--help", "")}
    monkeypatch.setattr(bench, "BENCHMARKS", both)
    assert run(monkeypatch, "--quick", "--output_dir", tmp_path) == "bench.py: failed: a"
    assert "== b" in capfd.readouterr().out


def test_a_ratio_is_that_within_a_turn():
    # Turn by turn 2/1, 3/2, 8/2: the median is not 3/2 = median / median
    assert record.ratio([2, 3, 8], [1, 2, 2]) == {"median": 2, "low": 1.5, "high": 4}


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (None, ""),
        ("x", "x"),
        (7, "7"),
        (0.123, "0.12"),
        (1.0, "1.00"),
        (12.34, "12.3"),
        (99.97, "100"),
        (1234.5, "1234"),
        ({"median": 0.5, "low": 0.25, "high": 2.0}, "0.5 (0.25 to 2.00)"),
        ({"median": 1.0, "low": 1.0, "high": 1.0}, "1.00"),
    ],
)
def test_a_cell(cell, text):
    assert record.cell_text(cell) == text


def test_a_row_needs_a_cell_for_each_column():
    with pytest.raises(AssertionError, match="other cells"):
        record.table("t", ["a", "b"], [["x"]])


def test_a_page_is_filled_between_its_markers(tmp_path):
    table = record.table("Title", ["a", "b"], [["x", 0.5]])
    found = {"command": "python scripts/bench/head.py", "date": "2026-01-01", "commit": "0123456789", "threads": 1}
    found |= {"hardware": "a CPU, 2 cores", "load": 9.0, "versions": {"torch": "2.13"}, "tables": [table]}
    (tmp_path / "head.json").write_text(json.dumps(found))
    before = "# Page\n<!-- recorded: head -->\nold\n<!-- end -->\nby hand\n<!-- recorded: gpu -->\n<!-- end -->\n"
    after = page.filled(before, tmp_path)
    assert after == (
        "# Page\n<!-- recorded: head -->\n\n**Title**\n\n| a   |   b |\n| --- | --: |\n| x   | 0.5 |\n\n"
        "`python scripts/bench/head.py`  \n2026-01-01, commit 01234567, a CPU, 2 cores, 1 thread, load average 9.0; "
        "other work shared the cores; torch 2.13\n\n<!-- end -->\nby hand\n"
        "<!-- recorded: gpu -->\n\nNo GPU has run this yet.\n\n<!-- end -->\n"
    )
    assert page.filled(after, tmp_path) == after
    (tmp_path / "head.json").write_text(json.dumps({**found, "commit": "0123456789+"}))
    assert page.filled(before, tmp_path) == after.replace("commit 01234567,", "commit 01234567 with changes,")


def test_a_method_that_disagrees_is_not_timed_and_its_row_says_so(monkeypatch):
    import head

    def wrong(problem):
        loss = head.full_nll(problem)
        problem.hidden.grad *= 1.01
        return loss

    run = head.Method("wrong", "nll", wrong)
    monkeypatch.setattr(head, "methods_for", lambda *given: [head.Method("right", "nll", head.full_nll), run])
    monkeypatch.setattr(head, "best_tiles", lambda problem: None)
    args = SimpleNamespace(
        tokens=8, device="cpu", dtype="float32", autocast=False, rivals=False, repeats=2, peaks=False
    )
    kept = []
    table = head.bench(args, "tiny", "full", None, lambda table: kept.append(len(table["raw"]["seconds"]["right"])))
    assert kept == [1, 2]  # what a run that is killed has written
    assert [row[0] for row in table["rows"]] == ["right", "wrong: gradient is 1.0e-02 off the first nll method's"]
    assert table["raw"]["errors"] == {"wrong": pytest.approx(0.01, rel=1e-3)}


def test_trainers_take_turns_both_ways_and_the_first_turn_is_not_counted(monkeypatch):
    """The second trainer's loss is off from step 2 on; AESL's loss is its own, and its nll is the same at step 1."""
    import step

    order, kept = [], []
    losses = {"SFTTrainer, nll": 2.0, "AESLSFTTrainer, nll": 2.0, "AESLSFTTrainer, aesl": 0.5}

    def train_block(trainer, name, args):
        order.append(name.split()[-1] if name.startswith("AESL") else "TRL")
        off = 0.1 * (name == "AESLSFTTrainer, nll" and order.count("nll") > 1)
        return [{"loss": losses[name] + off, **({"nll": 2.0} if "aesl" in name else {})}]

    trainer = SimpleNamespace(add_callback=lambda timer: None, train_dataset=[{"input_ids": [1]}])
    monkeypatch.setattr(step, "make_trainer", lambda *given: trainer)
    monkeypatch.setattr(step, "train_block", train_block)
    monkeypatch.setattr(step.StepTimer, "take", lambda timer, warmup: [float(len(order))])
    args = SimpleNamespace(device="cpu", bf16=False, trainers="all", trl_tiles=None, blocks=2, warmup_steps=0)
    args = SimpleNamespace(**vars(args), peaks=False, packing=False, rows_per_step=1)
    found = step.bench(args, step.Case("small", "full", "all"), kept.append)
    assert order == ["aesl", "nll", "TRL", "TRL", "nll", "aesl", "aesl", "nll", "TRL"] and len(kept) == 2
    assert found["raw"]["seconds"] == dict(zip(losses, ([4.0, 9.0], [5.0, 8.0], [6.0, 7.0]), strict=True))
    assert [row[0] for row in found["rows"]] == [
        "SFTTrainer, nll",
        "AESLSFTTrainer, aesl",
        "AESLSFTTrainer, nll: the logged nll is 5.0e-02 off TRL's",
    ]
    found["raw"]["first_nll"]["AESLSFTTrainer, aesl"] = 2.02
    assert set(step.disagreements(found["raw"])) == {"AESLSFTTrainer, nll", "AESLSFTTrainer, aesl"}


def test_the_page_is_what_the_records_give():
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.filled(text, page.RECORDS) == text, "run python scripts/bench.py --page"
    places = {place[2] for place in page.PLACE.finditer(text)}
    assert places >= {*bench.BENCHMARKS, "gpu"} and {path.stem for path in page.RECORDS.glob("*.json")} <= places


def frame(name: str, back):
    module, _, qualname = name.partition(":")
    return SimpleNamespace(f_globals={"__name__": module}, f_code=SimpleNamespace(co_qualname=qualname), f_back=back)


@pytest.mark.parametrize(
    ("stack", "part", "owner"),
    [
        (["transformers.trainer:step", "aesl_trl.losses.head:f", "torch.nn:g"], "head and loss", 1),
        (["aesl_trl.training.trainer:loss", "transformers.models.llama:f", "torch:g"], "forward of the layers", 1),
        (["trl.trainer:step", "accelerate.accelerator:Accelerator.backward", "torch:g"], "backward of the layers", 1),
        (["transformers.trainer:step", "accelerate.optimizer:step", "torch:g"], "optimizer", 1),
        (["transformers.generation.utils:sample", "transformers.models.llama:f"], "sampling", 1),
        (["transformers.generation.utils:sample", "aesl_trl.sampling.generate:f"], "sampling", 1),
        (["aesl_trl.training.rows:f", "json:g"], "rest", 0),
        (["transformers.trainer:step"], "rest", 0),
    ],
)
def test_time_goes_to_the_innermost_frame_outside_torch(stack, part, owner):
    found = None
    for name in stack:
        found = frame(name, found)
    assert where_time_goes.place_of(found) == (part, stack[owner].replace(":", "."))


def test_sampled_time_is_all_the_time_and_goes_where_it_was_spent():
    def spin(until: int) -> int:
        return sum(number * number for number in range(until))

    with where_time_goes.Sampled() as sampled:
        spin(3_000_000)
    assert set(sampled.seconds) == {("rest", "python")} and sampled.seconds.total() > 0
