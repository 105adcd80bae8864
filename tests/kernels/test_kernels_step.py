"""A calibration step on the logits: ratio gradient, RMSprop, what is frozen and used; compiled and as plain twins."""

import pytest
import torch

from vqlib import kernels
from vqlib.kernels import reference


@pytest.mark.parametrize("kind", ["absolute", "quadratic"])
def test_the_ratio_gradient_is_added_to_what_is_there(kind):
    logits = 2 * torch.randn(20001, 3, generator=torch.Generator().manual_seed(0))
    logits[::7] = torch.tensor([0.0, kernels.FROZEN_LOGIT, kernels.FROZEN_LOGIT])
    leaf = logits.clone().requires_grad_()
    (0.5 * reference.ratio_loss(kind, leaf)).backward()
    for function in (kernels.add_ratio_gradient, reference.add_ratio_gradient):
        grad = torch.ones_like(logits)
        function(kind, logits, grad, 0.5)
        torch.testing.assert_close(grad - 1.0, leaf.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("shape", [(7,), (30001, 3)])
def test_a_step_of_rmsprop_is_torchs_but_for_rounding(shape):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator)
    parameter = torch.nn.Parameter(values.clone())
    torchs = torch.optim.RMSprop([parameter], lr=3e-2, alpha=0.9)
    twins = [(values.clone(), torch.zeros(shape)) for _ in range(2)]
    for _ in range(3):
        parameter.grad = torch.randn(shape, generator=generator)
        torchs.step()
        for function, (x, squares) in zip((kernels.rmsprop_step, reference.rmsprop_step), twins, strict=True):
            function(x, parameter.grad, squares, 3e-2, 0.9, 1e-8, torch.ones(()))
            torch.testing.assert_close(x, parameter.data, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(squares, torchs.state[parameter]["square_avg"], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_no_step_of_rmsprop_follows_a_loss_that_is_not_finite(loss):
    for function in (kernels.rmsprop_step, reference.rmsprop_step):
        values = torch.ones(30)
        function(values, torch.full((30,), torch.nan), torch.zeros(30), 3e-2, 0.9, 1e-8, torch.tensor(loss))
        assert torch.equal(values, torch.ones(30))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
def test_used_codewords_are_counted_once_each(dtype):
    candidates = torch.tensor([[0, 1], [2, 3], [1, 4], [5, 1]], dtype=dtype)
    logits = torch.tensor([[0.0, 9.0], [9.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    for function in (kernels.settle_ratios, reference.settle_ratios):
        row = function(logits, candidates, 6, 0.9, False).tolist()
        assert kernels.RatioStatistics.of(row).used == 2  # codewords 1 and 2
    with pytest.raises(IndexError, match="k=5"):
        kernels.settle_ratios(logits, candidates, 5)


def test_the_limit_is_the_largest_ratio_of_that_rank_and_what_is_above_it_freezes():
    logits = 2 * torch.randn(20001, 3, generator=torch.Generator().manual_seed(0))
    candidates, largest = torch.zeros(20001, 3, dtype=torch.uint8), logits.softmax(dim=1).amax(dim=1)
    for function in (kernels.ratio_limit, reference.ratio_limit):
        assert function(logits, 15001).item() == pytest.approx(largest.sort().values[15000].item(), rel=1e-6)
    limit = kernels.ratio_limit(logits, 15001)
    for expected in (0, 1):  # what froze is above every limit
        row = kernels.settle_ratios(logits, candidates, 1, limit, freeze=True).tolist()
        assert kernels.RatioStatistics.of(row).frozen * 20001 == 5000, expected
    with pytest.raises(ValueError, match="rank 0 is outside 1 … 20001"):
        kernels.ratio_limit(logits, 0)


@pytest.mark.parametrize("seed, n", [(5, 4), (12, 4), (16, 2)])  # whose last bits fell apart
def test_the_twins_limit_freezes_what_is_above_it_and_no_equal_row(seed, n):
    logits = torch.randn(1000, n, generator=torch.Generator().manual_seed(seed))
    candidates = torch.zeros(1000, n, dtype=torch.uint8)
    for z in (logits, logits[:1].expand(1000, n).contiguous()):
        largest = reference.largest_ratios(z)
        limit = reference.ratio_limit(z, 500)
        frozen = reference.settle_ratios(z, candidates, 1, limit, False)[2].item()
        assert frozen == (largest > limit).double().mean().item() <= 0.5


def test_ratios_of_frozen_sub_vectors_are_exactly_one_hot():
    codewords = torch.tensor([[1.0, 3.0], [1e30, -1e30]])
    logits = torch.tensor([[0.0, kernels.FROZEN_LOGIT]]).requires_grad_()
    mixed = kernels.soft_reconstruct(codewords, torch.tensor([[0, 1]]), logits)
    assert mixed.tolist() == [[1.0, 3.0]]
    assert torch.autograd.grad(mixed.sum(), logits)[0].tolist() == [[0.0, 0.0]]
