"""SHA-256 of tensors: what makes two models, two runs or two rows of a table the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of all tensors; equal for equal models only, compiled or not."""
    return digest(sorted((name.replace("_orig_mod.", ""), tensor) for name, tensor in model.state_dict().items()))


def digest(tensors: Iterable[tuple[str, Tensor]], about: str = "") -> str:
    """The same over named tensors in the order given, after the text `about`."""
    found = hashlib.sha256(about.encode())
    for name, tensor in tensors:
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
