"""Error-feedback assignments of a layer, in the manner of GPTVQ (van Baalen et al. 2024), and the codewords refitted to them.

`d` columns at a time, each sub-vector takes the codeword that is nearest in the metric of the layer's inputs, and its
error is passed on to the columns still to come; the runners-up in the same metric are its other candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vqlib.quantizer.candidates import Candidates, find_candidates
from vqlib.quantizer.feedback import Columns, damped, quantize_columns
from vqlib.system.memory import sent

REFIT_STEPS = 30  # of conjugate gradients


def candidates_with_feedback(
    weight: Tensor, columns: Columns, codewords: Tensor, n: int = 1, start: str = "equal"
) -> Candidates:
    """Candidates [N, n] of `weight` [out, in] among `codewords` [k, d], in the columns' metric; the assigned one first.

    `columns` are `Columns.of` the inputs' Hessian and d. Distances and starting ratios are those of the weights as the
    errors passed on have moved them; `start` as in `find_candidates`. What is passed on is the error of the first candidate
    alone: the later columns make up for that one, whatever mix the ratios start with.
    """
    wide = codewords.double()
    tables = (wide @ columns.metrics).float()  # ‖(w − c) root⁻¹‖² is the plain distance of w root⁻¹ and c root⁻¹
    found: list[Candidates] = []

    def choose(part: Tensor, root: Tensor, positions: Tensor) -> Tensor:
        group = len(found)
        found.append(find_candidates((part @ columns.metrics[group]).float(), tables[group], n, start))
        return wide[found[-1].indices[:, 0].long()]  # [out] -> [out, d]

    quantize_columns(weight, columns, choose)
    order = sent(torch.tensor(columns.groups).argsort(), weight.device)
    indices, logits = (
        torch.stack([getattr(one, name) for one in found], dim=1)[:, order].view(-1, n)  # [out, in / d, n] -> [N, n]
        for name in ("indices", "logits")
    )
    return Candidates(indices, logits)


def refit(weight: Tensor, hessian: Tensor, assignments: Tensor, codewords: Tensor) -> Tensor:
    """Codewords [k, d] with the least tr((W − C[A]) H (W − C[A])ᵀ), by conjugate gradients from the given ones.

    The damped Hessian keeps the system definite; a codeword that nothing uses stays where it is.
    """
    h, k, d = damped(hessian.double()), len(codewords), codewords.shape[1]

    def pull(difference: Tensor) -> Tensor:
        """Half the gradient with respect to the codewords: [out, in] -> [k, d]."""
        return torch.zeros(k, d, dtype=h.dtype, device=h.device).index_add_(
            0, assignments, (difference @ h).reshape(-1, d)
        )

    def dense(c: Tensor) -> Tensor:
        return c[assignments].reshape(weight.shape)  # [k, d] -> [N, d] -> [out, in]

    c = codewords.double()
    residual = pull(weight.double() - dense(c))
    start = size = residual.square().sum()
    direction = residual
    for _ in range(REFIT_STEPS):
        if size <= 1e-12 * start:
            break
        image = pull(dense(direction))
        step = size / (direction * image).sum()
        c, residual = c + step * direction, residual - step * image
        previous, size = size, residual.square().sum()
        direction = residual + (size / previous) * direction
    return c.to(codewords.dtype)
