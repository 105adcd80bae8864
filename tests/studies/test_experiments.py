"""A row is computed once, goes on after a kill, and knows what it was made of."""

import copy
import dataclasses
import weakref

import families
import numpy as np
import pytest
import tiny
import torch

from vqlib.config import CalibrationConfig, SamplingConfig, VQConfig
from vqlib.evaluation.extractors import Extractor, load_extractor
from vqlib.evaluation.references import STORED, load_reference
from vqlib.models.sampling import sample
from vqlib.studies import experiments
from vqlib.studies.sources import Source
from vqlib.system.fingerprint import fingerprint

SAMPLING = SamplingConfig(steps=2, batch_size=50)
REFERENCE = "fashion-mnist-test"


@pytest.fixture
def sampled(monkeypatch):
    """How many images each call of the sampler was asked for."""
    counts, original = [], experiments.sample_batches
    monkeypatch.setattr(
        experiments,
        "sample_batches",
        lambda pipe, labels, *rest, **look: counts.append(len(labels)) or original(pipe, labels, *rest, **look),
    )
    return counts


def test_a_row_is_computed_once_and_again_only_when_model_or_conditions_change(tmp_path, sampled):
    pipe = tiny.pipeline()
    first = experiments.measure(pipe, pipe.transformer, 140, tmp_path, SAMPLING, REFERENCE, bootstrap=3)
    assert experiments.measure(pipe, pipe.transformer, 140, tmp_path, SAMPLING, REFERENCE, bootstrap=3) == first
    assert sampled == [140] and first.images == 140 and first.fd_low < first.fd < first.fd_high
    experiments.measure(pipe, pipe.transformer, 140, tmp_path, SAMPLING.replace(guidance_scale=2.0), REFERENCE)
    other = copy.deepcopy(pipe.transformer)
    other.proj_out_2.bias.add_(1.0)
    assert experiments.measure(pipe, other, 140, tmp_path, SAMPLING, REFERENCE).fd != first.fd
    assert sampled == [140, 140, 140] and not list((tmp_path / "unfinished").iterdir())


def test_a_killed_row_goes_on_from_its_last_batch_and_ends_the_same(tmp_path, sampled, monkeypatch, capsys):
    pipe, written, write = tiny.pipeline(), [], experiments.write_tensors

    def killed(path, tensors):
        write(path, tensors)
        written.append(path)
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(experiments, "write_tensors", killed)
    with pytest.raises(KeyboardInterrupt):
        experiments.measure(pipe, pipe.transformer, 140, tmp_path / "a", SAMPLING, REFERENCE)
    resumed = experiments.measure(pipe, pipe.transformer, 140, tmp_path / "a", SAMPLING, REFERENCE, progress=True)
    assert sampled == [140, 40] and len(written) == 3 and "40 images (" in capsys.readouterr().out
    whole = experiments.measure(pipe, pipe.transformer, 140, tmp_path / "b", SAMPLING, REFERENCE)
    assert {**resumed.to_dict(), "minutes": 0} == {**whole.to_dict(), "minutes": 0}


def test_kept_batches_are_the_samplers_and_a_damaged_one_is_made_again(tmp_path, sampled):
    pipe, labels, seeds = tiny.pipeline(), [1, 2, 3, 4, 5, 6], range(6)
    config = SAMPLING.replace(batch_size=2)
    expected = sample(pipe, labels, seeds, config)
    for damage in (None, 2):
        if damage:
            path = tmp_path / f"{damage:07}.safetensors"
            path.write_bytes(path.read_bytes()[:20])
        found = torch.cat(list(experiments.sampled_batches(pipe, labels, seeds, config, tmp_path)))
        assert torch.equal(found, expected)
    assert sampled == [6, 4]


def test_classes_come_in_turn():
    assert experiments.class_labels(10, 12) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]


def test_second_moments_are_let_go_before_training(tmp_path, monkeypatch):
    held, gather, train = [], experiments.input_hessians, experiments.calibrate

    def gathered(*arguments):
        found = gather(*arguments)
        held.append(weakref.ref(found))
        return found

    def trained(*arguments, **more):
        assert [reference() for reference in held] == [None]
        return train(*arguments, **more)

    monkeypatch.setattr(experiments, "input_hessians", gathered)
    monkeypatch.setattr(experiments, "calibrate", trained)
    vq = VQConfig(k=16, d=4, candidates=1, assignment="error-feedback")
    experiments.packed_model(tiny.pipeline(), vq, CalibrationConfig(iterations=1, batch_size=2, steps=3), tmp_path)
    assert len(held) == 1


