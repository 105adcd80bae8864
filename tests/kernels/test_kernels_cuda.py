"""The Triton kernels against their plain torch twins: on the GPU, or, where there is none, in Triton's interpreter.

Triton decides while it is imported, for the whole process, whether kernels are compiled or interpreted. Without a GPU
the checks therefore run in a process of their own; TRITON_INTERPRET=1 pytest tests/test_kernels_cuda.py runs them here.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from vqlib import kernels
from vqlib.kernels import reference

if find_spec("triton") is None:
    pytest.skip("triton is not installed; CUDA builds of torch on Linux bring it", allow_module_level=True)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"
FLOAT, LONG = "*fp32", "*i64"  # pointers, in Triton's words


def _data(count, d, k, seed=0):
    """Points and codewords that are multiples of 1/8: their scores are exact in float32, so even ties must agree."""
    generator = torch.Generator().manual_seed(seed)
    points, codewords = torch.randn(count, d, generator=generator), torch.randn(k, d, generator=generator)
    return (points * 8).round().div(8).to(DEVICE), (codewords * 8).round().div(8).to(DEVICE)


def _soft_data(count, d, k, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codewords, candidates = torch.randn(k, d, generator=generator), torch.randint(0, k, (count, n), generator=generator)
    logits, grad = 3 * torch.randn(count, n, generator=generator), torch.randn(count, d, generator=generator)
    return codewords.to(DEVICE), candidates.to(DEVICE), logits.to(DEVICE), grad.to(DEVICE)


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


def _compile(kernel, **values):
    """Compile a kernel for an A100, which need not be there; values are types of arguments, or constants."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = {parameter.name: values[parameter.name] for parameter in kernel.params}
    types = {name: value if isinstance(value, str) else "constexpr" for name, value in names.items()}
    constants = {name: value for name, value in names.items() if not isinstance(value, str)}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"enable_fp_fusion": True}).asm


@pytest.mark.skipif(INTERPRETED or ON_GPU, reason="the checks run in this process")
def test_the_kernels_in_tritons_interpreter():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "TestKernels", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
def test_the_kernels_compile_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from vqlib.kernels import cuda

    search = {"x": FLOAT, "table": FLOAT, "bias": FLOAT, "found": LONG, "k": "i32"}
    for d, n, count in ((4, "i32", "i64"), (3, 1, "i32")):
        asm = _compile(cuda._nearest_kernel, **search, n=n, count=count, **cuda.search_sizes(d, 1 if n == 1 else 3))
        assert "fma.rn.f32" in asm["ptx"] and "tf32" not in asm["ptx"] and asm["cubin"]
    soft = {"codewords": FLOAT, "candidates": "*i16", "out": FLOAT, "grad": FLOAT, "partial": FLOAT, "k": "i32"}
    for d, n, logits, tables, count in ((4, 3, FLOAT, "i32", "i64"), (3, 1, None, 1, 1)):
        sizes = cuda.soft_sizes(d, n, logits is not None)
        values = soft | sizes | {"logits": logits, "grad_logits": logits, "tables": tables, "count": count}
        assert _compile(cuda._forward_kernel, **values)["cubin"]
        assert ".add.f32" in _compile(cuda._backward_kernel, **values)["ptx"]


