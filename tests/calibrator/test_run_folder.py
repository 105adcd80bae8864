"""A run on disk: what it belongs to, how it goes on, and that its folder is free whatever went wrong."""

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_calibrate import GEOMETRY, SETTINGS, prepared, trained_tensors

from vqlib.calibrator import runs
from vqlib.calibrator.calibrate import calibrate
from vqlib.calibrator.hessians import input_hessians
from vqlib.calibrator.runs import read_records
from vqlib.config import recipe
from vqlib.packed.harden import harden, soften
from vqlib.quantizer.quantize import quantize
from vqlib.quantizer.soft import CandidateLinear


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
    list(calibrate(pipe, student, settings))
    whole = trained_tensors(student)
    for steps in (1, 1, 2):
        pipe, student = prepared()
        if (tmp_path / "state.safetensors").exists():
            for layer in student.modules():
                if isinstance(layer, CandidateLinear):
                    layer.codebook.data += 1e-7
                    layer.candidates = layer.candidates.flip(0)
        run = calibrate(pipe, student, settings, out=tmp_path)
        for _ in range(steps):
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


def test_codes_found_by_other_second_moments_are_another_run(tmp_path):
    pipe, _ = prepared()
    codes = GEOMETRY.replace(assignment="error-feedback")

    def begun(inputs, batches):
        student = quantize(pipe.transformer, codes, hessians=input_hessians(pipe, inputs, batches))
        return calibrate(pipe, student, SETTINGS, out=tmp_path)

    begun(SETTINGS, 1).close()
    begun(SETTINGS.replace(checkpoint_every=7), 1).close()  # which no second moment follows
    with pytest.raises(RuntimeError, match="student.quantized_with.hessians.batches=1, now .*=2"):
        begun(SETTINGS, 2)
    with pytest.raises(RuntimeError, match="student.quantized_with.hessians.seed=0, now .*=5"):
        begun(SETTINGS.replace(seed=5), 1)


def test_codes_that_no_settings_tell_apart_are_another_run(tmp_path):
    pipe, _ = prepared()
    soft = [soften(harden(quantize(pipe.transformer, GEOMETRY, seed=seed))) for seed in (0, 1)]
    calibrate(pipe, soft[0], SETTINGS, out=tmp_path / "soft").close()
    with pytest.raises(RuntimeError, match="student.quantized_with.sha256="):
        calibrate(pipe, soft[1], SETTINGS, out=tmp_path / "soft")
    codes, moments = GEOMETRY.replace(assignment="error-feedback"), dict(input_hessians(pipe, SETTINGS, 1))
    for _ in range(2):  # the same ones are the same run
        calibrate(pipe, quantize(pipe.transformer, codes, hessians=moments), SETTINGS, out=tmp_path / "fed").close()
    others = {name: torch.eye(len(hessian)) for name, hessian in moments.items()}
    with pytest.raises(RuntimeError, match="student.quantized_with.hessians.sha256="):
        calibrate(pipe, quantize(pipe.transformer, codes, hessians=others), SETTINGS, out=tmp_path / "fed")


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
    with pytest.raises(RuntimeError, match="has 8 iterations done, more than iterations=6"):
        calibrate(pipe, student, SETTINGS, out=tmp_path)


@pytest.mark.parametrize("timed", [{"lr_decay": "cosine"}, {"freeze_rule": "schedule"}], ids=lambda c: next(iter(c)))
def test_a_run_whose_schedule_follows_its_length_is_not_made_longer(tmp_path, timed):
    settings, (name, value) = SETTINGS.replace(**timed), *timed.items()
    pipe, student = prepared()
    run = calibrate(pipe, student, settings, out=tmp_path)
    next(run)
    run.close()
    for other in (8, 4):
        why = (
            f"iterations=6, now calibration.iterations={other}, which {name}='{value}' follows; give .* another folder"
        )
        with pytest.raises(RuntimeError, match=why):
            calibrate(pipe, student, settings.replace(iterations=other), out=tmp_path)
    calibrate(pipe, student, settings.replace(checkpoint_every=1), out=tmp_path).close()


def test_whatever_goes_wrong_in_a_step_gives_the_folder_back(tmp_path, monkeypatch):
    pipe, student = prepared()
    run = calibrate(pipe, student, SETTINGS, out=tmp_path)
    monkeypatch.setattr(run.blocks[1], "step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        next(run)
    pipe, student = prepared()
    calibrate(pipe, student, SETTINGS, out=tmp_path).close()
    del caught


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_gives_the_folder_back(tmp_path):
    pipe, student = prepared()
    run = calibrate(pipe, student, SETTINGS, out=tmp_path)
    run.folder._records = open("/dev/full", "a", encoding="utf-8")
    with pytest.raises(OSError, match="No space left") as caught:
        next(run)
    pipe, student = prepared()
    calibrate(pipe, student, SETTINGS, out=tmp_path).close()
    del caught


def test_a_run_belongs_to_the_teacher_compiled_or_not(tmp_path):
    pipe, student = prepared()
    calibrate(pipe, student, SETTINGS, out=tmp_path).close()
    pipe, student = prepared()
    compiled = pipe.with_transformer(torch.compile(pipe.transformer, backend="eager"))
    calibrate(compiled, student, SETTINGS, out=tmp_path).close()


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
