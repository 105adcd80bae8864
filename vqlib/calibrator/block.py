"""One step of one block — forward, loss, backward, optimizer, freezing, record — as an object of its own.

The loop over blocks, other devices and other models only arrange such steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vqlib import kernels
from vqlib.calibrator.freezing import freeze_rule
from vqlib.calibrator.losses import add_ratio_gradients, backward, block_loss, distance_weight
from vqlib.calibrator.optimizers import BlockOptimizer
from vqlib.config import CalibrationConfig
from vqlib.quantizer.soft import CandidateLinear

SETTLED = 0.99  # share of frozen sub-vectors from which a layer's codebook trains, with train_codebooks="frozen"


@dataclass(frozen=True)
class Moment:
    """What a block's step has to know of the whole run."""

    iteration: int  # 1 in the first step
    push: bool  # whether L_r takes part in this step
    waiting: frozenset[int] = frozenset()  # ids of codebooks that do not train yet


@dataclass(frozen=True)
class BlockRecord:
    """What the step of one block saw; the student's output [R, tokens, channels] is detached."""

    loss: float  # L_d
    output: Tensor
    layers: dict[str, dict[str, Any]]  # as in `Record.layers`, with `ratio_loss`


class BlockStep:
    """A block of the student with its soft layers by name, the optimizer of what is its alone, and the rule of freezing."""

    def __init__(
        self,
        name: str,
        block: nn.Module,
        layers: dict[str, CandidateLinear],
        own: list[nn.Parameter],
        config: CalibrationConfig,
    ) -> None:
        self.name, self.block, self.layers, self.config = name, block, layers, config
        self.rule = freeze_rule(config)
        self.optimizer = BlockOptimizer(own, {m.logits for m in layers.values()}, config)
        self.settled = {name: layer.logits is None for name, layer in layers.items()}
        self.final: dict[str, dict] = {}  # the figures of layers in which nothing is left to choose

    @property
    def logits(self) -> list[nn.Parameter]:
        """z [N, n] of the layers in which there is a choice."""
        return [layer.logits for layer in self.layers.values() if layer.logits is not None]

    def step(self, inputs: tuple[tuple, dict], target: Tensor, moment: Moment) -> BlockRecord:
        """From the block's (args, kwargs) and the full-precision output to an updated block and what was seen."""
        args, kwargs = inputs
        with torch.enable_grad():  # the full-precision forward around it has none
            output = self.block(*args, **kwargs)
            distance = block_loss(output, target)
            loss = self.checked(distance, moment)
            weight, pushed = distance_weight(self.config, target), self.logits if moment.push else ()
            backward(weight, distance, self.config.lambda_r, self.config.ratio_loss, pushed)
        self._hold(moment)
        return BlockRecord(loss, output.detach(), self.update(moment))

    def checked(self, distance: Tensor, moment: Moment) -> float:
        """L_d as a number. Raises FloatingPointError, naming block, step and layer, where it is NaN or infinite."""
        loss = distance.item()
        if not math.isfinite(loss):
            layer = next(
                (n for n, m in self.layers.items() if not all(p.isfinite().all() for p in m.parameters())), None
            )
            where = (
                f"layer {layer} holds a value that is not finite"
                if layer
                else "its layers are finite, its inputs are not"
            )
            raise FloatingPointError(f"step {moment.iteration}: the loss of block {self.name} is {loss}; {where}")
        return loss

    def add_gradients(self, moment: Moment) -> None:
        """What is left of the gradients where one graph through all blocks was differentiated: L_r, and codebooks that wait."""
        if moment.push:
            add_ratio_gradients(self.config.lambda_r, self.config.ratio_loss, self.logits)
        self._hold(moment)

    def update(self, moment: Moment) -> dict[str, dict[str, Any]]:
        """Step the optimizer, freeze what the rule says; figures by layer."""
        self.optimizer.step(moment.iteration)
        return {name: self._settle(name, layer, moment) for name, layer in self.layers.items()}

    def _hold(self, moment: Moment) -> None:
        for layer in self.layers.values():
            if id(layer.codebook) in moment.waiting:  # a shared codebook waits for the last of its layers
                layer.codebook.grad = None
                if layer.scale is not None:
                    layer.scale.grad = None

    def _settle(self, name: str, layer: CandidateLinear, moment: Moment) -> dict[str, Any]:
        """Freeze what has passed the limit; the layer's figures for the record."""
        if name in self.final:
            return dict(self.final[name])
        figures = {"count": len(layer.candidates), "frozen": 1.0, "moved": 0.0, "entropy": 0.0, "ratio_loss": 0.0}
        winners = torch.zeros(len(layer.candidates), dtype=torch.uint8, device=layer.candidates.device)
        if layer.logits is not None:
            limit = self.rule.limit(layer.logits.data, moment.iteration / self.config.iterations)
            ratios = kernels.settle_ratios(layer.logits.data, limit, freeze=True)
            figures |= {"frozen": ratios.frozen, "moved": ratios.winners_not_first, "entropy": ratios.entropy}
            figures |= {"histogram": ratios.histogram.tolist(), "ratio_loss": getattr(ratios, self.config.ratio_loss)}
            self.settled[name] = ratios.frozen > SETTLED
            winners = ratios.winners
        k = len(layer.codebook)
        figures["unused"] = k - kernels.used_codewords(layer.candidates, winners, k)
        if figures["frozen"] == 1.0 and figures["entropy"] == 0.0:
            self.final[name] = dict(figures)
            if layer.logits is not None:
                layer.settle()
                self.optimizer.forget(layer.logits)
        return figures
