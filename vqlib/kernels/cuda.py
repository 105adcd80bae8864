"""Search, soft reconstruction and its gradients on CUDA, compiled by Triton once for each d and n.

Each kernel is the fused form of a function of `reference`: no [N, k] scores and no [N, n, d] candidates exist outside
the registers. Rows are counted in int64, because N·d and N·n of a whole model pass 2³¹. `kernels` gives them float32
tensors of one CUDA device; what lies beyond `MAX_LENGTH` and `MAX_CANDIDATES` goes to the twins.

Searches and the forward pass repeat bit for bit. The codebook's gradient is added up atomically, in an order that
differs from run to run, and so do its last bits; under torch.use_deterministic_algorithms(True) the twin takes over.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqlib.kernels import reference

MAX_LENGTH = 16  # a thread of the search keeps all coordinates of its points in registers
MAX_CANDIDATES = 16

_CODES = tl.constexpr(32)  # codewords of a program's score tile
_POINTS = 32  # its points, 8 a thread
_COORDINATES = 256  # at most, of those points: a thread keeps 64 of them
_TILE = 1024  # sub-vectors of a program that mixes, times d or n
_OPTIONS = {"enable_fp_fusion": True}  # multiply-add as in the twins on CUDA; Triton 3.10 no longer fuses unasked
_PARTIAL_BYTES = 1 << 24  # of all partial codebook gradients: they stay in the second-level cache


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
def _ratios(logits, rows, inside, COUNT: tl.constexpr, SLOTS: tl.constexpr, SOFT: tl.constexpr):
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
    codewords, candidates, logits, out, count,
    LENGTH: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr,
    SOFT: tl.constexpr,
):  # fmt: skip
    """Eq. 7 of a block of rows; WIDTH and SLOTS are d and n rounded up to powers of two."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < count
    columns = tl.arange(0, WIDTH)[None, :]
    ratios = _ratios(logits, rows, inside, COUNT, SLOTS, SOFT)
    mixed = tl.zeros([ROWS, WIDTH], tl.float32)
    for t in tl.static_range(COUNT):
        code = tl.load(candidates + rows * COUNT + t, mask=inside, other=0).to(tl.int64)[:, None]
        member = tl.load(codewords + code * LENGTH + columns, mask=columns < LENGTH, other=0.0)
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
    ratios = _ratios(logits, rows, inside, COUNT, SLOTS, SOFT)
    within = inside[:, None] & (columns < LENGTH)
    slope = tl.load(grad + rows[:, None] * LENGTH + columns, mask=within, other=0.0)
    products = tl.zeros([ROWS, SLOTS], tl.float32)
    sums = partial + program % tables * k * LENGTH
    for t in tl.static_range(COUNT):
        code = tl.load(candidates + rows * COUNT + t, mask=inside, other=0).to(tl.int64)[:, None]
        member = tl.load(codewords + code * LENGTH + columns, mask=columns < LENGTH, other=0.0)
        product = tl.sum(slope * member, axis=1)[:, None]
        products = tl.where(slots == t, product, products)
        ratio = _column(ratios, t, SLOTS)
        # The candidates a frozen row has lost add nothing: no reason to queue for them
        tl.atomic_add(sums + code * LENGTH + columns, ratio * slope, mask=within & (ratio != 0.0), sem="relaxed")
    if SOFT:
        mean = tl.sum(ratios * products, axis=1)[:, None]
        place = grad_logits + rows[:, None] * COUNT + slots
        tl.store(place, ratios * (products - mean), mask=inside[:, None] & (slots < COUNT))


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
    with torch.cuda.device_of(x):  # Triton launches on the current device
        grid = (triton.cdiv(count, sizes["POINTS"]),)
        _nearest_kernel[grid](x.contiguous(), table, bias, found, count, k, n, **sizes, **_OPTIONS)
    return found


