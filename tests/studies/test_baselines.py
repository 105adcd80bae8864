"""The peers: grids, Hessians from the trajectory, error feedback, and bits counted as they would be stored."""

import pytest
import tiny
import torch

from vqlib.calibrator.calibrate import calibrate
from vqlib.calibrator.hessians import input_hessians
from vqlib.config import CalibrationConfig, VQConfig
from vqlib.models import structure
from vqlib.packed.checkpoint import load_transformer, save
from vqlib.packed.harden import harden
from vqlib.quantizer.candidates import find_candidates
from vqlib.quantizer.codebook import fit_codebook
from vqlib.quantizer.error_feedback import candidates_with_feedback, refit
from vqlib.quantizer.feedback import Columns, damped, quantize_columns
from vqlib.quantizer.quantize import quantize
from vqlib.studies.baselines.baseline import FullPrecision, Moments, packed, uniform
from vqlib.studies.baselines.gptq import GPTQ, fit_grid


def weighted_error(difference, hessian):
    """tr(D H Dᵀ) of D = W − Ŵ [out, in] with the damped Hessian, by its definition."""
    wide, h = difference.double(), damped(hessian.double())
    return float(torch.trace(wide @ h @ wide.T))


SETTINGS = CalibrationConfig(batch_size=4, steps=5, iterations=2)
VQ = VQConfig(k=8, d=4, candidates=1, assignment="error-feedback")
MOMENTS = Moments(SETTINGS, batches=3)


def weight_and_hessian(out=24, inputs=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator)
    x = torch.randn(200, inputs, generator=generator) @ mix
    return torch.randn(out, inputs, generator=generator), x.T @ x / len(x)


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline()


@pytest.fixture(scope="module")
def hessians(pipe):
    return input_hessians(pipe, SETTINGS, batches=3)


def test_a_grid_has_its_groups_extremes_and_zero_and_no_more_than_its_levels():
    weight, _ = weight_and_hessian()
    weight[0, :8] = weight[0, :8].abs() + 1.0  # a group without a sign change still holds zero
    weight[1, 8:] = 0.0
    for bits in (2, 3, 4):
        grid = fit_grid(weight, bits, 8)
        rounded = grid.round(weight, torch.arange(16))
        groups, steps = rounded.reshape(24, 2, 8), grid.scale[:, :, None]
        assert max(len(group.unique()) for row in groups for group in row) <= 2**bits
        assert ((groups - weight.reshape(24, 2, 8)).abs() <= 0.51 * steps + (steps - grid.scale.min())).all()
        assert torch.equal(grid.round(torch.zeros(24, 16), torch.arange(16)), torch.zeros(24, 16))
        assert torch.equal(grid.scale, grid.scale.half().float()) and torch.equal(rounded[1, 8:], torch.zeros(8))
    fine = fit_grid(weight, 8).round(weight, torch.arange(16))
    assert (fine - weight).abs().max() <= 0.55 * fit_grid(weight, 8).scale.max()
    with pytest.raises(ValueError, match="bits=9 is outside 1 … 8"):
        fit_grid(weight, 9)


@pytest.mark.parametrize("width", [1, 4])
def test_what_the_chosen_columns_add_is_the_weighted_error_of_the_result(width):
    """Σ ‖E U_PP⁻¹‖² over the groups is tr((W − Ŵ) H (W − Ŵ)ᵀ): the feedback is the optimal one."""
    weight, hessian = weight_and_hessian()
    added = []

    def choose(columns, root, positions):
        quantized = columns.round()
        added.append(float(((columns - quantized) @ torch.linalg.inv(root)).square().sum()))
        return quantized

    result = quantize_columns(weight, Columns.of(hessian, width), choose)
    assert sum(added) == pytest.approx(weighted_error(weight - result, hessian), rel=1e-5)
    assert torch.equal(result, result.round()) and len(added) == 16 // width


def test_with_independent_inputs_nothing_is_passed_on_and_with_mixed_ones_feedback_wins():
    weight, hessian = weight_and_hessian()
    grid = fit_grid(weight, 3)
    plain = grid.round(weight, torch.arange(16))

    def nearest(columns, root, positions):
        return grid.round(columns, positions)

    alone = quantize_columns(weight, Columns.of(torch.eye(16) * torch.rand(16) + 0.01 * torch.eye(16), 1), nearest)
    assert torch.allclose(alone, plain, atol=1e-6)
    passed_on = quantize_columns(weight, Columns.of(hessian, 1), nearest)
    assert weighted_error(weight - passed_on, hessian) < 0.7 * weighted_error(weight - plain, hessian)


