"""When a sub-vector's ratios become one-hot for good: the rules of hardening, one type each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from vqlib import kernels
from vqlib.config import CalibrationConfig


class FreezeRule(Protocol):
    """`limit(logits [N, n], done)`: the largest ratio above which a layer's sub-vectors freeze; done: share of the run, 0 … 1.

    A number, or a tensor [] on the device of the logits.
    """

    def limit(self, logits: Tensor, done: float) -> float | Tensor: ...


@dataclass(frozen=True)
class Threshold:
    """A sub-vector whose largest ratio passes `above` takes that candidate (the authors' release: 0.99)."""

    above: float

    def limit(self, logits: Tensor, done: float) -> float:
        return self.above


@dataclass(frozen=True)
class Timetable:
    """The most decided sub-vectors of each layer first: none before `start`, all after `stop`, evenly in between."""

    start: float
    stop: float

    def limit(self, logits: Tensor, done: float) -> float | Tensor:
        share = (done - self.start) / (self.stop - self.start)
        if not 0.0 < share < 1.0:
            return 1.0 if share <= 0.0 else 0.0
        return kernels.ratio_limit(logits, max(1, round(len(logits) * (1.0 - share))))


def freeze_rule(config: CalibrationConfig) -> FreezeRule:
    """The rule that `config.freeze_rule` names."""
    if config.freeze_rule == "threshold":
        return Threshold(config.freeze_above)
    return Timetable(config.freeze_from, config.freeze_until)
