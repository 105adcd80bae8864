"""Soft reconstruction and its gradients on the CPU, compiled by numba once for each d and n.

No [N, n, d] tensor exists: a block of 256 sub-vectors gets its ratios into the first-level cache, then each sub-vector
is mixed from the codebook, which stays cached. The backward pass computes the ratios again instead of storing them.
Codeword gradients are summed per chunk in float32 and over chunks in float64, in an order that no number of threads
changes.

Functions learn d and n while they are compiled, from the lengths of the tuples `unit` and `slots`; see `cpu_search`. Arrays
are flat, and a block's values lie transposed, t * 256 + b, so that every lane of a register works on another sub-vector.
"""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from vqlib.kernels.reference import check_candidates
from vqlib.kernels.threads import BLOCK, array, chunk_size, run_chunks
from vqlib.kernels.vectors import OPTIONS, add_scaled, dot, exp

MAX_LENGTH = 16
MAX_CANDIDATES = 16
CHUNK = 16384  # sub-vectors: a tenth of a millisecond

_BLOCK = np.uint64(BLOCK)


@njit(**OPTIONS)
def load_block(slots, values, low, rows, block):
    """Transpose the first `rows` rows from `low` on: values [N·n] -> block [n, 256] flat."""
    n, first = np.uint64(len(slots)), np.uint64(low)
    for b in range(np.uint64(rows)):
        for t in range(n):
            block[t * _BLOCK + b] = values[(first + b) * n + t]


@njit(**OPTIONS)
def store_block(slots, block, low, rows, values):
    """The way back: block [n, 256] flat -> `rows` rows of values [N·n] from `low` on."""
    n, first = np.uint64(len(slots)), np.uint64(low)
    for b in range(np.uint64(rows)):
        for t in range(n):
            values[(first + b) * n + t] = block[t * _BLOCK + b]


@njit(**OPTIONS)
def softmax_block(slots, block, totals):
    """A block's logits become its ratios (Eq. 6), [n, 256] flat; totals [256]: the sums of exponentials divided by."""
    n = np.uint64(len(slots))
    for b in range(_BLOCK):
        top = block[b]
        for t in range(n):
            value = block[t * _BLOCK + b]
            top = value if value > top else top
        total = np.float32(0.0)
        for t in range(n):
            value = exp(block[t * _BLOCK + b] - top)
            block[t * _BLOCK + b] = value
            total += value
        totals[b] = total
        for t in range(n):
            block[t * _BLOCK + b] *= np.float32(1.0) / total


@njit(**OPTIONS)
def _forward_range(unit, slots, codewords, candidates, logits, start, stop, out):
    d, n = np.uint64(len(unit)), np.uint64(len(slots))
    ratios = np.zeros(len(slots) * BLOCK, dtype=np.float32)
    totals = np.empty(BLOCK, dtype=np.float32)
    for low in range(start, stop, BLOCK):
        rows, first = min(BLOCK, stop - low), np.uint64(low)
        load_block(slots, logits, low, rows, ratios)
        softmax_block(slots, ratios, totals)
        for b in range(np.uint64(rows)):
            place = (first + b) * d
            for j in range(d):
                out[place + j] = np.float32(0.0)
            for t in range(n):
                code = np.uint64(candidates[(first + b) * n + t])
                add_scaled(unit, out, place, ratios[t * _BLOCK + b], codewords, code * d)


