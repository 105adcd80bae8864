"""Run a compiled function over chunks of the points on several threads, with chunks that depend on the problem alone.

The compiled functions release the interpreter lock, so ordinary Python threads run them side by side. Chunk borders
never depend on the number of threads: a restart with more or fewer of them gives the same sums, bit for bit.
"""

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import torch

_CHUNK = 8192  # points: a quarter of a millisecond of searching, far above the cost of handing it to a thread
BLOCK = 256  # points the compiled functions take at a time
_MAX_CHUNKS = 256
_PARTIAL_BYTES = 64 << 20  # upper bound of all chunks' partial sums together
_pool: ThreadPoolExecutor | None = None


def _forget_pool() -> None:
    global _pool
    _pool = None  # a forked child has none of its parent's threads


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def array(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's memory, contiguous, as compiled functions take it."""
    return tensor.detach().contiguous().numpy()


def chunk_size(count: int, partial_bytes: int = 0, least: int = _CHUNK) -> int:
    """Points per chunk for `count` points when each chunk keeps `partial_bytes` of partial sums; a multiple of 256."""
    chunks = _MAX_CHUNKS if partial_bytes == 0 else max(1, min(_MAX_CHUNKS, _PARTIAL_BYTES // partial_bytes))
    size = max(least, -(-count // chunks))
    return -(-size // BLOCK) * BLOCK


def run_chunks(count: int, size: int, work: Callable[[int, int, int], None]) -> None:
    """Call work(chunk index, start, stop) for every chunk of `size` points, on as many threads as torch uses."""
    global _pool
    chunks = -(-count // size)
    threads = min(torch.get_num_threads(), chunks)
    ticket = itertools.count()  # next() on it is atomic under the interpreter lock

    def drain() -> None:
        while (index := next(ticket)) < chunks:
            work(index, index * size, min(count, (index + 1) * size))

    if threads <= 1:
        return drain()
    if _pool is None:
        _pool = ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 2) - 1), thread_name_prefix="vqlib-kernel")
    helpers = [_pool.submit(drain) for _ in range(threads - 1)]
    try:
        drain()
    finally:
        wait(helpers)  # the arrays must stay alive until nobody writes to them
    for helper in helpers:
        helper.result()
