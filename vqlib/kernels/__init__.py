"""The loops over sub-vectors that decide the running time, one back end a device: `cpu`, `cuda`, and `reference` for the rest.

A back end is a module with the functions of this one on float32 tensors of its device, and the sizes it takes. What it lacks,
other types, other sizes and other devices go to the plain torch twins in `reference`, against which it is tested.
"""

import importlib
import warnings
from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from vqlib.kernels import reference
from vqlib.kernels.bits import packed_size
from vqlib.kernels.reference import FROZEN_LOGIT, ClusterSums, RatioStatistics, check_candidates

__all__ = [
    "FROZEN_LOGIT",
    "ClusterSums",
    "RatioStatistics",
    "add_ratio_gradient",
    "assign",
    "check_candidates",
    "cluster_sums",
    "gather",
    "nearest",
    "ratio_limit",
    "ratio_loss",
    "rmsprop_step",
    "settle_ratios",
    "soft_reconstruct",
]


@cache
def back_end(device_type: str) -> ModuleType | None:
    """The fused loops of a device, imported at first use to keep imports fast; None without numba or triton.

    Where kernels cannot be compiled, for want of a compiler or a header, one warning says so, and None.
    """
    if device_type not in ("cpu", "cuda"):
        return None
    try:
        found = importlib.import_module(f"vqlib.kernels.{device_type}")
        assigned = found.assign(torch.zeros(1, 1, device=device_type), torch.zeros(1, 1, device=device_type))
        return found if assigned.tolist() == [0] else None
    except ImportError:
        return None
    except Exception as error:  # whatever a compiler says
        warnings.warn(
            f"no kernel can be compiled for {device_type}, plain torch does its work, slower: {error}", stacklevel=2
        )
        return None


_TYPES = frozenset((torch.float32, *reference.INDEX_TYPES))


def _function(
    name: str, *tensors: Tensor, length: int = 1, candidates: int = 1, written: tuple[Tensor, ...] = ()
) -> Callable:
    """The back end's function where it takes sub-vectors of this `length` and so many `candidates`, else the twin's.

    `tensors` are all that the function reads; those of floats have to be float32, those it writes contiguous.
    """
    device = tensors[0].device
    fused = back_end(device.type)
    fits = fused is not None and length <= fused.MAX_LENGTH and candidates <= fused.MAX_CANDIDATES
    fits = fits and all(t.device == device and t.dtype in _TYPES for t in tensors)
    fits = fits and all(t.is_contiguous() for t in written)
    return getattr(fused, name, None) or getattr(reference, name) if fits else getattr(reference, name)


def _pair(x: Tensor, codewords: Tensor) -> tuple[Tensor, Tensor]:
    """Points and codewords, of one layer or of L, checked and widened to at least float32."""
    alike = x.dim() == codewords.dim() and (x.dim() == 2 or (x.dim() == 3 and len(x) == len(codewords) > 0))
    if not alike or x.shape[-1] != codewords.shape[-1] or codewords.shape[-2] == 0:
        shapes = f"points {list(x.shape)} and codewords {list(codewords.shape)}"
        raise ValueError(f"{shapes} must be [N, d] and [k, d], k >= 1, or [L, N, d] and [L, k, d] with L >= 1")
    if x.device != codewords.device:
        raise ValueError(f"points are on {x.device}, codewords on {codewords.device}")
    dtype = torch.promote_types(torch.promote_types(x.dtype, codewords.dtype), torch.float32)
    return x.detach().to(dtype), codewords.detach().to(dtype)


def assign(x: Tensor, codewords: Tensor, guess: Tensor | None = None) -> Tensor:
    """Index of the nearest codeword of every point; the first of equals. [N, d], [k, d] -> int64 [N].

    Layers of one shape together: [L, N, d], [L, k, d] -> [L, N], the same bits as one by one. guess: integer [N], of one
    layer's points alone, what may well be the nearest; the same bits, and on the CPU no search where it surely is.
    """
    x, codewords = _pair(x, codewords)
    if guess is not None and list(guess.shape) != [len(x)]:
        raise ValueError(f"guess {list(guess.shape)} must be [{len(x)}], a codeword for each point of one layer")
    options = () if guess is None else (guess,)
    return _function("assign", x, codewords, *options, length=x.shape[-1])(x, codewords, *options)


def nearest(x: Tensor, codewords: Tensor, n: int) -> Tensor:
    """Indices of the n nearest codewords, nearest first (Eq. 5). [N, d], [k, d] -> int64 [N, n]; ValueError: n > k."""
    x, codewords = _pair(x, codewords)
    if x.dim() != 2:
        raise ValueError(f"points {list(x.shape)} must be [N, d], of one layer")
    if not 1 <= n <= len(codewords):
        raise ValueError(f"n={n} candidates asked for, but the codebook has k={len(codewords)} codewords")
    return _function("nearest", x, codewords, length=x.shape[1])(x, codewords, n)