def test_a_packed_model_is_made_once_and_then_loaded(tmp_path):
    pipe, vq = tiny.pipeline(), VQConfig(k=16, d=4)
    settings = CalibrationConfig(iterations=2, batch_size=2, steps=3)
    half = pipe.with_transformer(tiny.transformer().to(torch.bfloat16))
    assert len({fingerprint(experiments.packed_model(half, vq, None, tmp_path / "half")) for _ in range(2)}) == 1
    for name, how in (("k-means", None), ("calibrated", settings)):
        made = experiments.packed_model(pipe, vq, how, tmp_path / name)
        loaded = experiments.packed_model(pipe, vq, how, tmp_path / name)
        assert loaded is not made
        assert fingerprint(made) == fingerprint(loaded)
    free = settings.replace(checkpoint_every=1)  # which changes no step
    assert fingerprint(experiments.packed_model(pipe, vq, free, tmp_path / "calibrated")) == fingerprint(made)
    fed = vq.replace(
        assignment="error-feedback", candidates=1
    )  # second moments are gathered by the calibration's settings
    made = experiments.packed_model(pipe, fed, settings, tmp_path / "fed")
    assert fingerprint(experiments.packed_model(pipe, fed, free, tmp_path / "fed")) == fingerprint(made)
    with pytest.raises(RuntimeError, match=r"packed was made with seed=0, now seed=1; give another folder"):
        experiments.packed_model(pipe, vq, None, tmp_path / "k-means", seed=1)
    with pytest.raises(RuntimeError, match=r"calibration=None, now calibration=\{"):
        experiments.packed_model(pipe, vq.replace(candidates=1), settings, tmp_path / "k-means")
    other = pipe.with_transformer(tiny.transformer(1))
    with pytest.raises(RuntimeError, match="was made with source_sha256="):
        experiments.packed_model(other, vq, None, tmp_path / "k-means")


@pytest.mark.parametrize("changed", ["mean", "covariance", "features", "spatial_mean", "spatial_covariance"])
def test_references_with_other_contents_have_other_fingerprints(tmp_path, changed):
    reference = load_reference("fashion-mnist-test")
    spatial = {"spatial_mean": torch.zeros(4), "spatial_covariance": torch.eye(4)}
    one = dataclasses.replace(reference, features=reference.features[:20], **spatial)
    other = dataclasses.replace(one, **{changed: getattr(one, changed) * 1.01 + 0.01})
    paths = [r.save(tmp_path / name) for r, name in ((one, "one"), (one, "same"), (other, "other"))]
    found = [experiments.reference_fingerprint(path) for path in paths]
    assert found[0] == found[1] != found[2]


def test_a_row_is_computed_again_for_another_extractor_where_the_reference_names_none(tmp_path, sampled):
    pipe, own = tiny.pipeline(), load_extractor("fashion")
    plain = dataclasses.replace(load_reference(REFERENCE), fingerprint=None).save(tmp_path / "plain.safetensors")
    for extractor in (own, Extractor("fashion", own.module, "0" * 64), own):
        experiments.measure(pipe, pipe.transformer, 140, tmp_path / "rows", SAMPLING, plain, extractor)
    assert sampled == [140, 140]
    named = experiments.reference_fingerprint(STORED[REFERENCE], own)
    assert named == experiments.reference_fingerprint(REFERENCE)  # its own extractor, given or not


def test_a_packed_model_belongs_to_its_prompts_and_its_process(tmp_path):
    pipe, vq = families.sd3(), VQConfig(k=16, d=4, kmeans_iterations=2)
    experiments.packed_model(pipe, vq, None, tmp_path)
    for what, other in families.others(pipe).items():
        with pytest.raises(RuntimeError, match=rf"packed was made with pipeline\.{what}="):
            experiments.packed_model(other, vq, None, tmp_path)
    experiments.packed_model(dataclasses.replace(pipe, name="elsewhere"), vq, None, tmp_path)


def test_a_row_is_computed_again_for_another_process(tmp_path, sampled):
    pipe = tiny.pipeline()
    other = dataclasses.replace(pipe, schedule=dataclasses.replace(pipe.schedule, spacing="trailing"))
    rows = [experiments.measure(p, p.transformer, 140, tmp_path, SAMPLING, REFERENCE) for p in (pipe, other, pipe)]
    assert sampled == [140, 140] and rows[0] == rows[2] and rows[0].fd != rows[1].fd


def test_a_row_is_computed_again_for_another_scale_of_the_latents(tmp_path, sampled):
    pipe, vae = tiny.pipeline(), tiny.vae()
    vae.register_to_config(scaling_factor=0.01)
    other = dataclasses.replace(pipe, vae=vae)
    rows = [experiments.measure(p, p.transformer, 140, tmp_path, SAMPLING, REFERENCE) for p in (pipe, other, pipe)]
    assert sampled == [140, 140] and rows[0] == rows[2] and rows[0].fd != rows[1].fd
    assert Source.of(pipe) != Source.of(other)


def test_numpys_numbers_find_the_rows_of_pythons(tmp_path, sampled):
    pipe = tiny.pipeline()
    row = experiments.measure(pipe, pipe.transformer, 140, tmp_path, SAMPLING, REFERENCE)
    assert experiments.measure(pipe, pipe.transformer, np.int64(140), tmp_path, SAMPLING, REFERENCE) == row
    assert sampled == [140]
    method = experiments.VectorQuantized(VQConfig(), None, np.int64(1))
    assert method == experiments.VectorQuantized(VQConfig(), None, 1) and type(method.seed) is int
    with pytest.raises(ValueError, match="seed=True is not an integer"):
        experiments.VectorQuantized(VQConfig(), None, True)
