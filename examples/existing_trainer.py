"""Watch the samples of a trainer that you already have. The trainer, its loss and its weights stay as they are.

    python examples/existing_trainer.py     # one GPU of 24 GB; we have not run this size

`DiversityCallback` works beside TRL's SFTTrainer and its subclasses. Here it also keeps the weights of promising
steps, and ends by choosing the step that RL should start from.
"""

from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

from aesl_trl import DiversityCallback
from aesl_trl.files import RunFolder


def has_a_number(completions, **kwargs):
    """Say whether an answer names a number. Your own reward for RL belongs here."""
    return [float(any(map(str.isdigit, completion[0]["content"]))) for completion in completions]


rows = load_dataset("trl-lib/Capybara", split="train").map(
    lambda row: {"prompt": row["messages"][:1], "completion": row["messages"][1:2]}, remove_columns=["messages"]
)
rows = rows.select_columns(["prompt", "completion"]).train_test_split(test_size=64, seed=0)

trainer = SFTTrainer(
    model="Qwen/Qwen2.5-0.5B-Instruct",
    args=SFTConfig(output_dir="runs/existing-trainer", max_steps=250, per_device_train_batch_size=16),
    train_dataset=rows["train"],
)
trainer.add_callback(
    DiversityCallback(
        trainer,
        prompts=rows["test"].select_columns(["prompt"]),
        steps=25,
        max_new_tokens=256,  # as many as RL will sample
        reward_funcs=[has_a_number],
        selection="turning_point",
    )
)
trainer.train()

print("step  entropy (nats)  self-BLEU  mixed groups")
for row in RunFolder("runs/existing-trainer").rows("diversity.jsonl"):
    print(f"{row['step']:4d}  {row['entropy']:14.2f}  {row['self_bleu']:9.2f}  {row['groups_mixed']:12.2f}")
