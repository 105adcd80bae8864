"""One layer at a time: its sub-vectors, the codewords that stand for them, how often each is used, and the error."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from vqlib.calibrator.diagnostics import quantized_layers
from vqlib.explore.view import Control, Picture, Settings, Task, View
from vqlib.figures import codewords_plot
from vqlib.models.structure import quantizable
from vqlib.packed.harden import harden_layer
from vqlib.quantizer.soft import CandidateLinear
from vqlib.quantizer.subvectors import split


class CodebookView(View):
    """Sliders over the layers of a quantized transformer and the planes of its sub-vectors: a cloud, codewords as circles as
    large as their use, and the sorted use.

    transformer: full precision, with the weights [out, in]; quantized: packed, or a student being calibrated, which is
    shown as it would be packed. layer: the first to be shown. Raises ValueError where no layer is quantized or d = 1.
    """

    name = "codebook"

    def __init__(
        self, transformer: nn.Module, quantized: nn.Module, layer: str | None = None, out: str | Path = "figures"
    ) -> None:
        self.layers = quantized_layers(quantized)
        if not self.layers:
            raise ValueError(f"{type(quantized).__name__} has no quantized layer")
        self.weights = {name: linear.weight for name, linear in quantizable(transformer).items() if name in self.layers}
        dims = min(m.codebook.shape[1] for m in self.layers.values())
        if dims < 2:
            raise ValueError(f"sub-vectors of length d={dims} have no plane to show; d must be at least 2")
        planes = tuple(f"{a}, {b}" for a in range(1, dims + 1) for b in range(a + 1, dims + 1))
        names = tuple(self.layers)
        controls = [
            Control("layer", "layer", names, layer or names[0]),
            Control("plane", "inputs", planes, planes[0], tip="which two of the sub-vector's inputs are the axes"),
        ]
        super().__init__(controls, out)

    def _key(self, settings: Settings) -> tuple:
        known = super()._key(settings)
        soft = isinstance(self.layers[settings["layer"]], CandidateLinear)
        return (*known, object()) if soft else known  # a student may be in training: its pictures are not found again

    def prepare(self, settings: Settings, task: Task) -> dict[str, Any]:
        """Sub-vectors [N, d], codewords [k, d], use [k] and the relative squared error of a layer."""
        name = settings["layer"]
        layer = self.layers[name]
        packed = harden_layer(layer, name) if isinstance(layer, CandidateLinear) else layer
        weight = self.weights[name].detach().float().cpu()
        codewords = (packed.codebook.float() * packed.scale).cpu()
        x = split(weight, codewords.shape[1], name)  # [out, in] -> [N, d]
        assignments = packed.assignments().cpu()
        error = (x - codewords[assignments]).pow(2).sum() / x.pow(2).sum()
        counts = torch.bincount(assignments, minlength=len(codewords))
        return {"x": x, "codewords": codewords, "counts": counts, "error": error.item()}

    def picture(self, settings: Settings, prepared: dict[str, Any]) -> Picture:
        """The plane asked for, with the layer's error above it."""
        codewords, counts = prepared["codewords"], prepared["counts"]
        k, d = codewords.shape
        name, count = settings["layer"], len(prepared["x"])
        share = counts[counts > 0] / count
        entropy = -(share * share.log2()).sum().item()  # bits that a code carries
        unused = int((counts == 0).sum())
        title = f"{name}: error {prepared['error']:.1%}"
        caption = (
            f"{title} · {count} sub-vectors, k={k}, d={d} · {unused} codewords unused · "
            f"codes carry {entropy:.2f} of {math.log2(k):.0f} bits"
        )
        data = pd.DataFrame(codewords.numpy(), columns=[f"w{i + 1}" for i in range(d)]).assign(count=counts.numpy())
        row = {"layer": name, "N": count, "k": k, "d": d, "error": prepared["error"]}
        row |= {"unused": unused, "bits of a code": entropy}
        draw = partial(_draw, prepared["x"], codewords, counts, settings["plane"], title)
        return Picture(draw, caption, data, pd.DataFrame([row]))


def _draw(x: Tensor, codewords: Tensor, counts: Tensor, plane: str, title: str, titled: bool) -> Figure:
    axes = [int(i) - 1 for i in plane.split(", ")]
    names = [f"input {i + 1}" for i in axes]  # no subscripts: they would print smaller than 6 pt
    return codewords_plot(x[:, axes], codewords[:, axes], counts, title if titled else None, names)
