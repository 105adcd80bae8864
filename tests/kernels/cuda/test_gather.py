import pytest
import torch

from vqlib import kernels
from vqlib.kernels import reference
from vqlib.kernels.bits import pack_codes


@pytest.mark.parametrize("bits", [1, 3, 8, 9, 12, 16])
@pytest.mark.parametrize("d, dtype", [(4, torch.float32), (3, torch.float16), (1, torch.bfloat16), (16, torch.float64)])
def test_packed_codes_become_their_codewords(cuda, device, monkeypatch, bits, d, dtype):
    generator = torch.Generator().manual_seed(bits)
    k = min(2**bits, 5000)
    codes = torch.randint(0, k, (1237,), generator=generator)
    table = torch.randn(k, d, generator=generator).to(device, dtype)
    monkeypatch.setattr(reference, "gather", None)
    out = torch.full((1237, d), torch.nan, dtype=dtype, device=device)
    assert torch.equal(kernels.gather(pack_codes(codes, bits).to(device), bits, table, out), table[codes.to(device)])


def test_a_table_of_another_type_is_left_to_the_twin(cuda, device, monkeypatch):
    called = []
    monkeypatch.setattr(reference, "gather", lambda *arguments: called.append(arguments))
    kernels.gather(torch.zeros(2, dtype=torch.uint8, device=device), 4, torch.zeros(3, 2, device=device).double(),
                   torch.zeros(4, 2, device=device))  # fmt: skip
    assert called
