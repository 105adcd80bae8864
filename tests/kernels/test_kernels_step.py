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
            function(x, parameter.grad, squares, 3e-2, 0.9, 1e-8)
            torch.testing.assert_close(x, parameter.data, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(squares, torchs.state[parameter]["square_avg"], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
def test_used_codewords_are_counted_once_each(dtype):
    candidates = torch.tensor([[0, 1], [2, 3], [1, 4], [5, 1]], dtype=dtype)
    winners = torch.tensor([1, 0, 0, 1], dtype=torch.uint8)
    for function in (kernels.used_codewords, reference.used_codewords):
        assert function(candidates, winners, 6) == 2  # codewords 1 and 2
    with pytest.raises(IndexError, match="k=5"):
        kernels.used_codewords(candidates, winners, 5)


def test_the_share_above_the_kth_largest_ratio_is_what_freezes():
    logits = 2 * torch.randn(20001, 3, generator=torch.Generator().manual_seed(0))
    largest = kernels.largest_ratios(logits)
    torch.testing.assert_close(largest, reference.largest_ratios(logits), rtol=1e-6, atol=0.0)
    threshold = largest.kthvalue(15001).values.item()
    assert kernels.settle_ratios(logits, threshold, freeze=True).frozen * 20001 == pytest.approx(5000, abs=3)
    assert (kernels.largest_ratios(logits) == 1.0).sum() == pytest.approx(5000, abs=3)


def test_ratios_of_frozen_sub_vectors_are_exactly_one_hot():
    codewords = torch.tensor([[1.0, 3.0], [1e30, -1e30]])
    logits = torch.tensor([[0.0, kernels.FROZEN_LOGIT]]).requires_grad_()
    mixed = kernels.soft_reconstruct(codewords, torch.tensor([[0, 1]]), logits)
    assert mixed.tolist() == [[1.0, 3.0]]
    assert torch.autograd.grad(mixed.sum(), logits)[0].tolist() == [[0.0, 0.0]]
