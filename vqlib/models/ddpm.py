"""DDPM with learned variance: Ho et al. (2020) and Nichol & Dhariwal (2021), as DiT is trained and sampled.

All coefficients are kept in float64 and are rounded once, where they meet the latents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from vqlib.system.settings import as_integer


@dataclass(frozen=True)
class NoiseSchedule:
    """A forward process q(x_t | x_0) and the model time that belongs to each of its S steps.

    betas: float64 [S], variance added by each step; timesteps: int64 [S], the time the model is told (0 … T−1).
    """

    betas: Tensor
    timesteps: Tensor

    @classmethod
    def linear(cls, train_timesteps: int = 1000, start: float = 1e-4, end: float = 2e-2) -> NoiseSchedule:
        """The linear schedule of Ho et al. (2020), used by DiT: T betas from `start` to `end`, 0 < start ≤ end < 1."""
        total = as_integer("num_train_timesteps", train_timesteps)
        numbers = all(isinstance(beta, (int, float)) for beta in (start, end))
        if total < 1 or not numbers or not 0.0 < start <= end < 1.0:
            raise ValueError(f"{total} betas from {start!r} to {end!r}: need at least 1, and 0 < start ≤ end < 1")
        betas = torch.linspace(start, end, train_timesteps, dtype=torch.float64)
        return cls(betas, torch.arange(train_timesteps))

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
        stride = (total - 1) / (steps - 1) if steps > 1 else 0.0
        kept = torch.tensor([round(i * stride) for i in range(steps)], dtype=torch.int64, device=self.betas.device)
        abar = self.alphas_cumprod[kept]
        previous = torch.cat([abar.new_ones(1), abar[:-1]])
        return NoiseSchedule(1.0 - abar / previous, self.timesteps[kept])

    def to(self, device: torch.device) -> NoiseSchedule:
        """The same schedule on a device, where its steps and latents are."""
        return NoiseSchedule(self.betas.to(device), self.timesteps.to(device))

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
        x0 = _as(self.sqrt_recip_abar[step], x_t) * x_t - _as(self.sqrt_recipm1_abar[step], x_t) * epsilon
        fraction = (v + 1.0) / 2.0
        log_variance = fraction * _as(self.max_log_variance[step], x_t)
        log_variance = log_variance + (1.0 - fraction) * _as(self.min_log_variance[step], x_t)
        return self.mean(x0, x_t, step), log_variance

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


def _as(values: Tensor, like: Tensor) -> Tensor:
    """Per-image scalars [B] as [B, 1, 1, 1] on the device and in the dtype of `like`."""
    return values.to(device=like.device, dtype=like.dtype).view(-1, 1, 1, 1)


def guide(output: Tensor, guidance_scale: float, channels: int) -> Tensor:
    """Classifier-free guidance of an output [2B, 2C, h, w] (conditional half first) -> [B, 2C, h, w].

    ε = ε_null + s (ε_class − ε_null) in the first `channels`; all else, the variance too, is the conditional half's.
    """
    conditional, null = output.chunk(2)  # [2B, 2C, h, w] -> 2 × [B, 2C, h, w]
    guided = null[:, :channels] + guidance_scale * (conditional[:, :channels] - null[:, :channels])
    return torch.cat([guided, conditional[:, channels:]], dim=1)
