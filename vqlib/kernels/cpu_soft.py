"""Soft reconstruction and its gradients on the CPU, compiled by numba once for each d and n.

No [N, n, d] tensor exists: a block of 256 sub-vectors gets its ratios into the first-level cache, then each sub-vector
is mixed from the codebook, which stays cached. The backward pass computes the ratios again instead of storing them.
Codeword gradients are summed per chunk in float32 and over chunks in float64, in an order that no number of threads
changes.

Functions learn d and n while they are compiled, from the lengths of the tuples `unit` and `slots`; see `cpu`. Arrays
are flat, and a block's values lie transposed, t * 256 + b, so that every lane of a register works on another sub-vector.
"""

import numpy as np
from numba import njit

from vqlib.kernels.threads import BLOCK, chunk_size, run_chunks
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


def forward(codewords: np.ndarray, candidates: np.ndarray, logits: np.ndarray | None) -> np.ndarray:
    """Eq. 6 and 7: float32 [k, d], integer [N, n], float32 [N, n] or None (n = 1) -> float32 [N, d]."""
    (count, n), d = candidates.shape, codewords.shape[1]
    unit, slots = (0,) * d, (0,) * n
    out = np.empty((count, d), dtype=np.float32)
    table, codes, flat = codewords.reshape(-1), candidates.reshape(-1), out.reshape(-1)
    z = None if logits is None else logits.reshape(-1)

    def work(_, low: int, high: int) -> None:
        if z is None:
            _gather_range(unit, table, codes, low, high, flat)
        else:
            _forward_range(unit, slots, table, codes, z, low, high, flat)

    run_chunks(count, chunk_size(count, least=CHUNK), work)
    return out


def backward(
    codewords: np.ndarray, candidates: np.ndarray, logits: np.ndarray | None, grad: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None]:
    """Gradients of the codewords [k, d] and the logits [N, n] (None without logits) from grad [N, d]."""
    (count, n), (k, d) = candidates.shape, codewords.shape
    unit, slots = (0,) * d, (0,) * n
    size = chunk_size(count, partial_bytes=4 * k * d, least=CHUNK)
    partial = np.zeros((-(-count // size), k * d), dtype=np.float32)
    grad_logits = None if logits is None else np.empty((count, n), dtype=np.float32)
    table, codes, slopes = codewords.reshape(-1), candidates.reshape(-1), grad.reshape(-1)
    z, into = (None, None) if logits is None else (logits.reshape(-1), grad_logits.reshape(-1))

    def work(i: int, low: int, high: int) -> None:
        if z is None:
            _scatter_range(unit, codes, slopes, low, high, partial[i])
        else:
            _backward_range(unit, slots, table, codes, z, slopes, low, high, partial[i], into)

    run_chunks(count, size, work)
    return partial.sum(axis=0, dtype=np.float64).astype(np.float32).reshape(k, d), grad_logits
