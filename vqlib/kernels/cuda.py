"""The back end of CUDA: float32 tensors of one device in, Triton's kernels over their memory, compiled once for each d and n.

Everything repeats bit for bit but the codebook's gradient; under torch.use_deterministic_algorithms(True) its twin takes over.
"""

import torch
from torch import Tensor

from vqlib.kernels import cuda_gather, cuda_ratios, cuda_search, cuda_soft, reference

MAX_LENGTH, MAX_CANDIDATES = cuda_search.MAX_LENGTH, cuda_soft.MAX_CANDIDATES
assign, nearest, cluster_sums = cuda_search.assign, cuda_search.nearest, cuda_search.cluster_sums
add_ratio_gradient, rmsprop_step = cuda_ratios.add_ratio_gradient, cuda_ratios.rmsprop_step
ratio_limit, settle_ratios = cuda_ratios.ratio_limit, cuda_ratios.settle_ratios
gather = cuda_gather.gather


class _SoftReconstruct(torch.autograd.Function):
    """Fused forward and backward; keeps nothing but its inputs."""

    @staticmethod
    def forward(ctx, codewords, candidates, logits):
        kept = codewords.contiguous(), candidates.contiguous(), None if logits is None else logits.contiguous()
        ctx.save_for_backward(*kept)
        return cuda_soft.forward(*kept)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        grad_codewords, grad_logits = cuda_soft.backward(*ctx.saved_tensors, grad.contiguous())
        return grad_codewords, None, grad_logits


def soft_reconstruct(codewords: Tensor, candidates: Tensor, logits: Tensor | None) -> Tensor:
    """Ratio-weighted mean of each sub-vector's candidates; NaN from a candidate outside the codebook."""
    if torch.are_deterministic_algorithms_enabled():
        return reference.soft_reconstruct(codewords, candidates, logits)
    return _SoftReconstruct.apply(codewords, candidates, logits)
