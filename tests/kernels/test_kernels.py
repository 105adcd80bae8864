"""The compiled kernels against their plain torch twins and against values computed by hand."""

import math

import pytest
import torch

from vqlib import kernels
from vqlib.kernels import cpu_search, reference


def _data(count, d, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, d, generator=generator), torch.randn(k, d, generator=generator)


def _soft_data(count, d, k, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codewords = torch.randn(k, d, generator=generator).requires_grad_()
    candidates = torch.randint(0, k, (count, n), generator=generator)
    logits = (3 * torch.randn(count, n, generator=generator)).requires_grad_()
    return codewords, candidates, logits, torch.randn(count, d, generator=generator)


@pytest.fixture
def threads():
    """Function that sets torch's number of threads; the old number comes back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def without_numba(monkeypatch):
    monkeypatch.setattr(kernels, "back_end", lambda device_type: None)


@pytest.mark.parametrize("d, k", [(2, 64), (3, 10), (4, 256), (8, 17)])
def test_assign_gives_the_nearest_codeword_but_for_near_ties(d, k):
    x, codewords = _data(2000, d, k)
    codes = kernels.assign(x, codewords)
    distances = torch.cdist(x.double(), codewords.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    chosen = distances.gather(1, codes[:, None])[:, 0]
    assert codes.dtype == torch.int64 and codes.shape == (2000,)
    assert (chosen - distances.min(dim=1).values).max() < 1e-5
    assert (codes != reference.assign(x, codewords)).float().mean() < 0.002


@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 20000])
def test_assign_handles_blocks_and_chunks_of_any_size(count):
    x, codewords = _data(count, 4, 16)
    exact = torch.round(x * 8) / 8, torch.round(codewords * 8) / 8  # exact in float32, so even ties must agree
    assert torch.equal(kernels.assign(*exact), reference.assign(*exact))


def test_assign_takes_the_first_of_equal_codewords():
    codewords = torch.tensor([[5.0, 5.0], [1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    x = torch.tensor([[0.9, 0.1], [0.0, 0.0]])
    assert kernels.assign(x, codewords).tolist() == [1, 1]
    assert reference.assign(x, codewords).tolist() == [1, 1]


@pytest.mark.parametrize("d, k", [(2, 64), (4, 256), (6, 100), (8, 17), (3, 1)])
@pytest.mark.parametrize("spread", [0.0, 0.05, 0.3, 3.0])
def test_a_guess_saves_the_search_and_changes_no_bit(d, k, spread):
    noise, codewords = _data(5000, d, k, seed=1)
    codewords[k // 2] = codewords[0]  # the first of equals is taken
    codewords[-1] *= 50
    guess = torch.arange(5000) % k
    x = codewords[guess] + spread * noise
    x[3], x[4] = float("nan"), float("inf")
    expected = kernels.assign(x, codewords)
    assert torch.equal(kernels.assign(x, codewords, guess), expected)
    assert torch.equal(kernels.assign(x, codewords, guess.to(torch.int32)), expected)
    assert torch.equal(kernels.assign(x, codewords, (guess + 1) % k), expected)
    near = torch.from_numpy(cpu_search._near(codewords))
    close = (x - codewords[guess]).square().sum(1) < near[guess]
    assert torch.equal(expected[close], guess[close])
    assert close.float().mean() > 0.8 or spread > 0.05 or d == 2
    with pytest.raises(IndexError, match="are not all in"):
        kernels.assign(x, codewords, guess + 1)
    with pytest.raises(ValueError, match=r"guess \[4999\] must be \[5000\]"):
        kernels.assign(x, codewords, guess[1:])


def test_a_point_half_way_between_two_codewords_is_searched_for():
    codewords = torch.tensor([[0.0, 0.0], [1.0, 0.0], [3.0, 0.0]])
    x = torch.tensor([[0.5, 0.0], [0.5 + 1e-6, 0.0], [0.5 - 1e-6, 0.0], [2.0, 0.0]]).repeat(5, 1)
    for guess in (0, 1, 2):
        found = kernels.assign(x, codewords, torch.full((20,), guess))
        assert torch.equal(found, kernels.assign(x, codewords))


def test_strided_and_half_precision_points_are_accepted():
    x, codewords = _data(500, 4, 16)
    wide = torch.cat([x, x], dim=1)[:, ::2]
    assert torch.equal(kernels.assign(wide, codewords), kernels.assign(wide.contiguous(), codewords))
    half = x.to(torch.bfloat16)
    assert torch.equal(kernels.assign(half, codewords), kernels.assign(half.float(), codewords))


@pytest.mark.parametrize("d, k, n", [(2, 64, 2), (4, 256, 3), (4, 7, 7), (8, 32, 8)])
def test_nearest_lists_distinct_codewords_by_distance(d, k, n):
    x, codewords = _data(700, d, k)
    found = kernels.nearest(x, codewords, n)
    distances = torch.cdist(x.double(), codewords.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    assert torch.allclose(distances.gather(1, found), distances.sort(dim=1).values[:, :n], atol=1e-5)
    assert all(len(set(row)) == n for row in found.tolist())
    assert torch.equal(found[:, 0], kernels.assign(x, codewords))


def test_nearest_orders_ties_by_index():
    x, codewords = torch.zeros(3, 2), torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, -1.0], [0.0, 2.0]])
    for function in (kernels.nearest, reference.nearest):
        assert function(x, codewords, 5).tolist() == [[1, 2, 3, 0, 4]] * 3


def test_nearest_refuses_more_candidates_than_codewords():
    x, codewords = _data(4, 2, 3)
    with pytest.raises(ValueError, match="n=4 .* k=3"):
        kernels.nearest(x, codewords, 4)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"\[5, 4\] and codewords \[3, 2\]"):
        kernels.assign(torch.zeros(5, 4), torch.zeros(3, 2))


def test_cluster_sums_agree_with_the_twin():
    x, codewords = _data(30000, 4, 37)
    got, wanted = kernels.cluster_sums(x, codewords), reference.cluster_sums(x, codewords)
    assert (got.counts - wanted.counts).abs().sum() <= 4 and got.counts.sum() == 30000
    codes = kernels.assign(x, codewords)
    exact = torch.zeros(37, 4, dtype=torch.float64).index_add_(0, codes, x.double())
    assert torch.allclose(got.sums, exact, rtol=1e-12, atol=1e-9)
    assert torch.equal(got.counts, torch.bincount(codes, minlength=37))
    assert torch.isclose(got.squares.sum(), x.double().square().sum(), rtol=1e-12)


def test_soft_reconstruct_by_hand():
    codewords = torch.tensor([[1.0, 0.0], [0.0, 2.0], [4.0, 4.0]])
    candidates, logits = torch.tensor([[0, 1], [2, 0]]), torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    expected = torch.tensor([[0.5, 1.0], [3.25, 3.0]])
    assert torch.allclose(kernels.soft_reconstruct(codewords, candidates, logits), expected, atol=1e-6)


@pytest.mark.parametrize(
    "dtype, d, n",
    [(torch.uint8, 4, 3), (torch.int16, 4, 3), (torch.int32, 4, 3), (torch.int64, 4, 3), (torch.int64, 2, 2)],
)
def test_soft_reconstruct_and_its_gradients_agree_with_autograd(dtype, d, n):
    codewords, candidates, logits, grad = _soft_data(9000, d, 100, n)
    got = kernels.soft_reconstruct(codewords, candidates.to(dtype), logits)
    wanted = reference.soft_reconstruct(codewords, candidates, logits)
    assert torch.allclose(got, wanted, atol=2e-6)
    for ours, theirs in zip(
        torch.autograd.grad(got, (codewords, logits), grad), torch.autograd.grad(wanted, (codewords, logits), grad)
    ):
        assert ours.dtype == torch.float32 and torch.allclose(ours, theirs, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("n", [1, 3, 8])
def test_soft_reconstruct_gradients_match_finite_differences(n):
    codewords, candidates, logits, grad = _soft_data(6, 4, 5, n)
    loss = lambda c, z: (kernels.soft_reconstruct(c, candidates, z) * grad).double().sum()  # noqa: E731
    analytic = torch.autograd.grad(loss(codewords, logits), (codewords, logits))
    for position, tensor in enumerate((codewords, logits)):
        for index in range(tensor.numel()):
            step = torch.zeros(tensor.numel())
            step[index] = 1e-2
            args = [[codewords.detach(), logits.detach()] for _ in range(2)]
            args[0][position] = args[0][position] + step.view_as(tensor)
            args[1][position] = args[1][position] - step.view_as(tensor)
            slope = (loss(*args[0]) - loss(*args[1])) / 2e-2
            assert abs(slope - analytic[position].flatten()[index]) < 2e-3


def test_one_candidate_needs_no_logits():
    codewords, candidates, _, grad = _soft_data(20000, 4, 256, 1)
    got = kernels.soft_reconstruct(codewords, candidates.to(torch.uint8), None)
    assert torch.equal(got, codewords[candidates[:, 0]])
    (ours,) = torch.autograd.grad(got, codewords, grad)
    exact = torch.zeros(256, 4, dtype=torch.float64).index_add_(0, candidates[:, 0], grad.double())
    assert torch.allclose(ours.double(), exact, atol=1e-4)


def test_extreme_logits_give_a_hard_choice_without_overflow():
    codewords, candidates = torch.tensor([[1.0], [7.0]]), torch.tensor([[0, 1], [0, 1], [0, 1]])
    logits = torch.tensor([[1e6, -1e6], [-torch.inf, 0.0], [200.0, 300.0]])
    assert kernels.soft_reconstruct(codewords, candidates, logits)[:, 0].tolist() == [1.0, 7.0, 7.0]


def test_logits_that_are_not_numbers_show_in_the_result():
    codewords, candidates = torch.tensor([[1.0], [7.0]]), torch.tensor([[0, 1]])
    assert kernels.soft_reconstruct(codewords, candidates, torch.tensor([[0.0, torch.nan]])).isnan().all()


@pytest.mark.parametrize("bad", [-1, 100])
def test_candidates_outside_the_codebook_are_refused(bad):
    codewords, candidates, logits, _ = _soft_data(9000, 4, 100, 2)
    candidates[8500, 1] = bad
    with pytest.raises(IndexError, match=f"{bad}.* of sub-vector 8500 .* k=100"):
        kernels.soft_reconstruct(codewords, candidates, logits)


def test_missing_or_misshapen_logits_are_refused():
    codewords, candidates, logits, _ = _soft_data(10, 4, 8, 3)
    for wrong in (None, logits[:, :2], logits[:5]):
        with pytest.raises(ValueError, match=r"do not fit candidates \[10, 3\]"):
            kernels.soft_reconstruct(codewords, candidates, wrong)


def test_results_do_not_depend_on_the_number_of_threads(threads):
    codewords, candidates, logits, grad = _soft_data(50000, 4, 256, 3)
    x, _ = _data(50000, 4, 1)
    results = []
    for count in (1, 3):
        threads(count)
        mixed = kernels.soft_reconstruct(codewords, candidates, logits)
        gradients = torch.autograd.grad(mixed, (codewords, logits), grad)
        sums = kernels.cluster_sums(x, codewords)
        results.append([mixed.detach(), *gradients, *sums, kernels.assign(x, codewords)])
    assert all(torch.equal(one, three) for one, three in zip(*results))


def _settled(module, *arguments):
    return kernels.RatioStatistics.of(module.settle_ratios(*arguments).tolist())


def test_ratio_statistics_by_hand():
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0], [0.0, 30.0], [0.0, -30.0]])
    result = _settled(kernels, logits, torch.tensor([[0, 1], [2, 1], [3, 4], [0, 4]]), 6)
    assert result.histogram[10] == 1 and result.histogram[-1] == 2 and sum(result.histogram) == 4
    entropy = (math.log(2.0) - 0.75 * math.log(0.75) - 0.25 * math.log(0.25)) / 4
    assert result.entropy == pytest.approx(entropy, abs=1e-6)
    assert result.winners_not_first == 0.25 and result.frozen == 0.5
    assert result.absolute == pytest.approx((2.0 + 1.0) / 4) and result.quadratic == pytest.approx((0.5 + 0.375) / 4)
    assert result.used == 3  # codewords 0, 2 and 4


@pytest.mark.parametrize("n", [1, 2, 3, 8])
@pytest.mark.parametrize("freeze", [False, True])
def test_settled_ratios_agree_with_the_twin(n, freeze):
    logits = 2 * torch.randn(20001, n, generator=torch.Generator().manual_seed(n))
    logits[5] = torch.tensor([kernels.FROZEN_LOGIT] * (n - 1) + [0.0])
    mine, twins, before = logits.clone(), logits.clone(), logits.clone()
    candidates = torch.randint(0, 200, logits.shape, generator=torch.Generator().manual_seed(n), dtype=torch.uint8)
    got = _settled(kernels, mine, candidates, 256, 0.9, freeze)
    wanted = _settled(reference, twins, candidates, 256, torch.tensor(0.9), freeze)
    moved = sum(abs(a - b) for a, b in zip(got.histogram, wanted.histogram, strict=True))
    assert moved <= 8  # a ratio on the border of two bins may round either way
    assert got.entropy == pytest.approx(wanted.entropy, abs=1e-5)
    assert got.winners_not_first == wanted.winners_not_first and got.used == wanted.used == 200
    assert got.frozen == pytest.approx(wanted.frozen, abs=1e-3)
    assert (got.absolute, got.quadratic) == pytest.approx((wanted.absolute, wanted.quadratic), rel=1e-5)
    assert torch.equal(mine, before) is not freeze
    assert (mine != twins).any(dim=1).sum() <= 4  # a ratio on the threshold


def test_freezing_makes_rows_one_hot_and_leaves_the_others():
    logits = torch.tensor([[5.0, 0.0, 0.0], [0.2, 0.0, 0.1]])
    candidates = torch.zeros(2, 3, dtype=torch.uint8)
    assert _settled(kernels, logits, candidates, 1, 0.9, True).frozen == 0.5
    assert logits.softmax(dim=1)[0].tolist() == [1.0, 0.0, 0.0] and logits[1].tolist() == pytest.approx([0.2, 0.0, 0.1])
    assert _settled(kernels, logits, candidates, 1, 1.0, True).frozen == 0.5  # frozen once, frozen for good


@pytest.mark.parametrize("kind", ["absolute", "quadratic"])
@pytest.mark.parametrize("n", [2, 3, 8])
def test_ratio_loss_and_its_gradient_agree_with_the_twin(kind, n):
    logits = 2 * torch.randn(20001, n, generator=torch.Generator().manual_seed(n))
    logits[::7] = torch.tensor([kernels.FROZEN_LOGIT] * (n - 1) + [0.0])
    z = logits.clone().requires_grad_()
    value = reference.ratio_loss(kind, z)
    (3.0 * value).backward()
    grad = torch.zeros_like(logits)
    kernels.add_ratio_gradient(kind, logits, grad, 3.0)
    assert kernels.ratio_loss(kind, logits).item() == pytest.approx(value.item(), rel=1e-5)
    assert torch.allclose(grad, z.grad, rtol=1e-4, atol=1e-9)
    assert grad[::7].abs().max() == 0


def test_everything_works_without_numba(without_numba):
    x, codewords = _data(300, 4, 16)
    assert torch.equal(kernels.nearest(x, codewords, 3), reference.nearest(x, codewords, 3))
    book, candidates, logits, grad = _soft_data(300, 4, 16, 3)
    mixed = kernels.soft_reconstruct(book, candidates, logits)
    assert torch.autograd.grad(mixed, logits, grad)[0].shape == (300, 3)
    settled = _settled(kernels, torch.zeros(300, 1), candidates[:, :1], 16)
    assert sum(settled.histogram) == 300 and settled.used == len(candidates[:, 0].unique())
    before, grad = logits.detach().clone(), torch.zeros_like(logits)
    kernels.add_ratio_gradient("quadratic", logits, grad, 1.0)
    kernels.rmsprop_step(logits, grad, torch.zeros_like(grad), 5e-2, 0.99, 1e-8, torch.ones(()))
    assert grad.any() and not torch.equal(logits, before)


def test_the_twins_bound_their_memory_by_chunks(monkeypatch):
    x, codewords = _data(1000, 4, 16)
    whole = reference.nearest(x, codewords, 3)
    monkeypatch.setattr(reference, "_SCORES_PER_CHUNK", 100)
    assert torch.equal(reference.nearest(x, codewords, 3), whole)
    assert torch.equal(reference.assign(x, codewords), whole[:, 0])


def test_double_precision_stays_double():
    book, candidates, logits, _ = _soft_data(50, 4, 8, 2)
    assert kernels.soft_reconstruct(book.double(), candidates, logits.double()).dtype == torch.float64
