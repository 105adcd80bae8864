"""Gradient agreement against all pairs and against autograd; winners and distances by hand."""

import copy

import pytest
import tiny
import torch
from torch.nn.functional import cosine_similarity

from vqlib.calibrator import diagnostics
from vqlib.calibrator.calibrate import calibrate
from vqlib.calibrator.trajectory import Trajectory
from vqlib.config import CalibrationConfig, VQConfig
from vqlib.models import class_conditional, structure
from vqlib.packed.harden import harden
from vqlib.quantizer.candidates import candidate_distances
from vqlib.quantizer.quantize import quantize
from vqlib.quantizer.soft import CandidateLinear
from vqlib.quantizer.subvectors import split

GEOMETRY = VQConfig(k=16, d=4, candidates=3)
SETTINGS = CalibrationConfig(batch_size=4, steps=5)


def all_pairs(gradients, assignments, code):
    """The slow twin: every pair of the group, one cosine each."""
    group = gradients[assignments == code]
    pairs = [cosine_similarity(group[i], group[j], dim=0) for i in range(len(group)) for j in range(i)]
    return torch.stack(pairs).mean().item()


def test_agreement_is_the_mean_cosine_over_all_pairs():
    generator = torch.Generator().manual_seed(0)
    gradients, assignments = torch.randn(40, 3, generator=generator), torch.arange(40) % 5
    cosines, members = diagnostics.codeword_agreement(gradients, assignments, 5)
    assert members.tolist() == [8] * 5
    assert cosines.tolist() == pytest.approx([all_pairs(gradients, assignments, code) for code in range(5)], abs=1e-6)


def test_agreement_by_hand():
    gradients = torch.tensor(
        [[2.0, 0.0], [5.0, 0.0], [1.0, 0.0], [-3.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]
    )
    assignments = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    cosines, members = diagnostics.codeword_agreement(gradients, assignments, 5)
    assert cosines[:3].tolist() == [1.0, -1.0, 0.0]  # the same way, against each other, at right angles
    assert members.tolist() == [2, 2, 2, 1, 0]  # a gradient of length 0 has no direction
    assert cosines[3:].isnan().all()


def test_agreement_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"gradients \[3, 2\] and assignments \[4\]"):
        diagnostics.codeword_agreement(torch.ones(3, 2), torch.zeros(4), 2)


def plain_gradients(pipe, model):
    """The slow twin: every weight of the packed model as a dense parameter, block inputs collected first."""
    dense = copy.deepcopy(model)
    for name in structure.quantizable(pipe.transformer):
        packed = model.get_submodule(name)
        linear = torch.nn.Linear(packed.in_features, packed.out_features)
        linear.weight, linear.bias = (
            torch.nn.Parameter(packed.weight().detach().clone()),
            torch.nn.Parameter(packed.bias),
        )
        structure.swap(dense, name, linear)
    trajectory, seen = Trajectory(pipe, SETTINGS), []

    def teacher(inputs):
        with torch.no_grad():
            return class_conditional.forward(pipe.transformer, inputs.x, inputs.timestep, inputs.labels)

    trajectory.stagger(teacher)
    for block in structure.block_list(pipe.transformer):
        block.register_forward_hook(lambda m, a, k, out: seen.append((a, k, out)), with_kwargs=True)
    for _ in range(2):
        trajectory.advance(teacher(trajectory.inputs()))
    blocks = structure.block_list(dense)
    for i, (args, kwargs, out) in enumerate(seen):
        ((blocks[i % len(blocks)](*args, **kwargs) - out).pow(2).mean() / 2).backward()
    return {name: split(layer.weight.grad, 4, name) for name, layer in structure.quantizable(dense).items()}


