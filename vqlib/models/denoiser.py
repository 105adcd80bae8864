"""What calibration and sampling need to know of a family of transformers, and how the outputs of its blocks are compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

Output = Tensor | tuple[Tensor | None, ...]  # of a block: one stream [R, tokens, channels], or several


class Denoiser:
    """A family of transformers; a subclass overrides `forward` and whatever else differs.

    A condition is a number: a class's, or a prompt's place in a list; the number behind the last one stands for "none", the
    unconditional half of classifier-free guidance. Blocks are the members of the transformer's module lists, in their order.
    """

    streams: tuple[str, ...] = ("hidden_states",)  # arguments of the next block that a block's outputs become, in order
    halves = True  # whether guidance takes an unconditional half; False: the scale is the model's own input, or none is

    def latent_shape(self, transformer: nn.Module) -> tuple[int, int, int]:
        """(channels, height, width) of one latent; unless overridden what a diffusers config says of it."""
        config = transformer.config
        return config.in_channels, config.sample_size, config.sample_size

    def forward(
        self, transformer: nn.Module, x: Tensor, timestep: Tensor, labels: Tensor, guidance_scale: float
    ) -> Tensor:
        """The output [R, C or 2C, h, w] that the process steps by, for latents [R, C, h, w], model times [R], conditions [R]."""
        raise NotImplementedError

    def guided_channels(self, channels: int) -> int:
        """How many of the latents' channels are guided where nothing else is asked for."""
        return channels

    def require_fitting(self, name: str, transformer: nn.Module, conditions: int) -> None:
        """Raises ValueError where the transformer does not belong to this family, or to so many conditions."""

    def identity(self) -> dict[str, Any]:
        """What outputs depend on besides the transformer, JSON-safe; a class with settings or prompts overrides it."""
        return {}


def compared(output: Output) -> Tensor:
    """What of a block's output a loss sees: a tensor as it is, several streams as [R, all their values]."""
    if isinstance(output, Tensor):
        return output
    return torch.cat([stream.flatten(1) for stream in output if stream is not None], dim=1)


def detached(output: Output) -> Output:
    """The output without its graph."""
    if isinstance(output, Tensor):
        return output.detach()
    return tuple(None if stream is None else stream.detach() for stream in output)


def handed_on(output: Output, streams: tuple[str, ...], args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """A block's arguments with the output of the block before in the place of its streams.

    A stream is found by its name or, where one alone is given without a name, in the first place.
    """
    outputs = (output,) if isinstance(output, Tensor) else output
    named = {name: value for name, value in zip(streams, outputs, strict=True) if name in kwargs}
    if len(named) == len(outputs):
        return args, kwargs | named
    if len(outputs) > 1 or not args:
        raise ValueError(f"streams {streams} are not all among a block's named arguments {tuple(kwargs)}")
    return (outputs[0], *args[1:]), kwargs
