"""The trainings of the bundled model: what each network is, its loss, and its settings."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiTTransformer2DModel
from torch import Tensor, nn

from vqlib.bundled.training import TrainConfig
from vqlib.evaluation.fashion_classifier import FashionClassifier
from vqlib.evaluation.fashion_dataset import to_model
from vqlib.models.ddpm import NoiseSchedule

CLASSIFIER = TrainConfig("classifier", steps=3000, batch=128, lr=2e-3, weight_decay=5e-2, checkpoint_every=500)
VAE = TrainConfig("vae", steps=2400, batch=32, lr=2e-3, warmup=200, ema=0.995, checkpoint_every=400)
DECODER = TrainConfig("decoder", steps=4000, batch=32, lr=1e-3, warmup=100, ema=0.995, checkpoint_every=500)
DIT = TrainConfig("dit", steps=5600, batch=128, lr=1e-3, weight_decay=1e-2, ema=0.9995, checkpoint_every=500)
DIT_CONTINUED = TrainConfig(
    "dit-continued", steps=4500, batch=128, lr=5e-4, warmup=200, weight_decay=1e-2, ema=0.9995, checkpoint_every=500
)
ALL = {config.name: config for config in (CLASSIFIER, VAE, DECODER, DIT, DIT_CONTINUED)}
SNR_CAP = 5.0  # of the continued training
TIMESTEPS, BETA_START, BETA_END = 1000, 1e-4, 2e-2
LABEL_DROPOUT = 0.1
KL_WEIGHT = 1e-4  # on the mean over latent dimensions


def with_steps(config: TrainConfig, steps: int | None) -> TrainConfig:
    """The same training with another number of steps; None leaves it."""
    return config if steps is None else dataclasses.replace(config, steps=steps)


def build_classifier() -> FashionClassifier:
    """The judge of images; seeded as all networks here."""
    torch.manual_seed(0)
    return FashionClassifier()


def build_vae() -> AutoencoderKL:
    """A /4 autoencoder of 32×32 grey images: latents [4, 8, 8]."""
    torch.manual_seed(0)
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        latent_channels=4,
        sample_size=32,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )


def build_dit() -> DiTTransformer2DModel:
    """DiT in DiT-XL/2's form: patch 2, adaLN-Zero, learned variance; 6 blocks of width 192 on 16 tokens.

    Labels are dropped by `dit_loss`, from its own generator, and not by the embedder.
    """
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=64,
        in_channels=4,
        out_channels=8,
        num_layers=6,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    _zero_init(model)
    for block in model.transformer_blocks:  # one conditioning network, as in the original DiT
        block.norm1.emb = model.transformer_blocks[0].norm1.emb
    model.transformer_blocks[0].norm1.emb.class_embedder.dropout_prob = 0.0
    return model


def _zero_init(model: DiTTransformer2DModel) -> None:
    """DiT's initialization: Xavier linears, adaLN-Zero, zero output (Peebles & Xie 2023, section 3.2)."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for block in model.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.02)
        for layer in (block.norm1.emb.timestep_embedder.linear_1, block.norm1.emb.timestep_embedder.linear_2):
            nn.init.normal_(layer.weight, std=0.02)
    nn.init.zeros_(model.proj_out_1.weight)
    nn.init.zeros_(model.proj_out_2.weight)


def classifier_loss(images: Tensor, labels: Tensor):
    """Cross-entropy on the images as they are: a few epochs do not overfit."""

    def loss(model: nn.Module, index: Tensor, generator: torch.Generator) -> Tensor:
        return F.cross_entropy(model(to_model(images[index])), labels[index])

    return loss


def vae_loss(images: Tensor):
    """L1 + MSE reconstruction and a small KL term that keeps the latents bounded."""

    def loss(model: AutoencoderKL, index: Tensor, generator: torch.Generator) -> Tensor:
        batch = to_model(images[index])
        posterior = model.encode(batch).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(batch.device)
        decoded = model.decode(posterior.mean + posterior.std * noise).sample
        reconstruction = F.l1_loss(decoded, batch) + F.mse_loss(decoded, batch)
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1.0 - posterior.logvar).mean()
        return reconstruction + KL_WEIGHT * kl

    return loss


def decoder_of(vae: AutoencoderKL) -> nn.Module:
    """What turns latents into images, as one module that shares the VAE's tensors."""
    return nn.Sequential(vae.post_quant_conv, vae.decoder)


def decoder_loss(images: Tensor, mean: Tensor, std: Tensor):
    """L1 + MSE reconstruction from the fixed encoder's posterior, mean and std [N, 4, 8, 8]: the latents stay as they are."""

    def loss(decoder: nn.Module, index: Tensor, generator: torch.Generator) -> Tensor:
        batch = to_model(images[index])
        noise = torch.randn(mean[index].shape, generator=generator).to(batch.device)
        decoded = decoder(mean[index] + std[index] * noise)
        return F.l1_loss(decoded, batch) + F.mse_loss(decoded, batch)

    return loss


def dit_loss(latents: Tensor, labels: Tensor, snr_cap: float | None = None):
    """L_simple + L_vlb with a stopped mean (Nichol & Dhariwal 2021), and 10 % label dropout for CFG.

    latents: float32 [N, 4, 8, 8] of unit variance; labels: int64 [N], 0 … 9. With `snr_cap` γ, L_simple is weighted by
    min(SNR, γ) / SNR (Hang et al. 2023), which leaves more of the capacity to the noisier timesteps.
    """
    schedule = NoiseSchedule.linear(TIMESTEPS, BETA_START, BETA_END).to(latents.device)
    posterior = schedule.posterior()
    snr = schedule.alphas_cumprod / (1.0 - schedule.alphas_cumprod)
    weight = (torch.ones_like(snr) if snr_cap is None else snr.clamp_max(snr_cap) / snr).float()

    def loss(model: nn.Module, index: Tensor, generator: torch.Generator) -> Tensor:
        x0, label = latents[index], labels[index].clone()
        dropped = torch.rand(len(index), generator=generator) < LABEL_DROPOUT
        label.masked_fill_(dropped.to(label.device), 10)
        step = torch.randint(len(schedule), (len(index),), generator=generator).to(x0.device)
        noise = torch.randn(x0.shape, generator=generator).to(x0.device)
        x_t = schedule.add_noise(x0, noise, step)
        output = model(x_t, timestep=schedule.timesteps[step], class_labels=label).sample
        epsilon, variance = output.chunk(2, dim=1)
        frozen = torch.cat([epsilon.detach(), variance], dim=1)
        bound = posterior.variational_bound(frozen, x0, x_t, step).mean()
        return (weight[step].view(-1, 1, 1, 1) * (epsilon - noise).square()).mean() + bound

    return loss
