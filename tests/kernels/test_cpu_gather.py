"""The compiled gather is the torch one for every width of code, length, type and number of threads."""

import pytest
import torch

from vqlib import kernels
from vqlib.kernels.bits import bits_for, pack_codes, unpack_codes
from vqlib.kernels.cpu_gather import gather

ONE = torch.ones(())


def draw(k, count, d, dtype=torch.float32):
    generator = torch.Generator().manual_seed(k)
    codes = torch.randint(0, k, (count,), generator=generator)
    return codes, pack_codes(codes, bits_for(k)), torch.randn(k, d, generator=generator).to(dtype)


@pytest.mark.parametrize("k", [1, 2, 3, 8, 13, 32, 64, 100, 256, 300, 1024, 4096, 10_000, 65_536])
def test_it_is_unpack_and_index_at_any_width_of_code(k):
    for count in (1, 2, 3, 5, 8, 1001):
        codes, packed, table = draw(k, count, 4)
        assert torch.equal(gather(packed, bits_for(k), table, ONE, torch.empty(count, 4)), table[codes]), count


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("d", [1, 2, 3, 4, 8, 16])
def test_every_length_and_type_is_copied_bit_for_bit(d, dtype):
    codes, packed, table = draw(60, 777, d, dtype)
    table[3, 0] = float("nan")
    found = gather(packed, 6, table, ONE, torch.empty(777, d, dtype=dtype))
    assert torch.equal(found.view(torch.uint8), table[codes].view(torch.uint8))


@pytest.mark.parametrize("k", [64, 256])
def test_threads_change_nothing(k):
    count, before = 1 << 18 | 5, torch.get_num_threads()
    codes, packed, table = draw(k, count, 2)
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(gather(packed, bits_for(k), table, ONE, torch.empty(count, 2)), table[codes])
    finally:
        torch.set_num_threads(before)


def test_a_code_beyond_the_codebook_gives_zeros_and_reads_nothing_else():
    _, packed, table = draw(10, 64, 4)
    packed.fill_(0xFF)
    assert unpack_codes(packed, 4, 64).max() == 15
    assert not gather(packed, 4, table, ONE, torch.ones(64, 4)).any()


def test_what_does_not_fit_together_is_refused():
    _, packed, table = draw(16, 64, 4)
    for out in (torch.empty(62, 4), torch.empty(66, 4), torch.empty(64, 2)):
        with pytest.raises(ValueError, match="32 bytes of 4-bit codes and a torch.float32 codebook"):
            kernels.gather(packed, 4, table, ONE, out)
    with pytest.raises(ValueError, match="do not fill"):
        kernels.gather(packed, 4, torch.zeros(17, 4), ONE, torch.empty(64, 4))
    with pytest.raises(ValueError, match=r"\[64, 4\] of strides \(1, 64\)"):
        kernels.gather(packed, 4, table, ONE, torch.empty(4, 64).t())


@pytest.mark.parametrize("held, dtype", [(torch.float32, torch.float32), (torch.float16, torch.bfloat16)])
def test_the_scale_is_multiplied_in_float32_and_the_product_rounded_once(held, dtype):
    codes, packed, codebook = draw(256, 900, 4, held)
    found = gather(packed, 8, codebook, torch.tensor(0.3), torch.empty(900, 4, dtype=dtype))
    assert torch.equal(found, (codebook.double() * torch.tensor(0.3).double()).float().to(dtype)[codes])
