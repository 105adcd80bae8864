"""k-means over the sub-vectors of a layer: distinct start, Lloyd iterations, repair, early stop -> Codebook."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from vqlib import kernels
from vqlib.quantizer.lloyd import fill_empty, lloyd
from vqlib.system.memory import sent

STARTS = ("distinct", "kmeans++", "random")
_LARGE = 300_000  # sub-vectors from which the first iterations see a sample only …
_SAMPLE = 512  # … of as many points per codeword: no higher error, in 3/4 of the time


@dataclass(frozen=True)
class Codebook:
    """Codewords of one layer and the nearest one of every sub-vector (Eq. 1-4)."""

    codewords: Tensor  # [k, d] float32
    assignments: Tensor  # [N] int64
    mse: float  # mean squared error per weight
    history: tuple[float, ...] = ()  # mse of every pass over all sub-vectors, the last one equal to `mse`


def fit_codebook(
    x: Tensor,
    k: int,
    seed: int = 0,
    iterations: int = 100,
    tolerance: float = 1e-4,
    start: str = "distinct",
    subsample: int | None = None,
    name: str = "",
) -> Codebook:
    """Codebook with the least Σ‖x − c(a)‖² that Lloyd's iterations find from a seeded start.

    x [N, d] floating point. Stops early when a pass lowers the error by less than `tolerance`, relative. With
    `subsample` points per codeword the iterations first run on that many random points, then on all; by default 512 for
    300,000 points or more. No codeword is left empty, unless there are fewer
    distinct sub-vectors than k: they are then the codewords, the last repeated, and the error is 0. ValueError for fewer
    sub-vectors than k and for values that are not finite; `name` is the layer in the message.
    """
    options = {"seed": seed, "iterations": iterations, "tolerance": tolerance, "start": start, "subsample": subsample}
    return fit_codebooks({name: x}, k, **options)[name]


def fit_codebooks(
    layers: Mapping[str, Tensor],
    k: int,
    seed: int = 0,
    iterations: int = 100,
    tolerance: float = 1e-4,
    start: str = "distinct",
    subsample: int | None = None,
) -> dict[str, Codebook]:
    """`fit_codebook` of layers of one shape by name, each [N, d], together: what each would give alone, bit for bit.

    They are copied side by side; a pass over all of them is one launch and one wait for the device.
    """
    names, parts = list(layers), _checked(layers, k)
    if start not in STARTS:
        raise ValueError(f"start {start!r} is not one of {', '.join(STARTS)}")
    if iterations < 1:
        raise ValueError(f"iterations={iterations} must be at least 1")
    count, device = len(parts[0]), parts[0].device
    draws = _draws(count, k, _SAMPLE if subsample is None and count >= _LARGE else subsample, seed)
    first = sent(draws.first, device)
    looked_at = torch.stack([x[first] for x in parts]).cpu()  # [L, first, d]
    found, starts = {}, {}
    for name, x, rows in zip(names, parts, looked_at, strict=True):
        generator = torch.Generator()
        generator.set_state(draws.state)
        distinct = _distinct_rows(x, rows, k, generator)
        if len(distinct) < k:
            found[name] = _exact(x, k)
        else:
            starts[name] = x, _start(x, draws.sample, distinct, k, start, generator)
    if starts:
        points, codewords = zip(*starts.values(), strict=True)
        books = _fit(_side_by_side(points), draws.sample, list(codewords), iterations, tolerance)
        found |= dict(zip(starts, books, strict=True))
    return {name: found[name] for name in names}


def _fit(
    x: Tensor, sample: Tensor | None, codewords: list[Tensor], iterations: int, tolerance: float
) -> list[Codebook]:
    """The codebooks of layers x [L, N, d] from the starts [k, d]: on the sample first, then on all points."""
    if sample is not None:  # cheap passes, so run them out
        minima = lloyd(x.index_select(1, sent(sample, x.device)), codewords, iterations, 0.1 * tolerance)
        codewords = [minimum.codewords for minimum in minima]
    minima = lloyd(x, codewords, iterations, tolerance)
    codewords = sent(torch.stack([minimum.codewords for minimum in minima]), x.device)
    assignments, books = kernels.assign(x, codewords), []
    for points, own, codes, minimum in zip(x, codewords, assignments, minima, strict=True):
        own, history = own.clone(), minimum.history  # not a view: it is kept and stored
        if not bool((minimum.sums.counts > 0).all()):
            own, codes = fill_empty(points, own, codes)
            history.append((points.double() - own[codes]).square().mean().item())
        books.append(Codebook(own, codes, history[-1], tuple(history)))
    return books


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Layers [N, d] as one tensor [L, N, d], a view where it is one layer."""
    return parts[0][None] if len(parts) == 1 else torch.stack(parts)


