"""k-means: quality, guarantees, errors; layers fitted together."""

import pytest
import torch

from vqlib.quantizer import codebook as module
from vqlib.quantizer import lloyd
from vqlib.quantizer.codebook import fit_codebook, fit_codebooks


def _points(count=6000, d=4, seed=0):
    return torch.randn(count, d, generator=torch.Generator().manual_seed(seed))


def _plain_lloyd(x, codewords, iterations):
    """Full Lloyd iterations in float64, as the textbook has them: -> mean squared error per coordinate."""
    x, codewords = x.double(), codewords.double()
    for _ in range(iterations):
        codes = torch.cdist(x, codewords).argmin(dim=1)
        counts = torch.bincount(codes, minlength=len(codewords))
        sums = torch.zeros_like(codewords).index_add_(0, codes, x)
        codewords = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], codewords)
    return torch.cdist(x, codewords).min(dim=1).values.square().mean().item() / x.shape[1]


def test_separated_clusters_are_found_exactly():
    centers = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    offsets = torch.tensor([[0.1, 0.0], [-0.1, 0.0], [0.0, 0.1], [0.0, -0.1]])
    x = (centers[:, None] + offsets).reshape(-1, 2)
    fitted = min((fit_codebook(x, 4, seed=seed) for seed in range(8)), key=lambda c: c.mse)
    order = fitted.codewords.round().tolist()
    assert sorted(order) == sorted(centers.tolist())
    assert fitted.mse == pytest.approx(0.01 / 2, rel=1e-4)


def test_mse_is_the_error_of_what_is_returned():
    x = _points()
    fitted = fit_codebook(x, 32)
    assert fitted.mse == pytest.approx(
        (x - fitted.codewords[fitted.assignments]).double().square().mean().item(), rel=1e-6
    )
    assert torch.equal(fitted.assignments, module.kernels.assign(x, fitted.codewords))
    assert fitted.codewords.dtype == torch.float32 and fitted.assignments.dtype == torch.int64


@pytest.mark.parametrize("start", module.STARTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_error_never_rises_and_no_codeword_is_empty(start, seed):
    x = _points(3000, 2, seed)
    fitted = fit_codebook(x, 64, seed=seed, start=start, tolerance=0.0, iterations=40)
    assert all(after <= before for before, after in zip(fitted.history, fitted.history[1:]))
    assert fitted.history[-1] == fitted.mse < fitted.history[0]
    assert torch.bincount(fitted.assignments, minlength=64).min() > 0


def test_early_stop_stays_within_half_a_percent_of_a_hundred_full_iterations():
    x = _points(20000, 4)
    start = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(1))[:64]]
    full = _plain_lloyd(x, start, 100)
    whole, sampled = fit_codebook(x, 64), fit_codebook(x, 64, subsample=64)
    assert whole.mse < 1.005 * full and sampled.mse < 1.005 * full
    assert len(whole.history) < 80


def test_large_layers_are_fitted_to_a_sample_first(monkeypatch):
    x, seen = _points(20000, 4), []
    monkeypatch.setattr(module, "_LARGE", 20000)
    monkeypatch.setattr(module, "_SAMPLE", 64)
    iterate = module.lloyd
    monkeypatch.setattr(module, "lloyd", lambda x, *a: seen.append(x.shape[1]) or iterate(x, *a))
    fitted = fit_codebook(x, 64)
    assert seen == [64 * 64, 20000]
    fit_codebook(x[1:], 64)
    assert seen[2:] == [19999]
    assert torch.equal(fitted.codewords, fit_codebook(x, 64, subsample=64).codewords)


def test_result_is_a_fixed_point_of_plain_lloyd():
    x = _points(2000, 2)
    fitted = fit_codebook(x, 16, tolerance=0.0, iterations=500)
    assert _plain_lloyd(x, fitted.codewords, 1) == pytest.approx(fitted.mse, rel=1e-5)


def test_same_seed_same_codebook_and_other_seed_another():
    x = _points()
    one, two, other = fit_codebook(x, 16, seed=3), fit_codebook(x, 16, seed=3), fit_codebook(x, 16, seed=4)
    assert torch.equal(one.codewords, two.codewords) and torch.equal(one.assignments, two.assignments)
    assert not torch.equal(one.codewords, other.codewords)


def test_as_many_codewords_as_distinct_points_reproduce_them():
    values = _points(12, 3)
    x = values[torch.randint(0, 12, (500,), generator=torch.Generator().manual_seed(0))]
    fitted = fit_codebook(torch.cat([x, values]), 12)
    assert fitted.mse == pytest.approx(0.0, abs=1e-12)
    assert torch.bincount(fitted.assignments, minlength=12).min() > 0


@pytest.mark.parametrize("start", module.STARTS)
def test_few_values_repeated_often_leave_no_codeword_empty(start):
    values = torch.arange(40.0).reshape(20, 2)
    x = torch.cat([values[:1].expand(5000, 2), values])
    fitted = fit_codebook(x, 20, start=start)
    assert torch.bincount(fitted.assignments, minlength=20).min() > 0
    assert fitted.mse < 0.5


