"""Checks of the Triton kernels against their plain torch twins: on the GPU, or, where there is none, in Triton's interpreter.

Triton decides while it is imported, for the whole process, whether kernels are compiled or interpreted: without a GPU,
TRITON_INTERPRET=1 pytest tests/kernels/cuda runs these, and so does tests/kernels/test_kernels_cuda.py.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
collect_ignore_glob = [] if ON_GPU or INTERPRETED else ["test_*.py"]


@pytest.fixture(scope="session")
def device():
    return "cuda" if ON_GPU else "cpu"


@pytest.fixture
def cuda(monkeypatch):
    """The back end; `kernels` uses it for whatever device the tensors are on."""
    from vqlib import kernels
    from vqlib.kernels import cuda

    monkeypatch.setattr(kernels, "back_end", lambda device_type: cuda)
    return cuda


@pytest.fixture
def data(device):
    """Points and codewords that are multiples of 1/8: their scores are exact in float32, so even ties must agree."""

    def make(count, d, k, seed=0):
        generator = torch.Generator().manual_seed(seed)
        points, codewords = torch.randn(count, d, generator=generator), torch.randn(k, d, generator=generator)
        return (points * 8).round().div(8).to(device), (codewords * 8).round().div(8).to(device)

    return make


@pytest.fixture
def soft_data(device):
    """Codewords [k, d], candidates [N, n], logits [N, n] and a gradient [N, d]."""

    def make(count, d, k, n, seed=0):
        generator = torch.Generator().manual_seed(seed)
        codewords = torch.randn(k, d, generator=generator)
        candidates = torch.randint(0, k, (count, n), generator=generator)
        logits, grad = 3 * torch.randn(count, n, generator=generator), torch.randn(count, d, generator=generator)
        return codewords.to(device), candidates.to(device), logits.to(device), grad.to(device)

    return make
