"""What the trainings of the bundled models minimize. A loss takes (model, index [B], generator) and gives a scalar."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vqlib.evaluation.classifier import to_model
from vqlib.models.ddpm import NoiseSchedule

Loss = Callable[[nn.Module, Tensor, torch.Generator], Tensor]
TIMESTEPS, BETA_START, BETA_END = 1000, 1e-4, 2e-2
LABEL_DROPOUT = 0.1
KL_WEIGHT = 1e-4  # on the mean over latent dimensions


def classifier_loss(images: Tensor, labels: Tensor, jittered: bool = False) -> Loss:
    """Cross-entropy on the images as they are, which a few epochs of many do not overfit, or on `jitter`'s of few."""

    def loss(model: nn.Module, index: Tensor, generator: torch.Generator) -> Tensor:
        batch = to_model(images[index])
        return F.cross_entropy(model(jitter(batch, generator) if jittered else batch), labels[index])

    return loss


def jitter(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images float [B, C, 32, 32] in [−1, 1] turned, scaled, moved and recoloured a little, each by itself; what comes in is white."""
    count, channels = images.shape[:2]
    turn, scale, right, down, light, *_ = draw = torch.rand(5 + channels, count, generator=generator) * 2 - 1  # −1 … 1
    turn, scale = 0.3 * turn, 1.0 + 0.2 * scale  # radians; 1 as it is
    cosine, sine = scale * turn.cos(), scale * turn.sin()
    rows = [torch.stack([cosine, -sine, 0.15 * right], 1), torch.stack([sine, cosine, 0.15 * down], 1)]
    grid = F.affine_grid(torch.stack(rows, 1).to(images.device), list(images.shape), align_corners=False)
    moved = 1.0 - F.grid_sample(1.0 - images, grid, align_corners=False)  # zeros around 1 − x are white
    gain = 1.0 + 0.25 * (light + draw[5:]).T.reshape(count, channels, 1, 1).to(images.device)  # of what is not white
    return (1.0 - gain * (1.0 - moved)).clamp(-1.0, 1.0)


def vae_loss(images: Tensor) -> Loss:
    """L1 + MSE reconstruction and a small KL term that keeps the latents bounded."""

    def loss(model: AutoencoderKL, index: Tensor, generator: torch.Generator) -> Tensor:
        batch = to_model(images[index])
        posterior = model.encode(batch).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(batch.device)
        decoded = model.decode(posterior.mean + posterior.std * noise).sample.float()
        reconstruction = F.l1_loss(decoded, batch) + F.mse_loss(decoded, batch)
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1.0 - posterior.logvar).mean()
        return reconstruction + KL_WEIGHT * kl

    return loss


def decoder_loss(images: Tensor, mean: Tensor, std: Tensor) -> Loss:
    """L1 + MSE reconstruction from the fixed encoder's posterior, mean and std [N, C, 8, 8]: the latents stay as they are."""

    def loss(decoder: nn.Module, index: Tensor, generator: torch.Generator) -> Tensor:
        batch = to_model(images[index])
        noise = torch.randn(mean[index].shape, generator=generator).to(batch.device)
        decoded = decoder(mean[index] + std[index] * noise).float()
        return F.l1_loss(decoded, batch) + F.mse_loss(decoded, batch)

    return loss


def dit_loss(latents: Tensor, labels: Tensor, classes: int, snr_cap: float | None = None) -> Loss:
    """L_simple + L_vlb with a stopped mean (Nichol & Dhariwal 2021), and 10 % label dropout for CFG.

    latents: float32 [N, C, 8, 8] of unit variance; labels: int64 [N], 0 … classes − 1. With `snr_cap` γ, L_simple is weighted
    by min(SNR, γ) / SNR (Hang et al. 2023), which leaves more of the capacity to the noisier timesteps.
    """
    schedule = NoiseSchedule.linear(TIMESTEPS, BETA_START, BETA_END).to(latents.device)
    posterior = schedule.posterior()
    snr = schedule.alphas_cumprod / (1.0 - schedule.alphas_cumprod)
    weight = (torch.ones_like(snr) if snr_cap is None else snr.clamp_max(snr_cap) / snr).float()

    def loss(model: nn.Module, index: Tensor, generator: torch.Generator) -> Tensor:
        x0, label = latents[index], _dropped(labels[index], classes, generator)
        step = torch.randint(len(schedule), (len(index),), generator=generator).to(x0.device)
        noise = torch.randn(x0.shape, generator=generator).to(x0.device)
        x_t = schedule.add_noise(x0, noise, step)
        output = model(x_t, timestep=schedule.timesteps[step], class_labels=label).sample
        epsilon, variance = output.chunk(2, dim=1)
        frozen = torch.cat([epsilon.detach(), variance], dim=1)
        bound = posterior.variational_bound(frozen, x0, x_t, step).mean()
        return (weight[step].view(-1, 1, 1, 1) * (epsilon - noise).square()).mean() + bound

    return loss


def flow_loss(latents: Tensor, labels: Tensor, classes: int) -> Loss:
    """‖v − (ε − x_0)‖² at x_σ = (1 − σ) x_0 + σ ε (Lipman et al. 2023), and 10 % label dropout for CFG.

    latents: float32 [N, C, 8, 8] of unit variance; labels: int64 [N], 0 … classes − 1. logit σ is drawn from a standard
    normal (Esser et al. 2024, section 3.1); the model is told 1000 σ.
    """

    def loss(model: nn.Module, index: Tensor, generator: torch.Generator) -> Tensor:
        x0, label = latents[index], _dropped(labels[index], classes, generator)
        sigma = torch.randn(len(index), generator=generator).sigmoid().to(x0.device)
        noise = torch.randn(x0.shape, generator=generator).to(x0.device)
        x = torch.lerp(x0, noise, sigma.view(-1, 1, 1, 1))
        velocity = model(x, timestep=TIMESTEPS * sigma, class_labels=label).sample.float()
        return (velocity - (noise - x0)).square().mean()

    return loss


def in_bfloat16(loss: Loss) -> Loss:
    """The same loss with the products of linear and convolutional layers in bfloat16.

    Attention is written out: on a CPU the backward pass of torch's fused kernel takes four times as long in bfloat16.
    """

    def narrow(model: nn.Module, index: Tensor, generator: torch.Generator) -> Tensor:
        device = next(model.parameters()).device.type
        with torch.autocast(device, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            return loss(model, index, generator)

    return narrow


def _dropped(labels: Tensor, classes: int, generator: torch.Generator) -> Tensor:
    """Labels [B], a tenth of them replaced by "no class"."""
    dropped = torch.rand(len(labels), generator=generator) < LABEL_DROPOUT
    return labels.masked_fill(dropped.to(labels.device), classes)
