import copy

import tiny

from vqlib import experiments
from vqlib.config import CalibrationConfig, SamplingConfig, VQConfig

SAMPLING = SamplingConfig(steps=2, batch_size=50)


def test_a_row_is_computed_once_and_again_only_when_model_or_conditions_change(tmp_path, monkeypatch):
    pipe, calls = tiny.pipeline(), []
    original = experiments.sample
    monkeypatch.setattr(experiments, "sample", lambda *a, **k: calls.append(1) or original(*a, **k))
    first = experiments.measure(pipe, pipe.transformer, 140, tmp_path, SAMPLING)
    assert experiments.measure(pipe, pipe.transformer, 140, tmp_path, SAMPLING) == first
    assert len(calls) == 1 and first.images == 140
    experiments.measure(pipe, pipe.transformer, 140, tmp_path, SAMPLING.replace(guidance_scale=2.0))
    other = copy.deepcopy(pipe.transformer)
    other.proj_out_2.bias.add_(1.0)
    assert experiments.measure(pipe, other, 140, tmp_path, SAMPLING).fd != first.fd
    assert len(calls) == 3


def test_equal_models_have_equal_fingerprints():
    a, b, c = tiny.transformer(0), tiny.transformer(0), tiny.transformer(1)
    assert experiments.fingerprint(a) == experiments.fingerprint(b) != experiments.fingerprint(c)


def test_classes_come_in_turn():
    assert experiments.class_labels(tiny.pipeline(), 12) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]


def test_a_packed_model_is_made_once_and_then_loaded(tmp_path):
    pipe, vq = tiny.pipeline(), VQConfig(k=16, d=4)
    settings = CalibrationConfig(iterations=2, batch_size=2, steps=3)
    for name, how in (("k-means", None), ("calibrated", settings)):
        made = experiments.packed_model(pipe, vq, how, tmp_path / name)
        loaded = experiments.packed_model(pipe, vq, how, tmp_path / name)
        assert loaded is not made
        assert experiments.fingerprint(made) == experiments.fingerprint(loaded)
