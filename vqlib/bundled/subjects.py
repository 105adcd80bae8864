"""What is bundled, a `Subject` each: its pictures, networks, trainings, process, and what its model card has to say of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel
from torch import Tensor

from vqlib.bundled import emoji_dataset, losses, networks
from vqlib.bundled.losses import BETA_END, BETA_START, TIMESTEPS, Loss
from vqlib.bundled.training import TrainConfig
from vqlib.evaluation import fashion_dataset
from vqlib.evaluation.classifier import SmallClassifier
from vqlib.evaluation.extractors import KINDS
from vqlib.evaluation.references import OF_MODEL
from vqlib.models.pipeline import BUNDLED, BUNDLED_FLOW
from vqlib.models.schedulers import FLOW

EMOJI_COPIES = 2  # training pictures of a class, in those that the largest class has
EMOJI_TEST = 40  # test pictures of a class, as often as it takes


@dataclass(frozen=True, eq=False)
class Pictures:
    """uint8 [N, C, 32, 32] with labels int64 [N]: what is trained on, what is compared with; `others` belong to no class."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    others: Tensor  # [M, C, 32, 32], the VAE's besides `train`

    def to(self, device: torch.device) -> Pictures:
        """The same on a device."""
        return Pictures(*(getattr(self, field.name).to(device) for field in dataclasses.fields(self)))


@dataclass(frozen=True)
class Subject:
    """One bundled model. `rounds`: trainings of the transformer, one after the other, each with its loss's settings."""

    model: str  # its folder
    extractor: str
    classes: tuple[str, ...]
    load: Callable[[str | Path | None, bool], Pictures]  # from a folder, with checksums verified or not
    classifier: TrainConfig
    vae: TrainConfig
    decoder: TrainConfig
    rounds: tuple[tuple[TrainConfig, Mapping[str, Any]], ...]
    channels: int
    latents: int  # channels of them
    flow: bool  # flow matching; else DDPM with a learned variance
    bfloat16: bool  # products in training
    jittered: bool  # the classifier sees images turned, scaled, moved and recoloured
    introduction: str  # of the card, in Markdown
    licence: str

    @property
    def reference(self) -> str:
        """Name of the stored reference."""
        return OF_MODEL[self.model]

    @property
    def configs(self) -> dict[str, TrainConfig]:
        """All trainings by name, in their order."""
        every = (self.classifier, self.vae, self.decoder, *(config for config, _ in self.rounds))
        return {config.name: config for config in every}

    @property
    def scheduler(self) -> dict[str, Any]:
        """scheduler_config.json."""
        if self.flow:
            return {"_class_name": FLOW, "num_train_timesteps": TIMESTEPS, "shift": 1.0}
        return {
            "_class_name": "DDIMScheduler",
            "num_train_timesteps": TIMESTEPS,
            "beta_schedule": "linear",
            "beta_start": BETA_START,
            "beta_end": BETA_END,
            "clip_sample": False,
            "set_alpha_to_one": True,
            "prediction_type": "epsilon",
        }

    def with_steps(self, steps: Mapping[str, int]) -> Subject:
        """Trainings by their names with other numbers of steps; names of another subject's trainings are passed over."""

        def changed(config: TrainConfig) -> TrainConfig:
            return replace(config, steps=steps.get(config.name, config.steps))

        rounds = tuple((changed(config), options) for config, options in self.rounds)
        parts = {name: changed(getattr(self, name)) for name in ("classifier", "vae", "decoder")}
        return replace(self, rounds=rounds, **parts)

    def build_classifier(self) -> SmallClassifier:
        return networks.classifier(self.channels, len(self.classes), KINDS[self.extractor].cls.WIDTHS)

    def build_vae(self) -> AutoencoderKL:
        return networks.vae(self.channels, self.latents)

    def build_transformer(self) -> DiTTransformer2DModel:
        return networks.transformer(self.latents, self.latents if self.flow else 2 * self.latents, len(self.classes))

    def classifier_loss(self, images: Tensor, labels: Tensor) -> Loss:
        """uint8 [N, C, 32, 32] and int64 [N]."""
        return self._narrow(losses.classifier_loss(images, labels, self.jittered))

    def vae_loss(self, images: Tensor) -> Loss:
        """uint8 [N, C, 32, 32]."""
        return self._narrow(losses.vae_loss(images))

    def decoder_loss(self, images: Tensor, mean: Tensor, std: Tensor) -> Loss:
        """uint8 [N, C, 32, 32] and the posterior of their latents [N, c, 8, 8]."""
        return self._narrow(losses.decoder_loss(images, mean, std))

    def transformer_losses(self, latents: Tensor, labels: Tensor) -> Iterator[tuple[TrainConfig, Loss]]:
        """The rounds with their losses. latents: float32 [N, C, 8, 8] of unit variance; labels int64 [N]."""
        kind = losses.flow_loss if self.flow else losses.dit_loss
        for config, options in self.rounds:
            loss = kind(latents, labels, len(self.classes), **options)
            yield config, self._narrow(loss)

    def _narrow(self, loss: Loss) -> Loss:
        return losses.in_bfloat16(loss) if self.bfloat16 else loss


