"""Calibration of a few blocks of a text-to-image transformer in full width: seconds a step and peak memory.

    python benchmarks/bench_families.py --models flux.1-dev sd3.5-medium --save families-cpu

The blocks have seeded weights; images have the model's own number of tokens, prompts random embeddings. Each model in a
process of its own, for its peak. With second moments (recipe `best`): --recipe best. On a GPU: --device cuda.
"""

import argparse
import json
import subprocess
import sys

import pandas as pd
import torch
from machine import add_options, device_name, report, versions

import vqlib
from vqlib.config import RECIPES
from vqlib.models import structure
from vqlib.models.flow import FlowMatching
from vqlib.models.pipeline import Pipeline, device_of
from vqlib.studies.presets import preset
from vqlib.system.memory import peak_memory


def measured(options: argparse.Namespace, model: str) -> dict:
    """One model's row, in this process."""
    torch.set_num_threads(options.threads)
    job, device, recipe = preset(f"{model}-w{options.bits}"), device_of(options.device), RECIPES[options.recipe]
    shape = job.geometry.first(options.blocks)
    torch.manual_seed(0)
    with device:
        transformer = structure.with_fast_products(shape.build().eval().requires_grad_(False))
    pipe = Pipeline(model, transformer, None, FlowMatching(), ("a prompt",), shape.denoiser())
    settings = recipe.run(job.calibration, batch_size=options.batch, steps=2, iterations=options.iterations)
    vq = recipe.codes(job.vq, kmeans_iterations=options.kmeans)
    hessians = vqlib.input_hessians(pipe, settings, 1) if vq.assignment != "nearest" else None
    run = vqlib.calibrate(pipe, vqlib.quantize(transformer, vq, hessians=hessians), settings)
    records = list(run)
    blocks, count = (
        len(structure.block_list(transformer)),
        sum(x.weight.numel() for x in structure.quantizable(transformer).values()),
    )
    row = {"model": model, "blocks": f"{blocks} of {job.geometry.depth}", "width": shape.hidden, "tokens": shape.tokens}
    row |= {"weights, million": count / 1e6, "batch": options.batch, "seconds a step": records[-1].seconds}
    return row | {"peak GiB": peak_memory(device) / 2**30}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["flux.1-dev", "sd3.5-medium"])
    parser.add_argument("--blocks", type=int, default=1, help="of each kind")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--kmeans", type=int, default=3, help="k-means iterations, which take no memory")
    parser.add_argument("--recipe", default="paper", choices=RECIPES)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    add_options(parser)
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(measured(options, options.models[0])))
        return
    rows = []
    for model in options.models:
        shared = [
            f"--{name}={getattr(options, name)}"
            for name in ("blocks", "bits", "batch", "iterations", "kmeans", "recipe", "device", "threads")
        ]
        child = [sys.executable, __file__, "--alone", "--models", model, *shared]
        rows.append(
            json.loads(subprocess.run(child, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        )
    notes = [
        f"{device_name(options.device, options.threads)}; {versions('diffusers')}.",
        f"{options.bits} bits, recipe `{options.recipe}`, {options.iterations} steps, seeded weights in float32; the peak is of the whole process, "
        "k-means and PyTorch included.",
    ]
    report("Calibration in the width of text-to-image transformers", pd.DataFrame(rows), notes, options.save)


if __name__ == "__main__":
    main()
