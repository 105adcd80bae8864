"""Sampling: respaced steps of the model's process, classifier-free guidance, one generator per image.

What differs from diffusers' pipelines: of a DiT the learned variance is used and the first 3 of the 4 latent channels are
guided, as the original does; images are truncated to uint8 instead of rounded, and every image draws all its noise from its own seed. x_0 is
never clipped: latents have no bounds, and `clip_sample` in a folder's scheduler, true where nobody asked, is not heeded.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager

import torch
from torch import Tensor

from vqlib.config import SamplingConfig
from vqlib.kernels.products import products_in
from vqlib.models import structure
from vqlib.models.pipeline import Pipeline
from vqlib.models.process import guide
from vqlib.system.memory import keep_freed_memory, sent
from vqlib.system.settings import as_integer, as_seed

# Matrix products of 1 … 3 rows take other kernels on the CPU, which round differently. From 4 rows on, an image of the
# models tried came out bit-equal whatever its neighbours, so a smaller batch is filled up to 4.
SMALLEST_FORWARD = 4
# Convolutions round differently for every batch size, so the VAE always decodes exactly this many latents at a time.
DECODED_AT_ONCE = 8

Preview = Callable[[int, Tensor], object]


class SamplingCancelled(RuntimeError):
    """A preview callback returned False; the message says how far sampling had come."""


def sample(
    pipe: Pipeline,
    class_labels: Iterable[int],
    seeds: Iterable[int],
    config: SamplingConfig | None = None,
    *,
    steps: int | None = None,
    guidance_scale: float | None = None,
    progress: bool = False,
    preview: Preview | None = None,
) -> Tensor:
    """One image per (label, seed), B of each: uint8 [B, C, H, W] on the CPU.

    `steps` and `guidance_scale` override the config. `preview(done, latents)` is called after each step with the number of
    steps done and x [b, C, h, w] of a batch; if it returns False, SamplingCancelled is raised. Other errors: see `sample_batches`.
    """
    options = {"steps": steps, "guidance_scale": guidance_scale, "progress": progress, "preview": preview}
    batches = sample_batches(pipe, class_labels, seeds, config, **options)
    return torch.cat(list(batches))  # [b, C, H, W] each -> [B, C, H, W]


def sample_batches(
    pipe: Pipeline,
    class_labels: Iterable[int],
    seeds: Iterable[int],
    config: SamplingConfig | None = None,
    *,
    steps: int | None = None,
    guidance_scale: float | None = None,
    progress: bool = False,
    preview: Preview | None = None,
) -> Iterator[Tensor]:
    """Yield uint8 [b, C, H, W] in order, b ≤ config.batch_size, holding one batch at a time.

    An image depends on its own label and seed only; to go on after n images, pass `class_labels[n:]` and `seeds[n:]`.
    `steps` and `guidance_scale` override the config. `preview(done, latents)` is called after each step with the
    number of steps done and x [b, C, h, w]; if it returns False, SamplingCancelled is raised.
    Raises FloatingPointError where latents or images are not finite, and ValueError, before anything is computed, on a seed
    that is no integer of 32 bits, on a label outside the classes, on counts that differ, on more steps
    than the model was trained with, on more guided channels than it has, and on a transformer in training mode.
    """
    config = config or SamplingConfig()
    changes = {"steps": steps, "guidance_scale": guidance_scale}
    config = config.replace(**{name: value for name, value in changes.items() if value is not None})
    labels = _integers("class label", class_labels, as_integer)
    seeds = _integers("seed", seeds, as_seed)
    _check(pipe, labels, seeds, config)
    sampler = _Sampler(pipe, config)
    return _batches(sampler, labels, seeds, progress, preview)


def to_uint8(images: Tensor) -> Tensor:
    """Images in −1 … 1 to 0 … 255, clamped, then truncated as the original does (not rounded)."""
    return (127.5 * images.float() + 128.0).clamp(0, 255).to(torch.uint8)


def finite(values: Tensor) -> Tensor:
    """Whether all of an image's values are finite, bool [b] for [b, …]."""
    return values.flatten(1).isfinite().all(dim=1)


