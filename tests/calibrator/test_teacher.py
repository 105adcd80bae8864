"""The full-precision model is followed block by block whatever form it has, or refused."""

import math
import threading

import pytest
import tiny
import torch
from test_calibrate import GEOMETRY, SETTINGS, prepared

from vqlib.calibrator.calibrate import calibrate
from vqlib.calibrator.distill import distill
from vqlib.calibrator.hessians import input_hessians
from vqlib.calibrator.teacher import following
from vqlib.config import VQConfig, recipe_distillation
from vqlib.models import class_conditional, structure
from vqlib.models.sampling import sample
from vqlib.packed.checkpoint import load_transformer, save
from vqlib.packed.harden import harden
from vqlib.quantizer.quantize import quantize


@pytest.mark.parametrize("inputs", ["full", "student", "end-to-end"])
@pytest.mark.parametrize("part", ["whole", "blocks"])
def test_a_compiled_teacher_is_followed_block_by_block(inputs, part):
    """A compiler leaves out hooks that come after it: once losses of 0 over 0 blocks."""
    settings = SETTINGS.replace(block_inputs=inputs)
    pipe, student = prepared()
    plain = [record.block_losses for record in calibrate(pipe, student, settings)]
    pipe, student = prepared()
    for module in [pipe.transformer] if part == "whole" else structure.block_list(pipe.transformer):
        module.compile(backend="eager")
    class_conditional.forward(
        pipe.transformer, torch.zeros(1, 4, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    )
    assert [record.block_losses for record in calibrate(pipe, student, settings)] == plain
    hessians = input_hessians(pipe, settings, batches=1)
    assert all(
        torch.equal(value, hessians[name]) for name, value in input_hessians(tiny.pipeline(), settings, 1).items()
    )


def test_a_half_precision_model_whose_blocks_come_first_takes_half_precision_inputs():
    """Its first parameter is a float32 codebook once it is a student."""
    model = tiny.transformer().to(torch.bfloat16)
    for owner, first in ((model, "transformer_blocks"), *((b, "attn1") for b in model.transformer_blocks)):
        owner._modules = {first: owner._modules[first]} | owner._modules
    pipe, codes = tiny.pipeline().with_transformer(model), VQConfig(k=16, d=4, candidates=2)
    student = quantize(model, codes)
    assert next(student.parameters()).dtype == torch.float32
    record = next(calibrate(pipe, student, SETTINGS.replace(block_inputs="end-to-end")))
    assert 0 < record.loss < math.inf
    record = next(distill(pipe, student, recipe_distillation("best", iterations=1, batch_size=2, steps=3)))
    assert 0 < record.output_loss < math.inf


def test_a_compiled_student_is_calibrated_packed_and_saved_as_the_model_inside(tmp_path):
    pipe, student = prepared()
    plain = [record.block_losses for record in calibrate(pipe, student, SETTINGS)]
    pipe, student = prepared()
    run = calibrate(pipe, torch.compile(student, backend="eager"), SETTINGS)
    assert [record.block_losses for record in run] == plain
    packed = harden(torch.compile(student, backend="eager"))
    save(torch.compile(packed, backend="eager"), tmp_path / "packed")
    loaded = load_transformer(tmp_path / "packed").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in packed.state_dict().items())


@pytest.mark.parametrize("inputs", ["full", "end-to-end"])
def test_a_sampler_in_another_thread_and_a_calibration_do_not_meet(inputs):
    """Sliders over images and a run beside them share the full-precision model: once its hooks stepped on the sampler's inputs."""
    settings = SETTINGS.replace(block_inputs=inputs)
    pipe, student = prepared()
    plain = [record.block_losses for record in calibrate(pipe, student, settings)]
    pipe, student = prepared()
    alone, beside = sample(pipe, [0, 1], [0, 1], steps=2), []

    def sampled(*_):
        if threading.current_thread() is threading.main_thread():
            other = threading.Thread(target=lambda: beside.append(sample(pipe, [0, 1], [0, 1], steps=2)))
            other.start()
            other.join()

    run = calibrate(pipe, student, settings)
    structure.block_list(pipe.transformer)[1].register_forward_pre_hook(sampled)
    assert [record.block_losses for record in run] == plain
    assert len(beside) >= len(plain) and all(torch.equal(images, alone) for images in beside)


def test_blocks_that_nobody_saw_are_an_error():
    pipe, _ = prepared()
    with pytest.raises(RuntimeError, match=r"its 2 blocks were seen \[0, 0\] times"):
        with following(pipe.transformer, lambda *_: None):
            pass


@pytest.mark.parametrize(
    "stage", [lambda p, s: next(calibrate(p, s, SETTINGS)), lambda p, s: input_hessians(p, SETTINGS, 1)]
)
def test_a_full_precision_model_whose_output_is_not_finite_is_named(stage):
    pipe, student = prepared()
    pipe.transformer.proj_out_2.weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="tiny: the full-precision model's output is not finite"):
        stage(pipe, student)


def test_two_models_that_do_not_belong_together_are_refused():
    pipe, _ = prepared()
    student = quantize(tiny.transformer(blocks=3), GEOMETRY)
    with pytest.raises(ValueError, match="the student has a layer transformer_blocks.2.*full-precision model lacks"):
        calibrate(pipe, student, SETTINGS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_teacher_in_half_precision_calibrates_float32_codebooks_and_biases(dtype):
    pipe = tiny.pipeline()
    pipe.transformer.to(dtype)
    student = quantize(pipe.transformer, GEOMETRY)
    losses = [record.loss for record in calibrate(pipe, student, SETTINGS)]
    expected = next(calibrate(*prepared(), SETTINGS)).loss
    assert losses[0] == pytest.approx(expected, rel=0.1)  # later ones part: a rounded loss freezes others first
    assert all(math.isfinite(loss) for loss in losses)
    assert {p.dtype for p in student.parameters() if p.requires_grad} == {torch.float32}
    x = torch.zeros(4, 4, 8, 8, dtype=dtype)
    assert class_conditional.forward(harden(student), x, torch.zeros(4), torch.arange(4)).isfinite().all()
