import pytest
import torch

from vqlib import kernels
from vqlib.kernels import cuda_soft, reference


def _gradients(function, codewords, candidates, logits, grad):
    """The reconstruction, and its gradients for the codewords and, where there are any, the logits."""
    leaves = [tensor.clone().requires_grad_() for tensor in (codewords, logits) if tensor is not None]
    mixed = function(leaves[0], candidates, leaves[1] if len(leaves) > 1 else None)
    return mixed.detach(), *torch.autograd.grad(mixed, leaves, grad)


def _by_formula(codewords, candidates, logits, grad):
    """The same in float64: w = Σ r_n c_n, dL/dC[A_n] += r_n g, dL/dz_n = r_n (g·c_n − g·w)."""
    members, slope = codewords.double()[candidates.long()], grad.double()  # [N, n, d]
    ratios = logits.double().exp() / logits.double().exp().sum(dim=1, keepdim=True)
    mixed = torch.einsum("in,ind->id", ratios, members)
    sums = torch.zeros_like(codewords, dtype=torch.float64)
    sums.index_add_(0, candidates.long().flatten(), torch.einsum("in,id->ind", ratios, slope).flatten(0, 1))
    products = torch.einsum("id,ind->in", slope, members)
    return mixed, sums, ratios * (products - (slope * mixed).sum(dim=1, keepdim=True))


@pytest.mark.parametrize(
    "count, d, k, n, dtype",
    [
        (0, 4, 16, 3, torch.uint8),
        (1, 1, 2, 1, torch.uint8),
        (1030, 1, 256, 2, torch.uint8),
        (300, 2, 300, 3, torch.int16),
        (257, 3, 40, 5, torch.int32),
        (300, 4, 40000, 3, torch.int32),
        (130, 8, 17, 8, torch.int64),
        (20, 16, 17, 16, torch.int8),
    ],
)
def test_soft_reconstruct_and_its_gradients_agree_with_the_formula(cuda, soft_data, count, d, k, n, dtype):
    codewords, candidates, logits, grad = soft_data(count, d, k, n)
    candidates = candidates.to(dtype)
    got = _gradients(cuda.soft_reconstruct, codewords, candidates, logits, grad)
    for ours, exact in zip(got, _by_formula(codewords, candidates, logits, grad), strict=True):
        assert ours.dtype == torch.float32 and torch.allclose(ours.double(), exact, rtol=1e-5, atol=1e-5)
    for ours, twins in zip(got, _gradients(reference.soft_reconstruct, codewords, candidates, logits, grad)):
        assert torch.allclose(ours, twins, rtol=1e-5, atol=1e-5)


def test_one_candidate_needs_no_logits(cuda, device, soft_data):
    codewords, candidates, _, grad = soft_data(300, 4, 20, 1)
    mixed, slope = _gradients(cuda.soft_reconstruct, codewords, candidates, None, grad)
    exact = torch.zeros(20, 4, dtype=torch.float64, device=device).index_add_(0, candidates[:, 0], grad.double())
    assert torch.equal(mixed, codewords[candidates[:, 0]]) and torch.allclose(slope.double(), exact, atol=1e-5)


def test_frozen_rows_are_one_codeword_and_get_no_gradient(cuda, device, soft_data):
    codewords, candidates, logits, grad = soft_data(300, 3, 20, 3)
    frozen, winners = torch.arange(0, 300, 2, device=device), torch.arange(150, device=device) % 3
    logits[frozen] = kernels.FROZEN_LOGIT
    logits[frozen, winners] = 0.0
    mixed, sums, slopes = _gradients(cuda.soft_reconstruct, codewords, candidates, logits, grad)
    assert torch.equal(mixed[frozen], codewords[candidates[frozen, winners]])
    assert slopes[frozen].abs().max() == 0 and slopes[1::2].abs().min() > 0
    assert torch.allclose(sums.double(), _by_formula(codewords, candidates, logits, grad)[1], atol=1e-5)


def test_the_codebooks_gradient_does_not_depend_on_the_number_of_partial_sums(cuda, soft_data, monkeypatch):
    data = soft_data(1500, 4, 5, 2)
    many = _gradients(cuda.soft_reconstruct, *data)[1]
    monkeypatch.setattr(cuda_soft, "_PARTIAL_BYTES", 2 * 4 * 5 * 4)
    assert torch.allclose(_gradients(cuda.soft_reconstruct, *data)[1], many, rtol=1e-4, atol=1e-4)


def test_extreme_logits_give_a_hard_choice_and_nan_shows(cuda, device):
    codewords, candidates = torch.tensor([[1.0], [7.0]]).to(device), torch.tensor([[0, 1]] * 4).to(device)
    logits = torch.tensor([[1e6, -1e6], [-torch.inf, 0.0], [200.0, 300.0], [0.0, torch.nan]]).to(device)
    mixed = cuda.soft_reconstruct(codewords, candidates, logits)[:, 0]
    assert mixed[:3].tolist() == [1.0, 7.0, 7.0] and mixed[3].isnan()


@pytest.mark.parametrize("bad", [-1, 100])
def test_a_candidate_outside_the_codebook_gives_nan_and_nothing_else_changes(cuda, soft_data, bad):
    codewords, candidates, logits, grad = soft_data(90, 4, 100, 2)
    broken = candidates.clone()
    broken[85, 1] = bad
    mixed = cuda.soft_reconstruct(codewords, broken, logits)
    assert mixed[85].isnan().all()
    others = torch.arange(90, device=mixed.device) != 85
    assert torch.equal(mixed[others], cuda.soft_reconstruct(codewords, candidates, logits)[others])
    with pytest.raises(IndexError, match=f"{bad}.* of sub-vector 85 .* k=100"):
        kernels.check_candidates(broken, 100)


def test_strided_tensors_are_accepted(cuda, soft_data):
    book, candidates, logits, grad = (tensor.t().contiguous().t() for tensor in soft_data(30, 4, 16, 2))
    for ours, twins in zip(
        _gradients(cuda.soft_reconstruct, book, candidates, logits, grad),
        _gradients(reference.soft_reconstruct, book, candidates, logits, grad),
        strict=True,
    ):
        assert torch.allclose(ours, twins, atol=1e-5)


def test_the_package_uses_the_kernel(cuda, soft_data, monkeypatch):
    monkeypatch.setattr(reference, "soft_reconstruct", None)
    book, candidates, logits, grad = soft_data(30, 4, 16, 2)
    assert kernels.soft_reconstruct(book, candidates, logits).shape == grad.shape


def test_the_package_leaves_to_the_twins_what_the_kernel_does_not_take(cuda, soft_data, monkeypatch):
    for d, n, dtype in ((17, 2, torch.uint8), (4, 17, torch.uint8), (4, 2, torch.uint16)):
        book, candidates, logits, grad = soft_data(10, d, 8, n)
        with monkeypatch.context() as patched:
            patched.setattr(cuda, "soft_reconstruct", None)
            assert kernels.soft_reconstruct(book, candidates.to(dtype), logits).shape == grad.shape
    book, candidates, logits, grad = soft_data(10, 4, 8, 2)
    assert kernels.soft_reconstruct(book.double(), candidates, logits.double()).dtype == torch.float64
    monkeypatch.setattr(cuda_soft, "forward", None)
    torch.use_deterministic_algorithms(True)
    try:
        assert kernels.soft_reconstruct(book, candidates, logits).shape == grad.shape
    finally:
        torch.use_deterministic_algorithms(False)
