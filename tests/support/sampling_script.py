"""The script that test_groups_processes.py launches with torchrun: `python sampling_script.py FOLDER RUN...`.

Each process writes what it holds to FOLDER/rank-R.pt.
"""

import sys
from pathlib import Path

import pytest
import torch
from sharded_script import shard_on_cpu, sharding_settings, whole_weights
from small_runs import PAIRS, prompt_completion_rows, small_config, steps_of
from tiny_models import build_model, build_tokenizer
from vllm_stand_in import StandIn

from aesl_trl import AESLSFTTrainer
from aesl_trl.sampling import backends
from aesl_trl.sampling import generate as generating
from aesl_trl.training import measurement


PROMPTS = ["2+3=", "abc", "Name a colour: "]  # two for the first process, one for the second
STOPS = list(range(0, 256, 16))
RUNS = {
    "plain": {"measured": False},
    "measured": {},
    "one-at-a-time": {"batch_size": 1},
    "memory": {"fail": "memory"},
    "gap": {"fail": "second measurement"},
    "turned": {"planned": True, "max_steps": 10},
    "fsdp-plain": {"sharding": "auto", "measured": False},
    "fsdp": {"sharding": "auto"},
    "fsdp-memory": {"sharding": "auto", "fail": "memory"},
    "fsdp-colocate": {"sharding": "auto", "backend": "vllm_colocate", "temperature": 0.5},
    "fsdp-scored": {"sharding": "auto", "temperature": 0.5},
    "zero-plain": {"sharding": "zero", "measured": False},
    "zero": {"sharding": "zero"},
    "zero-memory": {"sharding": "zero", "fail": "memory"},
    "zero-colocate": {"sharding": "zero", "backend": "vllm_colocate", "temperature": 0.5},
    "server": {"backend": "vllm_server"},
    "server-gone": {"backend": "vllm_server", "fail": "check_server", "failing_rank": 0},
    "server-start": {"backend": "vllm_server", "fail": "start", "failing_rank": 0},
    "colocate-start": {"backend": "vllm_colocate", "fail": "start"},
    "colocate-sync": {"backend": "vllm_colocate", "fail": "sync"},
    "colocate-generate": {"backend": "vllm_colocate", "fail": "generate"},
}
PEAKED = (1.0, 2.0, 3.0, 4.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.5, 0.4)


def train(
    folder: Path,
    rank: int,
    *,
    sharding=None,
    measured=True,
    batch_size=6,
    backend="generate",
    temperature=1.0,
    fail=None,
    failing_rank=1,
    planned=False,
    max_steps=2,
) -> dict:
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, tie_word_embeddings=False)
    model.name_or_path = "tiny"
    model.generation_config.eos_token_id = STOPS
    diversity = {
        "diversity_steps": 1,
        "diversity_samples": 3,
        "diversity_max_new_tokens": 6,
        "diversity_batch_size": batch_size,
        "diversity_backend": backend,
        "diversity_temperature": temperature,
        "diversity_vllm_server_base_url": "http://localhost:8000" if backend == "vllm_server" else None,
        "stop_at_turning_point": planned,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "is_vllm_available", lambda: True)
        patch.setattr(backends, "_has_gpu", lambda: True)
        stand_in = StandIn(patch)
        args = small_config(
            folder,
            per_device_train_batch_size=1,
            max_steps=max_steps,
            optim="sgd",
            learning_rate=0.1,
            **(diversity if measured else {}),
            **sharding_settings(sharding),
        )
        if sharding:
            shard_on_cpu(args)
        if rank == failing_rank:
            inject(patch, fail, stand_in)
        if planned:
            entropies = iter(PEAKED)
            patch.setattr(measurement, "measure", lambda sums: {"entropy": next(entropies), "self_bleu": 0.5})
        trainer = AESLSFTTrainer(
            model,
            args,
            train_dataset=prompt_completion_rows(PAIRS[:4]),
            processing_class=tokenizer,
            diversity_prompts=PROMPTS if measured else None,
        )
        series = []
        if measured:
            take = trainer.diversity_callback._measure

            def measure(step):
                rows = take(step)
                series.append(rows[-1])
                return rows

            patch.setattr(trainer.diversity_callback, "_measure", measure)
        trainer.train()
    return {
        "num_processes": trainer.accelerator.num_processes,
        "distributed_type": trainer.accelerator.distributed_type.value,
        "series": series,
        "step": trainer.state.global_step,
        "batch_size": trainer.diversity_callback.measurement.engine.batch_size if measured else None,
        "events": stand_in.events,
        "loss": steps_of(trainer, "loss"),
        "weights": whole_weights(trainer.model.state_dict(keep_vars=True)),
    }


def inject(patch, fail, stand_in: StandIn) -> None:
    """Let this process fail, and no other."""
    original, calls = generating._generate, []
    if fail == "memory":

        def generate(model, prompts, config):
            if len(prompts) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return original(model, prompts, config)

        patch.setattr(generating, "_generate", generate)
    elif fail == "second measurement":

        def generate(*arguments):
            calls.append(1)
            if len(calls) == 2:
                raise ConnectionError("gone")
            return original(*arguments)

        patch.setattr(generating, "_generate", generate)
    elif fail:
        stand_in.fail[fail] = ConnectionError("gone")


if __name__ == "__main__":
    from accelerate import PartialState

    output, names = Path(sys.argv[1]), sys.argv[2:]
    rank = PartialState(cpu=True).process_index
    torch.save({name: train(output / name, rank, **RUNS[name]) for name in names}, output / f"rank-{rank}.pt")
