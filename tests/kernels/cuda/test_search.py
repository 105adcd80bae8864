import pytest
import torch

from vqlib import kernels
from vqlib.kernels import reference


@pytest.mark.parametrize("count, d, k", [(0, 4, 9), (1, 2, 2), (33, 1, 3), (64, 3, 65), (70, 4, 300), (40, 16, 32)])
def test_assign_agrees_with_the_twin(cuda, data, count, d, k):
    x, codewords = data(count, d, k)
    codes = cuda.assign(x, codewords)
    assert codes.dtype == torch.int64 and torch.equal(codes, reference.assign(x, codewords))


@pytest.mark.parametrize("d, k, n", [(1, 5, 5), (2, 2, 2), (3, 40, 4), (4, 300, 3), (8, 33, 8)])
def test_nearest_agrees_with_the_twin(cuda, data, d, k, n):
    x, codewords = data(37, d, k)
    assert torch.equal(cuda.nearest(x, codewords, n), reference.nearest(x, codewords, n))


def test_nearest_finds_all_but_near_ties_where_scores_are_rounded(cuda, device):
    x, codewords = (torch.randn(count, 4, generator=torch.Generator().manual_seed(count)) for count in (50, 70))
    x, codewords = x.to(device), codewords.to(device)
    found = cuda.nearest(x, codewords, 3)
    distances = torch.cdist(x.double(), codewords.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    assert torch.allclose(distances.gather(1, found), distances.sort(dim=1).values[:, :3], atol=1e-5)
    assert all(len(set(row)) == 3 for row in found.tolist())


def test_equal_codewords_come_in_the_order_of_their_indices(cuda, device):
    codewords = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, -1.0], [0.0, 2.0]]).to(device)
    x = torch.zeros(3, 2, device=device)
    assert cuda.nearest(x, codewords, 5).tolist() == [[1, 2, 3, 0, 4]] * 3
    far = codewords[[0, 4] * 20 + [2, 0, 1, 2] + [0] * 30 + [1, 2]]  # ties within a block of codewords and across
    assert cuda.nearest(x, far, 5).tolist() == [[40, 42, 43, 74, 75]] * 3
    assert cuda.assign(x, far).tolist() == [40] * 3


def test_points_and_codewords_that_are_not_numbers_stay_inside_the_codebook(cuda, device):
    x, codewords = torch.tensor([[torch.nan], [1.0]]).to(device), torch.tensor([[torch.nan], [3.0]]).to(device)
    assert cuda.assign(x, codewords).tolist() == [0, 1]


@pytest.mark.parametrize("count, d, k", [(0, 4, 3), (1, 1, 1), (3000, 4, 9), (500, 3, 70), (300, 16, 5)])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e15])
def test_sums_of_a_pass_are_the_twins_and_the_same_every_time(cuda, device, count, d, k, size):
    generator = torch.Generator().manual_seed(count)
    x = (size * torch.randn(count, d, generator=generator)).to(device)
    codewords = (size * torch.randn(k, d, generator=generator)).to(device)
    got, wanted = cuda.cluster_sums(x, codewords), reference.cluster_sums(x, codewords, cuda.assign)
    assert torch.equal(got.counts, wanted.counts)
    assert all(a.dtype == torch.float64 and a.shape == b.shape for a, b in zip(got[::2], wanted[::2], strict=True))
    torch.testing.assert_close(got.sums / size, wanted.sums / size, rtol=1e-9, atol=1e-6)
    torch.testing.assert_close(got.squares / size**2, wanted.squares / size**2, rtol=1e-9, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(got, cuda.cluster_sums(x, codewords), strict=True))


def test_strided_points_are_accepted(cuda, data):
    x, codewords = data(30, 4, 16)
    wide, tall = torch.cat([x, x], dim=1)[:, ::2], torch.cat([codewords, codewords], dim=1)[:, ::2]
    assert torch.equal(cuda.nearest(wide, tall, 2), reference.nearest(wide, tall, 2))


def test_the_package_uses_the_search(cuda, data, monkeypatch):
    x, codewords = data(30, 4, 16)
    expected, codes = reference.nearest(x, codewords, 2), reference.assign(x, codewords)
    for name in ("assign", "nearest", "cluster_sums"):
        monkeypatch.setattr(reference, name, None)
    assert torch.equal(kernels.assign(x.bfloat16(), codewords), codes)
    assert torch.equal(kernels.nearest(x, codewords, 2), expected)
    assert torch.equal(kernels.cluster_sums(x, codewords).counts, torch.bincount(codes, minlength=16))


def test_the_package_leaves_to_the_twins_what_the_search_does_not_take(cuda, data, monkeypatch):
    monkeypatch.setattr(cuda, "nearest", None)
    x, codewords = data(10, 17, 4)
    assert kernels.assign(x, codewords).shape == (10,)
    assert kernels.nearest(x[:, :4].double(), codewords[:, :4], 2).shape == (10, 2)


@pytest.mark.parametrize("count, d, k", [(0, 4, 3), (70, 4, 9), (3000, 3, 40)])
def test_layers_of_one_shape_give_together_the_bits_that_each_gives_alone(cuda, device, count, d, k):
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(3, count, d, generator=generator) * torch.tensor([1.0, 1e-3, 40.0])[:, None, None]
    x, codewords = x.to(device), torch.randn(3, k, d, generator=generator).to(device)
    codes, sums = kernels.assign(x, codewords), kernels.cluster_sums(x, codewords)
    for layer in range(3):
        assert torch.equal(codes[layer], kernels.assign(x[layer], codewords[layer]))
        alone = kernels.cluster_sums(x[layer], codewords[layer])
        assert all(torch.equal(part[layer], own) for part, own in zip(sums, alone, strict=True))
