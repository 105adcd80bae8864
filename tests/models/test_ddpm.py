"""The schedule, its respacing, the posterior and the variational bound, against the papers' equations."""

import math

import pytest
import torch

from vqlib.models.ddpm import NoiseSchedule

SCHEDULE = NoiseSchedule.linear()


def gaussian_product(mean_a, var_a, mean_b, var_b):
    """Mean and variance of the normalized product of two Gaussian densities."""
    variance = 1.0 / (1.0 / var_a + 1.0 / var_b)
    return variance * (mean_a / var_a + mean_b / var_b), variance


def perfect_output(schedule, x0, x_t, step, v):
    """The output [B, 2C, H, W] of a model that knows x_0 and answers `v` for the variance."""
    abar = schedule.alphas_cumprod[step].view(-1, 1, 1, 1)
    epsilon = (x_t - abar.sqrt() * x0) / (1.0 - abar).sqrt()
    return torch.cat([epsilon, torch.full_like(epsilon, v)], dim=1)


def test_linear_schedule_has_the_papers_end_points():
    assert len(SCHEDULE) == 1000
    assert SCHEDULE.betas.dtype == torch.float64
    assert SCHEDULE.betas[0].item() == pytest.approx(1e-4)
    assert SCHEDULE.betas[-1].item() == pytest.approx(2e-2)
    # ln(ᾱ_T) by hand: the sum of ln(1 − β) over an arithmetic sequence of betas.
    log_abar = sum(math.log1p(-(1e-4 + (2e-2 - 1e-4) * i / 999)) for i in range(1000))
    assert SCHEDULE.alphas_cumprod[-1].item() == pytest.approx(math.exp(log_abar), rel=1e-10)


@pytest.mark.parametrize(
    ("steps", "first", "last"),
    [
        (50, [0, 20, 41, 61, 82], [938, 958, 979, 999]),
        (100, [0, 10, 20, 30, 40], [969, 979, 989, 999]),
        (250, [0, 4, 8, 12, 16], [987, 991, 995, 999]),
    ],
)
def test_respacing_keeps_the_papers_timesteps_and_all_their_marginals(steps, first, last):
    respaced = SCHEDULE.respace(steps)
    times = respaced.timesteps.tolist()
    assert len(respaced) == len(set(times)) == steps
    assert times[:5] == first and times[-4:] == last
    torch.testing.assert_close(respaced.alphas_cumprod, SCHEDULE.alphas_cumprod[times], rtol=1e-12, atol=0)


