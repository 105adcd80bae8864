"""Assignment and k-means sums on the CPU, compiled by numba once for each sub-vector length d.

A block of 256 points lies transposed, [d, 256], in the first-level cache, so one vector register holds one coordinate
of 8 or 16 points and the search runs in every lane at once: score x·c − ½‖c‖², compare, select. A strict comparison
keeps the first of equal codewords. Four codewords are unrolled per sweep over the block (more spill out of the
registers); the codebook is padded to a multiple of four with codewords whose score is −inf. `contract` (fused
multiply-add) is the only floating-point freedom given to the compiler.

Every function learns d while it is compiled, from the length of the tuple `unit`, and so unrolls its loops over
coordinates. Buffers of a block are flat, row * 256 + b: with constant distances between rows the compiler sees that
they do not overlap.
"""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from vqlib.kernels.reference import ClusterSums, check_candidates, layer_by_layer
from vqlib.kernels.threads import BLOCK, array, chunk_size, run_chunks
from vqlib.kernels.vectors import OPTIONS

MAX_LENGTH = 16  # beyond this the unrolled inner loop no longer fits in registers and a matrix product wins
_UNROLL = 4


@njit(**OPTIONS)
def _load(unit, x, start, stop, points):
    """Transpose one block of points: x [start:stop, d] -> points [d, 256]."""
    for b in range(stop - start):
        for j in range(len(unit)):
            points[j * BLOCK + b] = x[start + b, j]


@njit(**OPTIONS)
def _search(unit, points, table, bias, best, index):
    """Highest score of each point of a block and the codeword it belongs to: -> best [256], index [256]."""
    for b in range(BLOCK):
        best[b] = -np.inf
        index[b] = 0
    for first in range(0, table.shape[0], _UNROLL):
        for b in range(BLOCK):
            best_score = best[b]
            best_index = index[b]
            for u in range(_UNROLL):
                score = bias[first + u]
                for j in range(len(unit)):
                    score += points[j * BLOCK + b] * table[first + u, j]
                if score > best_score:
                    best_score = score
                    best_index = np.int32(first + u)
            best[b] = best_score
            index[b] = best_index


@njit(**OPTIONS)
def _search_after(unit, points, table, bias, last, last_index, best, index):
    """The same among codewords that come after a given one: lower score, or equal score and higher index."""
    for b in range(BLOCK):
        best[b] = -np.inf
        index[b] = 0
    for first in range(0, table.shape[0], _UNROLL):
        for b in range(BLOCK):
            best_score = best[b]
            best_index = index[b]
            for u in range(_UNROLL):
                score = bias[first + u]
                for j in range(len(unit)):
                    score += points[j * BLOCK + b] * table[first + u, j]
                later = (score < last[b]) | ((score == last[b]) & (np.int32(first + u) > last_index[b]))
                if later & (score > best_score):
                    best_score = score
                    best_index = np.int32(first + u)
            best[b] = best_score
            index[b] = best_index


@njit(**OPTIONS)
def _assign_range(unit, x, start, stop, table, bias, codes):
    points = np.zeros(len(unit) * BLOCK, dtype=np.float32)
    best = np.empty(BLOCK, dtype=np.float32)
    index = np.empty(BLOCK, dtype=np.int32)
    for low in range(start, stop, BLOCK):
        high = min(low + BLOCK, stop)
        _load(unit, x, low, high, points)
        _search(unit, points, table, bias, best, index)
        for b in range(high - low):
            codes[low + b] = index[b]


@njit(**OPTIONS)
def _assign_near_range(unit, x, start, stop, table, bias, guess, near, codes):
    """The same, without a search for points whose squared distance from their guess is below `near` of it: [k]."""
    points = np.zeros(len(unit) * BLOCK, dtype=np.float32)
    best = np.empty(BLOCK, dtype=np.float32)
    index = np.empty(BLOCK, dtype=np.int32)
    places = np.empty(BLOCK, dtype=np.int64)
    waiting = 0
    for i in range(start, stop):
        code = guess[i]
        square = np.float32(0.0)
        for j in range(len(unit)):
            step = x[i, j] - table[code, j]
            square += step * step
        codes[i] = code
        if not square < near[code]:  # also where something is not a number
            for j in range(len(unit)):
                points[j * BLOCK + waiting] = x[i, j]
            places[waiting] = i
            waiting += 1
        if waiting == BLOCK or (waiting and i == stop - 1):
            _search(unit, points, table, bias, best, index)
            for b in range(waiting):
                codes[places[b]] = index[b]
            waiting = 0


@njit(**OPTIONS)
def _sums_range(unit, x, start, stop, table, bias, sums, counts, squares):
    points = np.zeros(len(unit) * BLOCK, dtype=np.float32)
    best = np.empty(BLOCK, dtype=np.float32)
    index = np.empty(BLOCK, dtype=np.int32)
    for low in range(start, stop, BLOCK):
        high = min(low + BLOCK, stop)
        _load(unit, x, low, high, points)
        _search(unit, points, table, bias, best, index)
        for b in range(high - low):
            code = index[b]
            square = 0.0
            for j in range(len(unit)):
                value = np.float64(points[j * BLOCK + b])
                sums[code, j] += value
                square += value * value
            counts[code] += 1
            squares[code] += square