def check_candidates(candidates: Tensor, k: int) -> None:
    """IndexError, with its row, for a candidate [N, n] outside a codebook of k: a kernel would read past its end.

    Waits for the device, once for each reconstruction.
    """
    if not candidates.numel():
        return
    low, high = torch.stack(torch.aminmax(candidates)).tolist()
    if low < 0 or high >= k:
        codes = candidates.long()
        outside = int(((codes < 0) | (codes >= k)).any(dim=1).int().argmax())
        row = codes[outside].tolist()
        raise IndexError(f"candidates {row} of sub-vector {outside} are not all in 0..{k - 1}, the codebook has k={k}")


def cluster_sums(x: Tensor, codewords: Tensor) -> reference.ClusterSums:
    """The twin's sums over the codes of this search: float32 [N, d], [k, d] -> [k, d], [k], [k]."""
    return reference.cluster_sums(x, codewords, assign)


def soft_sizes(d: int, n: int, soft: bool) -> dict[str, int | bool]:
    """What the soft kernels are compiled for; `soft` where there are logits."""
    width, slots = triton.next_power_of_2(d), triton.next_power_of_2(n)
    sizes = {"LENGTH": d, "COUNT": n, "WIDTH": width, "SLOTS": slots, "ROWS": _TILE // max(width, slots)}
    return sizes | {"SOFT": soft}


def _forward(codewords: Tensor, candidates: Tensor, logits: Tensor | None) -> Tensor:
    (count, n), d = candidates.shape, codewords.shape[1]
    sizes = soft_sizes(d, n, logits is not None)
    out = codewords.new_empty(count, d)
    with torch.cuda.device_of(codewords):
        grid = (triton.cdiv(count, sizes["ROWS"]),)
        _forward_kernel[grid](codewords, candidates, logits, out, count, **sizes, **_OPTIONS)
    return out


def _backward(
    codewords: Tensor, candidates: Tensor, logits: Tensor | None, grad: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the codewords [k, d] and the logits [N, n] (None without logits) from grad [N, d].

    Programs share as many partial sums of the codebook's gradient as `_PARTIAL_BYTES` hold, so that few of them wait
    for each other at a codeword; those are float32, and added up in float64.
    """
    (count, n), (k, d) = candidates.shape, codewords.shape
    sizes = soft_sizes(d, n, logits is not None)
    programs = triton.cdiv(count, sizes["ROWS"])
    tables = max(1, min(programs, _PARTIAL_BYTES // (4 * k * d)))
    partial = codewords.new_zeros(tables, k, d)
    grad_logits = None if logits is None else torch.empty_like(logits)
    with torch.cuda.device_of(codewords):
        _backward_kernel[(programs,)](
            codewords, candidates, logits, grad, partial, grad_logits, count, k, tables, **sizes, **_OPTIONS
        )
    return partial.sum(dim=0, dtype=torch.float64).float(), grad_logits  # [tables, k, d] -> [k, d]


class _SoftReconstruct(torch.autograd.Function):
    """Fused forward and backward; keeps nothing but its inputs."""

    @staticmethod
    def forward(ctx, codewords, candidates, logits):
        kept = codewords.contiguous(), candidates.contiguous(), None if logits is None else logits.contiguous()
        check_candidates(candidates, len(codewords))
        ctx.save_for_backward(*kept)
        return _forward(*kept)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        grad_codewords, grad_logits = _backward(*ctx.saved_tensors, grad.contiguous())
        return grad_codewords, None, grad_logits


def soft_reconstruct(codewords: Tensor, candidates: Tensor, logits: Tensor | None) -> Tensor:
    """Ratio-weighted mean of each sub-vector's candidates (Eq. 6 and 7), differentiable in codewords and logits.

    float32 [k, d], integer [N, n], float32 [N, n] or None (n = 1) -> float32 [N, d]; IndexError as `check_candidates`.
    """
    if torch.are_deterministic_algorithms_enabled():
        return reference.soft_reconstruct(codewords, candidates, logits)
    return _SoftReconstruct.apply(codewords, candidates, logits)
