"""VQLinear: the weight it stands for, what it refuses, and how it behaves under dtype, mode, sharing and compile."""

import copy

import pytest
import torch

from vqlib.kernels.products import linear
from vqlib.packed.layer import VQLinear


def layer(out=24, width=16, k=10, d=4, bias=True, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codewords = torch.randn(k, d, generator=generator)
    codes = torch.randint(0, k, (out * width // d,), generator=generator)
    b = torch.randn(out, generator=generator) if bias else None
    return VQLinear.from_assignments(codes, codewords, (out, width), b, scale), codes, codewords, b


@pytest.mark.parametrize("k", [2, 10, 64, 256, 1000])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_linear_layer_of_its_codewords(k, bias):
    packed, codes, codewords, b = layer(k=k, bias=bias, scale=0.5)
    weight = (0.5 * codewords)[codes].view(24, 16)
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(packed.weight(), weight) and torch.equal(packed.assignments(), codes)
    for mode in (packed, packed.materialize(), packed.release()):
        assert torch.equal(mode(x), linear(x, weight, b))
    with torch.inference_mode():
        assert torch.equal(packed(x), linear(x, weight, b))
    assert torch.equal(packed(x), linear(x, weight, b))  # the buffer made in inference mode serves outside of it


def test_kept_weights_of_a_layer_without_bias_are_not_rounded_to_its_codebooks_type():
    packed, codes, codewords, _ = layer(bias=False, scale=0.3)
    packed.codebook = packed.codebook.half()
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    rebuilt = packed(x)
    assert torch.equal(packed.materialize()(x), rebuilt)


def test_layers_of_different_size_share_the_buffer_without_disturbing_each_other():
    small, big = layer(out=8)[0], layer(out=64, seed=2)[0]
    x = torch.ones(1, 16)
    expected = [linear(x, m.weight(), m.bias) for m in (small, big)]
    for _ in range(2):
        assert all(torch.equal(m(x), y) for m, y in zip((small, big), expected, strict=True))


def test_gradients_reach_the_input_through_two_layers():
    first, second = layer(out=16, seed=1)[0], layer(out=16, seed=2)[0]
    x = torch.ones(1, 16, requires_grad=True)
    second(first(x)).sum().backward()
    torch.testing.assert_close(x.grad, (second.weight() @ first.weight()).sum(0, keepdim=True))


def test_moving_dtype_moves_codebook_and_bias_only():
    packed, codes, _, _ = layer(scale=0.3)
    packed.materialize(torch.float32).to(torch.float16)
    assert packed.codebook.dtype == packed.bias.dtype == packed.dense.dtype == torch.float16
    assert packed.scale.dtype == torch.float32 and float(packed.scale) == pytest.approx(0.3, abs=1e-7)
    assert packed.codes.dtype == torch.uint8 and torch.equal(packed.assignments(), codes)
    assert packed.release()(torch.ones(1, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_the_state_dict_holds_no_dense_weight_and_bits_are_reported():
    packed = layer(k=64, d=2, out=768, width=96)[0].materialize()
    assert set(packed.state_dict()) == {"codes", "codebook", "scale", "bias"}
    assert packed.codes.numel() == 768 * 96 // 2 * 6 // 8
    assert packed.bits_per_weight == pytest.approx(3 + 64 * 2 * 32 / (768 * 96))
    assert "k=64, d=2, bits_per_weight=3.056" in repr(packed)


def test_layers_made_from_one_codebook_hold_the_same_tensor():
    first, codes, codewords, _ = layer()
    second = VQLinear.from_assignments(codes, codewords, (24, 16))
    assert first.codebook is second.codebook is codewords
    pair = copy.deepcopy(torch.nn.ModuleList([first, second]))
    assert pair[0].codebook is pair[1].codebook


def test_compiled_in_one_graph_it_gives_the_same():
    packed = layer()[0]
    compiled = torch.compile(packed, backend="eager", fullgraph=True)
    x = torch.ones(3, 16)
    assert torch.equal(compiled(x), packed(x))


def test_errors_repeat_the_numbers():
    codewords, codes = torch.zeros(10, 4), torch.zeros(96, dtype=torch.int64)
    with pytest.raises(ValueError, match="in_features 18 is not divisible by d=4"):
        VQLinear(18, 8, True, d=4, k=16)
    with pytest.raises(ValueError, match=r"\[24, 16\] has 96 sub-vectors of d=4, got assignments of shape \[95\]"):
        VQLinear.from_assignments(codes[:95], codewords, (24, 16))
    with pytest.raises(ValueError, match="0 … 10 reach outside k=10"):
        VQLinear.from_assignments(codes.index_fill(0, torch.tensor([5]), 10), codewords, (24, 16))
    with pytest.raises(ValueError, match=r"out_features 24 needs a bias of that length, got \[23\]"):
        VQLinear.from_assignments(codes, codewords, (24, 16), torch.zeros(23))
