"""The matrix products of linear layers, through whichever of the CPU's two libraries is the faster one.

torch hands float32 products on a CPU to MKL, and MKL keeps to AVX2 on processors that are not Intel's. There oneDNN,
which torch has too and calls for convolutions, makes the same product with AVX-512 in half the time: a linear layer over
tokens is a convolution of width 1. Elsewhere, and for rows that are no tokens, `F.linear` stays. `products_in` says in how
many bits a model's products are made.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqlib.config import PRODUCTS


def _processor() -> str:
    """The processor's vendor among other words: Linux's own list, elsewhere what Python knows."""
    listed = Path("/proc/cpuinfo")
    return listed.read_text().partition("\n\n")[0] if listed.exists() else platform.processor()


def _onednn_is_faster() -> bool:
    """Whether MKL leaves this processor's AVX-512 unused: it has it, torch was built with both libraries, it is AMD's."""
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return both and torch.backends.cpu.get_cpu_capability() == "AVX512" and "AuthenticAMD" in _processor()


ONEDNN_IS_FASTER = _onednn_is_faster()


@contextmanager
def products_in(name: str, device: torch.device) -> Iterator[None]:
    """Within the block matrix products and convolutions are made as `name` says, whatever torch is set to by default.

    "float32": all bits; "tf32": factors rounded to 10 bits of mantissa where the device has such products (NVIDIA, from
    the A100 on), else the same; "bfloat16": torch's autocast on the type of `device`. Parameters stay as they are. What
    `torch.set_float32_matmul_precision` or `fp32_precision` were set to does not count, and is so again afterwards; these are
    switches of the whole process: let no two threads ask for different products at once. ValueError for another name.
    """
    if name not in PRODUCTS:
        raise ValueError(f"products {name!r} are not one of {', '.join(PRODUCTS)}")
    with _float32_as("tf32" if name == "tf32" else "ieee"):
        half = name == "bfloat16"
        asked = half or torch.is_autocast_enabled(device.type)  # by a caller, against what `name` says
        with torch.autocast(device.type, torch.bfloat16, enabled=half) if asked else nullcontext():
            yield


@contextmanager
def _float32_as(precision: str) -> Iterator[None]:
    """Factors of float32 products on GPUs in "tf32" or, like those of oneDNN on CPUs anyway, in full: "ieee".

    torch keeps this in switches of two generations and raises RuntimeError where the older are read and disagree with the newer:
    both are set, the older first, and both are given back as they were found.
    """
    backends = torch.backends
    gpu = backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn
    cpu = backends.mkldnn.matmul, backends.mkldnn.conv
    before = [(switch, switch.fp32_precision) for switch in (*gpu, *cpu)]
    older = _older()
    backends.cuda.matmul.allow_tf32 = backends.cudnn.allow_tf32 = precision == "tf32"
    for switch in (*gpu, *cpu):
        switch.fp32_precision = "ieee" if switch in cpu else precision
    try:
        yield
    finally:
        matmul, convolution = older
        torch.set_float32_matmul_precision(matmul)
        backends.cudnn.allow_tf32 = convolution
        for switch, found in before:
            switch.fp32_precision = found


def _older() -> tuple[str, bool]:
    """The older switches, of matrix products and of convolutions; torch's own defaults where the newer say something else."""
    matmul, convolution = "highest", True
    with suppress(RuntimeError):
        matmul = torch.get_float32_matmul_precision()
    with suppress(RuntimeError):
        convolution = torch.backends.cudnn.allow_tf32
    return matmul, convolution


def products_now(device: torch.device) -> tuple:
    """What tells products on `device` that are made now from those of another precision."""
    if torch.is_autocast_enabled(device.type):
        return (torch.get_autocast_dtype(device.type),)
    backends = torch.backends
    return ((backends.cuda if device.type == "cuda" else backends.mkldnn).matmul.fp32_precision,)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] · weight [out, in]ᵀ + bias [out] -> [..., out], differentiable; as `F.linear` but for rounding.

    An image's rows do not depend on the other images of a batch x [R, tokens, in].
    """
    if torch.compiler.is_compiling() or not x.dtype == weight.dtype == torch.float32:
        return F.linear(x, weight, bias)
    if not (ONEDNN_IS_FASTER and x.dim() == 3 and x.numel() and x.device.type == "cpu") or torch.is_autocast_enabled(
        "cpu"
    ):
        return F.linear(x, weight, bias)
    image = x.transpose(1, 2).unsqueeze(-1)  # [R, tokens, in] -> [R, in, tokens, 1], channels last
    kernel = weight[:, :, None, None]  # [out, in] -> [out, in, 1, 1]
    product = torch.mkldnn_convolution(image, kernel, bias, padding=(0, 0), stride=(1, 1), dilation=(1, 1), groups=1)
    return product.squeeze(-1).transpose(1, 2)  # [R, out, tokens, 1] -> [R, tokens, out]


class DenseLinear(nn.Linear):
    """An nn.Linear whose product is `linear`."""

    @classmethod
    def of(cls, layer: nn.Linear) -> DenseLinear:
        """The same layer, with the same parameters and not copies of them."""
        dense = cls(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        dense.weight, dense.bias = layer.weight, layer.bias
        return dense.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return linear(x, self.weight, self.bias)
