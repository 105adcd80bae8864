import pytest
import torch

from vqlib.quantizer.subvectors import join, split


def test_a_subvector_is_d_consecutive_inputs_of_one_output():
    weight = torch.arange(24.0).reshape(3, 8)
    x = split(weight, 4)
    assert x.shape == (6, 4)
    assert x[1].tolist() == [4, 5, 6, 7] and x[2].tolist() == [8, 9, 10, 11]
    assert torch.equal(join(x, (3, 8)), weight)


def test_a_width_that_d_does_not_divide_is_named():
    with pytest.raises(ValueError, match=r"in_features 1152 is not divisible by d=5 \(blocks.3.attn1.to_q\)"):
        split(torch.zeros(8, 1152), 5, "blocks.3.attn1.to_q")
    with pytest.raises(ValueError, match="do not fill"):
        join(torch.zeros(5, 4), (3, 8))
