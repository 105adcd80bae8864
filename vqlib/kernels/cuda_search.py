"""The nearest codewords on CUDA, and the sums of a k-means pass over them.

No [N, k] scores exist outside the registers. Both repeat bit for bit: sums are added up as integers, in any order.
"""

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
_FIXED_BITS = 62  # of a sum in int64, one bit short of its sign


@triton.jit
def _nearest_kernel(
    x, table, bias, found, count, k, n, AFTER: tl.constexpr, LENGTH: tl.constexpr, POINTS: tl.constexpr
):
    """One sweep over the codewords for each of the n places: table [d, k], bias [k] -> found int64 [N, n].

    A column of the tile keeps the best of every 32nd codeword; a strict comparison keeps the first of equals there, the
    lowest index among the columns' winners does at the end. From the second sweep on (AFTER) only codewords that come
    after the place before take part: lower score, or equal score and higher index.
    """
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
def _sums_kernel(
    x, codes, scales, partial, count, k, tables, LENGTH: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr
):
    """Add points, the squares of their norms and their number to one of the sums in `partial` int64 [tables, k, d + 2].

    scales float64 [2]: units of a coordinate and of a squared norm, powers of two.
    """
    program = tl.program_id(0).to(tl.int64)
    rows = program * ROWS + tl.arange(0, ROWS)
    inside = rows < count
    columns = tl.arange(0, WIDTH)[None, :]
    within = inside[:, None] & (columns < LENGTH)
    points = tl.load(x + rows[:, None] * LENGTH + columns, mask=within, other=0.0).to(tl.float64)
    squares = tl.sum(points * points, axis=1)
    code = tl.load(codes + rows, mask=inside, other=0)
    place = partial + (program % tables * k + code) * (LENGTH + 2)
    units = tl.floor(points * tl.load(scales) + 0.5).to(tl.int64)
    tl.atomic_add(place[:, None] + columns, units, mask=within, sem="relaxed")
    tl.atomic_add(
        place + LENGTH, tl.floor(squares * tl.load(scales + 1) + 0.5).to(tl.int64), mask=inside, sem="relaxed"
    )
    tl.atomic_add(place + LENGTH + 1, tl.full([ROWS], 1, tl.int64), mask=inside, sem="relaxed")


def assign(x: Tensor, codewords: Tensor) -> Tensor:
    """Index of the nearest codeword of every point; the first of equals. float32 [N, d], [k, d] -> int64 [N]."""
    return nearest(x, codewords, 1)[:, 0]


def search_sizes(d: int, n: int) -> dict[str, int | bool]:
    """What the search is compiled for."""
    return {"AFTER": n > 1, "LENGTH": d, "POINTS": min(_POINTS, _COORDINATES // triton.next_power_of_2(d))}


def nearest(x: Tensor, codewords: Tensor, n: int) -> Tensor:
    """Indices of the n nearest codewords, nearest first (Eq. 5), by n sweeps: float32 [N, d], [k, d] -> int64 [N, n].

    Scores are x·c − ½‖c‖² as in `reference.scores`, added up coordinate by coordinate: no tensor core, no TF32.
    """
    (count, d), k = x.shape, len(codewords)
    bias = -0.5 * codewords.square().sum(dim=1)  # [k]
    table = codewords.t().contiguous()  # [k, d] -> [d, k]
    sizes = search_sizes(d, n)
    found = torch.empty(count, n, dtype=torch.int64, device=x.device)
    programs = triton.cdiv(count, sizes["POINTS"])
    launch(_nearest_kernel, programs, x.contiguous(), table, bias, found, count, k, n, **sizes)
    return found


def sums_sizes(d: int) -> dict[str, int]:
    """What the sums are compiled for."""
    width = triton.next_power_of_2(d)
    return {"LENGTH": d, "WIDTH": width, "ROWS": _ADDED // width}


def cluster_sums(x: Tensor, codewords: Tensor) -> ClusterSums:
    """A k-means pass over a whole layer: float32 [N, d], [k, d] -> float64 [k, d], int64 [k], float64 [k].

    Coordinates are added up as multiples of 2⁻ᵖ, with p so large that N of the largest still fit into int64: for 2²⁴ points
    that rounds each to 2⁻³⁸ of the largest, where float32 itself rounds to 2⁻²⁴ of every value.
    """
    (count, d), k, sizes = x.shape, len(codewords), sums_sizes(x.shape[1])
    codes = assign(x, codewords)
    exponent = torch.frexp(x.abs().amax() if count else x.new_zeros(())).exponent  # |x| < 2^exponent
    free = _FIXED_BITS - max(1, count).bit_length()
    powers = torch.stack([free - exponent, free - d.bit_length() - 2 * exponent])
    scales = torch.ldexp(torch.ones(2, dtype=torch.float64, device=x.device), powers)
    programs = triton.cdiv(count, sizes["ROWS"])
    tables = max(1, min(programs, _PARTIAL_BYTES // (8 * k * (d + 2))))
    partial = torch.zeros(tables, k, d + 2, dtype=torch.int64, device=x.device)
    launch(_sums_kernel, programs, x.contiguous(), codes, scales, partial, count, k, tables, **sizes)
    total = partial.sum(dim=0)  # [tables, k, d + 2] -> [k, d + 2]
    return ClusterSums(total[:, :d] / scales[0], total[:, d + 1], total[:, d] / scales[1])
