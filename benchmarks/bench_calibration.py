"""Calibration steps against their floor, peak memory, and whether a stopped run goes on.

    python benchmarks/bench_calibration.py --batch 2 --iterations 20 --threads 2
    python benchmarks/bench_calibration.py --model dit-mini-fashion --batch 16 --iterations 40 --floors 20 --threads 2

The floor of a step is what no implementation of the method can leave out: the full-precision forward pass, and a plain forward
and backward pass of every block with dense weights that take gradients, by the same library of matrix products and in the same
precision. Floor and steps are measured in turn. Without
--model the geometry is DiT-XL/2's and weights are seeded; codebooks get one k-means pass, which changes no cost here. On a GPU:
--device cuda --batch 16.
"""

import argparse
import statistics
import tempfile
import time

import pandas as pd
import torch
from machine import add_options, device_name, report, versions
from seeded import seeded_pipeline
from torch import nn

from vqlib.calibrator.calibrate import Calibration, calibrate
from vqlib.config import PRODUCTS, CalibrationConfig, VQConfig
from vqlib.models import class_conditional, pipeline, structure
from vqlib.models.geometry import Geometry
from vqlib.quantizer.quantize import quantize
from vqlib.studies.estimate import estimate
from vqlib.studies.presets import preset
from vqlib.system.memory import peak_memory


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def clocks() -> tuple[float, float]:
    """Wall and processor seconds; other work on the machine disturbs the second far less."""
    return time.perf_counter(), time.process_time()


def floor(run: Calibration) -> tuple[float, float]:
    """Wall and processor seconds of the full-precision pass and, inside it, a plain forward and backward of every block."""

    def follow(block: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> None:
        weights = [m.weight for n, m in block.named_modules() if isinstance(m, nn.Linear) and "norm1.emb" not in n]
        for value in weights:
            value.requires_grad_(True)
        with torch.enable_grad():
            own = block.forward(*args, **kwargs)  # not block(): that would call this hook again
            (own - output).square().mean().backward()
        for value in weights:
            value.requires_grad_(False).grad = None

    inputs = run.trajectory.inputs()
    handles = [
        block.register_forward_hook(follow, with_kwargs=True) for block in structure.block_list(run.pipe.transformer)
    ]
    started = clocks()
    with torch.no_grad(), structure.precision(run.config.products, run.pipe.transformer), run.embedder.working():
        class_conditional.forward(run.pipe.transformer, inputs.x, inputs.timestep, inputs.labels)
    wait(run.trajectory.device)
    for handle in handles:
        handle.remove()
    return since(started)


def since(started: tuple[float, float]) -> tuple[float, float]:
    return tuple(now - then for now, then in zip(clocks(), started, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="what vqlib.load takes; without it DiT-XL/2's geometry with seeded weights")
    parser.add_argument("--batch", type=int, default=2, help="images; twice as many rows with guidance")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--blocks", type=int, default=28, help="of the seeded model")
    parser.add_argument("--candidates", type=int, default=3)
    parser.add_argument("--products", default="float32", choices=PRODUCTS)
    parser.add_argument("--floors", type=int, default=3, help="how often the floor is measured")
    parser.add_argument("--resume", action="store_true", help="stop half-way, write a checkpoint, go on from it")
    parser.add_argument("--estimate", action="store_true", help="estimate the same job first")
    add_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    half = options.iterations // 2
    config = CalibrationConfig(
        iterations=options.iterations,
        batch_size=options.batch,
        products=options.products,
        timestep_order="sequential",  # no forward passes before the first step
        checkpoint_every=half if options.resume else options.iterations,
    )
    vq = VQConfig(bits=2, candidates=options.candidates, kmeans_iterations=1)
    notes = [f"{device_name(device, options.threads)}; {versions('numba')}."]
    seeded = not options.model
    pipe = (
        seeded_pipeline(Geometry(depth=options.blocks), device) if seeded else pipeline.load(options.model).to(device)
    )
    blocks = len(structure.block_list(pipe.transformer))
    if options.estimate:
        changes = {f"calibration.{name}": value for name, value in config.to_dict().items()}
        job = preset("dit-xl-2-256-w2").with_settings(changes | {"vq.kmeans_iterations": 1, "images": 0})
        expected = estimate(pipe, job.with_settings({"vq.candidates": options.candidates}))
        notes.append(f"Estimated: codebooks {expected.seconds['codebooks']:.1f} s, calibration "
                     f"{expected.seconds['calibration']:.1f} s, peak memory {expected.peak_memory / 2**30:.2f} GiB.")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/run" if options.resume else None
        started = time.perf_counter()
        student = quantize(pipe.transformer, vq)
        notes.append(f"Codebooks (one pass) and candidates: {time.perf_counter() - started:.1f} s.")
        run = calibrate(pipe, student, config, out=out)
        every = max(1, options.iterations // options.floors)
        steps, floors, began, stopped = [], [], time.perf_counter(), 0.0
        for iteration in range(options.iterations):
            if options.resume and iteration == half:
                run.close()
                del run, student  # a run goes on from the student it started with, made anew
                run = calibrate(pipe, quantize(pipe.transformer, vq), config, out=out)
                notes.append(f"Stopped and resumed at step {run.iteration} of {options.iterations}.")
            before = time.process_time()
            record = next(run)
            steps.append((record.seconds, time.process_time() - before))
            if iteration % every == 0 and len(floors) < options.floors:
                floors.append(floor(run))
                stopped += floors[-1][0]
        run.close()
        notes.append(f"Calibration with its checkpoints: {time.perf_counter() - began - stopped:.1f} s.")
    notes.append(f"{blocks} blocks, batch {options.batch} with guidance, n = {options.candidates}, 2 bits, {len(steps)} "
                 f"steps, products in {options.products}; peak memory {peak_memory(device) / 2**30:.2f} GiB.")  # fmt: skip
    rows = []
    for clock, step, low in zip(
        ("wall", "processor"), zip(*steps[1:]), zip(*floors), strict=True
    ):  # the first step warms up
        row = {"clock": clock, "step s": statistics.median(step), "fastest": min(step), "slowest": max(step)}
        row |= {"floor s": statistics.median(low), "step / floor": statistics.median(step) / statistics.median(low)}
        row |= {"fastest / fastest": min(step) / min(low)}  # what other work on the machine disturbs least
        rows.append(row)
    table = pd.DataFrame(rows)
    report(f"Calibration step of {options.model or 'DiT-XL/2'}", table, notes, options.save)


if __name__ == "__main__":
    main()
