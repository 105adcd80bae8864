"""Images of a quantized model beside full precision: same seeds, any bits, timesteps, guidance and class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from cachetools import LRUCache
from matplotlib.figure import Figure
from torch import Tensor, nn

from vqlib.config import SamplingConfig, VQConfig
from vqlib.explore.view import Control, Picture, Settings, Task, View
from vqlib.figures.grids import difference_map
from vqlib.models.pipeline import Pipeline
from vqlib.models.sampling import SamplingCancelled, sample, to_uint8
from vqlib.packed.checkpoint import size_report
from vqlib.packed.harden import harden
from vqlib.packed.layer import VQLinear
from vqlib.quantizer.quantize import quantize

FULL = "full precision"
EVERY = "every class"
STEPS = (5, 10, 20, 50, 100, 250)
GUIDANCE = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)
SEEDS = 100  # how many first seeds the slider offers
ROWS = 64  # rows of images kept
MODELS = 4  # transformers kept, beside those that were given as such

Source = nn.Module | Callable[[], nn.Module]
Models = Mapping[str, Source | Mapping[float, Source]]


def images(
    pipe: Pipeline,
    models: Models | None = None,
    count: int = 8,
    bits: float | None = None,
    steps: int = 20,
    guidance_scale: float = 1.5,
    out: str | Path = "figures",
) -> ImageView:
    """Sliders for bits, timesteps, guidance, seed and class over `count` images of a quantized model and of `pipe`.

    models: method -> transformer, or method -> {bits: transformer}. A function in place of a transformer is called in
    the background when its turn comes, and the `MODELS` used last are kept. Without `models`: k-means at 2, 3 and 4 bits.
    bits, steps, guidance_scale: where the sliders stand at first. Exported files go to `out`.
    Raises ValueError where `models` is empty or a value is none of the slider's.
    """
    if models is None:
        models = {"k-means": {b: partial(_kmeans, pipe, b) for b in (2, 3, 4)}}
    return ImageView(pipe, models, count, bits, steps, guidance_scale, out)


def _kmeans(pipe: Pipeline, bits: float) -> nn.Module:
    return harden(quantize(pipe.transformer, VQConfig(bits=bits, candidates=1)))


class ImageView(View):
    """Three rows: full precision, the quantized model, and where they differ."""

    name = "images"

    def __init__(
        self,
        pipe: Pipeline,
        models: Models,
        count: int,
        bits: float | None,
        steps: int,
        guidance_scale: float,
        out: str | Path,
    ) -> None:
        if not models:
            raise ValueError("no models to show; give {method: transformer}")
        self.pipe, self.count = pipe, count
        self.models = {name: dict(part) if isinstance(part, Mapping) else {None: part} for name, part in models.items()}
        self._loaded, self._rows = LRUCache(MODELS), LRUCache(ROWS)  # used by one computation at a time
        super().__init__(self._controls(bits, steps, guidance_scale), out)
        self.settings = self.normalized(self.settings)

    def _controls(self, bits: float | None, steps: int, guidance_scale: float) -> list[Control]:
        method = next(iter(self.models))
        all_bits = sorted({b for part in self.models.values() for b in part if b is not None})
        controls = [Control("method", "method", tuple(self.models), method, ordered=False)]
        if all_bits:
            own = [b for b in self.models[method] if b is not None]
            first = min(own, default=all_bits[0]) if bits is None else bits
            controls.append(Control("bits", "bits", (*all_bits, FULL), first, tip="of a weight in the blocks"))
        last = len(self.pipe.schedule.timesteps)
        offered = tuple(sorted({s for s in STEPS if s <= last} | {steps}))
        controls.append(Control("steps", "timesteps", offered, steps, tip="steps from noise to image"))
        scales = tuple(sorted({*GUIDANCE, guidance_scale}))
        controls.append(Control("guidance_scale", "CFG", scales, guidance_scale, tip="classifier-free guidance scale"))
        controls.append(Control("seed", "first seed", tuple(range(SEEDS)), 0, tip="image i has this seed plus i"))
        names = (EVERY, *self.pipe.class_names)
        controls.append(Control("subject", "class", names, EVERY, ordered=False))
        return controls

    def normalized(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Bits that the method does not have become the nearest it has."""
        own = [b for b in self.models[settings["method"]] if b is not None]
        bits = settings.get("bits")
        if own and bits != FULL and bits not in own:
            settings = {**settings, "bits": min(own, key=lambda b: abs(b - bits))}
        return settings

    def prepare(self, settings: Settings, task: Task) -> tuple[Tensor, Tensor, nn.Module]:
        """Both rows of images, uint8 [B, C, H, W], and the quantized transformer."""
        reference = self._row(FULL, self.pipe.transformer, settings, task, None)
        label = self._label(settings)
        if settings.get("bits") == FULL:
            return reference, reference, self.pipe.transformer
        blank = torch.full_like(reference, 255)
        task.preview(partial(self._grid, reference, blank, settings, None), f"{label}: making the model …")
        model = self._model(settings, task)
        return reference, self._row(label, model, settings, task, reference), model

    def picture(self, settings: Settings, prepared: Any) -> Picture:
        """The rows with the model's size and the mean difference above them."""
        reference, other, model = prepared
        gaps = (reference.float() - other.float()).abs().mean(dim=(1, 2, 3))  # [B, C, H, W] -> [B]
        label, size = self._label(settings), self._size(model)
        size = f"{label}: {size}" if model is self.pipe.transformer else f"{label}: {size} ({FULL} {self._size()})"
        labels, seeds = self._conditions(settings)
        data = pd.DataFrame(
            {
                "class": [self.pipe.class_names[i] for i in labels],
                "seed": seeds,
                "method": label,
                "steps": settings["steps"],
                "CFG": settings["guidance_scale"],
                "mean_difference": gaps.tolist(),
            }
        )
        how = f"{settings['steps']} timesteps, CFG {settings['guidance_scale']:g}, seeds {seeds[0]} … {seeds[-1]}"
        caption = f"{size} · mean difference {gaps.mean():.1f} of 255 · {how}"
        return Picture(partial(self._grid, reference, other, settings, size), caption, data)

    def _row(self, label: str, model: nn.Module, settings: Settings, task: Task, reference: Tensor | None) -> Tensor:
        """Images of one model, uint8 [B, C, H, W], from memory if they were made before."""
        labels, seeds = self._conditions(settings)
        config = SamplingConfig(settings["steps"], settings["guidance_scale"], batch_size=self.count)
        key = reference is None, label, config, tuple(labels), tuple(seeds)
        if key in self._rows:
            return self._rows[key]

        def follow(done: int, latents: Tensor) -> bool:
            if task.preview_due and done < config.steps:
                so_far = to_uint8(self.pipe.decode(latents)).cpu()
                rows = (so_far, torch.full_like(so_far, 255)) if reference is None else (reference, so_far)
                text = f"{label}: step {done} of {config.steps} …"
                task.preview(partial(self._grid, *rows, settings, None), text)
            return not task.cancelled

        pipe = self.pipe.with_transformer(model)
        return self._rows.setdefault(key, sample(pipe, labels, seeds, config, preview=follow))

    def _model(self, settings: Settings, task: Task) -> nn.Module:
        """The quantized transformer; a function is called for it here, on the background thread."""
        method = settings["method"]
        part = self.models[method]
        bits = None if None in part else settings["bits"]
        source = part[bits]
        if isinstance(source, nn.Module):
            return source
        if (method, bits) not in self._loaded:
            if task.cancelled:
                raise SamplingCancelled("cancelled before the model was made")
            task.say(f"{self._label(settings)}: making the model …")
            self._loaded[method, bits] = source()
        return self._loaded[method, bits]

    def _conditions(self, settings: Settings) -> tuple[list[int], list[int]]:
        """Class labels and seeds of all images."""
        names = self.pipe.class_names
        subject = settings["subject"]
        labels = [i % len(names) if subject == EVERY else names.index(subject) for i in range(self.count)]
        return labels, list(range(settings["seed"], settings["seed"] + self.count))

    def _label(self, settings: Settings) -> str:
        bits = settings.get("bits")
        if bits == FULL:
            return FULL
        return settings["method"] if None in self.models[settings["method"]] else f"{settings['method']}, {bits:g} bits"

    def _size(self, model: nn.Module | None = None) -> str:
        """Bits a weight and size: of a packed model as its file, else as it is in memory."""
        model = model or self.pipe.transformer
        if any(isinstance(module, VQLinear) for module in model.modules()):
            known = size_report(model).attrs
            return f"{known['bits_per_weight']:.2f} bits a weight, {known['tensor_bytes'] / 2**20:.2f} MiB"
        tensors = [p for p in model.parameters() if p.is_floating_point()]
        bits = 8 * max((p.element_size() for p in tensors), default=0)
        size = sum(p.numel() * p.element_size() for p in tensors)
        return f"{bits} bits, {size / 2**20:.1f} MiB in memory"

    def _grid(
        self, reference: Tensor, other: Tensor, settings: Settings, title: str | None, titled: bool = False
    ) -> Figure:
        labels, _ = self._conditions(settings)
        names: Sequence[str] = [self.pipe.class_names[i] for i in labels]
        label = self._label(settings)
        rows = (FULL, label if label != FULL else f"{FULL} again")
        return difference_map(reference, other, rows, names, title if titled else None)
