"""adaLN outputs of a DiT computed only once: they depend on (timestep, class) alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.models.normalization import AdaLayerNormZero
from torch import Tensor, nn

# Matrix products of 1 … 3 rows take other kernels on the CPU, which round differently (see `sampling`).
FEWEST_ROWS = 4


class ModulationCache:
    """adaLN outputs by (timestep, class), filled as they are first asked for. Made by `cached_modulation`.

    rows: pairs held; nbytes: memory of their outputs in all blocks; hits and misses: forwards answered without and with
    an adaLN product. A forward whose new pairs would exceed `budget_bytes` is computed as usual and counts as a miss.
    """

    def __init__(self, norms: list[AdaLayerNormZero], budget_bytes: int) -> None:
        self.tables = [_Table(norm, name, self) for norm in norms for name in ("emb", "linear")]
        self.budget_bytes, self.hits, self.misses = budget_bytes, 0, 0
        self.current: Tensor | None = None  # row of each image of the forward that is running
        self.missing: list[int] = []  # an image of it for each new pair
        self._known: dict[tuple[float, int], int] = {}
        self._kind: tuple[torch.device, torch.dtype] | None = None

    @property
    def rows(self) -> int:
        return len(self._known)

    @property
    def nbytes(self) -> int:
        return sum(table.nbytes for table in self.tables)

    def begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before a forward of the transformer: find the row of each image, and which images bring new pairs."""
        given = dict(zip(("hidden_states", "timestep", "class_labels"), args, strict=False)) | kwargs
        x, timestep, labels = (given.get(name) for name in ("hidden_states", "timestep", "class_labels"))
        self.current, self.missing = None, []
        if timestep is None or labels is None or timestep.shape != labels.shape or module.training:
            return
        cut_off = any(table.rows != self.rows for table in self.tables)  # the forward before was, by an exception
        if cut_off or self._kind != (x.device, x.dtype):
            self._kind = x.device, x.dtype
            self.clear()
        pairs = list(zip(timestep.tolist(), labels.tolist(), strict=True))
        new = {pair: image for image, pair in reversed(list(enumerate(pairs))) if pair not in self._known}
        self.hits, self.misses = self.hits + (not new), self.misses + bool(new)
        row_bytes = sum(table.width for table in self.tables) * x.dtype.itemsize
        if (len(self._known) + len(new)) * row_bytes > self.budget_bytes:
            return
        self.missing = list(new.values())
        self._known.update({pair: len(self._known) + i for i, pair in enumerate(new)})
        self.current = torch.tensor([self._known[pair] for pair in pairs], device=x.device)

    def end(self, *_) -> None:
        """After the forward: a block called on its own is not answered from the cache."""
        self.current, self.missing = None, []

    def clear(self) -> None:
        """Forget everything."""
        self._known = {}
        for table in self.tables:
            table.held = None


class _Table(nn.Module):
    """Stands in the place of one module of adaLN (`emb` or `linear`) whose rows depend on (timestep, class) alone."""

    def __init__(self, norm: AdaLayerNormZero, name: str, cache: ModulationCache) -> None:
        super().__init__()
        self.original = norm._modules[name]
        self.width = norm.linear.in_features if name == "emb" else norm.linear.out_features
        self.held: Tensor | None = None  # [rows, width]
        self.__dict__.update(norm=norm, name=name, cache=cache)  # plain attributes: none of them is a submodule here

    @property
    def rows(self) -> int:
        return 0 if self.held is None else len(self.held)

    @property
    def nbytes(self) -> int:
        return 0 if self.held is None else self.held.numel() * self.held.element_size()

    def install(self) -> None:
        self.norm._modules[self.name] = self

    def remove(self) -> None:
        self.norm._modules[self.name] = self.original

    def forward(self, *args, **kwargs) -> Tensor:
        """Inputs [R, …] -> [R, width]; from the table where the running forward's rows are in it."""
        if self.cache.current is None:
            return self.original(*args, **kwargs)
        if self.rows < self.cache.rows:
            missing = self.cache.missing
            filled = missing + missing[-1:] * (FEWEST_ROWS - len(missing))
            with torch.no_grad():
                new = self.original(*(value[filled] for value in args), **kwargs)[: len(missing)]
                with torch.inference_mode(False):  # a table made in inference mode could not be used outside of it
                    self.held = new.clone() if self.held is None else torch.cat([self.held, new])
        return self.held.index_select(0, self.cache.current)


@contextmanager
def cached_modulation(transformer: nn.Module, budget_bytes: int = 256 << 20) -> Iterator[ModulationCache]:
    """Within the block, each adaLN output of a DiT is computed once per (timestep, class); for sampling only.

    A sampler asks for the same `steps · (classes + 1)` pairs again in every batch. An output needs 7·hidden numbers per
    pair and block; `budget_bytes` bounds them all. Works for packed and full-precision models and keeps no graph. Outputs
    stay the same but for rounding: matrix products of other numbers of rows may be split differently among threads.
    Do not change weights inside. Raises ValueError for a model without such layers or in training mode.
    """
    norms = [m for m in transformer.modules() if isinstance(m, AdaLayerNormZero) and m.emb is not None]
    if not norms or transformer.training:
        reason = "is in training mode, which drops class labels" if norms else "has no adaLN of timestep and class"
        raise ValueError(f"{type(transformer).__name__} {reason}; there is nothing to cache")
    cache = ModulationCache(norms, budget_bytes)
    hooks = [
        transformer.register_forward_pre_hook(cache.begin, with_kwargs=True),
        transformer.register_forward_hook(cache.end, always_call=True),
    ]
    try:
        for table in cache.tables:
            table.install()
        yield cache
    finally:
        for hook in hooks:
            hook.remove()
        for table in cache.tables:
            table.remove()
