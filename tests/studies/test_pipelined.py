"""A calibration cut into stages is the calibration of one process, bit for bit, resumed and cut otherwise, too."""

from dataclasses import replace

import families
import pytest
import tiny
import torch

from vqlib.calibrator.calibrate import calibrate
from vqlib.calibrator.hessians import input_hessians
from vqlib.calibrator.runs import read_records
from vqlib.calibrator.stages import Stage
from vqlib.config import CalibrationConfig, VQConfig, recipe
from vqlib.models import pipeline, structure
from vqlib.quantizer.quantize import quantize
from vqlib.quantizer.soft import soft_layers
from vqlib.studies.pipelined import _Actor, calibrate_in_stages, cut
from vqlib.studies.sources import Source
from vqlib.system.fingerprint import fingerprint

VQ = VQConfig(k=16, d=4, candidates=2, kmeans_iterations=3)
SHORT = {"iterations": 5, "batch_size": 2, "steps": 3, "checkpoint_every": 2}
RUN = CalibrationConfig(**SHORT)
BLOCKS = 3


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline(blocks=BLOCKS)


def seen(records):
    return [(r.iteration, r.block_losses, r.ratio_loss, r.layers) for r in records]


def whole(pipe, config=RUN, vq=VQ):
    run = calibrate(pipe, quantize(pipe.transformer, vq, seed=3), config)
    return seen(run), fingerprint(run.finish())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"freeze_rule": "schedule", "ratio_loss_when": "never", "lr_decay": "cosine"},
        {"train_codebooks": "frozen", "guidance_scale": 1.0, "optimizer": "adam"},
    ],
)
@pytest.mark.parametrize("stages", [2, 3])
def test_stages_are_one_calibration(pipe, stages, changes):
    config = RUN.replace(**changes)
    run = calibrate_in_stages(pipe, VQ, config, stages, seed=3)
    assert (seen(run), fingerprint(run.finish())) == whole(pipe, config)


def test_a_stopped_run_goes_on_where_all_blocks_were_kept_and_may_be_cut_otherwise(pipe, tmp_path):
    first = calibrate_in_stages(pipe, VQ, RUN, 3, seed=3, out=tmp_path)
    for _ in range(3):
        next(first)
    first.close()
    assert len(list(tmp_path.glob("block-*-2.safetensors"))) == BLOCKS == len(list(tmp_path.glob("block-*")))
    again = calibrate_in_stages(pipe, VQ, RUN, 2, seed=3, out=tmp_path)
    assert again.iteration == 2
    records, expected = seen(again), whole(pipe)
    assert records == expected[0][2:] and seen(read_records(tmp_path)) == expected[0]
    assert fingerprint(again.finish()) == expected[1]
    with pytest.raises(RuntimeError, match=f"has {RUN.iterations} iterations done, more than iterations=2"):
        calibrate_in_stages(pipe, VQ, RUN.replace(iterations=2), 2, seed=3, out=tmp_path)
    with pytest.raises(RuntimeError, match="holds a run with seed=3, now seed=4"):
        calibrate_in_stages(pipe, VQ, RUN, 2, seed=4, out=tmp_path)
    other = replace(pipe, schedule=replace(pipe.schedule, spacing="trailing"))
    with pytest.raises(RuntimeError, match="holds a run with pipeline.process.spacing=linspace, now .*=trailing"):
        calibrate_in_stages(other, VQ, RUN, 2, seed=3, out=tmp_path)


def test_a_kill_between_blocks_and_trajectory_leaves_the_checkpoint_before(pipe, tmp_path, monkeypatch):
    run = calibrate_in_stages(pipe, VQ, RUN, 2, seed=3, out=tmp_path)
    next(run), next(run), next(run)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run.folder, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        next(run)
    run.close()
    again = calibrate_in_stages(pipe, VQ, RUN, 2, seed=3, out=tmp_path)
    assert again.iteration == 2 and seen(again) == whole(pipe)[0][2:]
    again.close()


def test_no_stage_holds_the_linears_of_others(pipe):
    own = Stage(tiny.pipeline(blocks=BLOCKS), VQ, RUN, (1, 2), seed=3)
    names = {name for name in structure.quantizable(pipe.transformer) if name.startswith("transformer_blocks.1.")}
    assert set(soft_layers(own.models[1])) == set(structure.quantizable(own.pipe.transformer)) == names
    codes = quantize(pipe.transformer, VQ, seed=3)
    for name, layer in soft_layers(codes).items():
        assert name not in names or torch.equal(layer.codebook, own.layers[name].codebook)


