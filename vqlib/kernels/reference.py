"""Plain torch twins of every kernel: slow, readable, any device and dtype.

Searches go through the points in chunks, so that memory stays bounded however many sub-vectors a layer has. The
compiled kernels are tested against these functions; devices without a compiled kernel use them directly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import NamedTuple

import torch
from torch import Tensor

from vqlib.kernels.bits import CHUNK, unpack_range

_SCORES_PER_CHUNK = 1 << 24  # elements of the [chunk, k] score matrix: 64 MiB in float32
HISTOGRAM_BINS = 20
SUMS = 5  # of RatioStatistics, those that are means: entropy, winners other than 0, frozen, both ratio losses
INDEX_TYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)  # torch lacks minima of the others
FROZEN_LOGIT = -1e4  # exp(−1e4) is exactly 0 in float32: the ratios of a frozen sub-vector are exactly one-hot


class ClusterSums(NamedTuple):
    """What one k-means update needs of a pass over the points, per codeword, in float64 and int64."""

    sums: Tensor  # [k, d] sum of the points assigned
    counts: Tensor  # [k] number of points assigned
    squares: Tensor  # [k] sum of the squared norms of the points assigned

    def cpu(self) -> ClusterSums:
        """The same on the CPU, read in one copy."""
        if self.sums.device.type == "cpu":
            return self
        read = torch.cat([self.sums, self.counts[..., None].double(), self.squares[..., None]], dim=-1).cpu()
        return ClusterSums(read[..., :-2], read[..., -2].long(), read[..., -1])


class RatioStatistics(NamedTuple):
    """Summary of one layer's candidate ratios before those above the threshold were frozen."""

    entropy: float  # mean entropy in nats, 0..log n
    winners_not_first: float  # share of sub-vectors whose largest ratio is not candidate 0
    frozen: float  # share of sub-vectors whose largest ratio is above the threshold, or 1
    absolute: float  # mean of Σ_n (1 − |2r − 1|), Eq. 9
    quadratic: float  # mean of Σ_n r(1 − r)
    used: int  # codewords that are some sub-vector's largest ratio
    histogram: list[int]  # [20] largest ratio of each sub-vector in equal bins over 0..1

    @classmethod
    def of(cls, row: list[float]) -> RatioStatistics:
        """From a row of `settle_ratios`, read back from wherever it was made."""
        return cls(*row[:SUMS], int(row[SUMS]), [int(count) for count in row[SUMS + 1 :]])


