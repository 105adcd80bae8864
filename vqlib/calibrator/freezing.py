"""When a sub-vector's ratios become one-hot for good: the rules of hardening, one type each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from vqlib import kernels
from vqlib.config import CalibrationConfig


class FreezeRule(Protocol):
    """`limit(logits [N, n], done)`: the largest ratio above which a layer's sub-vectors freeze; done: share of the run, 0 … 1."""

    def limit(self, logits: Tensor, done: float) -> float: ...


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

    def limit(self, logits: Tensor, done: float) -> float:
        share = (done - self.start) / (self.stop - self.start)
        if not 0.0 < share < 1.0:
            return 1.0 if share <= 0.0 else 0.0
        largest = kernels.largest_ratios(logits)
        return largest.kthvalue(max(1, round(len(largest) * (1.0 - share)))).values.item()


def freeze_rule(config: CalibrationConfig) -> FreezeRule:
    """The rule that `config.freeze_rule` names."""
    if config.freeze_rule == "threshold":
        return Threshold(config.freeze_above)
    return Timetable(config.freeze_from, config.freeze_until)
