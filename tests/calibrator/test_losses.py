"""Eq. 7–9 against values computed by hand."""

import math

import pytest
import torch

from vqlib import kernels
from vqlib.calibrator.losses import add_ratio_gradients, block_loss
from vqlib.kernels import FROZEN_LOGIT, soft_reconstruct


def logits_of(*ratios):
    return torch.tensor(ratios).log().requires_grad_()


def test_soft_reconstruction_is_the_ratio_weighted_mean_of_candidates():
    codewords = torch.tensor([[0.0, 0.0], [2.0, 4.0], [6.0, -2.0]])
    w_hat = soft_reconstruct(codewords, torch.tensor([[1, 2]]), logits_of([0.25, 0.75]).detach())
    assert w_hat[0].tolist() == pytest.approx([5.0, -0.5])


def test_block_loss_is_the_mean_squared_difference():
    assert block_loss(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0])).item() == 2.5


@pytest.mark.parametrize(
    "ratios, value", [([0.5, 0.5], 2.0), ([0.9, 0.1], 0.4), ([0.4, 0.3, 0.3], 2.0), ([0.7, 0.2, 0.1], 1.2)]
)
def test_absolute_ratio_loss_by_hand(ratios, value):
    assert kernels.ratio_loss("absolute", logits_of(ratios)).item() == pytest.approx(value, abs=1e-5)
    assert kernels.ratio_loss("absolute", logits_of(ratios, ratios)).item() == pytest.approx(
        value, abs=1e-5
    )  # per sub-vector


@pytest.mark.parametrize("n", [3, 4, 8])
def test_absolute_ratio_loss_has_no_gradient_at_the_equal_start(n):
    logits = torch.zeros(7, n)
    logits.grad = torch.zeros(7, n)
    add_ratio_gradients(1.0, "absolute", [logits])
    assert logits.grad.abs().max().item() < 1e-7


def test_absolute_ratio_loss_pushes_the_winner_up_once_it_leads():
    logits = logits_of([0.6, 0.2, 0.2])
    logits.grad = torch.zeros_like(logits)
    add_ratio_gradients(1.0, "absolute", [logits])
    assert logits.grad[0, 0] < 0 < logits.grad[0, 1]


def test_quadratic_ratio_loss_leaves_frozen_rows_out():
    open_row = [math.log(0.75), math.log(0.25)]
    logits = torch.tensor([open_row, [0.0, FROZEN_LOGIT]])
    assert kernels.ratio_loss("quadratic", logits).item() == pytest.approx(2 * 0.75 * 0.25, abs=1e-6)
