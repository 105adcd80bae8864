"""What a trajectory and the sampler step by, whatever the equations: DDPM, DDIM, flow matching."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Step(Protocol):
    """From x_t to x_{t−1}."""

    noisy: bool  # whether a step draws noise

    def to(self, device: torch.device) -> Step:
        """The same on a device."""

    def next(self, output: Tensor, x_t: Tensor, step: Tensor, noise: Tensor | None) -> Tensor:
        """x_{t−1} [B, C, h, w] from the model's output, x_t, indices [B] of steps (0 is the last) and N(0, 1) noise or None."""

    def signal(self, output: Tensor, x_t: Tensor, step: Tensor) -> Tensor:
        """A multiple of x̂_0 [R, C, h, w] that does not grow with the noise, and behind it what else the output holds."""


class Process(Protocol):
    """A way from noise to data in S steps, of which step S − 1 comes first."""

    timesteps: Tensor  # [S], what the model is told before each step

    def __len__(self) -> int: ...

    def respace(self, steps: int) -> Process:
        """The same in another number of steps. ValueError where it cannot be had."""

    def to(self, device: torch.device) -> Process:
        """The same on a device."""

    def reverse(self) -> Step:
        """Its step."""


def guide(output: Tensor, guidance_scale: float, channels: int) -> Tensor:
    """Classifier-free guidance of an output [2B, C', h, w] (conditional half first) -> [B, C', h, w].

    ε = ε_null + s (ε_class − ε_null) in the first `channels`; all else, a learned variance too, is the conditional half's.
    """
    conditional, null = output.chunk(2)  # [2B, C', h, w] -> 2 × [B, C', h, w]
    guided = null[:, :channels] + guidance_scale * (conditional[:, :channels] - null[:, :channels])
    return torch.cat([guided, conditional[:, channels:]], dim=1)