class TestKernels:
    __test__ = ON_GPU or INTERPRETED

    @pytest.fixture
    def cuda(self, monkeypatch):
        """The module; `kernels` uses it for whatever device the tensors are on."""
        from vqlib.kernels import cuda

        monkeypatch.setattr(kernels, "back_end", lambda device_type: cuda)
        return cuda

    @pytest.fixture
    def without_twins(self, monkeypatch):
        """The twins refuse to work: what passes was computed by Triton."""
        for name in ("assign", "nearest", "soft_reconstruct"):
            monkeypatch.setattr(reference, name, None)

    @pytest.mark.parametrize("count, d, k", [(0, 4, 9), (1, 2, 2), (33, 1, 3), (64, 3, 65), (70, 4, 300), (40, 16, 32)])
    def test_assign_agrees_with_the_twin(self, cuda, count, d, k):
        x, codewords = _data(count, d, k)
        codes = cuda.assign(x, codewords)
        assert codes.dtype == torch.int64 and torch.equal(codes, reference.assign(x, codewords))

    @pytest.mark.parametrize("d, k, n", [(1, 5, 5), (2, 2, 2), (3, 40, 4), (4, 300, 3), (8, 33, 8)])
    def test_nearest_agrees_with_the_twin(self, cuda, d, k, n):
        x, codewords = _data(37, d, k)
        assert torch.equal(cuda.nearest(x, codewords, n), reference.nearest(x, codewords, n))

    def test_nearest_finds_all_but_near_ties_where_scores_are_rounded(self, cuda):
        x, codewords = (torch.randn(count, 4, generator=torch.Generator().manual_seed(count)) for count in (50, 70))
        x, codewords = x.to(DEVICE), codewords.to(DEVICE)
        found = cuda.nearest(x, codewords, 3)
        distances = torch.cdist(x.double(), codewords.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
        assert torch.allclose(distances.gather(1, found), distances.sort(dim=1).values[:, :3], atol=1e-5)
        assert all(len(set(row)) == 3 for row in found.tolist())

    def test_equal_codewords_come_in_the_order_of_their_indices(self, cuda):
        codewords = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, -1.0], [0.0, 2.0]]).to(DEVICE)
        x = torch.zeros(3, 2, device=DEVICE)
        assert cuda.nearest(x, codewords, 5).tolist() == [[1, 2, 3, 0, 4]] * 3
        far = codewords[[0, 4] * 20 + [2, 0, 1, 2] + [0] * 30 + [1, 2]]  # ties within a block of codewords and across
        assert cuda.nearest(x, far, 5).tolist() == [[40, 42, 43, 74, 75]] * 3
        assert cuda.assign(x, far).tolist() == [40] * 3

    def test_points_and_codewords_that_are_not_numbers_stay_inside_the_codebook(self, cuda):
        x, codewords = torch.tensor([[torch.nan], [1.0]]).to(DEVICE), torch.tensor([[torch.nan], [3.0]]).to(DEVICE)
        assert cuda.assign(x, codewords).tolist() == [0, 1]

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
    def test_soft_reconstruct_and_its_gradients_agree_with_the_formula(self, cuda, count, d, k, n, dtype):
        codewords, candidates, logits, grad = _soft_data(count, d, k, n)
        candidates = candidates.to(dtype)
        got = _gradients(cuda.soft_reconstruct, codewords, candidates, logits, grad)
        for ours, exact in zip(got, _by_formula(codewords, candidates, logits, grad), strict=True):
            assert ours.dtype == torch.float32 and torch.allclose(ours.double(), exact, rtol=1e-5, atol=1e-5)
        for ours, twins in zip(got, _gradients(reference.soft_reconstruct, codewords, candidates, logits, grad)):
            assert torch.allclose(ours, twins, rtol=1e-5, atol=1e-5)

    def test_one_candidate_needs_no_logits(self, cuda):
        codewords, candidates, _, grad = _soft_data(300, 4, 20, 1)
        mixed, slope = _gradients(cuda.soft_reconstruct, codewords, candidates, None, grad)
        exact = torch.zeros(20, 4, dtype=torch.float64, device=DEVICE).index_add_(0, candidates[:, 0], grad.double())
        assert torch.equal(mixed, codewords[candidates[:, 0]]) and torch.allclose(slope.double(), exact, atol=1e-5)

    def test_frozen_rows_are_one_codeword_and_get_no_gradient(self, cuda):
        codewords, candidates, logits, grad = _soft_data(300, 3, 20, 3)
        frozen, winners = torch.arange(0, 300, 2, device=DEVICE), torch.arange(150, device=DEVICE) % 3
        logits[frozen] = kernels.FROZEN_LOGIT
        logits[frozen, winners] = 0.0
        mixed, sums, slopes = _gradients(cuda.soft_reconstruct, codewords, candidates, logits, grad)
        assert torch.equal(mixed[frozen], codewords[candidates[frozen, winners]])
        assert slopes[frozen].abs().max() == 0 and slopes[1::2].abs().min() > 0
        assert torch.allclose(sums.double(), _by_formula(codewords, candidates, logits, grad)[1], atol=1e-5)

    def test_the_codebooks_gradient_does_not_depend_on_the_number_of_partial_sums(self, cuda, monkeypatch):
        data = _soft_data(1500, 4, 5, 2)
        many = _gradients(cuda.soft_reconstruct, *data)[1]
        monkeypatch.setattr(cuda, "_PARTIAL_BYTES", 2 * 4 * 5 * 4)
        assert torch.allclose(_gradients(cuda.soft_reconstruct, *data)[1], many, rtol=1e-4, atol=1e-4)

    def test_extreme_logits_give_a_hard_choice_and_nan_shows(self, cuda):
        codewords, candidates = torch.tensor([[1.0], [7.0]]).to(DEVICE), torch.tensor([[0, 1]] * 4).to(DEVICE)
        logits = torch.tensor([[1e6, -1e6], [-torch.inf, 0.0], [200.0, 300.0], [0.0, torch.nan]]).to(DEVICE)
        mixed = cuda.soft_reconstruct(codewords, candidates, logits)[:, 0]
        assert mixed[:3].tolist() == [1.0, 7.0, 7.0] and mixed[3].isnan()

    @pytest.mark.parametrize("bad", [-1, 100])
    def test_candidates_outside_the_codebook_are_refused(self, cuda, bad):
        codewords, candidates, logits, _ = _soft_data(90, 4, 100, 2)
        candidates[85, 1] = bad
        with pytest.raises(IndexError, match=f"{bad}.* of sub-vector 85 .* k=100"):
            cuda.soft_reconstruct(codewords, candidates, logits)

    def test_strided_tensors_are_accepted(self, cuda):
        x, codewords = _data(30, 4, 16)
        wide, tall = torch.cat([x, x], dim=1)[:, ::2], torch.cat([codewords, codewords], dim=1)[:, ::2]
        assert torch.equal(cuda.nearest(wide, tall, 2), reference.nearest(wide, tall, 2))
        book, candidates, logits, grad = (tensor.t().contiguous().t() for tensor in _soft_data(30, 4, 16, 2))
        for ours, twins in zip(
            _gradients(cuda.soft_reconstruct, book, candidates, logits, grad),
            _gradients(reference.soft_reconstruct, book, candidates, logits, grad),
        ):
            assert torch.allclose(ours, twins, atol=1e-5)

    def test_the_package_uses_the_kernels(self, cuda, without_twins):
        x, codewords = _data(30, 4, 16)
        assert kernels.assign(x.bfloat16(), codewords).tolist() == cuda.assign(x, codewords).tolist()
        assert torch.equal(kernels.nearest(x, codewords, 2), cuda.nearest(x, codewords, 2))
        counts = torch.bincount(cuda.assign(x, codewords), minlength=16)
        assert torch.equal(kernels.cluster_sums(x, codewords).counts, counts)
        book, candidates, logits, grad = _soft_data(30, 4, 16, 2)
        assert kernels.soft_reconstruct(book, candidates, logits).shape == grad.shape

    def test_the_package_leaves_to_the_twins_what_the_kernels_do_not_take(self, cuda, monkeypatch):
        for name in ("nearest", "soft_reconstruct"):
            monkeypatch.setattr(cuda, name, None)
        x, codewords = _data(10, 17, 4)
        assert kernels.assign(x, codewords).shape == (10,)
        assert kernels.nearest(x[:, :4].double(), codewords[:, :4], 2).shape == (10, 2)
        for d, n, dtype in ((17, 2, torch.uint8), (4, 17, torch.uint8), (4, 2, torch.uint16)):
            book, candidates, logits, grad = _soft_data(10, d, 8, n)
            assert kernels.soft_reconstruct(book, candidates.to(dtype), logits).shape == grad.shape
        book, candidates, logits, grad = _soft_data(10, 4, 8, 2)
        assert kernels.soft_reconstruct(book.double(), candidates, logits.double()).dtype == torch.float64
        torch.use_deterministic_algorithms(True)
        try:
            assert kernels.soft_reconstruct(book, candidates, logits).shape == grad.shape
        finally:
            torch.use_deterministic_algorithms(False)


def test_without_triton_the_twins_do_the_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "vqlib.kernels.cuda", raising=False)
    monkeypatch.delattr(kernels, "cuda", raising=False)
    assert kernels.back_end.__wrapped__("cuda") is None and kernels.back_end("mps") is None
