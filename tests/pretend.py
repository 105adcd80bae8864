"""A GPU that is not there: torch's private-use device under fake tensors, where every operation is counted.

Fake tensors have a shape, a type and a device but no values. Two devices met in one operation are an error, as on a GPU. What
would wait for the device is counted and answered: true, 1.0 or 0.
"""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NAME = "gpu"
LAUNCH_NOTHING = set(
    "view _unsafe_view expand t transpose permute unsqueeze squeeze slice select detach alias chunk split unbind device "
    "split_with_sizes as_strided _reshape_alias reshape empty empty_like new_empty empty_strided lift_fresh diagonal".split()
)
ANSWERS = {torch.bool: True, torch.int64: 0, torch.int32: 0, torch.uint8: 0}


class PretendGPU(TorchDispatchMode):
    """Within it operations on the device are counted: all that start work, those that wait, copies to it that block."""

    def __init__(self):
        super().__init__()
        self.operations, self.waits, self.copies = Counter(), Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.__name__.split(".")[0].rstrip("_")
        given = _tensors((args, kwargs))
        here = any(tensor.device.type == NAME for tensor in given)
        if name in ("_local_scalar_dense", "equal"):
            self.waits[name] += here
            return name == "equal" or ANSWERS.get(args[0].dtype, 1.0)
        if name == "unique_dim":
            self.waits[name] += here
            return args[0].clone(), args[0].new_zeros(len(args[0]), dtype=torch.int64), None
        if here and name in ("nonzero", "masked_select", "bincount"):
            raise AssertionError(f"{name} waits for the device to know the size of its result")
        if name == "nonzero":  # of a fake tensor of the CPU's: nothing is
            return args[0].new_zeros((0, args[0].dim()), dtype=torch.int64)
        result = func(*args, **kwargs)
        here |= any(tensor.device.type == NAME for tensor in _tensors(result))
        if here and name in ("_to_copy", "copy"):
            source, target = (args[1], args[0]) if name == "copy" else (args[0], result)
            if source.device.type == NAME and target.device.type == "cpu":
                self.waits["copy to the CPU"] += 1
            elif source.device != target.device and not (kwargs.get("non_blocking") or True in args[2:]):
                self.copies[name] += 1
        if here and name not in LAUNCH_NOTHING:
            self.operations[name] += 1
        return result

    def launch(self, kernel, programs, *arguments, **sizes):
        """In the place of Triton's: the tensors have to be on one device and contiguous, nothing is computed."""
        devices = {tensor.device for tensor in _tensors(arguments)}
        assert devices == {torch.device(NAME, 0)} and all(t.is_contiguous() for t in _tensors(arguments)), devices
        self.operations[kernel.__name__] += 1

    def tolist(self, tensor):
        """Of a tensor: one wait, whatever its size."""
        self.waits["tolist"] += tensor.device.type == NAME
        flat = [ANSWERS.get(tensor.dtype, 1.0)] * tensor.numel()
        for size in reversed(tensor.shape[1:]):
            flat = [flat[i : i + size] for i in range(0, len(flat), size)]
        return flat if tensor.dim() else flat[0]


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
