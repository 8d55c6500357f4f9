"""The scripts of examples/ run from their first line to their last, with a small model and few steps."""

import json
import sys
from pathlib import Path

import matplotlib
import pytest
import torch
from printed import run_printed, shrink, swapped
from safetensors.torch import load_file

from aesl_trl import AESLSFTTrainer
from aesl_trl.files import read_json, read_jsonl


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
# as GSM8K's and Capybara's rows are
PROBLEMS = [
    {"question": f"What is {n} + 2?", "answer": f"{n} + 2 = <<{n}+2={n + 2}>>{n + 2}\n#### {n + 2}"} for n in range(16)
]
TURNS = [
    {
        "source": "test",
        "messages": [
            {"role": role, "content": f"{role} {n} of {turn}"} for turn in range(2) for role in ("user", "assistant")
        ],
    }
    for n in range(72)
]


@pytest.fixture
def example(tmp_path, tiny_model_dir, monkeypatch):
    """Return what runs an example in an empty folder; its swaps are made in the text, and each has to be found."""

    def run(name, rows, swaps=(), arguments=()):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        shrink(monkeypatch, rows)
        source = swapped((EXAMPLES / name).read_text(encoding="utf-8"), {MODEL: tiny_model_dir, **dict(swaps)})
        return run_printed(source, EXAMPLES / name)

    return run


def test_sft_to_grpo(example, capfd):
    found = example("sft_to_grpo.py", PROBLEMS, {"1000, 64": "8, 4"})
    run = found["RUN"]
    selection, handoff = read_json(run / "sft/_aesl/selection.json"), read_json(run / "handoff/handoff.json")
    assert (
        handoff["step"] == selection["step"] and f"RL starts from step {selection['step']}:" in capfd.readouterr().out
    )
    assert len(found["demonstrations"]) == 8 and len(found["rl_problems"]) == 4
    held_out = set(found["held_out"]["solution"])
    assert held_out.isdisjoint([*found["demonstrations"]["solution"], *found["rl_problems"]["solution"]])
    assert "<<" not in json.dumps(found["rows"][0]["completion"])
    assert found["grpo"].state.global_step == 1
    # no reward was earned, so RL's weights are those that it started from
    start, end = (load_file(run / folder / "model.safetensors") for folder in ("handoff", "grpo"))
    assert all((start[name] == end[name]).all() for name in start)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["merge", "continue"])
def test_lora(example, mode):
    found = example("lora.py", TURNS, arguments=[mode])
    assert read_json(found["RUN"] / "handoff/handoff.json")["mode"] == mode
    grpo = found["grpo"]
    assert grpo.state.global_step == 1 and grpo.state.log_history[0]["grad_norm"] > 0
    trained = [name for name, parameter in grpo.model.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name for name in trained)


@pytest.mark.slow
def test_own_loss(example, capfd, monkeypatch, tiny_model_dir):
    """Each step's mean weight is that of its formula on the model's plain probabilities of the labels."""
    trainers, probabilities, compute_loss = {}, {}, AESLSFTTrainer.compute_loss

    def spy(self, model, inputs, **more):
        with torch.no_grad():
            logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
        labels = inputs["labels"][:, 1:]
        kept = labels != -100
        trainers[type(self).__name__] = self
        found = logits[kept].double().softmax(-1).gather(1, labels[kept][:, None])
        probabilities.setdefault(type(self).__name__, []).append(found)
        return compute_loss(self, model, inputs, **more)

    monkeypatch.setattr(AESLSFTTrainer, "compute_loss", spy)
    expected = 1 / read_json(Path(tiny_model_dir) / "config.json")["vocab_size"]  # an untrained model knows no token
    example("own_loss.py", TURNS, {"> 0.95": f"> {expected}"})
    rules = {"FocalTrainer": lambda p: (1 - p) ** 2, "PatientTrainer": lambda p: (p <= expected).double()}
    assert trainers.keys() == rules.keys()
    for name, rule in rules.items():
        logged = [row["weight_mean"] for row in trainers[name].state.log_history if "weight_mean" in row]
        wanted = [rule(found).mean().item() for found in probabilities[name]]
        assert logged == pytest.approx(wanted, rel=1e-5) and len(logged) == 4 and 0 < max(logged) < 1
    said = [line for line in capfd.readouterr().out.splitlines() if ": mean weight " in line]
    assert [line.split(":")[0] for line in said] == ["FocalTrainer", "PatientTrainer"]


@pytest.mark.slow
def test_existing_trainer(example, capfd):
    example("existing_trainer.py", TURNS)
    rows = read_jsonl("runs/existing-trainer/_aesl/diversity.jsonl")
    printed = capfd.readouterr().out.split("step  entropy")[1].splitlines()[1:]
    assert [int(line.split()[0]) for line in printed] == [row["step"] for row in rows]
    assert read_json("runs/existing-trainer/_aesl/selection.json")["rule"] == "turning_point"


@pytest.mark.slow
def test_the_notebook(tmp_path, monkeypatch):
    """Its code cells run in their order, as a kernel runs them, with fewer steps of SFT and of RL."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, "task", None)
    del sys.modules["task"]  # of another recipe
    matplotlib.use("agg")
    book = read_json(EXAMPLES / "skills_tiny.ipynb")
    assert all(not cell["outputs"] for cell in book["cells"] if cell["cell_type"] == "code")
    found = {}
    for index, cell in enumerate(book["cells"]):
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            sizes = {"= 120, 80": "= 40, 5"} if "= 120, 80" in source else {}
            run_printed(swapped(source, sizes), f"cell {index}", found)
    assert [row["step"] for row in found["rows"]] == [0, 10, 20, 30, 40]
    assert set(found["curves"]) == {found["selection"]["step"], 40}
    assert all(points[-1][0] == 5 for points in found["curves"].values())