def _fashion(folder: str | Path | None, verify: bool) -> Pictures:
    train, test = (fashion_dataset.load(split, folder, verify) for split in ("train", "test"))
    return Pictures(*train, *test, others=train[0][:0])


def _emoji(source: str | Path | None, verify: bool) -> Pictures:
    train, test, rest = (emoji_dataset.load(split, source, verify) for split in ("train", "test", "rest"))
    others = torch.cat([rest[0], rest[0].flip(3)])
    most = int(torch.bincount(train[1]).max())
    train = emoji_dataset.balanced(*train, EMOJI_COPIES * most)
    test = emoji_dataset.balanced(*test, EMOJI_TEST)
    return Pictures(*train, *test, others=others)


FASHION = Subject(
    model=BUNDLED,
    extractor="fashion",
    classes=fashion_dataset.CLASSES,
    load=_fashion,
    classifier=TrainConfig("classifier", steps=3000, batch=128, lr=2e-3, weight_decay=5e-2, checkpoint_every=500),
    vae=TrainConfig("vae", steps=2400, batch=32, lr=2e-3, warmup=200, ema=0.995, checkpoint_every=400),
    decoder=TrainConfig("decoder", steps=4000, batch=32, lr=1e-3, warmup=100, ema=0.995, checkpoint_every=500),
    rounds=(
        (TrainConfig("dit", 5600, 128, 1e-3, weight_decay=1e-2, ema=0.9995, checkpoint_every=500), {}),
        (
            TrainConfig("dit-continued", 4500, 128, 5e-4, 200, weight_decay=1e-2, ema=0.9995, checkpoint_every=500),
            {"snr_cap": 5.0},
        ),
    ),
    channels=1,
    latents=4,
    flow=False,
    bfloat16=False,
    jittered=False,
    introduction="""A class-conditional latent Diffusion Transformer on Fashion-MNIST, small enough to study quantization on a laptop and in
DiT-XL/2's form: patch 2, adaLN-Zero, learned variance, label dropout for classifier-free guidance, a VAE in front.
The DiT has 6 blocks of width 192 on 16 tokens; images are 1×32×32 (28×28 padded with black), latents 4×8×8.""",
    licence="Fashion-MNIST, Zalando Research, MIT licence (`DATA_LICENSE`). The weights are under the project's licence.",
)
EMOJI = Subject(
    model=BUNDLED_FLOW,
    extractor="emoji",
    classes=emoji_dataset.CLASSES,
    load=_emoji,
    classifier=TrainConfig("classifier", 3000, 96, 2e-3, warmup=100, weight_decay=5e-2, checkpoint_every=250),
    vae=TrainConfig("vae", steps=4500, batch=32, lr=2e-3, warmup=200, ema=0.995, checkpoint_every=250),
    decoder=TrainConfig("decoder", steps=1500, batch=32, lr=1e-3, warmup=100, ema=0.995, checkpoint_every=250),
    rounds=(
        (TrainConfig("sit", 6000, 128, 1e-3, weight_decay=1e-2, ema=0.999, checkpoint_every=250), {}),
        (TrainConfig("sit-continued", 2800, 128, 8e-4, 100, weight_decay=1e-2, ema=0.999, checkpoint_every=250), {}),
    ),
    channels=3,
    latents=8,
    flow=True,
    bfloat16=True,
    jittered=True,
    introduction="""A class-conditional latent flow-matching transformer on colour emoji, in SiT's form (DiT-XL/2's blocks, patch 2, adaLN-Zero, a
velocity and no variance), label dropout for classifier-free guidance, a VAE in front. The transformer has 6 blocks of width 192
on 16 tokens; images are 3×32×32 on white, latents 8×8×8. x_σ = (1 − σ) x_0 + σ ε, v = ε − x_0, the model is told 1000 σ.""",
    licence="""Noto Emoji (Google, Apache-2.0) and Twemoji (Twitter and other contributors, CC-BY 4.0), as emoji-datasource 16.0.0 (Cal
Henderson, MIT) has them: `DATA_LICENSE`. The weights are under the project's licence; whoever passes on pictures of the two sets,
also those that the model repeats, owes the attribution given there.""",
)
SUBJECTS = {subject.extractor: subject for subject in (FASHION, EMOJI)}
