"""Lloyd's iterations of k-means, those of several layers side by side, and the repair of codewords that nobody uses."""

from __future__ import annotations

from collections.abc import Generator
from typing import NamedTuple

import torch
from torch import Tensor

from vqlib import kernels
from vqlib.kernels import ClusterSums
from vqlib.system.memory import sent

_RELAXATION = 0.8  # step of an early iteration beyond the mean, as a share of the move to the mean


class Minimum(NamedTuple):
    """Where a layer's iterations ended."""

    codewords: Tensor  # [k, d] on the CPU
    sums: ClusterSums  # of the pass that measured them, on the CPU
    history: list[float]  # mse of every accepted pass


def lloyd(x: Tensor, starts: list[Tensor], iterations: int, tolerance: float) -> list[Minimum]:
    """Lloyd's iterations of L layers, points x [L, N, d], from `starts`, L of [k, d]: what each would find alone.

    A pass over all layers is one search and one wait; a layer takes part until it has converged.
    """
    runs = [_iterations(points, start.cpu(), iterations, tolerance) for points, start in zip(x, starts, strict=True)]
    asked = {layer: next(run) for layer, run in enumerate(runs)}  # codewords to be measured
    found: dict[int, Minimum] = {}
    here = list(asked)  # the layers in x
    while asked:
        if len(asked) < len(here):  # layers that are done take no part
            kept = torch.tensor([place for place, layer in enumerate(here) if layer in asked])
            x, here = x.index_select(0, sent(kept, x.device)), list(asked)
        sums = kernels.cluster_sums(x, sent(torch.stack(list(asked.values())), x.device)).cpu()  # the wait of a pass
        for place, layer in enumerate(here):
            try:
                asked[layer] = runs[layer].send(ClusterSums(*(part[place] for part in sums)))
            except StopIteration as done:
                found[layer] = done.value
                del asked[layer]
    return [found[layer] for layer in range(len(runs))]


def _cluster_errors(sums: ClusterSums, codewords: Tensor) -> Tensor:
    """Σ‖x − c‖² of every cluster from its sums, in float64: -> [k]."""
    wide = codewords.double()
    return sums.squares - 2 * (wide * sums.sums).sum(dim=1) + sums.counts * wide.square().sum(dim=1)


def _iterations(
    x: Tensor, codewords: Tensor, iterations: int, tolerance: float
) -> Generator[Tensor, ClusterSums, Minimum]:
    """The iterations of one layer: yields codewords [k, d], is sent the sums of a pass with them; all of it on the CPU.

    Steps first overshoot the mean, which halves the number of passes; one that raises the error is taken back. The last
    steps are plain, so the result is a fixed point of Lloyd's iteration within `tolerance`.
    """
    history: list[float] = []
    relaxation, means = _RELAXATION, codewords
    for step in range(iterations + 1):
        sums = yield codewords
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
    return Minimum(*accepted, history)


def _means(x: Tensor, sums: ClusterSums, codewords: Tensor) -> Tensor:
    """Mean of every cluster; an empty one takes the farthest point of one of the worst clusters."""
    means = (sums.sums / sums.counts.clamp(min=1)[:, None]).float()
    empty = (sums.counts == 0).nonzero()[:, 0]
    if len(empty):
        means = means.to(x.device)
        split_worst(x, means, kernels.assign(x, codewords.to(x.device)), empty)
    return means.cpu()


def split_worst(x: Tensor, codewords: Tensor, assignments: Tensor, empty: Tensor) -> Tensor:
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


def fill_empty(x: Tensor, codewords: Tensor, assignments: Tensor) -> tuple[Tensor, Tensor]:
    """Give every empty codeword at least one point without raising the error."""
    codewords = codewords.clone()
    for _ in range(len(codewords)):
        counts = torch.bincount(assignments, minlength=len(codewords))
        empty = (counts == 0).nonzero()[:, 0]
        if len(empty) == 0:
            break
        points = split_worst(x, codewords, assignments, empty)
        assignments = kernels.assign(x, codewords)
        assignments[points] = empty  # rounding may let a neighbor within an ulp win the point
    return codewords, assignments
