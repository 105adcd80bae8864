"""Packed codes to weights on CUDA: bits to code to codeword to the scaled weight in its type, in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqlib.kernels import reference
from vqlib.kernels.cuda_launch import launch

_TILE = 4096  # elements of a program
_MOST_BITS = 16  # of a code: with the bits before it they lie in three bytes


@triton.jit
def _gather_kernel(
    codes, codebook, scale, out, count, size,
    BITS: tl.constexpr, LENGTH: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside, columns = rows < count, tl.arange(0, WIDTH)[None, :]
    byte = rows * BITS >> 3
    word = tl.load(codes + byte, mask=inside, other=0).to(tl.int32)
    for i in tl.static_range(1, 3):
        word |= tl.load(codes + byte + i, mask=inside & (byte + i < size), other=0).to(tl.int32) << 8 * i
    code = (word >> (rows * BITS & 7).to(tl.int32)) & ((1 << BITS) - 1)
    within = inside[:, None] & (columns < LENGTH)
    values = tl.load(codebook + code[:, None] * LENGTH + columns, mask=within, other=0.0).to(tl.float32)
    tl.store(out + rows[:, None] * LENGTH + columns, values * tl.load(scale), mask=within)


def gather_sizes(code_bits: int, d: int) -> dict[str, int]:
    """What the kernel is compiled for."""
    width = triton.next_power_of_2(d)
    return {"BITS": code_bits, "LENGTH": d, "WIDTH": width, "ROWS": max(1, _TILE // width)}


def gather(codes: Tensor, code_bits: int, codebook: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    """out[i] = scale · codebook[code i]: uint8 [ceil(N·bits/8)], [k, d], float32 [] -> `out` [N, d]."""
    (count, d), fits = out.shape, code_bits <= _MOST_BITS and scale.dtype == torch.float32
    if not fits:
        return reference.gather(codes, code_bits, codebook, scale, out)
    sizes = gather_sizes(code_bits, d)
    programs = triton.cdiv(count, sizes["ROWS"])
    read = codes.contiguous(), codebook.contiguous(), scale
    launch(_gather_kernel, programs, *read, out, count, codes.numel(), **sizes)
    return out
