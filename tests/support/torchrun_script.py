"""The script that test_trainer_processes.py launches with torchrun: `python torchrun_script.py FOLDER`.

The test also runs it itself in one process.

Each process writes what it holds to FOLDER/rank-R.pt.
"""

import sys
from pathlib import Path

import torch
from small_runs import LONG_PAIR, PAIRS, prompt_completion_rows, small_config, steps_of, trained_weights
from tiny_models import build_model, build_tokenizer

from aesl_trl import AESLSFTTrainer, files


# Eight rows of very different lengths, for a global batch of four; five to evaluate, which two processes cannot share
# evenly
ROWS = [*PAIRS[:3], LONG_PAIR, ("a", "b"), LONG_PAIR, PAIRS[3], PAIRS[4]]
EVAL_ROWS = [LONG_PAIR, *PAIRS[:4]]
DIVERSITY = {"diversity_steps": 2, "diversity_samples": 3, "diversity_max_new_tokens": 5, "selection": "last"}


def rewarding(completions, **kwargs):
    return [float(len(completion) % 2) for completion in completions]


def train(folder: Path, cold_start_loss: str, batch: int, **changes) -> dict:
    tokenizer = build_tokenizer()
    measured = changes.get("diversity_steps", 0) > 0
    trainer = AESLSFTTrainer(
        model=build_model(tokenizer),
        args=small_config(
            folder,
            cold_start_loss=cold_start_loss,
            per_device_train_batch_size=batch,
            per_device_eval_batch_size=batch,
            max_steps=4,
            optim="sgd",
            learning_rate=0.1,
            **changes,
        ),
        train_dataset=prompt_completion_rows(ROWS),
        eval_dataset=prompt_completion_rows(EVAL_ROWS),
        processing_class=tokenizer,
        diversity_prompts=["2+3=", "abc", "Name a colour: "] if measured else None,
        reward_funcs=[rewarding] if measured else None,
    )
    trainer.train()
    keys = ("loss", "nll", "weight_mean", "temperature_mean", "entropy", "mean_token_accuracy", "num_tokens")
    keys += (
        "weight_effective",
        "nll_learnt",
        "t_scaling_found",
        "diversity/own_entropy",
        "diversity/self_bleu",
        "diversity/pass@1",
    )
    return {
        "num_processes": trainer.accelerator.num_processes,
        "weights": trained_weights(trainer),
        "eval_nll": trainer.evaluate()["eval_nll"],
        **{key: steps_of(trainer, key) for key in keys},
    }


def run_all(folder: Path, num_processes: int) -> dict:
    batch = 4 // num_processes
    results = {loss: train(folder / loss, loss, batch) for loss in ("aesl", "nll", "psft", "gem")}
    results["accumulated"] = train(folder / "accumulated", "aesl", batch // 2, gradient_accumulation_steps=2)
    results["packed"] = train(folder / "packed", "aesl", batch, padding_free=True, max_length=None)
    results["auto"] = train(folder / "auto", "aesl", batch, t_scaling="auto")
    results["measured"] = train(folder / "measured", "aesl", batch, **DIVERSITY)
    return results


if __name__ == "__main__":
    from accelerate import PartialState

    output = Path(sys.argv[1])
    state = PartialState(cpu=True)
    results = run_all(output, state.num_processes)
    files.write_json(output / f"rank-{state.process_index}.json", {"num_processes": state.num_processes})
    torch.save(results, output / f"rank-{state.process_index}.pt")
