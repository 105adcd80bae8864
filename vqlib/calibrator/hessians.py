"""What the layers' inputs look like, without data: second moments along the full-precision model's own trajectory."""

from __future__ import annotations

from contextlib import ExitStack

from torch import Tensor

from vqlib.calibrator.teacher import following, teacher_output
from vqlib.calibrator.trajectory import Trajectory
from vqlib.config import CalibrationConfig
from vqlib.kernels.products import products_in
from vqlib.models import dit
from vqlib.models.pipeline import Pipeline

BATCHES = (
    64  # calibration steps; adaLN sees one row an image, 2048 at batch 16 with guidance, for DiT-XL/2's 1152 inputs
)


def input_hessians(
    pipe: Pipeline, config: CalibrationConfig | None = None, batches: int = BATCHES
) -> dict[str, Tensor]:
    """H = E x xᵀ of every quantizable layer's inputs x, float32 [in, in] by layer name.

    The inputs are those of `batches` calibration steps of `config`: the same trajectories, labels and guidance halves.
    ‖(W − Ŵ) x‖² averaged over them is tr((W − Ŵ) H (W − Ŵ)ᵀ). Layers that are given one tensor, as q, k and v are, share theirs.
    """
    if batches < 1:
        raise ValueError(f"batches={batches} must be at least 1")
    layers = dit.quantizable(pipe.transformer)
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(layers, 0)
    owners: dict[str, str] = {}  # the first layer that is given the same tensor
    last: tuple = None, 0, ""  # the tensor that was given last, its version, and its owner

    def gather(name: str):
        def hook(layer, args):
            nonlocal last
            unchanged = last[0] is args[0] and last[1] == args[0]._version
            owner = last[2] if unchanged else name
            if owners.setdefault(name, owner) != owner:
                raise RuntimeError(
                    f"{name} shares its inputs with {owners[name]} in one batch, and with {owner} in another"
                )
            last = args[0], args[0]._version, owner
            x = args[0].detach().float().flatten(0, -2)  # [..., in] -> [rows, in]
            counts[name] += len(x)
            if owner == name:
                if name not in sums:
                    sums[name] = x.new_zeros(x.shape[1], x.shape[1])
                with products_in("float32", x.device):  # whatever the model's own are
                    sums[name].addmm_(x.T, x)

        return hook

    config = config or CalibrationConfig()
    trajectory = Trajectory(pipe, config)
    with dit.precision(config.products, pipe.transformer), ExitStack() as hooks:
        trajectory.stagger(lambda inputs: teacher_output(pipe, inputs))
        hooks.enter_context(following(pipe.transformer, lambda *_: None))
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_pre_hook(gather(name)).remove)
        for _ in range(batches):
            trajectory.advance(teacher_output(pipe, trajectory.inputs()))
    unseen = [name for name, count in counts.items() if not count]
    if unseen:
        raise RuntimeError(
            f"{len(unseen)} of {len(layers)} layers saw no input in {batches} batches, {unseen[0]} the first"
        )
    means = {name: total.div_(counts[name]) for name, total in sums.items()}
    return {name: means[owners[name]] for name in layers}
