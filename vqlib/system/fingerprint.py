"""SHA-256 of models and tensors: what makes two models, two runs or two rows of a table the same."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over a model's settings and names, types, shapes and bytes of all tensors; compiled or not, it is the same.

    The settings are a diffusers model's: heads, the VAE's scaling factor and what else does not stand in tensors. What another
    model computes by besides its tensors does not count.
    """
    tensors = sorted((name.replace("_orig_mod.", ""), tensor) for name, tensor in model.state_dict().items())
    settings = settings_of(getattr(model, "_orig_mod", model))
    return digest(tensors, json.dumps(settings, sort_keys=True, default=str) if settings else "")


def settings_of(model: nn.Module) -> dict[str, Any]:
    """A diffusers model's settings that are not its class's defaults; so a later diffusers with more of them finds the same."""
    given = getattr(model, "config", None)
    if not isinstance(given, Mapping):
        return {}
    known = inspect.signature(type(model).__init__).parameters.items()
    found = {name: (_plain(given[name]), _plain(one.default)) for name, one in known if name in given}
    return {name: value for name, (value, usual) in found.items() if value != usual}


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def digest(tensors: Iterable[tuple[str, Tensor]], about: str = "") -> str:
    """The same over named tensors in the order given, after the text `about`."""
    found = hashlib.sha256(about.encode())
    for name, tensor in tensors:
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
