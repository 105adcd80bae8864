"""k-means over the sub-vectors of a layer: distinct start, Lloyd iterations, repair, early stop -> Codebook."""

import hashlib
import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vqlib import kernels
from vqlib.kernels import ClusterSums
from vqlib.system.files import write_tensors
from vqlib.system.memory import sent

STARTS = ("distinct", "kmeans++", "random")
_RELAXATION = 0.8  # step of an early iteration beyond the mean, as a share of the move to the mean
_LARGE = 300_000  # sub-vectors from which the first iterations see a sample only …
_SAMPLE = 512  # … of as many points per codeword: no higher error, in 3/4 of the time
_CACHE_VERSION = 2  # raise when fit_codebook gives other results for the same arguments


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
    x = _checked(x, k, name)
    if start not in STARTS:
        raise ValueError(f"start {start!r} is not one of {', '.join(STARTS)}")
    if iterations < 1:
        raise ValueError(f"iterations={iterations} must be at least 1")
    draws = _draws(len(x), k, _SAMPLE if subsample is None and len(x) >= _LARGE else subsample, seed)
    generator = torch.Generator()
    generator.set_state(draws.state)
    sample = x if draws.sample is None else x[sent(draws.sample, x.device)]  # [N, d] -> [per codeword · k, d]
    distinct = _distinct_rows(x, k, sent(draws.first, x.device), generator)
    if len(distinct) < k:
        return _exact(x, k)
    codewords = _start(sample, distinct, k, start, generator)
    if len(sample) < len(x):
        codewords, _, _ = _lloyd(sample, codewords, iterations, 0.1 * tolerance)  # cheap passes, so run them out
    codewords, sums, history = _lloyd(x, codewords, iterations, tolerance)
    assignments = kernels.assign(x, codewords)
    if not bool((sums.counts > 0).all()):
        codewords, assignments = _fill_empty(x, codewords, assignments)
        history.append((x.double() - codewords[assignments]).square().mean().item())
    return Codebook(codewords, assignments, history[-1], tuple(history))


def _label(name: str) -> str:
    return f" ({name})" if name else ""


def _checked(x: Tensor, k: int, name: str) -> Tensor:
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"sub-vectors must be floating point [N, d], not {x.dtype} {list(x.shape)}{_label(name)}")
    if not 1 <= k <= len(x):
        raise ValueError(f"{len(x)} sub-vectors are fewer than k={k} codewords{_label(name)}")
    bad = int((~torch.isfinite(x)).sum())
    if bad:
        raise ValueError(f"{bad} of {x.numel()} weights are not finite{_label(name)}")
    return x.detach().float().contiguous()


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


def _distinct_rows(x: Tensor, k: int, first: Tensor, generator: torch.Generator) -> Tensor:
    """k different rows of x in random order, fewer where there are no more; looks at all rows only where the `first` do not do."""
    rows = torch.unique(x[first], dim=0)
    if len(rows) < k and len(first) < len(x):
        rows = torch.unique(x, dim=0)
    return rows if len(rows) < k else rows[torch.randperm(len(rows), generator=generator)[:k].to(x.device)]


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


def _start(sample: Tensor, distinct: Tensor, k: int, start: str, generator: torch.Generator) -> Tensor:
    if start == "kmeans++":
        return _plus_plus(sample, k, generator)
    if start == "random":  # with replacement, so that some codewords may start equal
        return sample[torch.randint(len(sample), (k,), generator=generator).to(sample.device)]
    return distinct


def _cluster_errors(sums: ClusterSums, codewords: Tensor) -> Tensor:
    """Σ‖x − c‖² of every cluster from its sums, in float64: -> [k]."""
    wide = codewords.double()
    return sums.squares - 2 * (wide * sums.sums).sum(dim=1) + sums.counts * wide.square().sum(dim=1)


def _lloyd(x: Tensor, codewords: Tensor, iterations: int, tolerance: float) -> tuple[Tensor, ClusterSums, list[float]]:
    """Lloyd's iterations: -> codewords [k, d], the sums of the pass that measured them, mse of every accepted pass.

    Steps first overshoot the mean, which halves the number of passes; one that raises the error is taken back. The last
    steps are plain, so the result is a fixed point of Lloyd's iteration within `tolerance`.
    """
    history: list[float] = []
    relaxation, codewords = _RELAXATION, codewords.cpu()  # a pass over x is the device's, what follows from it is small
    means = codewords
    for step in range(iterations + 1):
        sums = kernels.cluster_sums(x, sent(codewords, x.device)).cpu()  # the only time that a pass waits
        error = max(0.0, _cluster_errors(sums, codewords).sum().item()) / x.numel()
        if history and error > history[-1]:
            if relaxation == 0.0:
                break  # only rounding can raise the error of a plain step
            relaxation, codewords = 0.0, means
            continue
        stalled = bool(history) and history[-1] - error <= tolerance * history[-1]
        history.append(error)
        accepted = codewords, sums
        if stalled and relaxation == 0.0 and bool((sums.counts > 0).all()):
            break
        if stalled or step >= iterations - 2:
            relaxation = 0.0
        means = _means(x, sums, codewords)
        moved = (sums.counts > 0)[:, None]  # a repaired codeword stays on the point it took
        codewords = torch.where(moved, means + relaxation * (means - codewords), means)
    codewords, sums = accepted
    return codewords.to(x.device), sums, history


