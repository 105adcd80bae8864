"""A small convolutional Fashion-MNIST classifier: the bundled feature extractor and the judge of class accuracy."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

FEATURES = 128


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


class FashionClassifier(nn.Module):
    """Images float [B, 1, 32, 32] in [−1, 1] to logits [B, 10]; `features` gives the [B, 128] before the last layer."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 24, 3, stride=2, padding=1),  # [B, 24, 16, 16]
            Residual(24),
            nn.Conv2d(24, 64, 3, stride=2, padding=1),  # [B, 64, 8, 8]
            Residual(64),
            nn.Conv2d(64, FEATURES, 3, stride=2, padding=1),  # [B, 128, 4, 4]
            Residual(FEATURES),
            nn.BatchNorm2d(FEATURES),
            nn.ReLU(),
        )
        self.head = nn.Linear(FEATURES, 10)

    def features(self, x: Tensor) -> Tensor:
        return self.body(x).mean(dim=(2, 3))  # [B, 128]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))
