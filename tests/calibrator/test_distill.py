"""The last stage, on the model's output: against a plain loop, with and without activation checkpointing, stopped and resumed."""

import pytest
import tiny
import torch

from vqlib.calibrator.calibrate import calibrate
from vqlib.calibrator.distill import distill
from vqlib.calibrator.losses import block_loss
from vqlib.calibrator.runs import read_records
from vqlib.calibrator.teacher import outputs_of
from vqlib.calibrator.trajectory import Trajectory
from vqlib.config import VQConfig, recipe, recipe_distillation
from vqlib.models.process import guide
from vqlib.packed.checkpoint import load_transformer, save
from vqlib.packed.harden import harden, soften
from vqlib.packed.layer import VQLinear
from vqlib.quantizer.candidates import Candidates
from vqlib.quantizer.latent import LatentLinear, with_latents
from vqlib.quantizer.quantize import quantize
from vqlib.quantizer.soft import CandidateLinear, soft_layers

CODES = VQConfig(k=16, d=4, candidates=2, ratio_start="leading")
SETTINGS = recipe_distillation("best", iterations=6, batch_size=4, steps=5, checkpoint_every=2, lr_latents=0.0)


def packed_model(pipe, codes=CODES):
    return harden(quantize(pipe.transformer, codes, seed=0))