@pytest.mark.parametrize(
    "vq, config, message",
    [
        (VQ, RUN.replace(block_inputs="student"), "block_inputs='student': stages are independent"),
        (VQ, RUN.replace(ratio_loss_when="rising"), "looks at the ratios of all blocks"),
        (VQ.replace(codebook_scope="model"), RUN, "codebook_scope='model': stages share no codebook"),
    ],
)
def test_what_stages_cannot_do_is_refused(pipe, vq, config, message):
    with pytest.raises(ValueError, match=message):
        calibrate_in_stages(pipe, vq, config, 2)


def test_another_place_is_refused_and_not_taken_for_this_process(pipe):
    with pytest.raises(ValueError, match="on='Ray' is not one of local, ray"):
        calibrate_in_stages(pipe, VQ, RUN, 2, on="Ray")


def test_an_actor_that_finds_another_pipeline_under_the_name_refuses_it(monkeypatch):
    pipe = families.sd3()
    for what, other in families.others(pipe).items():
        monkeypatch.setattr(pipeline, "load", lambda name, other=other, **options: other)
        with pytest.raises(RuntimeError, match=f"SD3 is another pipeline here: {what}="):
            _Actor(Source.of(pipe), "cpu", (VQ, RUN, (0, 1), 3), torch.get_num_threads())


def test_every_stage_gathers_the_second_moments_of_its_own_layers(pipe, tmp_path):
    """Recipe `best`, which needs them: codes, records and model are those of one process, after a stop, too."""
    vq, config = VQ.replace(assignment="error-feedback", ratio_start="leading"), recipe("best", **SHORT)
    student = quantize(pipe.transformer, vq, seed=3, hessians=input_hessians(pipe, config, 4))
    one = calibrate(pipe, student, config)
    expected = seen(one), fingerprint(one.finish())
    run = calibrate_in_stages(pipe, vq, config, 2, seed=3, batches=4)
    assert (seen(run), fingerprint(run.finish())) == expected
    first = calibrate_in_stages(pipe, vq, config, 2, seed=3, out=tmp_path, batches=4)
    next(first), next(first)
    first.close()
    again = calibrate_in_stages(pipe, vq, config, 3, seed=3, out=tmp_path, batches=4)
    assert again.iteration == 2 and fingerprint(again.finish()) == expected[1]
    with pytest.raises(ValueError, match="batches=0 must be at least 1"):
        calibrate_in_stages(pipe, vq, config, 2, batches=0)


@pytest.mark.parametrize("assignment", ["nearest", "error-feedback"])
def test_patterns_that_fit_the_blocks_of_some_stages_only_are_those_of_the_whole_model(pipe, assignment):
    """The last stage has nothing to quantize."""
    patterns = {"layers": (("transformer_blocks.0.*", 8, 4),), "full_precision": ("transformer_blocks.2.*",)}
    vq = VQ.replace(assignment=assignment, **patterns)
    hessians = input_hessians(pipe, RUN, 1) if assignment == "error-feedback" else None
    one = calibrate(pipe, quantize(pipe.transformer, vq, seed=3, hessians=hessians), RUN)
    expected = seen(one), fingerprint(one.finish())
    run = calibrate_in_stages(pipe, vq, RUN, BLOCKS, seed=3, batches=1)
    assert (seen(run), fingerprint(run.finish())) == expected
    with pytest.raises(ValueError, match="pattern 'blocks.7.*' fits none of the 21 layers"):
        calibrate_in_stages(pipe, vq.replace(full_precision=("blocks.7.*",)), RUN, BLOCKS)


def test_layers_in_full_precision_are_copies_of_the_models(pipe):
    vq, before = VQ.replace(full_precision=("*.ff.net.2",)), fingerprint(pipe.transformer)
    packed = calibrate_in_stages(pipe, vq, RUN.replace(iterations=1), 2, seed=3).finish()
    left, name = packed.state_dict(), "transformer_blocks.0.ff.net.2.weight"
    assert fingerprint(pipe.transformer) == before
    assert torch.equal(left[name], pipe.transformer.state_dict()[name].half().float())


def test_blocks_are_cut_as_equally_as_can_be():
    assert cut(28, 8) == [(0, 3), (3, 7), (7, 10), (10, 14), (14, 17), (17, 21), (21, 24), (24, 28)]
    assert cut(2, 1) == [(0, 2)] and cut(3, 3) == [(0, 1), (1, 2), (2, 3)]
    with pytest.raises(ValueError, match="stages=4 is outside 1 … 3, the model's blocks"):
        cut(3, 4)


@pytest.mark.parametrize("family", [families.pixart, families.sd3, families.flux], ids=lambda f: f.__name__)
def test_stages_hand_on_all_streams_of_a_family(family):
    pipe = family()
    config = RUN.replace(iterations=2, batch_size=3)
    run = calibrate_in_stages(pipe, VQ, config, len(structure.block_list(pipe.transformer)), seed=3)
    assert (seen(run), fingerprint(run.finish())) == whole(pipe, config)
