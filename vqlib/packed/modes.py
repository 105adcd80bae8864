"""How a packed model runs: dense weights kept, or rebuilt in every call, within a memory budget."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch
from torch import nn

from vqlib.models import structure
from vqlib.packed.layer import VQLinear, drop_scratch

MODES = ("memory", "speed", "auto")


@dataclass(frozen=True)
class ModeChoice:
    """What `set_mode` chose: how many of the packed layers keep a dense weight, and the bytes this takes.

    extra_bytes: dense weights and, where a layer is still rebuilt, the one buffer it is rebuilt in; beside the packed
    model itself. budget_bytes: what "auto" was allowed, None for the other modes.
    """

    layers: int
    dense_layers: int
    extra_bytes: int
    budget_bytes: int | None


def set_mode(model: nn.Module, mode: str = "auto", budget_bytes: int | None = None) -> ModeChoice:
    """Choose how the packed layers of `model` hold their weights, in place; outputs are the same in every mode.

    "memory": each call rebuilds the weight in a buffer that all layers share. "speed": every dense weight is kept.
    "auto": as many as fit in `budget_bytes`, the largest first; without a budget, in half of the device's free memory.
    Raises ValueError for another mode, a budget where it has no meaning, and a model without packed layers.
    """
    layers = [module for module in model.modules() if isinstance(module, VQLinear)]
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is not one of {', '.join(MODES)}")
    if not layers:
        raise ValueError(f"{type(model).__name__} has 0 packed layers; there is nothing to choose")
    if budget_bytes is not None and (mode != "auto" or budget_bytes < 0):
        raise ValueError(f"budget_bytes={budget_bytes} with mode={mode!r}: a budget ≥ 0 belongs to mode='auto'")
    for layer in layers:  # before free memory is read: what is released now may be kept again
        layer.release()
    dtype = structure.input_dtype(model)
    sizes = [layer.in_features * layer.out_features * dtype.itemsize for layer in layers]
    if mode == "auto" and budget_bytes is None:
        budget_bytes = _free_bytes(layers[0].codes.device) // 2
    limit = {"memory": 0, "speed": sum(sizes)}.get(mode, budget_bytes)
    kept, extra = _choose(sizes, limit)
    for index in kept:
        layers[index].materialize(dtype)
    drop_scratch()  # of this thread; the next call makes one that fits the layers that still need it
    return ModeChoice(len(layers), len(kept), extra, budget_bytes)


def _choose(sizes: list[int], limit: int) -> tuple[list[int], int]:
    """Indices of the weights to keep, and the bytes they take with the buffer for the largest of the rest."""
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    kept, used, skipped = [], 0, 0
    for index, following in zip(order, [*order[1:], None], strict=True):
        rest = max(skipped, 0 if following is None else sizes[following])
        if used + sizes[index] + rest <= limit:
            kept.append(index)
            used += sizes[index]
        else:
            skipped = max(skipped, sizes[index])
    return kept, used + skipped


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
