"""Assignment pass and k-means update against faiss and scikit-learn, in one run on one set of points.

    python benchmarks/bench_assignment.py --points 1327104 --length 4 --codewords 256 --threads 2

faiss-cpu and scikit-learn are optional; a row says so where one is missing. Every method takes its turn in every round,
so that other work on the machine disturbs all of them alike; the table gives medians and the ratio to faiss.
"""

import argparse
import csv
import platform
import statistics
import time
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from vqlib import kernels
from vqlib.kernels import reference


def processor() -> str:
    """Name of the processor as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions() -> str:
    """Python and the libraries compared, with their versions."""
    found = [f"Python {platform.python_version()}"]
    for name in ("torch", "numba", "faiss-cpu", "scikit-learn"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)


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


def measure(methods: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every method in every round, after one call that compiles and warms up."""
    times: dict[str, list[float]] = {name: [] for name in methods}
    for run in methods.values():
        run()
    for _ in range(rounds):
        for name, run in methods.items():
            begin = time.perf_counter()
            run()
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
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--csv", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(options.points, options.length, generator=generator)
    codewords = x[torch.randperm(len(x), generator=generator)[: options.codewords]].clone()
    part = x[: max(1, len(x) // 16)]
    methods: dict[str, Callable | None] = {
        "vqlib assign": lambda: kernels.assign(x, codewords),
        "vqlib assign + update": lambda: kernels.cluster_sums(x, codewords),
        "vqlib nearest, n = 3": lambda: kernels.nearest(x, codewords, min(3, len(codewords))),
        "faiss IndexFlatL2": faiss_assign(x, codewords, options.threads),
        "scikit-learn, 1 Lloyd iteration": sklearn_iteration(x, codewords),
        "plain torch twin, 1/16 of the points": lambda: reference.assign(part, codewords),
    }
    times = measure({name: run for name, run in methods.items() if run is not None}, options.rounds)
    base = statistics.median(times["faiss IndexFlatL2"]) if "faiss IndexFlatL2" in times else None

    rows = [("method", "median ms", "best ms", "ratio to faiss")]
    for name in methods:
        if name not in times:
            rows.append((name, "not installed", "", ""))
            continue
        middle = statistics.median(times[name])
        ratio = f"{middle / base:.2f}" if base else ""
        rows.append((name, f"{middle:.1f}", f"{min(times[name]):.1f}", ratio))

    print(f"{processor()}, {options.threads} threads; {versions()}")
    print(f"n = {options.points}, d = {options.length}, k = {options.codewords}, {options.rounds} rounds\n")
    for row in rows:
        print(f"{row[0]:<38}{row[1]:>14}{row[2]:>10}{row[3]:>16}")
    if methods["faiss IndexFlatL2"] is not None:
        count, gap = disagreements(x, codewords, kernels.assign(x, codewords), methods["faiss IndexFlatL2"]())
        print(f"\ncodes that differ from faiss: {count}, by at most {gap:.1e} of the squared distance")
    if options.csv:
        with options.csv.open("w", newline="") as file:
            csv.writer(file).writerows([*rows, ("device", processor(), f"{options.threads} threads", versions())])


if __name__ == "__main__":
    main()