def test_an_empty_codeword_takes_the_farthest_point_of_the_worst_cluster():
    x = torch.tensor([[0.0], [1.0], [10.0], [30.0], [14.0]])
    codewords = torch.tensor([[0.5], [12.0], [99.0]])
    assignments = torch.tensor([0, 0, 1, 1, 1])
    taken = lloyd.split_worst(x, codewords, assignments, torch.tensor([2]))
    assert taken.tolist() == [3] and codewords[2].item() == 30.0


def test_codewords_left_empty_by_the_last_pass_are_filled():
    x = torch.tensor([[0.0], [0.0], [5.0], [9.0]])
    codewords, assignments = lloyd.fill_empty(x, torch.tensor([[0.0], [7.0], [1000.0]]), torch.tensor([0, 0, 1, 1]))
    assert torch.bincount(assignments, minlength=3).min() > 0
    assert (x - codewords[assignments]).abs().sum() <= 4.0


def test_one_codeword_is_the_mean():
    x = _points(100, 4)
    assert torch.allclose(fit_codebook(x, 1).codewords[0], x.mean(dim=0), atol=1e-6)


def test_fewer_distinct_points_than_codewords_are_the_codebook_itself():
    x = torch.ones(50, 4)
    x[7] = torch.tensor([2.0, 0.1, 0.3, -0.7])
    fitted = fit_codebook(x, 3)
    assert fitted.mse == 0.0 and fitted.codewords.shape == (3, 4)
    assert torch.equal(fitted.codewords[fitted.assignments], x)


def test_fewer_points_than_codewords_are_named():
    with pytest.raises(ValueError, match=r"2 sub-vectors are fewer than k=3 codewords \(blocks.3.attn1.to_q\)"):
        fit_codebook(torch.eye(2), 3, name="blocks.3.attn1.to_q")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value):
    x = _points(10)
    x[3, 1] = value
    with pytest.raises(ValueError, match=r"1 of 40 weights are not finite \(proj_out\)"):
        fit_codebook(x, 2, name="proj_out")


@pytest.mark.parametrize("arguments", [{"start": "best"}, {"iterations": 0}])
def test_unknown_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match=str(next(iter(arguments.values())))):
        fit_codebook(_points(10), 2, **arguments)


def test_half_precision_weights_are_accepted():
    assert fit_codebook(_points(200).half(), 8).codewords.dtype == torch.float32


def _alike():
    """Layers of one shape that end at different times: easy, hard, of few values, with codewords that become empty."""
    clustered = torch.cat([_points(1, 3).expand(560, 3), _points(40, 3, 3)])
    few = _points(5, 3)[torch.arange(600) % 5]
    return {"easy": _points(600, 3) * 1e-3, "hard": _points(600, 3, 1), "few": few, "clustered": clustered}


@pytest.mark.parametrize("options", [{}, {"subsample": 8}, {"start": "kmeans++"}, {"start": "random", "seed": 3}])
def test_layers_fitted_together_have_the_codebooks_that_each_has_alone(options):
    layers = _alike()
    together = fit_codebooks(layers, 16, **options)
    assert list(together) == list(layers)
    for name, x in layers.items():
        alone = fit_codebook(x, 16, **options)
        assert torch.equal(together[name].codewords, alone.codewords)
        assert torch.equal(together[name].assignments, alone.assignments)
        assert together[name].history == alone.history
    assert len({len(book.history) for book in together.values()}) > 2


def test_a_layer_that_is_done_takes_no_part_in_later_passes(monkeypatch):
    seen, passes = [], lloyd.kernels.cluster_sums
    monkeypatch.setattr(lloyd.kernels, "cluster_sums", lambda x, c: seen.append(len(x)) or passes(x, c))
    layers = _alike()
    del layers["few"]  # its own codebook, without a pass
    fit_codebooks(layers, 16)
    together, alone = list(seen), []
    for x in layers.values():
        seen.clear()
        fit_codebook(x, 16)
        alone.append(len(seen))
    assert len(set(alone)) > 1
    assert together == [sum(passes > step for passes in alone) for step in range(max(alone))]


def test_layers_of_other_shapes_are_not_fitted_together():
    with pytest.raises(ValueError, match=r"sub-vectors \[50, 4\] are not \[60, 4\], as the first layer's \(to_k\)"):
        fit_codebooks({"to_q": _points(60), "to_k": _points(50)}, 4)


def test_the_one_of_several_layers_that_is_not_finite_is_named(tmp_path):
    bad = _points(60)
    bad[3] = torch.nan
    with pytest.raises(ValueError, match=r"4 of 240 weights are not finite \(to_k\)"):
        fit_codebooks({"to_q": _points(60), "to_k": bad}, 4)
