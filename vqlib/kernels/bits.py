"""Codes of 1 … 16 bits as one little-endian bit stream: code i holds bits i·bits … (i+1)·bits − 1 of the stream.

Bit b of the stream is bit b mod 8 (least significant first) of byte b div 8, on every machine; unused bits of the
last byte are 0. The work is done on whole periods: the fewest codes that end on a byte boundary (6 bits: 4 codes in
3 bytes), so that every code of one column has the same shift.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CHUNK = 1 << 18  # codes handled at once; a multiple of every period, so chunks start on byte boundaries


def packed_size(count: int, bits: int) -> int:
    """Bytes taken by `count` codes of `bits` bits."""
    return (count * _checked(bits) + 7) // 8


def bits_for(k: int) -> int:
    """The fewest bits that tell k codewords apart (at least 1). Raises ValueError outside 1 … 65536."""
    if not 1 <= k <= 1 << 16:
        raise ValueError(f"k={k} is outside 1 … 65536, the codewords that a code of at most 16 bits can name")
    return max(1, (k - 1).bit_length())


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Integers [N] in 0 … 2^bits − 1 as uint8 [ceil(N·bits/8)]. Raises ValueError on a code that does not fit."""
    packed = torch.zeros(packed_size(codes.numel(), bits), dtype=torch.uint8, device=codes.device)
    if codes.dim() != 1 or codes.is_floating_point() or codes.is_complex():
        raise ValueError(f"codes must be integers of shape [N], got {codes.dtype} of shape {list(codes.shape)}")
    for start in range(0, codes.numel(), CHUNK):
        chunk = codes[start : start + CHUNK].to(torch.int32)
        _require_fitting(chunk, codes, start, bits)
        data = chunk.to(torch.uint8) if bits == 8 else _pack_periods(chunk, bits)
        first = start * bits // 8
        packed[first : first + CHUNK * bits // 8] = data[: packed_size(chunk.numel(), bits)]
    return packed


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_codes`: uint8 [ceil(count·bits/8)] as int64 [count]."""
    expected = packed_size(count, bits)
    if packed.dtype != torch.uint8 or packed.shape != (expected,):
        raise ValueError(
            f"{count} codes of {bits} bits take uint8 [{expected}], got {packed.dtype} of shape {list(packed.shape)}"
        )
    codes = torch.empty(count, dtype=torch.int64, device=packed.device)
    for start in range(0, count, CHUNK):
        stop = min(start + CHUNK, count)
        codes[start:stop] = unpack_range(packed, bits, start, stop)
    return codes


def unpack_range(packed: Tensor, bits: int, start: int, stop: int) -> Tensor:
    """Codes start … stop − 1 as int32 [stop − start], without looking at the rest; `start` is a multiple of 8."""
    if start % 8:
        raise ValueError(f"start={start} is not a multiple of 8, so it may lie inside a byte")
    data = packed[start * bits // 8 : packed_size(stop, bits)]
    if bits == 8:
        return data.to(torch.int32)
    return _unpack_periods(data, bits)[: stop - start]


def _checked(bits: int) -> int:
    if not 1 <= bits <= 16:
        raise ValueError(f"bits={bits} is outside 1 … 16")
    return bits


def _require_fitting(chunk: Tensor, codes: Tensor, start: int, bits: int) -> None:
    # The comparison is made on the caller's own integers: a huge int64 would wrap into range in int32.
    source = chunk if codes.dtype.itemsize < 4 else codes[start : start + CHUNK]
    low, high = (int(v) for v in torch.aminmax(source))
    if low < 0 or high >= 1 << bits:
        worst = low if low < 0 else high
        position = start + int((source == worst).nonzero()[0])
        raise ValueError(f"code {worst} at position {position} does not fit in {bits} bits (0 … {(1 << bits) - 1})")


def _period(bits: int) -> tuple[int, int]:
    """Codes and bytes of one period."""
    common = math.gcd(bits, 8)
    return 8 // common, bits // common


def _pack_periods(codes: Tensor, bits: int) -> Tensor:
    per, width = _period(bits)
    padded = torch.nn.functional.pad(codes, (0, -len(codes) % per)).view(-1, per)  # [N] -> [periods, per]
    data = torch.empty(len(padded), width, dtype=torch.uint8, device=codes.device)
    for byte in range(width):
        value = torch.zeros_like(padded[:, 0])
        for i in range(byte * 8 // bits, min(per, (byte * 8 + 7) // bits + 1)):
            shift = byte * 8 - i * bits
            value |= padded[:, i] >> shift if shift >= 0 else padded[:, i] << -shift
        data[:, byte] = (value & 0xFF).to(torch.uint8)
    return data.view(-1)


def _unpack_periods(data: Tensor, bits: int) -> Tensor:
    per, width = _period(bits)
    padded = torch.nn.functional.pad(data, (0, -len(data) % width)).view(-1, width)  # [bytes] -> [periods, width]
    columns = [padded[:, j].to(torch.int32) for j in range(width)]
    codes = torch.empty(len(padded), per, dtype=torch.int32, device=data.device)
    for i in range(per):
        byte, shift = divmod(i * bits, 8)
        value = columns[byte] >> shift
        for more in range(1, (shift + bits + 7) // 8):
            value = value | columns[byte + more] << (8 * more - shift)
        codes[:, i] = value & ((1 << bits) - 1)
    return codes.view(-1)
