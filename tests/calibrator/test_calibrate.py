import copy
import math
import os
import signal
import threading

import pytest
import tiny
import torch
from safetensors.torch import load_file

from vqlib.calibrator import runs
from vqlib.calibrator.calibrate import calibrate
from vqlib.calibrator.hessians import input_hessians
from vqlib.calibrator.runs import read_records
from vqlib.calibrator.teacher import following
from vqlib.calibrator.trajectory import Trajectory
from vqlib.config import VQConfig, recipe
from vqlib.kernels import reference
from vqlib.models import dit
from vqlib.packed.checkpoint import load_transformer, save
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
            for b in dit.block_list(pipe.transformer)
            if keep is not None
        ]
        output = dit.forward(pipe.transformer, inputs.x, inputs.timestep, inputs.labels)
        for handle in handles:
            handle.remove()
        return output

    trajectory.stagger(teacher)
    losses = []
    for _ in range(SETTINGS.iterations):
        seen = []
        output = teacher(trajectory.inputs(), seen)
        blocks = dit.block_list(twin)
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


def test_records_are_written_as_they_happen(tmp_path):
    pipe, student = prepared()
    run = calibrate(pipe, student, SETTINGS, out=tmp_path)
    first = next(run)
    assert read_records(tmp_path) == [first]
    layer = first.layers["transformer_blocks.0.attn1.to_q"]
    assert sum(layer["histogram"]) == layer["count"] == 32 * 32 // 4
    assert 0 <= first.mean("moved") <= 1 and 0 <= first.mean("entropy") <= 1.1 and layer["unused"] >= 0
    run.close()


EARLY = recipe("best", iterations=6, batch_size=4, steps=5, checkpoint_every=2, freeze_from=0.1, freeze_until=0.4)


