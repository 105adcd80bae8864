"""Ratio gradient, RMSprop, freezing and statistics of the logits on CUDA: one pass over [N, n] each, nobody waits.

Numbers that decide something further on, the limit of freezing and whether a loss was finite, stay on the device.
Everything here repeats bit for bit: sums are kept a program each, counts are integers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqlib.kernels import reference
from vqlib.kernels.cuda_launch import launch
from vqlib.kernels.cuda_soft import ratios_of
from vqlib.kernels.reference import FROZEN_LOGIT, HISTOGRAM_BINS, SUMS

_TILE = 2048  # sub-vectors of a program, times n
_ELEMENTS = 2048  # of a program of RMSprop
_FROZEN = tl.constexpr(FROZEN_LOGIT)
_BINS = tl.constexpr(HISTOGRAM_BINS)
_SUMS = tl.constexpr(SUMS)
_LEAST = tl.constexpr(
    0x3D800000
)  # 1/16 as float32, no largest ratio of 16 is below; 1 is 2²⁵ above it in the order of floats
_DIGITS = tl.constexpr(512)  # a rank is found 9 bits at a time, in three passes
_PASSES = 3


@triton.jit
def _gradient_kernel(
    logits, grad, open_rows, weight, count,
    COUNT: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, ABSOLUTE: tl.constexpr,
):  # fmt: skip
    """grad += weight / rows · r (s − Σ r s), with s the slope of the loss in r; a frozen sub-vector's is exactly 0."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside, slots = rows < count, tl.arange(0, SLOTS)[None, :]
    ratios = ratios_of(logits, rows, inside, COUNT, SLOTS, True)
    if ABSOLUTE:
        slopes = tl.where(ratios < 0.5, 2.0, tl.where(ratios > 0.5, -2.0, 0.0))
        scale = weight
    else:
        slopes = 1.0 - 2.0 * ratios
        scale = weight / tl.load(open_rows)
    mean = tl.sum(ratios * slopes, axis=1)[:, None]
    place, within = grad + rows[:, None] * COUNT + slots, inside[:, None] & (slots < COUNT)
    tl.store(place, tl.load(place, mask=within) + scale * ratios * (slopes - mean), mask=within)


@triton.jit
def _rmsprop_kernel(values, grad, squares, loss, count, rate, smoothing, rest, eps, ELEMENTS: tl.constexpr):
    """v ← αv + (1 − α)g², x ← x − rate·g / (√v + eps), where the loss is finite."""
    place = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    finite = tl.abs(tl.load(loss + tl.zeros([ELEMENTS], tl.int32))) < float("inf")
    inside = (place < count) & finite
    slope = tl.load(grad + place, mask=inside, other=0.0)
    square = tl.load(squares + place, mask=inside, other=0.0) * smoothing + rest * slope * slope
    tl.store(squares + place, square, mask=inside)
    value = tl.load(values + place, mask=inside, other=0.0)
    tl.store(values + place, value - rate * slope / (tl.sqrt(square) + eps), mask=inside)


@triton.jit
def _digit(counts, rank, DIGITS: tl.constexpr):
    """The digit that holds the element of this rank, and its rank among those: counts [DIGITS]."""
    digits = tl.arange(0, DIGITS)
    found = tl.load(counts + digits)
    digit = tl.sum((tl.cumsum(found, axis=0) < rank).to(tl.int32), axis=0)
    return digit, rank - tl.sum(tl.where(digits < digit, found, 0), axis=0)


