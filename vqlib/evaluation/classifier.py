"""A small convolutional classifier of 32×32 images: the bundled models' feature extractor and the judge of class accuracy."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """x + conv(norm(relu(x))), twice, at constant width."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.relu(self.norm1(x)))
        return x + self.conv2(F.relu(self.norm2(h)))


class SmallClassifier(nn.Module):
    """Images float [B, channels, 32, 32] in [−1, 1] to logits [B, classes]; `features` gives the [B, W] before the last layer.

    Every one of `widths` halves the resolution; the last of them, W, is that of the features.
    """

    def __init__(self, channels: int, classes: int, widths: tuple[int, ...]):
        super().__init__()
        stages = []
        for before, width in zip((channels, *widths), widths):
            stages += [nn.Conv2d(before, width, 3, stride=2, padding=1), Residual(width)]
        self.body = nn.Sequential(*stages, nn.BatchNorm2d(widths[-1]), nn.ReLU())
        self.head = nn.Linear(widths[-1], classes)

    def features(self, x: Tensor) -> Tensor:
        return self.body(x).mean(dim=(2, 3))  # [B, W]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def to_model(images: Tensor) -> Tensor:
    """uint8 pixels 0 … 255 to float32 in [−1, 1], the range the VAE and the classifier take."""
    return images.float() / 127.5 - 1.0