def _label(name: str) -> str:
    return f" ({name})" if name else ""


def _checked(layers: Mapping[str, Tensor], k: int) -> list[Tensor]:
    """The layers as float32. ValueError, with the layer's name, for one that has no codebook, or another shape than the first."""
    shapes = [x.shape for x in layers.values()]
    for name, x in layers.items():
        if x.dim() != 2 or not x.is_floating_point():
            raise ValueError(f"sub-vectors must be floating point [N, d], not {x.dtype} {list(x.shape)}{_label(name)}")
        if not 1 <= k <= len(x):
            raise ValueError(f"{len(x)} sub-vectors are fewer than k={k} codewords{_label(name)}")
        if x.shape != shapes[0]:
            raise ValueError(
                f"sub-vectors {list(x.shape)} are not {list(shapes[0])}, as the first layer's{_label(name)}"
            )
    counts = torch.stack([(~torch.isfinite(x)).sum() for x in layers.values()]).tolist()
    for (name, x), bad in zip(layers.items(), counts, strict=True):
        if bad:
            raise ValueError(f"{bad} of {x.numel()} weights are not finite{_label(name)}")
    return [x.detach().float().contiguous() for x in layers.values()]


class _Draws(NamedTuple):
    """What chance decides for every layer of N sub-vectors: rows of the sample, None for all of them; rows to start with."""

    sample: Tensor | None
    first: Tensor
    state: Tensor  # of the generator after these draws


@lru_cache(8)
def _draws(count: int, k: int, per_codeword: int | None, seed: int) -> _Draws:
    """The shapes of a model's layers are few, and a permutation of a million rows takes longer than a pass of a GPU over them."""
    generator, sample = torch.Generator().manual_seed(seed), None
    if per_codeword is not None and per_codeword * k < count:
        sample = torch.randperm(count, generator=generator)[: max(1, per_codeword) * k].sort().values
    first = torch.randperm(count, generator=generator)[: 4 * k].clone()
    return _Draws(sample, first, generator.get_state())


def _distinct_rows(x: Tensor, first: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k different rows of x in random order, on the CPU, fewer where there are no more; looks at all only where the `first` do not do."""
    rows = torch.unique(first, dim=0)
    if len(rows) < k and len(first) < len(x):
        rows = torch.unique(x, dim=0).cpu()
    return rows if len(rows) < k else rows[torch.randperm(len(rows), generator=generator)[:k]]


def _exact(x: Tensor, k: int) -> Codebook:
    """The codebook of fewer than k distinct sub-vectors, a constant layer's for example: itself, without error."""
    rows, assignments = torch.unique(x, dim=0, return_inverse=True)
    places = torch.arange(k, device=x.device).clamp_max(len(rows) - 1)
    return Codebook(rows[places], assignments, 0.0, (0.0,))


def _plus_plus(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k-means++: each next codeword is a point drawn with probability proportional to its squared distance."""
    first = int(torch.randint(len(x), (1,), generator=generator))
    codewords = [x[first]]
    distance = (x - codewords[0]).square().sum(dim=1)
    for _ in range(k - 1):
        cumulative = distance.double().cumsum(0)
        draw = torch.rand((), generator=generator, dtype=torch.float64).item() * cumulative[-1]
        place = int(torch.searchsorted(cumulative, draw, right=True).clamp_(max=len(x) - 1))
        codewords.append(x[place])
        distance = torch.minimum(distance, (x - x[place]).square().sum(dim=1))
    return torch.stack(codewords)


def _start(
    x: Tensor, sample: Tensor | None, distinct: Tensor, k: int, start: str, generator: torch.Generator
) -> Tensor:
    """Codewords to start with, from the sample of x where there is one: [k, d]."""
    if start == "distinct":
        return distinct
    x = x if sample is None else x[sent(sample, x.device)]
    if start == "kmeans++":
        return _plus_plus(x, k, generator)
    return x[torch.randint(len(x), (k,), generator=generator).to(x.device)]  # with replacement: some may start equal
