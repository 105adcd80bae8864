"""Error-feedback vector quantization in the manner of GPTVQ (van Baalen et al. 2024), without data.

k-means codebooks; then, `d` columns at a time, each sub-vector takes the codeword that is nearest in the Hessian's
metric and its error is passed on; then the codewords are refitted to the layer's outputs, the assignments held.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vqlib import kernels, models
from vqlib.baselines.feedback import damped, quantize_columns
from vqlib.config import VQConfig
from vqlib.models import Pipeline
from vqlib.quantize import quantize

REFIT_STEPS = 30  # of conjugate gradients


@torch.no_grad()
def error_feedback(pipe: Pipeline, config: VQConfig, hessians: Mapping[str, Tensor], seed: int = 0) -> nn.Module:
    """A student of `CandidateLinear` layers with one candidate each, to harden or to calibrate as it is.

    `hessians` as `input_hessians` gives them. Codewords are refitted where every layer has its own codebook.
    """
    student = quantize(pipe.transformer, config.replace(candidates=1), seed)
    for name, original in models.quantizable(pipe.transformer).items():
        layer = student.get_submodule(name)
        weight = original.weight.detach().float()
        weight = weight if layer.scale is None else weight / layer.scale
        assignments = assign_with_feedback(weight, hessians[name], layer.codebook.data)
        layer.candidates.copy_(assignments[:, None].to(layer.candidates.dtype))
        if layer.scale is None:
            layer.codebook.copy_(refit(weight, hessians[name], assignments, layer.codebook.data))
    return student


def assign_with_feedback(weight: Tensor, hessian: Tensor, codewords: Tensor) -> Tensor:
    """Assignments int64 [N] of `weight` [out, in] to `codewords` [k, d], with feedback under `hessian` [in, in]."""
    d = codewords.shape[1]
    chosen = torch.empty(len(weight), weight.shape[1] // d, dtype=torch.int64, device=weight.device)

    def choose(columns: Tensor, root: Tensor, positions: Tensor) -> Tensor:
        metric = torch.linalg.inv(root)  # ‖(w − c) root⁻¹‖² is the plain distance of w root⁻¹ and c root⁻¹
        codes = kernels.assign((columns @ metric).float(), (codewords.double() @ metric).float())
        chosen[:, positions[0] // d] = codes
        return codewords[codes].double()  # [out] -> [out, d]

    quantize_columns(weight, hessian, d, choose)
    return chosen.flatten()  # [out, in / d] -> [N]


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
