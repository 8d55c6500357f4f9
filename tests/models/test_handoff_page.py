"""The Python of docs/handoff.md starts RL from a handoff, as it is printed there."""

import functools
from pathlib import Path

import pytest
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from printed import CPU, GRPO, blocks
from tiny_models import build_tokenizer
from transformers import AutoModelForCausalLM

from aesl_trl.models.handoff import hand_off


PAGE = Path(__file__).parents[2] / "docs" / "handoff.md"
SNIPPETS = blocks(PAGE)
ONE_STEP = CPU | GRPO | {"max_completion_length": 8}


def lengths(completions, **kwargs):
    return [float(len(completion[0]["content"])) for completion in completions]


def test_the_page_has_one_snippet_for_each_mode():
    assert len(SNIPPETS) == 2 and "load_for_rl" not in SNIPPETS[0] and "load_for_rl" in SNIPPETS[1]


@pytest.mark.parametrize(("mode", "snippet"), zip(["merge", "continue"], SNIPPETS, strict=True))
def test_a_step_of_rl_from_the_snippet(tmp_path, tiny_model_dir, monkeypatch, mode, snippet):
    """Only the size of the run is set, which the page leaves to GRPOConfig."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.resize_token_embeddings(model.vocab_size + 5)
    new = list(range(259, 264))  # as TRL adds the tokens of a chat template
    whole = {"modules_to_save": ["lm_head"], "trainable_token_indices": {"embed_tokens": new}}
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **whole)
    adapter = get_peft_model(model, lora)
    adapter.save_pretrained(tmp_path / "adapter")
    build_tokenizer().save_pretrained(tmp_path / "adapter")
    hand_off(tmp_path / "adapter", output=tmp_path / "RUN" / "handoff", mode=mode)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trl, "GRPOConfig", functools.partial(trl.GRPOConfig, **ONE_STEP))
    prompts = Dataset.from_list([{"prompt": [{"role": "user", "content": f"say {index}"}]} for index in range(4)])
    found = {"reward": lengths, "prompts": prompts}
    exec(compile(snippet, str(PAGE), "exec"), found)
    trainer = found["trainer"]
    assert trainer.state.global_step == 1 and trainer.state.log_history[0]["grad_norm"] > 0
    trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    kinds = ("lora_", "trainable_tokens_delta", "modules_to_save")
    assert all(any(kind in name for kind in kinds) for name in trained) == (mode == "continue")
