"""Training, evaluation and measuring on a device without float64 (simulated; no Apple GPU was at hand)."""

import pytest
import torch
from apple_gpu import apple_gpu
from small_runs import prompt_completion_rows, steps_of, trained_weights, trainer_for


MEASURED = {
    "diversity_steps": 1,
    "diversity_num_prompts": 2,
    "diversity_samples": 2,
    "diversity_max_new_tokens": 4,
    "diversity_backend": "generate",
    "max_steps": 2,
}


@pytest.mark.parametrize(
    "changes",
    [
        {"cold_start_loss": "aesl", "packing": True, "max_length": 48, **MEASURED},
        {"cold_start_loss": "psft", "psft_refresh_steps": 2},
        pytest.param({"cold_start_loss": "gem"}, marks=pytest.mark.slow),
    ],
    ids=["aesl-packed-measured", "psft", "gem"],
)
def test_a_training_equals_that_with_float64(changes, tokenizer, tmp_path):
    runs = []
    for name in ("float64", "apple"):
        trainer = trainer_for(tokenizer, tmp_path / name, eval_rows=prompt_completion_rows(), **changes)
        if name == "apple":
            with apple_gpu():
                trainer.train()
                metrics = trainer.evaluate()
        else:
            trainer.train()
            metrics = trainer.evaluate()
        runs.append((trained_weights(trainer), steps_of(trainer), metrics))
    (expected, losses, metrics), (found, simulated_losses, simulated) = runs
    assert simulated_losses == pytest.approx(losses, rel=1e-5)
    assert simulated["eval_nll"] == pytest.approx(metrics["eval_nll"], rel=1e-5)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
