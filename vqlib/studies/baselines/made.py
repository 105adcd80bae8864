"""What rival codes share: layers whose weight is made of what a method stores, trained on the model's output or not.

The training is that of VQ4DiT's last stage (`vqlib.distill`): the same paths, the same loss, the same optimizer, with
whatever the method holds besides its codes as parameters, each at the rate of the codebooks there, relative to its size. So
a table can tell what codes are worth from what training is. What is stored is rounded to float16 at the end, as it is counted.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vqlib.calibrator.hessians import input_hessians
from vqlib.calibrator.losses import block_loss, distance_weight
from vqlib.calibrator.optimizers import BlockOptimizer
from vqlib.calibrator.teacher import teacher_output
from vqlib.calibrator.trajectory import Trajectory
from vqlib.config import OTHER_TRAJECTORIES, CalibrationConfig
from vqlib.kernels.products import linear
from vqlib.models import structure
from vqlib.models.pipeline import Pipeline
from vqlib.studies.baselines.baseline import Baseline, Moments, stored_bytes
from vqlib.system.files import write_tensors
from vqlib.system.fingerprint import fingerprint


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


FOLLOWED = {"path": "student", "lr_latents": 0.0, "products": "float32", "activation_checkpointing": False}
FOLLOWED |= {"train_codebooks": "always", "train_biases": True}
Layers = Mapping[str, nn.Linear]


@dataclass(frozen=True)
class Trained:
    """How a rival is made beside its codes: whose second moments, and (None: not) how it is trained on the output."""

    moments: Moments
    distillation: CalibrationConfig | None = None
    version: int = 2  # one more whenever the same settings begin to give something else: kept rows are found by it

    def __post_init__(self) -> None:
        given = {name: getattr(self.distillation, name) for name in FOLLOWED} if self.distillation else FOLLOWED
        if given != FOLLOWED:
            told = ", ".join(f"{name}={value!r}" for name, value in given.items() if value != FOLLOWED[name])
            raise ValueError(
                f"a rival is trained whole, on its own path, its codes as they are, in float32, not with {told}"
            )

    def seeded(self, seed: int) -> Trained:
        """The same on other trajectories, for second moments and for training."""
        moments = replace(self.moments, inputs=self.moments.inputs.replace(seed=seed))
        return Trained(moments, self.distillation and self.distillation.replace(seed=seed + OTHER_TRAJECTORIES))


class Rival(Protocol):
    """A rival's codes: a frozen dataclass of settings, `how` it is trained among them."""

    how: Trained

    def layers(self, layers: Layers, hessians: Mapping[str, Tensor]) -> Mapping[str, MadeLinear]:
        """What takes the place of these layers, by name; hessians: float32 [in, in] by name."""


def build(pipe: Pipeline, folder: Path | None, rival: Rival) -> Baseline:
    """The transformer whose quantizable layers `rival` gives, trained, its weights then dense.

    It is kept in `folder`, where one is given, and taken from there the next time. RuntimeError where the folder has another
    rival's or one of other weights.
    """
    layers = structure.quantizable(pipe.transformer)
    kept = None if folder is None else Path(folder) / "dense.safetensors"
    made_of, found = [repr(rival), fingerprint(pipe.transformer)], _kept(kept)
    if found and found[1]["made_of"] != made_of:
        held, wanted = (" of weights ".join(of) for of in (found[1]["made_of"], made_of))
        raise RuntimeError(f"{kept} holds {held}, now {wanted}; give another folder")
    if found is None:
        found = _made(pipe, layers, rival)
        found[1]["made_of"] = made_of
        if kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(kept, found[0], {"about": json.dumps(found[1])})
    tensors, about = found
    model = copy.deepcopy(structure.unwrapped(pipe.transformer))
    model.load_state_dict(model.state_dict() | {name: t.to(pipe.device) for name, t in tensors.items()})
    count = sum(layer.weight.numel() for layer in layers.values())
    rest = stored_bytes(model, "float16", without={f"{name}.weight" for name in layers})
    return Baseline(model, about["bits"] / count, rest + about["bits"] // 8, about["seconds"])


def _kept(path: Path | None) -> tuple[dict[str, Tensor], dict] | None:
    """What was made before: weights and biases by name, and of what, bits, seconds; None where there is none or it is damaged."""
    if path is None:
        return None
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
            return ({name: file.get_tensor(name) for name in file.keys()}, about) if "made_of" in about else None
    except (FileNotFoundError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def _made(pipe: Pipeline, layers: Layers, rival: Rival) -> tuple[dict[str, Tensor], dict]:
    how = rival.how
    hessians, seconds = input_hessians(pipe, how.moments.inputs, how.moments.batches), 0.0
    made = rival.layers(layers, hessians)
    del hessians  # as large as the model, and of no use to the training
    if how.distillation:
        student = copy.deepcopy(structure.unwrapped(pipe.transformer)).requires_grad_(False)
        for name, layer in made.items():
            structure.swap(student, name, layer)
        seconds = _distill(pipe, student, list(made.values()), how.distillation)
    with torch.no_grad():
        for parameter in (p for layer in made.values() for p in layer.parameters()):
            parameter.copy_(parameter.half())
    tensors = {f"{name}.weight": layer.weight().detach().float().contiguous() for name, layer in made.items()}
    tensors |= {f"{name}.bias": layer.bias.detach() for name, layer in made.items() if layer.bias is not None}
    return tensors, {"bits": sum(layer.stored_bits for layer in made.values()), "seconds": seconds}


def rates(layers: Sequence[MadeLinear], config: CalibrationConfig) -> dict[nn.Parameter, float]:
    """The rate of everything that trains: `lr_codebooks` for biases and for what is as large as its layer's weights.

    VQ4DiT's codewords are. A gain of 1 or a codebook in units of a row moves by the same share of itself at a rate as many
    times larger. Sizes are root mean squares; of what layers share, beside the first one's weights.
    """
    found = {}
    for layer in layers:
        size = _rms(layer.weight())
        for name, parameter in layer.named_parameters():
            if parameter.requires_grad and parameter not in found:
                larger = 1.0 if name == "bias" or not size else _rms(parameter) / size
                found[parameter] = config.lr_codebooks * (larger or 1.0)
    return found


def _rms(x: Tensor) -> float:
    return float(x.detach().double().square().mean().sqrt())


def _distill(pipe: Pipeline, student: nn.Module, layers: list[MadeLinear], config: CalibrationConfig) -> float:
    """Train the layers' parameters on the output, in place; the seconds of all steps. FloatingPointError: the loss is not finite."""
    trained = [
        BlockOptimizer([p], set(), config.replace(lr_codebooks=rate)) for p, rate in rates(layers, config).items()
    ]
    trajectory = Trajectory(pipe, config)
    trajectory.stagger(partial(teacher_output, pipe))
    start = time.monotonic()
    for iteration in range(1, config.iterations + 1):
        inputs, taken = trajectory.inputs(), trajectory.student_inputs()
        output = teacher_output(pipe, inputs)
        with torch.enable_grad():
            led = pipe.output(*taken, model=student)
            loss = block_loss(trajectory.matched(led, taken), trajectory.matched(output, inputs))
            (distance_weight(config, output) * loss).backward()
        if not loss.isfinite():
            raise FloatingPointError(f"step {iteration}: the loss of a rival's output is {loss.item()}")
        for optimizer in trained:
            optimizer.step(iteration, loss.detach())
        trajectory.advance(output, led.detach())
    return time.monotonic() - start
