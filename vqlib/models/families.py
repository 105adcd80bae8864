"""Which adapter a transformer is driven by. A new family is a file beside this one with a `Denoiser`, and a line here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
from torch import nn

from vqlib.models import flux, pixart, sd3
from vqlib.models.class_conditional import DiT, SiT
from vqlib.models.denoiser import Denoiser
from vqlib.models.prompts import Prompts

Encode = Callable[[Any, Sequence[str]], Prompts]


@dataclass(frozen=True)
class Family:
    """How a transformer of one class in diffusers is driven."""

    denoiser: Callable[..., Denoiser]  # of nothing or, where there are prompts, of them
    encode: Encode | None = None  # prompts by the text encoders of its diffusers pipeline; None: conditions are classes
    ends_at_minimum: bool = False  # see `schedulers.process_of`


DIT, SIT = Family(DiT), Family(SiT)
FAMILIES = {
    "DiTTransformer2DModel": DIT,  # with a flow's scheduler SIT
    "PixArtTransformer2DModel": Family(pixart.PixArt, pixart.encode),
    "SD3Transformer2DModel": Family(sd3.SD3, sd3.encode, ends_at_minimum=True),
    "FluxTransformer2DModel": Family(flux.Flux, flux.encode),
}
LEGACY = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}


def class_name(source: str, config: dict) -> str:
    """The class a transformer's config.json means; diffusers' older `Transformer2DModel` by its norm_type is one of several."""
    kind = config.get("_class_name", "DiTTransformer2DModel")
    if kind != "Transformer2DModel":
        return kind
    norm = config.get("norm_type", "layer_norm")
    if norm not in LEGACY:
        raise ValueError(f"{source}: norm_type {norm!r} is not supported, only {', '.join(map(repr, LEGACY))}")
    return LEGACY[norm]


def family_of(source: str, kind: str, flow: bool = False) -> Family:
    """The family of a transformer's class. ValueError, naming the class and where an adapter goes, for one that is not known."""
    if kind not in FAMILIES:
        raise ValueError(
            f"{source}: no adapter knows a {kind}, only {', '.join(FAMILIES)}. Write a vqlib.Denoiser for it and give it to "
            "vqlib.Pipeline(…, denoiser=…), as the README shows; an adapter for everybody is a file in vqlib/models/ with a "
            "line in families.py"
        )
    return SIT if flow and FAMILIES[kind] is DIT else FAMILIES[kind]


def model_class(kind: str) -> type[nn.Module]:
    """diffusers' class of that name."""
    return getattr(diffusers, kind)


def denoiser_for(source: str, transformer: nn.Module, flow: bool) -> Denoiser:
    """The adapter of a class-conditional transformer; one that takes prompts is made with them."""
    config = getattr(transformer, "config", None)
    if config is None:
        raise ValueError(
            f"{source}: a {type(transformer).__name__} has no config, and no denoiser= is given that knows it"
        )
    known = [name for name in (type(transformer).__name__, getattr(config, "_class_name", None)) if name in FAMILIES]
    family = family_of(source, known[0] if known else type(transformer).__name__, flow)
    if family.encode is not None:
        raise ValueError(
            f"{source}: a {type(transformer).__name__} takes prompts: give denoiser={family.denoiser.__name__}(…)"
        )
    return family.denoiser()
