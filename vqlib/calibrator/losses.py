"""The terms of the calibration loss, Eq. 8–10 of VQ4DiT and the release's variant of Eq. 9."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from vqlib import kernels
from vqlib.config import CalibrationConfig
from vqlib.models.denoiser import Output, compared


def block_loss(student: Output, teacher: Output) -> Tensor:
    """L_d of one block: the mean squared difference of its outputs [R, tokens, channels], of all streams, in float32 at least.

    Eq. 8 has the squared norm, tokens · channels times as much: `distance_weight` says which of the two is weighed
    against L_r. Losses are reported as means, so that models and layers compare.
    """
    student, teacher = compared(student), compared(teacher)
    if student.itemsize < 4:
        student = student.float()
    return (student - teacher).pow(2).mean()


def distance_weight(config: CalibrationConfig, output: Output, blocks: int = 1) -> float:
    """λ_d for a sum of `blocks` means: Eq. 8's sum over tokens, channels and blocks of an image, or one mean."""
    return config.lambda_d * (compared(output)[0].numel() if config.block_loss == "sum" else 1 / blocks)


def backward(lambda_d: float, distance: Tensor, lambda_r: float, ratio_loss: str, logits: Iterable[Tensor]) -> None:
    """Gradients of λ_d L_d + λ_r L_r (Eq. 10): the first term by autograd, then the second, which sees the logits alone."""
    (lambda_d * distance).backward()
    add_ratio_gradients(lambda_r, ratio_loss, logits)


def add_ratio_gradients(lambda_r: float, ratio_loss: str, logits: Iterable[Tensor]) -> None:
    """z.grad += λ_r dL_r/dz for every z [N, n] that has a gradient."""
    for z in logits:
        if z.grad is not None:
            kernels.add_ratio_gradient(ratio_loss, z, z.grad, lambda_r)
