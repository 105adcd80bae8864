"""A transformer as all stages see it: its blocks, their linears, in how many bits it multiplies; a layer put in another's place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from vqlib.kernels.products import DenseLinear, products_in

STREAMS = ("hidden_states", "encoder_hidden_states")  # what passes from block to block, where it goes by name


def unwrapped(transformer: nn.Module) -> nn.Module:
    """The model inside of wrappers that forward to it: `torch.compile`'s, data parallel's."""
    while True:
        inner = getattr(transformer, "_orig_mod", None) or getattr(transformer, "module", None)
        if not isinstance(inner, nn.Module):
            return transformer
        transformer = inner


def block_list(transformer: nn.Module) -> list[nn.Module]:
    """The transformer's blocks in forward order: the members of its module lists that hold linears. ValueError: there is none."""
    lists = [child for child in unwrapped(transformer).children() if isinstance(child, nn.ModuleList)]
    # Quantized layers are no nn.Linear any more, and have widths all the same.
    blocks = [b for members in lists for b in members if any(hasattr(m, "in_features") for m in b.modules())]
    if not blocks:
        raise ValueError(f"{type(unwrapped(transformer)).__name__} has no linear layer in a list of blocks")
    return blocks


def quantizable(transformer: nn.Module) -> dict[str, nn.Linear]:
    """Every linear inside the blocks by its dotted name: attention, MLP and adaLN modulation.

    DiT's timestep and label embedders, which diffusers keeps as a copy in every block (`norm1.emb`), are left out.
    """
    names = {module: name for name, module in unwrapped(transformer).named_modules()}
    found = {}
    for block in block_list(transformer):
        prefix = names[block]
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear) and not name.startswith("norm1.emb."):
                found[f"{prefix}.{name}"] = module
    return found


def input_dtype(transformer: nn.Module) -> torch.dtype:
    """What floating type its inputs have: that of the parameters outside of quantized layers, float32 where there are none."""
    dense = (m for m in transformer.modules() if not hasattr(m, "codebook"))  # codebooks are trained in float32
    parameters = (p for module in dense for p in module.parameters(recurse=False) if p.is_floating_point())
    return next((p.dtype for p in parameters), torch.float32)


def with_fast_products(transformer: nn.Module) -> nn.Module:
    """The transformer itself, its quantizable linears replaced by `DenseLinear`s of the same parameters."""
    for name, layer in quantizable(transformer).items():
        swap(transformer, name, DenseLinear.of(layer))
    return transformer


def swap(transformer: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the submodule called `name`, as in `transformer_blocks.3.attn1.to_q`."""
    parent, _, leaf = name.rpartition(".")
    owner = transformer.get_submodule(parent)
    owner.get_submodule(leaf)  # raises AttributeError where there is none
    owner._modules[leaf] = module


@contextmanager
def precision(products: str, *transformers: nn.Module) -> Iterator[None]:
    """Within the block the transformers' products are made as `kernels.products.products_in` says.

    With "bfloat16" what passes from block to block stays float32: rounded to 8 bits, its large channels alone would move a
    block's loss by a tenth.
    """

    def widen(block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        wide = {name: kwargs[name].float() for name in STREAMS if isinstance(kwargs.get(name), Tensor)}
        return (args[0].float(), *args[1:]) if args else (), kwargs | (wide if not args else {})

    with ExitStack() as stack:
        first = next(transformers[0].parameters(), torch.empty(0))  # a model without parameters computes on the CPU
        stack.enter_context(products_in(products, first.device))
        for transformer in transformers if products == "bfloat16" else ():
            stack.callback(block_list(transformer)[0].register_forward_pre_hook(widen, with_kwargs=True).remove)
        yield
