"""The script that test_trainer_sharded.py launches with torchrun: `python sharded_script.py FOLDER RUN...`.

A RUN is a name of RUNS. The test also trains the runs itself in one process.

Each process writes what it holds to FOLDER/rank-R.pt.
"""

import sys
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch
from small_runs import prompt_completion_rows, small_config, steps_of
from tiny_models import build_model, build_tokenizer
from torch.distributed.tensor import DTensor
from torchrun_script import EVAL_ROWS, ROWS

from aesl_trl import AESLSFTTrainer
from aesl_trl.losses import scoring


# Where `sharding` puts the head. "root": into FSDP2's root unit, as accelerate before 1.15 does; "auto": where the
# installed accelerate does, from 1.15 on into one unit with the final norm; "own": into a unit of its own; "zero":
# partitioned by ZeRO-3
RUNS = {
    "root": {"sharding": "root"},
    "root-tied": {"sharding": "root", "tied": True},
    "root-nll": {"sharding": "root", "loss": "nll"},
    "root-psft": {"sharding": "root", "loss": "psft"},
    "root-tied-accumulated": {"sharding": "root", "tied": True, "accumulation": 2},
    "auto": {"sharding": "auto"},
    "auto-tied": {"sharding": "auto", "tied": True},
    "auto-tied-accumulated": {"sharding": "auto", "tied": True, "accumulation": 2},
    "auto-accumulated": {"sharding": "auto", "accumulation": 2},
    "auto-measured": {"sharding": "auto", "measured": True},
    "own": {"sharding": "own"},
    "own-nll": {"sharding": "own", "loss": "nll"},
    "own-psft": {"sharding": "own", "loss": "psft"},
    "own-accumulated": {"sharding": "own", "accumulation": 2},
    "own-without-average": {"sharding": "own", "average": False},
    "zero": {"sharding": "zero"},
    "zero-measured": {"sharding": "zero", "measured": True},
    "zero-nll": {"sharding": "zero", "loss": "nll"},
    "zero-psft": {"sharding": "zero", "loss": "psft"},
    "zero-tied": {"sharding": "zero", "tied": True},
    "zero-accumulated": {"sharding": "zero", "accumulation": 2},
    "zero-tied-accumulated": {"sharding": "zero", "tied": True, "accumulation": 2},
}

PROMPTS = [f"{number}+2=" for number in range(8)]
MEASURED = {
    "diversity_steps": 2,
    "diversity_samples": 16,
    "diversity_max_new_tokens": 6,
    "diversity_batch_size": 64,
    "selection": "best_eval",
    "best_eval_metric": "pass@1",
}

# The model is below every threshold that keeps a parameter whole: partition each one, as soon as it is not needed
ZERO3 = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "zero_allow_untested_optimizer": True,
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}


class Head(torch.nn.Linear):
    """A class of its own, for FSDP's wrap policy goes by names of classes."""


def is_even(completions, **kwargs):
    """Reward about half of the completions that an untrained model writes."""
    return [float(sum(completion.encode()) % 2 == 0) for completion in completions]


