"""Candidate assignments: for every sub-vector n codewords, the nearest first, and the ratios they start from."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vqlib import kernels
from vqlib.config import RATIO_STARTS

CHUNK = 1 << 13  # sub-vectors at a time: their [n, d] candidates stay in the cache
LEAST_SQUARES_STEPS = 30
LEAST_LOGIT = -6.0
LEADING_RATIO = 0.9
ROUNDING = 1e-6  # candidates closer to each other than this share of their squares are told apart by rounding only


@dataclass(frozen=True)
class Candidates:
    """indices [N, n], nearest codeword first, in the smallest type that holds k: uint8, int16, int32; logits z float32 [N, n]."""

    indices: Tensor
    logits: Tensor

    @property
    def ratios(self) -> Tensor:
        """r = softmax(z), float32 [N, n] (Eq. 6)."""
        return self.logits.softmax(dim=1)


def find_candidates(x: Tensor, codewords: Tensor, n: int, start: str = "equal") -> Candidates:
    """The n codewords [k, d] nearest to each sub-vector of x [N, d] (Eq. 5), with their starting ratios.

    `equal` starts every ratio at 1/n, as the paper; `distance` at r ∝ 1/‖w − c‖, as the authors' release:
    z_i = log(dist_n / (dist_i + 1e−5)); `least-squares` where the soft reconstruction (Eq. 7) is nearest to w, so that
    calibration starts from less error than any single codeword leaves; `leading` at 0.9 for the nearest, the rest shared.
    """
    k = len(codewords)
    if not 1 <= n <= k:
        raise ValueError(f"candidates={n} is outside 1 … k={k}")
    indices = kernels.nearest(x, codewords, n)  # [N, n]
    if start == "equal":
        logits = torch.zeros(indices.shape, dtype=torch.float32, device=x.device)
    elif start == "distance":
        distance = candidate_distances(x, codewords, indices)
        logits = (distance[:, -1:].clamp_min(1e-5) / (distance + 1e-5)).log().float()
    elif start == "least-squares":
        logits = _least_squares_logits(x, codewords, indices)
    elif start == "leading":
        logits = torch.zeros(indices.shape, dtype=torch.float32, device=x.device)
        logits[:, 0] = math.log(LEADING_RATIO / (1 - LEADING_RATIO) * max(1, n - 1))
    else:
        raise ValueError(f"ratio start {start!r} is not one of {', '.join(map(repr, RATIO_STARTS))}")
    return Candidates(indices.to(index_dtype(k)), logits)


def candidate_distances(x: Tensor, codewords: Tensor, candidates: Tensor) -> Tensor:
    """Euclidean distance of every sub-vector x [N, d] to its candidates [N, n] among codewords [k, d]: -> [N, n]."""
    columns = [(x - codewords[column.long()]).norm(dim=1) for column in candidates.unbind(1)]
    return torch.stack(columns, dim=1)  # n × [N] -> [N, n]


def _least_squares_logits(x: Tensor, codewords: Tensor, indices: Tensor) -> Tensor:
    """z with r = softmax(z) ≈ argmin ‖w − Σ_n r_n c_n‖² on the simplex, by exponentiated gradient; float32 [N, n].

    After 30 steps the error is within 1 % of the optimum for n ≤ 3 and 7 % for n = 4 (k-means codewords, d = 4). A
    candidate with no share keeps e⁻⁶ of the largest, so that it can still come back.
    """
    parts = []
    for some, chosen in zip(x.float().split(CHUNK), indices.split(CHUNK), strict=True):
        members = codewords[chosen].float()  # [chunk, n, d]
        gram = members @ members.transpose(1, 2)  # [chunk, n, n]
        target = (members @ some.unsqueeze(2)).squeeze(2)  # [chunk, n]
        spread = (members - members.mean(dim=1, keepdim=True)).square().sum(dim=(1, 2))
        size = members.square().sum(dim=(1, 2)).clamp_min(torch.finfo(torch.float32).tiny)
        rate = spread.clamp_min(ROUNDING * size).reciprocal().unsqueeze(1)
        z = torch.zeros_like(target)
        for _ in range(LEAST_SQUARES_STEPS):
            z = z - rate * ((gram @ z.softmax(dim=1).unsqueeze(2)).squeeze(2) - target)
        parts.append((z - z.amax(dim=1, keepdim=True)).clamp_min(LEAST_LOGIT))
    return torch.cat(parts)


def index_dtype(k: int) -> torch.dtype:
    """The smallest integer type of torch that indexes k codewords and supports every operation needed here."""
    return torch.uint8 if k <= 256 else torch.int16 if k <= 32768 else torch.int32
