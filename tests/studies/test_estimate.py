import dataclasses
import importlib

import families
import pytest
import tiny
import torch

from vqlib.calibrator.calibrate import calibrate
from vqlib.calibrator.trajectory import Trajectory
from vqlib.config import CalibrationConfig, VQConfig
from vqlib.models import structure
from vqlib.models.blueprint import Blueprint
from vqlib.models.geometry import Geometry
from vqlib.packed.checkpoint import save
from vqlib.quantizer.quantize import quantize
from vqlib.studies.estimate import _moves, estimate
from vqlib.studies.job_memory import graph_bytes, moments_bytes
from vqlib.studies.presets import preset

module = importlib.import_module("vqlib.studies.estimate")  # vqlib.studies.estimate is the function

SETTINGS = {"vq.k": 16, "vq.d": 4, "calibration.iterations": 6, "calibration.batch_size": 2, "calibration.steps": 4}
JOB = preset("dit-mini-fashion-w2").with_settings(SETTINGS | {"images": 4, "sampling.steps": 2})


@pytest.fixture(scope="module")
def estimated():
    return estimate(tiny.pipeline(), JOB)


def test_every_stage_has_time_memory_and_disk(estimated):
    table = estimated.table()
    assert list(table["stage"]) == ["codebooks", "calibration", "sampling", "whole job"]
    assert (table["minutes"] > 0).all() and (table["memory GiB"] > 0.05).all()
    assert estimated.minutes == pytest.approx(table["minutes"].iloc[:-1].sum())
    assert "CPU, " in str(estimated) and "whole job" in str(estimated)


def test_the_disk_is_that_of_a_real_run(estimated, tmp_path):
    pipe = tiny.pipeline()
    packed = calibrate(pipe, quantize(pipe.transformer, JOB.vq), JOB.calibration, out=tmp_path).finish()
    state = (tmp_path / "state.safetensors").stat().st_size
    file = save(packed, tmp_path / "packed") / "diffusion_pytorch_model.safetensors"
    assert estimated.disk["calibration"] == pytest.approx(2 * state + file.stat().st_size, rel=0.3)


class Probe:
    """A probe of known seconds in place of a measured one."""

    seconds, checkpoint, teacher, state, optimizer, rows, layers = 2.0, 0.5, 0.25, 1000, 100, 4, 500
    whole = module._Probe.whole

    def __init__(self, *_):
        pass


def test_seconds_are_those_of_the_probe_times_the_work(monkeypatch):
    """Two blocks of two are probed; every timed call takes 3 s, so the sums can be made by hand."""
    monkeypatch.setattr(module, "_Probe", Probe)
    monkeypatch.setattr(module, "_timed", lambda call, device: (3.0, call()))
    job = JOB.with_settings({"calibration.checkpoint_every": 4, "sampling.batch_size": 4, "images": 8})
    found = estimate(tiny.pipeline(), job).seconds
    moves = (2 - 1) * 4 // 2  # image 1 of 2 is brought half of 4 timesteps ahead
    assert found["calibration"] == pytest.approx(
        6 * 2.0 + 3 * 0.5 + moves * 0.25
    )  # steps, checkpoints at 0, 4 and 6, moves
    forwards = 8 * 2 * 2 / 8  # images, halves and steps by the rows of the forward that was timed
    assert found["sampling"] == pytest.approx(forwards * 3.0 + 8 / 8 * 3.0)  # and one decoding of 8
    assert found["codebooks"] == pytest.approx(3.0)
    quarter = estimate(Geometry(hidden=64, heads=1, depth=8, sample_size=4, classes=3), job)
    monkeypatch.setattr(module, "PROBE_WEIGHTS", 2.5 * 18 * 64 * 64)  # two blocks of the eight
    assert (
        estimate(Geometry(hidden=64, heads=1, depth=8, sample_size=4, classes=3), job).seconds["codebooks"] == 4 * 3.0
    )
    assert quarter.seconds["codebooks"] == 3.0


def test_a_last_stage_has_a_line_of_its_own(monkeypatch):
    """Its graph reaches through all blocks; checkpointed, it holds one block's and the inputs of the others."""
    job = JOB.distilled(6)
    assert (job.distillation.batch_size, job.distillation.steps, job.distilled(0).distillation) == (2, 4, None)
    found = estimate(tiny.pipeline(), job)
    assert list(found.seconds) == ["codebooks", "calibration", "last stage", "sampling"]
    assert found.seconds["last stage"] > 0 and found.memory["last stage"] > 0
    assert found.disk["last stage"] > found.disk["sampling"]
    shape, sparing = Geometry(depth=28), job.distillation.replace(activation_checkpointing=True)
    row = 4 * shape.tokens * shape.hidden
    whole, less = (graph_bytes(shape, how, 4, 0) for how in (job.distillation, sparing))
    assert whole == 28 * 34 * 4 * row + 12 * shape.weights
    assert less == 34 * 4 * row + 12 * shape.weights / 28 + 28 * 4 * row
    spared = JOB.distilled(6).with_settings({"distillation.activation_checkpointing": True})
    assert spared.distillation.activation_checkpointing
    with pytest.raises(ValueError, match="'distillation.path' is not vq.…, calibration.…, sampling.…, model"):
        JOB.with_settings({"distillation.path": "teacher"})


def test_the_disk_of_sampling_is_that_of_the_images(estimated):
    assert estimated.disk["sampling"] == 4 * 1 * 32 * 32


