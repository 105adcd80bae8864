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
    codebook = torch.randn(k, d, generator=generator).to(device, dtype)
    monkeypatch.setattr(reference, "gather", None)
    packed, one = pack_codes(codes, bits).to(device), torch.ones((), device=device)
    out = torch.full((1237, d), torch.nan, dtype=dtype, device=device)
    kernels.gather(packed, bits, codebook, one, out)
    assert torch.equal(out, codebook.float().to(dtype)[codes.to(device)])


@pytest.mark.parametrize("held", [torch.float32, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_scale_is_multiplied_in_float32_and_the_product_rounded_once(cuda, device, monkeypatch, held, dtype):
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter cuts digits off; tests/kernels/test_kernels_cuda.py looks for the instruction")
    monkeypatch.setattr(reference, "gather", None)
    codes = torch.arange(3000) % 256
    codebook = torch.randn(256, 4, generator=torch.Generator().manual_seed(0)).to(held)
    out = torch.empty(3000, 4, dtype=dtype, device=device)
    kernels.gather(pack_codes(codes, 8).to(device), 8, codebook.to(device), torch.tensor(0.3, device=device), out)
    wanted = (codebook.double() * torch.tensor(0.3).double()).float().to(dtype)[codes]  # exact, then float32
    assert torch.equal(out.cpu(), wanted)
