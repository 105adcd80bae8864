import copy
import os
import signal

import pytest
import tiny
import torch

from vqlib.calibrator.calibrate import calibrate
from vqlib.calibrator.trajectory import Trajectory
from vqlib.config import VQConfig, recipe
from vqlib.kernels import reference
from vqlib.models import class_conditional, structure
from vqlib.packed.harden import harden
from vqlib.packed.layer import VQLinear
from vqlib.quantizer.quantize import quantize
from vqlib.quantizer.soft import CandidateLinear

GEOMETRY = VQConfig(k=16, d=4, candidates=3)
SETTINGS = recipe("paper", iterations=6, batch_size=4, steps=5, checkpoint_every=2)


def prepared(geometry=GEOMETRY):
    pipe = tiny.pipeline()
    return pipe, quantize(pipe.transformer, geometry, seed=0)


def trained_tensors(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def test_the_error_of_the_blocks_falls():
    pipe, student = prepared()
    run = calibrate(pipe, student, SETTINGS.replace(iterations=60, lr_codebooks=3e-3, inputs="noise"))
    losses = [record.loss for record in run]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


@pytest.mark.parametrize(("reduction", "size"), [("mean", 1), ("sum", 16 * 32)])  # the tiny model's tokens · channels
def test_streaming_equals_a_plain_loop_over_the_whole_model(reduction, size):
    """The slow twin: collect every block's input and output first, then one loss, one backward, one optimizer."""
    pipe, student = prepared(
        GEOMETRY.replace(candidates=2, ratio_start="distance")
    )  # Eq. 9 acts from the first step on
    twin, other = copy.deepcopy(student), copy.deepcopy(student)
    records = list(calibrate(pipe, student, SETTINGS.replace(block_loss=reduction)))
    list(calibrate(pipe, other, SETTINGS.replace(block_loss="sum" if reduction == "mean" else "mean")))
    logits, others = (m.transformer_blocks[0].ff.net[2].logits for m in (student, other))
    assert (logits - others).abs().mean() > 0.01  # which of the two counts

    soft = [m for m in twin.modules() if isinstance(m, CandidateLinear)]
    rates = [{"params": [m.logits for m in soft], "lr": 5e-2}]
    rates.append({"params": [p for m in soft for p in (m.codebook, m.bias)], "lr": 1e-4})
    optimizer = torch.optim.RMSprop(rates, alpha=0.99)
    trajectory = Trajectory(pipe, SETTINGS)

    def teacher(inputs, keep=None):
        handles = [
            b.register_forward_hook(lambda m, a, k, out: keep.append((a, k, out)), with_kwargs=True)
            for b in structure.block_list(pipe.transformer)
            if keep is not None
        ]
        output = class_conditional.forward(pipe.transformer, inputs.x, inputs.timestep, inputs.labels)
        for handle in handles:
            handle.remove()
        return output

    trajectory.stagger(teacher)
    losses = []
    for _ in range(SETTINGS.iterations):
        seen = []
        output = teacher(trajectory.inputs(), seen)
        blocks = structure.block_list(twin)
        per_block = [(b(*a, **k) - out).pow(2).mean() for b, (a, k, out) in zip(blocks, seen, strict=True)]
        loss = size * sum(per_block) + sum(reference.ratio_loss("absolute", m.logits) for m in soft)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        trajectory.advance(output)
        losses.append([value.item() for value in per_block])
    for record, expected in zip(records, losses, strict=True):
        assert record.block_losses == pytest.approx(expected, rel=1e-4)
    codes = [m.assignments() for m in harden(student).modules() if isinstance(m, VQLinear)]
    twins = [m.assignments() for m in harden(twin).modules() if isinstance(m, VQLinear)]
    same = sum((a == b).sum().item() for a, b in zip(codes, twins, strict=True))
    assert same / sum(len(a) for a in codes) > 0.999  # ties in float32 aside


@pytest.mark.parametrize(
    ("block_inputs", "elements"), [("full", 16 * 32), ("student", 16 * 32), ("end-to-end", 2 * 16 * 32)]
)
def test_the_squared_norm_is_the_mean_times_all_that_it_is_a_mean_of(block_inputs, elements):
    """The release's mean is over blocks, too, where it runs end to end."""
    found = []
    for changes in ({}, {"block_loss": "mean", "lambda_d": float(elements)}, {"block_loss": "mean"}):
        pipe, student = prepared(GEOMETRY.replace(candidates=2, ratio_start="distance"))
        list(calibrate(pipe, student, SETTINGS.replace(block_inputs=block_inputs, **changes)))
        found.append(
            torch.cat([m.logits.detach().flatten() for m in student.modules() if isinstance(m, CandidateLinear)])
        )
    near = [((found[0] - other).abs() < 1e-3).float().mean() for other in found[1:]]
    assert near[0] > 0.999 and near[1] < 0.9


def test_full_precision_block_inputs_keep_blocks_apart():
    """Damage to block 0 must not reach the loss of block 1, unless the student carries its own activations."""
    clean, damaged = [], []
    for block_inputs, expected in (("full", True), ("student", False), ("end-to-end", False)):
        for losses, scale in ((clean, 1.0), (damaged, -9.0)):
            pipe, student = prepared()
            student.transformer_blocks[0].ff.net[2].codebook.data.mul_(scale)
            settings = SETTINGS.replace(iterations=1, block_inputs=block_inputs)
            losses[:] = next(calibrate(pipe, student, settings)).block_losses
        assert damaged[0] > clean[0]
        assert (damaged[1] == clean[1]) is expected


def test_only_codebooks_ratios_and_biases_move_and_switches_hold_them():
    pipe, student = prepared()
    untouched = {n: v.clone() for n, v in student.state_dict().items() if "norm1.emb" in n or "pos_embed" in n}
    before = {n: p.detach().clone() for n, p in student.named_parameters()}
    list(calibrate(pipe, student, SETTINGS.replace(train_codebooks="never", train_biases=False)))
    for name, parameter in student.named_parameters():
        assert torch.equal(before[name], parameter) != name.endswith("logits"), name
    assert all(torch.equal(student.state_dict()[n], v) for n, v in untouched.items())


def test_codebooks_of_the_release_recipe_wait_until_their_layer_is_frozen():
    pipe, student = prepared()
    books = {n: m.codebook.detach().clone() for n, m in student.named_modules() if isinstance(m, CandidateLinear)}
    settings = recipe("release", iterations=2, steps=5, batch_size=2)
    list(calibrate(pipe, student, settings))
    assert all(torch.equal(student.get_submodule(n).codebook, book) for n, book in books.items())
    for m in student.modules():
        if isinstance(m, CandidateLinear):
            m.logits.data[:, 0] = 20.0  # r > 0.99: frozen in the first step, trained from the second
    list(calibrate(pipe, student, settings.replace(iterations=3)))
    assert not any(torch.equal(student.get_submodule(n).codebook, book) for n, book in books.items())


def test_a_shared_codebook_stays_shared_and_learns_from_every_layer():
    pipe, student = prepared(GEOMETRY.replace(codebook_scope="model"))
    run = calibrate(pipe, student, SETTINGS)
    book = next(iter(run.layers.values())).codebook
    before = book.detach().clone()
    packed = run.finish()
    assert not torch.equal(before, book)
    assert len({m.codebook.data_ptr() for m in packed.modules() if isinstance(m, VQLinear)}) == 1


@pytest.mark.parametrize("inputs", ["full", "end-to-end"])
def test_a_shared_codebook_waits_until_all_of_its_layers_are_settled(inputs):
    pipe = tiny.pipeline()
    student = quantize(pipe.transformer, VQConfig(k=8, d=4, candidates=3, codebook_scope="model", kmeans_iterations=3))
    run = calibrate(pipe, student, SETTINGS.replace(train_codebooks="frozen", block_inputs=inputs, iterations=3))
    layers = list(run.layers.values())
    for layer in layers[:-1]:  # all but the last are decided
        layer.logits.data[:, 0] = 100.0
    start, scale = layers[0].codebook.detach().clone(), layers[0].scale.detach().clone()
    next(run), next(run)
    assert torch.equal(layers[0].codebook, start) and torch.equal(layers[0].scale, scale)
    layers[-1].logits.data[:, 0] = 100.0
    next(run)  # settles
    run.config = run.config.replace(iterations=4)
    next(run)
    assert not torch.equal(layers[0].codebook, start) and not torch.equal(layers[0].scale, scale)


def test_an_interrupt_is_raised_after_the_step_and_the_run_goes_on():
    pipe, student = prepared()
    run = calibrate(pipe, student, SETTINGS)
    handle = run.blocks[1].block.register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        next(run)
    handle.remove()
    assert run.iteration == 1
    assert [record.iteration for record in run] == [2, 3, 4, 5, 6]


def test_a_model_without_candidates_is_refused():
    pipe = tiny.pipeline()
    with pytest.raises(ValueError, match="make one with vqlib.quantize"):
        calibrate(pipe, tiny.transformer(), SETTINGS)


def test_freezing_by_schedule_follows_the_timetable_and_ends_hard():
    pipe, student = prepared()
    settings = SETTINGS.replace(
        iterations=10, freeze_rule="schedule", freeze_from=0.2, freeze_until=0.8, ratio_loss_when="never"
    )
    run = calibrate(pipe, student, settings)
    shares = [record.mean("frozen") for record in run]
    assert shares[:2] == [0.0, 0.0] and shares[7:] == [1.0, 1.0, 1.0]
    assert shares[2:7] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6], abs=0.01)
    for layer in run.layers.values():
        assert set(layer.logits.softmax(dim=1).unique().tolist()) == {0.0, 1.0}


