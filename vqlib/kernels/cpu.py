"""The CPU's back end: float32 tensors in, numba's loops over their memory; results do not depend on the number of threads."""

import math

import numpy as np
import torch
from torch import Tensor

from vqlib.kernels import cpu_gather, cpu_ratios, cpu_search, cpu_soft
from vqlib.kernels.reference import ClusterSums, check_candidates

MAX_LENGTH = min(cpu_search.MAX_LENGTH, cpu_soft.MAX_LENGTH)
MAX_CANDIDATES = cpu_soft.MAX_CANDIDATES
gather = cpu_gather.gather


def _array(tensor: Tensor):
    return tensor.detach().contiguous().numpy()


def assign(x: Tensor, codewords: Tensor) -> Tensor:
    return torch.from_numpy(cpu_search.assign(_array(x), _array(codewords)))


def nearest(x: Tensor, codewords: Tensor, n: int) -> Tensor:
    return torch.from_numpy(cpu_search.nearest(_array(x), _array(codewords), n))


def cluster_sums(x: Tensor, codewords: Tensor) -> ClusterSums:
    return ClusterSums(*map(torch.from_numpy, cpu_search.cluster_sums(_array(x), _array(codewords))))


class _SoftReconstruct(torch.autograd.Function):
    """Fused forward and backward; keeps nothing but its inputs."""

    @staticmethod
    def forward(ctx, codewords, candidates, logits):
        check_candidates(candidates, len(codewords))  # compiled loops would read past the end
        ctx.save_for_backward(codewords, candidates, logits)
        arrays = _array(codewords), _array(candidates), None if logits is None else _array(logits)
        return torch.from_numpy(cpu_soft.forward(*arrays))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        codewords, candidates, logits = ctx.saved_tensors
        arrays = _array(codewords), _array(candidates), None if logits is None else _array(logits)
        grad_codewords, grad_logits = cpu_soft.backward(*arrays, _array(grad))
        return torch.from_numpy(grad_codewords), None, None if logits is None else torch.from_numpy(grad_logits)


def soft_reconstruct(codewords: Tensor, candidates: Tensor, logits: Tensor | None) -> Tensor:
    return _SoftReconstruct.apply(codewords, candidates, logits)


def ratio_loss(kind: str, logits: Tensor) -> Tensor:
    value = cpu_ratios.add_loss(_array(logits), kind == "absolute", 0.0, _array(torch.zeros_like(logits)))
    return torch.tensor(value, dtype=torch.float32)


def add_ratio_gradient(kind: str, logits: Tensor, grad: Tensor, weight: float) -> None:
    cpu_ratios.add_loss(_array(logits), kind == "absolute", weight, grad.numpy())


def rmsprop_step(
    values: Tensor, grad: Tensor, squares: Tensor, rate: float, smoothing: float, eps: float, loss: Tensor
) -> None:
    if math.isfinite(loss.item()):
        cpu_ratios.rmsprop(values.numpy(), _array(grad), squares.numpy(), rate, smoothing, eps)


def ratio_limit(logits: Tensor, rank: int) -> Tensor:
    return torch.from_numpy(cpu_ratios.largest(_array(logits))).kthvalue(rank).values


def settle_ratios(logits: Tensor, candidates: Tensor, k: int, limit: float | Tensor, freeze: bool) -> Tensor:
    check_candidates(candidates, k)
    histogram, sums, winners = cpu_ratios.settle(logits.numpy(), float(limit), freeze)
    used = cpu_ratios.used_codewords(_array(candidates), winners, k)
    return torch.from_numpy(np.concatenate([sums / max(len(logits), 1), [used], histogram]))