def test_respacing_to_every_step_changes_nothing():
    respaced = SCHEDULE.respace(1000)
    assert torch.equal(respaced.timesteps, SCHEDULE.timesteps)
    torch.testing.assert_close(respaced.betas, SCHEDULE.betas, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("steps", [0, -3, 1001])
def test_respacing_refuses_impossible_counts_with_both_numbers(steps):
    with pytest.raises(ValueError, match=rf"steps={steps} .* 1000"):
        SCHEDULE.respace(steps)


def test_noise_is_added_with_the_marginal_of_each_images_own_step():
    x0, noise = torch.full((3, 1, 1, 1), 2.0), torch.full((3, 1, 1, 1), -1.0)
    x_t = SCHEDULE.add_noise(x0, noise, torch.tensor([0, 500, 999])).flatten().tolist()
    for value, t in zip(x_t, (0, 500, 999), strict=True):
        abar = SCHEDULE.alphas_cumprod[t].item()
        assert value == pytest.approx(2.0 * math.sqrt(abar) - math.sqrt(1.0 - abar), abs=1e-6)


@pytest.mark.parametrize("steps", [50, 1000])
def test_posterior_is_bayes_rule(steps):
    """q(x_{t−1} | x_t, x_0) is the product of q(x_{t−1} | x_0) and q(x_t | x_{t−1}), both as functions of x_{t−1}."""
    schedule = SCHEDULE.respace(steps)
    posterior, x0, x_t = schedule.posterior(), 0.7, -0.4
    for t in (1, 2, steps // 2, steps - 1):
        beta, before = schedule.betas[t].item(), schedule.alphas_cumprod[t - 1].item()
        alpha = 1.0 - beta
        mean, variance = gaussian_product(math.sqrt(before) * x0, 1.0 - before, x_t / math.sqrt(alpha), beta / alpha)
        ours = posterior.mean(
            torch.full((1, 1, 1, 1), x0, dtype=torch.float64),
            torch.full((1, 1, 1, 1), x_t, dtype=torch.float64),
            torch.tensor([t]),
        )
        assert ours.item() == pytest.approx(mean, rel=1e-9)
        assert posterior.min_log_variance[t].item() == pytest.approx(math.log(variance), rel=1e-9)
        assert posterior.max_log_variance[t].item() == pytest.approx(math.log(beta), rel=1e-12)


def test_first_posterior_is_x0_itself_and_its_log_variance_is_finite():
    posterior = SCHEDULE.respace(50).posterior()
    x0, x_t = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(0)).chunk(2)
    torch.testing.assert_close(posterior.mean(x0, x_t, torch.tensor([0])), x0)
    assert posterior.min_log_variance[0] == posterior.min_log_variance[1]


@pytest.mark.parametrize(("v", "expected"), [(-1.0, "min_log_variance"), (1.0, "max_log_variance")])
def test_v_spans_the_range_between_the_two_variances(v, expected):
    posterior = SCHEDULE.posterior()
    x_t = torch.zeros(2, 4, 2, 2, dtype=torch.float64)
    step = torch.tensor([3, 700])
    output = torch.cat([x_t, torch.full_like(x_t, v)], dim=1)
    log_variance = posterior.predict(output, x_t, step)[1]
    torch.testing.assert_close(log_variance[:, 0, 0, 0], getattr(posterior, expected)[step])


def test_bound_is_zero_for_the_true_posterior_and_positive_beside_it():
    schedule = SCHEDULE.respace(100)
    posterior, generator = schedule.posterior(), torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, 5, 4, 8, 8, generator=generator, dtype=torch.float64)
    step = torch.tensor([1, 2, 30, 60, 99])
    x_t = schedule.add_noise(x0, noise, step)
    exact = perfect_output(schedule, x0, x_t, step, v=-1.0)
    bound = posterior.variational_bound(exact, x0, x_t, step)
    torch.testing.assert_close(bound, torch.zeros_like(bound), rtol=0, atol=1e-9)
    wrong_mean = exact.clone()
    wrong_mean[:, :4] += 0.1
    assert (posterior.variational_bound(wrong_mean, x0, x_t, step) > 1e-6).all()
    wrong_variance = posterior.variational_bound(perfect_output(schedule, x0, x_t, step, v=1.0), x0, x_t, step)
    assert (wrong_variance[:3] > 1e-4).all()  # later β̃ and β are almost the same


def test_bound_is_the_kl_of_two_gaussians_and_a_likelihood_at_step_zero():
    schedule = SCHEDULE.respace(50)
    posterior, generator = schedule.posterior(), torch.Generator().manual_seed(2)
    x0, x_t = torch.randn(2, 2, 4, 2, 2, generator=generator, dtype=torch.float64)
    output, step = torch.randn(2, 8, 2, 2, generator=generator, dtype=torch.float64), torch.tensor([0, 25])
    mean, log_variance = posterior.predict(output, x_t, step)
    model = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    true = torch.distributions.Normal(
        posterior.mean(x0, x_t, step), (0.5 * posterior.min_log_variance[step]).exp().view(-1, 1, 1, 1).expand_as(mean)
    )
    kl = torch.distributions.kl_divergence(true, model).flatten(1).mean(1)
    nll = -model.log_prob(x0).flatten(1).mean(1)
    bound = posterior.variational_bound(output, x0, x_t, step)
    torch.testing.assert_close(bound, torch.stack([nll[0], kl[1]]))
