"""What rival codes share: layers whose weight is made of what a method stores, trained on the model's output or not.

The training is that of VQ4DiT's last stage (`vqlib.distill`): the same paths, the same loss, the same optimizer, with
whatever the method holds besides its codes as parameters. So a table can tell what codes are worth from what training is.
Scales, gains, factors and codebooks are stored in float16, as they are counted: they are rounded to it at the end.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vqlib.calibrator.hessians import input_hessians
from vqlib.calibrator.losses import block_loss, distance_weight
from vqlib.calibrator.optimizers import BlockOptimizer
from vqlib.calibrator.teacher import teacher_output
from vqlib.calibrator.trajectory import Trajectory
from vqlib.config import CalibrationConfig
from vqlib.kernels.products import linear
from vqlib.models import structure
from vqlib.models.pipeline import Pipeline
from vqlib.studies.baselines.baseline import OTHER_TRAJECTORIES, Baseline, Moments, stored_bytes
from vqlib.system.files import write_tensors


class MadeLinear(nn.Module):
    """A linear layer whose weight [out, in] a subclass makes of its parameters; `stored_bits`: what it takes without the bias.

    Parameters may be shared with other layers: they are then counted by whoever made them, in `stored_bits` of the first.
    """

    stored_bits: int

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())

    def weight(self) -> Tensor:
        """Ŵ [out, in], differentiable in the layer's parameters."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return linear(x, self.weight(), self.bias)


Layers = Mapping[str, nn.Linear]
Make = Callable[[Layers, Mapping[str, Tensor]], Mapping[str, MadeLinear]]


@dataclass(frozen=True)
class Trained:
    """How a rival is made beside its codes: whose second moments, and (None: not) how it is trained on the output."""

    moments: Moments
    distillation: CalibrationConfig | None = None

    def __post_init__(self) -> None:
        how = self.distillation
        if how and (how.path, how.lr_latents, how.products) != ("student", 0.0, "float32"):
            given = f"path={how.path!r}, lr_latents={how.lr_latents}, products={how.products!r}"
            raise ValueError(f"a rival is trained on its own path, its codes as they are, in float32, not with {given}")

    def seeded(self, seed: int) -> Trained:
        """The same on other trajectories, for second moments and for training."""
        moments = replace(self.moments, inputs=self.moments.inputs.replace(seed=seed))
        return Trained(moments, self.distillation and self.distillation.replace(seed=seed + OTHER_TRAJECTORIES))


def build(pipe: Pipeline, folder: Path | None, how: Trained, make: Make) -> Baseline:
    """The transformer whose quantizable layers `make(layers, hessians)` gives by name, trained, its weights then dense.

    It is kept in `folder`, where one is given, and taken from there the next time.
    """
    layers = structure.quantizable(pipe.transformer)
    kept = None if folder is None else Path(folder) / "dense.safetensors"
    found = _kept(kept)
    if found is None:
        found = _made(pipe, layers, how, make)
        if kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(kept, found[0], {"about": json.dumps(found[1])})
    tensors, about = found
    model = copy.deepcopy(pipe.transformer)
    model.load_state_dict({name: t.to(pipe.device) for name, t in tensors.items()}, strict=False)
    count = sum(layer.weight.numel() for layer in layers.values())
    rest = stored_bytes(model, "float16", without={f"{name}.weight" for name in layers})
    return Baseline(model, about["bits"] / count, rest + about["bits"] // 8, about["seconds"])


def _kept(path: Path | None) -> tuple[dict[str, Tensor], dict] | None:
    """What was made before: weights and biases by name, bits and seconds; None where there is none or it is damaged."""
    if path is None:
        return None
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["about"])
    except (FileNotFoundError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def _made(pipe: Pipeline, layers: Layers, how: Trained, make: Make) -> tuple[dict[str, Tensor], dict]:
    hessians = input_hessians(pipe, how.moments.inputs, how.moments.batches)
    made, start = make(layers, hessians), time.monotonic()
    if how.distillation:
        student = copy.deepcopy(pipe.transformer).requires_grad_(False)
        for name, layer in made.items():
            structure.swap(student, name, layer)
        _distill(pipe, student, list(made.values()), how.distillation)
    _rounded(made.values())
    tensors = {f"{name}.weight": layer.weight().detach().float().contiguous() for name, layer in made.items()}
    tensors |= {f"{name}.bias": layer.bias.detach() for name, layer in made.items() if layer.bias is not None}
    bits = sum(layer.stored_bits for layer in made.values())
    return tensors, {"bits": bits, "seconds": time.monotonic() - start if how.distillation else 0.0}


@torch.no_grad()
def _rounded(layers: Iterable[MadeLinear]) -> None:
    """What a layer stores beside its codes, but for the bias, to float16, in place."""
    for layer in layers:
        for name, parameter in layer.named_parameters():
            if name != "bias":
                parameter.copy_(parameter.half())


def _distill(pipe: Pipeline, student: nn.Module, layers: list[MadeLinear], config: CalibrationConfig) -> None:
    """Train the layers' parameters on the output, in place. FloatingPointError where the loss is not finite."""
    parameters = list(dict.fromkeys(p for layer in layers for p in layer.parameters() if p.requires_grad))
    optimizer, trajectory = BlockOptimizer(parameters, set(), config), Trajectory(pipe, config)
    trajectory.stagger(partial(teacher_output, pipe))
    for iteration in range(1, config.iterations + 1):
        inputs, taken = trajectory.inputs(), trajectory.student_inputs()
        output = teacher_output(pipe, inputs)
        with torch.enable_grad():
            led = pipe.output(*taken, model=student)
            loss = block_loss(trajectory.signal(led, taken), trajectory.signal(output, inputs))
            (distance_weight(config, output) * loss).backward()
        if not loss.isfinite():
            raise FloatingPointError(f"step {iteration}: the loss of a rival's output is {loss.item()}")
        optimizer.step(iteration, loss.detach())
        trajectory.advance(output, led.detach())
