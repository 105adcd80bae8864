import pytest
import torch
from pretend import NAME, PretendGPU
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

if not torch.cuda.is_available():  # before autograd counts its devices; beside CUDA it would take the other's place
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME)


@pytest.fixture
def gpu(monkeypatch):
    """The device, within it; `gpu.move(module)` puts a module's tensors on it."""
    monkeypatch.setattr(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)
    pretended, fake = PretendGPU(), FakeTensorMode(allow_non_fake_inputs=True)
    monkeypatch.setattr(FakeTensor, "tolist", lambda tensor: pretended.tolist(tensor))
    pretended.move = lambda module: module._apply(lambda tensor: fake.from_tensor(tensor).to(NAME))
    with fake, pretended:
        yield pretended


@pytest.fixture(params=["twins", "kernels"])
def back_end(request, gpu, monkeypatch):
    """The torch twins, or the host's side of the Triton kernels, as what `kernels` uses on the device."""
    from vqlib import kernels

    chosen = None
    if request.param == "kernels":
        pytest.importorskip("triton")
        from vqlib.kernels import cuda as chosen
        from vqlib.kernels import cuda_gather, cuda_ratios, cuda_search, cuda_soft

        for module in (cuda_gather, cuda_ratios, cuda_search, cuda_soft):
            monkeypatch.setattr(module, "launch", gpu.launch)
    monkeypatch.setattr(kernels, "back_end", lambda device_type: chosen if device_type == NAME else None)
    return request.param