def _chunks(count: int, columns: int) -> Iterator[slice]:
    size = max(1, _SCORES_PER_CHUNK // max(1, columns))
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def scores(x: Tensor, codewords: Tensor) -> Tensor:
    """x·c − ½‖c‖² of every point and codeword: largest where ‖x − c‖² is smallest. [N, d], [k, d] -> [N, k].

    Summed coordinate by coordinate and not as a matrix product: TF32 products on CUDA would flip near ties.
    """
    total = -0.5 * codewords.square().sum(dim=1).expand(len(x), -1)  # [k] -> [N, k]
    for j in range(codewords.shape[1]):
        total = torch.addcmul(total, x[:, j, None], codewords[None, :, j])
    return total


def layer_by_layer(one: Callable) -> Callable:
    """A function of points [N, d] and codewords [k, d] that takes [L, N, d] and [L, k, d] too, a layer at a time."""

    @wraps(one)
    def each(x: Tensor, codewords: Tensor, *options):
        if x.dim() == 2:
            return one(x, codewords, *options)
        found = [one(*layer, *options) for layer in zip(x, codewords, strict=True)]
        if isinstance(found[0], Tensor):
            return torch.stack(found) if len(found) > 1 else found[0][None]
        return type(found[0])(*map(torch.stack, zip(*found, strict=True)))

    return each


@layer_by_layer
def assign(x: Tensor, codewords: Tensor, guess: Tensor | None = None) -> Tensor:
    """Index of the nearest codeword of every point: [N, d], [k, d] -> int64 [N]; a guess is of no use here."""
    codes = torch.empty(len(x), dtype=torch.int64, device=x.device)
    for part in _chunks(len(x), len(codewords)):
        codes[part] = scores(x[part], codewords).argmax(dim=1)
    return codes


def nearest(x: Tensor, codewords: Tensor, n: int) -> Tensor:
    """Indices of the n nearest codewords, nearest first (Eq. 5): [N, d], [k, d] -> int64 [N, n]."""
    found = torch.empty(len(x), n, dtype=torch.int64, device=x.device)
    for part in _chunks(len(x), len(codewords)):
        remaining = scores(x[part], codewords)
        for position in range(n):
            best = remaining.argmax(dim=1, keepdim=True)  # [chunk, k] -> [chunk, 1]
            found[part, position] = best[:, 0]
            remaining.scatter_(1, best, -torch.inf)
    return found


@layer_by_layer
def cluster_sums(x: Tensor, codewords: Tensor, search: Callable[[Tensor, Tensor], Tensor] = assign) -> ClusterSums:
    """Assign every point, by `search`, and add it up under its codeword: [N, d], [k, d] -> [k, d], [k], [k]."""
    k, d = codewords.shape
    sums = torch.zeros(k, d, dtype=torch.float64, device=x.device)
    counts = torch.zeros(k, dtype=torch.int64, device=x.device)
    squares = torch.zeros(k, dtype=torch.float64, device=x.device)
    for part in _chunks(len(x), k):
        codes = search(x[part], codewords)
        wide = x[part].double()
        sums.index_add_(0, codes, wide)
        counts.index_add_(0, codes, torch.ones_like(codes))
        squares.index_add_(0, codes, wide.square().sum(dim=1))
    return ClusterSums(sums, counts, squares)


def check_candidates(candidates: Tensor, k: int) -> None:
    """IndexError, with its row, for one of integers [N, n] outside a codebook of k. Waits for the device."""
    codes = candidates if candidates.dtype in INDEX_TYPES else candidates.long()
    if not codes.numel():
        return
    low, high = torch.stack(torch.aminmax(codes)).tolist()
    if low < 0 or high >= k:
        codes = codes.long()
        outside = int(((codes < 0) | (codes >= k)).any(dim=1).int().argmax())
        row = codes[outside].tolist()
        raise IndexError(f"candidates {row} of sub-vector {outside} are not all in 0..{k - 1}, the codebook has k={k}")


def soft_reconstruct(codewords: Tensor, candidates: Tensor, logits: Tensor | None) -> Tensor:
    """Ratio-weighted mean of the candidates (Eq. 6 and 7), by autograd: [k, d], [N, n], [N, n] -> [N, d]."""
    members = codewords[candidates.long()]  # [k, d] -> [N, n, d]
    if logits is None:
        return members[:, 0]
    ratios = torch.softmax(logits, dim=1)
    return (ratios[:, :, None] * members).sum(dim=1)  # [N, n, d] -> [N, d]


def open_rows(logits: Tensor) -> Tensor:
    """Whether a sub-vector is not frozen: [N, n] -> bool [N]."""
    return logits.detach().amin(dim=1) > FROZEN_LOGIT


def ratio_loss(kind: str, logits: Tensor) -> Tensor:
    """Eq. 9 ("absolute") or n · mean of r(1 − r) over sub-vectors not yet frozen ("quadratic"), by autograd; logits [N, n]."""
    ratios = logits.softmax(dim=1)
    if kind == "absolute":
        return (1.0 - (2.0 * ratios - 1.0).abs()).sum() / len(logits)
    still_open = open_rows(logits)
    return ((ratios * (1.0 - ratios)).sum(dim=1) * still_open).sum() / still_open.sum().clamp_min(1)


@torch.enable_grad()
def add_ratio_gradient(kind: str, logits: Tensor, grad: Tensor, weight: float) -> None:
    """grad += weight · dL_r/dz, in place, by autograd; both [N, n]."""
    leaf = logits.detach().requires_grad_()
    grad += torch.autograd.grad(weight * ratio_loss(kind, leaf), leaf)[0]


def rmsprop_step(
    values: Tensor, grad: Tensor, squares: Tensor, rate: float, smoothing: float, eps: float, loss: Tensor
) -> None:
    """The step of torch.optim.RMSprop, in place; a gradient of a loss that is not finite counts as 0."""
    grad = torch.where(loss.isfinite(), grad, 0.0)
    squares.mul_(smoothing).addcmul_(grad, grad, value=1.0 - smoothing)
    values.addcdiv_(grad, squares.sqrt().add_(eps), value=-rate)


def largest_ratios(logits: Tensor) -> Tensor:
    """Largest of softmax(logits) of every sub-vector: [N, n] -> [N]."""
    return logits.float().softmax(dim=1).amax(dim=1)


def ratio_limit(logits: Tensor, rank: int) -> Tensor:
    """The `rank`-th smallest of the largest ratios, 1 the first: [N, n] -> scalar."""
    return largest_ratios(logits).sort().values[rank - 1]


def settle_ratios(logits: Tensor, candidates: Tensor, k: int, limit: float | Tensor, freeze: bool) -> Tensor:
    """A row of `RatioStatistics`; with `freeze`, rows of logits [N, n] above the limit become one-hot in place."""
    count, n = logits.shape
    histogram = torch.zeros(HISTOGRAM_BINS, dtype=torch.float64, device=logits.device)
    sums = torch.zeros(SUMS, dtype=torch.float64, device=logits.device)
    used = torch.zeros(k, dtype=torch.float64, device=logits.device)
    for part in _chunks(count, n):
        logs = torch.log_softmax(logits[part].float(), dim=1)
        ratios = logits[part].float().softmax(dim=1)  # bit for bit those of `ratio_limit`; logs.exp() may differ
        largest, winner = ratios.max(dim=1, keepdim=True)
        bins = (largest[:, 0] * HISTOGRAM_BINS).long().clamp_(0, HISTOGRAM_BINS - 1)
        histogram += torch.zeros_like(histogram).index_add_(0, bins, torch.ones_like(bins, dtype=torch.float64))
        absolute, quadratic = (1.0 - (2.0 * ratios - 1.0).abs()).sum(dim=1), (ratios * (1.0 - ratios)).sum(dim=1)
        above = (largest > limit) | (largest >= 1.0)
        rows = (-(ratios * logs).sum(dim=1), winner[:, 0] != 0, above[:, 0], absolute, quadratic)
        sums += torch.stack([row.double().sum() for row in rows])
        used.index_fill_(0, candidates[part].gather(1, winner)[:, 0].long(), 1.0)
        if freeze:
            frozen = torch.full_like(logs, FROZEN_LOGIT).scatter_(1, winner, 0.0)
            logits[part] = torch.where(above, frozen.to(logits.dtype), logits[part])
    return torch.cat([sums / max(count, 1), used.sum()[None], histogram])


def scaled(codebook: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """scale · codebook in `dtype`, [k, d]; multiplied in float32 and rounded once."""
    if scale.device.type == "cpu" and scale.item() == 1.0:  # elsewhere, asking would wait for the device
        return codebook.to(dtype)
    return (codebook.float() * scale).to(dtype)


def gather(codes: Tensor, code_bits: int, codebook: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    """out[i] = scale · codebook[code i], a chunk of codes at a time: uint8, [k, d], [] -> [N, d]."""
    table = scaled(codebook, scale, out.dtype)
    for start in range(0, len(out), CHUNK):
        stop = min(start + CHUNK, len(out))
        torch.index_select(table, 0, unpack_range(codes, code_bits, start, stop), out=out[start:stop])
    return out