@triton.jit
def _rank_kernel(
    logits, counts, count, rank, PASS: tl.constexpr, COUNT: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr
):
    """Count the digits of one pass among the largest ratios that agree with the digits found before: counts int32 [3, 512]."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < count
    largest = tl.max(ratios_of(logits, rows, inside, COUNT, SLOTS, True), axis=1)
    key = largest.to(tl.int32, bitcast=True) - _LEAST  # floats above 0 are in the order of their bits
    if PASS == 0:
        digit = key >> 17
    else:
        first, rank = _digit(counts, rank, _DIGITS)
        inside = inside & (key >> 17 == first)
        if PASS == 1:
            digit = (key >> 8) & 511
        else:
            second, rank = _digit(counts + _DIGITS, rank, _DIGITS)
            inside = inside & (((key >> 8) & 511) == second)
            digit = key & 255
    digit = tl.minimum(tl.maximum(digit, 0), _DIGITS - 1)
    found = tl.histogram(tl.where(inside, digit, _DIGITS), 2 * _DIGITS)
    places = tl.arange(0, 2 * _DIGITS)
    tl.atomic_add(counts + PASS * _DIGITS + places, found, mask=(places < _DIGITS) & (found > 0), sem="relaxed")


@triton.jit
def _limit_kernel(counts, limit, rank):
    """The ratio of the three digits: counts int32 [3, 512] -> float32 []."""
    first, rank = _digit(counts, rank, _DIGITS)
    second, rank = _digit(counts + _DIGITS, rank, _DIGITS)
    third, rank = _digit(counts + 2 * _DIGITS, rank, _DIGITS)
    key = (first << 17) + (second << 8) + third + _LEAST
    tl.store(limit, key.to(tl.float32, bitcast=True))


@triton.jit
def _settle_kernel(
    logits, candidates, limit, partial, counts, count, k,
    COUNT: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, FREEZE: tl.constexpr, LIMIT_IS_HERE: tl.constexpr,
):  # fmt: skip
    """Sums of a program's sub-vectors into partial [programs, 8]; histogram and codewords used into counts int32 [20 + k]."""
    program = tl.program_id(0).to(tl.int64)
    rows = program * ROWS + tl.arange(0, ROWS)
    inside, slots = rows < count, tl.arange(0, SLOTS)[None, :]
    within = inside[:, None] & (slots < COUNT)
    place = logits + rows[:, None] * COUNT + slots
    z = tl.load(place, mask=within, other=0.0)
    z = tl.where(slots < COUNT, z, float("-inf"))
    ratios = ratios_of(logits, rows, inside, COUNT, SLOTS, True)
    largest, winner = tl.max(ratios, axis=1, return_indices=True, return_indices_tie_break_left=True)
    top = tl.max(z, axis=1)[:, None]
    spread = tl.where(slots < COUNT, ratios * (z - top), 0.0)
    entropy = tl.log(tl.sum(tl.exp(z - top), axis=1)) - tl.sum(spread, axis=1)
    above = largest >= 1.0
    if LIMIT_IS_HERE:
        above = above | (largest > limit)
    else:
        above = above | (largest > tl.load(limit))
    absolute = tl.sum(tl.where(slots < COUNT, 1.0 - tl.abs(2.0 * ratios - 1.0), 0.0), axis=1)
    quadratic = tl.sum(ratios * (1.0 - ratios), axis=1)
    sums = partial + program * 8
    tl.store(sums, tl.sum(tl.where(inside, entropy, 0.0), axis=0))
    tl.store(sums + 1, tl.sum((inside & (winner != 0)).to(tl.float32), axis=0))
    tl.store(sums + 2, tl.sum((inside & above).to(tl.float32), axis=0))
    tl.store(sums + 3, tl.sum(tl.where(inside, absolute, 0.0), axis=0))
    tl.store(sums + 4, tl.sum(tl.where(inside, quadratic, 0.0), axis=0))
    bins = tl.minimum(tl.maximum((largest * _BINS).to(tl.int32), 0), _BINS - 1)
    found = tl.histogram(tl.where(inside, bins, _BINS), 32)
    places = tl.arange(0, 32)
    tl.atomic_add(counts + places, found, mask=(places < _BINS) & (found > 0), sem="relaxed")
    code = tl.load(candidates + rows * COUNT + winner, mask=inside, other=0).to(tl.int64)
    tl.store(counts + _BINS + code, tl.full([ROWS], 1, tl.int32), mask=inside & (code >= 0) & (code < k))
    if FREEZE:
        frozen = tl.where(slots == winner[:, None], 0.0, _FROZEN)
        tl.store(place, tl.broadcast_to(frozen, [ROWS, SLOTS]), mask=within & above[:, None])


