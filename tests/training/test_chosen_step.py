"""The step that a callback chose goes to RL: README's snippet, its commands, and GRPOTrainer's first step."""

import re
from functools import partial
from pathlib import Path

import pytest
from datasets import Dataset
from monitored_runs import PROMPTS, plan
from safetensors.torch import load_file
from small_draws import ending_model
from small_runs import cpu_settings, prompt_completion_rows, small_config
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import aesl_trl
from aesl_trl import AESLSFTTrainer, DiversityCallback, files
from aesl_trl.cli import main


README = Path(__file__).parents[2] / "README.md"
PEAK_AT_2 = (1.0, 3.0, 5.0, 3.0, 2.0, 1.0, 0.5)


def section(name: str) -> str:
    """Return README's section of that heading."""
    return re.search(
        rf"^## {re.escape(name)}\n(.*?)^## ", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )[1]


def command(name: str, run: Path) -> list[str]:
    """Return the command of that name from README's section on the way to RL, for the run `run`."""
    words = re.search(rf"^aesl ({name} [^#\n]*)", section("From checkpoint to RL"), re.MULTILINE)[1].split()
    return [word.replace("cold-start", str(run)) for word in words]


def right(completions, **kwargs):
    return [1.0] * len(completions)


def run_snippet(trainer, monkeypatch) -> None:
    """Run README's snippet with short samples, a measurement at every step and a reward that needs no gold answers."""
    snippet = re.search(r"```python\n(.*?)```", section("Already have a trainer?"), re.DOTALL)[1]
    snippet = snippet.replace("steps=50", "steps=1")
    snippet = re.sub(r"reward_funcs=\[.*?\]", "reward_funcs=[right]", snippet)
    assert all(words in snippet for words in ('selection="turning_point"', "steps=1", "right"))
    monkeypatch.setattr(aesl_trl, "DiversityCallback", partial(DiversityCallback, samples=2, max_new_tokens=4))
    exec(snippet, {"trainer": trainer, "held_out": PROMPTS, "right": right})


class FirstStep(TrainerCallback):
    """Keeps the weights that RL begins with."""

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("kind", [pytest.param(SFTTrainer, marks=pytest.mark.slow), AESLSFTTrainer])
def test_the_callbacks_choice_reaches_grpos_first_step(kind, tokenizer, tmp_path, monkeypatch, capsys):
    plan(monkeypatch, PEAK_AT_2)
    run, settings = tmp_path / "run", {"max_steps": 6, "learning_rate": 1e-4}
    trainer = kind(
        model=ending_model(tokenizer, tokenizer.eos_token_id),
        args=SFTConfig(**cpu_settings(run, **settings)) if kind is SFTTrainer else small_config(run, **settings),
        train_dataset=prompt_completion_rows(),
        processing_class=tokenizer,
    )
    run_snippet(trainer, monkeypatch)
    trainer.train()
    trainer.save_model()
    assert "selected step 2 (" in capsys.readouterr().out

    main(command("select", run))
    out = capsys.readouterr().out
    assert "selected step 2 by turning_point" in out and "replaces" not in out
    assert files.read_json(run / files.OWN / files.SELECTION)["rule"] == "turning_point"
    main(command("handoff", run))
    assert str(run / files.OWN / "handoff") in capsys.readouterr().out

    first = FirstStep()
    grpo = GRPOTrainer(
        model=str(run / files.OWN / "handoff"),
        reward_funcs=lambda completions, **kwargs: [float(len(text)) for text in completions],
        args=GRPOConfig(
            **cpu_settings(tmp_path / "grpo", max_steps=1, per_device_train_batch_size=2),
            num_generations=2,
            max_completion_length=4,
        ),
        train_dataset=Dataset.from_list(PROMPTS),
        callbacks=[first],
    )
    grpo.train()
    chosen = load_file(run / files.OWN / files.CANDIDATES / "step-2" / "model.safetensors")
    last = load_file(run / "model.safetensors")
    assert all(weight.equal(chosen[name]) for name, weight in first.weights.items() if name in chosen)
    assert not all(weight.equal(last[name]) for name, weight in first.weights.items() if name in last)


def test_another_rule_says_what_it_replaces_and_the_card_agrees(tokenizer, tmp_path, monkeypatch, capsys):
    plan(monkeypatch, PEAK_AT_2)
    trainer = AESLSFTTrainer(
        model=ending_model(tokenizer, tokenizer.eos_token_id),
        args=small_config(tmp_path, max_steps=6),
        train_dataset=prompt_completion_rows(),
        processing_class=tokenizer,
    )
    settings = {"steps": 1, "samples": 2, "max_new_tokens": 4, "metric": "self_bleu", "patience": 2}
    trainer.add_callback(DiversityCallback(trainer, PROMPTS, selection="turning_point", **settings))
    trainer.train()
    run = files.read_settings(tmp_path)
    recorded = {name: run[name] for name in ("selection", "diversity_metric", "diversity_patience")}
    assert recorded == {"selection": "turning_point", "diversity_metric": "self_bleu", "diversity_patience": 2}
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "- selection: turning_point\n- selected step: 2 (self_bleu:" in card

    capsys.readouterr()
    main(["select", str(tmp_path), "--rule", "last"])
    out = capsys.readouterr().out
    assert "selected step 6 by last" in out and "; replaces step 2, chosen by turning_point -> " in out
    assert f" -> {tmp_path / files.OWN / files.SELECTED}; next: aesl handoff " in out
    main(["select", str(tmp_path)])  # the recorded rule, and its metric
    out = capsys.readouterr().out
    assert "selected step 2 by turning_point: self_bleu" in out and "; replaces step 6, chosen by last -> " in out