def test_inputs_that_are_always_zero_do_no_harm():
    weight, hessian = weight_and_hessian()
    hessian[3], hessian[:, 3] = 0.0, 0.0
    assert torch.isfinite(quantize_columns(weight, Columns.of(hessian, 1), lambda w, root, where: w.round())).all()
    assert torch.equal(damped(torch.zeros(2, 2)), torch.eye(2))


def test_hessians_are_the_second_moments_of_what_the_layers_see(pipe, hessians):
    layers = structure.quantizable(pipe.transformer)
    assert hessians.keys() == layers.keys()
    name = "transformer_blocks.1.ff.net.2"
    seen, again = [], tiny.pipeline()
    again.transformer.get_submodule(name).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    assert torch.equal(input_hessians(again, SETTINGS, batches=3)[name], hessians[name])  # seeded
    rows = torch.cat([x.flatten(0, -2) for x in seen[-3:]])  # those before bring the images to their timesteps
    assert torch.allclose(hessians[name], rows.T @ rows / len(rows), rtol=1e-4, atol=1e-6)
    assert not pipe.transformer.get_submodule(name)._forward_pre_hooks
    with pytest.raises(ValueError, match="batches=0"):
        input_hessians(pipe, SETTINGS, batches=0)


def output_error(pipe, model, hessians):
    layers = structure.quantizable(pipe.transformer).items()
    return sum(weighted_error(layer.weight - _weight(model, name), hessians[name]) for name, layer in layers)


def _weight(model, name):
    weight = model.get_submodule(name).weight
    return weight() if callable(weight) else weight


def test_gptq_leaves_the_original_alone_and_beats_its_own_grid(pipe, hessians):
    before = tiny.transformer().state_dict()
    found = GPTQ(3, 16, MOMENTS).build(pipe)
    assert all(torch.equal(value, before[name]) for name, value in pipe.transformer.state_dict().items())
    rounded = uniform(
        pipe.transformer, 3, 16, lambda name, m: fit_grid(m.weight, 3, 16).round(m.weight, torch.arange(m.in_features))
    )
    assert output_error(pipe, found.model, hessians) < 0.8 * output_error(pipe, rounded.model, hessians)
    name = "transformer_blocks.0.attn1.to_q"
    grid = fit_grid(pipe.transformer.get_submodule(name).weight, 3, 16)
    weight = found.model.get_submodule(name).weight
    assert torch.allclose(grid.round(weight, torch.arange(32)), weight, atol=1e-6)  # every value is on the grid
    assert torch.equal(found.model.proj_out_2.weight, pipe.transformer.proj_out_2.weight)
    assert found.bits_per_weight == pytest.approx(3 + (16 + 3) / 16)


def test_a_group_size_that_does_not_fit_names_the_layer(pipe):
    with pytest.raises(ValueError, match=r"in_features 32 is not divisible by group_size=24 \(transformer_blocks.0"):
        GPTQ(3, 24, MOMENTS).build(pipe)


def test_error_feedback_beats_the_nearest_codewords_and_refitting_never_hurts():
    weight, hessian = weight_and_hessian(out=64, inputs=32)
    codebook = fit_codebook(weight.reshape(-1, 4), 16)

    def error(assignments, codewords):
        return weighted_error(weight - codewords[assignments].reshape(weight.shape), hessian)

    nearest = codebook.assignments
    chosen = candidates_with_feedback(weight, Columns.of(hessian, 4), codebook.codewords).indices[:, 0].long()
    assert error(chosen, codebook.codewords) < 0.9 * error(nearest, codebook.codewords)
    for assignments in (nearest, chosen):
        better = refit(weight, hessian, assignments, codebook.codewords)
        assert error(assignments, better) < error(assignments, codebook.codewords)
        for _ in range(3):  # a minimum: no step to the side is better
            aside = better + 0.01 * torch.randn_like(better)
            assert error(assignments, better) < error(assignments, aside)


def test_with_independent_inputs_of_one_size_feedback_offers_the_nearest_codewords_with_their_ratios():
    weight, _ = weight_and_hessian()
    codewords = fit_codebook(weight.reshape(-1, 4), 8).codewords
    plain = find_candidates(weight.reshape(-1, 4), codewords, 3, "distance")
    found = candidates_with_feedback(weight, Columns.of(torch.eye(16), 4), codewords, 3, "distance")
    assert torch.equal(found.indices, plain.indices) and found.indices.dtype == torch.uint8
    assert torch.allclose(found.ratios, plain.ratios, atol=1e-4)