def cluster_sums(x: Tensor, codewords: Tensor) -> ClusterSums:
    """A k-means pass: assign every point, add it up per codeword in float64. [N, d], [k, d] -> [k, d], [k], [k].

    Layers of one shape together: [L, N, d], [L, k, d] -> [L, k, d], [L, k], [L, k], the same bits as one by one.
    """
    x, codewords = _pair(x, codewords)
    return _function("cluster_sums", x, codewords, length=x.shape[-1])(x, codewords)


def soft_reconstruct(codewords: Tensor, candidates: Tensor, logits: Tensor | None) -> Tensor:
    """Ratio-weighted mean of each sub-vector's candidates (Eq. 6 and 7), differentiable in codewords and logits.

    [k, d], integer [N, n], [N, n] -> [N, d]. With n = 1 the logits have no effect and may be None.
    ValueError for shapes that do not fit. What a candidate outside the codebook gives depends on the device, and may be
    another codeword: `check_candidates` once, where they are made.
    """
    count, n = candidates.shape
    if (logits is None and n != 1) or (logits is not None and logits.shape != candidates.shape):
        shape = None if logits is None else list(logits.shape)
        raise ValueError(f"logits {shape} do not fit candidates [{count}, {n}]; None is allowed for n = 1 only")
    read = (codewords, candidates) if logits is None else (codewords, candidates, logits)
    chosen = _function("soft_reconstruct", *read, length=codewords.shape[1], candidates=n)
    return chosen(codewords, candidates, logits)


@torch.no_grad()
def ratio_loss(kind: str, logits: Tensor) -> Tensor:
    """L_r of one layer's logits z [N, n], r = softmax(z): -> scalar, no graph.

    "absolute" is Eq. 9, Σ_{N,n} (1 − |2r − 1|) / N: per sub-vector 2 while its largest ratio is at most ½ and 4(1 − max r)
    above, so that for n ≥ 3 its gradient is 0 at 1/n. "quadratic", of the authors' release, is n · mean of r(1 − r) over the
    sub-vectors not yet frozen.
    """
    return _function("ratio_loss", logits, candidates=logits.shape[1])(kind, logits.detach())


@torch.no_grad()
def add_ratio_gradient(kind: str, logits: Tensor, grad: Tensor, weight: float) -> None:
    """grad += weight · d `ratio_loss(kind, logits)` / d logits, in place and in one pass; both [N, n]."""
    chosen = _function("add_ratio_gradient", logits, grad, candidates=logits.shape[1], written=(grad,))
    chosen(kind, logits.detach(), grad, weight)


@torch.no_grad()
def rmsprop_step(
    values: Tensor, grad: Tensor, squares: Tensor, rate: float, smoothing: float, eps: float, loss: Tensor
) -> None:
    """v ← αv + (1 − α)g², x ← x − rate·g / (√v + eps): RMSprop on `values` and `squares`, in place.

    `loss` [] is what g belongs to: where it is not finite `values` stay as they are, and nobody has to wait to find out.
    """
    values = values.detach()
    chosen = _function("rmsprop_step", values, grad, squares, written=(values, squares))
    chosen(values, grad, squares, rate, smoothing, eps, loss.detach())


@torch.no_grad()
def ratio_limit(logits: Tensor, rank: int) -> Tensor:
    """The `rank`-th smallest, 1 the first, of the sub-vectors' largest ratios max softmax(logits): [N, n] -> scalar.

    ValueError for a rank outside 1 … N.
    """
    if not 1 <= rank <= len(logits):
        raise ValueError(f"rank {rank} is outside 1 … {len(logits)} sub-vectors")
    return _function("ratio_limit", logits, candidates=logits.shape[1])(logits.detach(), rank)


@torch.no_grad()
def settle_ratios(
    logits: Tensor, candidates: Tensor, k: int, limit: float | Tensor = 0.99, freeze: bool = False
) -> Tensor:
    """Statistics of the ratios softmax(logits [N, n]) in one pass; with `freeze`, rows above the limit become one-hot.

    float64 [26] on the device of the logits, so that nobody has to wait for it: `RatioStatistics.of(row.tolist())`. Freezing
    changes `logits` in place, and the statistics are those before it. candidates: integer [N, n] into k codewords.
    """
    logits = logits.detach()
    chosen = _function("settle_ratios", logits, candidates, candidates=logits.shape[1], written=(logits,))
    return chosen(logits, candidates, k, limit, freeze)


def gather(codes: Tensor, code_bits: int, codebook: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    """out[i] = scale · codebook[code i], multiplied in float32 and rounded once to the type of `out`; all floating types.

    uint8 [ceil(N·bits/8)] as `bits.pack_codes` makes them, [k, d], float32 [] -> `out` [N, d]. ValueError for sizes that do
    not fit together.
    """
    (count, d), (k, length) = out.shape, codebook.shape
    if codes.shape != (packed_size(count, code_bits),) or d != length or k > 1 << code_bits or not out.is_contiguous():
        raise ValueError(
            f"{codes.numel()} bytes of {code_bits}-bit codes and a {codebook.dtype} codebook [{k}, {length}] "
            f"do not fill {out.dtype} [{count}, {d}] of strides {out.stride()}"
        )
    return _function("gather", codes)(codes, code_bits, codebook, scale, out)
