"""The script that test_memory.py launches as two processes: `python accumulated_script.py FOLDER`.

Two micro-batches under FSDP2 as accelerate accumulates them. Each process writes to FOLDER/rank-R.pt the bytes of the
gradients that it holds after the first one, whole and sharded.
"""

import sys
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard


def held(model: FSDPModule) -> dict[str, int]:
    """Return the bytes of the gradients that a process holds."""
    found = {"whole": 0, "sharded": 0}
    for parameter in model._get_fsdp_state()._fsdp_param_group.fsdp_params:
        whole = parameter.unsharded_accumulated_grad
        if whole is None and hasattr(parameter, "_unsharded_param"):
            whole = parameter._unsharded_param.grad
        found["whole"] += 0 if whole is None else whole.nbytes
        sharded = parameter.sharded_param.grad
        found["sharded"] += 0 if sharded is None else sharded.to_local().nbytes
    return found


def main(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    model = fully_shard(torch.nn.Linear(64, 32, bias=False), mesh=init_device_mesh("cpu", (2,)), mp_policy=policy)
    # What accelerate's no_sync does for FSDP2: tests/estimates/test_memory.py asks it
    seen = {}
    for place, syncs in (("first", False), ("last", True)):
        model.set_requires_gradient_sync(syncs)
        model(torch.ones(4, 64)).float().sum().backward()
        seen[place] = held(model)
    torch.save(seen, folder / f"rank-{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