@njit(**OPTIONS)
def _backward_range(unit, slots, codewords, candidates, logits, grad, start, stop, grad_codewords, grad_logits):
    d, n = np.uint64(len(unit)), np.uint64(len(slots))
    ratios = np.zeros(len(slots) * BLOCK, dtype=np.float32)
    products = np.zeros(len(slots) * BLOCK, dtype=np.float32)  # gradient of each ratio, then of each logit
    totals = np.empty(BLOCK, dtype=np.float32)
    for low in range(start, stop, BLOCK):
        rows, first = min(BLOCK, stop - low), np.uint64(low)
        load_block(slots, logits, low, rows, ratios)
        softmax_block(slots, ratios, totals)
        for b in range(np.uint64(rows)):
            place = (first + b) * d
            for t in range(n):
                code = np.uint64(candidates[(first + b) * n + t])
                products[t * _BLOCK + b] = dot(unit, grad, place, codewords, code * d)
                add_scaled(unit, grad_codewords, code * d, ratios[t * _BLOCK + b], grad, place)
        for b in range(_BLOCK):
            mean = np.float32(0.0)
            for t in range(n):
                mean += ratios[t * _BLOCK + b] * products[t * _BLOCK + b]
            for t in range(n):
                products[t * _BLOCK + b] = ratios[t * _BLOCK + b] * (products[t * _BLOCK + b] - mean)
        store_block(slots, products, low, rows, grad_logits)


@njit(**OPTIONS)
def _gather_range(unit, codewords, candidates, start, stop, out):
    d = np.uint64(len(unit))
    for i in range(np.uint64(start), np.uint64(stop)):
        for j in range(d):
            out[i * d + j] = codewords[np.uint64(candidates[i]) * d + j]


@njit(**OPTIONS)
def _scatter_range(unit, candidates, grad, start, stop, grad_codewords):
    d = np.uint64(len(unit))
    for i in range(np.uint64(start), np.uint64(stop)):
        add_scaled(unit, grad_codewords, np.uint64(candidates[i]) * d, np.float32(1.0), grad, i * d)


class _SoftReconstruct(torch.autograd.Function):
    """Fused forward and backward; keeps nothing but its inputs."""

    @staticmethod
    def forward(ctx, codewords: Tensor, candidates: Tensor, logits: Tensor | None) -> Tensor:
        check_candidates(candidates, len(codewords))  # compiled loops would read past the end
        ctx.save_for_backward(codewords, candidates, logits)
        (count, n), d = candidates.shape, codewords.shape[1]
        unit, slots = (0,) * d, (0,) * n
        table, codes, z = _flat(codewords), _flat(candidates), _flat(logits)
        out = np.empty(count * d, dtype=np.float32)

        def work(_, low: int, high: int) -> None:
            if z is None:
                _gather_range(unit, table, codes, low, high, out)
            else:
                _forward_range(unit, slots, table, codes, z, low, high, out)

        run_chunks(count, chunk_size(count, least=CHUNK), work)
        return torch.from_numpy(out.reshape(count, d))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, Tensor | None]:
        codewords, candidates, logits = ctx.saved_tensors
        (count, n), (k, d) = candidates.shape, codewords.shape
        unit, slots = (0,) * d, (0,) * n
        size = chunk_size(count, partial_bytes=4 * k * d, least=CHUNK)
        partial = np.zeros((-(-count // size), k * d), dtype=np.float32)
        table, codes, z, slopes = _flat(codewords), _flat(candidates), _flat(logits), _flat(grad)
        grad_logits = None if z is None else np.empty(count * n, dtype=np.float32)

        def work(i: int, low: int, high: int) -> None:
            if z is None:
                _scatter_range(unit, codes, slopes, low, high, partial[i])
            else:
                _backward_range(unit, slots, table, codes, z, slopes, low, high, partial[i], grad_logits)

        run_chunks(count, size, work)
        grad_codewords = partial.sum(axis=0, dtype=np.float64).astype(np.float32).reshape(k, d)
        return (
            torch.from_numpy(grad_codewords),
            None,
            None if z is None else torch.from_numpy(grad_logits).view(count, n),
        )


def _flat(tensor: Tensor | None) -> np.ndarray | None:
    return None if tensor is None else array(tensor).reshape(-1)


def soft_reconstruct(codewords: Tensor, candidates: Tensor, logits: Tensor | None) -> Tensor:
    """Eq. 6 and 7: float32 [k, d], integer [N, n], float32 [N, n] or None (n = 1) -> float32 [N, d], differentiable."""
    return _SoftReconstruct.apply(codewords, candidates, logits)
