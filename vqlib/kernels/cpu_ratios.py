"""Ratio loss, RMSprop, freezing and statistics of the logits on the CPU: one pass over [N, n] each, compiled for each n.

A block of 256 sub-vectors is loaded transposed; see `cpu_soft`. Loops over a block take every lane, also those past the
last sub-vector, except where something is added up.
"""

import math

import numpy as np
import torch
from numba import njit
from torch import Tensor

from vqlib.kernels.cpu_soft import CHUNK, load_block, softmax_block, store_block
from vqlib.kernels.reference import FROZEN_LOGIT, HISTOGRAM_BINS, SUMS, check_candidates
from vqlib.kernels.threads import BLOCK, array, chunk_size, run_chunks
from vqlib.kernels.vectors import OPTIONS

_ONE, _TWO, _ZERO = np.float32(1.0), np.float32(2.0), np.float32(0.0)
_FROZEN = np.float32(FROZEN_LOGIT)
_BLOCK = np.uint64(BLOCK)


@njit(**OPTIONS)
def _count_open(slots, logits, start, stop):
    """Number of sub-vectors that are not frozen."""
    n, still_open = np.uint64(len(slots)), 0
    for i in range(np.uint64(start), np.uint64(stop)):
        lowest = logits[i * n]
        for t in range(n):
            lowest = min(lowest, logits[i * n + t])
        still_open += lowest > _FROZEN
    return still_open


@njit(**OPTIONS)
def _loss_range(slots, logits, absolute, weight, start, stop, grad):
    """Add weight · gradient of the sub-vectors' losses to grad [N·n]; the sum of the losses.

    The ratios of a frozen sub-vector are exactly one-hot, so that its gradient is exactly 0.
    """
    n = np.uint64(len(slots))
    ratios = np.zeros(len(slots) * BLOCK, dtype=np.float32)
    slopes = np.zeros(len(slots) * BLOCK, dtype=np.float32)
    into = np.zeros(len(slots) * BLOCK, dtype=np.float32)
    totals = np.empty(BLOCK, dtype=np.float32)
    losses = np.zeros(BLOCK, dtype=np.float32)
    for low in range(start, stop, BLOCK):
        rows = np.uint64(min(BLOCK, stop - low))
        load_block(slots, logits, low, rows, ratios)
        load_block(slots, grad, low, rows, into)
        softmax_block(slots, ratios, totals)
        for b in range(rows):
            mean = _ZERO
            for t in range(n):
                r = ratios[t * _BLOCK + b]
                if absolute:
                    losses[b] += _ONE - abs(_TWO * r - _ONE)
                    slope = _TWO * np.sign(_ONE - _TWO * r)
                else:
                    losses[b] += r * (_ONE - r)
                    slope = _ONE - _TWO * r
                mean += r * slope
                slopes[t * _BLOCK + b] = slope
            for t in range(n):
                into[t * _BLOCK + b] += weight * ratios[t * _BLOCK + b] * (slopes[t * _BLOCK + b] - mean)
        store_block(slots, into, low, rows, grad)
    return losses.sum()


@njit(**OPTIONS)
def _rmsprop_range(values, grad, squares, rate, smoothing, rest, eps, start, stop):
    for i in range(np.uint64(start), np.uint64(stop)):
        square = squares[i] * smoothing + rest * grad[i] * grad[i]
        squares[i] = square
        values[i] -= rate * grad[i] / (np.sqrt(square) + eps)


@njit(**OPTIONS)
def _measure_block(slots, logits, ratios, threshold, rows, places, winners, above, sums):
    """Of each sub-vector of a block: bin of the largest ratio, its position, whether it is above the threshold.

    sums [5, 256] flat grow by what is summed, but for the logarithm of the softmax's totals in the entropy.
    """
    n = np.uint64(len(slots))
    for b in range(rows):
        largest, top, winner, mean = ratios[b], logits[b], 0, ratios[b] * logits[b]
        absolute, quadratic = _ONE - abs(_TWO * largest - _ONE), largest * (_ONE - largest)
        for t in range(np.uint64(1), n):
            ratio, logit = ratios[t * _BLOCK + b], logits[t * _BLOCK + b]
            mean += ratio * logit
            absolute += _ONE - abs(_TWO * ratio - _ONE)
            quadratic += ratio * (_ONE - ratio)
            winner = np.int32(t) if ratio > largest else winner
            top = logit if ratio > largest else top
            largest = ratio if ratio > largest else largest
        passed = (largest > threshold) | (largest >= _ONE)
        places[b], winners[b], above[b] = np.int32(largest * np.float32(HISTOGRAM_BINS)), winner, passed
        sums[b] += top - mean
        sums[_BLOCK + b] += np.float32(winner != 0)
        sums[np.uint64(2) * _BLOCK + b] += np.float32(passed)
        sums[np.uint64(3) * _BLOCK + b] += absolute
        sums[np.uint64(4) * _BLOCK + b] += quadratic


