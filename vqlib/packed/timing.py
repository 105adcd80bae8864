"""Times of several calls side by side, and the bytes that a model's weights hold: for benchmarks and notebooks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from vqlib.kernels.products import linear
from vqlib.packed.layer import VQLinear


def compare(calls: Mapping[str, Callable[[], Any]], rounds: int = 15) -> pd.DataFrame:
    """Every call takes its turn in every round, after one that does not count; a row per call.

    Columns: method; ms, the median; ratio, the median over rounds of its time by that of the first call in the same
    round, with its quartiles low and high; best, the ratio of the shortest times. Other work on the machine disturbs
    all calls alike, so trust ratios: the median where it disturbs a little, the best where it disturbs much.
    Raises ValueError for fewer than one round.
    """
    if rounds < 1 or not calls:
        raise ValueError(f"{len(calls)} calls in {rounds} rounds: there is nothing to measure")
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    wait_for_gpus()
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            wait_for_gpus()
            times[name].append(time.perf_counter() - begin)
    base = next(iter(times.values()))
    rows = []
    for name, seconds in times.items():
        ratios = [own / other for own, other in zip(seconds, base, strict=True)]
        low, ratio, high = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
        row = {"method": name, "ms": 1e3 * statistics.median(seconds), "ratio": ratio, "low": low, "high": high}
        rows.append(row | {"best": min(seconds) / min(base)})
    return pd.DataFrame(rows)


def wait_for_gpus() -> None:
    """Until every GPU that holds a tensor has done what it was told; nothing where there is none."""
    if torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            if torch.cuda.memory_allocated(index):  # no context on a GPU that others use
                torch.cuda.synchronize(index)


def products(model: nn.Module, run: Callable[[], Any]) -> Callable[[], None]:
    """The matrix products of the model's linear layers in `run`, and nothing else: the floor of any storage of weights.

    Inputs are copied, weights that are stored packed are made dense once; call the result to make the products.
    """
    seen: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def note(layer: nn.Module, args: tuple, output: Tensor) -> None:
        weight = layer.weight(args[0].dtype) if isinstance(layer, VQLinear) else layer.weight
        seen.append((args[0].detach().clone(), weight.detach(), layer.bias))

    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, VQLinear))]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()

    def repeat() -> None:
        with torch.no_grad():
            for x, weight, bias in seen:
                linear(x, weight, bias)

    return repeat


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, dense weights of speed mode too; memory that several share counts once."""
    storages = {}
    kept = [m.dense for m in model.modules() if isinstance(m, VQLinear) and m.dense is not None]
    for tensor in [*model.parameters(), *model.buffers(), *kept]:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
