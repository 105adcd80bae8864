"""What the layers' inputs look like, without data: second moments along the full-precision model's own trajectory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from vqlib.calibrator.teacher import following, teacher_output
from vqlib.calibrator.trajectory import Trajectory
from vqlib.config import CalibrationConfig
from vqlib.kernels.products import products_in
from vqlib.models import structure
from vqlib.models.pipeline import Pipeline

# Calibration steps; adaLN sees one row an image, 2048 at batch 16 with guidance, for DiT-XL/2's 1152 inputs.
BATCHES = 64
INPUTS = ("batch_size", "steps", "guidance_scale", "inputs", "timestep_order", "products", "seed")  # what they follow


class Hessians(dict[str, Tensor]):
    """By layer name; `made_of`: the settings that they follow, so that a run which begins with others is told apart."""

    made_of: dict[str, Any]


def input_hessians(pipe: Pipeline, config: CalibrationConfig | None = None, batches: int = BATCHES) -> Hessians:
    """H = E x xᵀ of every quantizable layer's inputs x, float32 [in, in] by layer name.

    The inputs are those of `batches` iterations of `config`: the same trajectories, labels and guidance halves.
    ‖(W − Ŵ) x‖² averaged over them is tr((W − Ŵ) H (W − Ŵ)ᵀ). Layers that are given one tensor, as q, k and v are, share theirs.
    """
    require_batches(batches)
    config = config or CalibrationConfig()
    trajectory, moments = Trajectory(pipe, config), SecondMoments(structure.quantizable(pipe.transformer))
    with structure.precision(config.products, pipe.transformer):
        trajectory.stagger(lambda inputs: teacher_output(pipe, inputs))
        with following(pipe.transformer, lambda *_: None), moments.gathering():
            for _ in range(batches):
                trajectory.advance(teacher_output(pipe, trajectory.inputs()))
    found = Hessians(moments.means())
    found.made_of = {name: getattr(config, name) for name in INPUTS} | {"batches": batches}
    return found


def require_batches(batches: int) -> None:
    """Raises ValueError below 1."""
    if batches < 1:
        raise ValueError(f"batches={batches} must be at least 1")


class SecondMoments:
    """Sums of x xᵀ over all that these layers are given within `gathering()`."""

    def __init__(self, layers: dict[str, nn.Linear]) -> None:
        self.layers, self.counts = layers, dict.fromkeys(layers, 0)
        self.sums: dict[str, Tensor] = {}
        self.owners: dict[str, str] = {}  # the first layer that is given the same tensor
        self._last: tuple = None, 0, ""  # the tensor that was given last, its version, and its owner

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """Within the block every forward counts."""
        with ExitStack() as hooks:
            for name, layer in self.layers.items():
                hooks.callback(layer.register_forward_pre_hook(partial(self._gather, name)).remove)
            yield
        self._last = None, 0, ""

    def means(self) -> dict[str, Tensor]:
        """E x xᵀ by layer name, once; layers that are given one tensor share one. RuntimeError where a layer saw none."""
        unseen = [name for name, count in self.counts.items() if not count]
        if unseen:
            raise RuntimeError(f"{len(unseen)} of {len(self.layers)} layers saw no input, {unseen[0]} the first")
        means = {name: total.div_(self.counts[name]) for name, total in self.sums.items()}
        return {name: means[self.owners[name]] for name in self.layers}

    def _gather(self, name: str, layer: nn.Module, args: tuple) -> None:
        tensor, version, owner = self._last
        owner = owner if tensor is args[0] and version == args[0]._version else name
        if self.owners.setdefault(name, owner) != owner:
            raise RuntimeError(
                f"{name} shares its inputs with {self.owners[name]} in one batch, and with {owner} in another"
            )
        self._last = args[0], args[0]._version, owner
        x = args[0].detach().float().flatten(0, -2)  # [..., in] -> [rows, in]
        self.counts[name] += len(x)
        if owner == name:
            if name not in self.sums:
                self.sums[name] = x.new_zeros(x.shape[1], x.shape[1])
            with products_in("float32", x.device):  # whatever the model's own are
                self.sums[name].addmm_(x.T, x)