def test_a_geometry_alone_needs_no_weights_and_leaves_random_numbers_alone(monkeypatch):
    torch.manual_seed(3)
    expected = torch.randn(2)
    torch.manual_seed(3)
    monkeypatch.setattr(module, "PROBE_WEIGHTS", 1)
    wide = estimate(Geometry(hidden=64, heads=1, depth=500, sample_size=4, classes=3), JOB)
    assert torch.equal(torch.randn(2), expected)
    narrow = estimate(Geometry(hidden=64, heads=1, depth=250, sample_size=4, classes=3), JOB)
    growth = [w - n for w, n in zip(wide.memory.values(), narrow.memory.values(), strict=True)]
    assert growth[1] > 250 * 64 * 64 * 18 * (4 + 3)  # weights, and 3 logits with state for every 4


def test_error_feedback_is_counted_with_its_second_moments(monkeypatch):
    fed, seconds = JOB.with_settings({"vq.assignment": "error-feedback", "images": 0}), []
    for batches in (64, 64_000):
        monkeypatch.setattr(module, "BATCHES", batches)
        seconds.append(estimate(tiny.pipeline(), fed).seconds["codebooks"])
    assert seconds[1] > 50 * seconds[0]
    whole = moments_bytes(Geometry())  # of DiT-XL/2: [1152, 1152] six times and [4608, 4608] in 28 blocks
    assert 4 * 28 * (6 * 1152**2 + 4608**2) < whole < 6 * 2**30


@pytest.mark.parametrize("pattern", ["transformer_blocks.1.*", "transformer_blocks.0.*", "*.to_k"])
def test_rules_for_single_layers_are_followed_where_the_probe_has_them(pattern, monkeypatch):
    monkeypatch.setattr(module, "PROBE_WEIGHTS", 1)  # the first block alone
    seen, quantize = [], module.quantize
    monkeypatch.setattr(module, "quantize", lambda t, vq, **more: seen.append(vq) or quantize(t, vq, **more))
    for rule in ({"vq.full_precision": [pattern]}, {"vq.layers": [[pattern, 8, 4]]}):
        assert estimate(tiny.pipeline(), JOB.with_settings(rule | {"images": 0})).minutes > 0
    assert [len(vq.full_precision) for vq in seen[1:2]] == [int(pattern == "*.to_k")]
    assert len(seen[-1].layers) == int(pattern != "transformer_blocks.1.*")


@pytest.mark.parametrize("rule", [{"vq.full_precision": ["*.to_kk"]}, {"vq.layers": [["*.to_kk", 8, 2]]}])
def test_a_pattern_that_fits_no_layer_is_refused(rule):
    with pytest.raises(ValueError, match=r"'\*.to_kk' fits none of the 14 layers"):
        estimate(tiny.pipeline(), JOB.with_settings(rule))


def test_a_preset_may_be_named():
    with pytest.raises(ValueError, match="'dit' is not one of"):
        estimate(tiny.pipeline(), "dit")


@pytest.mark.parametrize("batch, steps", [(1, 5), (3, 7), (16, 50)])
def test_forwards_before_the_first_step_are_counted(batch, steps):
    config, calls = CalibrationConfig(batch_size=batch, steps=steps), []
    trajectory = Trajectory(tiny.pipeline(), config)
    trajectory.stagger(lambda inputs: calls.append(1) or torch.zeros(2 * batch, 8, 8, 8))
    assert len(calls) == _moves(config)
    assert _moves(config.replace(inputs="noise")) == 0


def test_probing_leaves_the_model_as_it_was():
    pipe = tiny.pipeline()
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    estimate(pipe, JOB.with_settings({"vq.k": 16, "vq.d": 2}))
    assert all(torch.equal(before[name], tensor) for name, tensor in pipe.transformer.state_dict().items())
    assert len(structure.block_list(pipe.transformer)) == 2 and VQConfig(k=16, d=2).bits == 2


def test_a_pipeline_without_a_vae_is_estimated_where_no_images_are_asked_for():
    pipe = dataclasses.replace(tiny.pipeline(), vae=None)
    found = estimate(pipe, JOB.with_settings({"images": 0}))
    assert found.seconds["calibration"] > 0 and found.seconds["sampling"] == found.disk["sampling"] == 0


@pytest.mark.parametrize("family", ["SiT", "PixArt", "SD3", "FLUX"])
def test_other_families_are_estimated_with_and_without_weights(family):
    pipe = families.ALL[family]()
    job = JOB.with_settings({"vq.d": 2, "vq.k": 8, "images": 4})
    found = estimate(pipe, job)
    assert all(value > 0 for value in (*found.seconds.values(), *found.memory.values()))
    if family != "SiT":
        shape = Blueprint.of(pipe)
        assert shape.weights == sum(layer.weight.numel() for layer in structure.quantizable(pipe.transformer).values())
        alone = estimate(shape, job)
        assert alone.disk["calibration"] == pytest.approx(found.disk["calibration"], rel=0.01)


def test_a_probe_of_the_first_block_of_sd3_takes_the_weights_that_fit(monkeypatch):
    monkeypatch.setattr(module, "PROBE_WEIGHTS", 1)
    pipe = families.sd3()
    probe = module._first_blocks(pipe, Blueprint.of(pipe), torch.device("cpu"))
    assert len(structure.block_list(probe.transformer)) == 1
    ours, theirs = (model.transformer_blocks[0].attn.to_q.weight for model in (probe.transformer, pipe.transformer))
    assert torch.equal(ours, theirs)
