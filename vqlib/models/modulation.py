"""adaLN outputs of a DiT, or its embeddings, computed only once: they depend on (timestep, class) alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.models.normalization import AdaLayerNormZero
from torch import Tensor, nn

from vqlib.kernels.products import products_now
from vqlib.system.memory import sent

# Matrix products of 1 … 3 rows take other kernels on the CPU, which round differently (see `sampling`).
FEWEST_ROWS = 4


class _PerThread(threading.local):
    """What one thread has cached, and the forward it is in: threads that sample side by side do not meet."""

    def __init__(self) -> None:
        self.current: Tensor | None = None  # row of each image of the forward that is running
        self.missing: list[int] = []  # an image of it for each new pair
        self.known: dict[tuple[float, int], int] = {}
        self.kind: tuple | None = None  # device and type of what is held, and how its products were made
        self.held: dict[int, Tensor] = {}  # table -> [rows, width]


class ModulationCache:
    """adaLN outputs by (timestep, class), filled as they are first asked for. Made by `cached_modulation`.

    rows: pairs that this thread holds; nbytes: memory of their outputs in all blocks; hits and misses: forwards answered
    without and with an adaLN product. A forward whose new pairs would exceed `budget_bytes`, a thread's, is computed as usual
    and counts as a miss.
    """

    def __init__(self, norms: list[AdaLayerNormZero], budget_bytes: int) -> None:
        self.tables = [_Table(norm.emb, norm.linear.in_features, self) for norm in norms]
        self.tables += [_Table(norm.linear, norm.linear.out_features, self) for norm in norms]
        self.budget_bytes, self.hits, self.misses = budget_bytes, 0, 0
        self.own = _PerThread()

    @property
    def rows(self) -> int:
        return len(self.own.known)

    @property
    def nbytes(self) -> int:
        return sum(held.nbytes for held in self.own.held.values())

    def begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before a forward of the transformer: find the row of each image, and which images bring new pairs."""
        own = self.own
        given = dict(zip(("hidden_states", "timestep", "class_labels"), args, strict=False)) | kwargs
        x, timestep, labels = (given.get(name) for name in ("hidden_states", "timestep", "class_labels"))
        own.current, own.missing = None, []
        if timestep is None or labels is None or timestep.shape != labels.shape or module.training:
            return
        cut_off = any(len(held) != self.rows for held in own.held.values())  # the forward before was, by an exception
        kind = x.device, x.dtype, products_now(x.device)
        if cut_off or len(own.held) not in (0, len(self.tables)) or own.kind != kind:
            own.kind, own.known, own.held = kind, {}, {}
        wide = torch.promote_types(timestep.dtype, torch.float32)  # exact for classes below 2^24
        pairs = list(map(tuple, torch.stack([timestep.to(wide), labels.to(wide)], dim=1).tolist()))  # the only wait
        new = {pair: image for image, pair in reversed(list(enumerate(pairs))) if pair not in own.known}
        self.hits, self.misses = self.hits + (not new), self.misses + bool(new)
        row_bytes = sum(table.width for table in self.tables) * x.dtype.itemsize
        if (len(own.known) + len(new)) * row_bytes > self.budget_bytes:
            return
        own.missing = list(new.values())
        own.known.update({pair: len(own.known) + i for i, pair in enumerate(new)})
        own.current = sent(torch.tensor([own.known[pair] for pair in pairs]), x.device)

    def end(self, *_) -> None:
        """After the forward: a block called on its own is not answered from the cache."""
        self.own.current, self.own.missing = None, []


class _Table:
    """Stands before the forward of one module of adaLN whose rows depend on (timestep, class) alone; the module stays in place."""

    def __init__(self, module: nn.Module, width: int, cache: ModulationCache) -> None:
        self.module, self.original, self.width, self.cache = module, module.forward, width, cache

    def install(self) -> None:
        self.module.forward = self.forward

    def remove(self) -> None:
        del self.module.forward

    def forward(self, *args, **kwargs) -> Tensor:
        """Inputs [R, …] -> [R, width]; from the table where the running forward's rows are in it."""
        own = self.cache.own
        if own.current is None:
            return self.original(*args, **kwargs)
        held = own.held.get(id(self))
        if held is None or len(held) < self.cache.rows:
            missing = own.missing
            filled = missing + missing[-1:] * (FEWEST_ROWS - len(missing))
            with torch.no_grad():
                rows = sent(torch.tensor(filled), own.current.device)
                new = self.original(*(value.index_select(0, rows) for value in args), **kwargs)[: len(missing)]
                with torch.inference_mode(False):  # a table made in inference mode could not be used outside of it
                    held = own.held[id(self)] = new.clone() if held is None else torch.cat([held, new])
        return held.index_select(0, own.current)


class SharedEmbedder:
    """Embedders of timestep and class with equal parameters, of which a diffusers DiT has a copy in every block: one works for all.

    A batch is known by its own tensors: `embed(timestep, labels)` of the same two gives what was computed for them.
    """

    def __init__(self, *transformers: nn.Module) -> None:
        found = [
            m.emb for t in transformers for m in t.modules() if isinstance(m, AdaLayerNormZero) and m.emb is not None
        ]
        self.embedders = [embedder for embedder in found if _equal(embedder, found[0])]
        self.given: tuple = ()

    @contextmanager
    def working(self) -> Iterator[None]:
        """Within the block the embedders share this thread's work; those that have another forward already keep it."""
        thread = threading.get_ident()
        free = [embedder for embedder in self.embedders if "forward" not in embedder.__dict__]
        original = free[0].forward if free else None

        def embed(*args, **kwargs) -> Tensor:
            if threading.get_ident() != thread:
                return original(*args, **kwargs)
            known = self.given and len(args) == len(self.given[0]) and kwargs == self.given[1]
            if not known or any(a is not b for a, b in zip(args, self.given[0], strict=True)):
                self.given = args, kwargs, original(*args, **kwargs)
            return self.given[2]

        for embedder in free:
            embedder.forward = embed
        try:
            yield
        finally:
            self.given = ()
            for embedder in free:
                del embedder.forward


def _equal(one: nn.Module, other: nn.Module) -> bool:
    own, others = one.state_dict(), other.state_dict()
    same = not one.training and own.keys() == others.keys()
    return same and all(own[k].dtype == x.dtype and torch.equal(own[k], x) for k, x in others.items())


@contextmanager
def cached_modulation(transformer: nn.Module, budget_bytes: int = 256 << 20) -> Iterator[ModulationCache]:
    """Within the block, each adaLN output of a DiT is computed once per (timestep, class); for sampling only.

    A sampler asks for the same `steps · (classes + 1)` pairs again in every batch. An output needs 7·hidden numbers per
    pair and block; `budget_bytes` bounds them all. Works for packed and full-precision models and keeps no graph. Outputs
    stay the same but for rounding: matrix products of other numbers of rows may be split differently among threads.
    Do not change weights inside. Threads
    have a cache each; a model saved inside is the model itself. Raises ValueError for a model without such layers, in training mode, or cached already.
    """
    norms = [m for m in transformer.modules() if isinstance(m, AdaLayerNormZero) and m.emb is not None]
    if not norms or transformer.training:
        reason = "is in training mode, which drops class labels" if norms else "has no adaLN of timestep and class"
        raise ValueError(f"{type(transformer).__name__} {reason}; there is nothing to cache")
    if any("forward" in module.__dict__ for norm in norms for module in (norm.emb, norm.linear)):
        raise ValueError(
            f"{type(transformer).__name__} has another forward in its adaLN already: it is cached, or patched"
        )
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
