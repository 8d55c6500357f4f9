"""A cold start through LoRA, and the two ways from its adapter to GRPO.

    python examples/lora.py                 # merge: RL starts from whole weights, here with a new adapter
    python examples/lora.py continue        # RL goes on training the adapter of the cold start

The data are TRL's own example of prompts and completions, and the reward counts characters: replace both.
"""

import sys
from pathlib import Path

from datasets import load_dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from aesl_trl import AESLSFTConfig, AESLSFTTrainer
from aesl_trl.models.handoff import hand_off, load_for_rl


MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
RUN = Path("runs/lora")
LORA = LoraConfig(r=32, lora_alpha=64, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def near_200_characters(completions, **kwargs):
    """Give the full reward to an answer of 200 characters, and less the further an answer is from that."""
    return [max(0.0, 1 - abs(len(completion[0]["content"]) - 200) / 200) for completion in completions]


rows = load_dataset("trl-lib/Capybara", split="train").map(
    lambda row: {"prompt": row["messages"][:1], "completion": row["messages"][1:2]}, remove_columns=["messages"]
)
rows = rows.select_columns(["prompt", "completion"]).train_test_split(test_size=64, seed=0)

sft = AESLSFTTrainer(
    model=MODEL,
    args=AESLSFTConfig(
        output_dir=str(RUN / "sft"),
        max_steps=250,
        per_device_train_batch_size=16,
        learning_rate=1e-4,  # an adapter takes about ten times the rate of whole weights
        diversity_steps=25,
        diversity_max_new_tokens=256,
    ),
    train_dataset=rows["train"],
    eval_dataset=rows["test"],  # its prompts are the held-out prompts
    peft_config=LORA,
)
sft.train()

mode = sys.argv[1] if len(sys.argv) > 1 else "merge"
hand_off(RUN / "sft", mode=mode, output=RUN / "handoff")

if mode == "merge":
    start = {"model": str(RUN / "handoff"), "peft_config": LORA}
else:
    model, processing_class = load_for_rl(RUN / "handoff")  # the adapter on its base, trainable
    start = {"model": model, "processing_class": processing_class}
grpo = GRPOTrainer(
    **start,
    reward_funcs=near_200_characters,
    args=GRPOConfig(output_dir=str(RUN / "grpo"), max_steps=100, max_completion_length=256, learning_rate=1e-5),
    train_dataset=rows["train"].select_columns(["prompt"]),
)
grpo.train()