def test_freezing_by_schedule_takes_the_most_decided_first():
    pipe, student = prepared()
    settings = SETTINGS.replace(
        iterations=4, freeze_rule="schedule", freeze_from=0.0, freeze_until=1.0, ratio_loss_when="never"
    )
    run = calibrate(pipe, student, settings)
    layer = next(iter(run.layers.values()))
    decided = torch.arange(len(layer.logits)) % 4 == 1
    layer.logits.data[decided, 2] = 5.0
    next(run)
    assert torch.equal(layer.logits.softmax(dim=1).amax(dim=1) == 1.0, decided)


def test_the_first_value_that_is_not_finite_stops_the_run_with_block_layer_and_step():
    pipe, student = prepared()
    run = calibrate(pipe, student, SETTINGS)
    next(run)
    name, layer = list(run.layers.items())[-1]
    layer.codebook.data[:, 0] = torch.nan
    with pytest.raises(
        FloatingPointError, match=rf"step 2: the loss of block transformer_blocks.1 is nan; layer {name}"
    ):
        next(run)


def test_a_layer_with_nothing_left_to_choose_costs_no_more_than_its_codebook_and_changes_nothing(monkeypatch):
    settings = recipe("best", iterations=10, batch_size=4, steps=5)

    def outcome():
        pipe, student = prepared()
        run = calibrate(pipe, student, settings)
        records = [(record.block_losses, record.layers) for record in run]
        return records, student.state_dict(), run

    records, state, run = outcome()
    logits = [layer.logits for layer in run.layers.values()]
    assert sum(len(step.final) for step in run.blocks) == len(run.layers) and all(
        z.grad is None and not z.requires_grad for z in logits
    )
    kept = {parameter for step in run.blocks for parameter in step.optimizer.inner.state}
    assert kept and not kept & set(logits)

    monkeypatch.setattr(CandidateLinear, "settle", lambda layer: None)  # the slow way: ratios train on, to no effect
    slow_records, slow_state, _ = outcome()
    assert records == slow_records
    assert all(torch.equal(value, slow_state[name]) for name, value in state.items())


def test_products_in_half_precision_train_float32_codebooks_to_nearly_the_same_loss():
    def losses(products):
        pipe, student = prepared()
        pipe = pipe.with_transformer(structure.with_fast_products(pipe.transformer))
        run = calibrate(pipe, student, SETTINGS.replace(products=products))
        found = [record.loss for record in run]
        assert all(p.dtype == torch.float32 for p in student.parameters())
        return found

    exact, rounded = losses("float32"), losses("bfloat16")
    assert exact != rounded and rounded == pytest.approx(exact, rel=0.02)