def require_finite(good: Tensor, done: int, what: str, labels: list[int], seeds: list[int]) -> None:
    """Raises FloatingPointError, with the step that spoiled it, for the first image that was finite in fewer than `done`."""
    counts = good.tolist()  # what is not finite never becomes finite again
    if min(counts) < done:
        bad = counts.index(min(counts))
        what = what.format(min(counts) + 1)
        raise FloatingPointError(f"{what} are not finite (NaN or infinity): class {labels[bad]}, seed {seeds[bad]}")


class _Sampler:
    """What stays the same from batch to batch: the model, the respaced schedule, the settings."""

    def __init__(self, pipe: Pipeline, config: SamplingConfig) -> None:
        self.pipe, self.config = pipe, config
        parameter = next((p for p in pipe.transformer.parameters() if p.is_floating_point()), None)
        self.device = torch.device("cpu") if parameter is None else parameter.device
        schedule = pipe.schedule.respace(config.steps)
        self.timesteps, self.reverse = schedule.timesteps.to(self.device), schedule.reverse().to(self.device)
        self.guided = config.guided and pipe.denoiser.halves
        channels = pipe.latent_shape[0]
        self.channels = config.guidance_channels or pipe.denoiser.guided_channels(channels)
        if self.device.type == "cpu":
            keep_freed_memory()

    def latents(self, labels: list[int], seeds: list[int]) -> Iterator[tuple[int, Tensor]]:
        """Yield (steps done, x [b, C, h, w] float32) after each step, from pure noise to x_0."""
        count = len(labels)
        filler = max(0, SMALLEST_FORWARD - count)  # repeats the last image; dropped before anyone sees it
        label = sent(torch.tensor(labels + labels[-1:] * filler), self.device)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds + seeds[-1:] * filler]
        x = self.noise(generators)
        good = torch.zeros(len(label), dtype=torch.int32, device=self.device)  # steps after which an image was finite
        for done, index in enumerate(reversed(range(self.config.steps)), start=1):
            step = torch.full_like(label, index)
            output = self.output(x, label, index)
            noise = self.noise(generators) if self.reverse.noisy and index > 0 else None  # the last step adds none
            x = self.reverse.next(output, x, step, noise)
            good += finite(x)
            if self.device.type == "cpu" or index == 0:  # elsewhere a look at every step would wait for the device
                require_finite(good[:count], done, f"latents after step {{}} of {self.config.steps}", labels, seeds)
            yield done, x[:count]

    def noise(self, generators: list[torch.Generator]) -> Tensor:
        """N(0, 1) of shape [B, C, h, w], drawn on the CPU so that a seed means the same image on every device."""
        draws = [torch.randn(self.pipe.latent_shape, generator=generator) for generator in generators]
        return sent(torch.stack(draws), self.device)  # B × [C, h, w] -> [B, C, h, w]

    def output(self, x: Tensor, label: Tensor, index: int) -> Tensor:
        """The model's (guided) output at step `index`, float32 [B, C or 2C, h, w]; one forward of B or 2B."""
        if self.guided:
            x = torch.cat([x, x])  # [B, C, h, w] -> [2B, C, h, w]
            label = torch.cat([label, torch.full_like(label, self.pipe.null_class)])  # [B] -> [2B]
        timestep, scale = self.timesteps[index].repeat(len(label)), self.config.guidance_scale
        with structure.precision(self.config.products, self.pipe.transformer):
            output = self.pipe.output(x, timestep, label, scale)
        return guide(output, scale, self.channels) if self.guided else output

    def decode(self, latents: Tensor, labels: list[int], seeds: list[int]) -> Tensor:
        """Latents [b, C, h, w] to uint8 images [b, C', H, W] on the CPU."""
        images, done = [], 0
        for part in latents.split(DECODED_AT_ONCE):
            filled = torch.cat([part, part[-1:].expand(DECODED_AT_ONCE - len(part), *part.shape[1:])])
            with products_in("float32", self.device):
                decoded = self.pipe.decode(filled)[: len(part)]
            require_finite(finite(decoded).int(), 1, "decoded images", labels[done:], seeds[done:])
            images.append(to_uint8(decoded).cpu())
            done += len(part)
        return torch.cat(images)


