"""The soft layer: a linear layer under calibration, whose weight mixes each sub-vector's candidates.

A new stage is a new type, there is no mode flag: hardened it becomes a `VQLinear`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vqlib import kernels
from vqlib.kernels.products import linear
from vqlib.quantizer.candidates import Candidates
from vqlib.quantizer.subvectors import join


class CandidateLinear(nn.Module):
    """A linear layer under calibration: its weight is Σ_n r_n · C[A_c,n] with trainable codebook, logits and bias.

    codebook: Parameter [k, d], possibly shared with other layers; candidates: integers [N, n], checked here and where a
    state is loaded (IndexError), for the GPU does not look at them again; logits: Parameter
    float32 [N, n], or None where n = 1 leaves nothing to choose; scale: Parameter [] or None where the codebook is the
    layer's own; bias: Parameter [out] or None. All float32, for small steps would be lost in fewer bits; codebook_dtype is
    that of the packed layer's codewords.
    """

    def __init__(
        self,
        codebook: nn.Parameter,
        candidates: Candidates,
        shape: tuple[int, int],
        bias: Tensor | None = None,
        scale: Tensor | None = None,
        codebook_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.codebook_dtype = codebook_dtype
        self.out_features, self.in_features = shape
        kernels.check_candidates(candidates.indices, len(codebook))
        self.codebook = codebook
        self.register_buffer("candidates", candidates.indices)
        self.register_buffer("chosen", None, persistent=False)  # [N, 1] once `settle` was called
        self.logits = nn.Parameter(candidates.logits) if candidates.indices.shape[1] > 1 else None
        self.scale = None if scale is None else nn.Parameter(scale.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone())

    def subvectors(self) -> Tensor:
        """ŵ = Σ_n r_n · C[A_c,n], [N, d] (Eq. 7); differentiable in codebook and logits."""
        settled = self.chosen is not None
        offered = (self.chosen, None) if settled else (self.candidates, self.logits)
        return kernels.soft_reconstruct(self.codebook, *offered)

    def weight(self) -> Tensor:
        """The soft reconstruction Ŵ, [out, in]; differentiable in the scale too."""
        weight = join(self.subvectors(), (self.out_features, self.in_features))  # [N, d] -> [out, in]
        return weight if self.scale is None else self.scale * weight

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return linear(x, self.weight().to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def winners(self) -> Tensor:
        """Position of the candidate with the highest ratio, int64 [N]; 0 is the first, at the start the nearest or assigned."""
        if self.logits is None:
            return torch.zeros(len(self.candidates), dtype=torch.int64, device=self.candidates.device)
        return self.logits.detach().argmax(dim=1)

    def assignments(self) -> Tensor:
        """A of the candidates with the highest ratio, int64 [N]."""
        return self.candidates.gather(1, self.winners().unsqueeze(1)).squeeze(1).long()  # [N, n] -> [N]

    def settle(self) -> None:
        """All ratios are one-hot for good: from here on a step costs what it does with n = 1, and gives the same."""
        self.chosen = self.candidates.gather(1, self.winners().unsqueeze(1))
        self.logits.requires_grad_(False).grad = None

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self.chosen = None  # other ratios may come
        super()._load_from_state_dict(*args, **kwargs)
        kernels.check_candidates(self.candidates, len(self.codebook))

    def extra_repr(self) -> str:
        n, (k, d) = self.candidates.shape[1], self.codebook.shape
        return f"in_features={self.in_features}, out_features={self.out_features}, k={k}, d={d}, candidates={n}"


def soft_layers(module: nn.Module) -> dict[str, CandidateLinear]:
    """Every soft layer of a module by its dotted name, in forward order."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, CandidateLinear)}
