"""A small LoRA adapter on a base."""

from pathlib import Path

import torch
from tiny_models import build_tokenizer


def make_adapter(base: str, folder: Path) -> str:
    """Save a LoRA adapter with an effect: PEFT starts B at zero, which would let a lost adapter go unseen."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype="auto"),
        LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)