def test_other_candidates_do_not_change_the_assignments_and_come_in_order_of_the_weighted_error():
    """The last columns are the last to be quantized: nothing is passed on, only their own block of U counts."""
    weight, hessian = weight_and_hessian()
    codewords = fit_codebook(weight.reshape(-1, 4), 8).codewords
    one = candidates_with_feedback(weight, Columns.of(hessian, 4), codewords, 1)
    four = candidates_with_feedback(weight, Columns.of(hessian, 4), codewords, 4, "leading")
    assert torch.equal(one.indices[:, 0], four.indices[:, 0])
    assert all(len(set(row)) == 4 for row in four.indices.tolist())
    last = int(hessian.diagonal().reshape(-1, 4).sum(dim=1).argmin())  # group of columns
    chosen = codewords[one.indices[:, 0].long()].view(24, 4, 4)  # [out, in / d, d]
    for row in range(24):
        errors = []
        for code in four.indices.view(24, 4, 4)[row, last].tolist():
            trial = chosen[row].clone()
            trial[last] = codewords[code]
            errors.append(weighted_error(weight[row : row + 1] - trial.view(1, 16), hessian))
        assert errors == sorted(errors)


def test_feedback_needs_the_second_moments_of_every_layer(pipe, hessians):
    last = "transformer_blocks.1.ff.net.2"
    missing = {name: h for name, h in hessians.items() if name != last}
    for given, layer in ((None, next(iter(hessians))), (missing, last)):
        with pytest.raises(ValueError, match=rf"needs hessians=vqlib.input_hessians\(pipe\), not given for {layer}$"):
            quantize(pipe.transformer, VQ, hessians=given)
    for wrong in (torch.eye(32), torch.full((128, 128), torch.nan)):
        size = rf"\[{len(wrong)}, {len(wrong)}\] \({last}\)"
        with pytest.raises(ValueError, match=rf"in_features 128 needs a finite Hessian of that size, got {size}"):
            quantize(pipe.transformer, VQ, hessians=hessians | {last: wrong})


def test_error_feedback_gives_a_student_that_calibrates_and_packs(pipe, hessians, tmp_path):
    student = quantize(pipe.transformer, VQ, hessians=hessians)
    alone = harden(quantize(pipe.transformer, VQ, hessians=hessians))
    run = calibrate(pipe, student, SETTINGS)
    before = {name: layer.candidates.clone() for name, layer in run.layers.items()}
    made = run.finish()
    assert run.iteration == 2 and not torch.equal(_weight(made, next(iter(before))), _weight(alone, next(iter(before))))
    assert all(torch.equal(layer.candidates, before[name]) for name, layer in run.layers.items())
    kmeans = harden(quantize(pipe.transformer, VQ.replace(assignment="nearest")))
    assert output_error(pipe, alone, hessians) < output_error(pipe, kmeans, hessians)
    loaded = load_transformer(save(alone, tmp_path / "packed"))
    name = next(iter(before))
    assert torch.equal(_weight(loaded, name), _weight(alone, name))


def test_error_feedback_keeps_a_shared_codebook_shared(pipe, hessians):
    student = quantize(pipe.transformer, VQ.replace(codebook_scope="model"), hessians=hessians)
    layers = [student.get_submodule(name) for name in hessians]
    assert len({id(layer.codebook) for layer in layers}) == 1 and all(layer.scale is not None for layer in layers)
    kmeans = harden(quantize(pipe.transformer, VQ.replace(codebook_scope="model", assignment="nearest")))
    assert output_error(pipe, harden(student), hessians) < output_error(pipe, kmeans, hessians)


def test_sizes_count_everything_that_is_stored(pipe, hessians):
    whole = FullPrecision().build(pipe)  # random float32 weights are not exact in float16
    assert whole.bits_per_weight == 32
    half = FullPrecision().build(pipe.with_transformer(tiny.transformer().half().float().requires_grad_(False)))
    assert half.bits_per_weight == 16 and half.size_bytes == pytest.approx(whole.size_bytes / 2, rel=0.01)
    weights = sum(layer.weight.numel() for layer in structure.quantizable(pipe.transformer).values())
    found = GPTQ(4, None, MOMENTS).build(pipe)
    groups = sum(layer.out_features for layer in structure.quantizable(pipe.transformer).values())
    assert found.bits_per_weight == pytest.approx(4 + groups * 20 / weights)
    rest = half.size_bytes - 2 * weights  # everything else in half precision
    assert found.size_bytes == pytest.approx(rest + (4 * weights + 20 * groups) / 8, abs=2)
    codes = packed(harden(quantize(pipe.transformer, VQ, hessians=hessians)))
    layers = len(structure.quantizable(pipe.transformer))
    assert codes.bits_per_weight == pytest.approx(3 / 4 + layers * 8 * 4 * 32 / weights)
    assert codes.size_bytes == pytest.approx(rest + weights * codes.bits_per_weight / 8, abs=2)