def _batches(
    sampler: _Sampler, labels: list[int], seeds: list[int], progress: bool, preview: Preview | None
) -> Iterator[Tensor]:
    size, steps = sampler.config.batch_size, sampler.config.steps
    with _bar(len(labels), sampler.config, progress) as advance:
        for first in range(0, len(labels), size):
            chosen = slice(first, first + size)
            # Not a decorator: inference mode must not leak into the caller between two batches.
            with torch.inference_mode():
                for done, x in sampler.latents(labels[chosen], seeds[chosen]):
                    if preview is not None and preview(done, x) is False:
                        message = f"cancelled at step {done} of {steps}, after {first} of {len(labels)} images"
                        raise SamplingCancelled(message)
                    advance(len(x))
                images = sampler.decode(x, labels[chosen], seeds[chosen])
            yield images.clone()  # outside inference mode, so an ordinary tensor


@contextmanager
def _bar(count: int, config: SamplingConfig, progress: bool) -> Iterator[Callable[[int], object]]:
    """A progress bar over image steps that an interrupt closes, and a line that stays when it is gone."""
    if not progress:
        yield lambda images: None
        return
    from tqdm.auto import tqdm

    start = time.perf_counter()
    with tqdm(total=count * config.steps, unit="image step", unit_scale=True, leave=False) as bar:
        yield bar.update
    seconds = time.perf_counter() - start
    settings = f"{config.steps} steps, guidance {config.guidance_scale:g}"
    print(f"{count} images ({settings}) in {seconds:.1f} s, {count / seconds:.2f} images/s")


def _integers(what: str, values: Iterable[int], check: Callable[[str, object], int]) -> list[int]:
    try:
        given = None if isinstance(values, (Mapping, Set)) else list(values)
    except TypeError:
        given = None
    if given is None:
        raise ValueError(f"{what}s {values!r} are no sequence: give one of each image, in order")
    return [check(f"{what} of image {i}", value) for i, value in enumerate(given)]


def require_fitting(pipe: Pipeline, config: SamplingConfig) -> None:
    """ValueError for steps that the model's process has not, and for more guided channels than the latents have."""
    pipe.schedule.respace(config.steps)
    channels = pipe.latent_shape[0]
    if (config.guidance_channels or 0) > channels:
        raise ValueError(f"guidance_channels={config.guidance_channels} but the latents have {channels} channels")


def _check(pipe: Pipeline, labels: list[int], seeds: list[int], config: SamplingConfig) -> None:
    if len(labels) != len(seeds):
        raise ValueError(f"{len(labels)} class labels but {len(seeds)} seeds; give one of each per image")
    twins = len(labels) - len(set(zip(labels, seeds, strict=True)))
    if twins:
        warnings.warn(f"{twins} of {len(labels)} images have class and seed of another: the same picture", stacklevel=3)
    if not labels:
        raise ValueError("0 class labels and 0 seeds: there is nothing to sample")
    classes = len(pipe.class_names)
    for position, label in enumerate(labels):
        if not 0 <= label < classes:
            known = f"0 … {classes - 1}, the model's classes"
            raise ValueError(f"class label {label} (image {position}) is outside {known}")
    require_fitting(pipe, config)
    if pipe.transformer.training:
        raise ValueError("the transformer is in training mode, which drops class labels at random; call .eval() first")
