"""An Apple GPU, simulated on the CPU: every tensor lies on a device without float64, but those moved to the host."""

from contextlib import contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.weak import WeakTensorKeyDictionary

from aesl_trl.losses import precision


class _Device(TorchDispatchMode):
    """Raise for a float64 tensor, unless it was made from one that `cpu()` returned."""

    def __init__(self):
        super().__init__()
        self.on_host = WeakTensorKeyDictionary()

    def move(self, values):
        copied = values.clone()
        self.on_host[copied] = True
        return copied

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = self._tensors((args, kwargs or {}))
        out = function(*args, **(kwargs or {}))
        from_host = any(tensor in self.on_host for tensor in given)
        for tensor in self._tensors(out):
            if tensor.dtype == torch.float64 and not from_host:
                raise TypeError(f"{function} made a float64 tensor: MPS doesn't support float64")
            # What is rounded to float32 goes back to the device
            if from_host and (tensor.dtype == torch.float64 or not tensor.is_floating_point()):
                self.on_host[tensor] = True
        return out

    @staticmethod
    def _tensors(tree):
        return [value for value in tree_flatten(tree)[0] if isinstance(value, torch.Tensor)]


@contextmanager
def apple_gpu():
    """Let the block run as on a device without float64."""
    device = _Device()
    with (
        mock.patch.object(precision, "WITHOUT_FLOAT64", ("cpu",)),
        mock.patch.object(torch.Tensor, "cpu", lambda values: device.move(values)),
        device,
    ):
        yield
