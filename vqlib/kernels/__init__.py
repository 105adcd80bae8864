"""The loops over sub-vectors that decide the running time, one fused implementation per device.

float32 on the CPU runs the numba kernels, whose results do not depend on the number of threads. float32 on CUDA runs
the Triton kernels of `cuda`, where there is one; everything else the plain torch twins in `reference`.
"""

from functools import cache

import torch
from torch import Tensor

from vqlib.kernels import reference
from vqlib.kernels.reference import FROZEN_LOGIT, ClusterSums, RatioStatistics

__all__ = [
    "FROZEN_LOGIT",
    "ClusterSums",
    "RatioStatistics",
    "add_ratio_gradient",
    "assign",
    "cluster_sums",
    "largest_ratios",
    "nearest",
    "ratio_loss",
    "rmsprop_step",
    "settle_ratios",
    "soft_reconstruct",
    "used_codewords",
]


@cache
def _compiled():
    """The modules of numba kernels, or None without numba; imported at first use to keep imports fast."""
    try:
        from vqlib.kernels import cpu, cpu_ratios, cpu_soft
    except ImportError:
        return None
    return cpu, cpu_soft, cpu_ratios


@cache
def _triton():
    """The module of Triton kernels, or None without triton; imported at first use, which needs a tensor on CUDA."""
    try:
        from vqlib.kernels import cuda
    except ImportError:
        return None
    return cuda


def _on_cpu(*tensors: Tensor) -> bool:
    return all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors) and _compiled() is not None


def _on_cuda(*tensors: Tensor) -> bool:
    same = all(t.is_cuda and t.dtype == torch.float32 and t.device == tensors[0].device for t in tensors)
    return same and _triton() is not None


def _array(tensor: Tensor):
    return tensor.detach().contiguous().numpy()


def _pair(x: Tensor, codewords: Tensor) -> tuple[Tensor, Tensor]:
    """Points and codewords checked and widened to at least float32."""
    if x.dim() != 2 or codewords.dim() != 2 or x.shape[1] != codewords.shape[1] or len(codewords) == 0:
        shapes = f"points {list(x.shape)} and codewords {list(codewords.shape)}"
        raise ValueError(f"{shapes} must be [N, d] and [k, d], k >= 1")
    if x.device != codewords.device:
        raise ValueError(f"points are on {x.device}, codewords on {codewords.device}")
    dtype = torch.promote_types(torch.promote_types(x.dtype, codewords.dtype), torch.float32)
    return x.detach().to(dtype), codewords.detach().to(dtype)


def assign(x: Tensor, codewords: Tensor) -> Tensor:
    """Index of the nearest codeword of every point; the first of equals. [N, d], [k, d] -> int64 [N]."""
    x, codewords = _pair(x, codewords)
    if _on_cpu(x) and x.shape[1] <= _compiled()[0].MAX_LENGTH:
        return torch.from_numpy(_compiled()[0].assign(_array(x), _array(codewords)))
    if _on_cuda(x) and x.shape[1] <= _triton().MAX_LENGTH:
        return _triton().assign(x, codewords)
    return reference.assign(x, codewords)


def nearest(x: Tensor, codewords: Tensor, n: int) -> Tensor:
    """Indices of the n nearest codewords, nearest first (Eq. 5). [N, d], [k, d] -> int64 [N, n]; ValueError: n > k."""
    x, codewords = _pair(x, codewords)
    if not 1 <= n <= len(codewords):
        raise ValueError(f"n={n} candidates asked for, but the codebook has k={len(codewords)} codewords")
    if _on_cpu(x) and x.shape[1] <= _compiled()[0].MAX_LENGTH:
        return torch.from_numpy(_compiled()[0].nearest(_array(x), _array(codewords), n))
    if _on_cuda(x) and x.shape[1] <= _triton().MAX_LENGTH:
        return _triton().nearest(x, codewords, n)
    return reference.nearest(x, codewords, n)


def cluster_sums(x: Tensor, codewords: Tensor) -> ClusterSums:
    """A k-means pass: assign every point, add it up per codeword in float64. [N, d], [k, d] -> [k, d], [k], [k]."""
    x, codewords = _pair(x, codewords)
    if _on_cpu(x) and x.shape[1] <= _compiled()[0].MAX_LENGTH:
        return ClusterSums(*map(torch.from_numpy, _compiled()[0].cluster_sums(_array(x), _array(codewords))))
    if _on_cuda(x) and x.shape[1] <= _triton().MAX_LENGTH:
        return reference.cluster_sums(x, codewords, _triton().assign)
    return reference.cluster_sums(x, codewords)


class _SoftReconstruct(torch.autograd.Function):
    """Fused forward and backward on the CPU; keeps nothing but its inputs."""

    @staticmethod
    def forward(ctx, codewords, candidates, logits):
        ctx.save_for_backward(codewords, candidates, logits)
        arrays = _array(codewords), _array(candidates), None if logits is None else _array(logits)
        return torch.from_numpy(_compiled()[1].forward(*arrays))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        codewords, candidates, logits = ctx.saved_tensors
        arrays = _array(codewords), _array(candidates), None if logits is None else _array(logits)
        grad_codewords, grad_logits = _compiled()[1].backward(*arrays, _array(grad))
        return torch.from_numpy(grad_codewords), None, None if logits is None else torch.from_numpy(grad_logits)


