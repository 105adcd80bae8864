import pytest
import torch

from vqlib import kernels
from vqlib.kernels import reference


def _logits(device, count, n, seed=0):
    """Of every kind: spread, equal, frozen."""
    logits = 2 * torch.randn(count, n, generator=torch.Generator().manual_seed(seed))
    logits[::5] = 0.0
    logits[::7] = torch.tensor([kernels.FROZEN_LOGIT] * (n - 1) + [0.0])
    return logits.to(device)


@pytest.mark.parametrize("kind", ["absolute", "quadratic"])
@pytest.mark.parametrize("count, n", [(1, 2), (1500, 2), (1100, 3), (300, 16)])
def test_the_ratio_gradient_agrees_with_the_twin(cuda, device, kind, count, n):
    logits = _logits(device, count, n)
    grad, wanted = torch.ones_like(logits), torch.ones_like(logits)
    cuda.add_ratio_gradient(kind, logits, grad, 30.0 * count)
    reference.add_ratio_gradient(kind, logits, wanted, 30.0 * count)
    torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(grad[::7], torch.ones_like(grad[::7]))  # frozen


@pytest.mark.parametrize("shape", [(), (7,), (5000, 3)])
def test_a_step_of_rmsprop_agrees_with_the_twin(cuda, device, shape):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator).to(device)
    ours, twins = [(values.clone(), torch.zeros(shape, device=device)) for _ in range(2)]
    for loss in (1.0, 2.0, torch.nan, -torch.inf):
        grad = torch.randn(shape, generator=generator).to(device) if loss > 0 else torch.full_like(values, torch.nan)
        before = ours[0].clone()
        for function, (x, squares) in ((cuda.rmsprop_step, ours), (reference.rmsprop_step, twins)):
            function(x, grad, squares, 3e-2, 0.9, 1e-8, torch.tensor(loss, device=device))
        assert torch.equal(ours[0], before) is not (loss > 0)
        torch.testing.assert_close(ours[0], twins[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("count, n", [(1, 2), (3000, 2), (1100, 3), (300, 16), (2500, 1)])
@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("by_tensor", [False, True])
def test_settled_ratios_agree_with_the_twin(cuda, device, count, n, freeze, by_tensor):
    logits = _logits(device, count, n)
    candidates = torch.randint(0, 40, logits.shape, generator=torch.Generator().manual_seed(1)).to(device, torch.uint8)
    ours, twins = logits.clone(), logits.clone()
    limit = torch.tensor(0.83, device=device) if by_tensor else 0.83
    got = kernels.RatioStatistics.of(cuda.settle_ratios(ours, candidates, 50, limit, freeze).tolist())
    wanted = kernels.RatioStatistics.of(reference.settle_ratios(twins, candidates, 50, limit, freeze).tolist())
    assert (got.histogram, got.used) == (wanted.histogram, wanted.used)
    assert got.frozen == pytest.approx(wanted.frozen, rel=1e-12)
    assert got.winners_not_first == pytest.approx(wanted.winners_not_first, rel=1e-12)
    assert (got.entropy, got.absolute, got.quadratic) == pytest.approx(
        (wanted.entropy, wanted.absolute, wanted.quadratic), rel=1e-5, abs=1e-6
    )
    assert torch.equal(ours, twins)


def test_all_frozen_is_exactly_that(cuda, device):
    """What decides that a layer is settled for good."""
    logits, candidates = _logits(device, 3000, 3), torch.zeros(3000, 3, dtype=torch.int16, device=device)
    cuda.settle_ratios(logits, candidates, 4, 0.0, True)
    row = kernels.RatioStatistics.of(cuda.settle_ratios(logits, candidates, 4, 0.9, True).tolist())
    assert row.frozen == 1.0 and row.entropy == 0.0 and row.used == 1 and row.histogram[-1] == 3000


@pytest.mark.parametrize("count, n", [(1, 2), (3000, 2), (1100, 3), (300, 16)])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.5, 0.97, 1.0])
def test_the_limit_is_found_exactly(cuda, device, count, n, share):
    logits, rank = _logits(device, count, n, seed=n), max(1, round(share * count))
    limit = cuda.ratio_limit(logits, rank)
    largest = reference.largest_ratios(logits).sort().values
    assert limit.shape == () and limit.item() == pytest.approx(largest[rank - 1].item(), rel=3e-7)
    above = cuda.settle_ratios(
        logits, torch.zeros(count, n, dtype=torch.uint8, device=device), 1, limit, False
    ).tolist()
    ties = int((largest >= 1.0).sum()) if limit >= 1.0 else 0
    most = count - rank + (rank if limit >= 1.0 else 0)
    assert round(kernels.RatioStatistics.of(above).frozen * count) <= most + ties
    assert (largest > limit * (1 + 1e-6)).sum() <= count - rank <= (largest >= limit * (1 - 1e-6)).sum()


def test_nothing_of_a_step_is_left_to_the_twins(cuda, device, monkeypatch):
    for name in ("add_ratio_gradient", "rmsprop_step", "settle_ratios", "ratio_limit"):
        monkeypatch.setattr(reference, name, None)
    logits, candidates = _logits(device, 40, 3), torch.zeros(40, 3, dtype=torch.uint8, device=device)
    grad = torch.zeros_like(logits)
    kernels.add_ratio_gradient("absolute", logits, grad, 1.0)
    kernels.rmsprop_step(logits, grad, torch.zeros_like(grad), 5e-2, 0.99, 1e-8, torch.ones((), device=device))
    assert kernels.settle_ratios(logits, candidates, 1, kernels.ratio_limit(logits, 20), True).shape == (26,)