@pytest.mark.parametrize("form", [harden, lambda student: student], ids=["packed", "soft"])
def test_gradients_are_those_of_the_dense_weights(form):
    pipe = tiny.pipeline()
    model = form(quantize(pipe.transformer, GEOMETRY))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = diagnostics.subvector_gradients(pipe, model, SETTINGS, batches=2)
    expected = plain_gradients(tiny.pipeline(), model)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        scale = expected[name].abs().max().item()
        assert torch.allclose(gradient, expected[name], atol=1e-5 * scale), name
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_a_codewords_gradient_is_the_sum_over_its_subvectors():
    """What the diagnosis is about: dL/dC[j] = Σ of dL/dŵ over the sub-vectors of j."""
    pipe = tiny.pipeline()
    student = quantize(pipe.transformer, GEOMETRY.replace(candidates=1)).requires_grad_(False)
    gradients = diagnostics.subvector_gradients(pipe, student, SETTINGS, batches=1)
    assignments = diagnostics.assignments_of(student)
    name = "transformer_blocks.1.ff.net.2"
    layer = student.get_submodule(name)
    layer.codebook.requires_grad_(True)
    trajectory = Trajectory(pipe, SETTINGS)
    trajectory.stagger(
        lambda inputs: class_conditional.forward(pipe.transformer, inputs.x, inputs.timestep, inputs.labels)
    )
    inputs, seen = trajectory.inputs(), []
    block = structure.block_list(pipe.transformer)[1]
    block.register_forward_hook(lambda m, a, k, out: seen.append((a, k, out)), with_kwargs=True)
    class_conditional.forward(pipe.transformer, inputs.x, inputs.timestep, inputs.labels)
    (args, kwargs, out), *_ = seen
    (structure.block_list(student)[1](*args, **kwargs) - out).pow(2).mean().backward()
    sums = torch.zeros_like(layer.codebook).index_add_(0, assignments[name], gradients[name])
    assert torch.allclose(sums, layer.codebook.grad, atol=1e-4 * sums.abs().max().item())


def test_fresh_losses_are_those_of_a_calibration_on_the_same_trajectory():
    pipe = tiny.pipeline()
    student = quantize(pipe.transformer, GEOMETRY)
    expected = next(calibrate(pipe, copy.deepcopy(student), SETTINGS)).block_losses
    assert diagnostics.fresh_losses(pipe, student, SETTINGS, batches=1) == pytest.approx(expected, rel=1e-5)
    assert diagnostics.fresh_losses(pipe, student, SETTINGS.replace(seed=5), batches=1) != pytest.approx(
        expected, rel=1e-5
    )


def test_no_batches_are_refused():
    pipe = tiny.pipeline()
    with pytest.raises(ValueError, match="batches=0"):
        diagnostics.fresh_losses(pipe, quantize(pipe.transformer, GEOMETRY), SETTINGS, batches=0)


def test_frames_hold_every_shared_codeword_and_their_mean_weighs_by_members():
    gradients = {"a": torch.tensor([[1.0], [1.0], [1.0], [-1.0]]), "b": torch.tensor([[1.0], [1.0], [1.0], [1.0]])}
    assignments = {"a": torch.tensor([0, 0, 1, 1]), "b": torch.tensor([0, 0, 0, 1])}
    frame = diagnostics.agreement_frame(gradients, assignments, 2)
    assert frame.to_dict("list") == {
        "layer": ["a", "a", "b"],
        "codeword": [0, 1, 0],
        "members": [2, 2, 3],
        "cosine": [1, -1, 1],
    }
    assert diagnostics.mean_agreement(frame) == pytest.approx((2 - 2 + 3) / 7)


def test_assignments_are_the_same_soft_and_packed():
    student = quantize(tiny.transformer(), GEOMETRY)
    for layer in student.modules():
        if isinstance(layer, CandidateLinear):
            layer.logits.data.normal_(generator=torch.Generator().manual_seed(0))
    soft, packed = diagnostics.assignments_of(student), diagnostics.assignments_of(harden(student))
    assert soft.keys() == packed.keys() and all(torch.equal(soft[name], packed[name]) for name in soft)


def test_winner_positions_count_from_the_nearest():
    student = quantize(tiny.transformer(), GEOMETRY)
    name = "transformer_blocks.0.attn1.to_q"
    layer = student.get_submodule(name)
    layer.logits.data[:64, 2] = 1.0
    found = diagnostics.winner_positions(student).set_index(["layer", "position"])
    assert found.loc[name, "count"].to_dict() == {1: len(layer.logits) - 64, 2: 0, 3: 64}
    assert found.loc[name, "share"].sum() == pytest.approx(1.0)
    assert len(found) == 3 * len(structure.quantizable(tiny.transformer()))


def test_candidate_distances_by_hand():
    codewords = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]])
    distances = candidate_distances(torch.zeros(1, 2), codewords, torch.tensor([[0, 2, 1]], dtype=torch.uint8))
    assert distances.tolist() == [[0.0, 1.0, 5.0]]
