"""A cold start and the RL after it, in one script: SFT with AESL, a checkpoint selected, handed over, GRPO from it.

    pip install '.[math]'                   # in the checkout: math-verify judges the answers
    python examples/sft_to_grpo.py          # one GPU of 24 GB; we have not run this size

GSM8K's training set is split three ways: demonstrations, held-out prompts whose samples we measure, and problems for
RL. For your own data, write `as_row` anew, and give a reward function of your own in place of `math_reward`.
"""

import re
from pathlib import Path

from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

from aesl_trl import AESLSFTConfig, AESLSFTTrainer
from aesl_trl.diversity.selection import select_run
from aesl_trl.models.handoff import hand_off
from aesl_trl.rewards.functions import load_reward_funcs


MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
RUN = Path("runs/sft-to-grpo")
NUM_DEMONSTRATIONS, NUM_HELD_OUT = 1000, 64


def as_row(example):
    """Turn a problem of GSM8K into a prompt, a demonstration, and the solution that `math_reward` compares with."""
    steps, answer = re.sub("<<.*?>>", "", example["answer"]).split("#### ")
    return {
        "prompt": [{"role": "user", "content": f"{example['question']}\nPut the answer into \\boxed{{}}."}],
        "completion": [{"role": "assistant", "content": f"{steps}The answer is \\boxed{{{answer}}}."}],
        "solution": example["answer"],
    }


problems = load_dataset("openai/gsm8k", "main", split="train").shuffle(seed=0)
rows = problems.map(as_row, remove_columns=problems.column_names)
demonstrations = rows.select(range(NUM_DEMONSTRATIONS))
held_out = rows.select(range(NUM_DEMONSTRATIONS, NUM_DEMONSTRATIONS + NUM_HELD_OUT))
rl_problems = rows.select(range(NUM_DEMONSTRATIONS + NUM_HELD_OUT, len(rows))).remove_columns("completion")
reward_funcs = load_reward_funcs(["math_reward"])  # by name, so that untrusted answers are judged in a child process

# ---- 1. SFT. Every 25 steps the trainer samples from the model, and keeps the weights of promising steps

sft = AESLSFTTrainer(
    model=MODEL,
    args=AESLSFTConfig(
        output_dir=str(RUN / "sft"),
        cold_start_loss="aesl",  # "nll" is the usual loss
        num_train_epochs=4,
        per_device_train_batch_size=16,
        learning_rate=1e-5,
        diversity_steps=25,
        diversity_max_new_tokens=512,  # what RL will sample below
        selection="turning_point",
    ),
    train_dataset=demonstrations,
    eval_dataset=held_out,
    diversity_prompts=held_out,
    reward_funcs=reward_funcs,
)
sft.train()

# ---- 2. The checkpoint for RL. Training has chosen one already; other rules choose again from the same files

selection = select_run(RUN / "sft")
print(f"RL starts from step {selection['step']}: {selection['reason']}")

# ---- 3. A folder that GRPOTrainer can start from, checked against the checkpoint

hand_off(RUN / "sft", output=RUN / "handoff")

# ---- 4. RL

grpo = GRPOTrainer(
    model=str(RUN / "handoff"),
    reward_funcs=reward_funcs,
    args=GRPOConfig(
        output_dir=str(RUN / "grpo"),
        max_steps=300,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=8,  # 16 prompts x 8 samples a step
        num_generations=8,
        max_completion_length=512,
        learning_rate=1e-6,
    ),
    train_dataset=rl_problems,
)
grpo.train()
grpo.save_model()
