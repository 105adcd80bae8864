"""The soft layer of output distillation: every sub-vector has a latent, and its assignment is the codeword nearest to it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vqlib import kernels
from vqlib.models import structure
from vqlib.quantizer.candidates import Candidates
from vqlib.quantizer.soft import CandidateLinear, soft_layers


class LatentLinear(CandidateLinear):
    """A linear layer whose weight is C[A] exactly, A the codewords nearest to latents that are trained.

    They are chosen after the latents' step; a codebook that all blocks share takes its own after that, so that A is nearest in
    the codebook before it.
    latents: Parameter float32 [N, d] in `unit` [], at first the codewords themselves: the codebook's first root mean square,
    so that one rate fits layers of any size, and with more than 3 bits a weight half of it with every bit, as codewords lie
    closer. The gradient of C[A] goes to the codebook and, straight through the choice of the nearest (van den Oord et al.
    2017), to the latents.
    """

    def __init__(self, layer: CandidateLinear) -> None:
        """From a layer with one candidate a sub-vector; ValueError for more."""
        count, n = layer.candidates.shape
        if n != 1:
            raise ValueError(f"{n} candidates a sub-vector: harden the layer first, latents choose among all codewords")
        chosen = Candidates(layer.candidates, torch.zeros(count, 1, device=layer.candidates.device))
        shape = layer.out_features, layer.in_features
        super().__init__(layer.codebook, chosen, shape, layer.bias, layer.scale, layer.codebook_dtype)
        codewords = layer.codebook.detach()
        closer = min(1.0, 2.0 ** (3 - math.log2(len(codewords)) / codewords.shape[1]))
        size = closer * codewords.square().mean().sqrt()
        self.register_buffer("unit", size.clamp_min(torch.finfo(torch.float32).tiny))
        self.latents = nn.Parameter(codewords[layer.candidates[:, 0].long()] / self.unit)  # [N, d]

    def subvectors(self) -> Tensor:
        """C[A], [N, d]; differentiable in the codebook and, straight through, in the latents."""
        return _StraightThrough.apply(super().subvectors(), self.latents, self.unit)

    @torch.no_grad()
    def reassign(self) -> Tensor:
        """Every sub-vector takes the codeword now nearest to its latent; the share that took another one, float64 []."""
        before = self.candidates[:, 0]
        codes = kernels.assign(self.latents * self.unit, self.codebook, before)
        moved = (codes != before).double().mean()
        self.candidates[:, 0] = codes
        return moved


class _StraightThrough(torch.autograd.Function):
    """Sub-vectors as they are; their gradient goes to the latents too, unit times as large."""

    @staticmethod
    def forward(ctx, subvectors: Tensor, latents: Tensor, unit: Tensor) -> Tensor:
        ctx.save_for_backward(unit)
        return subvectors.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (unit,) = ctx.saved_tensors
        return grad, grad * unit, None


def with_latents(student: nn.Module) -> nn.Module:
    """The student itself, its soft layers replaced by `LatentLinear`s of the same codes."""
    for name, layer in soft_layers(student).items():
        structure.swap(student, name, LatentLinear(layer))
    return student
