"""The full-precision model while the student follows it: one forward, and what its blocks took and gave."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vqlib.calibrator.trajectory import Inputs
from vqlib.models import structure
from vqlib.models.denoiser import Output
from vqlib.models.pipeline import Pipeline
from vqlib.quantizer.soft import soft_layers

Visit = Callable[[int, tuple, dict, Output], object]


@torch.no_grad()
def teacher_forward(pipe: Pipeline, inputs: Inputs) -> Tensor:
    """The full-precision model's output float32 [R, C or 2C, h, w] for a batch, without a graph, its blocks' hooks called."""
    return pipe.output(*inputs)


def teacher_output(pipe: Pipeline, inputs: Inputs) -> Tensor:
    """`teacher_forward`, looked at, which waits for the device: FloatingPointError where it is not finite."""
    output = teacher_forward(pipe, inputs)
    require_finite(pipe, bool(output.isfinite().all()))
    return output


def require_finite(pipe: Pipeline, finite: bool) -> None:
    """Raises FloatingPointError where the full-precision output was not finite."""
    if not finite:
        raise FloatingPointError(f"{pipe.name}: the full-precision model's output is not finite (NaN or infinity)")


@contextmanager
def following(transformer: nn.Module, visit: Visit) -> Iterator[None]:
    """Within the block `visit(index, args, kwargs, output)` is called after each of the transformer's blocks, in order.

    Compiled models run as they were written meanwhile, for a compiler leaves hooks out. Forwards of other threads, a
    sampler's beside a calibration, are none of this one's business. Raises RuntimeError on leaving where one of the blocks
    was not seen, or seen more often than the others: nothing goes on over blocks that were missed.
    """
    blocks = structure.block_list(transformer)
    seen, thread = [0] * len(blocks), threading.get_ident()

    def hook(index: int):
        def call(block: nn.Module, args: tuple, kwargs: dict, output: Output) -> None:
            if threading.get_ident() == thread:
                seen[index] += 1
                visit(index, args, kwargs, output)

        return call

    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for index, block in enumerate(blocks):
            stack.callback(block.register_forward_hook(hook(index), with_kwargs=True).remove)
        yield
    if min(seen) != max(seen) or not seen[0]:
        raise RuntimeError(
            f"{type(transformer).__name__}: its {len(blocks)} blocks were seen {seen} times; need each equally often"
        )


@contextmanager
def outputs_of(transformer: nn.Module, checkpointing: bool = False) -> Iterator[list[Output]]:
    """Within the block the outputs of the transformer's blocks are appended to the list, in order.

    checkpointing: blocks keep their inputs only, and run again when their gradients are asked for.
    """
    outputs: list[Output] = []
    with (
        _checkpointed(transformer) if checkpointing else nullcontext(),
        following(transformer, lambda index, args, kwargs, output: outputs.append(output)),
    ):
        yield outputs


@contextmanager
def _checkpointed(transformer: nn.Module) -> Iterator[None]:
    with ExitStack() as stack:
        for block in structure.block_list(transformer):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
            stack.callback(delattr, block, "forward")
        yield


def require_counterpart(teacher: nn.Module, student: nn.Module) -> None:
    """Raises ValueError where `student` was not made from a model like `teacher`, or lies on another device."""
    layers, quantized = soft_layers(student), structure.quantizable(teacher)
    for name in sorted(layers.keys() ^ quantized.keys()):
        has, lacks = ("student", "full-precision model") if name in layers else ("full-precision model", "student")
        if name in layers or not isinstance(student.get_submodule(name), nn.Linear):  # a layer left out is still there
            raise ValueError(f"the {has} has a layer {name}, which the {lacks} lacks: they are not the same model")
    for name, layer in layers.items():
        teacher_shape, shape = tuple(quantized[name].weight.shape), (layer.out_features, layer.in_features)
        if teacher_shape != shape:
            raise ValueError(
                f"{name} is {list(teacher_shape)} in the full-precision model, {list(shape)} in the student"
            )
    where = next(teacher.parameters()).device, next(student.parameters()).device
    if where[0] != where[1]:
        raise ValueError(f"the full-precision model is on {where[0]}, the student on {where[1]}: move one of them")
