"""Candidate assignments: for every sub-vector the n nearest codewords and the ratios they start from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vqlib import kernels


@dataclass(frozen=True)
class Candidates:
    """indices [N, n], nearest codeword first, in the smallest unsigned type that holds k; logits z float32 [N, n]."""

    indices: Tensor
    logits: Tensor

    @property
    def ratios(self) -> Tensor:
        """r = softmax(z), float32 [N, n] (Eq. 6)."""
        return self.logits.softmax(dim=1)


def find_candidates(x: Tensor, codewords: Tensor, n: int, start: str = "equal") -> Candidates:
    """The n codewords [k, d] nearest to each sub-vector of x [N, d] (Eq. 5), with their starting ratios.

    `equal` starts every ratio at 1/n, as the paper; `distance` at r ∝ 1/‖w − c‖, as the authors' release:
    z_i = log(dist_n / (dist_i + 1e−5)).
    """
    k = len(codewords)
    if not 1 <= n <= k:
        raise ValueError(f"candidates={n} is outside 1 … k={k}")
    indices = kernels.nearest(x, codewords, n)  # [N, n]
    if start == "equal":
        logits = torch.zeros(indices.shape, dtype=torch.float32, device=x.device)
    elif start == "distance":
        distance = torch.stack([(x - codewords[column]).norm(dim=1) for column in indices.unbind(1)], dim=1)
        logits = (distance[:, -1:].clamp_min(1e-5) / (distance + 1e-5)).log().float()
    else:
        raise ValueError(f"ratio start {start!r} is not one of 'equal', 'distance'")
    return Candidates(indices.to(index_dtype(k)), logits)


def index_dtype(k: int) -> torch.dtype:
    """The smallest integer type of torch that indexes k codewords and supports every operation needed here."""
    return torch.uint8 if k <= 256 else torch.int16 if k <= 32768 else torch.int32
