"""Additive codes in the manner of AQLM (Egiazarian et al. 2024): every sub-vector is a sum of one codeword of each codebook.

The codebooks are learned together, codes by beam search and codewords by least squares in turn; a layer's codes are then
found with error feedback in the metric of its inputs, by the same search. Codebooks of a layer's own, as AQLM's, would
take as many bits as the codes in models of this width, so all layers share them, each row at a scale of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from vqlib import kernels
from vqlib.models.pipeline import Pipeline
from vqlib.quantizer.codebook import fit_codebook
from vqlib.quantizer.feedback import Columns, quantize_columns
from vqlib.quantizer.subvectors import join, split
from vqlib.studies.baselines.baseline import Baseline
from vqlib.studies.baselines.made import Layers, MadeLinear, Trained, build

BEAM = 8  # partial sums that the search keeps
SWEEPS = 2  # over the codebooks after it, each code chosen anew beside the others
ROUNDS = 12  # of codes and codewords in turn
SAMPLE = 1 << 17  # sub-vectors of all layers that the codebooks are learned on


@dataclass(frozen=True)
class Additive:
    """`books` codebooks of `k` codewords of length `d`: books · log2(k) / d bits a weight; `seed`: of their start."""

    how: Trained
    k: int = 256
    d: int = 8
    books: int = 2
    seed: int = 0

    def seeded(self, seed: int) -> Additive:
        """The same with another seed."""
        return replace(self, how=self.how.seeded(seed), seed=seed)

    def build(self, pipe: Pipeline, folder: Path | None = None) -> Baseline:
        """Raises ValueError naming a layer whose width `d` does not divide."""
        return build(pipe, folder, self)

    def layers(self, layers: Layers, hessians: Mapping[str, Tensor]) -> dict[str, MadeLinear]:
        parts = [split(layer.weight.detach().float() / row_scale(layer), self.d, n) for n, layer in layers.items()]
        x = torch.cat(parts)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.seed))[:SAMPLE]
        books = learn(x[order.to(x.device)], self.k, self.books, self.seed)
        shared = nn.ParameterList(nn.Parameter(book) for book in books)
        made = {name: AdditiveLinear(layer, hessians[name], shared) for name, layer in layers.items()}
        next(iter(made.values())).stored_bits += 16 * sum(book.numel() for book in books)
        return made


class AdditiveLinear(MadeLinear):
    """diag(s) Σ_m C_m[A_m]: codebooks [k, d] that all layers share, codes A [books, N], scales s [out]."""

    def __init__(self, layer: nn.Linear, hessian: Tensor, books: nn.ParameterList) -> None:
        super().__init__(layer)
        self.books, self.scale = books, nn.Parameter(row_scale(layer))
        tables, weight = [book.detach().double() for book in books], layer.weight.detach() / self.scale.detach()
        columns, found = Columns.of(hessian.double(), tables[0].shape[1]), []

        def choose(part: Tensor, root: Tensor, positions: Tensor) -> Tensor:
            metric = columns.metrics[len(found)]
            found.append(search((part @ metric).float(), [(table @ metric).float() for table in tables]))
            return total(tables, found[-1])

        quantize_columns(weight, columns, choose)
        order = torch.tensor(columns.groups).argsort().to(weight.device)
        codes = torch.stack(found, dim=2)[:, :, order].flatten(1)  # [books, out, in / d] -> [books, N]
        self.register_buffer("codes", codes)
        self.stored_bits = codes.numel() * math.ceil(math.log2(len(tables[0]))) + 16 * self.out_features

    def weight(self) -> Tensor:
        return self.scale * join(total(list(self.books), self.codes), (self.out_features, self.in_features))


def row_scale(layer: nn.Linear) -> Tensor:
    """Root mean square of every row, [out, 1]; 1 where it is 0."""
    scale = layer.weight.detach().float().square().mean(dim=1, keepdim=True).sqrt()
    return torch.where(scale > 0, scale, 1.0)


def total(books: Sequence[Tensor], codes: Tensor) -> Tensor:
    """Σ_m C_m[A_m], [N, d], of codebooks [k, d] and codes [books, N]."""
    return sum(book[own] for book, own in zip(books, codes, strict=True))


def learn(x: Tensor, k: int, count: int, seed: int = 0) -> list[Tensor]:
    """Codebooks [k, d] for x [N, d]: k-means on what the books before left, then codes and least squares in turn."""
    books, left = [], x
    for number in range(count):
        book = fit_codebook(left, k, seed=seed + number)
        books.append(book.codewords)
        left = left - book.codewords[book.assignments]
    for _ in range(ROUNDS):
        books = least_squares(x, search(x, books), k)
    return books


def search(x: Tensor, books: Sequence[Tensor]) -> Tensor:
    """Codes int64 [books, N] of x [N, d]: a beam through the codebooks, then every code chosen anew beside the others."""
    beams = [(x, [])]  # what is left of x, and the codes so far
    for number, book in enumerate(books):
        width = BEAM if number < len(books) - 1 else 1
        grown = []
        for left, codes in beams:
            for own in kernels.nearest(left, book, width).long().unbind(1):
                grown.append((left - book[own], [*codes, own]))
        beams = _best(grown, width)
    codes = torch.stack(beams[0][1])
    for _ in range(SWEEPS):
        for number, book in enumerate(books):
            others = total(books, codes) - book[codes[number]]
            codes[number] = kernels.assign(x - others, book)
    return codes


def _best(grown: list[tuple[Tensor, list[Tensor]]], width: int) -> list[tuple[Tensor, list[Tensor]]]:
    """Of partial sums, row by row, the `width` that leave least."""
    if len(grown) <= width:
        return grown
    errors = torch.stack([left.square().sum(dim=1) for left, _ in grown], dim=1)  # [N, grown]
    chosen = errors.topk(width, dim=1, largest=False).indices
    lefts = torch.stack([left for left, _ in grown], dim=1)  # [N, grown, d]
    depth = len(grown[0][1])
    codes = [torch.stack([one[i] for _, one in grown], dim=1) for i in range(depth)]  # [N, grown] each
    return [
        (
            lefts.gather(1, c[:, None, None].expand(-1, 1, lefts.shape[2])).squeeze(1),
            [own.gather(1, c[:, None]).squeeze(1) for own in codes],
        )
        for c in chosen.unbind(1)
    ]


def least_squares(x: Tensor, codes: Tensor, k: int) -> list[Tensor]:
    """The codebooks [k, d] with the least Σ ‖x − Σ_m C_m[A_m]‖² for codes [books, N]; what nothing uses becomes 0."""
    count, wide = len(codes), {"dtype": torch.float64, "device": x.device}
    gram = torch.zeros(count * k, count * k, **wide)
    for i in range(count):
        for j in range(count):
            pairs = torch.bincount(codes[i] * k + codes[j], minlength=k * k).view(k, k)
            gram[i * k : (i + 1) * k, j * k : (j + 1) * k] = pairs.double()
    sums = torch.cat([torch.zeros(k, x.shape[1], **wide).index_add_(0, own, x.double()) for own in codes])
    gram += 1e-3 * torch.eye(len(gram), **wide)  # a constant may move from one book to another
    return [book.float().contiguous() for book in torch.linalg.solve(gram, sums).split(k)]
