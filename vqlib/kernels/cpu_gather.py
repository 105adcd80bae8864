"""Packed codes straight to dense weights on the CPU: one pass that reads a code's bits and copies its codeword.

A codeword is copied as a few wide words (at d = 4 and float32 as one of 16 bytes) whose bits are never looked at, so
the same loop serves every floating type. The number of words per codeword is known while compiling, from the length of
the tuple `unit`; the number of bits per code is not, because the same load and shift serves them all.
"""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from vqlib.kernels.reference import scaled
from vqlib.kernels.threads import run_chunks

_ALONE = 1 << 17  # codes that one thread copies (in 0.2 ms) before another could have been woken
_WORDS = {16: np.complex128, 8: np.int64, 4: np.int32, 2: np.int16, 1: np.int8}  # by bytes; the widest copies fastest
_OPTIONS = {"nogil": True, "cache": True, "error_model": "numpy"}


@njit(**_OPTIONS)
def _copy_bytes(unit, codes, table, out, start, stop):
    """Codes of 8 bits: codeword codes[i] to row i of out."""
    width = np.uint64(len(unit))
    for i in range(start, stop):
        row, place = np.uint64(codes[i]) * width, np.uint64(i) * width
        for j in range(len(unit)):
            out[place + np.uint64(j)] = table[row + np.uint64(j)]


@njit(**_OPTIONS)
def _copy_bits(unit, codes, bits, table, out, start, stop):
    """Codes of any width: with the bits before it in its first byte, a code lies within three bytes; four are one load.

    Indices are unsigned: signed ones would be compared with 0 each time, to count from the end as Python does.
    """
    width, step, mask = np.uint64(len(unit)), np.uint64(bits), (np.uint64(1) << np.uint64(bits)) - np.uint64(1)
    last = np.uint64(len(codes) - 1)
    inside = min(stop, max(start, 8 * (len(codes) - 4) // bits))  # codes with four bytes from their first on
    for i in range(start, inside):
        bit = np.uint64(i) * step
        byte = bit >> np.uint64(3)
        value = np.uint64(codes[byte])
        for more in range(1, 4):
            value |= np.uint64(codes[byte + np.uint64(more)]) << np.uint64(8 * more)
        row, place = ((value >> (bit & np.uint64(7))) & mask) * width, np.uint64(i) * width
        for j in range(len(unit)):
            out[place + np.uint64(j)] = table[row + np.uint64(j)]
    for i in range(inside, stop):
        bit = np.uint64(i) * step
        byte = bit >> np.uint64(3)
        value = np.uint64(codes[byte])
        for more in range(1, 3):
            value |= np.uint64(codes[min(byte + np.uint64(more), last)]) << np.uint64(8 * more)
        row, place = ((value >> (bit & np.uint64(7))) & mask) * width, np.uint64(i) * width
        for j in range(len(unit)):
            out[place + np.uint64(j)] = table[row + np.uint64(j)]


def gather(codes: Tensor, code_bits: int, codebook: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    """out[i] = scale · codebook[code i]: uint8 [ceil(N·bits/8)] packed as in `vqlib.kernels.bits`, [k, d], [] -> `out` [N, d].

    A code that names no codeword gives zeros.
    """
    (count, d), k = out.shape, len(codebook)
    table = scaled(codebook, scale, out.dtype)
    if k < 1 << code_bits:
        table = torch.nn.functional.pad(table, (0, 0, 0, (1 << code_bits) - k))  # whatever a code says, it stays inside
    size = d * table.element_size()
    width = next(width for width in _WORDS if size % width == 0)
    source, words, target = codes.numpy(), _words(table.contiguous(), width), _words(out, width)
    unit = (0,) * (size // width)

    def work(_: int, start: int, stop: int) -> None:
        if code_bits == 8:
            _copy_bytes(unit, source, words, target, start, stop)
        else:
            _copy_bits(unit, source, code_bits, words, target, start, stop)

    if count <= _ALONE:
        work(0, 0, count)
    else:
        run_chunks(count, max(_ALONE // 2, -(-count // 64)), work)
    return out


def _words(tensor: Tensor, width: int) -> np.ndarray:
    """The memory of a contiguous tensor as words of `width` bytes, [numel·itemsize/width]."""
    if tensor.dtype == torch.bfloat16:  # numpy has no such type
        tensor = tensor.view(torch.int16)
    return tensor.detach().numpy().reshape(-1).view(_WORDS[width])
