"""A linear layer's product by either library: the same numbers, the same gradients, no dependence on the batch."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vqlib.kernels import products
from vqlib.kernels.products import DenseLinear, linear, products_in


@pytest.fixture(params=[False, True], ids=["MKL", "oneDNN"], autouse=True)
def library(request, monkeypatch):
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch was built without oneDNN")
    monkeypatch.setattr(products, "ONEDNN_IS_FASTER", request.param)


def tensors(*shape: int, out: int = 24):
    generator = torch.Generator().manual_seed(0)
    shapes = (shape, (out, shape[-1]), (out,))
    return [torch.randn(s, generator=generator).requires_grad_() for s in shapes]


@pytest.mark.parametrize("shape", [(3, 16, 32), (1, 1, 32), (2, 5, 1), (8, 256, 64), (7, 32), (2, 2, 2, 8)])
def test_product_and_gradients_are_those_of_the_definition(shape):
    x, weight, bias = tensors(*shape)
    product = linear(x, weight, bias)
    slow = (x.double() @ weight.double().T + bias.double()).float()
    torch.testing.assert_close(product, slow, rtol=1e-5, atol=1e-4)
    pull = torch.randn(product.shape, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad(product, (x, weight, bias), pull)
    for own, expected in zip(got, torch.autograd.grad(slow, (x, weight, bias), pull), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-3)


def test_without_a_bias_and_in_other_precisions():
    x, weight, _ = tensors(2, 16, 32)
    torch.testing.assert_close(linear(x, weight), x @ weight.T, rtol=1e-5, atol=1e-5)
    half = x.bfloat16(), weight.bfloat16()
    assert torch.equal(linear(*half), F.linear(*half))


def test_an_input_that_is_not_contiguous():
    x, weight, bias = tensors(2, 32, 16)
    wide = torch.randn(24, 32)
    torch.testing.assert_close(
        linear(x.transpose(1, 2), wide, bias), x.transpose(1, 2) @ wide.T + bias, rtol=1e-5, atol=1e-5
    )


def test_rows_of_an_image_do_not_depend_on_the_batch():
    x, weight, bias = tensors(40, 16, 192, out=768)
    with torch.inference_mode():
        whole = linear(x, weight, bias)
        assert all(torch.equal(linear(x[:count], weight, bias), whole[:count]) for count in (4, 8, 13))


def test_a_dense_linear_shares_the_parameters_of_the_layer_it_stands_for():
    layer = nn.Linear(32, 24).eval().requires_grad_(False)
    dense = DenseLinear.of(layer)
    assert dense.weight is layer.weight and dense.bias is layer.bias and not dense.training
    assert list(dense.state_dict()) == list(layer.state_dict()) and isinstance(dense, nn.Linear)
    x = torch.randn(2, 16, 32)
    torch.testing.assert_close(dense(x), layer(x), rtol=1e-5, atol=1e-5)
    assert DenseLinear.of(nn.Linear(32, 24, bias=False)).bias is None


CPU = torch.device("cpu")


def test_products_in_half_precision_are_those_of_rounded_factors():
    x, weight, bias = tensors(2, 16, 32)
    with products_in("bfloat16", CPU):
        product = linear(x, weight, bias)
    rounded = x.bfloat16() @ weight.bfloat16().T + bias.bfloat16()
    assert product.dtype == torch.bfloat16
    torch.testing.assert_close(product, rounded, rtol=2**-7, atol=2**-7)
    gradients = torch.autograd.grad(product.sum(), (x, weight, bias))
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    exact = torch.autograd.grad(linear(x, weight, bias).sum(), (x, weight, bias))
    for own, expected in zip(gradients, exact, strict=True):
        assert (own - expected).norm() < 0.01 * expected.norm()


def test_the_precision_ends_with_its_block():
    x, weight, bias = tensors(2, 16, 32)
    exact = linear(x, weight, bias)
    with pytest.raises(KeyError), products_in("bfloat16", CPU):
        assert not torch.equal(linear(x, weight, bias), exact)
        with products_in("float32", CPU):
            assert torch.equal(linear(x, weight, bias), exact)
        raise KeyError
    assert torch.equal(linear(x, weight, bias), exact)
