import math

import pytest
import torch

from vqlib.quantizer.candidates import find_candidates


def test_candidates_are_the_nearest_codewords_in_order():
    codewords = torch.tensor([[0.0], [1.0], [3.0], [10.0]])
    found = find_candidates(torch.tensor([[0.9], [9.0]]), codewords, 3)
    assert found.indices.tolist() == [[1, 0, 2], [3, 2, 1]]
    assert found.indices.dtype == torch.uint8


def test_equal_start_gives_every_candidate_one_nth():
    found = find_candidates(torch.randn(5, 2), torch.randn(9, 2), 3)
    assert torch.allclose(found.ratios, torch.full((5, 3), 1 / 3))


def test_distance_start_makes_ratios_inversely_proportional_to_distance():
    found = find_candidates(torch.tensor([[0.0]]), torch.tensor([[1.0], [3.0]]), 2, "distance")
    assert found.ratios[0].tolist() == pytest.approx([0.75, 0.25], abs=1e-4)
    assert found.logits[0, 0].item() == pytest.approx(math.log(3), abs=1e-4)


def test_leading_start_gives_the_nearest_nine_tenths_and_the_others_the_rest():
    for n in (2, 3):
        found = find_candidates(torch.randn(5, 2), torch.randn(9, 2), n, "leading")
        assert torch.allclose(found.ratios[:, 0], torch.full((5,), 0.9))
        assert torch.allclose(found.ratios[:, 1:], torch.full((5, n - 1), 0.1 / (n - 1)))
    with pytest.raises(
        ValueError, match="ratio start 'leader' is not one of 'equal', 'distance', 'least-squares', 'leading'"
    ):
        find_candidates(torch.randn(5, 2), torch.randn(9, 2), 2, "leader")


def test_least_squares_start_reconstructs_a_point_between_its_candidates():
    codewords = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    found = find_candidates(torch.tensor([[1.5, 1.0]]), codewords, 3, "least-squares")
    assert found.indices.tolist() == [[0, 1, 2]]
    assert found.ratios[0].tolist() == pytest.approx([0.375, 0.375, 0.25], abs=0.01)


def test_least_squares_start_of_two_is_the_foot_of_the_perpendicular_and_outside_the_segment_its_end():
    codewords = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    found = find_candidates(torch.tensor([[0.5, 9.0], [-3.0, 1.0]]), codewords, 2, "least-squares")
    assert found.ratios[0].tolist() == pytest.approx([0.75, 0.25], abs=1e-3)
    assert found.ratios[1].tolist() == pytest.approx([1 / (1 + math.exp(-6)), 1 / (1 + math.exp(6))], abs=1e-6)


@pytest.mark.parametrize("n, optimum", [(2, 1.001), (3, 1.02), (4, 1.08)])
def test_least_squares_start_is_close_to_the_optimum_on_the_simplex(n, optimum):
    draw = torch.Generator().manual_seed(0)
    codewords, x = torch.randn(256, 4, generator=draw), torch.randn(40, 4, generator=draw)
    found = find_candidates(x, codewords, n, "least-squares")
    members = codewords[found.indices.long()]  # [N, n, d]
    error = ((found.ratios.unsqueeze(2) * members).sum(1) - x).square().sum(1)
    z = found.logits.double().clone().requires_grad_()
    solver = torch.optim.LBFGS(
        [z], max_iter=500, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss():
        solver.zero_grad()
        value = ((z.softmax(1).unsqueeze(2) * members).sum(1) - x).square().sum()
        value.backward()
        return value

    solver.step(loss)
    assert error.sum().item() <= optimum * loss().item()
    assert error.sum() < 0.9 * (members[:, 0] - x).square().sum()  # less than the nearest codeword leaves


def test_least_squares_start_survives_candidates_that_are_the_same():
    found = find_candidates(torch.randn(3, 2), torch.ones(4, 2), 3, "least-squares")
    assert torch.allclose(found.ratios, torch.full((3, 3), 1 / 3), atol=0.05)
