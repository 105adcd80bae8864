"""The full-precision model is followed block by block whatever form it has, or refused."""

import math

import pytest
import tiny
import torch
from test_calibrate import GEOMETRY, SETTINGS, prepared

from vqlib.calibrator.calibrate import calibrate
from vqlib.calibrator.hessians import input_hessians
from vqlib.calibrator.teacher import following
from vqlib.models import class_conditional, structure
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