def train(
    folder: Path, *, sharding=None, tied=False, loss="aesl", accumulation=1, average=True, measured=False
) -> dict:
    """Train four steps of the same global batch, with evaluations between them, and return what came of it."""
    tokenizer, rows = build_tokenizer(), 4 // (2 if sharding else 1)
    model = build_model(tokenizer, tie_word_embeddings=tied)
    if sharding == "own":
        model.lm_head.__class__ = Head
    args = small_config(
        folder,
        cold_start_loss=loss,
        # An untrained model is so unsure that with the default every weight is near 1, plain nll
        **({"t_scaling": 0.01} if loss == "aesl" else {}),
        per_device_train_batch_size=rows // accumulation,
        per_device_eval_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        eval_strategy="steps",
        eval_steps=2,
        max_steps=4,
        optim="sgd",
        learning_rate=0.1,
        **(MEASURED if measured else {}),
        **sharding_settings(sharding),
    )
    if sharding:
        shard_on_cpu(args)
    trainer = AESLSFTTrainer(
        model,
        args,
        train_dataset=prompt_completion_rows(ROWS),
        eval_dataset=prompt_completion_rows(EVAL_ROWS),
        processing_class=tokenizer,
        diversity_prompts=PROMPTS if measured else None,
        reward_funcs=[is_even] if measured else None,
    )
    heads = set()
    with ExitStack() as patches:
        patches.enter_context(patch.object(scoring, "_parameters", watched_parameters(heads, average)))
        if sharding == "root":
            patches.enter_context(patch("accelerate.accelerator.fsdp2_prepare_model", layers_and_root))
        trainer.train()
    parameters = trainer.model.state_dict(keep_vars=True)  # puts back the shards of what FSDP2 left whole
    keys = ("loss", "nll", "weight_mean", "temperature_mean", "eval_nll")
    keys += ("diversity/own_entropy", "diversity/self_bleu", "diversity/pass@1") if measured else ()
    return {
        "distributed_type": trainer.accelerator.distributed_type.value,
        "num_processes": trainer.accelerator.num_processes,
        "heads": heads,
        "sharded": [is_sharded(parameter) for parameter in parameters.values()],
        "weights": whole_weights(parameters),
        **{key: steps_of(trainer, key) for key in keys},
    }


def sharding_settings(sharding: str | None) -> dict:
    if sharding is None:
        return {}
    if sharding == "zero":
        return {"deepspeed": ZERO3}
    units = ["Qwen2DecoderLayer", "Head"] if sharding == "own" else ["Qwen2DecoderLayer"]
    return {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": units}}


def shard_on_cpu(args) -> None:
    """Tell accelerate that it has devices to shard over: over gloo on the CPU it would fall back to DDP.

    Also let DeepSpeed use gloo alone, because compiling its own all-reduce takes minutes.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    assert args.distributed_state.num_processes == 2  # and looking there makes the state, which is changed below
    kind = DistributedType.MULTI_GPU
    if args.deepspeed:
        import deepspeed

        deepspeed.ops.__compatible_ops__ = {}
        kind = DistributedType.DEEPSPEED
    PartialState._shared_state["distributed_type"] = kind


def layers_and_root(accelerator, model):
    """Wrap a model as accelerate before 1.15 does it when the decoder layers are to be wrapped."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def watched_parameters(heads: set, average: bool):
    """Return a `scoring._parameters` that notes in `heads` whether it found the head sharded.

    Without `average`, the gradient takes the default way back through `full_tensor`.
    """
    original = scoring._parameters

    def parameters(head):
        weight = dict.__getitem__(head._parameters, "weight")  # DeepSpeed gathers what is read as an attribute
        heads.add("sharded" if is_sharded(weight) else "whole")
        return original(head) if average else (weight.full_tensor(), None)

    return parameters


def is_sharded(weight) -> bool:
    """Say whether `weight` is a DTensor of FSDP2 or a placeholder of ZeRO-3."""
    return isinstance(weight, DTensor) or (getattr(weight, "ds_numel", 0) > 0 and weight.numel() == 0)


def whole_weights(parameters: dict) -> dict:
    with ExitStack() as gathered:
        if any(hasattr(parameter, "ds_id") for parameter in parameters.values()):
            import deepspeed

            gathered.enter_context(deepspeed.zero.GatheredParameters(list(parameters.values())))
        return {
            name: (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach().clone()
            for name, weight in parameters.items()
        }


if __name__ == "__main__":
    from accelerate import PartialState

    output, names = Path(sys.argv[1]), sys.argv[2:]
    rank = PartialState(cpu=True).process_index
    torch.save({name: train(output / name, **RUNS[name]) for name in names}, output / f"rank-{rank}.pt")
