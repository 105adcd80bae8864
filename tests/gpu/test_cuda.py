"""The whole chain on a CUDA device, beside the CPU. Nothing here runs without one."""

import pytest
import tiny
import torch

from vqlib.calibrator.calibrate import calibrate
from vqlib.calibrator.hessians import input_hessians
from vqlib.config import VQConfig, recipe
from vqlib.models.sampling import sample
from vqlib.packed.checkpoint import load_transformer, save
from vqlib.packed.modes import set_mode
from vqlib.quantizer.quantize import quantize
from vqlib.quantizer.soft import soft_layers

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
FEEDBACK = VQConfig(k=16, d=4, candidates=3, ratio_start="leading", assignment="error-feedback")
SETTINGS = {"iterations": 12, "batch_size": 4, "steps": 5, "checkpoint_every": 4}


def prepared(device, **changes):
    pipe = tiny.pipeline()
    hessians = input_hessians(pipe, recipe("best", **SETTINGS), batches=4)
    pipe = pipe.to(device)
    hessians = {name: h.to(device) for name, h in hessians.items()}
    return pipe, quantize(pipe.transformer, FEEDBACK.replace(**changes), hessians=hessians)


@pytest.mark.parametrize("assignment", ["nearest", "error-feedback"])
def test_codes_are_those_of_the_cpu_but_for_near_ties(assignment):
    (_, here), (_, there) = (prepared(device, assignment=assignment) for device in ("cpu", "cuda"))
    for name, layer in soft_layers(here).items():
        other = soft_layers(there)[name]
        assert other.codebook.device.type == "cuda"
        torch.testing.assert_close(other.codebook.data.cpu(), layer.codebook.data, rtol=1e-3, atol=1e-4)
        assert (other.candidates.cpu() == layer.candidates).float().mean() > 0.98


def test_second_moments_are_those_of_the_cpu():
    (pipe, _), settings = prepared("cuda"), recipe("best", **SETTINGS)
    found, wanted = input_hessians(pipe, settings, batches=3), input_hessians(tiny.pipeline(), settings, batches=3)
    for name, moments in found.items():
        torch.testing.assert_close(moments.cpu(), wanted[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["paper", "release", "best"])
@pytest.mark.parametrize("products", ["float32", "tf32", "bfloat16"])
def test_a_calibration_follows_the_cpus(name, products):
    records = []
    for device in ("cpu", "cuda"):
        pipe, student = prepared(device)
        records.append(list(calibrate(pipe, student, recipe(name, products=products, **SETTINGS))))
    near = {"float32": 2e-2, "tf32": 5e-2, "bfloat16": 1e-1}[products]
    for here, there in zip(*records, strict=True):
        assert there.block_losses == pytest.approx(here.block_losses, rel=near)
        assert there.mean("frozen") == pytest.approx(here.mean("frozen"), abs=0.05)
        assert [f["unused"] for f in there.layers.values()] == pytest.approx(
            [f["unused"] for f in here.layers.values()], abs=3
        )


def test_a_stopped_run_goes_on_packs_samples_and_is_stored(tmp_path):
    settings = recipe("best", **SETTINGS)
    pipe, student = prepared("cuda")
    run = calibrate(pipe, student, settings, out=tmp_path / "run")
    for _ in range(6):
        next(run)
    run.close()
    pipe, student = prepared("cuda")
    run = calibrate(pipe, student, settings, out=tmp_path / "run")
    assert run.iteration == 4
    packed = run.finish()
    images = [sample(pipe.with_transformer(packed), [0, 1, 2], [7, 8, 9], steps=3, guidance_scale=1.5)]
    stored = load_transformer(save(packed, tmp_path / "packed")).to("cuda")
    for mode in ("memory", "speed"):
        set_mode(stored, mode)
        images.append(sample(pipe.with_transformer(stored), [0, 1, 2], [7, 8, 9], steps=3, guidance_scale=1.5))
    assert torch.equal(images[0], images[1]) and torch.equal(images[1], images[2])
    same = sample(pipe.to("cpu").with_transformer(packed.to("cpu")), [0, 1, 2], [7, 8, 9], steps=3, guidance_scale=1.5)
    assert (same.int() - images[0].int()).abs().float().mean() < 1.0


def test_a_step_waits_for_its_device_once(monkeypatch):
    pipe, student = prepared("cuda")
    run = calibrate(pipe, student, recipe("best", **SETTINGS))
    next(run)
    read, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: read.append(t.shape) or _waiting(lambda: tolist(t)))
    torch.cuda.set_sync_debug_mode("error")
    try:
        next(run)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([shape for shape in read if shape.numel() > 20]) == 1


def _waiting(work):
    torch.cuda.set_sync_debug_mode("default")
    try:
        return work()
    finally:
        torch.cuda.set_sync_debug_mode("error")


def test_deterministic_algorithms_give_the_same_bits_twice():
    found = []
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for _ in range(2):
            pipe, student = prepared("cuda")
            found.append([record.block_losses for record in calibrate(pipe, student, recipe("paper", **SETTINGS))])
    finally:
        torch.use_deterministic_algorithms(False)
    assert found[0] == found[1]


def test_student_and_teacher_on_two_devices_are_refused():
    pipe, student = prepared("cuda")
    with pytest.raises(ValueError, match="the full-precision model is on cuda:0, the student on cpu"):
        calibrate(pipe, student.to("cpu"), recipe("best", **SETTINGS))
