"""Why assignments matter, measured: do the gradients that share a codeword agree, and which candidate wins.

A codeword's gradient is the sum of the gradients of all sub-vectors that share it; where those point different ways it
cannot follow them. Models are looked at, never changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

import pandas as pd
import torch
from torch import Tensor, nn

from vqlib.calibrator.hessians import require_batches
from vqlib.calibrator.losses import block_loss
from vqlib.calibrator.teacher import following, teacher_output
from vqlib.calibrator.trajectory import Trajectory
from vqlib.config import CalibrationConfig
from vqlib.models import pipeline, structure
from vqlib.models.denoiser import Output
from vqlib.packed.layer import VQLinear
from vqlib.quantizer.soft import CandidateLinear, soft_layers
from vqlib.quantizer.subvectors import split
from vqlib.system.memory import keep_freed_memory


def subvector_gradients(
    pipe: pipeline.Pipeline, model: nn.Module, config: CalibrationConfig | None = None, batches: int = 8
) -> dict[str, Tensor]:
    """dL_d/dŵ of every sub-vector (Eq. 8): layer -> [N, d], the mean over `batches` batches of the trajectory.

    `model` is soft or packed; every block gets the full-precision activations. `config` chooses the trajectory.
    """
    names = {module: name for name, module in quantized_layers(model).items()}
    total: dict[str, Tensor] = {}

    def add_gradients(index: int, student: nn.Module, args: tuple, kwargs: dict, output: Output) -> None:
        for name, gradient in _weight_gradients(student, names, args, kwargs, output).items():
            total[name] = total[name] + gradient if name in total else gradient

    _walk(pipe, model, config, batches, add_gradients)
    return {
        n: split(total[n] / batches, m.codebook.shape[1], n) for n, m in quantized_layers(model).items() if n in total
    }


def fresh_losses(
    pipe: pipeline.Pipeline, model: nn.Module, config: CalibrationConfig | None = None, batches: int = 8
) -> list[float]:
    """L_d of every block (Eq. 8), the mean over `batches` batches of a trajectory of the caller's choice.

    With a seed that calibration has not seen, and a packed model, this is what hardening and chance have left of a run.
    """
    seen: list[Tensor] = []  # batch by batch, a batch's blocks in their order

    def add_loss(index: int, student: nn.Module, args: tuple, kwargs: dict, output: Output) -> None:
        seen.append(block_loss(student(*args, **kwargs), output))

    _walk(pipe, model, config, batches, add_loss)
    losses, blocks = torch.stack(seen).tolist(), len(structure.block_list(model))  # the only wait of its own
    return [sum(loss / batches for loss in losses[index::blocks]) for index in range(blocks)]


def codeword_agreement(gradients: Tensor, assignments: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Mean cosine similarity of all pairs of gradients that share a codeword, and how many share it: -> [k], [k].

    gradients [N, d], assignments [N] in 0 … k − 1. With unit vectors u_i the mean over a group of m is
    (‖Σu‖² − m) / (m(m − 1)). Gradients of length 0 have no direction and are left out; below two the mean is NaN.
    """
    if gradients.shape[:1] != assignments.shape:
        raise ValueError(
            f"gradients {list(gradients.shape)} and assignments {list(assignments.shape)}: need [N, d], [N]"
        )
    wide = gradients.double()
    lengths = wide.norm(dim=1)
    directed = lengths > 0
    groups = assignments[directed].long()
    sums = torch.zeros(k, wide.shape[1], dtype=torch.float64, device=wide.device)
    sums.index_add_(0, groups, wide[directed] / lengths[directed, None])  # [N, d] -> [k, d]
    members = torch.bincount(groups, minlength=k)
    cosines = (sums.square().sum(dim=1) - members) / (members * (members - 1))
    return torch.where(members > 1, cosines, torch.nan), members


def agreement_frame(gradients: Mapping[str, Tensor], assignments: Mapping[str, Tensor], k: int) -> pd.DataFrame:
    """`codeword_agreement` of several layers: columns layer, codeword, members, cosine; only codewords with two or more."""
    frames = []
    for name, gradient in gradients.items():
        cosines, members = codeword_agreement(gradient, assignments[name], k)
        columns = {"layer": name, "codeword": range(k), "members": members.cpu(), "cosine": cosines.cpu()}
        frames.append(pd.DataFrame(columns).dropna())
    return pd.concat(frames, ignore_index=True)


def mean_agreement(agreement: pd.DataFrame) -> float:
    """The mean cosine of an `agreement_frame`, every codeword weighted by the sub-vectors that share it."""
    return float((agreement["cosine"] * agreement["members"]).sum() / agreement["members"].sum())


def assignments_of(model: nn.Module) -> dict[str, Tensor]:
    """Layer -> assignments A, int64 [N]; of a soft layer the candidate with the largest ratio."""
    return {name: layer.assignments() for name, layer in quantized_layers(model).items()}


def winner_positions(student: nn.Module) -> pd.DataFrame:
    """Position of the chosen candidate, 1 the first: columns layer, position, count, share of the layer's sub-vectors."""
    rows = []
    for name, layer in soft_layers(student).items():
        total, n = layer.candidates.shape
        counts = torch.bincount(layer.winners(), minlength=n).tolist()
        rows += [(name, position + 1, count, count / total) for position, count in enumerate(counts)]
    return pd.DataFrame(rows, columns=["layer", "position", "count", "share"])


def quantized_layers(model: nn.Module) -> dict[str, CandidateLinear | VQLinear]:
    """Every soft or packed layer of a model by its dotted name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, CandidateLinear | VQLinear)}


def _walk(pipe: pipeline.Pipeline, model: nn.Module, config: CalibrationConfig | None, batches: int, visit) -> None:
    """Along a full-precision trajectory: `visit(index, the model's block, args, kwargs, full-precision output)`."""
    require_batches(batches)
    keep_freed_memory()
    trajectory = Trajectory(pipe, config or CalibrationConfig())
    trajectory.stagger(lambda inputs: teacher_output(pipe, inputs))
    blocks = structure.block_list(model)

    def follow(index: int, args: tuple, kwargs: dict, output: Output) -> None:
        visit(index, blocks[index], args, kwargs, output)

    with following(pipe.transformer, follow):
        for _ in range(batches):
            trajectory.advance(teacher_output(pipe, trajectory.inputs()))


def _weight_gradients(
    student: nn.Module, names: Mapping[nn.Module, str], args: tuple, kwargs: dict, output: Output
) -> dict[str, Tensor]:
    """dL/dW of one block's quantized layers, name -> [out, in]: from their inputs and the gradients of their outputs."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}  # layer -> its input, and a zero added to its output
    with ExitStack() as hooks, torch.enable_grad():
        for layer in student.modules():
            if layer in names:
                hooks.callback(layer.register_forward_hook(_probe(names[layer], seen)).remove)
        loss = block_loss(student(*args, **kwargs), output)
    if not seen:  # a block that is left in full precision
        return {}
    grads = torch.autograd.grad(loss, [probe for _, probe in seen.values()])
    return {
        name: grad.flatten(0, -2).t() @ x.flatten(0, -2)  # [rows, out]ᵀ [rows, in] -> [out, in]
        for (name, (x, _)), grad in zip(seen.items(), grads, strict=True)
    }


def _probe(name: str, seen: dict[str, tuple[Tensor, Tensor]]):
    def hook(layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
        probe = torch.zeros_like(output, requires_grad=True)
        seen[name] = args[0].detach(), probe
        return output + probe

    return hook