def _means(x: Tensor, sums: ClusterSums, codewords: Tensor) -> Tensor:
    """Mean of every cluster; an empty one takes the farthest point of one of the worst clusters."""
    means = (sums.sums / sums.counts.clamp(min=1)[:, None]).float()
    empty = (sums.counts == 0).nonzero()[:, 0]
    if len(empty):
        means = means.to(x.device)
        _split_worst(x, means, kernels.assign(x, codewords.to(x.device)), empty)
    return means.cpu()


def _split_worst(x: Tensor, codewords: Tensor, assignments: Tensor, empty: Tensor) -> Tensor:
    """Move each empty codeword, in place, onto the farthest point of its own worst cluster; -> the points taken."""
    distance = (x - codewords[assignments]).square().sum(dim=1)
    errors = torch.zeros(len(codewords), dtype=torch.float64, device=x.device)
    errors.index_add_(0, assignments, distance.double())
    taken = []
    worst = errors.argsort(descending=True)
    for position, code in enumerate(empty.tolist()):
        cluster = worst[position % len(worst)]
        inside = torch.where(assignments == cluster, distance, -1.0)
        point = int(inside.argmax())
        if inside[point] <= 0:  # fewer clusters with an error than empty codewords: take any point that is off
            point = int(distance.argmax())
        codewords[code] = x[point]
        distance[(x == x[point]).all(dim=1)] = 0.0  # its equals too: of two codewords on one value one stays empty
        taken.append(point)
    return torch.tensor(taken, device=x.device)


def _fill_empty(x: Tensor, codewords: Tensor, assignments: Tensor) -> tuple[Tensor, Tensor]:
    """Give every empty codeword at least one point without raising the error."""
    codewords = codewords.clone()
    for _ in range(len(codewords)):
        counts = torch.bincount(assignments, minlength=len(codewords))
        empty = (counts == 0).nonzero()[:, 0]
        if len(empty) == 0:
            break
        points = _split_worst(x, codewords, assignments, empty)
        assignments = kernels.assign(x, codewords)
        assignments[points] = empty  # rounding may let a neighbor within an ulp win the point
    return codewords, assignments


def _cache_key(x: Tensor, k: int, options: dict) -> str:
    x = x.detach().cpu().contiguous()
    described = {"version": _CACHE_VERSION, "shape": list(x.shape), "dtype": str(x.dtype), "k": k, **options}
    digest = hashlib.blake2b(json.dumps(described, sort_keys=True).encode(), digest_size=20)
    digest.update(x.view(torch.uint8).numpy())
    return digest.hexdigest()


def cached_codebook(x: Tensor, k: int, folder: str | os.PathLike, name: str = "", **options) -> Codebook:
    """fit_codebook(x, k, name=name, **options), kept in `folder` under a hash of the weights and every argument.

    The file holds safetensors only. One that is damaged or does not fit x counts as absent and is written anew.
    """
    path = Path(folder) / f"codebook-{_cache_key(x, k, options)}.safetensors"
    found = _read_cached(path, x, k)
    if found is None:
        found = fit_codebook(x, k, name=name, **options)
        _write_cached(path, found)
    return found


def _read_cached(path: Path, x: Tensor, k: int) -> Codebook | None:
    try:
        with safe_open(path, framework="pt") as file:
            codewords, codes = file.get_tensor("codewords"), file.get_tensor("assignments").long()
            history = tuple(json.loads(file.metadata()["history"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
    fits = codewords.shape == (k, x.shape[1]) and codes.shape == (len(x),) and len(history) > 0
    if not fits or (len(codes) and not 0 <= int(codes.min()) <= int(codes.max()) < k):
        return None
    return Codebook(codewords.to(x.device), codes.to(x.device), history[-1], history)


def _write_cached(path: Path, codebook: Codebook) -> None:
    codes = codebook.assignments.to(torch.uint8 if len(codebook.codewords) <= 256 else torch.int32)
    history = {"history": json.dumps(codebook.history)}
    write_tensors(path, {"codewords": codebook.codewords, "assignments": codes}, history)
