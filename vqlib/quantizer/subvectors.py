"""A weight matrix as sub-vectors and back, exactly: d consecutive inputs of one output row form one sub-vector."""

from __future__ import annotations

from torch import Tensor


def split(weight: Tensor, d: int, name: str = "weight") -> Tensor:
    """`weight` [out, in] as sub-vectors [N, d] with N = out · in / d, row by row. Raises ValueError if d does not divide in."""
    if weight.ndim != 2:
        raise ValueError(f"expected a matrix [out, in], got shape {tuple(weight.shape)} ({name})")
    if d < 1 or weight.shape[1] % d:
        raise ValueError(f"in_features {weight.shape[1]} is not divisible by d={d} ({name})")
    return weight.reshape(-1, d)  # [out, in] -> [N, d]


def join(subvectors: Tensor, shape: tuple[int, int]) -> Tensor:
    """The inverse of `split`: sub-vectors [N, d] as a weight of `shape` (out, in)."""
    if subvectors.numel() != shape[0] * shape[1]:
        raise ValueError(f"{tuple(subvectors.shape)} sub-vectors do not fill a weight of shape {tuple(shape)}")
    return subvectors.reshape(shape)  # [N, d] -> [out, in]
