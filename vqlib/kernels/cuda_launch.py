"""Where every kernel of Triton's is launched: one grid, the tensors' own device, options that all share."""

from contextlib import nullcontext

import torch
import triton
from torch import Tensor

OPTIONS = {"enable_fp_fusion": True}  # multiply-add as in the twins on CUDA; Triton 3.10 no longer fuses unasked


def launch(
    kernel: triton.JITFunction,
    programs: int,
    *arguments: Tensor | int | float | None,
    layers: int = 1,
    **sizes: int | bool,
) -> None:
    """Start `programs` programs of a kernel for each of `layers` on the device of its first argument; nothing where there are none."""
    if programs:
        device = arguments[0].device  # Triton launches on the current one
        here = device.type != "cuda" or device.index == torch.cuda.current_device()
        with nullcontext() if here else torch.cuda.device(device):
            kernel[(programs, layers)](*arguments, **sizes, **OPTIONS)
