"""A calibration in stages: each owns consecutive blocks of both models, wherever it is, and nobody holds the whole student.

With full-precision inputs a block's step needs nothing but the full-precision activations before and behind it. So a
stage passes a batch through its blocks, gives the activations on, and only then steps its student, while the batch goes
through the stages behind it. What it computes is what `Calibration` computes, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vqlib.calibrator.block import BlockStep, Moment, block_steps, waiting_codebooks
from vqlib.calibrator.calibrate import read_back, with_prefix
from vqlib.calibrator.hessians import SecondMoments
from vqlib.calibrator.optimizers import prepare_parameters
from vqlib.calibrator.teacher import following, require_finite, teacher_forward
from vqlib.calibrator.trajectory import Inputs
from vqlib.config import CalibrationConfig, VQConfig
from vqlib.models import structure
from vqlib.models.denoiser import Output, compared
from vqlib.models.modulation import SharedEmbedder
from vqlib.models.pipeline import Pipeline
from vqlib.packed.harden import harden_layer
from vqlib.packed.layer import VQLinear
from vqlib.quantizer.quantize import quantize_layers
from vqlib.quantizer.soft import soft_layers
from vqlib.system.files import write_tensors
from vqlib.system.memory import keep_freed_memory, peak_memory


@dataclass(frozen=True)
class StageRecord:
    """What a stage saw in one step: L_d of its blocks, its layers' figures, its peak memory in bytes."""

    losses: list[float]
    layers: dict[str, dict[str, Any]]
    memory: int


class Stage:
    """Blocks first … last − 1 of a pipeline, which is taken: the linears of all other blocks are dropped from it.

    Raises ValueError for settings under which blocks are not independent of each other.
    """

    def __init__(
        self,
        pipe: Pipeline,
        vq: VQConfig,
        config: CalibrationConfig,
        blocks: tuple[int, int],
        seed: int = 0,
    ) -> None:
        require_independent(vq, config)
        keep_freed_memory()
        self.pipe, self.vq, self.config, self.seed, self.own = pipe, vq, config, seed, range(*blocks)
        count = len(structure.block_list(pipe.transformer))
        if not 0 <= blocks[0] < blocks[1] <= count:
            raise ValueError(f"blocks {blocks[0]} … {blocks[1] - 1} are not among the {count} of {pipe.name}")
        self.last = blocks[1] == count
        self.passing = _leave_to_others(pipe.transformer, self.own)
        self.models: tuple[nn.Module, ...] = (pipe.transformer,)
        self.embedder = SharedEmbedder(*self.models)
        self.seen: list[tuple[tuple, dict, Output]] = []
        self.moments = SecondMoments(structure.quantizable(pipe.transformer)) if needs_moments(vq) else None
        if self.moments is None:
            self.quantize()

    def gather(self, inputs: Inputs, received: Output | None = None) -> Output:
        """`forward` whose batch counts in the second moments that error feedback needs, before `quantize`."""
        with self.moments.gathering():
            given = self.forward(inputs, received)
        self.seen = []
        return given

    def quantize(self) -> None:
        """Codebooks, candidates and ratios of the own layers: of those that `vq` takes, which may be none."""
        hessians = self.moments and self.moments.means()
        own = structure.quantizable(self.pipe.transformer).items()
        taken = {name: layer for name, layer in own if self.vq.takes(name)}
        student = quantize_layers(self.pipe.transformer, taken, self.vq, self.seed, hessians=hessians)
        self.moments = None
        prepare_parameters(student, self.config)
        self.layers = soft_layers(student)
        steps, _ = block_steps(student, self.config)
        self.steps: dict[int, BlockStep] = {index: steps[index] for index in self.own}
        self.models = self.pipe.transformer, student
        self.embedder = SharedEmbedder(*self.models)

    def forward(self, inputs: Inputs, received: Output | None = None) -> Output:
        """The full-precision blocks on a batch and on what the stage before gave; they are kept for `learn`.

        What the next stage is to be given; of the last one the model's output. FloatingPointError where it is not finite.
        """
        self.passing.value, self.seen = received, []

        def visit(index: int, args: tuple, kwargs: dict, output: Output) -> None:
            if index in self.own:
                self.seen.append((args, kwargs, output))
                self.passing.value = output

        with structure.precision(self.config.products, *self.models), self.embedder.working():
            with following(self.pipe.transformer, visit):
                output = teacher_forward(self.pipe, inputs)
        given, self.passing.value = output if self.last else self.passing.value, None
        require_finite(self.pipe, bool(compared(given).isfinite().all()))
        return given

    def learn(self, iteration: int) -> StageRecord:
        """One step of every own block's student on the batch that `forward` saw."""
        choosing = any(layer.logits is not None for layer in self.layers.values())
        push = choosing and self.config.ratio_loss_when == "always"
        moment = Moment(iteration, push, waiting_codebooks(self.steps.values(), self.config))
        with structure.precision(self.config.products, *self.models), self.embedder.working():
            records = [
                step.step((args, kwargs), output, moment)
                for step, (args, kwargs, output) in zip(self.steps.values(), self.seen, strict=True)
            ]
        self.seen = []
        losses, rows, _ = read_back([r.loss for r in records], [r.rows for r in records], compared(records[-1].output))
        layers: dict[str, dict[str, Any]] = {}
        for step, loss, own in zip(self.steps.values(), losses, rows, strict=True):
            step.checked(loss, moment)
            layers |= step.conclude(own)
        return StageRecord(losses, layers, peak_memory(self.pipe.device))

    def packed(self) -> dict[str, VQLinear]:
        """The own layers with their winners, by name, on the CPU."""
        return {name: harden_layer(layer, name).cpu() for name, layer in self.layers.items()}

    def save(self, folder: Path, iteration: int) -> None:
        """Write a file a block: where stages are cut may change before they are loaded."""
        for index, step in self.steps.items():
            write_tensors(block_file(folder, index, iteration), self._state(step))

    def load(self, folder: Path, iteration: int) -> None:
        """Take up what `save` wrote."""
        for index, step in self.steps.items():
            state = load_file(block_file(folder, index, iteration))
            for name, layer in step.layers.items():
                layer.load_state_dict({key: state[f"student.{name}.{key}"] for key in layer.state_dict()})
            step.optimizer.load_state(with_prefix(state, "optimizer."))
            step.settled = dict(zip(step.settled, state["settled"].tolist(), strict=True))

    def _state(self, step: BlockStep) -> dict[str, Tensor]:
        state = {f"student.{n}.{k}": v for n, layer in step.layers.items() for k, v in layer.state_dict().items()}
        state |= {f"optimizer.{key}": value for key, value in step.optimizer.state().items()}
        return state | {"settled": torch.tensor(list(step.settled.values()))}