@triton.jit
def _row_kernel(partial, counts, row, programs, count, k, BLOCK: tl.constexpr):
    """A row of `RatioStatistics`, float64 [26], from what the programs left."""
    columns, places = tl.arange(0, 8)[None, :], tl.arange(0, BLOCK)
    sums = tl.zeros([8], tl.float64)
    for first in range(0, programs, BLOCK):
        lines = (first + places)[:, None]
        within = (lines < programs) & (columns < _SUMS)
        sums += tl.sum(tl.load(partial + lines * 8 + columns, mask=within, other=0.0).to(tl.float64), axis=0)
    tl.store(row + tl.arange(0, 8), sums / count, mask=tl.arange(0, 8) < _SUMS)
    used = tl.zeros([BLOCK], tl.int32)
    for first in range(0, k, BLOCK):
        used += tl.load(counts + _BINS + first + places, mask=first + places < k, other=0)
    tl.store(row + _SUMS, tl.sum(used, axis=0).to(tl.float64))
    bins = tl.arange(0, 32)
    tl.store(row + _SUMS + 1 + bins, tl.load(counts + bins, mask=bins < _BINS).to(tl.float64), mask=bins < _BINS)


def ratio_sizes(n: int) -> dict[str, int]:
    """What the kernels over ratios are compiled for."""
    slots = triton.next_power_of_2(n)
    return {"COUNT": n, "SLOTS": slots, "ROWS": _TILE // slots}


def add_ratio_gradient(kind: str, logits: Tensor, grad: Tensor, weight: float) -> None:
    """grad += weight · dL_r/dz, in place; both [N, n]."""
    count, sizes = len(logits), ratio_sizes(logits.shape[1])
    programs, absolute = triton.cdiv(count, sizes["ROWS"]), kind == "absolute"
    open_rows = None if absolute else reference.open_rows(logits).sum().clamp_min(1)
    weight = weight / max(count, 1) if absolute else weight
    launch(_gradient_kernel, programs, logits.contiguous(), grad, open_rows, weight, count, **sizes, ABSOLUTE=absolute)


def rmsprop_step(
    values: Tensor, grad: Tensor, squares: Tensor, rate: float, smoothing: float, eps: float, loss: Tensor
) -> None:
    """One step in place, none where the loss is not finite."""
    count = values.numel()
    numbers = count, rate, smoothing, 1.0 - smoothing, eps
    programs = triton.cdiv(count, _ELEMENTS)
    launch(_rmsprop_kernel, programs, values, grad.contiguous(), squares, loss, *numbers, ELEMENTS=_ELEMENTS)


def ratio_limit(logits: Tensor, rank: int) -> Tensor:
    """The `rank`-th smallest of the largest ratios, exactly, by three passes that count 9 bits each: [N, n] -> float32 []."""
    count, sizes = len(logits), ratio_sizes(logits.shape[1])
    counts = torch.zeros(_PASSES, _DIGITS.value, dtype=torch.int32, device=logits.device)
    limit, logits, programs = logits.new_empty(()), logits.contiguous(), triton.cdiv(count, sizes["ROWS"])
    for number in range(_PASSES):
        launch(_rank_kernel, programs, logits, counts, count, rank, PASS=number, **sizes)
    launch(_limit_kernel, 1, counts, limit, rank)
    return limit


def settle_ratios(logits: Tensor, candidates: Tensor, k: int, limit: float | Tensor, freeze: bool) -> Tensor:
    """A row of `RatioStatistics`, float64 [26]; with `freeze`, rows of logits [N, n] above the limit become one-hot in place."""
    count, sizes = len(logits), ratio_sizes(logits.shape[1])
    programs = triton.cdiv(count, sizes["ROWS"])
    partial = logits.new_empty(programs, 8)
    counts = torch.zeros(HISTOGRAM_BINS + k, dtype=torch.int32, device=logits.device)
    row = torch.empty(SUMS + 1 + HISTOGRAM_BINS, dtype=torch.float64, device=logits.device)
    flags = {"FREEZE": freeze, "LIMIT_IS_HERE": not isinstance(limit, Tensor)}
    launch(
        _settle_kernel, programs, logits, candidates.contiguous(), limit, partial, counts, count, k, **sizes, **flags
    )
    launch(_row_kernel, 1, partial, counts, row, programs, max(count, 1), k, BLOCK=1024)
    return row