@pytest.mark.parametrize("settings", [SETTINGS, EARLY], ids=["paper", "best, all frozen before the checkpoint"])
def test_a_stopped_run_resumes_bit_equal(tmp_path, settings):
    pipe, student = prepared()
    list(calibrate(pipe, student, settings))
    whole = student.state_dict()

    pipe, student = prepared()
    run = calibrate(pipe, student, settings, out=tmp_path)
    for _ in range(5):  # the last checkpoint is at 4
        next(run)
    run.close()
    pipe, student = prepared()
    resumed = calibrate(pipe, student, settings, out=tmp_path)
    assert resumed.iteration == 4
    resumed.finish()
    assert all(torch.equal(whole[name], value) for name, value in student.state_dict().items())
    assert [r.iteration for r in read_records(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_folder_of_other_settings_is_refused_with_the_first_difference(tmp_path):
    pipe, student = prepared()
    calibrate(pipe, student, SETTINGS, out=tmp_path).close()
    with pytest.raises(RuntimeError, match="calibration.lr_ratios=0.05, now calibration.lr_ratios=0.1"):
        calibrate(pipe, student, SETTINGS.replace(lr_ratios=0.1), out=tmp_path)


def test_a_folder_in_use_is_refused(tmp_path):
    pipe, student = prepared()
    run = calibrate(pipe, student, SETTINGS, out=tmp_path)
    with pytest.raises(RuntimeError, match="in use by another process, or a run of this one that was not closed"):
        calibrate(pipe, student, SETTINGS, out=tmp_path)
    run.close()
    calibrate(pipe, student, SETTINGS, out=tmp_path).close()


def test_a_damaged_checkpoint_does_not_keep_the_folder(tmp_path):
    pipe, student = prepared()
    calibrate(pipe, student, SETTINGS, out=tmp_path).close()
    (tmp_path / "state.safetensors").write_bytes(b"nonsense")
    for _ in range(2):  # the second one meets the same error, not a lock
        with pytest.raises(RuntimeError, match="is damaged") as caught:
            calibrate(pipe, student, SETTINGS, out=tmp_path)
    del caught


def test_what_a_killed_write_left_is_removed_by_the_next_run(tmp_path):
    pipe, student = prepared()
    (tmp_path / ".state.safetensors.abc123").write_bytes(b"half a checkpoint")
    calibrate(pipe, student, SETTINGS, out=tmp_path).close()
    assert not list(tmp_path.glob(".state.safetensors.*"))


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


def test_a_folder_holds_the_run_of_one_model_only(tmp_path):
    pipe, student = prepared()
    calibrate(pipe, student, SETTINGS, out=tmp_path).close()
    pipe, student = prepared()
    next(iter(pipe.transformer.parameters())).data[0] += 1e-3
    with pytest.raises(RuntimeError, match="student.teacher_sha256="):
        calibrate(pipe, student, SETTINGS, out=tmp_path)


def test_a_run_goes_on_from_its_checkpoint_whatever_the_last_bits_of_the_codes_made_again(tmp_path):
    """Another thread count, processor or GPU gives other last bits: the start that counts is the one in the folder."""
    settings = SETTINGS.replace(iterations=4, checkpoint_every=1)
    pipe, student = prepared()
    whole = trained_tensors(student) if list(calibrate(pipe, student, settings)) else None
    for steps in (0, 1, 3):
        pipe, student = prepared()
        if steps:
            for layer in student.modules():
                if isinstance(layer, CandidateLinear):
                    layer.codebook.data += 1e-7
                    layer.candidates = layer.candidates.flip(0)
        run = calibrate(pipe, student, settings, out=tmp_path)
        for _ in range(max(1, steps) if steps < 3 else 2):
            next(run)
        run.close()
    assert run.iteration == 4
    assert all(torch.equal(whole[name], value) for name, value in trained_tensors(student).items())


def test_codes_asked_for_otherwise_are_another_run(tmp_path):
    pipe, student = prepared()
    calibrate(pipe, student, SETTINGS, out=tmp_path).close()
    pipe, student = prepared(GEOMETRY.replace(kmeans_iterations=2))
    with pytest.raises(RuntimeError, match="student.quantized_with.kmeans_iterations=100, now .*=2"):
        calibrate(pipe, student, SETTINGS, out=tmp_path)


def test_a_stopped_run_may_be_asked_for_more_steps_and_other_checkpoints_but_not_for_fewer_steps_than_it_has(tmp_path):
    pipe, student = prepared()
    run = calibrate(pipe, student, SETTINGS, out=tmp_path)
    list(run)
    run.close()
    pipe, student = prepared()
    longer = calibrate(pipe, student, SETTINGS.replace(iterations=8, checkpoint_every=1), out=tmp_path)
    assert [record.iteration for record in longer] == [7, 8]
    longer.close()
    twin = prepared()
    whole = calibrate(*twin, SETTINGS.replace(iterations=8))  # constant rates: the same as one run of 8
    assert [r.block_losses for r in whole] == [r.block_losses for r in read_records(tmp_path)]
    pipe, student = prepared()
    with pytest.raises(RuntimeError, match="has 8 steps done, more than iterations=6"):
        calibrate(pipe, student, SETTINGS, out=tmp_path)


def test_whatever_goes_wrong_in_a_step_gives_the_folder_back(tmp_path, monkeypatch):
    pipe, student = prepared()
    run = calibrate(pipe, student, SETTINGS, out=tmp_path)
    monkeypatch.setattr(run.blocks[1], "step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        next(run)
    pipe, student = prepared()
    calibrate(pipe, student, SETTINGS, out=tmp_path).close()
    del caught


def test_settings_that_json_cannot_hold_give_the_folder_back(tmp_path):
    with pytest.raises(TypeError) as caught:
        runs.RunFolder(tmp_path, {"calibration": {"iterations": object()}})
    runs.RunFolder(tmp_path, {"calibration": {"iterations": 2}}).close()
    del caught


def test_a_damaged_settings_file_is_named(tmp_path):
    runs.RunFolder(tmp_path, {}).close()
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RuntimeError, match="run.json is damaged"):
        runs.RunFolder(tmp_path, {})


@pytest.mark.parametrize("inputs", ["full", "student", "end-to-end"])
@pytest.mark.parametrize("part", ["whole", "blocks"])
def test_a_compiled_teacher_is_followed_block_by_block(inputs, part):
    """A compiler leaves out hooks that come after it: once losses of 0 over 0 blocks."""
    settings = SETTINGS.replace(block_inputs=inputs)
    pipe, student = prepared()
    plain = [record.block_losses for record in calibrate(pipe, student, settings)]
    pipe, student = prepared()
    for module in [pipe.transformer] if part == "whole" else dit.block_list(pipe.transformer):
        module.compile(backend="eager")
    dit.forward(pipe.transformer, torch.zeros(1, 4, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
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


def test_a_damaged_line_among_the_records_is_named(tmp_path):
    pipe, student = prepared()
    run = calibrate(pipe, student, SETTINGS, out=tmp_path)
    list(run)
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    (tmp_path / "records.jsonl").write_text("\n".join([*lines[:-1], lines[-1][:40]]))
    assert len(read_records(tmp_path)) == 5  # the last one is being written
    (tmp_path / "records.jsonl").write_text("\n".join([lines[0], lines[1][:40], *lines[2:]]))
    with pytest.raises(RuntimeError, match="records.jsonl: line 2 of 6 is damaged"):
        read_records(tmp_path)


def test_blocks_that_nobody_saw_are_an_error():
    pipe, _ = prepared()
    with pytest.raises(RuntimeError, match=r"its 2 blocks were seen \[0, 0\] times"):
        with following(pipe.transformer, lambda *_: None):
            pass


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
    assert dit.forward(harden(student), x, torch.zeros(4), torch.arange(4)).isfinite().all()


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


def test_the_run_goes_on_while_a_checkpoint_is_written_as_it_was(tmp_path, monkeypatch):
    released, write = threading.Event(), runs.write_tensors

    def slow(path, tensors, metadata):
        assert released.wait(30)
        return write(path, tensors, metadata)

    pipe, student = prepared()
    run = calibrate(pipe, student, SETTINGS, out=tmp_path)
    start = (tmp_path / "state.safetensors").read_bytes()
    monkeypatch.setattr(runs, "write_tensors", slow)
    monkeypatch.setattr(runs, "on_accelerator", lambda tensors: True)
    next(run), next(run)  # a checkpoint is due after the second step
    saved = trained_tensors(student)
    next(run)
    assert (tmp_path / "state.safetensors").read_bytes() == start
    released.set()
    run.close()
    state = load_file(tmp_path / "state.safetensors")
    assert all(torch.equal(state[f"student.{name}"], value) for name, value in saved.items())
    assert not all(torch.equal(value, trained_tensors(student)[name]) for name, value in saved.items())


def test_a_checkpoint_that_could_not_be_written_is_not_passed_over(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    pipe, student = prepared()
    run = calibrate(pipe, student, SETTINGS, out=tmp_path)
    monkeypatch.setattr(runs, "write_tensors", full)
    monkeypatch.setattr(runs, "on_accelerator", lambda tensors: True)
    with pytest.raises(OSError, match="No space left"):
        list(run)  # told when the next checkpoint is due
    assert run.iteration == 4
    pipe, student = prepared()
    monkeypatch.undo()
    calibrate(pipe, student, SETTINGS, out=tmp_path).close()  # the folder was given back all the same


def test_products_in_half_precision_train_float32_codebooks_to_nearly_the_same_loss():
    def losses(products):
        pipe, student = prepared()
        pipe = pipe.with_transformer(dit.with_fast_products(pipe.transformer))
        run = calibrate(pipe, student, SETTINGS.replace(products=products))
        found = [record.loss for record in run]
        assert all(p.dtype == torch.float32 for p in student.parameters())
        return found

    exact, rounded = losses("float32"), losses("bfloat16")
    assert exact != rounded and rounded == pytest.approx(exact, rel=0.02)