def soft_reconstruct(codewords: Tensor, candidates: Tensor, logits: Tensor | None) -> Tensor:
    """Ratio-weighted mean of each sub-vector's candidates (Eq. 6 and 7), differentiable in codewords and logits.

    [k, d], integer [N, n], [N, n] -> [N, d]. With n = 1 the logits have no effect and may be None.
    ValueError for shapes that do not fit, IndexError for a candidate outside the codebook.
    """
    count, n = candidates.shape
    if (logits is None and n != 1) or (logits is not None and logits.shape != candidates.shape):
        shape = None if logits is None else list(logits.shape)
        raise ValueError(f"logits {shape} do not fit candidates [{count}, {n}]; None is allowed for n = 1 only")
    floats = (codewords,) if logits is None else (codewords, logits)
    if _on_cpu(*floats) and candidates.device.type == "cpu":
        if codewords.shape[1] <= _compiled()[1].MAX_LENGTH and n <= _compiled()[1].MAX_CANDIDATES:
            return _SoftReconstruct.apply(codewords, candidates, logits)
    if _on_cuda(*floats) and _triton().mixes(codewords, candidates):
        return _triton().soft_reconstruct(codewords, candidates, logits)
    return reference.soft_reconstruct(codewords, candidates, logits)


class _RatioLoss(torch.autograd.Function):
    """Value and gradient in one pass; the gradient waits for the backward pass to be scaled."""

    @staticmethod
    def forward(ctx, logits, kind):
        grad = torch.zeros_like(logits, memory_format=torch.contiguous_format)
        value = _compiled()[2].add_loss(_array(logits), kind == "absolute", 1.0, grad.numpy())
        ctx.save_for_backward(grad)
        return torch.tensor(value, dtype=torch.float32)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale):
        return ctx.saved_tensors[0] * scale, None


def ratio_loss(kind: str, logits: Tensor) -> Tensor:
    """Eq. 9 ("absolute") or n · mean of r(1 − r) over sub-vectors not yet frozen ("quadratic"): [N, n] -> scalar."""
    if _on_cpu(logits) and logits.shape[1] <= _compiled()[1].MAX_CANDIDATES:
        return _RatioLoss.apply(logits, kind)
    return reference.ratio_loss(kind, logits)


@torch.no_grad()
def add_ratio_gradient(kind: str, logits: Tensor, grad: Tensor, weight: float) -> None:
    """grad += weight · d `ratio_loss(kind, logits)` / d logits, in place and in one pass; both [N, n]."""
    logits = logits.detach()
    if _on_cpu(logits, grad) and logits.shape[1] <= _compiled()[1].MAX_CANDIDATES and grad.is_contiguous():
        _compiled()[2].add_loss(_array(logits), kind == "absolute", weight, grad.numpy())
    else:
        reference.add_ratio_gradient(kind, logits, grad, weight)


@torch.no_grad()
def rmsprop_step(values: Tensor, grad: Tensor, squares: Tensor, rate: float, smoothing: float, eps: float) -> None:
    """v ← αv + (1 − α)g², x ← x − rate·g / (√v + eps): RMSprop on `values` and `squares`, in place."""
    values = values.detach()
    if _on_cpu(values, grad, squares) and values.is_contiguous() and squares.is_contiguous():
        _compiled()[2].rmsprop(values.numpy(), _array(grad), squares.numpy(), rate, smoothing, eps)
    else:
        reference.rmsprop_step(values, grad, squares, rate, smoothing, eps)


def largest_ratios(logits: Tensor) -> Tensor:
    """The largest ratio of every sub-vector, max softmax(logits): [N, n] -> [N]."""
    logits = logits.detach()
    if _on_cpu(logits) and logits.shape[1] <= _compiled()[1].MAX_CANDIDATES:
        return torch.from_numpy(_compiled()[2].largest(_array(logits)))
    return reference.largest_ratios(logits)


def used_codewords(candidates: Tensor, winners: Tensor, k: int) -> int:
    """How many of k codewords some sub-vector has chosen: integer [N, n], position of the chosen one uint8 [N]."""
    if candidates.device.type == "cpu" and _compiled() is not None:
        return _compiled()[2].used_codewords(_array(candidates), _array(winners), k)
    return reference.used_codewords(candidates, winners, k)


@torch.no_grad()
def settle_ratios(logits: Tensor, threshold: float = 0.99, freeze: bool = False) -> RatioStatistics:
    """Statistics of the ratios softmax(logits [N, n]) in one pass; with `freeze`, rows above the threshold become one-hot.

    Freezing changes `logits` in place, and the statistics are those before it.
    """
    logits = logits.detach()
    if _on_cpu(logits) and logits.shape[1] <= _compiled()[1].MAX_CANDIDATES and logits.is_contiguous():
        histogram, sums, winners = _compiled()[2].settle(logits.numpy(), threshold, freeze)
        means = (sums / max(len(logits), 1)).tolist()
        return RatioStatistics(torch.from_numpy(histogram), *means, torch.from_numpy(winners))
    return reference.settle_ratios(logits, threshold, freeze)
