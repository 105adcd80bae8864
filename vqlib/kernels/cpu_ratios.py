"""Ratio loss, freezing and statistics of the logits on the CPU: one pass over [N, n] each, compiled by numba for each n."""

import numpy as np
from numba import njit

from vqlib.kernels.cpu_soft import OPTIONS, softmax_block
from vqlib.kernels.reference import FROZEN_LOGIT, HISTOGRAM_BINS
from vqlib.kernels.threads import BLOCK, chunk_size, run_chunks

_FROZEN = np.float32(FROZEN_LOGIT)
_SUMS = 5  # entropy, winners other than 0, frozen, absolute and quadratic ratio loss


@njit(**OPTIONS)
def _loss_range(slots, logits, absolute, start, stop, grad):
    """Gradient of one sub-vector's loss into grad [N, n]; the sum of losses and the number of sub-vectors not frozen."""
    ratios = np.zeros(len(slots) * BLOCK, dtype=np.float32)
    totals = np.empty(BLOCK, dtype=np.float32)
    loss, still_open = 0.0, 0
    for low in range(start, stop, BLOCK):
        high = min(low + BLOCK, stop)
        softmax_block(slots, logits, low, high, ratios, totals)
        for b in range(high - low):
            row, mean, frozen = np.float32(0.0), np.float32(0.0), False
            for t in range(len(slots)):
                r = ratios[t * BLOCK + b]
                if absolute:
                    row += np.float32(1.0) - abs(np.float32(2.0) * r - np.float32(1.0))
                    slope = np.float32(2.0) * np.sign(np.float32(1.0) - np.float32(2.0) * r)
                else:
                    row += r * (np.float32(1.0) - r)
                    slope = np.float32(1.0) - np.float32(2.0) * r
                frozen |= logits[low + b, t] <= _FROZEN
                mean += r * slope
                grad[low + b, t] = slope
            for t in range(len(slots)):
                slope = np.float32(0.0) if frozen else ratios[t * BLOCK + b] * (grad[low + b, t] - mean)
                grad[low + b, t] = slope
            loss += row
            still_open += not frozen
    return loss, still_open


@njit(**OPTIONS)
def _settle_range(slots, logits, threshold, freeze, start, stop, histogram, sums, winners):
    ratios = np.zeros(len(slots) * BLOCK, dtype=np.float32)
    totals = np.empty(BLOCK, dtype=np.float32)
    for low in range(start, stop, BLOCK):
        high = min(low + BLOCK, stop)
        softmax_block(slots, logits, low, high, ratios, totals)
        product = 1.0
        for b in range(high - low):
            largest, winner, mean = ratios[b], 0, np.float32(0.0)
            absolute, quadratic = np.float32(0.0), np.float32(0.0)
            for t in range(len(slots)):
                ratio = ratios[t * BLOCK + b]
                mean += ratio * logits[low + b, t]
                absolute += np.float32(1.0) - abs(np.float32(2.0) * ratio - np.float32(1.0))
                quadratic += ratio * (np.float32(1.0) - ratio)
                if ratio > largest:
                    largest, winner = ratio, t
            # entropy = log Σ exp(z - top) - Σ r (z - top); the sums lie in 1..16, so 64 of them fit into one logarithm
            sums[0] += logits[low + b, winner] - mean
            product *= totals[b]
            if b % 64 == 63:
                sums[0] += np.log(product)
                product = 1.0
            place = np.int64(largest * np.float32(HISTOGRAM_BINS)) if largest == largest else 0
            histogram[min(place, HISTOGRAM_BINS - 1)] += 1
            sums[1] += winner != 0
            above = largest > threshold or largest >= np.float32(1.0)
            sums[2] += above
            sums[3] += absolute
            sums[4] += quadratic
            winners[low + b] = winner
            if freeze and above:
                for t in range(len(slots)):
                    logits[low + b, t] = _FROZEN
                logits[low + b, winner] = np.float32(0.0)
        sums[0] += np.log(product)


def loss(logits: np.ndarray, absolute: bool) -> tuple[float, np.ndarray]:
    """Eq. 9, or the quadratic loss over sub-vectors not yet frozen: float32 [N, n] -> value, gradient [N, n]."""
    count, n = logits.shape
    size = chunk_size(count)
    grad = np.empty((count, n), dtype=np.float32)
    found: list[tuple[float, int]] = [(0.0, 0)] * -(-count // size)

    def work(i: int, low: int, high: int) -> None:
        found[i] = _loss_range((0,) * n, logits, absolute, low, high, grad)

    run_chunks(count, size, work)
    rows = count if absolute else max(sum(still_open for _, still_open in found), 1)
    grad *= np.float32(1.0 / rows)
    return sum(value for value, _ in found) / rows, grad


def settle(logits: np.ndarray, threshold: float, freeze: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Histogram int64 [20] of the largest ratios, sums float64 [5], winners uint8 [N]; `freeze` changes logits in place."""
    count, n = logits.shape
    size = chunk_size(count)
    chunks = -(-count // size)
    histogram = np.zeros((chunks, HISTOGRAM_BINS), dtype=np.int64)
    sums = np.zeros((chunks, _SUMS))
    winners = np.empty(count, dtype=np.uint8)

    def work(i: int, low: int, high: int) -> None:
        _settle_range((0,) * n, logits, np.float32(threshold), freeze, low, high, histogram[i], sums[i], winners)

    run_chunks(count, size, work)
    return histogram.sum(axis=0), sums.sum(axis=0), winners
