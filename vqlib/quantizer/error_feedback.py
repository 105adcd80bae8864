"""Error-feedback assignments of a layer, in the manner of GPTVQ (van Baalen et al. 2024), and the codewords refitted to them.

`d` columns at a time, each sub-vector takes the codeword that is nearest in the metric of the layer's inputs, and its
error is passed on to the columns still to come; the runners-up in the same metric are its other candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

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


class Assigned(NamedTuple):
    """A layer with its codes: weight [out, in], the inputs' second moments [in, in], assignments [N].

    `scale`, []: of a layer that shares its codebook, whose weight is then in units of it.
    """

    weight: Tensor
    hessian: Tensor
    assignments: Tensor
    scale: Tensor | None = None


def refit(layers: Sequence[Assigned], codewords: Tensor) -> Tensor:
    """Codewords [k, d] with the least Σ s² tr((W − C[A]) H (W − C[A])ᵀ) over the layers, by conjugate gradients from the given ones.

    The damped Hessians keep the system definite; a codeword that nothing uses stays where it is.
    """
    metrics = [damped(layer.hessian.double()) for layer in layers]

    def dense(c: Tensor, layer: Assigned) -> Tensor:
        return c[layer.assignments].reshape(layer.weight.shape)  # [k, d] -> [N, d] -> [out, in]

    def pull(difference: Callable[[Assigned], Tensor]) -> Tensor:
        """Half the gradient with respect to the codewords: [out, in] of every layer -> [k, d]."""
        total = torch.zeros(codewords.shape, dtype=torch.float64, device=codewords.device)
        for layer, h in zip(layers, metrics, strict=True):
            own = (difference(layer) @ h).reshape(-1, codewords.shape[1])
            total.index_add_(0, layer.assignments, own if layer.scale is None else layer.scale.double().square() * own)
        return total

    c = codewords.double()
    residual = pull(lambda layer: layer.weight.double() - dense(c, layer))
    start = size = residual.square().sum()
    direction = residual
    for _ in range(REFIT_STEPS):
        if size <= 1e-12 * start:
            break
        image = pull(lambda layer: dense(direction, layer))
        step = size / (direction * image).sum()
        c, residual = c + step * direction, residual - step * image
        previous, size = size, residual.square().sum()
        direction = residual + (size / previous) * direction
    return c.to(codewords.dtype)
