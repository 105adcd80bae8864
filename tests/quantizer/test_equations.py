"""Eq. 5–10 of the paper on numbers small enough for paper: values and gradients."""

import math

import pytest
import torch

from vqlib import kernels
from vqlib.calibrator.losses import block_loss
from vqlib.kernels import soft_reconstruct
from vqlib.quantizer.candidates import find_candidates
from vqlib.quantizer.soft import CandidateLinear


def gradient(function, tensor):
    tensor = tensor.clone().requires_grad_()
    function(tensor).backward()
    return tensor.grad


def ratio_gradient(kind, logits):
    """dL_r/dz of all logits [N, n]."""
    grad = torch.zeros_like(logits)
    kernels.add_ratio_gradient(kind, logits, grad, 1.0)
    return grad


def test_eq_5_takes_the_nearest_codewords_of_each_sub_vector():
    codewords = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 0.0], [0.0, 6.0]])
    found = find_candidates(
        torch.tensor([[0.9, 0.0], [0.0, 5.9]]), codewords, 3
    )  # ‖w − c‖: 0.9, 4.5, 0.1, 6.1 | 5.9, 3.6, 6.0, 0.1
    assert found.indices.tolist() == [[2, 0, 1], [3, 1, 0]]


def test_eq_6_ratios_are_the_softmax_of_the_logits():
    found = find_candidates(torch.zeros(1, 1), torch.tensor([[1.0], [2.0], [3.0]]), 3)
    found.logits[0] = torch.tensor([math.log(6.0), math.log(3.0), 0.0])
    assert found.ratios[0].tolist() == pytest.approx([0.6, 0.3, 0.1])


def test_eq_7_a_ratios_gradient_is_its_candidates_distance_from_the_mean():
    """ŵ = Σ r c; with dL/dŵ = g the logit's gradient is r_j · g·(c_j − ŵ), the codeword's r_j · g."""
    codewords, candidates = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0, 1]])
    logits = torch.tensor([[math.log(3.0), 0.0]])  # r = ¾, ¼; ŵ = (0.75, 0.5)
    g = torch.tensor([[4.0, 8.0]])
    by_logit = gradient(lambda z: (soft_reconstruct(codewords, candidates, z) * g).sum(), logits)
    assert by_logit[0].tolist() == pytest.approx([0.75 * (4 * 0.25 - 8 * 0.5), 0.25 * (-4 * 0.75 + 8 * 1.5)])
    by_codeword = gradient(lambda c: (soft_reconstruct(c, candidates, logits) * g).sum(), codewords)
    assert torch.allclose(by_codeword, torch.tensor([[3.0, 6.0], [1.0, 2.0]]))


def test_eq_8_pulls_the_student_to_the_teacher():
    student, teacher = torch.tensor([[1.0, 5.0]]), torch.tensor([[3.0, 5.0]])
    assert block_loss(student, teacher).item() == 2.0  # (4 + 0) / 2
    assert gradient(lambda out: block_loss(out, teacher), student).tolist() == [[-2.0, 0.0]]  # 2 (out − teacher) / 2


def test_eq_8_and_a_codeword_shared_by_opposite_wishes():
    """Two sub-vectors of one codeword that want to go opposite ways leave its gradient at 0: the paper's diagnosis."""
    found = find_candidates(torch.zeros(2, 1), torch.tensor([[0.0], [9.0]]), 1)
    layer = CandidateLinear(torch.nn.Parameter(torch.tensor([[0.0], [9.0]])), found, (2, 1))
    block_loss(layer(torch.ones(1, 1)), torch.tensor([[1.0, -1.0]])).backward()
    assert layer.codebook.grad.tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize("ratios", [[0.6, 0.3, 0.1], [0.9, 0.1]])
def test_eq_9_above_one_half_is_four_times_the_missing_ratio(ratios):
    """L = 4 (1 − r_1), so dL/dz_j = −4 r_1 (δ_1j − r_j), by N sub-vectors."""
    logits = torch.tensor([ratios, ratios]).log()
    assert kernels.ratio_loss("absolute", logits).item() == pytest.approx(4 * (1 - ratios[0]), abs=1e-5)
    expected = [-4 * ratios[0] * ((j == 0) - r) / 2 for j, r in enumerate(ratios)]
    assert ratio_gradient("absolute", logits)[0].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("n", [3, 4, 5, 8])
def test_eq_9_is_2_and_flat_while_no_ratio_passes_one_half(n):
    generator = torch.Generator().manual_seed(n)
    for logits in (torch.zeros(50, n), 0.1 * torch.randn(50, n, generator=generator)):
        assert logits.softmax(dim=1).max() <= 0.5
        assert kernels.ratio_loss("absolute", logits).item() == pytest.approx(2.0, abs=1e-5)
        assert ratio_gradient("absolute", logits).abs().max().item() < 1e-6


def test_eq_9_at_n_2_pushes_away_from_one_half_whichever_side_chance_takes():
    above = ratio_gradient("absolute", torch.tensor([[1e-3, 0.0]]))
    below = ratio_gradient("absolute", torch.tensor([[0.0, 1e-3]]))
    assert above[0].tolist() == pytest.approx([-1.0, 1.0], abs=1e-2)  # −4 · ½ · ½
    assert below[0].tolist() == pytest.approx([1.0, -1.0], abs=1e-2)