@njit(**OPTIONS)
def _nearest_range(unit, x, start, stop, table, bias, found):
    points = np.zeros(len(unit) * BLOCK, dtype=np.float32)
    scores = np.empty((2, BLOCK), dtype=np.float32)  # of the candidate before, of this one
    index = np.empty((2, BLOCK), dtype=np.int32)
    for low in range(start, stop, BLOCK):
        high = min(low + BLOCK, stop)
        _load(unit, x, low, high, points)
        scores[1] = np.inf
        index[1] = -1
        for t in range(found.shape[1]):
            scores[0] = scores[1]
            index[0] = index[1]
            _search_after(unit, points, table, bias, scores[0], index[0], scores[1], index[1])
            for b in range(high - low):
                found[low + b, t] = index[1, b]


def _prepared(x: Tensor, codewords: Tensor) -> tuple[tuple, np.ndarray, np.ndarray, np.ndarray]:
    """`unit`, the points, codewords padded to a multiple of four [k', d], and −½‖c‖² of each [k']."""
    codewords = array(codewords)
    k, d = codewords.shape
    rows = -(-k // _UNROLL) * _UNROLL
    table = np.zeros((rows, d), dtype=np.float32)
    table[:k] = codewords
    bias = np.full(rows, -np.inf, dtype=np.float32)
    bias[:k] = -0.5 * np.square(codewords.astype(np.float64)).sum(axis=1)
    return (0,) * d, array(x), table, bias


@layer_by_layer
def assign(x: Tensor, codewords: Tensor, guess: Tensor | None = None) -> Tensor:
    """Index of the nearest codeword of every point: float32 [N, d], [k, d] -> int64 [N]."""
    unit, points, table, bias = _prepared(x, codewords)
    found = np.empty(len(x), dtype=np.int64)
    if guess is None or len(x) < 4 * len(codewords):  # it costs two searches for every codeword
        function, more = _assign_range, (found,)
    else:
        check_candidates(guess[:, None], len(codewords))  # compiled loops would read past the end
        function, more = _assign_near_range, (array(guess), _near(codewords), found)
    run_chunks(len(x), chunk_size(len(x)), lambda _, low, high: function(unit, points, low, high, table, bias, *more))
    return torch.from_numpy(found)


def _near(codewords: Tensor) -> np.ndarray:
    """Squared distances from each codeword below which nothing else can be found for a point: [k, d] -> float32 [k].

    Half the way s to the nearest other codeword (Elkan 2003, lemma 1), less what rounding may move: scores x·c − ½‖c‖² are off by
    at most 3e-7 (d + 1) max‖c‖², and those of a point at a distance r from its codeword are 2s (s − r) apart or more.
    """
    wide, k = codewords.double(), len(codewords)
    if k == 1:
        return np.full(1, np.inf, dtype=np.float32)
    two = nearest(codewords, codewords, 2)  # itself and the other or, of equal ones, the first two
    other = torch.where(two[:, 0] == torch.arange(k), two[:, 1], two[:, 0])
    half = (wide - wide[other]).norm(dim=1) / 2
    rounding = 3e-7 * (codewords.shape[1] + 1) * wide.square().sum(dim=1).max()
    radius = (half * (1 - 1e-4) - 2 * rounding / half).clamp_min(0)
    return array(radius.square().float())


def nearest(x: Tensor, codewords: Tensor, n: int) -> Tensor:
    """Indices of the n nearest codewords, nearest first: float32 [N, d], [k, d] -> int64 [N, n]."""
    unit, points, table, bias = _prepared(x, codewords)
    found = np.empty((len(x), n), dtype=np.int64)
    run_chunks(
        len(x), chunk_size(len(x)), lambda _, low, high: _nearest_range(unit, points, low, high, table, bias, found)
    )
    return torch.from_numpy(found)


@layer_by_layer
def cluster_sums(x: Tensor, codewords: Tensor) -> ClusterSums:
    """Sums, counts and squared norms of each codeword's points: -> float64 [k, d], int64 [k], float64 [k]."""
    unit, points, table, bias = _prepared(x, codewords)
    (k, d), rows = codewords.shape, len(table)
    size = chunk_size(len(x), partial_bytes=8 * rows * (d + 2))
    chunks = -(-len(x) // size)
    sums = np.zeros((chunks, rows, d))
    counts = np.zeros((chunks, rows), dtype=np.int64)
    squares = np.zeros((chunks, rows))

    def work(chunk: int, low: int, high: int) -> None:
        _sums_range(unit, points, low, high, table, bias, sums[chunk], counts[chunk], squares[chunk])

    run_chunks(len(x), size, work)
    return ClusterSums(*(torch.from_numpy(part.sum(axis=0)[:k]) for part in (sums, counts, squares)))
