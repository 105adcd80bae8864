"""The terms of the calibration loss, Eq. 8–10 of VQ4DiT and the release's variant; each a scalar, added in one place."""

from __future__ import annotations

import torch
from torch import Tensor

from vqlib.candidates import FROZEN_LOGIT


def block_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """L_d of one block: the mean squared difference of its outputs [R, tokens, channels] (Eq. 8, mean instead of sum)."""
    return (student - teacher).pow(2).mean()


def absolute_ratio_loss(logits: Tensor) -> Tensor:
    """L_r = Σ_{N,n} (1 − |2r − 1|) / N of one layer's logits [N, n] (Eq. 9).

    Per sub-vector it is 2 while the largest ratio is at most ½ and 4(1 − max r) above: for n ≥ 3 its gradient is 0 at 1/n.
    """
    ratios = logits.softmax(dim=1)
    return (1.0 - (2.0 * ratios - 1.0).abs()).sum() / len(logits)


def quadratic_ratio_loss(logits: Tensor) -> Tensor:
    """n · mean of r(1 − r) over the sub-vectors not yet frozen, as in the authors' release; logits [N, n]."""
    open_rows = logits.detach().amin(dim=1) > FROZEN_LOGIT
    ratios = logits.softmax(dim=1)
    terms = (ratios * (1.0 - ratios)).sum(dim=1) * open_rows
    return terms.sum() / open_rows.sum().clamp_min(1)


RATIO_LOSSES = {"absolute": absolute_ratio_loss, "quadratic": quadratic_ratio_loss}


@torch.no_grad()
def total_ratio_loss(kind: str, all_logits: list[Tensor]) -> float:
    """L_r summed over layers, without a gradient."""
    return sum(RATIO_LOSSES[kind](logits).item() for logits in all_logits)
