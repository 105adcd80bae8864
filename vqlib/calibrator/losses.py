"""The terms of the calibration loss, Eq. 8–10 of VQ4DiT and the release's variant; each a scalar, added in one place."""

from __future__ import annotations

from torch import Tensor

from vqlib import kernels


def block_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """L_d of one block: the mean squared difference of its outputs [R, tokens, channels].

    Eq. 8 has the squared norm, tokens · channels times as much: `CalibrationConfig.block_loss` says which of the two is
    weighed against L_r. Losses are reported as means, so that models and layers compare.
    """
    return (student - teacher).pow(2).mean()


def absolute_ratio_loss(logits: Tensor) -> Tensor:
    """L_r = Σ_{N,n} (1 − |2r − 1|) / N of one layer's logits [N, n] (Eq. 9).

    Per sub-vector it is 2 while the largest ratio is at most ½ and 4(1 − max r) above: for n ≥ 3 its gradient is 0 at 1/n.
    """
    return kernels.ratio_loss("absolute", logits)


def quadratic_ratio_loss(logits: Tensor) -> Tensor:
    """n · mean of r(1 − r) over the sub-vectors not yet frozen, as in the authors' release; logits [N, n]."""
    return kernels.ratio_loss("quadratic", logits)


RATIO_LOSSES = {"absolute": absolute_ratio_loss, "quadratic": quadratic_ratio_loss}
