"""Soft reconstruction and its gradients on the CPU, compiled by numba once for each d and n.

No [N, n, d] tensor exists: a block of 256 sub-vectors gets its ratios into the first-level cache, then each sub-vector
is mixed from the codebook, which stays cached. The backward pass computes the ratios again instead of storing them.
Codeword gradients are summed per chunk in float32 and over chunks in float64, in an order that no number of threads
changes.

Functions learn d and n while they are compiled, from the lengths of the tuples `unit` and `slots`; see `cpu`.
"""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from vqlib.kernels.threads import BLOCK, chunk_size, run_chunks

MAX_LENGTH = 16
MAX_CANDIDATES = 16
OPTIONS = {"nogil": True, "cache": True, "fastmath": {"contract"}, "error_model": "numpy"}

_LOG2E = np.float32(1.4426950408889634)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_ROUND = np.float32(12582912.0)  # 1.5 · 2^23: adding it leaves the nearest integer in the low bits of the mantissa
_LOWEST = np.float32(-87.0)  # exp(-87) is the smallest normal float32


@intrinsic
def _power_of_two(typingctx, shifted):
    """2^i from the float32 number 1.5 · 2^23 + i, by moving i into the exponent bits."""
    if shifted != types.float32:
        return None

    def codegen(context, builder, signature, args):
        word = ir.IntType(32)
        exponent = builder.shl(builder.bitcast(args[0], word), ir.Constant(word, 23))
        return builder.bitcast(builder.add(exponent, ir.Constant(word, 0x3F800000)), ir.FloatType())

    return types.float32(types.float32), codegen


@njit(**OPTIONS)
def _exp(x):
    """exp(x) for float32 x <= 0 within 2 ulp: range reduction and a polynomial, so that it runs in vector lanes."""
    x = _LOWEST if x < _LOWEST else x
    shifted = x * _LOG2E + _ROUND
    whole = shifted - _ROUND
    rest = x - whole * _LN2_HIGH - whole * _LN2_LOW
    value = np.float32(1.9875691500e-4)  # minimax polynomial of exp on ±½ log 2
    value = value * rest + np.float32(1.3981999507e-3)
    value = value * rest + np.float32(8.3334519073e-3)
    value = value * rest + np.float32(4.1665795894e-2)
    value = value * rest + np.float32(1.6666665459e-1)
    value = value * rest + np.float32(5.0000001201e-1)
    value = value * rest * rest + rest + np.float32(1.0)
    return value * _power_of_two(shifted)


@njit(**OPTIONS)
def softmax_block(slots, logits, start, stop, ratios, totals):
    """Ratios of one block (Eq. 6), [n, 256] flat, and the sums of exponentials they were divided by, [256]."""
    for b in range(stop - start):
        for t in range(len(slots)):
            ratios[t * BLOCK + b] = logits[start + b, t]  # [256, n] -> [n, 256]
    for b in range(BLOCK):
        top = ratios[b]
        for t in range(1, len(slots)):
            value = ratios[t * BLOCK + b]
            top = value if value > top else top
        total = np.float32(0.0)
        for t in range(len(slots)):
            value = _exp(ratios[t * BLOCK + b] - top)
            ratios[t * BLOCK + b] = value
            total += value
        totals[b] = total
        for t in range(len(slots)):
            ratios[t * BLOCK + b] /= total


@njit(**OPTIONS)
def _first_outside(slots, candidates, start, stop, k):
    """First row of the block with a candidate outside 0..k-1, or -1."""
    for i in range(start, stop):
        for t in range(len(slots)):
            code = np.int64(candidates[i, t])
            if code < 0 or code >= k:
                return i
    return -1


@njit(**OPTIONS)
def _forward_range(unit, slots, codewords, candidates, logits, start, stop, out):
    ratios = np.zeros(len(slots) * BLOCK, dtype=np.float32)
    totals = np.empty(BLOCK, dtype=np.float32)
    for low in range(start, stop, BLOCK):
        high = min(low + BLOCK, stop)
        softmax_block(slots, logits, low, high, ratios, totals)
        for b in range(high - low):
            for j in range(len(unit)):
                value = np.float32(0.0)
                for t in range(len(slots)):
                    value += ratios[t * BLOCK + b] * codewords[candidates[low + b, t], j]
                out[low + b, j] = value


