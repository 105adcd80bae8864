"""Soft reconstruction and its gradients on CUDA: no [N, n, d] candidates exist outside the registers.

Rows are counted in int64, because N·d and N·n of a whole model pass 2³¹. The forward pass repeats bit for bit. The
codebook's gradient is added up atomically, in an order that differs from run to run, and so do its last bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqlib.kernels.cuda_launch import launch

MAX_CANDIDATES = 16
_TILE = 1024  # sub-vectors of a program that mixes, times d or n
_PARTIAL_BYTES = 1 << 24  # of all partial codebook gradients: they stay in the second-level cache


@triton.jit
def ratios_of(logits, rows, inside, COUNT: tl.constexpr, SLOTS: tl.constexpr, SOFT: tl.constexpr):
    """Eq. 6 of a block of rows, [rows, SLOTS], 0 in the slots beyond n; without logits (SOFT) the only ratio is 1."""
    slots = tl.arange(0, SLOTS)[None, :]
    z = tl.zeros([rows.shape[0], SLOTS], tl.float32)
    if SOFT:
        z = tl.load(logits + rows[:, None] * COUNT + slots, mask=inside[:, None] & (slots < COUNT), other=0.0)
    z = tl.where(slots < COUNT, z, float("-inf"))
    shares = tl.exp(z - tl.max(z, axis=1)[:, None])
    # Rounded as IEEE says: were 1/1 not 1, frozen rows would get tiny gradients, of which RMSprop makes full steps
    return tl.div_rn(shares, tl.sum(shares, axis=1)[:, None])


@triton.jit
def _column(tile, slot, SLOTS: tl.constexpr):
    """Column `slot` of a tile: [rows, SLOTS] -> [rows, 1]."""
    return tl.sum(tl.where(tl.arange(0, SLOTS)[None, :] == slot, tile, 0.0), axis=1)[:, None]


@triton.jit
def _forward_kernel(
    codewords, candidates, logits, out, count, k,
    LENGTH: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr,
    SOFT: tl.constexpr,
):  # fmt: skip
    """Eq. 7 of a block of rows; WIDTH and SLOTS are d and n rounded up to powers of two."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < count
    columns = tl.arange(0, WIDTH)[None, :]
    ratios = ratios_of(logits, rows, inside, COUNT, SLOTS, SOFT)
    mixed = tl.zeros([ROWS, WIDTH], tl.float32)
    for t in tl.static_range(COUNT):
        code = tl.load(candidates + rows * COUNT + t, mask=inside, other=0).to(tl.int64)[:, None]
        known = (code >= 0) & (code < k)  # nothing outside the codebook is read: NaN shows that it was asked for
        member = tl.load(codewords + code * LENGTH + columns, mask=known & (columns < LENGTH), other=float("nan"))
        mixed += _column(ratios, t, SLOTS) * member
    tl.store(out + rows[:, None] * LENGTH + columns, mixed, mask=inside[:, None] & (columns < LENGTH))


@triton.jit
def _backward_kernel(
    codewords, candidates, logits, grad, partial, grad_logits, count, k, tables,
    LENGTH: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr,
    SOFT: tl.constexpr,
):  # fmt: skip
    """Of a block of rows, with g = dL/dw: dL/dz_t = r_t (g·c_t − Σ_s r_s g·c_s), and r_t g added to dL/dc_t.

    A program adds to one of the sums in `partial` [tables, k, d].
    """
    program = tl.program_id(0).to(tl.int64)
    rows = program * ROWS + tl.arange(0, ROWS)
    inside = rows < count
    columns, slots = tl.arange(0, WIDTH)[None, :], tl.arange(0, SLOTS)[None, :]
    ratios = ratios_of(logits, rows, inside, COUNT, SLOTS, SOFT)
    within = inside[:, None] & (columns < LENGTH)
    slope = tl.load(grad + rows[:, None] * LENGTH + columns, mask=within, other=0.0)
    products = tl.zeros([ROWS, SLOTS], tl.float32)
    sums = partial + program % tables * k * LENGTH
    for t in tl.static_range(COUNT):
        code = tl.load(candidates + rows * COUNT + t, mask=inside, other=0).to(tl.int64)[:, None]
        known = (code >= 0) & (code < k)
        member = tl.load(codewords + code * LENGTH + columns, mask=known & (columns < LENGTH), other=0.0)
        product = tl.sum(slope * member, axis=1)[:, None]
        products = tl.where(slots == t, product, products)
        ratio = _column(ratios, t, SLOTS)
        # The candidates a frozen row has lost add nothing: no reason to queue for them
        tl.atomic_add(
            sums + code * LENGTH + columns, ratio * slope, mask=within & known & (ratio != 0.0), sem="relaxed"
        )
    if SOFT:
        mean = tl.sum(ratios * products, axis=1)[:, None]
        place = grad_logits + rows[:, None] * COUNT + slots
        tl.store(place, ratios * (products - mean), mask=inside[:, None] & (slots < COUNT))


def soft_sizes(d: int, n: int, soft: bool) -> dict[str, int | bool]:
    """What the soft kernels are compiled for; `soft` where there are logits."""
    width, slots = triton.next_power_of_2(d), triton.next_power_of_2(n)
    sizes = {"LENGTH": d, "COUNT": n, "WIDTH": width, "SLOTS": slots, "ROWS": _TILE // max(width, slots)}
    return sizes | {"SOFT": soft}


def forward(codewords: Tensor, candidates: Tensor, logits: Tensor | None) -> Tensor:
    """Eq. 6 and 7: float32 [k, d], integer [N, n], float32 [N, n] or None (n = 1) -> float32 [N, d]."""
    (count, n), (k, d) = candidates.shape, codewords.shape
    sizes = soft_sizes(d, n, logits is not None)
    out = codewords.new_empty(count, d)
    launch(_forward_kernel, triton.cdiv(count, sizes["ROWS"]), codewords, candidates, logits, out, count, k, **sizes)
    return out


def backward(
    codewords: Tensor, candidates: Tensor, logits: Tensor | None, grad: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the codewords [k, d] and the logits [N, n] (None without logits) from grad [N, d].

    Programs share as many partial sums of the codebook's gradient as `_PARTIAL_BYTES` hold, so that few of them wait
    for each other at a codeword.
    """
    (count, n), (k, d) = candidates.shape, codewords.shape
    sizes = soft_sizes(d, n, logits is not None)
    programs = triton.cdiv(count, sizes["ROWS"])
    tables = max(1, min(programs, _PARTIAL_BYTES // (4 * k * d)))
    partial = codewords.new_zeros(tables, k, d)
    grad_logits = None if logits is None else torch.empty_like(logits)
    read = codewords, candidates, logits, grad, partial, grad_logits, count, k, tables
    launch(_backward_kernel, programs, *read, **sizes)
    return partial.sum(dim=0), grad_logits  # [tables, k, d] -> [k, d]
