"""Rows of the same images pair: what moves both alike falls out of their difference, and replicates are drawn once."""

import math

import pytest
import tiny
import torch

from vqlib.config import SamplingConfig
from vqlib.evaluation.frechet import bootstrap_interval, frechet_from_statistics, interval, replicates
from vqlib.evaluation.references import load_reference
from vqlib.studies import compared
from vqlib.studies.baselines.baseline import FullPrecision
from vqlib.studies.compared import Compared
from vqlib.studies.engines import complete, run
from vqlib.studies.processes import Here
from vqlib.studies.row_tasks import Evaluated, Made, Measuring


def test_replicates_of_two_rows_pair(tmp_path):
    """What moves both rows alike falls out of their difference: its interval is far narrower than either's own."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=generator) + 1.0
    mean, covariance = torch.zeros(6, dtype=torch.float64), torch.eye(6, dtype=torch.float64)
    other = x + 0.02 * torch.randn(400, 6, generator=generator) + 0.05
    a, b = (replicates(rows, mean, covariance, 60) for rows in (x, other))
    (low, high), (own_low, own_high) = interval(0.0, b - a), interval(0.0, b)
    assert high - low < 0.3 * (own_high - own_low)
    assert torch.equal(a, replicates(x, mean, covariance, 60)) and not torch.equal(
        a, replicates(x, mean, covariance, 60, seed=1)
    )
    fd = frechet_from_statistics(x.double().mean(0), x.double().T.cov(), mean, covariance)
    assert bootstrap_interval(x, mean, covariance, fd, 60) == pytest.approx(tuple(max(0.0, e) for e in interval(fd, a)))


def row(fd, images=140):
    return {"bits_per_weight": 2.0, "metrics": {"fd": fd, "accuracy": None, "images": images}}


def test_a_verdict_is_given_where_the_interval_of_the_difference_leaves_out_0():
    shared = torch.linspace(-1, 1, 50, dtype=torch.float64)
    found = {
        "full": shared,
        "near": shared + 0.5 + shared * 0.2,
        "far": shared + 0.5,
        "two seeds": shared,
        "fewer": shared,
    }
    results = {"full": [row(1.0)], "near": [row(1.1)], "far": [row(1.5)], "two seeds": [row(1.0), row(1.4)]}
    results["fewer"] = [row(1.0, images=130)]
    rows = Compared(results, found)
    assert rows.more("far", "full") == pytest.approx((0.5, 0.5, 0.5))
    assert rows.verdict("far", "full") == "behind" and rows.verdict("full", "far") == "ahead"
    difference, low, high = rows.more("near", "full")
    assert low < 0 < difference < high and rows.verdict("near", "full") == "not apart"
    assert rows.mean("two seeds", "fd") == pytest.approx(1.2) and math.isnan(rows.mean("full", "accuracy"))
    with pytest.raises(ValueError, match="far has 140 images, fewer 130: rows compare with the same images"):
        rows.verdict("far", "fewer")
    assert rows.alone("full")[0] > 0.0 and rows.alone("far")[1] == pytest.approx(1.5 + 0.95, abs=0.01)


def test_replicates_are_drawn_once_and_belong_to_their_row(tmp_path, monkeypatch):
    pipe = tiny.pipeline()
    made = Made(Measuring.of(pipe, "fashion-mnist-test"), FullPrecision())
    tasks = {steps: [Evaluated(made, 140, SamplingConfig(steps=steps))] for steps in (1, 2)}
    assert Compared.of(tmp_path, tasks).results == {}  # nothing is finished, and nothing is made for it
    assert not list(tmp_path.iterdir())
    complete(run(tmp_path, [task for own in tasks.values() for task in own], Here()))
    found = Compared.of(tmp_path, tasks, resamples=5).found
    assert len(found[1]) == 5 and not torch.equal(found[1], found[2])
    task, real = tasks[1][0], load_reference("fashion-mnist-test")
    labels = torch.arange(140) % len(pipe.class_names)  # images are drawn within the class they were asked for
    expected = replicates(task.features(tmp_path), real.mean, real.covariance, 5, labels=labels)
    assert torch.equal(found[1], expected)
    assert len(Compared.of(tmp_path, tasks, resamples=4).found[1]) == 4
    monkeypatch.setattr(compared, "replicates", lambda *_, **__: pytest.fail("drawn again"))
    again = Compared.of(tmp_path, tasks, resamples=5).found
    assert all(torch.equal(again[steps], found[steps]) for steps in tasks)
