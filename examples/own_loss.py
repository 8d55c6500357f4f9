"""A loss of your own in the fused head: two ways to say what a token weighs.

    python examples/own_loss.py             # one GPU of 24 GB; we have not run this size

A rule sees statistics of each token, never the logits. docs/losses.md lists the statistics, and shows how a loss that
needs all logits gets its gradient.
"""

import torch
from datasets import load_dataset

from aesl_trl import AESLSFTConfig, AESLSFTTrainer
from aesl_trl.losses import TokenRule


class FocalTrainer(AESLSFTTrainer):
    """Trains with focal loss: a token weighs (1 - p) ** 2, where p is the probability that the model gives it."""

    def create_token_rule(self):
        return TokenRule(weights=lambda stats: (1 - stats.log_probs.exp()) ** 2)  # constant in the backward pass


class PatientTrainer(AESLSFTTrainer):
    """Trains with plain nll, but leaves out each token that the model already expects by more than 95%."""

    def create_token_rule(self):
        def weights(stats):
            return torch.where(stats.log_probs.exp() > 0.95, 0.0, 1.0)

        return TokenRule(weights=weights)


rows = load_dataset("trl-lib/Capybara", split="train").map(
    lambda row: {"prompt": row["messages"][:1], "completion": row["messages"][1:2]}, remove_columns=["messages"]
)
rows = rows.select_columns(["prompt", "completion"])

for trainer_class in (FocalTrainer, PatientTrainer):
    trainer = trainer_class(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        args=AESLSFTConfig(
            output_dir=f"runs/own-loss/{trainer_class.__name__}", max_steps=100, per_device_train_batch_size=16
        ),
        train_dataset=rows,
    )
    trainer.train()
    last = [row for row in trainer.state.log_history if "weight_mean" in row][-1]
    print(f"{trainer_class.__name__}: mean weight {last['weight_mean']:.2f}, nll {last['nll']:.2f} in the last row")
