import math

import pytest
import torch

from vqlib.candidates import find_candidates


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
