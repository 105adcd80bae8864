"""The nearest codewords on CUDA, and the sums of a k-means pass over them.

No [N, k] scores exist outside the registers. Both repeat bit for bit: sums are added up as integers, in any order. The second
axis of a grid is the layer, so that one launch serves all layers of a shape.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqlib.kernels.cuda_launch import launch
from vqlib.kernels.reference import ClusterSums

MAX_LENGTH = 16  # a thread of the search keeps all coordinates of its points in registers
_CODES = tl.constexpr(32)  # codewords of a program's score tile
_POINTS = 32  # its points, 8 a thread
_COORDINATES = 256  # at most, of those points: a thread keeps 64 of them
_ADDED = 1024  # coordinates that a program adds up
_PARTIAL_BYTES = 1 << 24  # of all programs' sums: they stay in the second-level cache
_TABLES = 64  # of those sums that a program adds up at a time
_FIXED_BITS = 62  # of a sum in int64, one bit short of its sign


@triton.jit
def _nearest_kernel(
    x, table, bias, found, count, k, n, AFTER: tl.constexpr, LENGTH: tl.constexpr, POINTS: tl.constexpr
):
    """One sweep over the codewords for each of the n places: table [L, d, k], bias [L, k] -> found int64 [L, N, n].

    A column of the tile keeps the best of every 32nd codeword; a strict comparison keeps the first of equals there, the
    lowest index among the columns' winners does at the end. From the second sweep on (AFTER) only codewords that come
    after the place before take part: lower score, or equal score and higher index.
    """
    layer = tl.program_id(1).to(tl.int64)
    x, found = x + layer * count * LENGTH, found + layer * count * n
    table, bias = table + layer * LENGTH * k, bias + layer * k
    rows = tl.program_id(0).to(tl.int64) * POINTS + tl.arange(0, POINTS)
    inside = rows < count
    last = tl.full([POINTS], float("inf"), tl.float32)
    last_index = tl.full([POINTS], -1, tl.int32)
    for place in range(n):
        best = tl.full([POINTS, _CODES], float("-inf"), tl.float32)
        index = tl.zeros([POINTS, _CODES], tl.int32)
        for first in range(0, k, _CODES):
            codes = first + tl.arange(0, _CODES)
            score = tl.load(bias + codes, mask=codes < k, other=float("-inf"))[None, :]
            for j in tl.static_range(LENGTH):
                point = tl.load(x + rows * LENGTH + j, mask=inside, other=0.0)
                codeword = tl.load(table + j * k + codes, mask=codes < k, other=0.0)
                score += point[:, None] * codeword[None, :]  # -> [POINTS, 32]
            better = score > best
            if AFTER:
                tied = (score == last[:, None]) & (codes[None, :] > last_index[:, None])
                better = better & ((score < last[:, None]) | tied)
            best = tl.where(better, score, best)
            index = tl.where(better, codes[None, :], index)
        last = tl.max(best, axis=1)  # [POINTS, 32] -> [POINTS]
        last_index = tl.min(tl.where(best == last[:, None], index, 2147483647), axis=1)
        tl.store(found + rows * n + place, last_index.to(tl.int64), mask=inside)


@triton.jit
def _power_of_two(exponent):
    """2^exponent as float64, exactly; exponents of the normal range."""
    return ((exponent.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _exponent(largest):
    """e with |largest| < 2^e."""
    return (tl.load(largest).to(tl.int32, bitcast=True) >> 23) - 126


@triton.jit
def _sums_kernel(
    x, codes, largest, partial, count, k, tables, free, free_square,
    LENGTH: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Add points, the squares of their norms and their number to one of the sums in `partial` int64 [L, tables, k, d + 2].

    A unit of a coordinate is 2^(e − free), of a squared norm 2^(2e − free_square), with all coordinates of the layer below 2^e.
    """
    program, layer = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    x, codes, largest = x + layer * count * LENGTH, codes + layer * count, largest + layer
    partial += layer * tables * k * (LENGTH + 2)
    rows = program * ROWS + tl.arange(0, ROWS)
    inside = rows < count
    columns = tl.arange(0, WIDTH)[None, :]
    within = inside[:, None] & (columns < LENGTH)
    points = tl.load(x + rows[:, None] * LENGTH + columns, mask=within, other=0.0).to(tl.float64)
    squares = tl.sum(points * points, axis=1)
    code = tl.load(codes + rows, mask=inside, other=0)
    place = partial + (program % tables * k + code) * (LENGTH + 2)
    exponent = _exponent(largest)
    units = tl.floor(points * _power_of_two(free - exponent) + 0.5).to(tl.int64)
    tl.atomic_add(place[:, None] + columns, units, mask=within, sem="relaxed")
    square_units = tl.floor(squares * _power_of_two(free_square - 2 * exponent) + 0.5).to(tl.int64)
    tl.atomic_add(place + LENGTH, square_units, mask=inside, sem="relaxed")
    tl.atomic_add(place + LENGTH + 1, tl.full([ROWS], 1, tl.int64), mask=inside, sem="relaxed")


