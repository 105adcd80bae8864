"""One step of one block — forward, loss, backward, optimizer, freezing, record — as an object of its own.

The loop over blocks, other devices and other models only arrange such steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vqlib import kernels
from vqlib.calibrator.freezing import freeze_rule
from vqlib.calibrator.losses import add_ratio_gradients, backward, block_loss, distance_weight
from vqlib.calibrator.optimizers import BlockOptimizer
from vqlib.config import CalibrationConfig
from vqlib.models import structure
from vqlib.models.denoiser import Output, detached
from vqlib.quantizer.latent import LatentLinear
from vqlib.quantizer.soft import CandidateLinear, soft_layers
from vqlib.system.memory import sent

MOVED = kernels.RatioStatistics._fields.index("winners_not_first")  # with latents: those that moved in this step
SETTLED = 0.99  # share of frozen sub-vectors from which a layer's codebook trains, with train_codebooks="frozen"


@dataclass(frozen=True)
class Moment:
    """What a block's step has to know of the whole run."""

    iteration: int  # 1 in the first step
    push: bool  # whether L_r takes part in this step
    waiting: frozenset[int] = frozenset()  # ids of codebooks that do not train yet


@dataclass(frozen=True)
class BlockRecord:
    """What the step of one block saw, on the device it was made on: nobody has waited for it yet."""

    loss: Tensor  # [], L_d
    output: Output  # the student's [R, tokens, channels], or several streams, detached
    rows: list[Tensor]  # float64 [26] of every layer, as `kernels.settle_ratios` gives them


class Passed(NamedTuple):
    """What one pass through both models leaves."""

    output: Tensor  # of the full-precision model
    records: list[BlockRecord]
    distances: list[Tensor]  # [], of the two outputs, where that is what was trained on
    led: Tensor | None = None  # the student's output, where its x_t follows it


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
        latents = {m.latents for m in layers.values() if isinstance(m, LatentLinear)}
        self.optimizer = BlockOptimizer(own, {m.logits for m in layers.values()}, config, latents)
        self.settled = {name: layer.logits is None for name, layer in layers.items()}
        self.final: dict[str, Tensor] = {}  # the rows of layers in which nothing is left to choose

    @property
    def logits(self) -> list[nn.Parameter]:
        """z [N, n] of the layers in which there is a choice."""
        return [layer.logits for layer in self.layers.values() if layer.logits is not None]

    def step(self, inputs: tuple[tuple, dict], target: Output, moment: Moment) -> BlockRecord:
        """From the block's (args, kwargs) and the full-precision output to an updated block and what was seen.

        Of a loss that is not finite no gradient counts (Adam goes on by its momentum); `checked` tells.
        """
        args, kwargs = inputs
        with torch.enable_grad():  # the full-precision forward around it has none
            output = self.block(*args, **kwargs)
            loss = block_loss(output, target)
            weight, pushed = distance_weight(self.config, target), self.logits if moment.push else ()
            if loss.requires_grad:  # a block may hold nothing that is trained
                backward(weight, loss, self.config.lambda_r, self.config.ratio_loss, pushed)
        self._hold(moment)
        return BlockRecord(loss.detach(), detached(output), self.update(loss.detach(), moment))

    def checked(self, loss: float, moment: Moment) -> float:
        """L_d as it was read. Raises FloatingPointError, naming block, step and layer, where it is NaN or infinite."""
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

    def update(self, loss: Tensor, moment: Moment) -> list[Tensor]:
        """Step the optimizer and freeze what the rule says; a row of statistics a layer. `loss` as in `BlockOptimizer.step`."""
        self.optimizer.step(moment.iteration, loss)
        return [self._freeze(name, layer, moment) for name, layer in self.layers.items()]

    def conclude(self, rows: list[list[float]]) -> dict[str, dict[str, Any]]:
        """The layers' figures from the rows that were read back; layers in which nothing is left to choose are settled."""
        return {
            name: self._conclude(name, layer, row) for (name, layer), row in zip(self.layers.items(), rows, strict=True)
        }

    def _hold(self, moment: Moment) -> None:
        for layer in self.layers.values():
            if id(layer.codebook) in moment.waiting:  # a shared codebook waits for the last of its layers
                layer.codebook.grad = None
                if layer.scale is not None:
                    layer.scale.grad = None

    def _freeze(self, name: str, layer: CandidateLinear, moment: Moment) -> Tensor:
        """Freeze what has passed the limit, or move to the codewords that are nearest now; the layer's row."""
        moved = layer.reassign() if isinstance(layer, LatentLinear) else None
        if name in self.final and moved is None:
            return self.final[name]
        k = len(layer.codebook)
        if layer.logits is None:
            one = torch.zeros(layer.candidates.shape, device=layer.candidates.device)
            row = kernels.settle_ratios(one, layer.candidates, k)
            if moved is not None:
                row[MOVED] = moved
            return row
        limit = self.rule.limit(layer.logits.data, moment.iteration / self.config.iterations)
        return kernels.settle_ratios(layer.logits.data, layer.candidates, k, limit, freeze=True)

    def _conclude(self, name: str, layer: CandidateLinear, row: list[float]) -> dict[str, Any]:
        ratios = kernels.RatioStatistics.of(row)
        figures = {"count": len(layer.candidates), "frozen": ratios.frozen, "moved": ratios.winners_not_first}
        figures |= {"entropy": ratios.entropy, "ratio_loss": 0.0, "unused": len(layer.codebook) - ratios.used}
        if layer.logits is not None:
            self.settled[name] = ratios.frozen > SETTLED
            figures |= {"histogram": ratios.histogram, "ratio_loss": getattr(ratios, self.config.ratio_loss)}
        if ratios.frozen == 1.0 and ratios.entropy == 0.0 and name not in self.final:
            self.final[name] = sent(torch.tensor(row, dtype=torch.float64), layer.candidates.device)
            if layer.logits is not None:
                layer.settle()
                self.optimizer.forget(layer.logits)
        return figures


def block_steps(model: nn.Module, config: CalibrationConfig) -> tuple[list[BlockStep], BlockOptimizer]:
    """A step for every block, and the optimizer of what several blocks share, to be stepped after the last of them."""
    blocks, names = structure.block_list(model), {module: name for name, module in model.named_modules()}
    owners: dict[nn.Parameter, set[int]] = {}
    for index, block in enumerate(blocks):
        for parameter in block.parameters():
            if parameter.requires_grad:
                owners.setdefault(parameter, set()).add(index)
    steps = []
    for index, block in enumerate(blocks):
        layers = {names[layer]: layer for layer in soft_layers(block).values()}
        own = [p for p, o in owners.items() if o == {index}]
        steps.append(BlockStep(names[block], block, layers, own, config))
    return steps, BlockOptimizer([p for p, o in owners.items() if len(o) > 1], set(), config)


def waiting_codebooks(steps: Iterable[BlockStep], config: CalibrationConfig) -> frozenset[int]:
    """Codebooks that do not train before all of their layers are settled, by id."""
    if config.train_codebooks != "frozen":
        return frozenset()
    return frozenset(id(m.codebook) for step in steps for name, m in step.layers.items() if not step.settled[name])