@njit(**OPTIONS)
def _backward_range(unit, slots, codewords, candidates, logits, grad, start, stop, grad_codewords, grad_logits):
    ratios = np.zeros(len(slots) * BLOCK, dtype=np.float32)
    products = np.zeros(len(slots) * BLOCK, dtype=np.float32)  # gradient of each ratio, then of each logit
    totals = np.empty(BLOCK, dtype=np.float32)
    for low in range(start, stop, BLOCK):
        high = min(low + BLOCK, stop)
        softmax_block(slots, logits, low, high, ratios, totals)
        for b in range(high - low):
            for t in range(len(slots)):
                code = candidates[low + b, t]
                product = np.float32(0.0)
                for j in range(len(unit)):
                    product += grad[low + b, j] * codewords[code, j]
                products[t * BLOCK + b] = product
        for b in range(high - low):
            for t in range(len(slots)):
                code = candidates[low + b, t]
                for j in range(len(unit)):
                    grad_codewords[code, j] += ratios[t * BLOCK + b] * grad[low + b, j]
        for b in range(BLOCK):
            mean = np.float32(0.0)
            for t in range(len(slots)):
                mean += ratios[t * BLOCK + b] * products[t * BLOCK + b]
            for t in range(len(slots)):
                products[t * BLOCK + b] = ratios[t * BLOCK + b] * (products[t * BLOCK + b] - mean)
        for b in range(high - low):
            for t in range(len(slots)):
                grad_logits[low + b, t] = products[t * BLOCK + b]


@njit(**OPTIONS)
def _gather_range(unit, codewords, candidates, start, stop, out):
    for i in range(start, stop):
        for j in range(len(unit)):
            out[i, j] = codewords[candidates[i, 0], j]


@njit(**OPTIONS)
def _scatter_range(unit, candidates, grad, start, stop, grad_codewords):
    for i in range(start, stop):
        for j in range(len(unit)):
            grad_codewords[candidates[i, 0], j] += grad[i, j]


def _check_candidates(slots: tuple, candidates: np.ndarray, k: int) -> None:
    if candidates.dtype == np.uint8 and k >= 256:
        return  # every possible value is a codeword
    found: list[int] = []

    def work(_, low: int, high: int) -> None:
        found.append(_first_outside(slots, candidates, low, high, k))

    run_chunks(len(candidates), chunk_size(len(candidates)), work)
    outside = min((i for i in found if i >= 0), default=None)
    if outside is not None:
        row = candidates[outside].tolist()
        raise IndexError(f"candidates {row} of sub-vector {outside} are not all in 0..{k - 1}, the codebook has k={k}")


def forward(codewords: np.ndarray, candidates: np.ndarray, logits: np.ndarray | None) -> np.ndarray:
    """Eq. 6 and 7: float32 [k, d], integer [N, n], float32 [N, n] or None (n = 1) -> float32 [N, d]; IndexError."""
    (count, n), (k, d) = candidates.shape, codewords.shape
    unit, slots = (0,) * d, (0,) * n
    _check_candidates(slots, candidates, k)
    out = np.empty((count, d), dtype=np.float32)

    def work(_, low: int, high: int) -> None:
        if logits is None:
            _gather_range(unit, codewords, candidates, low, high, out)
        else:
            _forward_range(unit, slots, codewords, candidates, logits, low, high, out)

    run_chunks(count, chunk_size(count), work)
    return out


def backward(
    codewords: np.ndarray, candidates: np.ndarray, logits: np.ndarray | None, grad: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None]:
    """Gradients of the codewords [k, d] and the logits [N, n] (None without logits) from grad [N, d]."""
    (count, n), (k, d) = candidates.shape, codewords.shape
    unit, slots = (0,) * d, (0,) * n
    size = chunk_size(count, partial_bytes=4 * k * d)
    partial = np.zeros((-(-count // size), k, d), dtype=np.float32)
    grad_logits = None if logits is None else np.empty((count, n), dtype=np.float32)

    def work(i: int, low: int, high: int) -> None:
        if logits is None:
            _scatter_range(unit, candidates, grad, low, high, partial[i])
        else:
            _backward_range(unit, slots, codewords, candidates, logits, grad, low, high, partial[i], grad_logits)

    run_chunks(count, size, work)
    return partial.sum(axis=0, dtype=np.float64).astype(np.float32), grad_logits