def block_file(folder: Path, block: int, iteration: int) -> Path:
    """Where a block's state after that many steps is kept."""
    return Path(folder) / f"block-{block}-{iteration}.safetensors"


def needs_moments(vq: VQConfig) -> bool:
    """Whether batches have to be gathered before `Stage.quantize`."""
    return vq.assignment != "nearest"


def require_independent(vq: VQConfig, config: CalibrationConfig) -> None:
    """Raises ValueError where a block's step depends on other blocks of the student."""
    if config.block_inputs != "full":
        raise ValueError(f"block_inputs={config.block_inputs!r}: stages are independent with 'full' inputs only")
    if config.ratio_loss_when == "rising":
        raise ValueError("ratio_loss_when='rising' looks at the ratios of all blocks: no stage knows them")
    if vq.codebook_scope != "layer":
        raise ValueError(f"codebook_scope={vq.codebook_scope!r}: stages share no codebook; give 'layer'")


class _Passing:
    """What takes the place of blocks that are elsewhere: they give what is being passed on."""

    value: Output | None = None

    def __call__(self, *args, **kwargs) -> Output | None:
        return self.value


class _Elsewhere(nn.Module):
    """The place of a linear that another stage has: its block still counts as one."""

    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.in_features = in_features


def _leave_to_others(transformer: nn.Module, own: range) -> _Passing:
    """Drop the linears of the other blocks, in place; all that is not quantized, embedders too, stays."""
    passing, blocks = _Passing(), structure.block_list(transformer)
    foreign = {module for index, block in enumerate(blocks) if index not in own for module in block.modules()}
    for name, layer in structure.quantizable(transformer).items():
        if layer in foreign:
            structure.swap(transformer, name, _Elsewhere(layer.in_features))
    for index, block in enumerate(blocks):
        if index not in own:
            block.forward = passing
    return passing
