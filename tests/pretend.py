"""A device that is not there: torch's private-use back end under fake tensors, where every operation is counted.

Fake tensors have shapes, types and devices but no values. Two devices met in one operation are an error, as on a GPU; what
would wait for the device is counted, and answered with a value that lets the code go on.
"""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "gpu"
VIEWS = {
    "view", "_unsafe_view", "expand", "t", "transpose", "permute", "unsqueeze", "squeeze", "slice", "select", "detach",
    "alias", "chunk", "split", "split_with_sizes", "unbind", "as_strided", "_reshape_alias", "reshape", "empty",
    "device", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "lift_fresh", "_to_copy_view",
}  # fmt: skip
WAITS = {"_local_scalar_dense", "nonzero", "bincount", "masked_select", "_unique2", "unique_dim", "equal", "item"}


class Counting(TorchDispatchMode):
    """Operations that start work on the device, those that wait for it, and copies to it that block."""

    def __init__(self):
        super().__init__()
        self.operations, self.waits, self.copies = Counter(), Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.__name__.split(".")[0].rstrip("_")
        devices = {t.device.type for t in _tensors((args, kwargs))}
        if name in WAITS and NAME in devices:
            self.waits[name] += 1
            if name in ("_local_scalar_dense", "equal"):
                return {"equal": True}.get(name, 1.0)
        result = func(*args, **kwargs)
        made = {t.device.type for t in _tensors(result)}
        if name in ("_to_copy", "copy") and NAME in devices | made:
            source = args[1] if name == "copy" else args[0]
            target = args[0].device.type if name == "copy" else next(iter(made))
            blocking = not (kwargs.get("non_blocking") or (name == "copy" and len(args) > 2 and args[2]))
            if source.device.type != target:
                if target == NAME and blocking:
                    self.copies[name] += 1
                if target == "cpu":
                    self.waits["copy to the CPU"] += 1
        if NAME in devices | made and name not in VIEWS:
            self.operations[name] += 1
        return result


def _tensors(tree):
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
