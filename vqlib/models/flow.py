"""Flow matching with straight paths (Lipman et al. 2023; Liu et al. 2023): x_σ = (1 − σ) x_0 + σ ε, dx/dσ = v, by Euler's steps."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vqlib.system.settings import as_integer


@dataclass(frozen=True)
class FlowMatching:
    """A path from noise, σ = 1, to data, σ = 0, in `steps` steps; the model is told `train_timesteps` · σ and gives v.

    Before the shift σ falls evenly from 1 to `lowest`, or (None) to 1/steps; `shift` s then moves each to
    s σ / (1 + (s − 1) σ) (Esser et al. 2024, section 5.3.2): s > 1 stays longer where noise is strong.
    """

    shift: float = 1.0
    lowest: float | None = None
    train_timesteps: int = 1000
    steps: int = 1000
    device: torch.device = torch.device("cpu")

    def __post_init__(self) -> None:
        total = as_integer("num_train_timesteps", self.train_timesteps)
        number = isinstance(self.shift, (int, float)) and not isinstance(self.shift, bool)
        if total < 1 or not number or not 0.0 < self.shift < float("inf"):
            raise ValueError(f"{total} timesteps, shift {self.shift!r}: need at least 1, and a shift above 0")

    def __len__(self) -> int:
        return self.steps

    @property
    def sigmas(self) -> Tensor:
        """σ after and before each step, float64 [steps + 1], from 0 up."""
        lowest = 1.0 / self.steps if self.lowest is None else self.lowest
        even = torch.linspace(1.0, lowest, self.steps, dtype=torch.float64, device=self.device)
        return torch.cat([even.new_zeros(1), shifted(even, self.shift).flip(0)])

    @property
    def timesteps(self) -> Tensor:
        """What the model is told before each step, float32 [steps], from the last step to the first."""
        return (self.train_timesteps * self.sigmas[1:]).float()

    def respace(self, steps: int) -> FlowMatching:
        """The same path in another number of steps."""
        if not 1 <= steps <= self.train_timesteps:
            raise ValueError(f"steps={steps} is outside 1 … {self.train_timesteps}, the number of training timesteps")
        return replace(self, steps=steps)

    def to(self, device: torch.device) -> FlowMatching:
        """The same path on a device, where its steps and latents are."""
        return replace(self, device=device)

    def reverse(self) -> Euler:
        """The step from σ to the next."""
        return Euler(self.sigmas)


@dataclass(frozen=True)
class Euler:
    """One of Euler's steps; steps [B] index σ, float64 [S + 1], on its device."""

    sigmas: Tensor
    noisy = False

    def to(self, device: torch.device) -> Euler:
        """The same steps on a device."""
        return Euler(self.sigmas.to(device))

    def next(self, output: Tensor, x: Tensor, step: Tensor, noise: Tensor | None) -> Tensor:
        """x [B, C, h, w] after a step by the velocity v; noise takes no part."""
        length = (self.sigmas[step] - self.sigmas[step + 1]).to(device=x.device, dtype=x.dtype)
        return x + length.view(-1, 1, 1, 1) * output

    def signal(self, output: Tensor, x: Tensor, step: Tensor) -> Tensor:
        """x̂_0 = x − σ v."""
        sigma = self.sigmas[step + 1].to(device=x.device, dtype=x.dtype)
        return x - sigma.view(-1, 1, 1, 1) * output


def shifted(sigma, shift: float):
    """σ moved by a shift: a number or a tensor."""
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)
