"""The chain on a device that is not there: no operation meets two devices, and a step does not wait."""

import copy

import pytest
import tiny
import torch
from pretend import NAME

from vqlib.calibrator import diagnostics
from vqlib.calibrator.calibrate import calibrate
from vqlib.calibrator.hessians import input_hessians
from vqlib.config import SamplingConfig, VQConfig, recipe
from vqlib.models import class_conditional, sampling, structure
from vqlib.models.modulation import cached_modulation
from vqlib.packed.harden import harden
from vqlib.packed.layer import VQLinear
from vqlib.quantizer import codebook, lloyd
from vqlib.quantizer.error_feedback import candidates_with_feedback, refit
from vqlib.quantizer.feedback import Columns
from vqlib.quantizer.quantize import codebooks, quantize

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real one")
SETTINGS = {"iterations": 10, "batch_size": 4, "steps": 5}


@pytest.fixture(scope="module")
def made():
    """Pipelines and their students, on the CPU and with values, by the scope of their codebooks."""
    found = {}
    for scope in ("layer", "model"):
        pipe = tiny.pipeline()
        config = VQConfig(k=16, d=4, candidates=2, codebook_scope=scope)
        found[scope] = pipe, quantize(pipe.transformer, config)
    return found


@pytest.fixture
def own(made):
    """Copies for one test, made before there are fake tensors."""
    return copy.deepcopy(made)


@pytest.fixture
def models(own, gpu):
    """`models(scope)`: a pipeline and its student on the device."""

    def move(scope="layer"):
        pipe, student = own[scope]
        gpu.move(pipe.transformer)
        gpu.move(student)
        return pipe, student

    return move


def step_of(run, gpu):
    """Operations, waits and blocking copies of one step."""
    counts = [gpu.operations, gpu.waits, gpu.copies]
    before = [count.total() for count in counts]
    next(run)
    return [count.total() - start for count, start in zip(counts, before, strict=True)]


@pytest.mark.parametrize(
    "name, scope, most_waits, most_operations",
    [
        ("paper", "layer", 1, 40),
        ("best", "layer", 1, 40),
        ("release", "layer", 2, 50),  # looks at the ratio loss before it decides
        ("best", "model", 1, 45),  # layers have scales
    ],
)
def test_a_calibration_step_waits_once_and_launches_little(
    models,
    gpu,
    back_end,
    name,
    scope,
    most_waits,
    most_operations,
):
    pipe, student = models(scope)
    run = calibrate(pipe, student, recipe(name, **SETTINGS))
    next(run)
    for _ in range(6):  # into the timetable, where ratios freeze
        operations, waits, copies = step_of(run, gpu)
        assert waits <= most_waits and copies == 0
        assert back_end == "twins" or operations / len(run.layers) <= most_operations


