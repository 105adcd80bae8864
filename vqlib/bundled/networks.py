"""The networks of a bundled model before training: classifier, VAE and transformer, seeded."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel
from torch import nn

from vqlib.evaluation.classifier import SmallClassifier


def classifier(channels: int, classes: int, widths: tuple[int, ...]) -> SmallClassifier:
    """The judge of images."""
    torch.manual_seed(0)
    return SmallClassifier(channels, classes, widths)


def vae(channels: int, latents: int) -> AutoencoderKL:
    """A /4 autoencoder of 32×32 images: latents [`latents`, 8, 8]."""
    torch.manual_seed(0)
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        latent_channels=latents,
        sample_size=32,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )


def decoder_of(vae: AutoencoderKL) -> nn.Module:
    """What turns latents into images, as one module that shares the VAE's tensors."""
    return nn.Sequential(vae.post_quant_conv, vae.decoder)


def transformer(latents: int, outputs: int, classes: int) -> DiTTransformer2DModel:
    """A transformer in DiT-XL/2's form: patch 2, adaLN-Zero; 6 blocks of width 192 on 16 tokens.

    `outputs` are the channels it gives for latents [`latents`, 8, 8]: as many, or twice as many for a learned variance. Labels
    are dropped by the losses, from their own generator, and not by the embedder.
    """
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=64,
        in_channels=latents,
        out_channels=outputs,
        num_layers=6,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=classes,
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