def trained(model):
    """Codebooks and biases of the packed layers, by name."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, VQLinear)}
    return {f"{n}.{part}": getattr(m, part) for n, m in layers.items() for part in ("codebook", "bias")}


def forward(model, batch):
    return model(batch.x, timestep=batch.timestep, class_labels=batch.labels, return_dict=False)[0]


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_softening_is_undone_by_hardening(scope):
    pipe = tiny.pipeline()
    packed = packed_model(pipe, CODES.replace(codebook_scope=scope, codebook_dtype="float16"))
    student = soften(packed)
    again = harden(student)
    assert len({id(layer.codebook) for layer in soft_layers(student).values()}) == (14 if scope == "layer" else 1)
    for (name, a), b in zip(packed.state_dict().items(), again.state_dict().values(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name
    moved = soften(packed._apply(torch.clone))  # as to("cuda") does it: every buffer becomes a tensor of its own
    assert len({id(layer.codebook) for layer in soft_layers(moved).values()}) == (14 if scope == "layer" else 1)


@pytest.mark.parametrize("loss_at", ["output", "guided"])
@pytest.mark.parametrize("path", ["teacher", "student"])
def test_it_equals_a_plain_loop_over_both_models(path, loss_at):
    """The slow twin: autograd through the whole student, the path's steps and the signals written out."""
    pipe = tiny.pipeline()
    packed = packed_model(pipe)
    run = distill(pipe, packed, SETTINGS.replace(path=path, loss_at=loss_at))
    losses = [record.output_loss for record in run]

    student = soften(packed).requires_grad_(False)
    parameters = [p for layer in soft_layers(student).values() for p in (layer.codebook, layer.bias)]
    optimizer = torch.optim.RMSprop([p.requires_grad_(True) for p in parameters], lr=1e-4, alpha=0.99)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    trajectory, posterior = Trajectory(pipe, SETTINGS), pipe.schedule.respace(5).posterior()
    with torch.no_grad():
        trajectory.stagger(lambda batch: forward(pipe.transformer, batch))
    own = trajectory.x
    for loss in losses:
        batch, step, moves = trajectory.inputs(), trajectory.step, trajectory.moves + 1
        taken = batch._replace(x=torch.cat([own, own]))
        with torch.no_grad():
            target = forward(pipe.transformer, batch)
        output = forward(student, taken)
        difference = output - target
        if path == "student":
            abar = pipe.schedule.respace(5).alphas_cumprod[step].float().repeat(2).view(-1, 1, 1, 1)
            sigma = (1 - abar).sqrt()
            signal, wanted = (b.x - sigma * o[:, :4] for b, o in ((taken, output), (batch, target)))
            difference = torch.cat([signal - wanted, sigma * difference[:, 4:]], dim=1)
        if loss_at == "guided":
            conditional, null = difference.chunk(2)
            difference = torch.cat([1.5 * conditional[:, :3] - 0.5 * null[:, :3], conditional[:, 3:]], dim=1)
        distance = difference.pow(2).mean()
        assert loss == pytest.approx(distance.item(), rel=1e-4)
        (distance * output[0].numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        generator = torch.Generator().manual_seed(SETTINGS.seed * 1_000_003 + moves)
        noise, fresh = (torch.randn(4, 4, 8, 8, generator=generator) for _ in range(2))
        trajectory.advance(target)
        mean, log_variance = posterior.predict(guide(output.detach(), 1.5, 3), own, step)
        led = torch.where((step == 0).view(-1, 1, 1, 1), fresh, mean + (0.5 * log_variance).exp() * noise)
        own = led if path == "student" else trajectory.x
    for name, ours in soft_layers(run.student).items():
        plain = student.get_submodule(name)
        torch.testing.assert_close(ours.codebook, plain.codebook, rtol=1e-3, atol=2e-6)
        if not name.endswith(
            "to_k"
        ):  # softmax does not see its bias: a gradient of rounding, which RMSprop makes a step of
            torch.testing.assert_close(ours.bias, plain.bias, rtol=1e-3, atol=2e-6)


def test_without_guidance_the_guided_output_is_the_output():
    pipe = tiny.pipeline()
    packed, alone = packed_model(pipe), SETTINGS.replace(guidance_scale=1.0)
    runs = [distill(pipe, packed, alone.replace(loss_at=loss_at)) for loss_at in ("output", "guided")]
    losses = [[record.output_loss for record in run] for run in runs]
    assert losses[0] == losses[1] and len(set(losses[0])) == 6


def test_the_student_comes_nearer_to_the_output_and_keeps_its_assignments():
    pipe = tiny.pipeline()
    packed = packed_model(pipe)
    run = distill(pipe, packed, SETTINGS.replace(iterations=60, lr_codebooks=2e-3, path="teacher", inputs="noise"))
    losses = [record.output_loss for record in run]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    after = run.finish()
    for name, tensor in packed.state_dict().items():
        if name.endswith(".codes"):
            assert torch.equal(tensor, after.state_dict()[name]), name


def test_latents_get_the_gradient_of_the_weight_and_choose_the_nearest_codeword():
    pipe = tiny.pipeline()
    student = with_latents(soften(packed_model(pipe)))
    layer = student.get_submodule("transformer_blocks.0.ff.net.2")
    plain = soften(packed_model(pipe)).get_submodule("transformer_blocks.0.ff.net.2")
    assert torch.equal(layer.weight(), plain.weight())
    pull = torch.randn_like(layer.weight())
    (layer.weight() * pull).sum().backward()
    (plain.weight() * pull).sum().backward()
    assert torch.equal(layer.codebook.grad, plain.codebook.grad)
    torch.testing.assert_close(layer.latents.grad, pull.view(-1, 4) * layer.codebook.square().mean().sqrt())
    assert layer.reassign() == 0.0
    before = layer.assignments().clone()
    with torch.no_grad():
        layer.latents[5] = layer.codebook[(before[5] + 1) % 16] / layer.unit
    assert layer.reassign().item() == pytest.approx(1 / len(before))
    assert layer.assignments()[5] == (before[5] + 1) % 16


@pytest.mark.parametrize("k, d, share", [(256, 4, 1.0), (64, 2, 1.0), (256, 2, 0.5), (32, 1, 0.25)])
def test_latents_are_given_in_smaller_units_where_codewords_lie_closer(k, d, share):
    """Or 1,000 steps at 4 bits carry them past codeword after codeword, and the path's error is ten times what it was."""
    book = torch.nn.Parameter(torch.randn(k, d, generator=torch.Generator().manual_seed(0)))
    codes = torch.arange(64).remainder(k)[:, None]
    layer = LatentLinear(CandidateLinear(book, Candidates(codes.short(), torch.zeros(64, 1)), (16, 4 * d), None))
    assert layer.unit.item() == pytest.approx(share * book.square().mean().sqrt().item())
    assert torch.equal(layer.assignments(), codes[:, 0]) and layer.reassign() == 0.0


def test_assignments_that_follow_latents_lower_the_loss_further():
    pipe = tiny.pipeline()
    packed, last = packed_model(pipe), {}
    for rate in (0.0, 0.02):
        settings = SETTINGS.replace(iterations=60, path="teacher", inputs="noise", lr_latents=rate)
        run = distill(pipe, packed, settings)
        records = list(run)
        last[rate] = sum(record.output_loss for record in records[-10:])
        moved = sum(layer["moved"] for record in records for layer in record.layers.values())
        assert (moved > 0) == (rate > 0)
        assert sum(codes_differ(packed, run.finish())) > 0 or rate == 0.0
    assert last[0.02] < 0.8 * last[0.0]


def codes_differ(one, other):
    """How many codes are not the same, a layer."""
    layers = {n: m for n, m in one.named_modules() if isinstance(m, VQLinear)}
    return [int((m.assignments() != other.get_submodule(n).assignments()).sum()) for n, m in layers.items()]


def test_activation_checkpointing_changes_no_bit():
    pipe = tiny.pipeline()
    packed = packed_model(pipe)
    kept, again = (
        trained(distill(pipe, packed, SETTINGS.replace(activation_checkpointing=flag)).finish())
        for flag in (False, True)
    )
    assert all(torch.equal(values, again[name]) for name, values in kept.items())


def test_activation_checkpointing_keeps_one_block_at_a_time():
    """Bytes that autograd holds for a forward of the student through four blocks."""
    pipe = tiny.pipeline(blocks=4)
    packed = packed_model(pipe)

    def held(flag):
        run, sizes = distill(pipe, packed, SETTINGS.replace(activation_checkpointing=flag)), {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.update({(t.data_ptr(), t.numel()): t.nbytes}) or t, lambda t: t
        ):
            with outputs_of(run.student, flag):
                forward(run.student, run.trajectory.inputs())
        run.close()
        return sum(sizes.values())

    assert held(True) < 0.5 * held(False)


def test_no_graph_is_kept_of_block_losses_that_are_only_recorded(monkeypatch):
    pipe, graphs = tiny.pipeline(), []
    run = distill(pipe, packed_model(pipe), SETTINGS)

    def seen(a, b):
        graphs.append(torch.is_grad_enabled())
        return block_loss(a, b)

    monkeypatch.setattr("vqlib.calibrator.calibrate.block_loss", seen)
    assert min(next(run).block_losses) > 0
    run.close()
    assert graphs == [False] * len(pipe.transformer.transformer_blocks) + [True]


@pytest.mark.parametrize("rate", [0.0, 0.02])
def test_a_stopped_run_ends_as_one_that_was_not(tmp_path, rate):
    pipe, settings = tiny.pipeline(), SETTINGS.replace(lr_latents=rate)
    packed = packed_model(pipe)
    whole = distill(pipe, packed, settings, out=tmp_path / "whole").finish()
    run = distill(pipe, packed, settings, out=tmp_path / "parts")
    for _ in range(3):
        next(run)
    run.close()
    resumed = distill(pipe, packed, settings, out=tmp_path / "parts").finish()
    assert all(torch.equal(values, trained(resumed)[name]) for name, values in trained(whole).items())
    records = read_records(tmp_path / "parts")
    assert not any(codes_differ(whole, resumed))
    assert [record.output_loss for record in records] == [r.output_loss for r in read_records(tmp_path / "whole")]


def test_a_run_belongs_to_its_start_made_here_or_loaded(tmp_path):
    pipe = tiny.pipeline()
    packed = packed_model(pipe)
    for layer in (m for m in packed.modules() if isinstance(m, VQLinear)):
        layer.bias.data += 1e-5 * torch.rand_like(layer.bias)  # as trained ones are: not what a file in float16 holds
    save(packed, tmp_path / "packed")
    loaded = load_transformer(tmp_path / "packed")
    whole = distill(pipe, packed, SETTINGS, out=tmp_path / "whole").finish()
    run = distill(pipe, packed, SETTINGS, out=tmp_path / "parts")
    for _ in range(2):
        next(run)
    run.close()
    other = harden(quantize(pipe.transformer, CODES, seed=1))
    with pytest.raises(RuntimeError, match="student.quantized_with.sha256="):
        distill(pipe, other, SETTINGS, out=tmp_path / "parts")
    again = SETTINGS.replace(activation_checkpointing=True)  # changes no bit, so it may change on the way
    resumed = distill(pipe, loaded, again, out=tmp_path / "parts").finish()
    assert all(torch.equal(values, trained(resumed)[name]) for name, values in trained(whole).items())


def test_a_loss_that_is_not_finite_ends_the_run():
    pipe = tiny.pipeline()
    packed = packed_model(pipe)
    packed.proj_out_2.weight.data *= 1e25  # behind the blocks, whose own losses stay finite
    run = distill(pipe, packed, SETTINGS.replace(path="teacher"))
    with pytest.raises(FloatingPointError, match="step 1: the loss of the output is inf"):
        next(run)


def test_a_calibrated_student_is_hardened_first_and_left_alone():
    pipe = tiny.pipeline()
    student = quantize(pipe.transformer, CODES, seed=0)
    list(calibrate(pipe, student, recipe("best", iterations=3, batch_size=4, steps=5)))
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    winners = {n: layer.assignments() for n, layer in soft_layers(student).items()}
    packed = distill(pipe, student, SETTINGS).finish()
    assert all(torch.equal(packed.get_submodule(n).assignments(), a) for n, a in winners.items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


def test_settings_that_do_not_compare_outputs_are_refused():
    pipe = tiny.pipeline()
    with pytest.raises(ValueError, match="loss_at='block'"):
        distill(pipe, packed_model(pipe), recipe("best"))
    with pytest.raises(ValueError, match="lr_latents=0.1: need ≥ 0, and loss_at='output'"):
        recipe("best", lr_latents=0.1)
    with pytest.raises(ValueError, match="lr_latents=0.1 moves assignments in vqlib.distill only"):
        calibrate(pipe, quantize(pipe.transformer, CODES), SETTINGS.replace(lr_latents=0.1))
    with pytest.raises(ValueError, match="2 candidates a sub-vector: harden"):
        with_latents(quantize(pipe.transformer, CODES))
    with pytest.raises(ValueError, match="loss_at='guided' follows the student end to end"):
        recipe("best", loss_at="guided")
    with pytest.raises(ValueError, match="path='student' needs loss_at='output'"):
        recipe("best", path="student")
    with pytest.raises(ValueError, match="recipe 'paper' does not distill"):
        recipe_distillation("paper")
