"""Where sums over many tokens are taken: in float64, and so on the CPU where a device has none (Apple's GPUs).

A float32 sum over 32k packed tokens is off by about 2e-3, and AESL's temperatures are made from such sums. There are
few of them, vectors of one number a token, so moving them costs little beside the head's products.
"""

import torch
from torch import Tensor


WITHOUT_FLOAT64 = ("mps",)


def at_home(values: Tensor) -> Tensor:
    """Return `values` where their sums are taken: on their device, or on the CPU where that has no float64."""
    return values.cpu() if values.device.type in WITHOUT_FLOAT64 else values


def in_float64(values: Tensor) -> Tensor:
    """Return `values` in float64, where their sums are taken."""
    return at_home(values).double()


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """Return float64 `values` on `device`, rounded to float32 only where the device has no float64."""
    return values.float().to(device) if device.type in WITHOUT_FLOAT64 else values
