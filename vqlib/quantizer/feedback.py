"""Quantizing a matrix a few columns at a time, each column's error passed on to the columns still to come.

The columns F not yet quantized are moved to where they make up best for the error E of the columns P just quantized:
W_F ← W_F − E (H⁻¹_PP)⁻¹ H⁻¹_PF, with H⁻¹ the inverse over the columns from P on (Frantar et al. 2023, GPTQ, for one
column; van Baalen et al. 2024, GPTVQ, for several). With U the upper Cholesky factor of H⁻¹ this is E U_PP⁻¹ U_PF, and
‖E U_PP⁻¹‖² is what P adds to tr((W − Ŵ) H (W − Ŵ)ᵀ).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Choose = Callable[[Tensor, Tensor, Tensor], Tensor]
DAMPING = 0.01  # of the mean diagonal, added to the diagonal


@dataclass(frozen=True)
class Columns:
    """The columns of all layers with the same inputs: their order, `width` neighbors at a time, and what is passed on.

    positions: [in], the largest inputs first; groups: numbers of the groups of neighbors in that order; factor: float64
    [in, in], U of the reordered Hessian; roots: U_PP of every group, [in / width, width, width]; metrics: their inverses.
    """

    positions: Tensor
    groups: list[int]
    factor: Tensor
    roots: Tensor
    metrics: Tensor

    @classmethod
    def of(cls, hessian: Tensor, width: int) -> Columns:
        """From E x xᵀ [in, in] of the inputs."""
        positions = _by_importance(hessian, width)
        factor = _inverse_factor(hessian.double()[positions][:, positions])
        count = len(factor) // width
        blocks = factor.view(count, width, count, width)
        roots = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()  # [in / width, width, width]
        metrics = torch.linalg.inv_ex(roots).inverse
        return cls(positions, (positions[::width] // width).tolist(), factor, roots, metrics)

    @property
    def width(self) -> int:
        return self.roots.shape[-1]


def quantize_columns(weight: Tensor, columns: Columns, choose: Choose) -> Tensor:
    """Ŵ of `weight` [out, in], float32, chosen a group of neighboring columns at a time, in their order.

    `choose(columns [out, width], root [width, width], positions [width]) -> [out, width]` gives the quantized columns;
    what it should make small, row by row, is ‖(columns − quantized) root⁻¹‖².
    """
    width, factor, positions = columns.width, columns.factor, columns.positions
    work = weight.detach().double()[:, positions]  # [out, in], widened to float64
    result = torch.empty_like(work)
    for start, root in zip(range(0, work.shape[1], width), columns.roots, strict=True):
        part, rest = slice(start, start + width), slice(start + width, None)
        quantized = choose(work[:, part], root, positions[part]).double()
        error = torch.linalg.solve_triangular(root, work[:, part] - quantized, upper=True, left=False)  # E U_PP⁻¹
        work[:, rest] -= error @ factor[part, rest]
        result[:, part] = quantized
    return torch.empty_like(result).index_copy_(1, positions, result).float()


def damped(hessian: Tensor) -> Tensor:
    """H with `DAMPING` times its mean diagonal added to the diagonal; the identity for inputs that are always 0."""
    mean = float(hessian.diagonal().mean())
    added = DAMPING * mean if mean > 0 else 1.0
    return hessian + added * torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)


def _by_importance(hessian: Tensor, width: int) -> Tensor:
    """All column numbers, groups of `width` neighbors with the largest Σ E x² first: [in]."""
    weight = hessian.diagonal().reshape(-1, width).sum(dim=1)  # [in] -> [in / width]
    first = weight.argsort(descending=True, stable=True) * width
    return (first[:, None] + torch.arange(width, device=hessian.device)).flatten()


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Upper U with Uᵀ U = H⁻¹, so that Uᵀ U restricted to the last columns is the inverse over those alone."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(hessian)))
    return torch.linalg.cholesky(inverse, upper=True)
