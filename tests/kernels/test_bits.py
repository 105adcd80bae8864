"""Packing: every width, every remainder, the exact bytes, and errors that repeat the caller's numbers."""

import pytest
import torch

from vqlib.kernels.bits import CHUNK, bits_for, pack_codes, packed_size, unpack_codes, unpack_range


def by_hand(codes, bits):
    """The little-endian bit stream as one big Python integer: the definition, one code at a time."""
    stream = sum(int(code) << (i * bits) for i, code in enumerate(codes))
    return stream.to_bytes((len(codes) * bits + 7) // 8, "little")


@pytest.mark.parametrize("bits", range(1, 17))
def test_bytes_are_the_little_endian_stream_and_come_back(bits):
    generator = torch.Generator().manual_seed(bits)
    for count in (0, 1, 2, 3, 7, 8, 9, 16, 61):
        codes = torch.randint(0, 1 << bits, (count,), generator=generator)
        packed = pack_codes(codes, bits)
        assert packed.dtype == torch.uint8 and packed.numel() == packed_size(count, bits)
        assert bytes(packed.tolist()) == by_hand(codes, bits)
        unpacked = unpack_codes(packed, bits, count)
        assert unpacked.dtype == torch.int64 and torch.equal(unpacked, codes)


@pytest.mark.parametrize("bits", [1, 6, 7, 8, 13, 16])
def test_chunks_meet_without_a_seam(bits):
    codes = torch.randint(0, 1 << bits, (CHUNK + 13,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpack_codes(pack_codes(codes, bits), bits, len(codes)), codes)


@pytest.mark.parametrize("bits", [3, 6, 8, 11])
def test_a_range_is_read_on_its_own(bits):
    codes = torch.randint(0, 1 << bits, (100,), generator=torch.Generator().manual_seed(1))
    packed = pack_codes(codes, bits)
    assert torch.equal(unpack_range(packed, bits, 40, 71).long(), codes[40:71])
    with pytest.raises(ValueError, match="start=41"):
        unpack_range(packed, bits, 41, 71)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_any_integer_dtype_packs_to_the_same_bytes(dtype):
    codes = torch.arange(60) % 64
    assert torch.equal(pack_codes(codes.to(dtype), 6), pack_codes(codes, 6))


@pytest.mark.parametrize(("k", "bits"), [(1, 1), (2, 1), (3, 2), (64, 6), (65, 7), (256, 8), (65536, 16)])
def test_bits_for(k, bits):
    assert bits_for(k) == bits


@pytest.mark.parametrize("k", [0, 65537])
def test_bits_for_refuses(k):
    with pytest.raises(ValueError, match=f"k={k}"):
        bits_for(k)


@pytest.mark.parametrize("value", [64, -1, 1 << 32, -(1 << 40)])
def test_a_code_that_does_not_fit_is_named_with_its_position(value):
    codes = torch.zeros(20, dtype=torch.int64)
    codes[17] = value
    with pytest.raises(ValueError, match=f"code {value} at position 17 does not fit in 6 bits"):
        pack_codes(codes, 6)


def test_wrong_sizes_and_widths_are_refused():
    with pytest.raises(ValueError, match=r"17 codes of 6 bits take uint8 \[13\], got torch.uint8 of shape \[12\]"):
        unpack_codes(torch.zeros(12, dtype=torch.uint8), 6, 17)
    for bits in (0, 17):
        with pytest.raises(ValueError, match=f"bits={bits}"):
            pack_codes(torch.zeros(3, dtype=torch.int64), bits)
    with pytest.raises(ValueError, match="float32"):
        pack_codes(torch.zeros(3), 4)
