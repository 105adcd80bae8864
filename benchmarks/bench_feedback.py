"""Error-feedback candidates of every layer of DiT-XL/2: seconds beside those of the layer's k-means, peak memory.

    python benchmarks/bench_feedback.py --bits 2 --threads 2

Seeded weights and second moments of correlated inputs, one layer of every shape, times the number of such layers; n as
in recipe `best`. The second moments themselves are gathered on the model's forward passes and not counted here. On a GPU:
--device cuda.
"""

import argparse
import time

import pandas as pd
import torch
from machine import add_options, device_name, report, versions
from seeded import weight

from vqlib.config import recipe_vq
from vqlib.models.geometry import Geometry
from vqlib.quantizer.codebook import fit_codebook
from vqlib.quantizer.error_feedback import candidates_with_feedback, refit
from vqlib.quantizer.feedback import Columns
from vqlib.system.memory import peak_memory


def hessian(inputs: int, generator: torch.Generator, device: torch.device) -> torch.Tensor:
    """E x xᵀ of 2·`inputs` seeded inputs, mixed so that their columns are correlated: [in, in]."""
    mixed = torch.randn(inputs, inputs, generator=generator) / inputs**0.5 + torch.eye(inputs)
    x = torch.randn(2 * inputs, inputs, generator=generator) @ mixed
    return (x.T @ x / len(x)).to(device)


def timed(call) -> tuple[object, float]:
    """What a call returns and its seconds; with CUDA, of all that it started."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=2)
    add_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device, vq, geometry = torch.device(options.device), recipe_vq("best", options.bits), Geometry()
    generator = torch.Generator().manual_seed(0)
    small = torch.randn(64, 64, generator=generator).to(device)
    fit_codebook(small.view(-1, vq.d), vq.k)  # both compile
    candidates_with_feedback(
        small,
        Columns.of(torch.eye(64, device=device), vq.d),
        small.view(-1, vq.d)[: vq.k],
        vq.candidates,
        vq.ratio_start,
    )
    shapes = list(geometry.linears().values())
    rows = []
    for shape in dict.fromkeys(shapes):
        w, h = weight(*shape, generator).to(device), hessian(shape[1], generator, device)
        book, kmeans = timed(lambda: fit_codebook(w.view(-1, vq.d), vq.k))
        columns, factoring = timed(lambda: Columns.of(h, vq.d))
        found, candidates = timed(
            lambda: candidates_with_feedback(w, columns, book.codewords, vq.candidates, vq.ratio_start)
        )
        _, refitting = timed(lambda: refit(w, h, found.indices[:, 0].long(), book.codewords))
        row = {
            "shape": f"{shape[0]}×{shape[1]}",
            "layers": geometry.depth * shapes.count(shape),
            "k-means s": kmeans,
            "factor s": factoring,
        }
        rows.append(row | {"candidates s": candidates, "refit s": refitting})
    table = pd.DataFrame(rows)
    table["ratio to k-means"] = (table["factor s"] + table["candidates s"] + table["refit s"]) / table["k-means s"]
    seconds = (table["factor s"] + table["candidates s"] + table["refit s"]) @ table["layers"]
    notes = [f"{device_name(device, options.threads)}; {versions('numba')}.", f"{options.bits} bits: k = {vq.k}, d = {vq.d}, "
             f"n = {vq.candidates}; seconds of one layer. All {table['layers'].sum()} layers: {seconds:.0f} s; peak memory of the "
             f"process {peak_memory(device) / 2**30:.2f} GiB."]  # fmt: skip
    report("Error feedback on DiT-XL/2's layers", table, notes, options.save)


if __name__ == "__main__":
    main()
