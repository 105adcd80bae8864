"""DDPM (Ho et al. 2020; Nichol & Dhariwal 2021) with learned, small or large variance, and DDIM (Song et al. 2021).

All coefficients are kept in float64 and are rounded once, where they meet the latents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from vqlib.system.settings import as_integer

VARIANCES = ("learned", "small", "large", "none")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("linspace", "leading", "trailing", "linspace above 0", "leading above 0")


@dataclass(frozen=True)
class NoiseSchedule:
    """A forward process q(x_t | x_0), the model time that belongs to each of its S steps, and how it is reversed.

    betas: float64 [S], variance added by each step; timesteps: int64 [S], the time the model is told (0 … T−1). `variance` of a
    reverse step: "learned" by the model, "small" (the posterior's β̃), "large" (β), or "none": DDIM's step, without noise.
    `prediction`: what the model's output is, the noise ε, v = √ᾱ ε − √(1 − ᾱ) x_0, or x_0. `spacing` of fewer steps:
    "linspace" from first to last, "leading" every (T // steps)th from `offset` on, "trailing" backwards from the last; "above 0":
    of one step more, the lowest left out, as solvers have it whose last step leads from there to x_0.
    """

    betas: Tensor
    timesteps: Tensor
    variance: str = "learned"
    prediction: str = "epsilon"
    spacing: str = "linspace"
    offset: int = 0

    def __post_init__(self) -> None:
        for name, known in (("variance", VARIANCES), ("prediction", PREDICTIONS), ("spacing", SPACINGS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {known}")
        if self.variance == "learned" and self.prediction != "epsilon":
            raise ValueError(f"prediction={self.prediction!r} is not supported with a learned variance, only 'epsilon'")

    @classmethod
    def linear(cls, train_timesteps: int = 1000, start: float = 1e-4, end: float = 2e-2) -> NoiseSchedule:
        """The linear schedule of Ho et al. (2020), used by DiT: T betas from `start` to `end`, 0 < start ≤ end < 1."""
        total = as_integer("num_train_timesteps", train_timesteps)
        numbers = all(isinstance(beta, (int, float)) for beta in (start, end))
        if total < 1 or not numbers or not 0.0 < start <= end < 1.0:
            raise ValueError(f"{total} betas from {start!r} to {end!r}: need at least 1, and 0 < start ≤ end < 1")
        betas = torch.linspace(start, end, train_timesteps, dtype=torch.float64)
        return cls(betas, torch.arange(train_timesteps))

    @property
    def zero_terminal_snr(self) -> NoiseSchedule:
        """The schedule whose √ᾱ is shifted to 0 in the last step and scaled to what it was in the first (Lin et al. 2024)."""
        if self.prediction == "epsilon":
            raise ValueError("a terminal SNR of zero leaves nothing of x_0 in x_T: ε alone does not tell it")
        root = self.alphas_cumprod.sqrt()
        abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()
        return replace(self, betas=1.0 - abar / torch.cat([abar.new_ones(1), abar[:-1]]))

    def __len__(self) -> int:
        return len(self.betas)

    @property
    def alphas_cumprod(self) -> Tensor:
        """ᾱ, float64 [S]: the share of signal variance left after each step."""
        return torch.cumprod(1.0 - self.betas, dim=0)

    def respace(self, steps: int) -> NoiseSchedule:
        """The same marginals visited in `steps` evenly spaced steps (Nichol & Dhariwal 2021, section 4)."""
        total = len(self)
        if not 1 <= steps <= total:
            raise ValueError(f"steps={steps} is outside 1 … {total}, the number of training timesteps")
        kept = torch.tensor(self._kept(steps), dtype=torch.int64, device=self.betas.device)
        abar = self.alphas_cumprod[kept]
        previous = torch.cat([abar.new_ones(1), abar[:-1]])
        return replace(self, betas=1.0 - abar / previous, timesteps=self.timesteps[kept])

    def _kept(self, steps: int) -> list[int]:
        total = len(self)
        above = int(self.spacing.endswith("above 0"))
        visited = range(above, steps + above)
        if self.spacing.startswith("leading"):
            kept = [i * (total // (steps + above)) + self.offset for i in visited]
        elif self.spacing == "trailing":
            kept = [round(total - i * total / steps) - 1 for i in reversed(visited)]
        else:
            stride = (total - 1) / (steps - 1 + above) if steps + above > 1 else 0.0
            kept = [round(i * stride) for i in visited]
        if len(set(kept)) < steps:
            raise ValueError(f"steps={steps} of spacing {self.spacing!r} meet a timestep of {total} twice: take fewer")
        if kept[-1] >= total:
            raise ValueError(
                f"steps={steps} from {self.offset} on end at {kept[-1]}, after the last of {total} timesteps"
            )
        return kept

    def to(self, device: torch.device) -> NoiseSchedule:
        """The same schedule on a device, where its steps and latents are."""
        return replace(self, betas=self.betas.to(device), timesteps=self.timesteps.to(device))

    def reverse(self) -> Reverse:
        """The step from x_t to x_{t−1}."""
        return Reverse(self.posterior(), self.alphas_cumprod, self.variance, self.prediction)

    def posterior(self) -> Posterior:
        """The coefficients of q(x_{t−1} | x_t, x_0) for every step."""
        abar = self.alphas_cumprod
        previous = torch.cat([abar.new_ones(1), abar[:-1]])
        variance = self.betas * (1.0 - previous) / (1.0 - abar)
        # The first variance is 0; its log is taken from the second step, as in the reference implementation.
        floor = variance[1:2] if len(variance) > 1 else self.betas[:1]
        return Posterior(
            sqrt_recip_abar=(1.0 / abar).sqrt(),
            sqrt_recipm1_abar=(1.0 / abar - 1.0).sqrt(),
            x0_coefficient=self.betas * previous.sqrt() / (1.0 - abar),
            xt_coefficient=(1.0 - previous) * (1.0 - self.betas).sqrt() / (1.0 - abar),
            min_log_variance=torch.cat([floor, variance[1:]]).log(),
            max_log_variance=self.betas.log(),
        )

    def add_noise(self, x0: Tensor, noise: Tensor, step: Tensor) -> Tensor:
        """x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε for step indices [B] and images [B, C, H, W]."""
        abar = self.alphas_cumprod[step]
        return _as(abar.sqrt(), x0) * x0 + _as((1.0 - abar).sqrt(), x0) * noise


@dataclass(frozen=True)
class Posterior:
    """Per-step coefficients, each float64 [S]; the reverse step of DDPM in terms of the model's output.

    Steps [B] are on the coefficients' device.
    """

    sqrt_recip_abar: Tensor
    sqrt_recipm1_abar: Tensor
    x0_coefficient: Tensor
    xt_coefficient: Tensor
    min_log_variance: Tensor
    max_log_variance: Tensor

    def to(self, device: torch.device) -> Posterior:
        """The same coefficients on a device."""
        return Posterior(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def mean(self, x0: Tensor, x_t: Tensor, step: Tensor) -> Tensor:
        """Mean of q(x_{t−1} | x_t, x_0), Ho et al. (2020), eq. 7."""
        return _as(self.x0_coefficient[step], x_t) * x0 + _as(self.xt_coefficient[step], x_t) * x_t

    def predict(self, output: Tensor, x_t: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of p(x_{t−1} | x_t) from a learned-variance output [B, 2C, H, W] and steps [B].

        The first C channels are ε; the last C are v in [−1, 1], which interpolates the log-variance between the
        posterior's β̃_t and β_t (Nichol & Dhariwal 2021, eq. 15).
        """
        epsilon, v = output.chunk(2, dim=1)
        x0 = self.x0(epsilon, x_t, step)
        fraction = (v + 1.0) / 2.0
        log_variance = fraction * _as(self.max_log_variance[step], x_t)
        log_variance = log_variance + (1.0 - fraction) * _as(self.min_log_variance[step], x_t)
        return self.mean(x0, x_t, step), log_variance

    def x0(self, epsilon: Tensor, x_t: Tensor, step: Tensor) -> Tensor:
        """x_0 from the noise ε in x_t."""
        return _as(self.sqrt_recip_abar[step], x_t) * x_t - _as(self.sqrt_recipm1_abar[step], x_t) * epsilon

    def variational_bound(self, output: Tensor, x0: Tensor, x_t: Tensor, step: Tensor) -> Tensor:
        """L_t of each image in nats per dimension, [B]: KL(q ‖ p) for t > 0, Gaussian negative log-likelihood at t = 0."""
        mean, log_variance = self.predict(output, x_t, step)
        true_mean = self.mean(x0, x_t, step)
        true_log_variance = _as(self.min_log_variance[step], x_t)
        squared = (true_mean - mean) ** 2
        kl = 0.5 * (log_variance - true_log_variance - 1.0)
        kl = kl + 0.5 * ((true_log_variance - log_variance).exp() + squared * (-log_variance).exp())
        likelihood = 0.5 * ((x0 - mean) ** 2 * (-log_variance).exp() + log_variance + math.log(2 * math.pi))
        return torch.where(_as(step == 0, x_t).bool(), likelihood, kl).flatten(1).mean(1)


@dataclass(frozen=True)
class Reverse:
    """One step back of a `NoiseSchedule`, for steps [B] on the coefficients' device."""

    posterior: Posterior
    alphas_cumprod: Tensor
    variance: str
    prediction: str

    @property
    def noisy(self) -> bool:
        """Whether a step draws noise."""
        return self.variance != "none"

    def to(self, device: torch.device) -> Reverse:
        """The same step on a device."""
        return replace(self, posterior=self.posterior.to(device), alphas_cumprod=self.alphas_cumprod.to(device))

    def next(self, output: Tensor, x_t: Tensor, step: Tensor, noise: Tensor | None) -> Tensor:
        """x_{t−1} [B, C, h, w] from x_t, the model's output and N(0, 1) noise; without noise the mean, as in the last step."""
        if self.variance == "learned":
            mean, log_variance = self.posterior.predict(output, x_t, step)
        else:
            x0, epsilon = self._signal_and_noise(output, x_t, step)
            if self.variance == "none":
                abar = torch.cat([self.alphas_cumprod.new_ones(1), self.alphas_cumprod[:-1]])[step]
                return _as(abar.sqrt(), x_t) * x0 + _as((1.0 - abar).sqrt(), x_t) * epsilon
            mean = self.posterior.mean(x0, x_t, step)
            small = self.variance == "small"
            log_variance = self.posterior.min_log_variance if small else self.posterior.max_log_variance
            log_variance = _as(log_variance[step], x_t)
        return mean if noise is None else mean + (0.5 * log_variance).exp() * noise

    def signal(self, output: Tensor, x_t: Tensor, step: Tensor) -> Tensor:
        """√ᾱ x̂_0 = x_t − σ ε, and −σ v of a learned variance; x̂_0 itself of the other predictions. σ² = 1 − ᾱ."""
        if self.prediction != "epsilon":
            return self._signal_and_noise(output, x_t, step)[0]
        noise, channels = _as((1.0 - self.alphas_cumprod[step]).sqrt(), x_t) * output, x_t.shape[1]
        return torch.cat([x_t - noise[:, :channels], -noise[:, channels:]], dim=1)

    def _signal_and_noise(self, output: Tensor, x_t: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """x_0 and ε from an output [B, C, h, w] of this prediction (Salimans & Ho 2022, for v)."""
        abar = self.alphas_cumprod[step]
        signal, noise = _as(abar.sqrt(), x_t), _as((1.0 - abar).sqrt(), x_t)
        if self.prediction == "epsilon":
            return self.posterior.x0(output, x_t, step), output
        if self.prediction == "sample":
            return output, (x_t - signal * output) / noise
        return signal * x_t - noise * output, signal * output + noise * x_t


def _as(values: Tensor, like: Tensor) -> Tensor:
    """Per-image scalars [B] as [B, 1, 1, 1] on the device and in the dtype of `like`."""
    return values.to(device=like.device, dtype=like.dtype).view(-1, 1, 1, 1)