@njit(**OPTIONS)
def _settle_range(slots, logits, threshold, freeze, start, stop, histogram, sums, winners):
    n = np.uint64(len(slots))
    values = np.zeros(len(slots) * BLOCK, dtype=np.float32)
    ratios = np.zeros(len(slots) * BLOCK, dtype=np.float32)
    totals, products = np.empty(BLOCK, dtype=np.float32), np.ones(BLOCK)
    places, best = np.zeros(BLOCK, dtype=np.int32), np.zeros(BLOCK, dtype=np.int32)
    above = np.zeros(BLOCK, dtype=np.bool_)
    lanes = np.zeros(SUMS * BLOCK, dtype=np.float32)
    for low in range(start, stop, BLOCK):
        rows, first = np.uint64(min(BLOCK, stop - low)), np.uint64(low)
        load_block(slots, logits, low, rows, values)
        ratios[:] = values
        softmax_block(slots, ratios, totals)
        _measure_block(slots, values, ratios, threshold, rows, places, best, above, lanes)
        for b in range(rows):
            products[b] *= totals[b]
            histogram[max(0, min(places[b], HISTOGRAM_BINS - 1))] += 1
            winners[first + b] = best[b]
        if (low - start) % (64 * BLOCK) == 0:  # entropy = log Σ exp(z - top) - Σ r (z - top); the sums lie in 1..16
            sums[0] += np.log(products).sum()
            products[:] = 1.0
        if freeze:
            for b in range(rows):
                if above[b]:
                    for t in range(n):
                        logits[(first + b) * n + t] = _ZERO if t == best[b] else _FROZEN
    sums[0] += np.log(products).sum()
    for i in range(SUMS):
        sums[i] += lanes[i * BLOCK : (i + 1) * BLOCK].sum()


@njit(**OPTIONS)
def _largest_range(slots, logits, start, stop, largest):
    ratios = np.zeros(len(slots) * BLOCK, dtype=np.float32)
    totals = np.empty(BLOCK, dtype=np.float32)
    for low in range(start, stop, BLOCK):
        rows, first = np.uint64(min(BLOCK, stop - low)), np.uint64(low)
        load_block(slots, logits, low, rows, ratios)
        softmax_block(slots, ratios, totals)
        for b in range(rows):
            largest[first + b] = _ONE / totals[b]  # the largest logit's exponential is 1


@njit(**OPTIONS)
def _mark_used(slots, candidates, winners, start, stop, used):
    n = np.uint64(len(slots))
    for i in range(np.uint64(start), np.uint64(stop)):
        used[np.uint64(candidates[i * n + np.uint64(winners[i])])] = True


def _in_chunks(function, count: int) -> list:
    """function(i, low, high) of every chunk of `count` sub-vectors; what each of them gave, in order."""
    size = chunk_size(count, least=CHUNK)
    found = [None] * -(-count // size)

    def work(i: int, low: int, high: int) -> None:
        found[i] = function(i, low, high)

    run_chunks(count, size, work)
    return found


def _add_loss(kind: str, logits: Tensor, weight: float, grad: Tensor) -> float:
    """Ratio loss of float32 [N, n], Eq. 9 or the quadratic one over sub-vectors not yet frozen; grad += weight · gradient."""
    (count, n), absolute = logits.shape, kind == "absolute"
    slots, z, into = (0,) * n, array(logits).reshape(-1), grad.numpy().reshape(-1)
    rows = count if absolute else sum(_in_chunks(lambda _, low, high: _count_open(slots, z, low, high), count))
    scale = np.float32(weight / max(rows, 1))
    values = _in_chunks(lambda _, low, high: _loss_range(slots, z, absolute, scale, low, high, into), count)
    return sum(values) / max(rows, 1)


def ratio_loss(kind: str, logits: Tensor) -> Tensor:
    return torch.tensor(_add_loss(kind, logits, 0.0, torch.zeros(logits.shape)), dtype=torch.float32)


def add_ratio_gradient(kind: str, logits: Tensor, grad: Tensor, weight: float) -> None:
    _add_loss(kind, logits, weight, grad)


def rmsprop_step(
    values: Tensor, grad: Tensor, squares: Tensor, rate: float, smoothing: float, eps: float, loss: Tensor
) -> None:
    if not math.isfinite(loss.item()):
        return
    z, g, v = (part.reshape(-1) for part in (values.numpy(), array(grad), squares.numpy()))
    numbers = tuple(np.float32(x) for x in (rate, smoothing, 1.0 - smoothing, eps))
    size = chunk_size(len(z), least=4 * CHUNK)
    run_chunks(len(z), size, lambda _, low, high: _rmsprop_range(z, g, v, *numbers, low, high))


def ratio_limit(logits: Tensor, rank: int) -> Tensor:
    count, n = logits.shape
    largest, slots, z = np.empty(count, dtype=np.float32), (0,) * n, array(logits).reshape(-1)
    _in_chunks(lambda _, low, high: _largest_range(slots, z, low, high, largest), count)
    return torch.from_numpy(largest).kthvalue(rank).values


def settle_ratios(logits: Tensor, candidates: Tensor, k: int, limit: float | Tensor, freeze: bool) -> Tensor:
    check_candidates(candidates, k)
    count, n = logits.shape
    chunks = -(-count // chunk_size(count, least=CHUNK))
    histogram, sums = np.zeros((chunks, HISTOGRAM_BINS), dtype=np.int64), np.zeros((chunks, SUMS))
    winners, used = np.zeros(count, dtype=np.uint8), np.zeros(k, dtype=np.bool_)
    slots, z, codes, threshold = (0,) * n, logits.numpy().reshape(-1), array(candidates).reshape(-1), np.float32(limit)

    if n == 1 and count:  # the only ratio is 1: nothing is to be looked for
        histogram[0, -1], sums[0, 2] = count, count
        if freeze:
            z[:] = 0.0

    def work(i: int, low: int, high: int) -> None:
        if n > 1:
            _settle_range(slots, z, threshold, freeze, low, high, histogram[i], sums[i], winners)
        _mark_used(slots, codes, winners, low, high, used)

    _in_chunks(work, count)
    means = sums.sum(axis=0) / max(count, 1)
    return torch.from_numpy(np.concatenate([means, [np.count_nonzero(used)], histogram.sum(axis=0)]))
