"""All codebooks of a model: seconds, peak memory, and the error against 100 plain Lloyd iterations.

    python benchmarks/bench_codebooks.py --bits 2 --threads 2

The model is DiT-XL/2's geometry with seeded weights, one layer at a time. Plain Lloyd runs on `--compared` layers of every
shape, in full, from the same start. On a GPU: --device cuda.
"""

import argparse
import time

import pandas as pd
import torch
from machine import add_options, device_name, report, versions
from seeded import weight

from vqlib import kernels
from vqlib.config import VQConfig
from vqlib.models.geometry import Geometry
from vqlib.quantizer.codebook import fit_codebook
from vqlib.system.memory import peak_memory


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def fit(x: torch.Tensor, k: int) -> tuple[object, float, float]:
    """The codebook, and its wall and processor seconds."""
    wait(x.device)
    wall, cpu = time.perf_counter(), time.process_time()
    book = fit_codebook(x, k)
    wait(x.device)
    return book, time.perf_counter() - wall, time.process_time() - cpu


def plain_lloyd(x: torch.Tensor, k: int, iterations: int = 100) -> float:
    """Mean squared error after textbook iterations over all sub-vectors from k random rows of x [N, d]."""
    codewords = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(1))[:k].to(x.device)].clone()
    for _ in range(iterations):
        sums = kernels.cluster_sums(x, codewords)
        means = (sums.sums / sums.counts.clamp(min=1)[:, None]).float()
        codewords = torch.where((sums.counts > 0)[:, None], means, codewords)
    return (x - codewords[kernels.assign(x, codewords)]).square().mean(dtype=torch.float64).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=28)
    parser.add_argument("--compared", type=int, default=1, help="layers of each shape that plain Lloyd also fits")
    add_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device, vq, geometry = torch.device(options.device), VQConfig(bits=options.bits), Geometry()
    fit(torch.randn(4096, vq.d, device=device), vq.k)  # compiles
    generator = torch.Generator().manual_seed(0)
    rows: dict[str, dict] = {}
    for _block in range(options.blocks):
        for _name, shape in geometry.linears().items():
            x = weight(*shape, generator).reshape(-1, vq.d).to(device)
            book, wall, cpu = fit(x, vq.k)
            row = rows.setdefault(f"{shape[0]}×{shape[1]}", {"layers": 0, "sub-vectors": len(x), "passes": 0, "seconds": 0.0,
                                                           "processor seconds": 0.0, "error / plain Lloyd": []})  # fmt: skip
            row["layers"] += 1
            row["passes"] += len(book.history)
            row["seconds"] += wall
            row["processor seconds"] += cpu
            if len(row["error / plain Lloyd"]) < options.compared:
                row["error / plain Lloyd"].append(book.mse / plain_lloyd(x, vq.k))
    table = pd.DataFrame([{"shape": shape} | row for shape, row in rows.items()])
    table["passes"] /= table["layers"]
    table["error / plain Lloyd"] = [max(values, default=float("nan")) for values in table["error / plain Lloyd"]]
    total = {name: table[name].sum() for name in ("layers", "seconds", "processor seconds")}
    table = pd.concat([table, pd.DataFrame([{"shape": "all"} | total])], ignore_index=True)
    notes = [f"{device_name(device, options.threads)}; {versions('numba')}.", f"{options.bits} bits: k = {vq.k}, d = {vq.d}; "
             f"{options.blocks} blocks of DiT-XL/2, seeded weights; peak memory of the process {peak_memory(device) / 2**30:.2f} GiB. "
             "Passes: over all sub-vectors, mean of the layers. Error: mean squared, the worst of the layers compared."]  # fmt: skip
    report("All codebooks of DiT-XL/2", table, notes, options.save)


if __name__ == "__main__":
    main()