@triton.jit
def _total_kernel(
    partial, largest, sums, counts, k, tables, free, free_square,
    LENGTH: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A codeword's sums over all tables: float64 [L, k, d + 1], coordinates and squared norms; int64 [L, k]."""
    code, layer = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    partial, largest = partial + layer * tables * k * (LENGTH + 2), largest + layer
    sums, counts = sums + layer * k * (LENGTH + 1), counts + layer * k
    columns, lines = tl.arange(0, WIDTH), tl.arange(0, ROWS)[:, None]
    total = tl.zeros([WIDTH], tl.int64)
    for first in range(0, tables, ROWS):
        within = (first + lines < tables) & (columns[None, :] < LENGTH + 2)
        place = partial + ((first + lines).to(tl.int64) * k + code) * (LENGTH + 2) + columns[None, :]
        total += tl.sum(tl.load(place, mask=within, other=0), axis=0)
    exponent = _exponent(largest)
    unit = tl.where(columns < LENGTH, exponent - free, 2 * exponent - free_square)
    tl.store(sums + code * (LENGTH + 1) + columns, total.to(tl.float64) * _power_of_two(unit), mask=columns <= LENGTH)
    tl.store(counts + code + columns * 0, total, mask=columns == LENGTH + 1)


def assign(x: Tensor, codewords: Tensor, guess: Tensor | None = None) -> Tensor:
    """Index of the nearest codeword of every point; the first of equals. float32 [N, d], [k, d] -> int64 [N], or with [L, …]s.

    All are searched, whatever the guess: a warp waits for the slowest of its points.
    """
    return nearest(x, codewords, 1)[..., 0]


def search_sizes(d: int, n: int) -> dict[str, int | bool]:
    """What the search is compiled for."""
    return {"AFTER": n > 1, "LENGTH": d, "POINTS": min(_POINTS, _COORDINATES // triton.next_power_of_2(d))}


def nearest(x: Tensor, codewords: Tensor, n: int) -> Tensor:
    """Indices of the n nearest codewords, nearest first (Eq. 5), by n sweeps: float32 [N, d], [k, d] -> int64 [N, n], or with [L, …]s.

    Scores are x·c − ½‖c‖² as in `reference.scores`, added up coordinate by coordinate: no tensor core, no TF32.
    """
    (count, d), k, axes = x.shape[-2:], codewords.shape[-2], x.shape[:-2]
    bias = -0.5 * codewords.square().sum(dim=-1)  # [k]
    table = codewords.mT.contiguous()  # [k, d] -> [d, k]
    sizes = search_sizes(d, n)
    found = torch.empty(*axes, count, n, dtype=torch.int64, device=x.device)
    programs = triton.cdiv(count, sizes["POINTS"])
    launch(_nearest_kernel, programs, x.contiguous(), table, bias, found, count, k, n, layers=math.prod(axes), **sizes)
    return found


def sums_sizes(d: int) -> dict[str, int]:
    """What the sums are compiled for."""
    width = triton.next_power_of_2(d)
    return {"LENGTH": d, "WIDTH": width, "ROWS": _ADDED // width}


def cluster_sums(x: Tensor, codewords: Tensor) -> ClusterSums:
    """A k-means pass over a whole layer: float32 [N, d], [k, d] -> float64 [k, d], int64 [k], float64 [k], or with [L, …]s.

    Coordinates are added up as multiples of 2⁻ᵖ, with p so large that N of the largest still fit into int64: for 2²⁴ points
    that rounds each to 2⁻³⁸ of the largest, where float32 itself rounds to 2⁻²⁴ of every value.
    """
    (count, d), k, axes, sizes = x.shape[-2:], codewords.shape[-2], x.shape[:-2], sums_sizes(x.shape[-1])
    layers = math.prod(axes)
    codes, x = assign(x, codewords), x.contiguous()
    largest = torch.linalg.vector_norm(x, float("inf"), dim=(-2, -1)) if count else x.new_zeros(axes)
    free = _FIXED_BITS - max(1, count).bit_length()
    programs = triton.cdiv(count, sizes["ROWS"])
    tables = max(1, min(programs, _PARTIAL_BYTES // (8 * layers * k * (d + 2))))
    partial = torch.zeros(*axes, tables, k, d + 2, dtype=torch.int64, device=x.device)
    bits = free, free - d.bit_length()
    launch(_sums_kernel, programs, x, codes, largest, partial, count, k, tables, *bits, layers=layers, **sizes)
    sums = torch.empty(*axes, k, d + 1, dtype=torch.float64, device=x.device)
    counts = torch.empty(*axes, k, dtype=torch.int64, device=x.device)
    width = triton.next_power_of_2(d + 2)
    totals = {"LENGTH": d, "WIDTH": width, "ROWS": _TABLES}
    launch(_total_kernel, k, partial, largest, sums, counts, k, tables, *bits, layers=layers, **totals)
    return ClusterSums(sums[..., :d], counts, sums[..., d])
