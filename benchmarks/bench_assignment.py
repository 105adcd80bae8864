"""Assignment pass and k-means update against faiss and scikit-learn, in one run on one set of points.

    python benchmarks/bench_assignment.py --points 1327104 --length 4 --codewords 256 --threads 2

faiss-cpu and scikit-learn are optional; the row of one that is missing is empty. Every method takes its turn in every round,
so that other work on the machine disturbs all of them alike; the table gives medians and the ratio to faiss.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from importlib import import_module

import pandas as pd
import torch
from machine import add_options, device_name, report, versions

from vqlib import kernels
from vqlib.kernels import reference


def faiss_assign(x: torch.Tensor, codewords: torch.Tensor, threads: int) -> Callable | None:
    """Exact search of the nearest codeword in a flat faiss index, or None without faiss."""
    try:
        faiss = import_module("faiss")
    except ImportError:
        return None
    faiss.omp_set_num_threads(threads)
    index = faiss.IndexFlatL2(x.shape[1])
    index.add(codewords.numpy())
    points = x.numpy()
    return lambda: torch.from_numpy(index.search(points, 1)[1][:, 0])


def sklearn_iteration(x: torch.Tensor, codewords: torch.Tensor) -> Callable | None:
    """One Lloyd iteration (and the final assignment) of scikit-learn, or None without it."""
    try:
        cluster = import_module("sklearn.cluster")
    except ImportError:
        return None
    points, start = x.numpy(), codewords.numpy()

    def run() -> None:
        cluster.KMeans(len(start), init=start, n_init=1, max_iter=1, algorithm="lloyd", copy_x=False).fit(points)

    return run


def measure(methods: dict[str, Callable], rounds: int, wait: Callable) -> dict[str, list[float]]:
    """Milliseconds of every method in every round, after one call that compiles and warms up; `wait` ends each."""
    times: dict[str, list[float]] = {name: [] for name in methods}
    for run in methods.values():
        run()
    for _ in range(rounds):
        for name, run in methods.items():
            begin = time.perf_counter()
            run()
            wait()
            times[name].append(1e3 * (time.perf_counter() - begin))
    return times


def disagreements(
    x: torch.Tensor, codewords: torch.Tensor, ours: torch.Tensor, theirs: torch.Tensor
) -> tuple[int, float]:
    """Number of different codes, and the largest relative difference of squared distances among them."""
    rows = (ours != theirs).nonzero()[:, 0]
    if len(rows) == 0:
        return 0, 0.0
    distance = [(x[rows].double() - codewords[c[rows]].double()).square().sum(dim=1) for c in (ours, theirs)]
    return len(rows), ((distance[0] - distance[1]).abs() / distance[0].clamp(min=1e-30)).max().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=1_327_104, help="default: one MLP layer of DiT-XL/2")
    parser.add_argument("--length", type=int, default=4)
    parser.add_argument("--codewords", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    add_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(options.points, options.length, generator=generator).to(options.device)
    codewords = x[torch.randperm(len(x), generator=generator)[: options.codewords].to(x.device)].clone()
    on_cpu = x.device.type == "cpu"
    part = x[: max(1, len(x) // 16)]
    methods: dict[str, Callable | None] = {
        "vqlib assign": lambda: kernels.assign(x, codewords),
        "vqlib assign + update": lambda: kernels.cluster_sums(x, codewords),
        "vqlib nearest, n = 3": lambda: kernels.nearest(x, codewords, min(3, len(codewords))),
        "faiss IndexFlatL2": faiss_assign(x, codewords, options.threads) if on_cpu else None,
        "scikit-learn, 1 Lloyd iteration": sklearn_iteration(x, codewords) if on_cpu else None,
        "plain torch twin, 1/16 of the points": lambda: reference.assign(part, codewords),
    }
    wait = (lambda: None) if on_cpu else torch.cuda.synchronize
    times = measure({name: run for name, run in methods.items() if run is not None}, options.rounds, wait)
    base = statistics.median(times["faiss IndexFlatL2"]) if "faiss IndexFlatL2" in times else float("nan")
    rows = []
    for name in methods:
        row = {"method": name}
        if name in times:
            middle = statistics.median(times[name])
            row |= {"median ms": middle, "best ms": min(times[name]), "ratio to faiss": middle / base}
        rows.append(row)
    notes = [f"{device_name(options.device, options.threads)}; {versions('numba', 'faiss-cpu', 'scikit-learn')}.",
             f"n = {options.points}, d = {options.length}, k = {options.codewords}, {options.rounds} rounds."]  # fmt: skip
    if methods["faiss IndexFlatL2"] is not None:
        count, gap = disagreements(x, codewords, kernels.assign(x, codewords), methods["faiss IndexFlatL2"]())
        notes.append(f"Codes that differ from faiss: {count}, by at most {gap:.1e} of the squared distance.")
    report("Assignment pass", pd.DataFrame(rows), notes, options.save)


if __name__ == "__main__":
    main()
