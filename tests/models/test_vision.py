"""A vision-language model that was trained on text goes through handoff, evaluation and RL."""

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny_vision import vision_language_model
from transformers import AutoProcessor, LlavaForConditionalGeneration, ProcessorMixin

from aesl_trl import AESLSFTConfig, AESLSFTTrainer
from aesl_trl.evaluation import evaluate
from aesl_trl.models.handoff import hand_off, load_for_rl
from aesl_trl.models.interpolate import interpolate
from aesl_trl.sampling.offline import load


IDS = torch.tensor([[1, 2, 3, 258, 30]])
PROMPTS = [{"prompt": [{"role": "user", "content": f"Is {index} a number?"}]} for index in range(4)]


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    model, processor = vision_language_model()
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(llava, tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("adapter"), LlavaForConditionalGeneration.from_pretrained(llava)
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(llava).save_pretrained(folder)
    return folder


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS.to(model.device)).logits


@pytest.mark.parametrize("mode", ["full", pytest.param("merge", marks=pytest.mark.slow), "continue"])
def test_it_is_handed_over_with_its_processor(llava, adapter, tmp_path, mode):
    source = llava if mode == "full" else adapter
    result = hand_off(source, output=tmp_path / "out", mode="auto" if mode == "full" else mode)
    assert result["mode"] == mode and result["template"] == {"chat": True, "turn_end": "<|im_end|>"}
    model, processor = load_for_rl(tmp_path / "out")
    assert isinstance(processor, ProcessorMixin) and processor.tokenizer.padding_side == "left"
    expected, _ = load(str(source), "cpu")
    torch.testing.assert_close(logits(model.eval()), logits(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.slow  # the handoff's tests load it as the evaluation does
def test_it_is_evaluated(llava, adapter, tmp_path, monkeypatch, capsys):
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    (tmp_path / "own.py").write_text("def fine(completions, **kwargs):\n    return [1.0 for _ in completions]\n")
    monkeypatch.chdir(tmp_path)
    values = {"dataset_name": "held.jsonl", "reward_funcs": "own.py:fine", "samples": "2", "max_new_tokens": "4"}
    flags = [flag for name, value in values.items() for flag in (f"--{name}", value)]
    evaluate.main([str(llava), str(adapter), *flags, "--use_cpu", "true", "--output", "out"])
    assert capsys.readouterr().out.count("pass@1 1.000") == 2


def test_two_of_them_are_averaged(llava, tmp_path):
    interpolate(llava, llava, tmp_path / "mixed", weight=0.5)
    (mixed, processor), (expected, _) = (load(str(place), "cpu") for place in (tmp_path / "mixed", llava))
    torch.testing.assert_close(logits(mixed), logits(expected))
    assert isinstance(processor, ProcessorMixin)


@pytest.mark.slow
@pytest.mark.parametrize("with_adapter", [False, True])
def test_text_trains_it_and_its_samples_prove_the_handoff(llava, tmp_path, with_adapter):
    answer = {"completion": [{"role": "assistant", "content": "yes"}]}
    peft_config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") if with_adapter else None
    settings = {"max_steps": 2, "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": []}
    measured = {"diversity_steps": 2, "diversity_samples": 4, "diversity_max_new_tokens": 64, "selection": "last"}
    trainer = AESLSFTTrainer(
        model=str(llava),
        args=AESLSFTConfig(str(tmp_path / "run"), **settings, **measured),
        train_dataset=Dataset.from_list([{**row, **answer} for row in PROMPTS]),
        diversity_prompts=PROMPTS,
        peft_config=peft_config,
    )
    trainer.train()
    result = hand_off(tmp_path / "run")
    assert result["mode"] == ("merge" if with_adapter else "full") and result["samples"]["num"] == 16
    own = result["checks"]["own_samples"]
    assert own["nll"] == pytest.approx(own["entropy"], abs=0.2)