def test_second_moments_and_error_feedback_stay_on_the_device(models, gpu, back_end):
    pipe, _ = models()
    hessians = input_hessians(pipe, recipe("best", **SETTINGS), batches=2)
    name, layer = next(iter(structure.quantizable(pipe.transformer).items()))
    codewords = torch.randn(16, 4, device=NAME)
    before = gpu.waits.total()
    columns = Columns.of(hessians[name], 4)
    factored = gpu.waits.total()
    found = candidates_with_feedback(layer.weight, columns, codewords, 2, "leading")
    assert found.indices.device.type == NAME and found.indices.shape == (layer.weight.numel() // 4, 2)
    assert gpu.waits.total() == factored and factored - before <= 3
    assert refit(layer.weight, hessians[name], found.indices[:, 0].long(), codewords).device.type == NAME


def test_codebooks_are_found_on_the_device(models, gpu, back_end, monkeypatch):
    monkeypatch.setattr(codebook, "_draws", codebook._draws.__wrapped__)  # no fake tensors in a cache
    monkeypatch.setattr(lloyd, "_iterations", four_passes)
    pipe, _ = models()
    layers = structure.quantizable(pipe.transformer)
    groups, sizes = {name: {name: layer} for name, layer in layers.items()}, {m.weight.numel() for m in layers.values()}
    before = gpu.waits.total(), gpu.copies.total()
    books = dict(codebooks(groups, VQConfig(k=16, d=4)))
    assert list(sorted(books)) == sorted(layers)
    assert gpu.waits.total() - before[0] == len(sizes) * (4 + 2) and gpu.copies.total() == before[1]
    assert back_end == "twins" or gpu.operations["_sums_kernel"] == len(sizes) * 4
    student = quantize(pipe.transformer, VQConfig(k=16, d=4, candidates=2))
    assert {p.device.type for p in student.parameters()} == {NAME}


def four_passes(x, codewords, iterations, tolerance):
    """A layer's iterations where nothing has a value that could tell when to stop."""
    for _ in range(4):
        sums = yield codewords
    return lloyd.Minimum(codewords, sums, [1.0])


def test_a_weight_is_rebuilt_from_its_codes_in_one_launch(gpu, back_end):
    if back_end == "twins":
        pytest.skip("torch has no such operation")
    layer = VQLinear(16, 24, True, 4, 10, device=NAME)
    for dtype in (torch.float32, torch.bfloat16):
        before = gpu.operations.total()
        assert layer.weight(dtype).dtype == dtype
        assert gpu.operations.total() == before + 1 and gpu.waits.total() == 0


def test_a_packed_model_runs_and_samples_on_the_device(models, gpu, back_end, monkeypatch):
    pipe, student = models()
    monkeypatch.setattr("vqlib.packed.layer.VQLinear.from_assignments", _packed_there)
    packed = harden(student)
    sampler = sampling._Sampler(pipe.with_transformer(packed), SamplingConfig(steps=3))
    monkeypatch.setattr(sampling, "require_finite", lambda *_: None)
    steps = sampler.latents([0, 1, 2, 3], [5, 6, 7, 8])
    next(steps)
    waits, copies = gpu.waits.total(), gpu.copies.total()
    assert next(steps)[1].device.type == NAME
    assert gpu.waits.total() == waits and gpu.copies.total() == copies


def _packed_there(assignments, codewords, shape, bias=None, scale=1.0):
    """A layer of the right sizes on the device: codes have no values that could be packed."""
    return VQLinear(shape[1], shape[0], bias is not None, codewords.shape[1], len(codewords), device=NAME)


def test_a_forward_with_cached_modulations_waits_once(models, gpu, back_end):
    pipe, _ = models()
    x, at, labels = (
        torch.zeros(4, 4, 8, 8, device=NAME),
        torch.zeros(4, device=NAME),
        torch.zeros(4, device=NAME).long(),
    )
    with cached_modulation(pipe.transformer), torch.no_grad():
        for _ in range(2):  # filled, then answered
            waits, copies = gpu.waits.total(), gpu.copies.total()
            class_conditional.forward(pipe.transformer, x, at, labels)
            assert gpu.waits.total() == waits + 1 and gpu.copies.total() == copies


def test_fresh_losses_wait_once_for_all_blocks(models, gpu, back_end):
    waits = []
    pipe, student = models()
    for batches in (1, 2):
        before = gpu.waits["tolist"] + gpu.waits["_local_scalar_dense"]
        found = diagnostics.fresh_losses(pipe, student, recipe("best", **SETTINGS), batches)
        waits.append(gpu.waits["tolist"] + gpu.waits["_local_scalar_dense"] - before)
        assert len(found) == len(structure.block_list(student))
    assert waits[1] - waits[0] <= 1  # of the trajectory, which looks at its output


def test_two_devices_in_one_operation_are_refused(gpu):
    with pytest.raises(Exception, match="device"):
        torch.zeros(3, device=NAME) + torch.zeros(3)
    torch.zeros(3, device=NAME).sum().item()
    torch.zeros(3).to(NAME)
    torch.zeros(3).to(NAME, non_blocking=True)
    assert gpu.waits.total() == 1 and gpu.copies.total() == 1 and gpu.operations["sum"] == 1
